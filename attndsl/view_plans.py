"""Kernel plans of parts over views: the pattern as a relation of rows and entries, which have tensors of their own.

Positions stay those of tokens: `Nk` is their number, and entry k of a view with stride t exists where t * k < Nk.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from attndsl.branches import Given, Part, Queries, View, Visible
from attndsl.cuts import with_cuts
from attndsl.derive import derive, with_needed
from attndsl.diagnostics import error
from attndsl.effort import TooHard, bounded, remembered
from attndsl.entry_sets import by_classes, of_extents
from attndsl.linear import normalise
from attndsl.listing import Listable, fitting, listables, listed
from attndsl.mask import shaped
from attndsl.plan import (
    Backend,
    BackwardPlan,
    ForwardPlan,
    Spec,
    Tiling,
    branch_scalars,
    slopes,
)  # fmt: skip
from attndsl.program import Binary, Call, Compare, Const, If, Program, Scalar, Var, Where
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering, Relation, build_relation
from attndsl.runs import Side, TileRuns
from attndsl.simplify import fold, specialise
from attndsl.visits import closed_runs


def view_forward(program: Program, spec: Spec, tiling: Tiling, follows: bool, ragged: bool = False) -> ForwardPlan:
    """The forward kernel of a derived program of one part, which is over a view.

    ragged: as in `derive`. Then no tiles that a plan chooses are listed: a list is made for one length, and for rows
    that stand where a call's do.
    """
    program = _with_cuts(listed(program, spec.lists and not ragged), ragged)
    relation, view = _entries(program, spec)
    found = None
    if not ragged:
        found, (tiling,) = _listable(program, spec, relation, view, (tiling,))
    if found is None:
        runs = closed_runs(relation, program, spec, tiling, Side.QUERY)
    else:
        relation = found.within(relation)
        program, runs = _listed(program, spec, found, relation, tiling, Side.QUERY)
    masked = runs.partial or spec.backend is Backend.GLUON
    mask = _mask(relation, spec) if masked else None
    scalars = _scalars(program, spec, view, follows)
    plan = ForwardPlan(program, spec, tiling, runs, mask, **scalars, follows=follows, view=view)
    return replace(plan, program=with_needed(program, plan.inputs))


def view_backward(
    program: Program, spec: Spec, tilings: tuple[Tiling, Tiling], uses_lse: bool, follows: bool
) -> BackwardPlan:
    """The backward kernels of such a program."""
    program = _with_cuts(listed(program, spec.lists))
    relation, view = _entries(program, spec)
    found, (tiling, key_tiling) = _listable(program, spec, relation, view, tilings)
    key_runs = TileRuns((), ())
    if found is not None:
        relation = found.within(relation)
        program, runs = _listed(program, spec, found, relation, tiling, Side.QUERY)
        if spec.backend is not Backend.CPU:
            program, key_runs = _listed(program, spec, found, relation, key_tiling, Side.KEY)
    else:
        runs = closed_runs(relation, program, spec, tiling, Side.QUERY)
        if spec.backend is not Backend.CPU:
            key_runs = closed_runs(relation, program, spec, key_tiling, Side.KEY)
    mask = _mask(relation, spec) if runs.partial or key_runs.partial else None
    scalars = _scalars(program, spec, view, follows)
    plan = BackwardPlan(
        program, spec, tiling, runs, mask, **scalars, key_tiling=key_tiling, key_runs=key_runs,
        key_mask=mask, **slopes(program, scalars), uses_lse=uses_lse, follows=follows, view=view,
    )  # fmt: skip
    return replace(plan, program=with_needed(program, plan.inputs))


def listed_tilings(program: Program, spec: Spec, tilings: tuple[Tiling, ...]) -> tuple[Tiling, ...]:
    """Tilings of a program of one part, over a view, as the lists of a plan have them: as they are where there is
    none."""
    program = derive(program)
    return _listable(program, spec, *_entries(program, spec), tilings)[1]


def _with_cuts(program: Program, ragged: bool = False) -> Program:
    """The program with the ends of intervals that sorted data allows, where entries are as many as tokens."""
    (part,) = program.only.parts
    return with_cuts(program, ragged) if isinstance(part.view, Given) and part.view.as_tokens else program


def _listable(
    program: Program, spec: Spec, relation: Relation, view: Given, tilings: tuple[Tiling, ...]
) -> tuple[Listable | None, tuple[Tiling, ...]]:
    """A selection whose tiles of entries can be listed, and tilings that lie inside its classes and members; or none,
    and the tilings as they are."""
    for found in listables(program, relation, view.stride):
        if found.plan.tile and (view.room is not None or view.as_tokens):
            continue  # Data tells how many entries there are, and which of them rows see: a list follows from neither.
        inside = tuple(
            replace(t, block_q=fitting(t.block_q, found.rows), block_k=fitting(t.block_k, found.keys)) for t in tilings
        )
        if all(found.fits(t.block_q, t.block_k, spec.even_start) for t in inside):
            return found, inside
    return None, tilings


def _listed(
    program: Program, spec: Spec, found: Listable, relation: Relation, tiling: Tiling, side: Side
) -> tuple[Program, TileRuns]:
    """The runs of the tiles that a plan chooses. Lists of both sides are made from the key tiles of query tiles."""
    runs = closed_runs(relation, program, spec, tiling, Side.QUERY)
    return found.listed(program, runs, tiling.block_q, tiling.block_k, side)


def part_relation(program: Program, heads: tuple[int, int] | None = None) -> Relation:
    """The relation of a program of one part: rows and tokens, or the entries of its view."""
    return build_relation(program, heads) if program.plain else entries_of(derive(program), heads)


@remembered(64)
def entries_of(program: Program, heads: tuple[int, int] | None = None) -> Relation:
    """Which entries rows see, of a derived program of one part. Raises `PatternError` (A912) past the effort bound."""
    (part,) = program.only.parts
    lowering = Lowering(program, heads)
    try:
        queries = program.only.queries
        # What classes of documents see is written already.
        return seen_entries(lowering, part, None if queries is None or queries.packed is not None else queries)
    except TooHard:
        raise error(
            "A912", "which entries this pattern sees is too hard to decide: not yet supported", part.span,
            help="write it by the entries' own blocks, as `{ q // 64 - k // 64 < 8 }`",
        ) from None  # fmt: skip


def in_time(program: Program, part: Part, queries: Queries | None) -> bool:
    """Whether integer sets say which entries rows see of a part of a derived program within the effort bound."""
    try:
        seen_entries(Lowering(program), part, queries)
    except TooHard:
        return False
    return True


def seen_entries(lowering: Lowering, part: Part, queries: Queries | None = None) -> Relation:
    """The entries of a part's view that rows see; of pooled queries, those that each of the extent would see.

    Raises `PatternError` (A912) where data at keys, or of pooled queries at rows, decides, and TooHard past the effort
    bound.
    """
    view = part.view
    assert view is not None
    if isinstance(view, Given) and view.as_tokens and queries is None:
        # An entry is a token's place, and its pattern that of tokens.
        return lowering.relation(part.pattern)
    written = lowering.lower(part.pattern, lowering.here)
    found = of_extents(lowering, written, view, queries)
    if found is None:
        raise error(
            "A912", "a pattern over a view that reads data at single keys or rows is not yet supported here", part.span,
            help="read it at q, or of blocks that hold whole entries",
        )  # fmt: skip
    lowering.atoms |= found
    room = view.room if isinstance(view, Given) else None
    extent = lowering.map(f"{{ [q, k] -> [q, j] : {view.stride} j <= k < {view.stride} j + {view.size} }}")

    def seen() -> Any:
        if view.visible is Visible.EVERY:
            pairs = written.complement().apply(extent).complement()
        else:
            pairs = written.intersect(lowering.set("[Nk] -> { [q, k] : 0 <= k < Nk }")).apply(extent)
        if queries is not None:
            pairs = pairs.complement().apply(by_classes(lowering, queries.size)).complement()
            if queries.present is not None:
                there = Where(Compare("<", Var("q"), queries.present))
                pairs = pairs.intersect(lowering.lower(there, lowering.here))
        if part.entries is not None:
            pairs = pairs.intersect(lowering.lower(part.entries, lowering.here))
        # What its own dimension bounds is not bounded by tokens.
        return lowering.existing(pairs.coalesce(), view.stride if room is None else 0)

    return lowering.of_pairs(bounded(lowering.ctx, seen), view.stride)


def view_pairs(
    program: Program, spec: Spec, follows: bool = False
) -> tuple[Relation, Scalar | None, dict[str, Any], Given]:
    """Which entries rows see, in a derived program of one part over a view: the relation, the mask, what the branch
    says of scores, and the view."""
    relation, view = _entries(program, spec)
    return relation, _mask(relation, spec), _scalars(program, spec, view, follows), view


def heads_apart(plan: BackwardPlan) -> bool:
    """Whether each query head has gradients of keys of its own, in float32, that are summed afterwards: entries are
    few, and a program that went over the rows of all heads that share them would be one of few."""
    return plan.view is not None and plan.spec.heads > plan.spec.kv_heads


def _entries(program: Program, spec: Spec) -> tuple[Relation, Given]:
    (part,) = program.only.parts
    assert isinstance(part.view, Given), "pools are made before a plan is"
    return entries_of(program, (spec.heads, spec.kv_heads)), part.view


def _mask(relation: Relation, spec: Spec) -> Scalar | None:
    found = condition(relation.pairs, relation.context, relation.uniform | relation.atoms)
    return shaped(specialise(fold(normalise(found)), spec.sizes))


def _scalars(program: Program, spec: Spec, view: Given, follows: bool) -> dict[str, Any]:
    """What the branch says of scores; `counted` adds the logarithm of an entry's tokens."""
    found = branch_scalars(program, spec)
    if follows:
        # What all parts share enters with the first.
        found["sink"] = None
    if view.mass is not None and found["weights"] is not None:
        found["weights"] = Binary("*", found["weights"], view.mass)
    elif view.counted or view.mass is not None:
        found["score"] = counted(found["score"], view)
    return found


def counted(logit: Scalar | None, view: View) -> Scalar:
    """The logit of an entry k of a view that is `counted`, or whose entries count for what data tells."""
    if isinstance(view, Given) and view.mass is not None:
        return Binary("+", logit or Var("s"), Call("log", (view.mass,)))
    tokens = view.present or Var("Nk")
    if view.size > view.stride:
        left = Binary("-", tokens, Binary("*", Const(view.stride), Var("k")))
        counts: Scalar = Call("log", (Call("max", (Call("min", (left, Const(view.size))), Const(1))),))
    else:
        # The last entry alone may have fewer, and it is one number for all rows.
        last = Binary("//", Binary("-", tokens, Const(1)), Const(view.stride))
        left = Binary("-", tokens, Binary("*", Const(view.stride), last))
        rest = Call("log", (Call("min", (left, Const(view.size))),))
        counts = If(Compare("==", Var("k"), last), rest, Const(math.log(view.size)))
    return Binary("+", logit or Var("s"), counts)
