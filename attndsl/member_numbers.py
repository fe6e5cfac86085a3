"""The numbers of members that are no blocks in a row, as scalars: which one a key is of, and whether it is of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from attndsl.coordinates import coordinate, on_grid, token
from attndsl.members import Lags, Members, Placed, Runs, Tiles, extent
from attndsl.program import Binary, Call, Compare, Const, Logic, Read, Scalar, Type, Var, substitute
from attndsl.selection import Selected, Selection

_TOKENS = Var("Nk")


def number(members: Tiles | Placed | Lags, x: str) -> Scalar:
    """The member of token `x` ("q" or "k"), of a pair whose tokens have one.

    >>> from attndsl.grid import Grid
    >>> from attndsl.notation import scalar_text
    >>> scalar_text(number(Tiles(Grid(("y", "x"), (None, 64), 0, (1, 1)), (8, 8)), "k"))
    'k // 64 // 8 * 8 + k % 64 // 8'
    """
    match members:
        case Tiles(grid=grid, sizes=sizes):
            found = _quotient(coordinate(grid, 0, Var(x)), sizes[0])
            for axis, count in enumerate(members.counts, start=1):
                place = _quotient(coordinate(grid, axis, Var(x)), sizes[axis])
                found = Binary("+", Binary("*", found, Const(count)), place)
            return found
        case Placed(size=size, tiles=tiles):
            place = read(members, x)
            return _quotient(place, size) if tiles is None else substitute(number(tiles, "k"), {"k": place})
        case Lags(size=size):
            return _quotient(Binary("-", Var("q"), Var("k")), size)
        case _:
            assert_never(members)


def first_token(tiles: Tiles, number: Scalar) -> Scalar:
    """The first token of the tile of a number."""
    coordinates = list[Scalar]()
    for count, size in zip(reversed((0, *tiles.counts)), reversed(tiles.sizes), strict=True):
        own = number if not count else Binary("%", number, Const(count))
        coordinates.append(own if size == 1 else Binary("*", own, Const(size)))
        number = _quotient(number, count) if count else number
    return token(tiles.grid, coordinates[::-1])


def read(members: Placed | Runs, x: str = "k") -> Read:
    """What the input of a permutation, or of segments, says of token `x`."""
    return Read(members.input, (*members.lead, Var(x)), Type.INT)


def has_member(members: Members, tokens: Scalar = _TOKENS, past: bool = False) -> Scalar | None:
    """Whether the key of a pair, one of so many tokens, is of a member; None where each is.

    past: keys past the last token are asked too, as extents reach there. Of tiles there are as many as tokens begin.
    """
    match members:
        case Tiles(grid=grid):
            found = [] if grid.everywhere else [on_grid(grid, "k")]
            if past:
                size, _ = extent(members)
                end = Binary("*", _quotient(Binary("+", tokens, Const(size - 1)), size), Const(size))
                found.append(Compare("<", Var("k"), Binary("+", end, Const(grid.first))))
            return None if not found else found[0] if len(found) == 1 else Logic("and", tuple(found))
        case Placed():
            return _is_placed(members, tokens)
        case Lags():
            return Compare("<=", Var("k"), Var("q"))
        case Runs():
            return None
        case _:
            assert_never(members)


def in_document(
    chosen: Selected, first: Scalar, end: Scalar, begins: Callable[[str], str]
) -> tuple[Scalar | None, Scalar | None]:
    """Which member of a document, of the tokens from `first` to before `end`, key k is of, and whether it is of one;
    None where a document says it as a call does. begins: the input that holds the first tokens of another's runs."""
    position = Binary("-", Var("k"), first)
    match chosen.members:
        case None:
            return _quotient(position, chosen.keys), None
        case Lags():
            return None, None
        case Tiles() as of:
            inside = has_member(of)
            own = {"k": position}
            return substitute(number(of, "k"), own), None if inside is None else substitute(inside, own)
        case Placed() as of:
            return number(of, "k"), _is_placed(of, Binary("-", end, first))
        case Runs() as of:
            # A segment begins with its document at the earliest.
            begin = replace(read(of), input=begins(of.input))
            return Binary("-", Call("max", (begin, first)), first), None
        case other:
            assert_never(other)


def _is_placed(of: Placed, tokens: Scalar) -> Scalar:
    """Whether key k is at one of so many places that is of a member."""
    place = read(of)
    found: list[Scalar] = [Compare(">=", place, Const(0)), Compare("<", place, tokens)]
    if of.tiles is not None and not of.tiles.grid.everywhere:
        found.append(substitute(on_grid(of.tiles.grid, "k"), {"k": place}))
    return Logic("and", tuple(found))


def where_told(members: Members, e: Scalar, tokens: Scalar) -> Scalar:
    """What says of a key which member it has, of one that may lie past the last token too: what an input says there is
    what it says of the last, as an index is clamped."""
    if not isinstance(members, Placed | Runs):
        return e
    return substitute(e, {"k": Call("min", (Var("k"), Binary("-", tokens, Const(1))))})


def in_integer_sets(selection: Selection) -> tuple[str, str]:
    """The row class of q and the member of k as isl writes them. Where data says which member, every key is its own: no
    fewer are then counted than there are.

    >>> _isl(Binary("//", Binary("-", Var("q"), Var("k")), Const(4)))
    'floor(((q - k)) / 4)'
    """
    match selection.members:
        case None:
            of_key = f"floor(k / {selection.keys})"
        case Placed() | Runs():
            of_key = "k"
        case members:
            of_key = _isl(number(members, "k"))
    if selection.row_tiles is not None:
        return _isl(number(selection.row_tiles, "q")), of_key
    return f"floor(q / {selection.rows})" if selection.rows else "0", of_key


def _isl(e: Scalar) -> str:
    match e:
        case Var(name=name):
            return name
        case Const(value=value):
            return str(value)
        case Binary(op="//", left=a, right=Const(value=n)):
            return f"floor(({_isl(a)}) / {n})"
        case Binary(op="%", left=a, right=Const(value=n)):
            return f"(({_isl(a)}) mod {n})"
        case Binary(op=op, left=a, right=b):
            return f"({_isl(a)} {op} {_isl(b)})"
        case _:
            raise AssertionError(f"not the number of a member: {e}")


def _quotient(x: Scalar, size: int) -> Scalar:
    return x if size == 1 else Binary("//", x, Const(size))
