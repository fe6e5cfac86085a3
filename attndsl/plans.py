"""Plans: how what a selection chooses stands in a program, as an input that a call makes or is given."""

from __future__ import annotations

from fractions import Fraction
from typing import assert_never

from attndsl.derivation import Random
from attndsl.diagnostics import error
from attndsl.forced import forced_bound
from attndsl.oracle import evaluate
from attndsl.pairs import nodes
from attndsl.program import CallShape, Program, Scalar, reads, scalars
from attndsl.selection import Above, Cover, Forced, Levels, Selection, Share, Top


def plan_heads(selection: Selection) -> Share:
    """Which heads have one plan: those that share, unless what is allowed, or how many are chosen, reads the head."""
    sets = [selection.among] if selection.always is None else [selection.among, selection.always]
    written: list[Scalar] = [e for each in sets for e in scalars(each)]
    if isinstance(selection.rule, Top) and selection.rule.count is not None:
        written.append(selection.rule.count)
    finer = {Share.NONE: (), Share.GROUP: ("h",), Share.HEADS: ("h", "g")}[selection.share]
    drawn = any(isinstance(node, Random) for each in sets for node in nodes(each))
    return Share.NONE if drawn or any(reads(e, *finer) for e in written) else selection.share


def budgets(program: Program, count: Scalar, heads: tuple[int, int]) -> tuple[int, ...]:
    """`n` of a `top` for each query head: it reads tables and heads alone."""
    found = evaluate(count, program, CallShape(1, *heads, 1, 1, 8, 8)).reshape(-1).tolist()
    return tuple(found) if len(found) == heads[0] else tuple(found) * heads[0]


def capacity(program: Program, selection: Selection, heads: tuple[int, int], members: int) -> int:
    """Entries of a list: the budget, and what may be forced beside it.

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
