"""Members of the keys other than blocks in a row: what `of` divides them into where it is no `tokens` or `blocks(B)`.

    members ::= Tiles grid sizes          tiles(a, b, c), of the axes        also what `per` divides the rows into
              | Placed size input lead    blocks(B) on permuted(pi), tiles(a, b, c) on permuted(pi)
              | Runs input lead order?    segments(ids), segments(ids) on permuted(pi)
              | Lags size                 diagonals(B)

A member has a number. Tiles are numbered row by row, blocks of a permutation by the places in it; a segment, a maximal
run of equal ids, has the number of its first token, so that nothing needs to be counted; diagonals are (q - k) // B, of
the keys up to the row. A token off the grid, or placed past the end, is of no member.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod
from typing import TYPE_CHECKING, TypeAlias

from attndsl.grid import Grid

if TYPE_CHECKING:
    from attndsl.program import Scalar


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of a grid, of so many cells along each axis; the last along an axis may be cut off."""

    grid: Grid
    sizes: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Cells of a tile."""
        return prod(self.sizes)

    def most(self, tokens: int) -> int:
        """Cells of a tile that so many tokens can fill: an axis may be shorter than a tile."""
        sizes = zip(self.grid.sizes, self.sizes, strict=True)
        return min(tokens, prod(tile if size is None else min(tile, size) for size, tile in sizes))

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles along each axis but the first."""
        sizes = zip(self.grid.sizes[1:], self.sizes[1:], strict=True)
        return tuple(-(-size // tile) for size, tile in sizes if size is not None)


@dataclass(frozen=True, slots=True)
class Placed:
    """Blocks of `size` places, or tiles of a grid of places, token k being at place input[..., k]; `lead` holds the
    input's other indices."""

    size: int
    input: str
    lead: tuple[Scalar, ...]
    tiles: Tiles | None = None


@dataclass(frozen=True, slots=True)
class Runs:
    """Maximal runs of equal entries of an int input; `order`: of tokens one after another by their places, whose runs
    have the numbers of their first tokens in it, and of which those at no place are of none."""

    input: str
    lead: tuple[Scalar, ...]
    order: Placed | None = None


@dataclass(frozen=True, slots=True)
class Lags:
    """Diagonals: keys that lie equally far, in blocks of `size`, before their row."""

    size: int


Members: TypeAlias = Tiles | Placed | Runs | Lags


def extent(members: Members) -> tuple[int, int]:
    """Tokens and members: of n tokens there are at most ceil(n / tokens) * members, numbered from 0.

    >>> extent(Tiles(Grid(("t", "y", "x"), (None, 8, 8), 0, (1, 1, 1)), (2, 4, 4)))
    (128, 4)
    """
    match members:
        case Tiles(grid=grid, sizes=sizes):
            # Where tokens run tile by tile, a layer of the grid's own tiles may be begun everywhere.
            layer = lcm(sizes[0], grid.tiles[0])
            return layer * grid.stride, layer // sizes[0] * prod(members.counts)
        case Placed(tiles=tiles) if tiles is not None:
            return extent(tiles)
        case Placed(size=size) | Lags(size=size):
            return size, 1
        case Runs():
            return 1, 1
