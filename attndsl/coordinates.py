"""Coordinates of a grid as arithmetic of positions, and positions as arithmetic of coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from attndsl.grid import Grid
from attndsl.program import Binary, Call, Compare, Const, Logic, Scalar, Var


def coordinate(grid: Grid, axis: int, x: Scalar) -> Scalar:
    """The coordinate of token x; of a token off the grid, what the same arithmetic gives.

    >>> from attndsl.notation import scalar_text
    >>> from attndsl.program import Var
    >>> scalar_text(coordinate(Grid(("y", "x"), (None, 64), 8, (1, 1)), 0, Var("q")))
    '(q - 8) // 64'
    """
    cell = _minus(x, grid.first)
    whole = prod(grid.tiles)
    counts = [None if n is None else n // t for n, t in zip(grid.sizes, grid.tiles, strict=True)]
    tile = _digit(_quotient(cell, whole), counts, axis)
    if whole == 1:
        return tile
    inside = _digit(_rest(cell, whole), [None, *grid.tiles[1:]], axis)
    return _plus(_times(tile, grid.tiles[axis]), inside)


def length(grid: Grid, axis: int, n: Scalar) -> Scalar:
    """The size of an axis in a sequence of n tokens."""
    size = grid.sizes[axis]
    if size is not None:
        return Const(size)
    cells = _minus(n, grid.first)
    if grid.first:
        cells = Call("max", (cells, Const(0)))
    layer = grid.stride * grid.tiles[0]
    if prod(grid.tiles) == 1:
        return _quotient(_plus(cells, Const(layer - 1)), layer)
    # Whole layers of tiles, and of one that is not whole the rows that its first tile has.
    row = prod(grid.tiles[1:])
    last = Call("min", (_quotient(_plus(_rest(cells, layer), Const(row - 1)), row), Const(grid.tiles[0])))
    return _plus(_times(_quotient(cells, layer), grid.tiles[0]), last)


def token(grid: Grid, coordinates: Sequence[Scalar]) -> Scalar:
    """The token with these coordinates, each within its axis."""
    found: Scalar = Const(grid.first)
    whole = prod(grid.tiles)
    stride, inside = whole, 1
    for axis in reversed(range(len(grid.axes))):
        size, tile = grid.sizes[axis], grid.tiles[axis]
        found = _plus(_times(_quotient(coordinates[axis], tile), stride), found)
        if whole > 1:
            found = _plus(found, _times(_rest(coordinates[axis], tile), inside))
        inside *= tile
        stride *= 1 if size is None else size // tile
    return found


def on_grid(grid: Grid, tokens: str = "qk") -> Scalar:
    """Whether the tokens of a pair lie on the grid: both, or one of them."""
    found: list[Scalar] = []
    for x in map(Var, tokens):
        if grid.first:
            found.append(Compare(">=", x, Const(grid.first)))
        if grid.sizes[0] is not None:
            found.append(Compare("<", x, Const(grid.first + grid.sizes[0] * grid.stride)))
    if len(found) == 1:
        return found[0]
    return Const(True) if not found else Logic("and", tuple(found))


def _digit(n: Scalar, sizes: Sequence[int | None], axis: int) -> Scalar:
    """The digit of n along an axis, in the mixed radix of the sizes; the first is not bounded."""
    found = _quotient(n, prod(size for size in sizes[axis + 1 :] if size is not None))
    size = sizes[axis]
    return found if axis == 0 or size is None else _rest(found, size)


def _quotient(x: Scalar, n: int) -> Scalar:
    return x if n == 1 else Binary("//", x, Const(n))


def _rest(x: Scalar, n: int) -> Scalar:
    return Const(0) if n == 1 else Binary("%", x, Const(n))


def _times(x: Scalar, n: int) -> Scalar:
    return x if n == 1 else Binary("*", x, Const(n))


def _plus(x: Scalar, y: Scalar) -> Scalar:
    if y == Const(0):
        return x
    return y if x == Const(0) else Binary("+", x, y)


def _minus(x: Scalar, n: int) -> Scalar:
    return x if n == 0 else Binary("-", x, Const(n))
