"""The published systems: each has its file, its source, its place in the list, and a test of its own rule."""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(path.stem for path in (EXAMPLES / "patterns").glob("*.attn"))
TESTS = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py") if "@covers(" in path.read_text("utf-8"))
# Common topics, which nobody is to be cited for.
TOPICS = {"documents", "packed", "padded", "pyramid", "tree", "affine_scaled"}


def rows() -> dict[str, list[str]]:
    """The files of each system in the list."""
    text = (EXAMPLES / "README.md").read_text("utf-8")
    found = re.findall(r"^\| ([^|]+) \| (.*patterns/.*) \|$", text[text.index("## Patterns") :], re.MULTILINE)
    return {name: re.findall(r"\(patterns/(\w+)\.attn\)", files) for name, files in found}


def opening(name: str) -> str:
    """The comment that a file opens with, in one line."""
    lines = (EXAMPLES / "patterns" / f"{name}.attn").read_text("utf-8").splitlines()
    last = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line[1:].strip() for line in lines[:last])


def test_the_list_has_every_file_once() -> None:
    assert Counter(name for files in rows().values() for name in files) == Counter(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_opens_with_its_source(name: str) -> None:
    (system,) = (system for system, files in rows().items() if name in files)
    text = opening(name)
    # One of the names that the list has for it.
    assert any(part.lower() in text.lower() for part in re.split(r", | and ", system)), f"{system} is not named"
    cited = re.search(r"\([^()]*(?:(?:19|20)\d\d|arXiv:\d{4}\.\d{4,5})[^()]*\)|\([^()]*/[^()]*\)", text)
    assert bool(cited) is not (name in TOPICS)


def test_every_file_is_tested_against_a_rule() -> None:
    tests = [test for name in TESTS for test in vars(import_module(f"tests.{name}")).values()]
    covered = {name for test in tests for name in getattr(test, "covered", ())}
    assert covered == set(FILES)
