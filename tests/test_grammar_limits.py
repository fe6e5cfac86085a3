"""Untrusted texts: each passes a bound and gives a diagnostic, soon and in little memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.source_files import read_source

SECONDS = 10.0  # none takes 1 on an idle core; what is not bounded takes hours
MEGABYTES = 120


def doubling(n: int) -> str:
    calls = "\n".join(f"pattern p{i} = p{i - 1} | p{i - 1}" for i in range(1, n))
    return f"pattern p0 = causal\n{calls}"


def dead_doubling(n: int) -> str:
    """Calls that multiply inside a branch that a constant rules out."""
    calls = "\n".join(f"pattern p{i} = if 0 == 1 then p{i - 1} else p{i - 1}" for i in range(1, n))
    return f"pattern p0 = causal\n{calls}"


def squares(n: int) -> str:
    bindings = ", ".join(f"x{i} = x{i - 1} * x{i - 1}" for i in range(1, n + 1))
    return f"{{ k <= x{n} where x0 = q + 1, {bindings} }}"


def chain(n: int) -> str:
    calls = "\n".join(f"pattern p{i} = ~p{i - 1}" for i in range(1, n))
    return f"pattern p0 = causal\n{calls}"


TEXTS: dict[str, tuple[Callable[[], str], str]] = {
    "brackets": (lambda: "(" * 9_000 + "causal" + ")" * 9_000, "A004"),
    "many brackets": (lambda: "(" * 19_000, "A004"),
    "braces": (lambda: "{" * 10_000, "A004"),
    "complements": (lambda: "~" * 10_000 + "causal", "A004"),
    "nots": (lambda: "{ " + "not " * 10_000 + "true }", "A004"),
    "minuses": (lambda: "{ k <= " + "- " * 10_000 + "q }", "A004"),
    "else": (lambda: "if h == 0 then all else " * 2_000 + "causal", "A004"),
    "places": (lambda: "causal" + " on blocks(2)" * 3_000, "A004"),
    "ten megabytes": (lambda: "#" * 10_000_000, "A003"),
    "tokens": (lambda: "causal | " * 12_000 + "causal", "A003"),
    "terms": (lambda: "causal | " * 300 + "causal", "A006"),
    "sum": (lambda: "{ k <= " + "q + " * 9_000 + "1 }", "A006"),
    "differences": (lambda: "all" + " - causal" * 9_000, "A006"),
    "comparisons": (lambda: "{ " + "k < " * 9_000 + "q }", "A006"),
    "huge integer": (lambda: "{ k < " + "9" * 100_000 + " }", "A007"),
    "huge product": (lambda: "{ k < " + " * ".join(["9_000_000_000"] * 50) + " }", "A007"),
    "huge float": (lambda: "attention a { scale 1.0e9999 attend causal }", "A007"),
    "doubling patterns": (lambda: doubling(60), "A006"),
    "doubling dead patterns": (lambda: dead_doubling(60), "A006"),
    "doubling bindings": (lambda: squares(60), "A006"),
    "pattern chain": (lambda: chain(2_000), "A006"),
    "recursion": (lambda: "pattern p(n) = r(n) | r(n)\npattern r(n) = p(n) | p(n)\npattern t = p(1)", "A014"),
    "errors": (lambda: "$" * 50_000, "A005"),
    "broken clauses": (lambda: "attention a {" + " score )" * 4_000 + "}", "A002"),
    "nulls": (lambda: "\0" * 1_000, "A005"),
    "empty": (lambda: "", "A016"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_bound(name: str) -> None:
    make, code = TEXTS[name]
    text = make()
    load("causal")  # the parser is built once
    start = time.process_time()
    with pytest.raises(PatternError) as caught:
        load(text)
    seconds = time.process_time() - start
    assert code in {d.code for d in caught.value.diagnostics}
    assert len(str(caught.value)) < 50_000
    assert seconds < SECONDS


@pytest.mark.parametrize("name", ["ten megabytes", "tokens", "doubling bindings"])
def test_memory(name: str) -> None:
    text = TEXTS[name][0]()
    load("causal")
    tracemalloc.start()
    try:
        with pytest.raises(PatternError):
            load(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTES * 2**20


def test_large_good_text_loads() -> None:
    program = load("\n".join(f"pattern p{i} = causal & window({i + 1})" for i in range(1_000))).program
    assert program.name == "p999"


@pytest.mark.parametrize("data", [b"\xff\xfe", b"causal \x80", b"\xed\xa0\x80"])
def test_not_utf8(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.attn"
    file.write_bytes(data)
    with pytest.raises(PatternError) as caught:
        read_source(file)
    assert caught.value.diagnostics[0].code == "A001"


def test_files(tmp_path: Path) -> None:
    big = tmp_path / "big.attn"
    big.write_bytes(b"#" * 1_000_001)
    good = tmp_path / "good.attn"
    good.write_bytes(b"\xef\xbb\xbfcausal\r\n")
    for path, code in ((tmp_path, "A001"), (tmp_path / "none.attn", "A001"), (big, "A003"), ("a\0b", "A001")):
        with pytest.raises(PatternError) as caught:
            read_source(path)
        assert [d.code for d in caught.value.diagnostics] == [code]
    assert load(read_source(good).text).program.name == "pattern"


def test_the_parser_is_read_and_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from attndsl.grammar import parser_tables

    monkeypatch.setattr(parser_tables, "make_tables", lambda: pytest.fail("the tables were made anew"))
    parser_tables.tables.cache_clear()
    assert parser_tables.tables().actions(0)
