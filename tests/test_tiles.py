"""Tiles equal the dense mask: exhaustively at small sizes, and for random composed programs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import islpy as isl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attndsl.grammar import load
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.run_ends import plain_interval, straightened
from attndsl.runs import Side, TileKind, TileRuns
from attndsl.targets import make_spec
from tests.accuracy import examples
from tests.strategies import Case, composed_programs
from tests.tiling import SIDES, call, check_tiles, side_runs, visits

# Tile shapes: powers of two and others, square and not.
BLOCKS = ((4, 4), (3, 5), (8, 2))
LENGTHS = (1, 4, 7, 13, 16)

PATTERNS = [
    "all",
    "none",
    "causal",
    "~causal",
    "window(1)",
    "causal & window(6)",
    "band(2, 3)",
    "causal & (window(5) | sink(2))",
    "causal - window(4)",
    "same_block(4)",
    "same_block(6, 3)",
    "causal & (same_block(4) | strided(4, 3))",
    "dilated(3)",
    "causal & window(9) & dilated(2)",
    "power_of_two",
    "causal | prefix(5)",
    "window(2) on blocks(4)",
    "causal & coarsen(causal & window(5), 4, any)",
    "coarsen(band(3, 3), (4, 2), all)",
    "neighborhood(5)",
    "neighborhood(3, 2)",
    "causal & neighborhood(4, stride = 3)",
    "{ q + k < Nk }",
    "{ (q + k) % 3 == 0 and abs(q - k) < 6 }",
    "{ k // 3 <= q // 5 and k % 4 != 1 }",
    "{ bit_length(q) == bit_length(k) }",
    "{ min(q, 7) - k < 3 and max(q, k) < Nk - 1 }",
    "if Nk % 2 == 0 then causal else ~causal",
    "if is_power_of_two(Nk) then causal else window(bit_length(Nk))",
    "{ is_power_of_two(Nk - q % 2) }",
]


@pytest.mark.parametrize("text", PATTERNS)
def test_runs_match_the_mask(text: str) -> None:
    program = load(text).program
    for block_q, block_k in BLOCKS:
        runs = {side: side_runs(program, call(1, 1), block_q, block_k, side)[1] for side in SIDES}
        for k_len in LENGTHS:
            for rows in {1, k_len // 2, k_len} - {0}:
                check_tiles(program, call(rows, k_len), block_q, block_k, runs=runs)


@pytest.mark.parametrize("text", ["causal", "causal & window(5)", "causal & (same_block(4) | sink(2))"])
def test_rows_before_the_first_key_see_nothing(text: str) -> None:
    program = load(text).program
    for block_q, block_k in BLOCKS:
        for rows, k_len in ((9, 4), (17, 16), (5, 1)):
            check_tiles(program, call(rows, k_len), block_q, block_k)


@pytest.mark.parametrize("text", ["causal", "all", "band(2, 3)", "{ k * 2 <= q }", "{ q + k < Nq }"])
def test_align_start(text: str) -> None:
    program = load(f"attention a {{ align start\n attend {text} }}").program
    for block_q, block_k in BLOCKS:
        for rows, k_len in ((1, 1), (9, 4), (4, 9), (13, 16), (17, 3)):
            check_tiles(program, call(rows, k_len), block_q, block_k)


HEADS = """attention per_head(n : runtime int, span : int[h]) {
    input width : int[h]
    input reach : int[b]
    input dense : bool[g]
    attend %s
}"""


@pytest.mark.parametrize(
    "text",
    [
        "causal & window(width[h])",
        "causal & window(span[h])",
        "prefix(reach[b]) & window(n)",
        "if dense[g] then causal else window(n) & causal",
        "if h % 2 == 0 then causal else sink(2)",
        "causal & { (q - k) % 2 == h % 2 or k < n * width[h] }",
    ],
)
def test_heads_and_arguments(text: str) -> None:
    program = load(HEADS % text, params={"span": [1, 4, 7, 30]}).program
    inputs: dict[str, Any] = {
        "width": np.array([0, 3, 8, 40]), "reach": np.array([0, 5]), "dense": np.array([True, False]),
    }  # fmt: skip
    for k_len in (5, 16):
        shape = call(k_len, k_len, heads=4, kv_heads=2, batch=2)
        for n in (0, 2, 9):
            check_tiles(program, shape, 4, 3, inputs, {"n": n})


@pytest.mark.parametrize(
    "text", ["causal & document(doc)", "document(doc) | sink(2)", "causal & ~document(doc) & window(7)"]
)
def test_data_is_visited_and_never_full(text: str) -> None:
    program = load(f"attention a {{ input doc : int[b, k] sorted\n attend {text} }}").program
    doc = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4]])
    check_tiles(program, call(13, 13), 4, 4, {"doc": doc})
    check_tiles(program, call(6, 13), 3, 5, {"doc": doc})


@pytest.mark.parametrize(
    ("text", "full", "partial"),
    [
        ("all", 16, 0),
        ("causal", 6, 4),
        ("causal & window(64)", 3, 6),
        ("causal & window(96)", 5, 5),
        ("same_block(32)", 4, 0),
        ("causal & ~window(32)", 3, 3),
    ],
)
def test_the_tiles_are_the_least_there_are(text: str, full: int, partial: int) -> None:
    # Not only safe but tight: exactly the tiles that have a pair, full wherever the mask is.
    program, shape = load(text).program, call(128, 128)
    for side in SIDES:
        _, runs = side_runs(program, shape, 32, 32, side)
        visited, complete = visits(program, shape, runs, 32, 32, side, {}, {})
        assert (complete.sum(), visited.sum() - complete.sum()) == (full, partial)


def test_the_check_sees_wrong_tiles() -> None:
    causal, window = (load(text).program for text in ("causal", "causal & window(3)"))
    shape = call(16, 16)
    for wrong, right, why in ((window, causal, "missed"), (causal, window, "not full")):
        runs = {side: side_runs(wrong, shape, 4, 4, side)[1] for side in SIDES}
        with pytest.raises(AssertionError, match=why):
            check_tiles(right, shape, 4, 4, runs=runs)


def test_kinds_of_runs() -> None:
    _, runs = side_runs(load("causal").program, call(16, 16), 4, 4, Side.QUERY)
    assert {run.kind for run in runs.full} == {TileKind.FULL}
    assert {run.kind for run in runs.partial} == {TileKind.PARTIAL}


@given(case=composed_programs(max_depth=3, lengths=(1, 7, 16, 33), scores=False), blocks=st.sampled_from(BLOCKS))
@examples(24)
def test_composed_programs(case: Case, blocks: tuple[int, int]) -> None:
    check_tiles(case.load(), case.shape, *blocks, case.inputs, case.args)


# ------------------------------------------------------------------------------- intervals of tiles


@pytest.mark.parametrize(
    "line",
    [
        "512 * floor((3 - t)/8) <= 192 - n",
        "8 * floor((192 - n - 64t)/512) >= -12 - m and 64t <= n + m",
        "floor((2t + n)/5) = m and t >= 0",
        "4 * floor((n + t)/4) < n + t and 0 <= t <= m",
        "3 * floor(t/2) <= 3 + 5 * floor(n/4) and 7 * floor(t/3) >= m - 9",
    ],
)
def test_bounds_of_quotients_are_bounds(line: str) -> None:
    ctx = isl.Context()
    (piece,) = isl.Set.read_from_str(ctx, f"[n, m] -> {{ [t] : {line} }}").compute_divs().get_basic_sets()
    found = straightened(piece)
    assert reduce(isl.Set.union, map(isl.Set.from_basic_set, found)).is_equal(isl.Set.from_basic_set(piece))
    # One that says a residue of t is no bound.
    assert all(map(plain_interval, found)) == ("n + t and" not in line)


@pytest.mark.parametrize(
    ("factor", "more", "m"), [(65, -2, 2), (-65, 2, 2), (3, 7, 4), (-1, -5, 3), (2, -2, 3), (2, -3, 2)]
)
def test_sums_with_quotients_that_only_grow_are_bounds(factor: int, more: int, m: int) -> None:
    ctx = isl.Context()
    text = f"[n] -> {{ [t] : {factor} t + {more} * floor((t + 3 n + 1) / {m}) + 5 n >= 7 }}"
    (piece,) = isl.Set.read_from_str(ctx, text).compute_divs().get_basic_sets()
    found = straightened(piece)
    assert reduce(isl.Set.union, map(isl.Set.from_basic_set, found)).is_equal(isl.Set.from_basic_set(piece))
    # The last one falls where the quotient steps, so that it is no bound.
    assert all(map(plain_interval, found)) == ((factor, more) != (2, -3))


def test_threads_plan_one_program_together() -> None:
    """Kernels of a program share isl's contexts, which are for one thread at a time."""
    kinds = [(plans, heads) for plans in (forward_plans, backward_plans) for heads in (2, 4, 8)]

    def runs(name: str, kind: tuple[Callable[..., Any], int]) -> list[TileRuns]:
        program = load(f"pattern {name} = causal & (window(77) | sink(5) | same_block(48, 7))").program
        return [plan.runs for plan in kind[0](program, make_spec("sm_90", "triton", kind[1], 2, 64))]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda kind: runs("together", kind), kinds))
    finally:
        sys.setswitchinterval(interval)
    assert together == [runs("alone", kind) for kind in kinds]
