"""The meaning of a program: `oracle.mask` against published rules, and against loops where no rule exists."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from attndsl import oracle
from attndsl.grammar import load
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    Blocks,
    Call,
    CallShape,
    Choose,
    Coarse,
    Coarsen,
    Compare,
    Complement,
    Const,
    Dim,
    If,
    InputDecl,
    Inter,
    Logic,
    Minus,
    On,
    Permuted,
    Program,
    Read,
    Scalar,
    Set,
    Table,
    TableDecl,
    Type,
    Unary,
    Union,
    Var,
    Where,
)
from tests.rules import BATCH, HEADS, SYSTEMS, Pairs, System, shape_of

Q, K, B, H, G, NQ, NK = (Var(name) for name in ("q", "k", "b", "h", "g", "Nq", "Nk"))
CAUSAL = Where(Compare("<=", K, Q))
EVEN_SUM = Where(Compare("==", Binary("%", Binary("+", Q, K), Const(2)), Const(0)))
Rule = Callable[[int, int, int, int], bool]


def program_of(pattern: Set, **parts: Any) -> Program:
    return Program.of("test", pattern, **parts)


def mask_of(pattern: Set, shape: CallShape, given: Mapping[str, Any] = {}, **parts: Any) -> oracle.Array:
    return oracle.mask(program_of(pattern, **parts), shape, given)


SMALL = CallShape(1, 1, 1, 4, 4, 8, 8)


def value_of(e: Scalar, shape: CallShape = SMALL, **args: int) -> oracle.Array:
    return oracle.evaluate(e, program_of(CAUSAL, args=tuple(args)), shape, {}, args)


def by_loop(rule: Rule, shape: CallShape, first: int) -> oracle.Array:
    """rule(b, h, q, k) at every tuple."""
    seen = np.zeros((shape.batch, shape.heads, shape.rows, shape.k_len), bool)
    for b, h, row, k in np.ndindex(*seen.shape):
        seen[b, h, row, k] = rule(b, h, row + first, k)
    return seen


# --------------------------------------------------------------------------------- published


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_published_system(system: System) -> None:
    program = load(system.text, params=system.params).program
    declared = [decl.name for decl in program.inputs]
    for n in system.lengths:
        data = system.data(np.random.default_rng(n), n)
        inputs = {name: data[name] for name in declared}
        whole = oracle.mask(program, shape_of(n, n), inputs)
        full = (BATCH, HEADS, n, n)
        np.testing.assert_array_equal(whole, np.broadcast_to(system.rule(Pairs(shape_of(n, n), data)), full))
        for rows in {1, -(-n // 3)}:
            chunk = oracle.mask(program, shape_of(n, rows), inputs)
            rule = system.rule(Pairs(shape_of(n, rows), data))
            np.testing.assert_array_equal(chunk, np.broadcast_to(rule, (BATCH, HEADS, rows, n)))
            np.testing.assert_array_equal(chunk, whole[:, :, n - rows :])


def test_rules_tell_systems_apart() -> None:
    """A rule that ignored its case would agree with any other: none of them may."""
    for system in SYSTEMS:
        n = max(system.lengths)
        rule = system.rule(Pairs(shape_of(n, n), system.data(np.random.default_rng(n), n)))
        assert 0 < np.broadcast_to(rule, (BATCH, HEADS, n, n)).mean() < 1, system.name


# ------------------------------------------------------------------------------------ scalars


def test_division_rounds_down() -> None:
    for x, y in itertools.product(range(-9, 10), (-4, -1, 1, 3, 8)):
        assert value_of(Binary("//", Const(x), Const(y))) == x // y
        assert value_of(Binary("%", Const(x), Const(y))) == x % y


def test_functions() -> None:
    for x in (*range(-5, 70), 2**53 - 1, 2**54 - 1, 2**62 - 1, 2**62):
        assert value_of(Call("bit_length", (Const(x),))) == max(x, 0).bit_length()
        assert value_of(Call("is_power_of_two", (Const(x),))) == (x >= 1 and x.bit_count() == 1)
        assert value_of(Call("abs", (Const(-x),))) == abs(x)
        assert value_of(Call("clamp", (Const(x), Const(3), Const(9)))) == min(max(x, 3), 9)
    assert value_of(Call("clamp", (Const(5), Const(3), Const(-1)))) == -1
    assert value_of(Call("min", (Const(4), Const(2), Const(7)))) == 2
    assert value_of(Call("max", (Const(4), Const(2), Const(7)))) == 7


def test_guards_and_unguarded_division_by_zero() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded = Logic("and", (Compare(">", K, Const(0)), Compare("==", Binary("%", Q, K), Const(0))))
        seen = mask_of(Where(guarded), CallShape(1, 1, 1, 6, 6, 8, 8))
        np.testing.assert_array_equal(seen[0, 0], [[k > 0 and q % k == 0 for k in range(6)] for q in range(6)])
        chosen = If(Compare("==", K, Const(0)), Const(-1), Binary("//", Q, K))
        np.testing.assert_array_equal(
            value_of(chosen)[0, 0], [[-1 if k == 0 else q // k for k in range(4)] for q in range(4)]
        )
        assert value_of(Binary("//", Const(7), Const(0))) == 0


def test_variables() -> None:
    shape = CallShape(batch=2, heads=6, kv_heads=2, rows=3, k_len=5, dim=8, v_dim=16)
    assert value_of(G, shape).ravel().tolist() == [0, 0, 0, 1, 1, 1]
    assert value_of(Q, shape).ravel().tolist() == [2, 3, 4]
    sizes = {"Nq": 5, "Nk": 5, "H": 6, "G": 2, "D": 8, "Dv": 16}
    assert {name: int(value_of(Var(name), shape)) for name in sizes} == sizes
    assert value_of(Binary("-", Arg("span"), Unary("-", Const(2))), span=40) == 42


def test_shared_nodes_are_evaluated_once() -> None:
    e: Scalar = K
    for _ in range(64):  # 2**64 paths
        e = Binary("%", Binary("+", e, e), Const(1009))
    assert value_of(e).ravel().tolist() == [k * 2**64 % 1009 for k in range(4)]


# ----------------------------------------------------------------------------- inputs, tables


def test_indices_are_clamped() -> None:
    ids = InputDecl("ids", Type.INT, (Dim(Axis.B), Dim(Axis.K)))
    shape = CallShape(2, 1, 1, 5, 5, 8, 8)
    values = np.array([[0, 1, 1, 2, 0], [3, 3, 3, 0, 1]])
    at = Read("ids", (B, Binary("-", Binary("+", K, K), Const(3))), Type.INT)
    seen = mask_of(Where(Compare("==", at, Const(0))), shape, {"ids": values}, inputs=(ids,))
    np.testing.assert_array_equal(
        seen, by_loop(lambda b, h, q, k: bool(values[b, min(max(2 * k - 3, 0), 4)] == 0), shape, 0)
    )


def test_q_dimension_holds_the_rows_of_the_call() -> None:
    start = InputDecl("start", Type.INT, (Dim(Axis.B), Dim(Axis.Q)))
    pattern = Where(Compare(">=", K, Read("start", (B, Q), Type.INT)))
    values = np.array([[4, 0, 2], [1, 9, 3]])
    shape = CallShape(2, 2, 1, 3, 7, 8, 8)
    for align_start in (False, True):
        seen = mask_of(pattern, shape, {"start": values}, inputs=(start,), align_start=align_start)
        want = np.arange(7) >= values[:, None, :, None]
        np.testing.assert_array_equal(seen, np.broadcast_to(want, seen.shape))


def test_block_dimension_of_q_is_absolute() -> None:
    chosen = InputDecl("chosen", Type.BOOL, (Dim(Axis.Q, block=2), Dim(Axis.K, block=3)))
    read = Read("chosen", (Binary("//", Q, Const(2)), Binary("//", K, Const(3))), Type.BOOL)
    values = np.random.default_rng(0).random((4, 3)) < 0.5
    shape = CallShape(1, 1, 1, 3, 7, 8, 8)
    seen = mask_of(Where(read), shape, {"chosen": values}, inputs=(chosen,))
    np.testing.assert_array_equal(seen, by_loop(lambda b, h, q, k: bool(values[q // 2, k // 3]), shape, 4))


def test_size_one_broadcasts_and_other_sizes_are_refused() -> None:
    decl = InputDecl("until", Type.INT, (Dim(Axis.B), Dim(Axis.H), Dim(Axis.K)))
    pattern = Where(Compare("<=", Q, Read("until", (B, H, K), Type.INT)))
    shape = CallShape(2, 3, 3, 6, 6, 8, 8)
    values = np.array([4, 0, 2, 5, 5, 1]).reshape(1, 1, 6)
    seen = mask_of(pattern, shape, {"until": values}, inputs=(decl,))
    np.testing.assert_array_equal(seen, by_loop(lambda b, h, q, k: bool(q <= values[0, 0, k]), shape, 0))
    for bad in (values[..., :5], values[0], np.zeros((2, 2, 6), int)):
        with pytest.raises(ValueError, match="`until` has shape"):
            mask_of(pattern, shape, {"until": bad}, inputs=(decl,))
    with pytest.raises(ValueError, match="`until` is missing"):
        mask_of(pattern, shape, {}, inputs=(decl,))


def test_table() -> None:
    table = TableDecl("span", Type.INT, (Dim(Axis.H), Dim(Axis.CONST, size=2)), (2, 2), (1, 2, 3, 4))
    read = Table("span", (H, Binary("-", Q, K)), Type.INT)
    shape = CallShape(1, 2, 2, 4, 4, 8, 8)
    seen = mask_of(Where(Compare("<", K, read)), shape, tables=(table,))
    spans = ((1, 2), (3, 4))
    np.testing.assert_array_equal(seen, by_loop(lambda b, h, q, k: k < spans[h][min(max(q - k, 0), 1)], shape, 0))


# --------------------------------------------------------------------------------------- sets


def test_algebra() -> None:
    shape = CallShape(1, 3, 1, 6, 9, 8, 8)
    sink = Where(Compare("<", K, Const(2)))
    every = (
        (Union((CAUSAL, sink, EVEN_SUM)), lambda b, h, q, k: k <= q or k < 2 or (q + k) % 2 == 0),
        (Inter((CAUSAL, EVEN_SUM, Complement(sink))), lambda b, h, q, k: k <= q and k >= 2 and (q + k) % 2 == 0),
        (Minus(CAUSAL, sink), lambda b, h, q, k: 2 <= k <= q),
        (Choose(Compare("==", H, Const(1)), CAUSAL, sink), lambda b, h, q, k: k <= q if h == 1 else k < 2),
        (Where(Const(True)), lambda b, h, q, k: True),
    )
    for pattern, rule in every:
        np.testing.assert_array_equal(mask_of(pattern, shape), by_loop(rule, shape, 3))


def test_on_blocks_replaces_positions_and_lengths() -> None:
    last = Where(
        Logic("or", (Compare("==", K, Binary("-", NK, Const(1))), Compare("==", Q, Binary("-", NQ, Const(1)))))
    )
    for n, rows, size in ((1, 1, 4), (17, 17, 5), (20, 7, 5), (19, 19, 1)):
        shape = CallShape(1, 1, 1, rows, n, 8, 8)
        block = np.arange(n) // size
        want = (block[n - rows :, None] == (n - 1) // size) | (block[None, :] == (n - 1) // size)
        np.testing.assert_array_equal(mask_of(On(last, Blocks(size)), shape)[0, 0], want)


def test_on_nests_outermost_first() -> None:
    shape = CallShape(1, 1, 1, 30, 30, 8, 8)
    shifted = Where(Compare("==", Binary("+", K, Const(1)), Q))
    nested = On(On(shifted, Blocks(2)), Blocks(3))
    np.testing.assert_array_equal(
        mask_of(nested, shape), by_loop(lambda b, h, q, k: k // 3 // 2 + 1 == q // 3 // 2, shape, 0)
    )


def test_on_permuted() -> None:
    order = InputDecl("order", Type.INT, (Dim(Axis.B), Dim(Axis.H), Dim(Axis.K)))
    rng = np.random.default_rng(1)
    values = np.stack([np.stack([rng.permutation(8) for _ in range(2)]) for _ in range(3)])
    shape = CallShape(3, 2, 2, 5, 8, 8, 8)
    near = Where(Logic("and", (Compare("<=", K, Q), Compare("<", Binary("-", Q, K), Const(3)))))
    seen = mask_of(On(near, Permuted("order", (B, H))), shape, {"order": values}, inputs=(order,))

    def rule(b: int, h: int, q: int, k: int) -> bool:
        return bool(0 <= values[b, h, q] - values[b, h, k] < 3)

    np.testing.assert_array_equal(seen, by_loop(rule, shape, 3))


@pytest.mark.parametrize("mode", Coarse)
@pytest.mark.parametrize(("n", "rows", "block"), [(1, 1, (4, 4)), (17, 17, (4, 4)), (17, 6, (5, 3)), (12, 1, (7, 2))])
def test_coarsen(mode: Coarse, n: int, rows: int, block: tuple[int, int]) -> None:
    """Over all existing positions of a block pair, those before the call's rows too."""
    operand = Where(Logic("and", (Compare("<=", K, Q), Compare("<", Binary("-", Q, K), Binary("+", H, Const(4))))))
    shape = CallShape(1, 2, 1, rows, n, 8, 8)
    block_q, block_k = block
    seen = mask_of(Coarsen(operand, block_q, block_k, mode, 0.25), shape)

    def rule(b: int, h: int, q: int, k: int) -> bool:
        q_block = range(q // block_q * block_q, min((q // block_q + 1) * block_q, n))
        k_block = range(k // block_k * block_k, min((k // block_k + 1) * block_k, n))
        inside = [0 <= i - j < h + 4 for i in q_block for j in k_block]
        return {"any": any(inside), "all": all(inside), "fraction": sum(inside) * 4 >= len(inside)}[mode.value]

    np.testing.assert_array_equal(seen, by_loop(rule, shape, n - rows))


def test_coarsen_fraction_is_the_decimal_as_written() -> None:
    """7 of 100 pairs are a fraction of 0.07, though 0.07 * 100 is above 7 in floating point."""
    seven = Where(Logic("and", (Compare("==", Q, Const(0)), Compare("<", K, Const(7)))))
    six = Where(Logic("and", (Compare("==", Q, Const(0)), Compare("<", K, Const(6)))))
    shape = CallShape(1, 1, 1, 10, 10, 8, 8)
    assert mask_of(Coarsen(seven, 10, 10, Coarse.FRACTION, 0.07), shape).all()
    assert not mask_of(Coarsen(six, 10, 10, Coarse.FRACTION, 0.07), shape).any()


def test_coarsen_on_blocks_ranges_over_coordinates() -> None:
    inner = Coarsen(Where(Compare("==", Q, K)), 2, 2, Coarse.ALL)
    shape = CallShape(1, 1, 1, 13, 13, 8, 8)
    # 13 tokens make 5 blocks of 3: the block pair of the last one holds a single coordinate.
    np.testing.assert_array_equal(
        mask_of(On(inner, Blocks(3)), shape), by_loop(lambda b, h, q, k: q // 6 == 2 and k // 6 == 2, shape, 0)
    )


# --------------------------------------------------------------------------------------- calls


def test_rows_at_negative_positions_are_rows_like_any() -> None:
    everything = Where(Const(True))
    shape = CallShape(1, 1, 1, 5, 3, 8, 8)
    assert mask_of(CAUSAL, shape)[0, 0].sum(-1).tolist() == [0, 0, 1, 2, 3]
    assert mask_of(everything, shape).all()
    assert mask_of(everything, shape, align_start=True).all()
    assert mask_of(CAUSAL, shape, align_start=True)[0, 0].sum(-1).tolist() == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("empty", [{"batch": 0}, {"rows": 0}, {"k_len": 0}])
def test_calls_without_pairs(empty: dict[str, int]) -> None:
    shape = dataclasses.replace(CallShape(2, 2, 1, 3, 4, 8, 8), **empty)
    ids = InputDecl("ids", Type.INT, (Dim(Axis.B), Dim(Axis.K)))
    same = Where(Compare("==", Read("ids", (B, Q), Type.INT), Read("ids", (B, K), Type.INT)))
    inputs = {"ids": np.zeros((shape.batch, shape.k_len), int)}
    coarse = Coarsen(same, 2, 2, Coarse.ANY)
    for align_start in (False, True):
        seen = mask_of(Union((same, coarse)), shape, inputs, inputs=(ids,), align_start=align_start)
        assert seen.shape == (shape.batch, 2, shape.rows, shape.k_len)


def test_nq_is_the_number_of_rows_only_under_align_start() -> None:
    last = Where(Compare("==", Q, Binary("-", NQ, Const(1))))
    shape = CallShape(1, 1, 1, 3, 5, 8, 8)
    for align_start in (False, True):
        assert mask_of(last, shape, align_start=align_start)[0, 0].any(-1).tolist() == [False, False, True]
