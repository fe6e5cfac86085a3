"""Tile sizes, where several are good by a cost model: what a program costs, times the tiles that the pattern visits.

And which programs take so long that they had better start first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attndsl.decode import Cache, decode_tiling
from attndsl.derive import derive
from attndsl.effort import remembered
from attndsl.evaluate import evaluate
from attndsl.listing import LEAST, Listable, fitting, listables, listed, lists_tiles
from attndsl.plan import Backend, BackwardPlan, ForwardPlan, Loads, Spec, Tiling, backward_plan, forward_plan
from attndsl.program import (
    Arg,
    Binary,
    Call,
    CallShape,
    Compare,
    Const,
    Program,
    Read,
    Scalar,
    Table,
    Type,
    reads,
    walk,
)  # fmt: skip
from attndsl.relation import lowered
from attndsl.runs import Run, TileRuns
from attndsl.tile_sizes import backward_tilings, default_tiling

# Microseconds that 128 rows take on Hopper at D = 64, on an H100: apart from their tiles, and for each tile.
_HOPPER_64 = (2.6, 1.11)
# The portable kernel's at D = 64, two programs of 64 rows and their tiles of 64 keys.
_PORTABLE_64 = (Tiling(64, 64, warps=4, stages=3), 3.4, 0.59)
# The kernel of dq at D = 128 where it has tensor copies: what 128 rows cost by two programs of 64, and by one.
_DQ_128 = (
    (2, Tiling(64, 64, warps=4, stages=2), 0.013, 0.00535),
    (1, Tiling(128, 64, warps=8, stages=3), 0.053, 0.0094),
)
# Tiles of rows that a key tile is visited by, from which on two stages of them are ahead of three on an H100.
_MANY_TILES = 100
# Comparisons of a mask that leave what goes on in registers.
_LIGHT_MASK = 4
# A key tile that so many times more query tiles visit than the others do on average is started first. Under causal the
# first key tile is visited nearly twice as often.
_HEAVY = 2
# The length for which tilings are compared: kernels do not depend on lengths.
_TOKENS = 16384
# Rows of a tile that heads share, where their rows are few enough.
_SHARED_ROWS = 64
# Stages with which two or three of the programs that collect keys share a multiprocessor.
_SHALLOW = 3
# Tiles of keys a query tile, on average, from which on a program on Hopper owns one.
_LONG = 48
# Keys of a tile whose list says of each row which of them it chose, a bit each.
_MARKED_KEYS = 32


@remembered(1024)
def choose_tiling(program: Program, spec: Spec) -> Tiling:
    """The default tiling for the spec.

    Where a plan can list the tiles, they fit into its row classes and members.
    """
    tiling = _fitted(usual_tiling(program, spec), program, spec)
    return replace(tiling, several=tiling.several and not visits_many(forward_plan(program, spec, tiling)))


def visits_many(plan: ForwardPlan) -> bool:
    """Whether query tiles visit so many tiles that what lies between them matters less than registers in the loop."""
    counts = _counts(plan.runs, plan.tiling, plan.spec)
    return counts is not None and bool(counts.mean() > _LONG)


def usual_tiling(program: Program, spec: Spec) -> Tiling:
    """The default tiling for the spec, or for what the program does with scores."""
    tiling = default_tiling(spec)
    if spec.backend is Backend.GLUON and program.plain and program.branch.weights is not None:
        # With no softmax between them the assembler holds two tiles' weights at once: half as many fit.
        tiling = replace(tiling, block_k=min(tiling.block_k, 64))
    return tiling


def _fitted(tiling: Tiling, program: Program, spec: Spec, of_rows: bool = True) -> Tiling:
    """The tiling with tiles that fit what a plan lists. of_rows: it is of a kernel that owns query tiles."""
    for found, shared in all_listables(program, (spec.heads, spec.kv_heads), spec.lists):
        if of_rows and (collected := collected_tiling(found, shared, tiling, spec)) is not None:
            return collected
        if found.offsets is not None:
            continue
        block_q, block_k = fitting(tiling.block_q, found.rows), fitting(tiling.block_k, found.keys)
        if spec.lists and found.gathers(block_k):
            # With addresses of single rows, more of them at once spill (D = 128).
            few = (
                not of_rows and block_k == tiling.block_q == 64 and tiling.warps == 4 and max(spec.dim, spec.v_dim) > 64
            )
            return replace(tiling, block_q=32 if few else tiling.block_q, block_k=block_k)
        if found.fits(block_q, block_k, spec.even_start):
            smaller = tiling.block_k // block_k if spec.backend is Backend.GLUON else 1
            return replace(tiling, block_q=block_q, block_k=block_k, stages=tiling.stages * smaller)
    return tiling


def collected_tiling(found: Listable, shared: bool, tiling: Tiling, spec: Spec) -> Tiling | None:
    """The tiling of query tiles whose key tiles are made of several members, or whose rows are of several heads.

    None where others are as good: where rows of one head fill tiles and members do too, where rows of heads that choose
    for themselves are gathered, and where a list has too few rows for a tile.
    """
    single = found.rows == 1
    if spec.backend is Backend.CPU and found.offsets is not None and not single:
        # Tokens of segments are gathered as they lie.
        rows = min(tiling.block_q, found.rows & -found.rows if found.rows else tiling.block_q)
        return replace(tiling, block_q=rows, block_k=1, unit_k=1) if found.fits_rows(rows, spec.even_start) else None
    if spec.backend is not Backend.TRITON or spec.dropout or not (spec.even_start or single or found.rows is None):
        return None
    group, unit = spec.heads // spec.kv_heads, min(found.unit, tiling.block_k)
    if single and (not spec.lists or (found.gathers(LEAST) and not (shared and group >= LEAST // 2))):
        return None
    if found.complement or (not single and unit == tiling.block_k):
        return None
    rows, pack = min(_SHARED_ROWS, found.rows & -found.rows if found.rows else _SHARED_ROWS), 1
    if rows < _SHARED_ROWS and (shared or group == 1):
        pack = 1 << (group - 1).bit_length()
        rows = max(1, min(rows, _SHARED_ROWS // pack))
        pack = max(pack, LEAST // rows)
    if rows * pack < LEAST:
        return None
    # As few rows over a list as a decode has: its kernel loads keys the same way.
    sizes = decode_tiling(spec, Cache(), rows, pack, listed=True)
    unit = min(unit, sizes.block_k)
    # Places of several members take a stage of the pipeline; tiles of more rows leave no room for one.
    deep = unit < sizes.block_k and rows * pack < _SHARED_ROWS
    stages = sizes.stages if deep else min(sizes.stages, _SHALLOW)
    if found.offsets is not None:
        # Which keys a tile has is known before it: a third stage would leave room for one program.
        stages = min(sizes.stages, 2)
    return replace(sizes, block_q=rows, pack=pack, unit_k=unit, stages=stages)


def marked_tiling(tiling: Tiling, of_q: Tiling) -> Tiling:
    """The tiling of dk and dv where those of dq are made of members too small to own a tile."""
    return replace(
        tiling, block_k=min(tiling.block_k, _MARKED_KEYS), block_q=max(tiling.block_q, of_q.block_q),
        unit_k=of_q.unit_k, unit_q=of_q.block_q,
    )  # fmt: skip


@remembered(256)
def all_listables(program: Program, heads: tuple[int, int], lists: bool = False) -> tuple[tuple[Listable, bool], ...]:
    """What a pattern lies in, and whether the heads of a key head have one list of it. lists: plans are lists."""
    if not lists_tiles(program):
        return ()
    program = listed(derive(program), lists)
    _, relation = lowered(program, heads)
    return tuple((found, found.shared(relation)) for found in listables(program, relation))


@remembered(1024)
def prefers_portable(program: Program, spec: Spec) -> bool:
    """Whether the portable kernel is predicted to be ahead on Hopper: with small heads and few tiles a row, where
    several small programs hide more than one large one."""
    if spec.dim != 64:
        return False
    hopper = replace(spec, backend=Backend.GLUON)
    large, (small, small_own, small_tile) = default_tiling(hopper), _PORTABLE_64
    large_own, large_tile = _HOPPER_64
    wide = _visited(forward_plan(program, hopper, large).runs, large, spec)
    narrow = _visited(forward_plan(program, spec, small).runs, small, spec)
    if wide is None or narrow is None:
        return False
    return small_own + small_tile * narrow < large_own + large_tile * wide


@remembered(1024)
def choose_backward_tilings(program: Program, spec: Spec) -> tuple[Tiling, Tiling]:
    """The tilings of dq, and of dk and dv, as `choose_tiling` does it."""
    usual, of_keys = _choose_backward_tilings(program, spec)
    of_q = _fitted(usual, program, spec)
    if of_q.pack > 1 and any(decl.learnable for decl in program.inputs):
        # Sums of learnable inputs are made for one head after the other.
        of_q = _fitted(usual, program, spec, of_rows=False)
    own = _fitted(of_keys, program, spec, of_rows=False)
    whole = any(
        found.gathers(own.block_k) or found.fits(own.block_q, own.block_k, spec.even_start)
        for found, _ in all_listables(program, (spec.heads, spec.kv_heads), spec.lists)
    )
    if of_q.collects and spec.backend is not Backend.CPU and not whole:
        return of_q, marked_tiling(of_keys, of_q)
    return of_q, own


def _choose_backward_tilings(program: Program, spec: Spec) -> tuple[Tiling, Tiling]:
    of_q, of_keys = backward_tilings(spec)
    if spec.backend is Backend.GLUON:
        return of_q, _one_pass_tiling(program, spec, of_q, of_keys)
    if spec.loads is not Loads.DESCRIPTOR or max(spec.dim, spec.v_dim) != 128:
        return of_q, of_keys
    (programs, small, own, per_tile), (_, large, large_own, large_tile) = _DQ_128
    narrow = _visited(forward_plan(program, spec, small).runs, small, spec)
    if narrow is None:
        return of_q, of_keys
    # Twice the rows visit the same tiles and, where a boundary crosses them, one more.
    return (large if large_own + large_tile * (narrow + 1) < programs * (own + per_tile * narrow) else small), of_keys


def _one_pass_tiling(program: Program, spec: Spec, of_q: Tiling, of_keys: Tiling) -> Tiling:
    """The tiling of all gradients in one pass: two stages of rows where key tiles are visited by many, or where masks
    take more registers than there are (what is put aside is cached, in memory that a third would take), else three.
    """
    plan = backward_plan(program, spec, of_q, of_keys)
    visits = key_visits(plan, CallShape(1, spec.heads, spec.kv_heads, _TOKENS, _TOKENS, spec.dim, spec.v_dim), None)
    few = visits is None or visits.mean() < _MANY_TILES
    compared = {} if plan.key_mask is None else {x for x in walk(plan.key_mask) if isinstance(x, Compare)}
    deep = spec.dim > 64 and few and len(compared) <= _LIGHT_MASK
    return replace(of_keys, stages=3) if deep else of_keys


def heavy_tiles(plan: BackwardPlan, shape: CallShape) -> int:
    """How many of a call's first key tiles are visited by far more query tiles than the average: those of sinks.

    A program owns a key tile, and a long one that starts late is waited for. Where a truth that the host does not know
    decides (which heads stream), the most of either way. 0 where other data decides it, and in a layout.
    """
    most = 0
    for truth in (False, True):
        visits = key_visits(plan, shape, truth)
        if visits is None or not visits.size:
            return 0
        of_tile = visits.sum(0)
        heavy = of_tile > _HEAVY * of_tile.mean()
        most = max(most, len(of_tile) if heavy.all() else int(np.argmin(heavy)))
    return most


def key_visits(
    plan: BackwardPlan, shape: CallShape, truth: bool | None, runs: Sequence[Run] | None = None
) -> np.ndarray | None:
    """How many query tiles visit each key tile of a call, for each query head; None where data decides it, or in a
    layout. truth: what is taken for truths of data that are the same for all key tiles (None: they are data). runs:
    those that are counted (None: all)."""
    stride = 1 if plan.view is None else plan.view.stride
    key_tiles = -(-shape.k_len // (stride * plan.key_tiling.block_k))
    counts = [run.count for run in (plan.key_runs.full + plan.key_runs.partial if runs is None else runs)]
    if not plan.layout.plain:
        return None
    unknown = {x for e in counts for x in walk(e) if isinstance(x, Read | Table | Arg)}
    if any(truth is None or x.type is not Type.BOOL or reads(x, "k_tile") for x in unknown):
        return None
    start = shape.first_position(plan.program)
    heads = np.arange(shape.heads)[:, None]
    variables = {
        "Nk": np.asarray(shape.k_len), "Nq": np.asarray(shape.q_len(plan.program)), "start": np.asarray(start),
        "k_tile": np.arange(key_tiles), "h": heads, "g": heads // (shape.heads // shape.kv_heads), "b": np.asarray(0),
    }  # fmt: skip
    leaves: dict[Scalar, np.ndarray] = {x: np.asarray(truth) for x in unknown}
    visits = np.zeros((shape.heads, key_tiles))
    for e in counts:
        visits += np.maximum(evaluate(e, variables, leaves), 0)
    return visits


def _visited(runs: TileRuns, tiling: Tiling, spec: Spec) -> float | None:
    """Tiles that a query tile visits on average, None where that depends on data."""
    counts = _counts(runs, tiling, spec)
    return None if counts is None else float(counts.mean())


def _counts(runs: TileRuns, tiling: Tiling, spec: Spec, tokens: int = _TOKENS) -> np.ndarray | None:
    """How many tiles the query tiles of each head, of so many tokens, visit; None where that depends on data."""
    counts = [run.count for run in runs.full + runs.partial]
    if any(isinstance(x, Read | Table | Arg) for x in walk(*counts)):
        return None
    tiles = max(1, tokens // tiling.block_q)
    variables = {
        "Nk": np.asarray(_TOKENS), "Nq": np.asarray(_TOKENS), "start": np.asarray(0), "b": np.asarray(0),
        "i_start": np.asarray(0), "residue": np.asarray(0), "q_tile": np.arange(tiles), "shift": np.asarray(0),
        "q_last": np.asarray(_TOKENS),
        "h": np.arange(spec.heads)[:, None], "g": np.arange(spec.heads)[:, None] // (spec.heads // spec.kv_heads),
    }  # fmt: skip
    # What their ends share is evaluated once.
    visited: Scalar = Const(0)
    for e in counts:
        visited = Binary("+", visited, Call("max", (e, Const(0))))
    return np.zeros((spec.heads, tiles)) + evaluate(visited, variables, {})
