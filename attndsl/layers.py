"""Tiles of a piece's tokens as tensor copies take them: boxes of a tensor in which tokens have several dimensions.

Every 16th token from one on is a row of [16, tokens / 16]; a box of a grid is one of [y, x]. So the hardware copies
tiles whose tokens do not lie in a row, where tokens fill the last layer: the rest would be the next head's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from attndsl.boxes import Boxes
from attndsl.layout import Comb, Layout, Permutation

# A tensor copy has so many dimensions at most, and the runs of memory that it takes so many bytes at least.
_MOST_DIMENSIONS, _LEAST_BYTES = 5, 16


@dataclass(frozen=True, slots=True)
class Layers:
    """How the tokens of one side are seen: along dimensions of `sizes` tokens, the first of which is what these layers
    make of all (None), with `steps` from each to the next, in tokens; and the `tile` of it that a kernel copies.

    `unit`: whose multiples the numbers of tokens must be.
    """

    unit: int
    sizes: tuple[int | None, ...]
    steps: tuple[int, ...]
    tile: tuple[int, ...]

    def shape(self, tokens: int) -> tuple[int, ...]:
        """The sizes, of so many tokens."""
        return tuple(tokens // self.unit if size is None else size for size in self.sizes)

    @property
    def rows_in_order(self) -> bool:
        """Whether a number a token, 4 bytes, can be copied so: in runs of 16 bytes at multiples of 16 bytes."""
        apart = all(step * 4 % _LEAST_BYTES == 0 for step in self.steps[:-1])
        return self.steps[-1] == 1 and self.tile[-1] * 4 >= _LEAST_BYTES and apart


def layers(layout: Layout | Boxes | Permutation, side: str, block: int) -> Layers | None:
    """How tiles of `block` tokens of a side, q or k, are copied; None where they are read through pointers."""
    match layout:
        case Permutation():
            return None
        case Boxes(grid=grid):
            box = layout.box(side)
            plain = layout.classes == 1 and grid.first == 0 and set(grid.tiles) == {1}
            if not plain or prod(box) != block or len(box) + 3 > _MOST_DIMENSIONS:
                return None
            inner = [size for size in grid.sizes[1:] if size is not None]
            steps = tuple(prod(inner[axis:]) for axis in range(len(box)))
            return Layers(grid.stride, (None, *inner), steps, box)
        case Layout(q=q, k=k):
            comb = q if side == "q" else k
            if comb.every:
                return in_a_row(block)
            if comb != Comb(comb.period, step=1) or layout.classes != comb.period:
                return None
            return Layers(comb.period, (comb.period, None), (1, comb.period), (1, block))


def in_a_row(block: int) -> Layers:
    """Tokens as they lie in the tensors: one dimension."""
    return Layers(1, (None,), (1,), (block,))


__all__ = ["Layers", "in_a_row", "layers"]
