"""The tiles that the pieces of a program visit in one call, counted from their closed-form runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.blockruns import Reader
from attndsl.box_tiles import BoxRun
from attndsl.boxes import Boxes
from attndsl.cut_values import cut_values
from attndsl.derivation import Order
from attndsl.layout import Permutation
from attndsl.mixing import mixes
from attndsl.order_values import order_values
from attndsl.piece_plans import forward_plans
from attndsl.plan import DType, Plan, Spec, Tiling
from attndsl.program import Binary, CallShape, Const, Program, Var
from attndsl.run_values import run_counts
from attndsl.runs import Run

Array = NDArray[Any]
# Boxes of a grid that are counted one by one: those of any call, but not of any size that an axis may be given.
_COUNTED = 1 << 22


@dataclass(frozen=True, slots=True)
class PieceTiles:
    """What a piece visits, over all batch entries and heads: query tiles that exist, full tiles, partial tiles.

    `layout`: the order in which it counts tokens, in words.
    """

    layout: str
    q_tiles: int
    full: int
    partial: int

    @property
    def tiles(self) -> int:
        return self.full + self.partial


def count_pieces(
    program: Program, shape: CallShape, block_q: int, block_k: int, inputs: Mapping[str, Array], args: Mapping[str, int]
) -> tuple[PieceTiles, ...]:
    """Counts the tiles of each piece of a program, as `piece_tiles`."""
    # Tiles do not depend on the device.
    spec = Spec(shape.heads, shape.kv_heads, shape.dim, shape.v_dim, DType.FLOAT32, "cpu")
    spec = replace(spec, all_rows=shape.rows == shape.k_len and mixes(program))
    plans = forward_plans(program, spec, Tiling(block_q, block_k))
    return tuple(piece_tiles(plan, shape, inputs, args) for plan in plans)


def piece_tiles(plan: Plan, shape: CallShape, inputs: Mapping[str, Array], args: Mapping[str, int]) -> PieceTiles:
    """Counts the tiles of one piece. Raises ValueError where an input or argument that decides tiles is missing."""
    layout, block_q = plan.layout, plan.tiling.block_q
    if any(run.list is not None for run in plan.runs.full + plan.runs.partial):
        raise ValueError("some are listed when the kernel runs, and are not counted here")
    if any(isinstance(decl.derivation, Order) for decl in plan.program.inputs):
        inputs = {**inputs, **order_values(plan.program, shape, inputs, args)}
    derived = cut_values(plan.program, shape, inputs, args) | run_counts(plan.program, shape, inputs)
    reader = Reader(plan.program, shape, {**inputs, **derived}, args)
    b, h = np.divmod(np.arange(shape.batch * shape.heads), max(1, shape.heads))
    if isinstance(layout, Boxes):
        return _box_tiles(plan, layout, shape, reader, b, h)
    variables = reader.variables(b[:, None, None], h[:, None, None])
    if isinstance(layout, Permutation):
        variables["q_tile"] = np.arange(layout.programs("q", block_q, shape, plan.program))
        exists = np.ones((b.size, 1, variables["q_tile"].size), np.bool_)
        return _counted(plan, reader, variables, exists)
    variables["residue"] = np.arange(layout.classes)[:, None]
    variables["q_tile"] = np.arange(-(-layout.q.most(shape.rows) // block_q))
    variables["i_start"] = reader.value(layout.q.index(Var("start")), variables)
    first = Binary("+", Var("i_start"), Binary("*", Const(block_q), Var("q_tile")))
    size = (b.size, layout.classes, variables["q_tile"].size)
    length = variables["Nq"] if plan.program.align_start else variables["Nk"]
    exists = np.broadcast_to(reader.value(layout.q.position(first), variables) < length, size)
    return _counted(plan, reader, variables, exists)


def _counted(plan: Plan, reader: Reader, variables: Mapping[str, Array], exists: Array) -> PieceTiles:
    """Counts the tiles of the query tiles that exist, bool [batch entries and heads, residues, query tiles]."""

    def visited(runs: tuple[Run, ...]) -> int:
        counts = (np.maximum(reader.value(run.count, variables), 0) for run in runs)
        return sum(int(np.where(exists, count, 0).sum(dtype=np.int64)) for count in counts)

    return PieceTiles(str(plan.layout), int(exists.sum()), visited(plan.runs.full), visited(plan.runs.partial))


def _box_tiles(plan: Plan, boxes: Boxes, shape: CallShape, reader: Reader, b: Array, h: Array) -> PieceTiles:
    """Counts boxes: arrays go over batch entries and heads, residues, then the tiles of each axis of the grid."""
    counts = boxes.tile_counts("q", shape, plan.program)
    if prod(counts) * boxes.classes > _COUNTED:
        raise ValueError(f"{prod(counts) * boxes.classes:,} boxes of the grid are not counted one by one here")
    ahead = (1,) * len(counts)
    variables = reader.variables(b.reshape(-1, 1, *ahead), h.reshape(-1, 1, *ahead))
    variables["residue"] = np.arange(boxes.classes).reshape(-1, *ahead)
    first = int(reader.value(boxes.first_tile("q"), variables))
    lengths = boxes.lengths()["Nq"]
    exists = np.ones((b.size, boxes.classes, *counts), np.bool_)
    for a, count in enumerate(counts):
        tiles = np.arange(count) + (first if a == 0 else 0)
        variables[f"q_tile_{a}"] = tiles.reshape(*(-1 if n == a else 1 for n in boxes.axes))
        variables[f"residue_{a}"] = reader.value(boxes.residue(a), variables)
        corner = variables[f"q_tile_{a}"] * boxes.q_box[a] * boxes.periods[a] + variables[f"residue_{a}"]
        exists &= corner < reader.value(lengths[a], variables)

    def visited(runs: tuple[BoxRun, ...]) -> int:
        return sum(int(np.where(exists, reader.value(run.count, variables), 0).sum(dtype=np.int64)) for run in runs)

    return PieceTiles(str(boxes), int(exists.sum()), visited(plan.box_runs.full), visited(plan.box_runs.partial))
