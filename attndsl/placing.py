"""Where a set is read: `P on place` reads P in other coordinates than those of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import assert_never

import islpy as isl

from attndsl.coordinates import coordinate, length
from attndsl.derivation import Segment
from attndsl.grid import Along
from attndsl.program import Binary, Blocks, Const, Permuted, Place, Read, Scalar, Type, Var


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The coordinates in which a set is read: q, k and the lengths as affine functions and as scalars.

    affine: whether sets are exact there, their coordinates affine and few quotients deep; else they are data.
    """

    q: isl.PwAff
    k: isl.PwAff
    q_len: isl.PwAff
    k_len: isl.PwAff
    names: dict[str, Scalar] = field(default_factory=dict)
    affine: bool = True

    def name(self, variable: str) -> Scalar:
        return self.names.get(variable, Var(variable))


Affine = Callable[[Scalar, Coordinates], isl.PwAff]


def placed(at: Coordinates, place: Place, affine: Affine) -> Coordinates:
    """The coordinates inside `P on place`; `affine` writes a scalar as a function of q and k."""
    match place:
        case Blocks(size=size):
            return _blocks(at, size)
        case Permuted():
            return _permuted(at, place)
        case Segment():
            raise AssertionError("the program is derived before it is lowered")
        case Along():
            return _along(at, place, affine)
        case _:
            assert_never(place)


def _along(at: Coordinates, along: Along, affine: Affine) -> Coordinates:
    """Coordinates along an axis: exact for the first one, in which tokens in order never go back.

    Sets along the others are data where tokens are counted in order: one dimension is no place for products.
    """
    grid, axis = along.grid, along.axis
    found = {x: coordinate(grid, axis, Var(x)) for x in ("q", "k")}
    found |= {n: length(grid, axis, Var(n)) for n in ("Nq", "Nk")}
    names = {x: coordinate(grid, axis, at.name(x)) for x in ("q", "k")}
    names |= {n: length(grid, axis, at.name(n)) for n in ("Nq", "Nk")}
    if axis or any(tile > 1 for tile in grid.tiles):
        return replace(at, names=names, affine=False)
    q, k, q_len, k_len = (affine(e, at) for e in found.values())
    return Coordinates(q, k, q_len, k_len, names, at.affine)


def _blocks(at: Coordinates, size: int) -> Coordinates:
    ctx = at.q.get_ctx()

    def divided(x: isl.PwAff) -> isl.PwAff:
        return x.scale_down_val(isl.Val.int_from_si(ctx, size)).floor()

    def quotient(x: Scalar) -> Scalar:
        return Binary("//", x, Const(size))

    def count(x: Scalar) -> Scalar:
        return Binary("+", quotient(Binary("-", x, Const(1))), Const(1))

    one = isl.Val.int_from_si(ctx, 1)
    minus_one = isl.Val.int_from_si(ctx, -1)
    return Coordinates(
        divided(at.q), divided(at.k),
        divided(at.q_len.add_constant_val(minus_one)).add_constant_val(one),
        divided(at.k_len.add_constant_val(minus_one)).add_constant_val(one),
        {
            "q": quotient(at.name("q")), "k": quotient(at.name("k")),
            "Nq": count(at.name("Nq")), "Nk": count(at.name("Nk")),
        },
        at.affine,
    )  # fmt: skip


def _permuted(at: Coordinates, permuted: Permuted) -> Coordinates:
    def entry(x: Scalar) -> Scalar:
        return Read(permuted.input, (*permuted.lead, x), Type.INT)

    return replace(at, names=at.names | {x: entry(at.name(x)) for x in ("q", "k")}, affine=False)
