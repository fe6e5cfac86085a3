"""Layouts by boxes: tiles that are boxes of a grid, for patterns of which each condition reads one axis.

Tokens in order cut a neighbourhood of 13 x 13 into 13 short runs in as many rows, and a tile of them touches whole
rows. Boxes of 8 x 8 touch little more than the neighbourhood. What is touched is a product, axis by axis: of every axis
the runs of its own tiles, in closed form, as of any pattern in one dimension.

Along axis a, which a program's `residue_a` thins out where the axis is dilated, a query's index is called `i_a` and a
key's `j_a`; `q_tile_a` and `k_tile_a` are the tiles' numbers. A tile's cells are counted row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from attndsl.coordinates import coordinate, length, token
from attndsl.evaluate import evaluate
from attndsl.grid import Grid
from attndsl.linear import normalise
from attndsl.program import Binary, Call, CallShape, Const, Program, Scalar, Var
from attndsl.simplify import fold


@dataclass(frozen=True, slots=True)
class Boxes:
    """How a piece counts its queries and its keys: by boxes of `q_box` and of `k_box` cells.

    periods: of every axis, a program owns one residue of so many; its keys have the query's residue.

    >>> print(Boxes(Grid(("y", "x"), (None, 64), 0, (1, 1)), (1, 1), (8, 16), (8, 8)))
    boxes of y, x: queries 8 x 16, keys 8 x 8
    """

    grid: Grid
    periods: tuple[int, ...]
    q_box: tuple[int, ...]
    k_box: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether tokens are counted in order."""
        return False

    @property
    def classes(self) -> int:
        """The number of residues, each a program's own."""
        return prod(self.periods)

    def all_keys(self, shape: CallShape) -> bool:
        """Whether every key of a call lies in a box."""
        return self._holds(0, shape.k_len)

    def all_rows(self, shape: CallShape, program: Program) -> bool:
        """Whether every row of a call lies in a box."""
        return self._holds(shape.first_position(program), shape.q_len(program))

    def _holds(self, low: int, high: int) -> bool:
        size = self.grid.sizes[0]
        return self.grid.first <= low and (size is None or high <= self.grid.first + size * self.grid.stride)

    def tile_counts(self, side: str, shape: CallShape, program: Program) -> list[int]:
        """The tiles of a call along each axis."""
        sizes = {"Nq": shape.q_len(program), "Nk": shape.k_len, "start": shape.first_position(program)}
        known = {name: np.asarray(size) for name, size in sizes.items()}
        return [max(0, int(evaluate(self.tiles(side, a), known, {}))) for a in self.axes]

    def programs(self, side: str, block: int, shape: CallShape, program: Program) -> int:
        """How many boxes of one side a call has."""
        if 0 in (shape.rows, shape.k_len):
            return 0
        return prod(self.tile_counts(side, shape, program)) * self.classes

    @property
    def axes(self) -> range:
        return range(len(self.periods))

    def box(self, side: str) -> tuple[int, ...]:
        """The cells of a tile along each axis; `side` is q or k."""
        return self.q_box if side == "q" else self.k_box

    def residue(self, axis: int) -> Scalar:
        """The residue along an axis, from that of the program."""
        after = Binary("//", Var("residue"), Const(prod(self.periods[axis + 1 :])))
        return fold(Binary("%", after, Const(self.periods[axis])))

    def cell(self, axis: int, index: Scalar) -> Scalar:
        """The coordinate of an index along an axis."""
        if self.periods[axis] == 1:
            return index
        return Binary("+", Binary("*", Const(self.periods[axis]), index), Var(f"residue_{axis}"))

    def position(self, side: str) -> Scalar:
        """The token of a cell, from its indices."""
        name = "i" if side == "q" else "j"
        return token(self.grid, [self.cell(a, Var(f"{name}_{a}")) for a in self.axes])

    def first_tile(self, side: str) -> Scalar:
        """Along the first axis, a tile that no row of the call lies before: of keys, the first."""
        if side == "k":
            return Const(0)
        layer = self.grid.stride * self.grid.tiles[0]
        start: Scalar = Binary("//", Binary("-", Var("start"), Const(self.grid.first)), Const(layer))
        lowest = Binary("*", Call("max", (start, Const(0))), Const(self.grid.tiles[0]))
        return fold(normalise(Binary("//", lowest, Const(self.periods[0] * self.q_box[0]))))

    def tiles(self, side: str, axis: int) -> Scalar:
        """Tiles along an axis, of the residue that has most, from the first on that a call looks at."""
        cells = length(self.grid, axis, Var("Nk" if side == "k" else "Nq"))
        size = self.periods[axis] * self.box(side)[axis]
        found: Scalar = Binary("//", Binary("+", cells, Const(size - 1)), Const(size))
        if axis == 0:
            found = Binary("-", found, self.first_tile(side))
            found = found if isinstance(cells, Const) and side == "k" else Call("max", (found, Const(0)))
        return fold(normalise(found))

    def lengths(self) -> Mapping[str, Sequence[Scalar]]:
        """The size of each axis, for queries and for keys."""
        return {n: [length(self.grid, a, Var(n)) for a in self.axes] for n in ("Nq", "Nk")}

    def loose(self, side: str, axis: int) -> bool:
        """Whether a tile may reach past the end of an axis whose size is known."""
        size = self.grid.sizes[axis]
        return size is not None and size % (self.periods[axis] * self.box(side)[axis]) != 0

    def coordinate(self, axis: int, x: Scalar) -> Scalar:
        return coordinate(self.grid, axis, x)

    def __str__(self) -> str:
        q, k = (" x ".join(map(str, self.box(side))) for side in "qk")
        thinned = f", every {' x '.join(map(str, self.periods))}th cell of each axis" if self.classes > 1 else ""
        return f"boxes of {', '.join(self.grid.axes)}: queries {q}, keys {k}{thinned}"
