"""How many entries the lists of a plan have: a selection's budget, and what it may force for one row class."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import assert_never

import islpy as isl

from attndsl.branches import Branch, Part
from attndsl.derive import derive
from attndsl.diagnostics import error
from attndsl.effort import TooHard, bounded, remembered
from attndsl.isl_sets import project_param
from attndsl.linear import normalise
from attndsl.member_numbers import in_integer_sets
from attndsl.oracle import evaluate
from attndsl.program import CallShape, Inter, Program, Scalar, Var
from attndsl.quasi_affine import condition
from attndsl.relation import POSITION_BITS, Lowering
from attndsl.selection import Above, Cover, Forced, Levels, Selection, Top
from attndsl.simplify import fold
from attndsl.view_plans import entries_of

MAX_FORCED = 1 << 16
# Entries that a list may have where there are fewer members: published budgets of single keys take half as many.
MOST_SPARE = 1 << 12


@remembered(1024)
def forced_bound(program: Program, heads: tuple[int, int], selection: Selection) -> int | None:
    """The most members that `always` forces for a row class; None where nothing bounds them.

    Members of one convex piece of the set are taken for an interval, and pieces for disjoint, so this may be too many.
    """
    if selection.always is None:
        return 0
    if selection.most_forced is not None:
        return selection.most_forced
    forced = Inter((selection.among, selection.always))
    # What `lengths` and `packed` say bounds each sequence alone, and for any length there is the same bound.
    derived = derive(replace(program, branches=(Branch((Part(forced),)),), output=None, lengths=None, packed=None))
    lowering = Lowering(derived, heads)
    pairs = lowering.lower(derived.branch.pattern, lowering.here)
    try:
        return bounded(lowering.ctx, lambda: _most(lowering, pairs, selection))
    except TooHard:
        return None


def _most(lowering: Lowering, pairs: isl.Set, selection: Selection) -> int | None:
    for name in lowering.atoms:
        pairs = project_param(pairs, name)
    for name in lowering.uniform:
        pairs = project_param(pairs, name)
    divided = isl.Map.read_from_str(lowering.ctx, f"{{ [q, k] -> [{', '.join(in_integer_sets(selection))}] }}")
    bits = 1 << POSITION_BITS
    exist = lowering.set(f"[Nk] -> {{ [q, k] : 0 <= q < {bits} and 0 <= k < Nk and Nk < {bits} }}")
    members = pairs.intersect_params(lowering.context()).intersect(exist).apply(divided).coalesce().make_disjoint()
    most = 0
    for piece in members.get_basic_sets():
        of_rows = _as_map(piece)
        apart = of_rows.reverse().apply_range(of_rows).deltas()
        wide = apart.project_out(isl.dim_type.param, 0, apart.dim(isl.dim_type.param)).dim_max_val(0)
        # Positions are bounded by their bits alone: what grows with them is bounded by nothing.
        if not wide.is_int() or wide.to_python() >= MAX_FORCED:
            return None
        most += wide.to_python() + 1
    return most


@remembered(1024)
def rows_that_see(program: Program, heads: tuple[int, int], q_len: int, k_len: int) -> tuple[int, int]:
    """The first row that a derived program of one part may let see anything, and one past the last."""
    part = program.only.parts[0]
    lowering = Lowering(program, heads)
    relation = lowering.relation(part.pattern) if part.view is None else entries_of(program, heads)

    def ends() -> tuple[int, int]:
        pairs = relation.pairs
        for name in (*relation.atoms, *relation.uniform):
            pairs = project_param(pairs, name)
        for name, value in (("Nq", q_len), ("Nk", k_len)):
            at = pairs.find_dim_by_name(isl.dim_type.param, name)
            pairs = pairs if at < 0 else pairs.fix_val(isl.dim_type.param, at, isl.Val(value, pairs.get_ctx()))
        rows = pairs.project_out(isl.dim_type.set, 1, 1)
        rows = rows.intersect(isl.Set.read_from_str(rows.get_ctx(), f"{{ [q] : 0 <= q < {max(1, q_len)} }}"))
        if rows.is_empty():
            return 0, 0
        least, most = (
            end.sample_point().get_coordinate_val(isl.dim_type.set, 0) for end in (rows.lexmin(), rows.lexmax())
        )
        return int(least.to_python()), int(most.to_python()) + 1

    try:
        return bounded(lowering.ctx, ends)
    except TooHard:
        return 0, q_len


@remembered(256)
def lags_of(program: Program, heads: tuple[int, int], size: int, rows: int | None) -> Scalar | None:
    """Of a derived program's pattern the condition on k, a block of `size` lags, that some row from `start` on, of
    class q of so many rows (None: q is 0), has a pair so far back; None where data or effort forbids."""
    lowering = Lowering(program, heads)
    relation = lowering.relation(program.branch.pattern)
    if relation.atoms:
        return None

    def back() -> Scalar:
        here = lowering.set("[Nq, start] -> { [q, k] : start <= q < Nq and 0 <= k <= q }")
        of_row = "x" if rows is None else f"floor(q / {rows})"
        lags = isl.Map.read_from_str(lowering.ctx, f"{{ [q, k] -> [{of_row}, floor((q - k) / {size})] }}")
        found = relation.pairs.intersect(here).apply(lags).coalesce()
        return fold(normalise(condition(found, relation.context, {**relation.uniform, "start": Var("start")})))

    try:
        return bounded(lowering.ctx, back)
    except TooHard:
        return None


def _as_map(piece: isl.BasicSet) -> isl.Map:
    """{ [r, m] } as { [r] -> [m] }."""
    moved = isl.Map.from_domain(isl.Set.from_basic_set(piece))
    return moved.move_dims(isl.dim_type.out, 0, isl.dim_type.in_, 1, 1)


def budgets(program: Program, count: Scalar, heads: tuple[int, int]) -> tuple[int, ...]:
    """`n` of a `top` for each query head: it reads tables and heads alone."""
    found = evaluate(count, program, CallShape(1, *heads, 1, 1, 8, 8)).reshape(-1).tolist()
    return tuple(found) if len(found) == heads[0] else tuple(found) * heads[0]


def capacity(program: Program, selection: Selection, heads: tuple[int, int], members: int) -> int:
    """Entries of a list: the budget, and what may be forced beside it. So a list is as long whatever the length is, but
    where its budget is more than any member there is, and out of all measure.

    Raises `PatternError` (A571) where each query may force any number.
    """
    match selection.rule:
        case Top(count=None, fraction=share):
            exact = Fraction(repr(share))
            budget = max(1, exact.numerator * members // exact.denominator)
        case Top(count=count):
            assert count is not None
            budget = max(budgets(program, count, heads))
        case Cover(at_most=most) | Above(at_most=most):
            budget = members if most is None else most
        case Levels():
            budget = members
        case _:
            assert_never(selection.rule)
    budget = min(budget, max(members, MOST_SPARE))
    if not selection.bounded:
        return budget
    forced = forced_bound(program, heads, selection)
    if forced is None and selection.rows == 1:
        raise error(
            "A571", f"`always` of `{selection.name}` may force any number of members for each query", selection.span,
            help="bound it, as `sink(4) | same_block(64)` is, or select `per = rows(64)`",
        )  # fmt: skip
    forced = members if forced is None else forced
    return max(budget, forced) if selection.forced is Forced.COUNTED else budget + forced
