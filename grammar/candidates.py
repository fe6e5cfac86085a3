"""What `random` and the selections choose among, where the text leaves that to the place where they stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

from attndsl.derivation import Random
from attndsl.grammar.draws import rows_are_known
from attndsl.grammar.scope import Context
from attndsl.plans import plan_input, selected
from attndsl.program import (
    Choose,
    Coarsen,
    Complement,
    Const,
    InputDecl,
    Inter,
    Minus,
    On,
    Selected,
    Set,
    Union,
    Where,
    nodes,
)
from attndsl.selection import Selection


def settle(pattern: Set, ctx: Context) -> Set | None:
    """The pattern with every `random` and selection choosing among what the `&` around it allow.

    None if a mistake was reported.
    """
    before = len(ctx.report.errors)
    found = _settled(pattern, (), (), ctx)
    _one_partition(found, ctx)
    return found if len(ctx.report.errors) == before else None


def _settled(pattern: Set, fixed: tuple[Set, ...], drawn: tuple[Set, ...], ctx: Context) -> Set:
    """`fixed`, `drawn`: the operands of each `&` on the path from the root without selections, and of these the ones
    that `random` may draw among: without `random` too."""
    match pattern:
        case Where():
            return pattern
        case Selected(plan=name):
            return _selection(pattern, name, fixed, ctx)
        case Union(parts=parts):
            return replace(pattern, parts=tuple(_settled(p, fixed, drawn, ctx) for p in parts))
        case Inter(parts=parts):
            plain = [p for p in parts if not _selects(p, ctx)]
            drawn = (*drawn, *(p for p in plain if not _draws(p)))
            done = {id(p): _settled(p, fixed, drawn, ctx) for p in plain}
            fixed = (*fixed, *(done[id(p)] for p in plain))
            both = (done[id(p)] if id(p) in done else _settled(p, fixed, drawn, ctx) for p in parts)
            return replace(pattern, parts=tuple(both))
        case Minus(left=left):
            return replace(pattern, left=_settled(left, fixed, drawn, ctx))
        case Random(written=False):
            if drawn:
                pattern = replace(pattern, among=_all(drawn))
            rows_are_known(pattern, ctx.maker.inputs, ctx)
            return pattern
        # What stands in these wrote its `among`.
        case Complement() | Choose() | On() | Coarsen() | Random():
            return pattern
        case _:
            assert_never(pattern)


def _selection(pattern: Selected, name: str, fixed: tuple[Set, ...], ctx: Context) -> Set:
    """What a selection chooses; one that left out `among` chooses among `fixed`."""
    maker = ctx.maker
    if name in maker.open_selections:
        maker.open_selections.remove(name)
        settled = replace(maker.selections[name], among=_all(fixed))
        maker.selections[name], maker.inputs[name] = settled, plan_input(settled)
        return selected(maker.inputs[name], settled, pattern.span)
    return pattern


def _all(sets: tuple[Set, ...]) -> Set:
    if not sets:
        return Where(Const(True))
    return sets[0] if len(sets) == 1 else Inter(sets)


def _draws(pattern: Set) -> bool:
    return any(isinstance(node, Random) for node in nodes(pattern))


def _selects(pattern: Set, ctx: Context) -> bool:
    return any(isinstance(node, Selected) and node.plan in ctx.maker.selections for node in nodes(pattern))


def _one_partition(pattern: Set, ctx: Context) -> None:
    """Refuses selections for each query over different members in one part: no tile of keys serves both."""
    first: Selection | None = None
    for node in nodes(pattern):
        found = ctx.maker.selections.get(node.plan) if isinstance(node, Selected) else None
        if found is None or found.rows != 1:
            continue
        members = [(each.keys, each.members) for each in (first, found) if each is not None]
        if len(set(members)) > 1 and first is not None and found.span is not None:
            what = f"members of {first.keys} and of {found.keys} keys"
            if first.keys == found.keys or found.members or first.members:
                what = "members of two kinds"
            ctx.report.error(
                "A073", f"queries choose {what} in one part", found.span,
                "other members", "use one size, select `per = rows(64)`, or attend in two branches",
            )  # fmt: skip
            return
        first = first or found


def planned(
    inputs: Iterable[InputDecl], selections: Iterable[Selection], patterns: Iterable[Set]
) -> tuple[InputDecl, ...]:
    """The inputs of a program: those that calls give, and then the plans of the selections that it attends to."""
    chosen = {selection.name: selection for selection in selections}
    used = {node.plan for pattern in patterns for node in nodes(pattern) if isinstance(node, Selected)}
    own = tuple(decl for decl in inputs if decl.name not in chosen)
    return (*own, *(plan_input(selection) for selection in chosen.values() if selection.name in used))
