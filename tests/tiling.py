"""The tiles of a program held against its dense mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.blockruns import Reader
from attndsl.cut_values import cut_values
from attndsl.cuts import with_cuts
from attndsl.derive import derive
from attndsl.oracle import mask
from attndsl.program import CallShape, Program
from attndsl.relation import Relation, build_relation
from attndsl.runs import Side, TileRuns
from attndsl.tiles import tile_runs

Array = NDArray[Any]
# The sides that own tiles; the third owns diagonals of square ones.
SIDES = (Side.QUERY, Side.KEY)


def call(rows: int, k_len: int, heads: int = 1, kv_heads: int = 1, batch: int = 1) -> CallShape:
    return CallShape(batch, heads, kv_heads, rows, k_len, dim=8, v_dim=8)


def side_runs(program: Program, shape: CallShape, block_q: int, block_k: int, side: Side) -> tuple[Relation, TileRuns]:
    """The runs of one side, as a plan makes them."""
    relation = build_relation(program, (shape.heads, shape.kv_heads))
    cut = with_cuts(derive(program))
    return relation, tile_runs(relation, block_q, block_k, side, program.align_start, program=cut)


def visits(
    program: Program,
    shape: CallShape,
    runs: TileRuns,
    block_q: int,
    block_k: int,
    side: Side,
    inputs: Mapping[str, Array],
    args: Mapping[str, int],
) -> tuple[Array, Array]:
    """How often each tile is visited, and how often as full: int [batch, heads, q_tiles, k_tiles] each.

    A tile outside the grid fails.
    """
    tiles = {Side.QUERY: -(-shape.rows // block_q), Side.KEY: -(-shape.k_len // block_k)}
    own, other = (tiles[Side.QUERY], tiles[Side.KEY])[:: 1 if side is Side.QUERY else -1]
    cut = with_cuts(derive(program))
    reader = Reader(cut, shape, {**inputs, **cut_values(cut, shape, inputs, args)}, args)
    h = np.arange(shape.heads).reshape(1, -1, 1)
    variables = reader.variables(np.arange(shape.batch).reshape(-1, 1, 1), h) | {side.value: np.arange(own)}
    size = (shape.batch, shape.heads, own)
    visited, full = np.zeros((2, *size, other), np.int64)
    for found, marked in ((runs.full, (visited, full)), (runs.partial, (visited,))):
        for run in found:
            first, count = (np.broadcast_to(reader.value(e, variables), size) for e in (run.first, run.count))
            for place in zip(*np.nonzero(count > 0), strict=True):
                low, end = first[place], first[place] + run.step * (count[place] - 1) + 1
                assert low >= 0 and end <= other, f"{run}: tiles {low} to {end - 1} of {other} at {place}"
                for counts in marked:
                    counts[place][low : end : run.step] += 1
    return (visited, full) if side is Side.QUERY else (visited.swapaxes(2, 3), full.swapaxes(2, 3))


def check_tiles(
    program: Program,
    shape: CallShape,
    block_q: int,
    block_k: int,
    inputs: Mapping[str, Array] = {},
    args: Mapping[str, int] = {},
    sides: tuple[Side, ...] = SIDES,
    runs: Mapping[Side, TileRuns] | None = None,
) -> None:
    """Every tile with a pair is visited once, no tile twice, and a full one has all its pairs and all its keys."""
    q_tiles, k_tiles = -(-shape.rows // block_q), -(-shape.k_len // block_k)
    allowed = mask(program, shape, inputs, args)
    padding = ((0, 0), (0, 0), (0, q_tiles * block_q - shape.rows), (0, k_tiles * block_k - shape.k_len))
    grid = (shape.batch, shape.heads, q_tiles, block_q, k_tiles, block_k)
    some = np.pad(allowed, padding).reshape(grid).any(axis=(3, 5))
    # Rows that do not exist may see anything; keys that do not exist may not be seen.
    rows_padded = np.pad(
        np.pad(allowed, (*padding[:2], padding[2], (0, 0)), constant_values=True), (*padding[:2], (0, 0), padding[3])
    )
    every = rows_padded.reshape(grid).all(axis=(3, 5))
    for side in sides:
        found = runs[side] if runs is not None else side_runs(program, shape, block_q, block_k, side)[1]
        visited, full = visits(program, shape, found, block_q, block_k, side, inputs, args)
        told = f"{side} of {shape.rows} x {shape.k_len} in {block_q} x {block_k}"
        assert visited.max(initial=0) <= 1, f"{told}: visited twice at {np.argwhere(visited > 1)[:5].tolist()}"
        assert not np.any(some & (visited == 0)), f"{told}: missed {np.argwhere(some & (visited == 0))[:5].tolist()}"
        wrong = (full > 0) & ~every
        assert not np.any(wrong), f"{told}: not full {np.argwhere(wrong)[:5].tolist()}"
