"""Grids: tokens as cells with coordinates, `axes t, y[48], x[80] from n in tiles(a, b, c)`.

The front end writes a token's coordinates out as arithmetic of its position (`coordinates.py`), so to scores and masks
they are scalars like any other; the place `Along` says that a set is read in the coordinates of one axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

# More axes than these no kernel is written for.
MAX_AXES = 4
# What a layout by boxes (`boxes.py`) calls things along each axis.
AXIS_NAMES = frozenset(f"{name}_{a}" for name in ("q_tile", "k_tile", "residue", "i", "j") for a in range(MAX_AXES))


@dataclass(frozen=True, slots=True)
class Grid:
    """Tokens `first`, first + 1, … as the cells of a grid, the last axis running fastest.

    sizes: of every axis; that of the first may be None: as far as tokens reach. tiles: tokens run tile by tile, and
    within a tile row by row; all 1 where they run row by row through the whole grid. Tiles divide the sizes.
    """

    axes: tuple[str, ...]
    sizes: tuple[int | None, ...]
    first: int
    tiles: tuple[int, ...]

    @property
    def stride(self) -> int:
        """Tokens of one step along the first axis: of a layer of tiles, their share."""
        return prod(size for size in self.sizes[1:] if size is not None)

    @property
    def everywhere(self) -> bool:
        """Whether every token lies on it."""
        return self.first == 0 and self.sizes[0] is None


@dataclass(frozen=True, slots=True)
class Along:
    """A place: the coordinate along one axis of a grid. Inside, Nq and Nk are the axis's size, where it is open one
    past the last coordinate."""

    grid: Grid
    axis: int
