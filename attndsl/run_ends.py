"""The ends of an interval of tiles as scalars."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce

import islpy as isl

from attndsl.effort import bounded
from attndsl.isl_sets import integer
from attndsl.program import Binary, Call, Compare, Const, If, Scalar, children
from attndsl.quasi_affine import conjunction, rounded, to_scalar
from attndsl.simplify import fold

Ends = tuple[Scalar, Scalar]
Names = Mapping[str, Scalar]
# More intervals than this are not compared with each other.
MAX_GROUPED = 24
# Residues up to which bounds of a number and of a quotient of it are put as bounds of the number.
MAX_RESIDUES = 4
# Operations for an end of an interval. What isl searches grows as it goes on: twice as many take four times as long.
ENDS_EFFORT = 10_000


def interval_ends(build: isl.AstBuild, piece: isl.Set, context: isl.Set, names: Names) -> Ends:
    """The first tile of an interval { [t] } and how many there are, none where its parameters do not allow it.

    Of a conjunction the greatest lower and the least upper bound; of others what isl writes, case by case, which takes
    many times longer. Raises TooHard where isl does not find them.
    """
    basic = piece.get_basic_sets()
    if len(basic) == 1 and plain_interval(basic[0]):
        return _bounds(build, basic[0], context, names)
    ends = (bounded(build.get_ctx(), end, ENDS_EFFORT) for end in (lambda: piece.dim_min(0), lambda: piece.dim_max(0)))
    first, last = (to_scalar(build.expr_from_pw_aff(end), names) for end in ends)
    return first, _guarded(build, piece.params(), context, names, _count(first, last))


def plain_interval(piece: isl.BasicSet) -> bool:
    """Whether a conjunction on { [t] } has no quotients of t: then it holds for all from its first to its last."""
    if not piece.dim(isl.dim_type.div):
        return True
    whole = isl.Set.from_basic_set(piece).compute_divs().get_basic_sets()
    return len(whole) == 1 and not any(
        whole[0].get_div(i).involves_dims(isl.dim_type.in_, 0, 1) for i in range(whole[0].dim(isl.dim_type.div))
    )


def straightened(piece: isl.BasicSet) -> list[isl.BasicSet]:
    """A conjunction on { [t] }, with bounds of quotients of t put as bounds of t: `t // 8 >= n` as `t >= 8 n`, and so
    with sums of both that only grow, or only fall, as `_grown` has it."""
    if plain_interval(piece):
        return [piece]
    whole = isl.Set.from_basic_set(piece).compute_divs().get_basic_sets()
    if len(whole) != 1:
        return [piece]
    return list(reduce(isl.Set.intersect, map(_straightened, whole[0].get_constraints())).get_basic_sets()) or [piece]


def _straightened(constraint: isl.Constraint) -> isl.Set:
    bound, div = constraint.get_aff(), isl.dim_type.div
    quotients = [
        i for i in range(bound.dim(div))
        if not bound.get_coefficient_val(div, i).is_zero() and bound.get_div(i).involves_dims(isl.dim_type.in_, 0, 1)
    ]  # fmt: skip
    itself = isl.Set.from_basic_set(isl.BasicSet.from_constraint(constraint))
    if len(quotients) != 1:
        return itself
    if not bound.get_coefficient_val(isl.dim_type.in_, 0).is_zero():
        return itself if constraint.is_equality() else _grown(bound, quotients[0]) or itself
    # factor * floor(quotient) + rest >= 0, or = 0, where rest does not know t.
    (place,) = quotients
    factor, quotient = bound.get_coefficient_val(div, place), bound.get_div(place)
    rest = bound.set_coefficient_val(div, place, isl.Val.zero(constraint.get_ctx()))
    limit = isl.PwAff.from_aff((rest.neg() if factor.is_pos() else rest).scale_down_val(factor.abs()))
    divisor = quotient.get_denominator_val()
    divided = isl.PwAff.from_aff(quotient.scale_val(divisor))
    least = divided.ge_set(limit.ceil().scale_val(divisor))
    most = divided.lt_set(limit.floor().scale_val(divisor).add_constant_val(divisor))
    if constraint.is_equality():
        return least.intersect(most)
    return least if factor.is_pos() else most


def _grown(bound: isl.Aff, place: int) -> isl.Set | None:
    """factor * t + more * floor((t + shift) / m) + rest >= 0, where the left side only grows with t or only falls, as a
    bound of t: None where it does neither, or m is not small.

    With u = t + shift and the left side as g(u) - least, g(u + m) = g(u) + period: below the least u that meets it are,
    of each residue i modulo m, ceil((least - g(i)) / period) numbers from 0 on, counted negative before 0.
    """
    div, own, quotient = isl.dim_type.div, isl.dim_type.in_, bound.get_div(place)
    m, of_t = integer(quotient.get_denominator_val()), quotient.get_coefficient_val(own, 0)
    if m > MAX_RESIDUES or integer(of_t.mul(quotient.get_denominator_val())) != 1:
        return None
    factor, more = (integer(bound.get_coefficient_val(*at)) for at in ((own, 0), (div, place)))
    period = m * factor + more
    if not (min(factor, factor + more) >= 0 < period or max(factor, factor + more) <= 0 > period):
        return None
    ctx = bound.get_ctx()
    number = partial(isl.Val.int_from_si, ctx)
    shift = quotient.scale_val(number(m)).set_coefficient_val(own, 0, number(0))
    rest = bound.set_coefficient_val(own, 0, number(0)).set_coefficient_val(div, place, number(0))
    # Where it falls, its negative grows, and what is counted are numbers up to the last that meets the bound.
    sign = 1 if period > 0 else -1
    least = shift.scale_val(number(factor)).sub(rest).scale_val(number(sign))
    counts = []
    for i in range(m):
        part = least.add_constant_val(number(-sign * factor * i)).scale_down_val(number(abs(period)))
        counts.append(part.ceil() if sign > 0 else part.floor().add_constant_val(number(1)))
    end = isl.PwAff.from_aff(reduce(isl.Aff.add, counts).sub(shift))
    tile = isl.PwAff.var_on_domain(isl.LocalSpace.from_space(bound.get_domain_space()), isl.dim_type.set, 0)
    return tile.ge_set(end) if sign > 0 else tile.lt_set(end)


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


def in_a_row(ends: list[Ends]) -> Ends:
    """First tile and number of tiles of intervals in order of which those that have tiles follow each other."""
    *others, (first, count) = ends
    for other, tiles in reversed(others):
        first = If(Compare(">", tiles, Const(0)), other, first)
        count = Binary("+", tiles, count)
    return first, count


def either(ends: list[Ends]) -> Ends:
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


def _bounds(build: isl.AstBuild, piece: isl.BasicSet, context: isl.Set, names: Names) -> Ends:
    lower, upper = list[Scalar](), list[Scalar]()
    for constraint in piece.get_constraints():
        if not constraint.involves_dims(isl.dim_type.set, 0, 1):
            continue
        bound = constraint.get_bound(isl.dim_type.set, 0)
        if constraint.is_equality():
            # One tile, where there is one.
            params = isl.Set.from_basic_set(piece).params()
            return rounded(bound, names, up=False), _guarded(build, params, context, names, Const(1))
        if constraint.is_lower_bound(isl.dim_type.set, 0):
            lower.append(rounded(bound, names, up=True))
        else:
            upper.append(rounded(bound, names, up=False))
    first, last = Call("max", tuple(lower)), Call("min", tuple(upper))
    others = isl.Set.from_basic_set(piece.drop_constraints_involving_dims(isl.dim_type.set, 0, 1))
    return first, _guarded(build, others.params(), context, names, Call("max", (_count(first, last), Const(0))))


def _count(first: Scalar, last: Scalar) -> Scalar:
    return Binary("+", Binary("-", last, first), Const(1))


def _guarded(build: isl.AstBuild, params: isl.Set, context: isl.Set, names: Names, count: Scalar) -> Scalar:
    if params.plain_is_universe() or (params := params.gist(context)).plain_is_universe():
        return count
    pieces = params.get_basic_sets()
    guard = conjunction(pieces[0], names) if len(pieces) == 1 else None
    if guard is None:
        guard = fold(to_scalar(build.expr_from_set(params), names))
    return count if guard == Const(True) else If(guard, count, Const(0))
