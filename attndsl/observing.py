"""Kernel plans of observations: a branch's pairs once more, to sum the probabilities that its lse gives them.

The kernel goes over the tiles that the pattern visits, tokens in order whatever layouts the branch itself has. A Triton
program owns a key tile and loops over the query tiles that visit it, the transposed runs: what it writes is its own, so
there are no atomics. Its query tiles count from position 0, so cells, the blocks that it writes a number for, are whole
in a tile wherever the call's first row stands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from attndsl.branches import View
from attndsl.cuts import with_cuts, without_cuts
from attndsl.derive import derive, with_needed
from attndsl.effort import remembered
from attndsl.mask import mask_by_cuts, pair_mask, written_condition
from attndsl.plan import Backend, DType, Loads, Plan, Spec, Tiling, branch_scalars
from attndsl.program import Program, Scalar
from attndsl.relation import lowered
from attndsl.runs import Side
from attndsl.tile_sizes import backward_tilings, default_tiling
from attndsl.view_plans import view_pairs
from attndsl.visits import closed_runs


@dataclass(frozen=True, slots=True)
class Cells:
    """What a kernel writes one number for: blocks of rows (None: all rows) and of keys, which are those of the plan.
    `largest`: the largest probability, not their sum."""

    rows: int | None
    keys: int
    largest: bool

    def within(self, tiling: Tiling) -> Cells:
        """The largest cells, powers of two, that divide these and the tiles."""
        rows = None if self.rows is None else gcd(self.rows, tiling.block_q)
        return replace(self, rows=rows, keys=gcd(self.keys, tiling.block_k))


def cells_of(view: View | None, wanted: Cells) -> Cells:
    """The blocks of a part's keys that a kernel finds: those of entries, where members hold whole ones."""
    if view is None:
        return wanted
    whole = view.size == view.stride and wanted.keys % view.size == 0
    return replace(wanted, keys=wanted.keys // view.size if whole else 1)


@dataclass(frozen=True, slots=True)
class ObservePlan(Plan):
    """A kernel that observes one part of a branch. On the CPU its runs are of query tiles, else of key tiles."""

    cells: Cells


def observe_plans(program: Program, spec: Spec, cells: tuple[Cells, ...]) -> tuple[ObservePlan, ...]:
    """The kernels that observe the parts of a program's only branch, in order, in cells of each."""
    derived = derive(program)
    parts = zip(derived.only.parts, cells, strict=True)
    return tuple(observe_plan(derived.with_branch(parts=(part,)), spec, of_part) for part, of_part in parts)


@remembered(256)
def observe_plan(program: Program, spec: Spec, cells: Cells) -> ObservePlan:
    """The kernel of a program of one part. On a GPU the cells become those that fit into tiles."""
    spec = replace(spec, loads=Loads.POINTER, dropout=False, even_start=False, lists=False, maps=False)
    on_cpu = spec.backend is Backend.CPU
    tiling = default_tiling(spec) if on_cpu else _tiling(spec)
    side, owner = (Side.QUERY, "q") if on_cpu else (Side.KEY, "k")
    view = None
    if program.plain:
        program = with_cuts(derive(program))
        lowering, relation = lowered(without_cuts(program), (spec.heads, spec.kv_heads))
        written = mask_by_cuts(written_condition(lowering, spec.sizes), program, owner, relation)
        mask: Scalar | None = pair_mask(relation, written)
        scalars = branch_scalars(program, spec)
    else:
        relation, mask, scalars, view = view_pairs(program, spec)
    if on_cpu:
        runs = closed_runs(relation, program, spec, tiling, side)
    else:
        runs = closed_runs(relation.of_call(), program, spec, tiling, side, absolute=True)
        cells = cells.within(tiling)
    scalars["sink"] = None  # The lse has it.
    plan = ObservePlan(
        program, spec, tiling, runs, mask if runs.partial else None, **scalars, view=view, cells=cells
    )  # fmt: skip
    return replace(plan, program=with_needed(program, plan.inputs))


def _tiling(spec: Spec) -> Tiling:
    """Tile sizes on a GPU. Nothing is kept but the keys: tiles are as large as blocks that are often observed."""
    if spec.dtype is DType.FLOAT32:
        return backward_tilings(spec)[1]
    return Tiling(64, 64, warps=4, stages=2) if spec.dim <= 128 else Tiling(64, 64, warps=8, stages=1)
