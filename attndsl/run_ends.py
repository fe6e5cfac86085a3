"""The ends of an interval of tiles as scalars."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import islpy as isl

from attndsl.program import Binary, Call, Compare, Const, If, Scalar, children
from attndsl.simplify import fold

Ends = tuple[Scalar, Scalar]
ToScalar = Callable[[isl.AstExpr], Scalar]
# More intervals than this are not compared with each other.
MAX_GROUPED = 24


def interval_ends(build: isl.AstBuild, piece: isl.Set, context: isl.Set, scalar: ToScalar, cases: bool = True) -> Ends:
    """The first tile of an interval { [t] } and how many there are, none where its parameters do not allow it.

    As isl writes them, case by case, or where that is shorter as the greatest lower and the least upper bound.
    cases: False leaves the former out where there is the latter; it takes long where there are many parameters.
    """
    return min(_written(build, piece, context, scalar, cases), key=written_size)


def plain_interval(piece: isl.BasicSet) -> bool:
    """Whether a conjunction on { [t] } has no quotients of t: then it holds for all from its first to its last."""
    whole = isl.Set.from_basic_set(piece).compute_divs().get_basic_sets()
    return len(whole) == 1 and not any(
        whole[0].get_div(i).involves_dims(isl.dim_type.in_, 0, 1) for i in range(whole[0].dim(isl.dim_type.div))
    )


def exclusive(params: list[isl.Set]) -> list[list[int]]:
    """Intervals in groups, given the parameters for which each has tiles: of a group one has, at most."""
    groups: list[list[int]] = []
    for i, own in enumerate(params):
        fitting = (
            (g for g in groups if all(own.is_disjoint(params[j]) for j in g)) if len(params) <= MAX_GROUPED else ()
        )
        group = next(iter(fitting), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def either(ends: list[tuple[Scalar, Scalar]]) -> tuple[Scalar, Scalar]:
    """First tile and number of tiles of that interval of a group which has some: no loop has to choose among them."""
    *others, (first, count) = ends
    for other, tiles in reversed(others):
        tiles = Call("max", (tiles, Const(0)))
        first = If(Compare(">", tiles, Const(0)), other, first)
        count = If(Compare(">", tiles, Const(0)), tiles, count)
    return first, count


def written_size(ends: tuple[Scalar, ...]) -> int:
    """Nodes of expressions, written out."""
    sizes: dict[int, int] = {}

    def size(e: Scalar) -> int:
        if id(e) not in sizes:
            sizes[id(e)] = 1 + sum(map(size, children(e)))
        return sizes[id(e)]

    return sum(map(size, ends))


def _written(build: isl.AstBuild, piece: isl.Set, context: isl.Set, scalar: ToScalar, cases: bool) -> Iterator[Ends]:
    basic = piece.get_basic_sets()
    plain = len(basic) == 1 and plain_interval(basic[0])
    if plain:
        yield _bounds(build, basic[0], context, scalar)
    if not plain or (cases and not basic[0].dim(isl.dim_type.div)):  # Those of quotients take long too.
        first, last = (scalar(build.expr_from_pw_aff(end)) for end in (piece.dim_min(0), piece.dim_max(0)))
        yield first, _guarded(build, piece.params().gist(context), scalar, _count(first, last))


def _bounds(build: isl.AstBuild, piece: isl.BasicSet, context: isl.Set, scalar: ToScalar) -> Ends:
    lower, upper = list[Scalar](), list[Scalar]()
    for constraint in piece.get_constraints():
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
    others = isl.Set.from_basic_set(piece.drop_constraints_involving_dims(isl.dim_type.set, 0, 1))
    count = Call("max", (_count(first, last), Const(0)))
    return first, _guarded(build, others.params().gist(context), scalar, count)


def _count(first: Scalar, last: Scalar) -> Scalar:
    return Binary("+", Binary("-", last, first), Const(1))


def _guarded(build: isl.AstBuild, params: isl.Set, scalar: ToScalar, count: Scalar) -> Scalar:
    guard = fold(scalar(build.expr_from_set(params)))
    return count if guard == Const(True) else If(guard, count, Const(0))
