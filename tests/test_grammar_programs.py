"""The programs of published systems: each loads, or says exactly what is not supported yet."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from attndsl import syntax as ast
from attndsl.grammar import format_source, load, parse

FOLDER = Path(__file__).parent / "programs"

# Compile-time tables, and what a program needs beside its defaults.
PARAMS: dict[str, dict[str, object]] = {
    "moa_formula": {"alpha": [64, -8], "beta": [100, 200]},
    "longformer": {"w": [32, 64], "d": [1, 2]},
    "radial": {"width": [64] * 21, "every": [1, 2, 4] * 7},
    "dilated_heads": {"d": [1, 2, 3, 4]},
    "proxy_attn": {"n": [4, 8]},
}


@cache
def texts() -> dict[str, str]:
    """Each program's own text, by its name."""
    found: dict[str, str] = {}
    for file in sorted(FOLDER.glob("*.attn")):
        text = file.read_text("utf-8")
        for item in parse(text, name=file.name).items:
            assert not isinstance(item, ast.Input)
            found[item.name] = text[item.span.start : item.span.end]
    return found


def test_there_are_many() -> None:
    assert len(texts()) >= 80


@pytest.mark.parametrize("name", sorted(texts()))
def test_program(name: str) -> None:
    assert load(texts()[name], name=name, params=PARAMS.get(name)).program.name == name


@pytest.mark.parametrize("file", ["static.attn", "routing.attn"])
def test_format(file: str) -> None:
    text = (FOLDER / file).read_text("utf-8")
    laid_out = format_source(text, file)
    assert parse(laid_out) == parse(text)
    assert format_source(laid_out, file) == laid_out
    comments = [line.split("#", 1)[1].strip() for line in text.split("\n") if "#" in line]
    kept = [line.split("#", 1)[1].strip() for line in laid_out.split("\n") if "#" in line]
    assert kept == comments
