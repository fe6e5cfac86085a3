"""Tile sizes by a cost model: what a program of each tiling costs, times the tiles that the pattern makes it visit."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from attndsl.evaluate import evaluate
from attndsl.plan import Backend, Spec, Tiling, default_tiling, forward_plan
from attndsl.program import Arg, Program, Read, Scalar, Table, walk
from attndsl.tiles import TileRuns

# Microseconds of a program that owns 128 rows on an H200, by head dimension: apart from its tiles, and for each tile.
# Fitted to causal and window(1024) at N = 16384; benchmarks/RESULTS.md has the runs.
_HOPPER: dict[int, tuple[tuple[Tiling, float, float], ...]] = {
    128: (
        (Tiling(128, 128, warps=4, stages=2), 4.6, 1.72),
        (Tiling(128, 64, warps=4, stages=3), 2.3, 0.97),
    ),
    64: ((Tiling(128, 128, warps=4, stages=2), 4.3, 1.26),),
}
# The portable kernel's at D = 64, two programs of 64 rows and their tiles of 64 keys.
_PORTABLE_64 = (Tiling(64, 64, warps=4, stages=3), 1.6, 0.68)
# The length for which tilings are compared: kernels do not depend on lengths.
_TOKENS = 16384


@functools.lru_cache(maxsize=1024)
def choose_tiling(program: Program, spec: Spec) -> Tiling:
    """The tiling with the least predicted time, where several are known for the spec; else the default."""
    candidates = _HOPPER.get(spec.dim, ()) if spec.backend is Backend.GLUON else ()
    best, least = default_tiling(spec), float("inf")
    for tiling, own, per_tile in candidates:
        tiles = _visited(forward_plan(program, spec, tiling).runs, tiling, spec)
        if tiles is None:
            return best
        if (cost := own + per_tile * tiles) < least:
            best, least = tiling, cost
    return best


@functools.lru_cache(maxsize=1024)
def prefers_portable(program: Program, spec: Spec) -> bool:
    """Whether the portable kernel is predicted to be ahead on Hopper: with small heads and few tiles a row, where
    several small programs hide more than one large one."""
    if spec.dim != 64:
        return False
    hopper = replace(spec, backend=Backend.GLUON)
    (large, large_own, large_tile), (small, small_own, small_tile) = _HOPPER[64][0], _PORTABLE_64
    wide = _visited(forward_plan(program, hopper, large).runs, large, spec)
    narrow = _visited(forward_plan(program, spec, small).runs, small, spec)
    if wide is None or narrow is None:
        return False
    return small_own + small_tile * narrow < large_own + large_tile * wide


def _visited(runs: TileRuns, tiling: Tiling, spec: Spec) -> float | None:
    """Tiles that a query tile visits on average, None where that depends on data."""
    counts = [run.count for run in runs.full + runs.partial]
    if any(isinstance(x, Read | Table | Arg) for e in counts for x in walk(e)):
        return None
    variables = {
        "Nk": np.asarray(_TOKENS), "Nq": np.asarray(_TOKENS), "start": np.asarray(0), "b": np.asarray(0),
        "q_tile": np.arange(_TOKENS // tiling.block_q), "h": np.arange(spec.heads)[:, None],
        "g": np.arange(spec.heads)[:, None] // (spec.heads // spec.kv_heads),
    }  # fmt: skip
    return sum(_mean(e, variables) for e in counts)


def _mean(count: Scalar, variables: dict[str, np.ndarray]) -> float:
    visited = np.maximum(evaluate(count, variables, {}), 0)
    return float(np.broadcast_to(visited, np.broadcast_shapes(visited.shape, variables["q_tile"].shape)).mean())
