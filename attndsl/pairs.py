"""Which pairs rows of a call see, and how many there are in all: by the oracle, tile by tile, never dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.alone import separate
from attndsl.branches import Visible
from attndsl.derivation import Random
from attndsl.oracle import Evaluator, check_inputs, entries, mask
from attndsl.oracle_views import seen_extents
from attndsl.program import (
    Blocks,
    CallShape,
    Coarsen,
    On,
    Program,
    Read,
    Selected,
    nodes,
    reads,
    scalars,
    walk,
)  # fmt: skip
from attndsl.runs import TileKind

if TYPE_CHECKING:
    from attndsl.blockgraph import BlockGraph

Array = NDArray[Any]

# Pairs that are asked of the oracle for one count; past that, query tiles are sampled.
MAX_PAIRS = 1 << 24
# `coarsen` and `random` make the oracle evaluate every pair that exists.
MAX_COARSE_PAIRS = 1 << 22


@dataclass(frozen=True, slots=True)
class PairCount:
    """Allowed pairs of a call over all batch entries and heads; `exact` unless query tiles were sampled."""

    pairs: int
    exact: bool


def allowed(
    program: Program,
    shape: CallShape,
    q_pos: Array,
    k_pos: Array,
    inputs: Mapping[str, Array] = {},
    args: Mapping[str, int] = {},
) -> NDArray[np.bool_]:
    """Whether pairs at these positions are allowed, as the oracle says.

    q_pos: int [rows], k_pos: int [keys]. Returns bool [batch, heads, rows, keys].
    Raises ValueError where an input that the pattern reads is missing or misshapen.
    """
    check_inputs(program, shape, {name: np.shape(value) for name, value in inputs.items()})
    if separate(program):
        rows = q_pos - shape.first_position(program)
        return mask(program, shape, inputs, args)[:, :, rows][..., k_pos]
    call = Evaluator.of_call(program, shape, inputs, args)
    place = call.at(q_pos.reshape(1, 1, -1, 1), k_pos.reshape(1, 1, 1, -1), call.variables["Nq"], call.variables["Nk"])
    inside = place.members(program.only.pattern)
    return np.array(np.broadcast_to(inside, (shape.batch, shape.heads, q_pos.size, k_pos.size)))


def seen(
    program: Program, shape: CallShape, q_pos: Array, inputs: Mapping[str, Array] = {}, args: Mapping[str, int] = {}
) -> NDArray[np.bool_]:
    """The keys of a program's only part, tokens or entries of its view, that rows at these positions see.

    q_pos: int [rows]. Returns bool [batch, heads, rows, keys]. Raises ValueError as `allowed`.
    """
    (part,) = program.only.parts
    view, count = part.view, entries(part.view, shape.k_len)
    if view is None or not count:
        return allowed(program, shape, q_pos, np.arange(count), inputs, args)
    if view.told or separate(program):
        rows = q_pos - shape.first_position(program)
        return mask(program, shape, inputs, args)[:, :, rows]
    # Nominal extents reach past the last token.
    check_inputs(program, shape, {name: np.shape(value) for name, value in inputs.items()})
    call, every = Evaluator.of_call(program, shape, inputs, args), view.visible is Visible.EVERY
    lengths = call.variables["Nq"], call.variables["Nk"]

    def inside(low: int, high: int) -> Array:
        tokens = np.arange(low, high).reshape(1, 1, 1, -1)
        return call.at(q_pos.reshape(1, 1, -1, 1), tokens, *lengths).members(part.pattern)

    full = (shape.batch, shape.heads, q_pos.size, count)
    return seen_extents(inside, full, view.size, view.stride, shape.k_len, every)


def too_dense(program: Program, shape: CallShape) -> str:
    """What makes asking the oracle for single rows of this call take too long, empty where nothing does."""
    parts = [part for branch in program.branches for part in branch.parts]
    if any(part.view is not None and part.view.size > MAX_COARSE_PAIRS for part in parts):
        return "entries of so many tokens make"
    if shape.q_len(program) * shape.k_len <= MAX_COARSE_PAIRS:
        return ""
    if separate(program):
        return "sequences that stand alone make"
    coarse = any(isinstance(node, Coarsen | Random) for part in parts for node in nodes(part.pattern))
    return "`coarsen` and `random` make" if coarse else ""


def count_pairs(
    graph: BlockGraph, program: Program, shape: CallShape, inputs: Mapping[str, Array] = {},
    args: Mapping[str, int] = {},
) -> PairCount:  # fmt: skip
    """The allowed pairs of a call: full tiles by their area, partial ones by the oracle; over a view, all by it.

    graph: the call's block graph. Raises ValueError where an input that the pattern reads is missing.
    """
    if not program.plain:
        return _count_entries(program, shape, inputs, args)
    if separate(program):
        return PairCount(int(mask(program, graph.shape, inputs, args).sum()), exact=True)
    groups = _equal_calls(graph, apart=_heads_differ(program))
    total, exact = 0.0, True
    for group in groups:
        full, partial, sampled = _count(graph, program, *group[0], inputs, args, MAX_PAIRS // len(groups))
        total += len(group) * (full + partial)
        exact = exact and not sampled
    return PairCount(round(total), exact)


def _count_entries(
    program: Program, shape: CallShape, inputs: Mapping[str, Array], args: Mapping[str, int]
) -> PairCount:
    """The pairs of rows and entries: of all rows, or of so many, evenly spread, as are counted in time."""
    most = max(1, MAX_PAIRS // max(1, shape.batch * shape.heads * shape.k_len))
    rows = np.arange(0, shape.rows, -(-shape.rows // most) if shape.rows else 1)
    found, start = 0, shape.first_position(program)
    for low in range(0, rows.size, 64):
        found += int(seen(program, shape, start + rows[low : low + 64], inputs, args).sum())
    return PairCount(round(found * shape.rows / max(1, rows.size)), exact=rows.size == shape.rows)


def _heads_differ(program: Program) -> bool:
    """Whether pairs inside a tile may differ between heads or batch entries."""
    pattern = program.branch.pattern
    drawn = any(isinstance(node, Random | Selected) for node in nodes(pattern))
    placed = any(isinstance(node, On) and not isinstance(node.place, Blocks) for node in nodes(pattern))
    return (
        drawn
        or placed
        or any(reads(e, "b", "h", "g") or any(isinstance(x, Read) for x in walk(e)) for e in scalars(pattern))
    )


def _equal_calls(graph: BlockGraph, apart: bool) -> list[list[tuple[int, int]]]:
    """Batch entries and heads, grouped where they allow the same number of pairs."""
    groups: dict[object, list[tuple[int, int]]] = {}
    for batch in range(graph.shape.batch):
        for head in range(graph.shape.heads):
            key = (batch, head) if apart else int(graph.classes[batch, head])
            groups.setdefault(key, []).append((batch, head))
    return list(groups.values())


def _count(
    graph: BlockGraph,
    program: Program,
    batch: int,
    head: int,
    inputs: Mapping[str, Array],
    args: Mapping[str, int],
    limit: int,
) -> tuple[float, float, bool]:
    """Pairs in full tiles, pairs in partial tiles, and whether the latter are from a sample."""
    shape, block_q, block_k = graph.shape, graph.block_q, graph.block_k
    full, partial = 0, {}
    for tile in range(graph.q_tiles):
        rows = min(block_q, shape.rows - tile * block_q)
        masked: list[int] = []
        for run in graph.runs(tile, head, batch):
            if run.kind is TileKind.FULL:
                full += rows * sum(min(block_k, shape.k_len - t * block_k) for t in run.tiles)
            else:
                masked += run.tiles
        if masked:
            partial[tile] = (rows, masked)
    cost = sum(rows * len(tiles) * block_k for rows, tiles in partial.values())
    step = -(-cost // max(1, limit)) if cost else 1
    chosen = list(partial)[::step]
    call = Evaluator.of_call(program, shape, inputs, args)
    fixed = {"b": batch, "h": head, "g": head // (shape.heads // shape.kv_heads)}
    found = asked = 0
    for tile in chosen:
        rows, tiles = partial[tile]
        q_pos = graph.start + tile * block_q + np.arange(rows)
        k_pos = (np.asarray(tiles)[:, None] * block_k + np.arange(block_k)).ravel()
        k_pos = k_pos[k_pos < shape.k_len]
        variables = dict(call.variables) | {name: np.full((1, 1, 1, 1), value) for name, value in fixed.items()}
        variables |= {"q": q_pos.reshape(1, 1, -1, 1), "k": k_pos.reshape(1, 1, 1, -1)}
        inside = Evaluator(program, shape, inputs, args, variables).members(program.branch.pattern)
        inside = np.broadcast_to(inside, (1, 1, rows, k_pos.size))
        found += int(inside.sum())
        asked += rows * len(tiles)
    everything = sum(rows * len(tiles) for rows, tiles in partial.values())
    return float(full), found * everything / asked if asked else 0.0, len(chosen) < len(partial)


def spans(seen: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """The runs of true entries of a bool [keys] array, as first and last index."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], seen.astype(np.int8), [0]])))
    return tuple((int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True))


def spans_text(found: tuple[tuple[int, int], ...], most: int = 6) -> str:
    """Spans as `0..3, 189..700`; from many, the first and the last few."""
    written = [str(a) if a == b else f"{a}..{b}" for a, b in found]
    if len(written) > most:
        written = [*written[: most - 2], f"… ({len(written) - most} more) …", *written[-2:]]
    return ", ".join(written) if written else "none"
