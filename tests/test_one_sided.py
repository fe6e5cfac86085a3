"""Conditions of one token folded into comparisons: equal on every pair, and fewer of both tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attndsl
from attndsl.blockruns import Reader
from attndsl.grammar import load
from attndsl.mask_cost import both_cost
from attndsl.one_sided import GREATEST, LEAST, folded, merged
from attndsl.program import Binary, Call, CallShape, Compare, Const, If, Logic, Program, Scalar, Unary, Var, walk
from attndsl.relation import Lowering

Q, K, N = Var("q"), Var("k"), Var("Nk")
PROGRAM = load("attention a { input doc : int[b, k]  attend all }").program
pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
PATTERNS = Path(attndsl.__file__).resolve().parent.parent / "examples" / "patterns"


def value(e: Scalar, rows: int, program: Program = PROGRAM) -> Any:
    shape = CallShape(1, 1, 1, rows, rows, 8, 8)
    zero = np.zeros((1, 1), np.int64)
    variables = Reader(program, shape, {}, {}).variables(zero, zero)
    variables |= {"q": np.arange(rows)[:, None], "k": np.arange(rows)}
    return np.broadcast_to(Reader(program, shape, {}, {}).value(e, variables), (rows, rows))


def numbers(of: Scalar) -> st.SearchStrategy[Scalar]:
    """Integers of one token, or of none."""
    constant = st.integers(-3, 9).map(Const)
    leaf = st.one_of(st.just(of), st.just(N), constant)
    return st.recursive(
        leaf,
        lambda x: st.one_of(
            st.builds(Binary, st.sampled_from("+-"), x, x),
            st.builds(Binary, st.sampled_from(["//", "%"]), x, st.integers(1, 4).map(Const)),
            st.builds(lambda f, a, b: Call(f, (a, b)), st.sampled_from(["min", "max"]), x, x),
            st.builds(lambda a, b, c: If(Compare("<", a, b), b, c), x, x, x),
        ),
        max_leaves=3,
    )


OPS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])


def compared(a: Scalar, b: Scalar) -> st.SearchStrategy[Scalar]:
    return st.builds(Compare, OPS, numbers(a), numbers(b))


TRUTHS = st.builds(Compare, st.sampled_from(["==", "!="]), compared(Q, N), compared(K, N))
LEAVES = st.one_of(
    compared(Q, K), compared(K, Q), compared(Q, N), compared(K, N), TRUTHS, compared(Binary("-", Q, K), N)
)


def joined(x: st.SearchStrategy[Scalar]) -> st.SearchStrategy[Scalar]:
    several = st.lists(x, min_size=2, max_size=4).map(tuple)
    return st.one_of(st.builds(Logic, st.sampled_from(["and", "or"]), several), st.builds(lambda y: Unary("not", y), x))


@given(st.recursive(LEAVES, joined, max_leaves=8))
def test_folded_conditions_hold_for_the_same_pairs(cond: Scalar) -> None:
    found = merged(cond, PROGRAM)
    for rows in (1, 2, 9):
        assert np.array_equal(value(found, rows), value(cond, rows))
    chosen = folded(cond, PROGRAM)
    assert chosen is cond or (chosen == found and both_cost(found) < both_cost(cond))


def predicate(text: str) -> Scalar:
    program = load(text if "attention" in text else f"attention a {{ attend {text} }}").program
    return Lowering(program, (1, 1)).predicate(program.branch.pattern)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("{ q >= 9 and k < q }", 1),
        ("{ (q >= 9 or k < q) }", 1),
        ("{ k <= q and k < 4 or k <= q and q - k < 9 }", 4),
        ("{ (q // 4 == k // 4) and ((q >= Nk // 2) == (k >= Nk // 2)) }", 1),
        ("{ q // 4 > k // 4 and q < 9 or q // 4 >= k // 4 and q >= 20 }", 1),
    ],
)
def test_what_is_left_of_both_tokens(text: str, most: int) -> None:
    cond = predicate(text)
    found = merged(cond, PROGRAM)
    assert both_cost(found) <= most < both_cost(cond)
    assert np.array_equal(value(found, 40), value(cond, 40))


def test_block_diffusion_compares_a_pair_twice() -> None:
    program = attndsl.compile(PATTERNS / "block_diffusion.attn").program
    cond = Lowering(program, (1, 1)).predicate(program.branch.pattern)
    found = folded(cond, program)
    assert both_cost(found) == 3 and both_cost(cond) > 9
    for rows in (1, 63, 130, 256):
        assert np.array_equal(value(found, rows, program), value(cond, rows, program))


@pytest.mark.parametrize(
    "cond",
    [
        Logic("and", (Compare("<", Q, Const(5)), Compare("<", Binary("-", Q, Binary("*", K, Q)), N))),
        Logic("and", (Compare("<", Q, Const(5)), Compare(">", Q, Binary("*", Const(2**29), K)))),
    ],
    ids=["not of one token each", "too large"],
)
def test_what_is_not_folded(cond: Scalar) -> None:
    assert not {LEAST, GREATEST} & set(walk(merged(cond, PROGRAM)))


def test_data_is_not_folded() -> None:
    program = load("attention a { input doc : int[b, k]  attend { q < 5 and doc[q] > doc[k] } }").program
    cond = Lowering(program, (1, 1)).predicate(program.branch.pattern)
    assert not {LEAST, GREATEST} & set(walk(merged(cond, program)))
