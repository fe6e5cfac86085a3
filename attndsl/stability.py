"""Selections that leak the future: under `causal` a member of which a row sees a part competes by all of its tokens.

A selection for each query is prefix-stable if every partly visible candidate is forced, and what is forced does not
move the others: `top` with `counted` or `extra`. Then decode equals prefill, and a row's output does not depend on what
follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import islpy as isl

from attndsl.branches import Branch, Part
from attndsl.derive import derive
from attndsl.diagnostics import Diagnostic, Severity
from attndsl.effort import TooHard, bounded
from attndsl.isl_sets import project_param, where_param
from attndsl.member_numbers import in_integer_sets
from attndsl.members import Placed, Runs, Tiles
from attndsl.program import Inter, Program, Set
from attndsl.relation import POSITION_BITS, Lowering
from attndsl.selection import Antidiagonal, Bound, Dot, Forced, Normalise, Pool, Selection, Share, Top, Vectors


def unstable(program: Program) -> Iterator[Diagnostic]:
    """A warning (W305) for each selection of single queries that leaks, with a row and a member."""
    for selection in program.selections:
        if selection.rows == 1 and selection.together and _within_causal(program, selection):
            yield Diagnostic(
                "W305", Severity.WARNING, f"`{selection.name}` lets rows compete with later ones", selection.span,
                notes=("what a row takes depends on the masses of rows after it",), help="write `compete = row`",
            )  # fmt: skip
            continue
        if selection.rows != 1 or not _sees_whole_members(selection):
            continue
        try:
            witness = _competes(program, selection)
        except TooHard:
            continue
        if witness is not None:
            row, member = witness
            last = (member + 1) * selection.keys - 1
            note, own = f"row {row} ranks tokens {member * selection.keys} to {last} as one member", "..."
            match selection.members:
                case None:
                    own = f"same_block({selection.keys})"
                case Tiles():
                    note = f"row {row} ranks tile {member}, of which tokens lie after it"
                case _:
                    note = f"row {row} may rank a member of which tokens lie after it"
            yield Diagnostic(
                "W305", Severity.WARNING, f"`{selection.name}` ranks members by tokens that a row does not see",
                selection.span, notes=(note,),
                help=f"force it: `always = {own}`, with `top` and `counted` or `extra`",
            )  # fmt: skip


def _sees_whole_members(selection: Selection) -> bool:
    """Whether a member's score reads all of its tokens. Single or first tokens and finished entries leak nothing."""
    match selection.score:
        case Dot(y=y):
            vectors: tuple[Vectors, ...] = (y,)
        case Bound(low=low, high=high):
            vectors = (low, high)
        case Antidiagonal():
            return True
        case _:
            return False
    pooled = (v for v in vectors if v.source == "K" or v.pool is not None)
    single = selection.keys == 1 and selection.members is None
    return not single and any(v.pool not in (None, Pool.FIRST) for v in pooled)


def _competes(program: Program, selection: Selection) -> tuple[int, int] | None:
    """A row and a member of which it sees a part only, that ranks beside others; None where there is none, or where the
    selection is not within `causal`."""
    if not _within_causal(program, selection):
        return None
    among = _lowered(program, selection.among)
    every = _pairs(*among, data=True)
    partly = bounded(among[0].ctx, lambda: _partly(every, selection))
    if selection.always is not None and _keeps_apart(selection):
        forced = _lowered(program, Inter((selection.among, selection.always)))
        text = _members(_pairs(*forced, data=False), selection).to_str()
        partly = partly.subtract(isl.Set.read_from_str(partly.get_ctx(), text))
    if partly.is_empty():
        return None
    point = partly.lexmin().sample_point()
    row, member = (point.get_coordinate_val(isl.dim_type.set, i).to_python() for i in range(2))
    return int(row), int(member)


def _within_causal(program: Program, selection: Selection) -> bool:
    """Whether no row may choose among later tokens."""
    every = _pairs(*_lowered(program, selection.among), data=True)
    return bool(every.intersect(isl.Set.read_from_str(every.get_ctx(), "{ [q, k] : k > q }")).is_empty())


def _keeps_apart(selection: Selection) -> bool:
    """Whether what is forced leaves the rank of the others as it is."""
    if selection.forced is Forced.EXTRA:
        return True
    summed = selection.share is not Share.NONE and selection.normalise is not Normalise.NONE
    return selection.forced is Forced.COUNTED and isinstance(selection.rule, Top) and not summed


def _lowered(program: Program, pattern: Set) -> tuple[Lowering, isl.Set]:
    # What a document alone leaks, a packed call leaks: whose members are its documents'.
    alone = replace(program, branches=(Branch((Part(pattern),)),), output=None, selections=(), packed=None)
    derived = derive(alone)
    lowering = Lowering(derived)
    return lowering, lowering.lower(derived.branch.pattern, lowering.here)


def _pairs(lowering: Lowering, pairs: isl.Set, *, data: bool) -> isl.Set:
    """The existing pairs that some (`data`) or every truth of the data, heads and arguments allows, at any length."""
    for name in lowering.atoms:
        both = [where_param(pairs, name, truth) for truth in (0, 1)]
        pairs = both[0].union(both[1]) if data else both[0].intersect(both[1])
    for name in lowering.uniform:
        pairs = project_param(pairs, name)
    exist = lowering.set(f"[Nk] -> {{ [q, k] : 0 <= q < Nk and 0 <= k < Nk and Nk < {1 << POSITION_BITS} }}")
    pairs = pairs.intersect(exist)
    for name in ("Nq", "Nk"):
        pairs = project_param(pairs, name)
    return pairs.coalesce()


def _members(pairs: isl.Set, selection: Selection) -> isl.Set:
    """The rows and members of pairs, where data says which member of a row's own token."""
    member = "q" if isinstance(selection.members, Placed | Runs) else in_integer_sets(selection)[1]
    if member == "q":
        # Of the members that data makes only that of the row's own token is known to be forced.
        pairs = pairs.intersect(isl.Set.read_from_str(pairs.get_ctx(), "{ [q, k] : k = q }"))
    return pairs.apply(isl.Map.read_from_str(pairs.get_ctx(), f"{{ [q, k] -> [q, {member}] }}"))


def _partly(pairs: isl.Set, selection: Selection) -> isl.Set:
    """The rows and candidates of which some token lies after the row.

    A segment does that holds the row's own token; so may any member of a permutation.
    """
    ctx = pairs.get_ctx()
    match selection.members:
        case Runs(order=None):
            return _members(pairs, selection)
        case Placed() | Runs():
            return pairs.apply(isl.Map.read_from_str(ctx, "{ [q, k] -> [q, m] : m = -1 }"))
        case _:
            member = in_integer_sets(selection)[1]
            later = isl.Map.read_from_str(ctx, f"{{ [q, k] -> [q, {member}] : k > q }}").range()
            return _members(pairs, selection).intersect(later)
