"""Kernel plans of parts over views: the pattern as a relation of rows and entries, which have tensors of their own.

Positions stay those of tokens: `Nk` is their number, and entry k of a view with stride t exists where t * k < Nk.
"""

from __future__ import annotations

from typing import Any

from attndsl.branches import Given
from attndsl.derive import with_needed
from attndsl.diagnostics import error
from attndsl.effort import TooHard, bounded
from attndsl.linear import normalise
from attndsl.mask import shaped
from attndsl.plan import (
    Backend,
    BackwardPlan,
    ForwardPlan,
    Spec,
    Tiling,
    branch_scalars,
    closed_runs,
    slopes,
)  # fmt: skip
from attndsl.program import Binary, Call, Const, Program, Scalar, Var
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering, Relation
from attndsl.simplify import fold, specialise
from attndsl.tiles import Side, TileRuns


def view_forward(program: Program, spec: Spec, tiling: Tiling, follows: bool) -> ForwardPlan:
    """The forward kernel of a derived program of one part, which is over a view."""
    relation, view = _entries(program, spec, "q")
    runs = closed_runs(relation, program, spec, tiling, Side.QUERY)
    masked = runs.partial or spec.backend is Backend.GLUON
    mask = _mask(relation, spec) if masked else None
    scalars = _scalars(program, spec, view, follows)
    program = with_needed(program, ())
    return ForwardPlan(program, spec, tiling, runs, mask, **scalars, follows=follows, view=view)


def view_backward(
    program: Program, spec: Spec, tilings: tuple[Tiling, Tiling], uses_lse: bool, follows: bool
) -> BackwardPlan:
    """The backward kernels of such a program."""
    tiling, key_tiling = tilings
    relation, view = _entries(program, spec, "q")
    runs = closed_runs(relation, program, spec, tiling, Side.QUERY)
    key_runs = TileRuns((), ())
    if spec.backend is not Backend.CPU:
        key_runs = closed_runs(_entries(program, spec, "k")[0], program, spec, key_tiling, Side.KEY)
    mask = _mask(relation, spec) if runs.partial or key_runs.partial else None
    scalars = _scalars(program, spec, view, follows)
    return BackwardPlan(
        with_needed(program, ()), spec, tiling, runs, mask, **scalars, key_tiling=key_tiling, key_runs=key_runs,
        key_mask=mask, **slopes(program, scalars), uses_lse=uses_lse, follows=follows, view=view,
    )  # fmt: skip


def entries_of(program: Program, heads: tuple[int, int] | None = None, anchor: str = "q") -> Relation:
    """Which entries rows see, of a derived program of one part. Raises `PatternError` (A912) past the effort bound."""
    (part,) = program.only.parts
    lowering = Lowering(program, heads, anchor)
    try:
        return bounded(lowering.ctx, lambda: lowering.entries(part))
    except TooHard:
        raise error(
            "A912", "which entries this pattern sees is too hard to decide: not yet supported", part.span,
            help="write it by the entries' own blocks, as `{ q // 64 - k // 64 < 8 }`",
        ) from None  # fmt: skip


def _entries(program: Program, spec: Spec, anchor: str) -> tuple[Relation, Given]:
    (part,) = program.only.parts
    assert isinstance(part.view, Given), "pools are made before a plan is"
    return entries_of(program, (spec.heads, spec.kv_heads), anchor), part.view


def _mask(relation: Relation, spec: Spec) -> Scalar | None:
    found = condition(relation.pairs, relation.context, relation.uniform | relation.atoms)
    return shaped(specialise(fold(normalise(found)), spec.sizes))


def _scalars(program: Program, spec: Spec, view: Given, follows: bool) -> dict[str, Any]:
    """What the branch says of scores; `counted` adds the logarithm of an entry's tokens."""
    found = branch_scalars(program, spec)
    if follows:
        # What all parts share enters with the first.
        found["sink"] = None
    if view.counted:
        first = Binary("*", Const(view.stride), Var("k"))
        present = Call("max", (Call("min", (Binary("-", Var("Nk"), first), Const(view.size))), Const(1)))
        found["score"] = Binary("+", found["score"] or Var("s"), Call("log", (present,)))
    return found
