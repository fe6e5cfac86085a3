"""The ends of an interval of tiles as scalars."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import islpy as isl

from attndsl.program import Binary, Call, Const, If, Scalar, children
from attndsl.simplify import fold

ToScalar = Callable[[isl.AstExpr], Scalar]


def interval_ends(build: isl.AstBuild, piece: isl.Set, context: isl.Set, scalar: ToScalar) -> tuple[Scalar, Scalar]:
    """The first tile of an interval { [t] } and how many there are, none where its parameters do not allow it.

    As isl writes them, case by case, or where that is shorter as the greatest lower and the least upper bound.
    """
    return min(_written(build, piece, context, scalar), key=written_size)


def written_size(ends: tuple[Scalar, ...]) -> int:
    """Nodes of expressions, written out."""
    sizes: dict[int, int] = {}

    def size(e: Scalar) -> int:
        if id(e) not in sizes:
            sizes[id(e)] = 1 + sum(map(size, children(e)))
        return sizes[id(e)]

    return sum(map(size, ends))


def _written(
    build: isl.AstBuild, piece: isl.Set, context: isl.Set, scalar: ToScalar
) -> Iterator[tuple[Scalar, Scalar]]:
    first, last = (scalar(build.expr_from_pw_aff(end)) for end in (piece.dim_min(0), piece.dim_max(0)))
    yield first, _guarded(build, piece.params().gist(context), scalar, _count(first, last))
    basic = piece.get_basic_sets()
    if len(basic) != 1 or basic[0].dim(isl.dim_type.div):
        return
    lower, upper = list[Scalar](), list[Scalar]()
    for constraint in basic[0].get_constraints():
        if not constraint.involves_dims(isl.dim_type.set, 0, 1):
            continue
        bound, equal = constraint.get_bound(isl.dim_type.set, 0), constraint.is_equality()
        below = equal or constraint.is_lower_bound(isl.dim_type.set, 0)
        above = equal or constraint.is_upper_bound(isl.dim_type.set, 0)
        for ends, wanted, rounded in ((lower, below, isl.Aff.ceil), (upper, above, isl.Aff.floor)):
            if wanted:
                end = isl.PwAff.from_aff(rounded(bound)).project_domain_on_params()
                ends.append(scalar(build.expr_from_pw_aff(end)))
    first, last = Call("max", tuple(lower)), Call("min", tuple(upper))
    others = isl.Set.from_basic_set(basic[0].drop_constraints_involving_dims(isl.dim_type.set, 0, 1))
    count = Call("max", (_count(first, last), Const(0)))
    yield first, _guarded(build, others.params().gist(context), scalar, count)


def _count(first: Scalar, last: Scalar) -> Scalar:
    return Binary("+", Binary("-", last, first), Const(1))


def _guarded(build: isl.AstBuild, params: isl.Set, scalar: ToScalar, count: Scalar) -> Scalar:
    guard = fold(scalar(build.expr_from_set(params)))
    return count if guard == Const(True) else If(guard, count, Const(0))
