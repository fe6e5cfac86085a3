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
from attndsl.program import Inter, Program, Set
from attndsl.relation import POSITION_BITS, Lowering
from attndsl.selection import Antidiagonal, Bound, Dot, Forced, Normalise, Pool, Selection, Share, Top, Vectors


def unstable(program: Program) -> Iterator[Diagnostic]:
    """A warning (W305) for each selection of single queries that leaks, with a row and a member."""
    for selection in program.selections:
        if selection.rows != 1 or not _sees_whole_members(selection):
            continue
        try:
            witness = _competes(program, selection)
        except TooHard:
            continue
        if witness is not None:
            row, member = witness
            last = (member + 1) * selection.keys - 1
            yield Diagnostic(
                "W305", Severity.WARNING, f"`{selection.name}` ranks members by tokens that a row does not see",
                selection.span, notes=(f"row {row} ranks tokens {member * selection.keys} to {last} as one member",),
                help=f"force it: `always = same_block({selection.keys})`, with `top` and `counted` or `extra`",
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
    return selection.keys > 1 and any(v.pool not in (None, Pool.FIRST) for v in pooled)


def _competes(program: Program, selection: Selection) -> tuple[int, int] | None:
    """A row and a member of which it sees a part only, that ranks beside others; None where there is none, or where the
    selection is not within `causal`."""
    among = _lowered(program, selection.among)
    every = _pairs(*among, data=True)
    future = isl.Set.read_from_str(every.get_ctx(), "{ [q, k] : k > q }")
    if not every.intersect(future).is_empty():
        return None
    partly = bounded(among[0].ctx, lambda: _partly(every, selection.keys))
    if selection.always is not None and _keeps_apart(selection):
        forced = _lowered(program, Inter((selection.among, selection.always)))
        text = _members(_pairs(*forced, data=False), selection.keys).to_str()
        partly = partly.subtract(isl.Set.read_from_str(partly.get_ctx(), text))
    if partly.is_empty():
        return None
    point = partly.lexmin().sample_point()
    row, member = (point.get_coordinate_val(isl.dim_type.set, i).to_python() for i in range(2))
    return int(row), int(member)


def _keeps_apart(selection: Selection) -> bool:
    """Whether what is forced leaves the rank of the others as it is."""
    if selection.forced is Forced.EXTRA:
        return True
    summed = selection.share is not Share.NONE and selection.normalise is not Normalise.NONE
    return selection.forced is Forced.COUNTED and isinstance(selection.rule, Top) and not summed


def _lowered(program: Program, pattern: Set) -> tuple[Lowering, isl.Set]:
    derived = derive(replace(program, branches=(Branch((Part(pattern),)),), output=None, selections=()))
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


def _members(pairs: isl.Set, keys: int) -> isl.Set:
    return pairs.apply(isl.Map.read_from_str(pairs.get_ctx(), f"{{ [q, k] -> [q, floor(k / {keys})] }}"))


def _partly(pairs: isl.Set, keys: int) -> isl.Set:
    """The rows and candidates of which some token lies after the row."""
    after = isl.Set.read_from_str(pairs.get_ctx(), f"{{ [q, m] : {keys} m + {keys - 1} > q }}")
    return _members(pairs, keys).intersect(after)
