"""What the tiles of one side visit: runs in closed form, lists made of a plan or a map, or rows gathered by a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attndsl.cuts import without_cuts
from attndsl.derivation import Chosen, Cut, Draw, Listed
from attndsl.effort import remembered
from attndsl.layout import PLAIN, Layout
from attndsl.left_tiles import reads_tiles
from attndsl.listing import Gathered, Listable, listables
from attndsl.mapping import mapped, mapped_runs
from attndsl.mask import IN_RANGE, from_first_key, mask_by_cuts, pair_mask, written_condition
from attndsl.program import Logic, Program, Read, Scalar
from attndsl.relation import Lowering, Relation, lowered
from attndsl.runs import Side, TileRuns, joined
from attndsl.simplify import fold
from attndsl.tiles import tile_runs

if TYPE_CHECKING:
    from attndsl.plan import Spec, Tiling


@dataclass(frozen=True, slots=True, eq=False)
class Visits:
    """The runs of one side's tiles, and what decides the pairs in them.

    `owner`: the position, q or k, whose cuts the mask reads.
    `selection`: what their lists are made of, which the program then declares; `relation` is that where it holds.
    `collected`: tiles are of several listed ones, of which the last may be missing; `exact`: of those each is full.
    """

    program: Program
    spec: Spec
    runs: TileRuns
    lowering: Lowering
    relation: Relation
    owner: str = "q"
    selection: Listable | None = None
    gathered: Gathered | None = None
    marked: Read | None = None
    collected: bool = False
    exact: bool = False
    shifted: bool = False

    def mask(self, folds: bool = False) -> Scalar | None:
        """The condition on pairs. folds: as in `pair_mask`."""
        if self.exact:
            return IN_RANGE if self.collected else None
        found = _pair_mask(self.program, self.spec, self.lowering, self.relation, self.owner, self.selection, folds)
        if self.shifted:
            return from_first_key(found, self.program)
        if not self.collected:
            return found
        # What stands in the place of a missing key is past the last one, whatever the rest implies of those before it.
        return IN_RANGE if found is None else fold(Logic("and", (found, IN_RANGE)))


def visits_of(
    program: Program, spec: Spec, tiling: Tiling, side: Side, other: Tiling | None = None, gathers: bool = False,
    shifted: bool = False,
) -> Visits:  # fmt: skip
    """What the tiles of one side visit. `other`: the tiling of a plan's other kernels, which share its mask.

    gathers: where rows choose for themselves, they may be gathered. shifted: as in `tile_runs`, of a program whose
    tiles are neither listed nor mapped.
    """
    return _visits(program, spec, _sizes(tiling), side, None if other is None else _sizes(other), gathers, shifted)


def _sizes(tiling: Tiling) -> Tiling:
    """What of a tiling decides what is visited: kernels that differ in the rest share it."""
    return replace(tiling, warps=0, stages=0, several=False)


@remembered(128)
def _visits(
    program: Program, spec: Spec, tiling: Tiling, side: Side, other: Tiling | None, gathers: bool, shifted: bool
) -> Visits:
    heads, static = (spec.heads, spec.kv_heads), without_cuts(program)
    if reads_tiles(program) or any(isinstance(decl.derivation, Chosen | Draw | Listed) for decl in program.inputs):
        lowering, relation = lowered(static, heads)
        for found in listables(program, relation):
            relation_there = found.within(relation)
            alike = tiling.pack == 1 or spec.heads == spec.kv_heads or found.shared(relation)
            if found.offsets is not None:
                rows = tiling.unit_q or tiling.block_q
                if tiling.unit_k == 1 and alike and found.fits_rows(rows, spec.even_start):
                    return _spanned(program, spec, tiling, side, found, lowering, relation_there)
                continue
            fits = tiling.collects and found.fits(tiling.unit_q or tiling.block_q, tiling.unit_k, spec.even_start)
            if fits and alike:
                return _collected(program, spec, tiling, side, found, lowering, relation_there)
            others = tiling if other is None or other.collects else other
            if gathers and found.gathers(tiling.block_k, others.block_k):
                whole = replace(tiling, block_q=1, block_k=found.keys)
                runs = closed_runs(relation_there, static, spec, whole, Side.QUERY)
                program, gathered = found.gathered(program, runs, tiling.block_q)
                return Visits(
                    program, spec, TileRuns((), ()), lowering, relation_there, selection=found, gathered=gathered
                )
            if all(found.fits(t.block_q, t.block_k, spec.even_start) for t in (tiling, others)):
                # Lists of both sides are made from the key tiles of query tiles.
                runs = closed_runs(relation_there, static, spec, tiling, Side.QUERY)
                program, runs = found.listed(program, runs, tiling.block_q, tiling.block_k, side)
                return Visits(program, spec, runs, lowering, relation_there, selection=found)
    assert tiling.pack == 1 and not tiling.collects, "only rows that follow a plan's lists share a tile with others"
    lists = spec.maps and mapped(program)
    lowering, relation = lowered(static, heads)
    if lists:
        runs = closed_runs(relation, static, spec, tiling, Side.QUERY)
        cond = written_condition(lowering, spec.sizes)
        program, runs = mapped_runs(program, cond, runs, tiling.block_q, tiling.block_k, side)
        return Visits(program, spec, runs, lowering, relation)
    # Sorted data is tested by cuts of each side.
    owner = "k" if side is Side.KEY and any(isinstance(decl.derivation, Cut) for decl in program.inputs) else "q"
    runs = closed_runs(relation, program, spec, tiling, side, shifted=shifted)
    return Visits(program, spec, runs, lowering, relation, owner, shifted=shifted)


def _collected(
    program: Program, spec: Spec, tiling: Tiling, side: Side, found: Listable, lowering: Lowering, relation: Relation
) -> Visits:
    """Tiles of several listed ones. For a key tile the list says too which of them each query tile chose."""
    whole = replace(tiling, block_q=tiling.unit_q or tiling.block_q, block_k=tiling.unit_k)
    runs = closed_runs(relation, without_cuts(program), spec, whole, Side.QUERY)
    exact, of_keys = not runs.partial, side is Side.KEY
    marks = tiling.block_k // tiling.unit_k if of_keys else 0
    program, listed = found.listed(program, runs, whole.block_q, whole.block_k, side, marks)
    if of_keys:
        runs = TileRuns((), ())
        return Visits(program, spec, runs, lowering, relation, selection=found, marked=listed.full[0].list, exact=exact)
    return Visits(program, spec, joined(listed), lowering, relation, selection=found, collected=True, exact=exact)


def _spanned(
    program: Program, spec: Spec, tiling: Tiling, side: Side, found: Listable, lowering: Lowering, relation: Relation
) -> Visits:
    """The tokens of the segments that a plan lists, one after another in tiles; or of a key tile the query tiles that
    list segments of it, and which of its tokens."""
    # What is asked of pairs beside the choice: nothing, where its tokens may be any that exist.
    exact = _pair_mask(program, spec, lowering, relation, "q", found, False) in (None, IN_RANGE)
    if side is Side.KEY:
        program, marked = found.spanned_keys(program, tiling.unit_q, tiling.block_k)
        nothing = TileRuns((), ())
        return Visits(program, spec, nothing, lowering, relation, selection=found, marked=marked, exact=exact)
    program, runs = found.spanned(program, tiling.block_q)
    several = tiling.block_k > tiling.unit_k
    return Visits(program, spec, runs, lowering, relation, selection=found, collected=several, exact=exact)


def closed_runs(
    relation: Relation, program: Program, spec: Spec, tiling: Tiling, side: Side, layout: Layout = PLAIN,
    absolute: bool = False, shifted: bool = False,
) -> TileRuns:  # fmt: skip
    """The runs of one side's tiles, with the sizes of a call put in. absolute: tiles of queries count from position 0,
    not from the call's first row. shifted: as in `tile_runs`."""
    sizes, from_start = tuple(spec.sizes.items()), program.align_start or absolute
    return _closed(relation, program, sizes, tiling.block_q, tiling.block_k, side, layout, from_start, shifted)


@remembered(128)
def _closed(
    relation: Relation, program: Program, sizes: tuple[tuple[str, int], ...], block_q: int, block_k: int, side: Side,
    layout: Layout, from_start: bool, shifted: bool,
) -> TileRuns:  # fmt: skip
    """Kernels share them, whatever else they are made for."""
    return tile_runs(relation, block_q, block_k, side, from_start, layout, program, dict(sizes), shifted)


@remembered(128)
def _pair_mask(
    program: Program, spec: Spec, lowering: Lowering, relation: Relation, owner: str, selection: Listable | None,
    folds: bool,
) -> Scalar | None:  # fmt: skip
    written = written_condition(lowering, spec.sizes)
    written = written if selection is None else selection.assumed(written)
    written = mask_by_cuts(written, program, owner, relation)
    return pair_mask(relation, written, spec.hoists, program if folds else None)
