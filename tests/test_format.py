"""The formatter: canonical, idempotent, keeps comments, changes no meaning."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attndsl.diagnostics import PatternError
from attndsl.grammar import format_source, parse


def test_layout() -> None:
    text = """# two of them

attention  a(span=4,d:int[h]){input doc:int[b,k/64]sorted # ids
  # the near ones
  near=attend causal&(window( span )|~sink(-1))on blocks(64)

  # last
}   # end
pattern  b_ = {-q<=k<q-1 where x=- k,y=x }
"""
    assert (
        format_source(text)
        == """# two of them

attention a(span = 4, d : int[h]) {
    input doc : int[b, k/64] sorted  # ids
    # the near ones
    near = attend causal & (window(span) | ~sink(-1)) on blocks(64)

    # last
}  # end
pattern b_ = { -q <= k < q - 1 where x = -k, y = x }
"""
    )


def test_long_lines_break() -> None:
    text = "pattern p = " + " | ".join(f"(window({i}) & strided({i + 2}, phase = 1))" for i in range(12))
    lines = format_source(text).split("\n")
    assert len(lines) > 3
    assert max(len(line) for line in lines) <= 100


def test_error() -> None:
    with pytest.raises(PatternError):
        format_source("attention {")


NAMES = st.sampled_from(["q", "k", "h", "span", "doc", "Nk"])
NUMBERS = st.one_of(NAMES, st.integers(0, 10**6).map(str), st.just("2.5"))


def _numbers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%", "/"]), inner).map(" ".join),
        inner.map(lambda e: f"-({e})"),
        inner.map(lambda e: f"- {e}"),
        st.tuples(inner, inner).map(lambda p: f"max({p[0]},{p[1]},)"),
        inner.map(lambda e: f"doc [ {e} ]"),
        st.tuples(inner, inner, inner).map(lambda p: f"(if {p[0]}<{p[1]} then {p[2]} else k)"),
    )


VALUES = st.recursive(NUMBERS, _numbers, max_leaves=8)
CONDITIONS = st.tuples(VALUES, st.sampled_from(["<", "<=", "==", "!="]), VALUES).map("".join)


def _sets(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.sampled_from(["&", "|", "-"]), inner).map("".join),
        inner.map(lambda p: f"~({p})"),
        inner.map(lambda p: f"({p}) on blocks( 64 )"),
        st.tuples(CONDITIONS, inner, inner).map(lambda p: f"(if {p[0]} then {p[1]} else {p[2]})"),
    )


SETS = st.recursive(
    st.one_of(
        st.just("causal"),
        VALUES.map(lambda e: f"window({e})"),
        st.tuples(CONDITIONS, VALUES).map(lambda p: f"{{{p[0]} where x={p[1]},y=x}}"),
    ),
    _sets,
    max_leaves=8,
)
COMMENTS = st.sampled_from(["", "", "# first\n", "\n\n# own line\n", " # here\n\n\n", "\n"])


@st.composite
def texts(draw: st.DrawFn) -> str:
    parts = []
    for number in range(draw(st.integers(1, 3))):
        parts += [draw(COMMENTS), f"\npattern p{number}", draw(COMMENTS), "=", draw(SETS), draw(COMMENTS)]
    if draw(st.booleans()):
        parts += [draw(COMMENTS), "\nattention a {", draw(COMMENTS), "\nscore s*", draw(VALUES), draw(COMMENTS)]
        parts += ["\ninput doc:int[b,k/64]", draw(COMMENTS), "\nattend ", draw(SETS), draw(COMMENTS), "\n}"]
    return "".join([*parts, "\n", draw(COMMENTS)])


def comments(text: str) -> list[str]:
    return [line.split("#", 1)[1].rstrip() for line in text.split("\n") if "#" in line]


@given(texts())
@settings(max_examples=100, deadline=None)
def test_random_texts(text: str) -> None:
    laid_out = format_source(text)
    assert parse(laid_out) == parse(text)
    assert format_source(laid_out) == laid_out
    assert comments(laid_out) == comments(text)
