"""What the tiles of one side visit: runs in closed form, lists made of a plan or a map, or rows gathered by a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attndsl.cuts import without_cuts
from attndsl.derivation import Chosen
from attndsl.layout import PLAIN, Layout
from attndsl.linear import normalise
from attndsl.listing import Gathered, Listable, listables
from attndsl.mapping import mapped, mapped_runs
from attndsl.mask import mask_by_cuts, pair_mask, written_condition
from attndsl.program import Const, Program, Scalar
from attndsl.relation import Lowering, Relation
from attndsl.runs import Run, Side, TileRuns
from attndsl.simplify import fold, specialise
from attndsl.tiles import tile_runs

if TYPE_CHECKING:
    from attndsl.plan import Spec, Tiling


@dataclass(frozen=True, slots=True, eq=False)
class Visits:
    """The runs of one side's tiles, and what decides the pairs in them.

    `selection`: what their lists are made of, which the program then declares; `relation` is that where it holds.
    """

    program: Program
    spec: Spec
    runs: TileRuns
    lowering: Lowering
    relation: Relation
    selection: Listable | None = None
    gathered: Gathered | None = None

    def mask(self) -> Scalar | None:
        written = written_condition(self.lowering, self.spec.sizes)
        written = written if self.selection is None else self.selection.assumed(written)
        return pair_mask(self.relation, mask_by_cuts(written, self.program, self.lowering.anchor, self.relation))


def visits_of(
    program: Program, spec: Spec, tiling: Tiling, side: Side, other: Tiling | None = None, gathers: bool = False
) -> Visits:
    """What the tiles of one side visit. `other`: the tiling of a plan's other kernels, which share its mask.

    gathers: where rows choose for themselves, they may be gathered.
    """
    heads = (spec.heads, spec.kv_heads)
    if any(isinstance(decl.derivation, Chosen) for decl in program.inputs):
        lowering = Lowering(program, heads)
        relation, static = lowering.relation(program.branch.pattern), without_cuts(program)
        for found in listables(program, relation):
            relation_there = found.within(relation)
            if gathers and tiling.pack == 1 and found.gathers(tiling.block_k, (other or tiling).block_k):
                whole = replace(tiling, block_q=1, block_k=found.keys)
                runs = closed_runs(relation_there, static, spec, whole, Side.QUERY)
                program, gathered = found.gathered(program, runs, tiling.block_q)
                return Visits(program, spec, TileRuns((), ()), lowering, relation_there, found, gathered)
            of_both = (tiling,) if tiling.pack > 1 else (tiling, other or tiling)
            if all(found.fits(t.block_q, t.block_k, spec.even_start) for t in of_both):
                # Lists of both sides are made from the key tiles of query tiles.
                runs = closed_runs(relation_there, static, spec, tiling, Side.QUERY)
                program, runs = found.listed(program, runs, tiling.block_q, tiling.block_k, side)
                return Visits(program, spec, runs, lowering, relation_there, found)
    assert tiling.pack == 1, "only rows that follow a plan's lists share a tile with other heads"
    lists = spec.even_start and mapped(program)
    lowering = Lowering(program, heads, anchor="k" if side is Side.KEY and not lists else "q")
    relation = lowering.relation(program.branch.pattern)
    if lists:
        runs = closed_runs(relation, without_cuts(program), spec, tiling, Side.QUERY)
        cond = written_condition(lowering, spec.sizes)
        program, runs = mapped_runs(program, cond, runs, tiling.block_q, tiling.block_k, side)
        return Visits(program, spec, runs, lowering, relation)
    runs = closed_runs(relation, program, spec, tiling, side)
    return Visits(program, spec, runs, lowering, relation)


def closed_runs(
    relation: Relation, program: Program, spec: Spec, tiling: Tiling, side: Side, layout: Layout = PLAIN,
    absolute: bool = False,
) -> TileRuns:  # fmt: skip
    """The runs of one side's tiles, with the sizes of a call put in. absolute: tiles of queries count from position 0,
    not from the call's first row."""
    runs = tile_runs(
        relation, tiling.block_q, tiling.block_k, side, program.align_start or absolute, layout, program
    )  # fmt: skip
    return _specialised(runs, spec.sizes)


def _specialised(runs: TileRuns, sizes: dict[str, int]) -> TileRuns:
    def plain(e: Scalar) -> Scalar:
        return fold(normalise(specialise(e, sizes)))

    def known(found: tuple[Run, ...]) -> tuple[Run, ...]:
        folded = (replace(r, first=plain(r.first), count=plain(r.count)) for r in found)
        return tuple(run for run in folded if run.count != Const(0))

    return TileRuns(known(runs.full), known(runs.partial))
