"""Where tokens stand, by the oracle: coordinates of a grid, segments, tiles, and what a plan lists. In numpy, and slow.

Shares nothing with what writes coordinates as scalars (`coordinates.py`, `member_numbers.py`).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from attndsl.grid import Grid
from attndsl.members import Tiles

Array = npt.NDArray[Any]


def listed(plan: Array, members: int) -> npt.NDArray[np.bool_]:
    """Which of so many members the rows of a plan [..., C] list: bool [..., members].

    An entry that is no member, or not above all before it, is skipped.
    """
    chosen = np.zeros((*plan.shape[:-1], members), np.bool_)
    for place in np.ndindex(plan.shape[:-1]):
        before = -1
        for entry in plan[place].tolist():
            if before < entry < members:
                chosen[(*place, entry)] = True
            before = max(before, entry)
    return chosen


def coordinates(grid: Grid, x: Array) -> list[Array]:
    """The coordinates of tokens; those of a token off the grid are of no matter."""
    cell = np.maximum(x - grid.first, 0)
    layers = grid.sizes[0] if grid.sizes[0] is not None else int(cell.max(initial=0)) // grid.stride + grid.tiles[0]
    sizes = [-(-layers // grid.tiles[0]) * grid.tiles[0], *(size or 0 for size in grid.sizes[1:])]
    counts = [size // tile for size, tile in zip(sizes, grid.tiles, strict=True)]
    # Tiles in order, and in each its cells.
    place = np.unravel_index(np.minimum(cell, prod(sizes) - 1), (*counts, *grid.tiles))
    tiles, inside = place[: len(sizes)], place[len(sizes) :]
    return [t * size + i for t, i, size in zip(tiles, inside, grid.tiles, strict=True)]


def axis_size(grid: Grid, axis: int, tokens: int) -> int:
    """The size of an axis, where it is open one past the last coordinate in so many tokens."""
    size = grid.sizes[axis]
    return int(coordinates(grid, np.arange(tokens))[axis].max(initial=-1)) + 1 if size is None else size


def tile_numbers(tiles: Tiles, x: Array) -> Array:
    """The tile of each token, tiles counted row by row; -1 of a token off the grid."""
    grid, number = tiles.grid, np.zeros(x.shape, np.int64)
    for place, size, tile in zip(coordinates(grid, x), grid.sizes, tiles.sizes, strict=True):
        number = number * (1 if size is None else -(-size // tile)) + place // tile
    cells = None if grid.sizes[0] is None else grid.sizes[0] * grid.stride
    inside = (x >= grid.first) & (True if cells is None else x < grid.first + cells)
    return np.where(inside, number, -1)


def run_starts(ids: Array) -> npt.NDArray[np.int64]:
    """The first token of each token's segment, a maximal run of equal ids along the last axis."""
    found = np.zeros(ids.shape, np.int64)
    for i in range(1, ids.shape[-1]):
        found[..., i] = np.where(ids[..., i] == ids[..., i - 1], found[..., i - 1], i)
    return found


def runs_in_order(ids: Array, place: Array) -> npt.NDArray[np.int64]:
    """The run of each token among tokens in the order of their places [..., tokens], a maximal one of equal ids, by the
    rank of its first token; -1 of a token at no place."""
    found = np.full(ids.shape, -1, np.int64)
    for at in np.ndindex(ids.shape[:-1]):
        count, first = ids.shape[-1], 0
        ordered = sorted((k for k in range(count) if 0 <= place[at][k] < count), key=lambda k: (place[at][k], k))
        for rank, k in enumerate(ordered):
            first = first if rank and ids[at][k] == ids[at][ordered[rank - 1]] else rank
            found[at][k] = first
    return found


def block_sums(inside: Array, block_q: int, block_k: int) -> npt.NDArray[np.int64]:
    """How many entries of each block of the last two axes are true."""
    rows = np.add.reduceat(inside, range(0, inside.shape[2], block_q), axis=2, dtype=np.int64)
    return np.add.reduceat(rows, range(0, inside.shape[3], block_k), axis=3, dtype=np.int64)
