"""Lowering: what nodes a text becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attndsl.diagnostics import PatternError
from attndsl.grammar import load, parse
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    Blocks,
    Choose,
    Coarse,
    Coarsen,
    Compare,
    Const,
    Dim,
    Inter,
    Minus,
    On,
    Permuted,
    Program,
    Read,
    Set,
    Table,
    Type,
    Union,
    Var,
    Where,
    children,
    scalars,
    walk,
)  # fmt: skip

Q, K, H, B, G = Var("q"), Var("k"), Var("h"), Var("b"), Var("g")
CAUSAL = Where(Compare("<=", K, Q))


def program(text: str, **params: object) -> Program:
    return load(text, params=params).program


def pattern(text: str, **params: object) -> Set:
    return program(text, **params).branch.pattern


def attention(body: str, **params: object) -> Program:
    return program("attention a {\n" + body + "\n}", **params)


def codes(text: str, **params: object) -> list[str]:
    with pytest.raises(PatternError) as caught:
        load(text, params=params)
    return [d.code for d in caught.value.diagnostics]


def sink(n: int) -> Where:
    return Where(Compare("<", K, Const(n)))


def test_algebra() -> None:
    assert pattern("causal & (sink(4) | sink(2))") == Inter((CAUSAL, Union((sink(4), sink(2)))))
    assert pattern("causal - sink(1) - sink(2)") == Minus(CAUSAL, Union((sink(1), sink(2))))
    assert pattern("causal on blocks(4) on blocks(8)") == On(On(CAUSAL, Blocks(4)), Blocks(8))
    assert pattern("coarsen(causal, (64, 32), any)") == Coarsen(CAUSAL, 64, 32, Coarse.ANY)


def test_precedence() -> None:
    assert pattern("causal | sink(1) & sink(2) on blocks(2)") == Union(
        (CAUSAL, Inter((sink(1), On(sink(2), Blocks(2)))))
    )
    assert pattern("{ k - 1 - q * 2 // 3 < 0 }") == Where(
        Compare(
            "<",
            Binary("-", Binary("-", K, Const(1)), Binary("//", Binary("*", Q, Const(2)), Const(3))),
            Const(0),
        )
    )


def test_constant_conditions_choose() -> None:
    text = "pattern p(layer = 0) = if layer % 2 == 0 then sink(1) else causal"
    assert pattern(text) == sink(1)
    assert pattern(text, layer=3) == CAUSAL
    # What is ruled out is not judged: no division by zero, no missing `among`.
    guarded = "pattern p(step = 0) = if step > 0 then strided(step) else random(1, tokens, query, 0) & causal"
    assert codes(guarded) == ["A044"]
    assert "A025" not in codes(guarded)
    assert isinstance(pattern(guarded, step=2), Where)
    assert pattern("pattern p(n = 0) = { n > 0 and q % n == 0 or k <= q }") == CAUSAL


def test_run_time_conditions_stay() -> None:
    assert pattern("if h < 2 then causal else sink(1)") == Choose(Compare("<", H, Const(2)), CAUSAL, sink(1))


def test_where_shares() -> None:
    found = pattern("{ x < y where x = q + k, y = x * x }")
    assert isinstance(found, Where) and isinstance(found.cond, Compare)
    assert children(found.cond.right)[0] is found.cond.left


def test_arguments() -> None:
    assert pattern("pattern p(n, m = n + 1) = sink(n) | sink(m)\npattern t = p(m = 5, n = 1)") == Union(
        (sink(1), sink(5))
    )
    assert pattern("pattern p(n, m = n + 1) = sink(n) | sink(m)\npattern t = p(1)") == Union((sink(1), sink(2)))
    assert pattern("pattern place(P) = P on blocks(2)\npattern t = place(causal)") == On(CAUSAL, Blocks(2))
    assert pattern("pattern causal = sink(9)\npattern t = causal") == sink(9)


def test_inputs() -> None:
    found = attention("input keep : bool[b, h, q/64, 2]\nattend { keep[1] }")
    row = Binary("//", Q, Const(64))
    assert found.branch.pattern == Where(Read("keep", (B, H, row, Const(1)), Type.BOOL))
    assert found.inputs[0].dims == (Dim(Axis.B), Dim(Axis.H), Dim(Axis.Q, 64), Dim(Axis.CONST, size=2))
    found = attention("input doc : int[b, k] sorted\nattend document(doc)")
    ids = (Read("doc", (B, Q), Type.INT), Read("doc", (B, K), Type.INT))
    assert found.branch.pattern == Where(Compare("==", *ids))
    assert found.inputs[0].sorted
    found = attention("input pi : int[g, k]\nattend causal on pi")
    assert found.branch.pattern == On(CAUSAL, Permuted("pi", (G,)))


def test_file_inputs() -> None:
    found = program("input n : int[b]\npattern p = causal & { k < n[b] }")
    assert [decl.name for decl in found.inputs] == ["n"]


@pytest.mark.parametrize("table", [[3, 5], (3, 5), np.array([3, 5])])
def test_tables(table: Any) -> None:
    found = program("pattern p(d : int[h], e : float[2, 2] ) = causal & dilated(d[h])", d=table, e=[[1, 2], [3, 4]])
    assert {(t.name, t.shape, t.values) for t in found.tables} == {
        ("d", (2,), (3, 5)),
        ("e", (2, 2), (1.0, 2.0, 3.0, 4.0)),
    }
    used = [e for root in scalars(found.branch.pattern) for e in walk(root) if isinstance(e, Table)]
    assert used == [Table("d", (H,), Type.INT)]
    # Entries that are not positive cannot divide, and a constant index gives a constant.
    assert codes("pattern p(d : int[h]) = dilated(d[h])", d=[1, 0]) == ["A025"]
    assert pattern("pattern p(d : int[h]) = sink(d[1])", d=table) == sink(5)


@pytest.mark.parametrize("value", [[[1], [2, 3]], [], "text", None, [None], {1: 2}, [1.5], [[1, 2]], True])
def test_bad_tables(value: object) -> None:
    assert codes("pattern p(d : int[h]) = dilated(d[h])", d=value) == ["A015"]


@pytest.mark.parametrize("value", [1.5, True, "3", [3], 2**70, float("nan"), float("inf")])
def test_bad_values(value: object) -> None:
    assert codes("pattern p(n : int) = window(n)", n=value)[0] in ("A015", "A007")


def test_runtime_arguments() -> None:
    loaded = load("pattern p(n : runtime int) = { k < n and q % n == 0 }")
    assert loaded.program.args == ("n",)
    assert any(e == Arg("n") for root in scalars(loaded.program.branch.pattern) for e in walk(root))
    assert [w.code for w in loaded.warnings] == ["A801"]


@pytest.mark.parametrize(
    "condition",
    ["q % H == 0", "q % max(1, n[b]) == 0", "q % (h + 1) == 0", "h > 0 and q % h == 0", "h == 0 or q % h == 0",
     "(if h != 0 then q // h else 0) == 1", "q % (k % 7 + 1) == 0", "q // 3 % 5 == 0"],
)  # fmt: skip
def test_good_divisors(condition: str) -> None:
    assert load(f"input n : int[b]\npattern p = {{ {condition} }}").warnings == ()


@pytest.mark.parametrize(
    "condition", ["q % h == 0", "q % (h - 1) == 0", "q % 0 == 0", "q // -3 == 1", "q % (0 * n[b]) == 0", "q % k == 0",
                  "h == 0 and q % h == 0", "q % h == 0 and h > 0", "h > 0 or q % h == 0"]
)  # fmt: skip
def test_bad_divisors(condition: str) -> None:
    assert codes(f"input n : int[b]\npattern p = {{ {condition} }}") == ["A025"]


def test_modifiers() -> None:
    body = "input sinks : float[h] learnable\nscale 2\nscore s * 3\nsoftmax with sink sinks[h]\n"
    branch = attention(body + "attend causal").branch
    assert branch.scale == Const(2) and branch.score == Binary("*", Var("s"), Const(3))
    assert branch.sink == Read("sinks", (H,), Type.FLOAT) and branch.weights is None
    branch = attention(body + "attend causal { score s }").branch
    assert branch.score == Var("s") and branch.sink is not None
    branch = attention(body + "attend causal { softmax }").branch
    assert branch.sink is None and branch.score is not None
    branch = attention(body + "attend causal { weights 1 }").branch
    assert (branch.score, branch.sink, branch.weights, branch.scale) == (None, None, Const(1), Const(2))


def test_clauses_in_any_order() -> None:
    found = attention("attend causal & near\nscore s + bias[h]\npattern near = window(4)\ninput bias : float[h]")
    assert found.branch.score is not None


def test_align_start() -> None:
    assert attention("align start\ninput len : int[b]\nattend { k < len[b] }").align_start
    assert not attention("attend causal").align_start


def test_output_of_one_branch_is_that_branch() -> None:
    named = attention("near = attend causal\noutput near")
    assert named.branch.name == "near"
    assert replace(named, branches=(replace(named.branch, name=None),)) == attention("attend causal")


@pytest.mark.parametrize(
    ("text", "select", "name"),
    [("pattern a = all\npattern c = none", None, "c"), ("pattern a = all\npattern c = none", "a", "a"),
     ("pattern a = all\nattention d { attend a }\npattern e = all", None, "d"), ("causal", None, "pattern")],
)  # fmt: skip
def test_which_program(text: str, select: str | None, name: str) -> None:
    assert load(text, select=select).program.name == name


def test_mistakes_outside_the_program_count() -> None:
    assert codes("pattern unused = windw(3)\npattern p = causal") == ["A010"]
    assert codes("pattern unused = windw(3)\nattention a { attend causal }") == ["A010"]
    # Features do not: the program that runs does not use them.
    assert pattern("pattern unused = top(1, tokens, by = dot(Q, K))\npattern p = causal") == CAUSAL


def test_spans_point_into_the_text() -> None:
    loaded = load("causal &\n  window(4)", name="f.attn")
    assert isinstance(loaded.program.branch.pattern, Inter)
    span = loaded.program.branch.pattern.span
    assert span is not None and str(span) == "f.attn:1:1"


def test_under_coarsen_keys_may_be_read() -> None:
    assert codes("input r : bool[b, q]\npattern p = coarsen({ r[q] }, 64, any)") == ["A031"]
    assert attention("input r : bool[b, k]\nattend coarsen({ r[k] }, 64, any)").inputs


WORDS = st.sampled_from(
    "pattern attention input attend score scale softmax with sink where if then else and or not true on over "
    "{ } ( ) [ ] = , : . & | ~ - + * // % < <= == q k h s Nk 1 64 2.5 causal window top blocks doc int float b".split()
)


@given(st.lists(WORDS, max_size=25))
@settings(max_examples=250, deadline=None)
def test_any_words_give_a_program_or_diagnostics(words: list[str]) -> None:
    text = " ".join(words)
    try:
        loaded = load(text)
        assert parse(text) == loaded.document
    except PatternError as error:
        assert error.diagnostics
        assert all(d.render() for d in error.diagnostics)


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_a_program_or_diagnostics(text: str) -> None:
    try:
        load(text)
    except PatternError as error:
        assert error.diagnostics


def test_strict_grammar() -> None:
    """No terminals collide and no rules conflict."""
    from importlib.resources import files

    from lark import Lark

    Lark(files("attndsl.grammar").joinpath("attn.lark").read_text("utf-8"), parser="lalr", lexer="basic", strict=True)
