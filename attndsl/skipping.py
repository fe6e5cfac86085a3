"""`skip below t`: a tile of pairs is dropped where no row of it has a score near the best that it has seen before.

A tile holds TILE rows of the call (row i is of tile i // TILE) and TILE keys. A block of rows goes over its tiles in
the order of the keys, and drops one iff for each of its rows the largest logit in the tile lies below the largest in
the tiles before it by more than -ln t. So no dropped pair weighs t times the heaviest of its row. What is dropped
depends on order and size of the tiles, which are the same in every lowering, and on which rows the call holds. Of parts
that share a softmax each drops by what its own tiles have shown, entries of a view as keys are; so parts may run in any
order, and a decode attends to each alone. A plan has tokens in order, no layouts and no lists: a loop over full tiles
and one over partial ones where the full ones come first, as under `causal`, else one over all, masked. So has one of
decode, over all: each head drops for itself, and keys are not dealt out in slices, since what is dropped of one depends
on those before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace

from attndsl.cuts import with_cuts
from attndsl.derive import derive, with_needed
from attndsl.effort import remembered
from attndsl.left_tiles import TILE
from attndsl.linear import normalise
from attndsl.mask import mask_by_cuts, pair_mask, written_condition
from attndsl.plan import DType, ForwardPlan, Loads, Spec, Tiling, branch_scalars
from attndsl.program import Program, Scalar
from attndsl.properties import within_causal
from attndsl.relation import Lowering, Relation
from attndsl.runs import Side, TileRuns
from attndsl.simplify import fold, specialise
from attndsl.tiles import full_first_runs, ordered_runs
from attndsl.view_plans import view_pairs

__all__ = ["TILE", "left_plans", "ragged_skipping_plan", "skipping_plan"]


@remembered(256)
def skipping_plan(program: Program, spec: Spec, follows: bool = False) -> ForwardPlan:
    """The forward kernel of a program of one part that skips; the plan's program is the derived one."""
    program = derive(program)
    if program.plain:
        return _plan(with_cuts(program), spec, _tiling(spec), splits=True)
    return _view_plan(program, spec, _tiling(spec), follows)


@dataclass(frozen=True, slots=True)
class LeftPlan(ForwardPlan):
    """A kernel that finds which tiles are left. `apart`: of a packed call, a table tells which rows and keys its tiles
    are of (`left_tiles.py`), and there are no runs; `causal`: keys are tokens, and no row sees a later one."""

    apart: bool = field(default=False, kw_only=True)
    causal: bool = field(default=False, kw_only=True)


def left_plans(program: Program, spec: Spec) -> tuple[LeftPlan, ...]:
    """The kernels that find which tiles the parts of a program of one branch leave, in order."""
    apart, causal = program.packed is not None, within_causal(program)
    program, spec = derive(program).with_branch(sink=None), replace(spec, dropout=False)
    found = []
    for part in program.only.parts:
        plan = skipping_plan(program.with_branch(parts=(part,)), spec)
        fields = {x.name: getattr(plan, x.name) for x in dataclasses.fields(plan)}
        tiling = plan.tiling
        # Keys alone are copied ahead: one more tile of them has room.
        fields["tiling"] = replace(tiling, stages=3) if tiling.warps == 4 else tiling
        if apart:
            fields["runs"] = TileRuns((), ())
        left = LeftPlan(**fields, apart=apart, causal=causal and part.view is None)
        found.append(replace(left, program=with_needed(left.program, left.inputs)))
    return tuple(found)


def ragged_skipping_plan(program: Program, spec: Spec, rows: int) -> ForwardPlan:
    """As `skipping_plan`, of a derived program whose sequences have lengths of their own, in tiles of so many rows: all
    of a call, or TILE."""
    tiling = replace(_tiling(spec), block_q=rows)
    if program.plain:
        return _plan(with_cuts(program, ragged=True), spec, tiling)
    return _view_plan(program, spec, tiling, False)


def _plan(program: Program, spec: Spec, tiling: Tiling, splits: bool = False) -> ForwardPlan:
    """splits: full tiles are told from partial ones where they come first."""
    loads, spec = spec.loads, _as_written(spec)
    lowering = Lowering(program, (spec.heads, spec.kv_heads))
    relation = lowering.relation(program.branch.pattern)
    visited = _visited(relation, program, spec, tiling)
    if splits:
        spec = replace(spec, loads=loads)
        order = relation, TILE, TILE, Side.QUERY, program.align_start, program
        visited = full_first_runs(*order, spec.sizes) or visited
    mask = pair_mask(relation, mask_by_cuts(written_condition(lowering, spec.sizes), program, "q", relation))
    scalars = branch_scalars(program, spec)
    plan = ForwardPlan(program, spec, tiling, visited, mask, **scalars, skip=program.branch.skip)
    return replace(plan, program=with_needed(program, plan.inputs))


def _view_plan(program: Program, spec: Spec, tiling: Tiling, follows: bool) -> ForwardPlan:
    """Of a derived program over a view: tiles are of entries."""
    spec = _as_written(spec)
    relation, mask, scalars, view = view_pairs(program, spec, follows)
    visited = _visited(relation, program, spec, tiling)
    plan = ForwardPlan(
        program, spec, tiling, visited, mask, **scalars, follows=follows, view=view, skip=program.only.skip
    )
    return replace(plan, program=with_needed(program, plan.inputs))


def _as_written(spec: Spec) -> Spec:
    """Of kernels that load tiles in the order of the tokens."""
    return replace(spec, loads=Loads.POINTER, even_start=False, lists=False, maps=False)


def _visited(relation: Relation, program: Program, spec: Spec, tiling: Tiling) -> TileRuns:
    runs = ordered_runs(relation, tiling.block_q, TILE, Side.QUERY, program.align_start, program)

    def known(e: Scalar) -> Scalar:
        return fold(normalise(specialise(e, spec.sizes)))

    return TileRuns((), tuple(replace(run, first=known(run.first), count=known(run.count)) for run in runs))


def _tiling(spec: Spec) -> Tiling:
    """Tile sizes are the language's; the others are what fits."""
    dim = max(spec.dim, spec.v_dim)
    if spec.dtype is DType.FLOAT32 or dim > 128:
        return Tiling(TILE, TILE, warps=8, stages=1)
    # Below Hopper operands of products take registers too.
    older = spec.target.startswith("cuda:") and int(spec.target.partition(":")[2]) < 90
    return Tiling(TILE, TILE, warps=8 if older and dim > 64 else 4, stages=2)
