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
