"""The boxes that a box of a grid visits, in closed form, and the mask of those that are not full.

Along each axis these are runs of tiles of one dimension; a box is visited where each of its tiles is, and full where
each is.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import prod

import islpy as isl

from attndsl.box_tiles import BoxRun, BoxRuns
from attndsl.boxes import Boxes
from attndsl.effort import TooHard, remembered
from attndsl.grid import Grid
from attndsl.grid_pieces import AxisPart, BoxPiece
from attndsl.linear import normalise
from attndsl.mask import shaped
from attndsl.mask_cost import pair_cost
from attndsl.plan import Spec
from attndsl.program import Binary, Call, Compare, Const, Logic, Memo, Scalar, Var, substitute
from attndsl.quasi_affine import condition, least_cost
from attndsl.relation import Relation
from attndsl.runs import Run, Side, TileKind, TileRuns, plain_runs
from attndsl.simplify import fold, specialise
from attndsl.tiles import tile_runs, touched_runs

# Stands for how many of the first coordinates have all their tokens, until that is put in.
_WHOLE = Var("place")


@remembered(1024)
def box_runs(
    piece: BoxPiece, boxes: Boxes, spec: Spec, block: tuple[int, int], side: Side, align_start: bool
) -> BoxRuns:
    """The runs of one side's boxes; `block`: the cells of a tile of queries and of keys, where boxes have fewer."""
    # Where no box is full, there is nothing to tell apart.
    split = prod(boxes.k_box) >= block[1] and piece.has_full(boxes)
    axes = []
    for axis, part in enumerate(piece.axes):
        ends = axis == 0 and _ends_anywhere(piece.grid)
        runs = _axis_runs(part, boxes.q_box[axis], boxes.k_box[axis], side, align_start, ends, split)
        axes.append(_renamed(runs, boxes, axis, spec, clipped=side is Side.KEY and axis == 0 and not align_start))
    if not all(runs.full for runs in axes):
        every = tuple(tuple(replace(r, kind=TileKind.PARTIAL) for r in runs.full + runs.partial) for runs in axes)
        return BoxRuns((), (BoxRun(every, TileKind.PARTIAL),) if all(every) else ())
    full = BoxRun(tuple(runs.full for runs in axes), TileKind.FULL)
    partial = []
    for n, runs in enumerate(axes):
        # Full along the axes before this one, partial along it, anything along the others.
        before, after = (x.full for x in axes[:n]), (x.full + x.partial for x in axes[n + 1 :])
        if runs.partial:
            partial.append(BoxRun((*before, runs.partial, *after), TileKind.PARTIAL))
    return BoxRuns((full,), tuple(partial))


def _ends_anywhere(grid: Grid) -> bool:
    """Whether the cells of a grid may have no token: all but those of a line that is as long as tokens reach."""
    return grid.sizes[0] is not None or grid.stride * grid.tiles[0] > 1


@remembered(1024)
def _axis_runs(part: AxisPart, q: int, k: int, side: Side, align_start: bool, ends: bool, split: bool) -> TileRuns:
    if not split:
        with suppress(TooHard):
            return touched_runs(part.relation, q, k, side, align_start, part.layout)
    relation = _unfinished(part) if ends else part.relation
    return tile_runs(relation, q, k, side, align_start, part.layout, sizes=None)


@remembered(256)
def _unfinished(part: AxisPart) -> Relation:
    """Tokens end anywhere: from a coordinate of the first axis on, `whole`, some cells may have none, and are data."""
    relation = part.relation
    exists = isl.Set.read_from_str(
        relation.pairs.get_ctx(),
        f"[there, whole, residue] -> {{ [q, k] : {part.layout.k.text('k')} < whole or there = 1 }}",
    )
    known = isl.Set.read_from_str(
        relation.pairs.get_ctx(), "[there, whole, Nk] -> { : 0 <= there <= 1 and 0 <= whole <= Nk }"
    )
    return replace(
        relation, pairs=relation.pairs.intersect(exists), context=relation.context.intersect(known),
        atoms=relation.atoms | {"there": Compare("<", Var("k"), Var("Nk"))},
        uniform=relation.uniform | {"whole": _WHOLE},
    )  # fmt: skip


def _whole(grid: Grid) -> Scalar:
    """How many of the first coordinates have all their tokens."""
    layer = grid.stride * grid.tiles[0]
    layers: Scalar = Binary("//", Binary("-", Var("Nk"), Const(grid.first)), Const(layer))
    found: Scalar = Call("max", (Binary("*", layers, Const(grid.tiles[0])), Const(0)))
    size = grid.sizes[0]
    return found if size is None else Call("min", (found, Const(size)))


def _names(boxes: Boxes, axis: int) -> dict[str, Scalar]:
    """What an axis's own names are in the kernel."""
    own: dict[str, Scalar] = {name: Var(f"{name}_{axis}") for name in ("q_tile", "k_tile", "residue", "i", "j")}
    lengths = {name: sizes[axis] for name, sizes in boxes.lengths().items()}
    return own | lengths | {"start": Const(0), "i_start": Const(0), _WHOLE.name: _whole(boxes.grid)}


def _renamed(runs: TileRuns, boxes: Boxes, axis: int, spec: Spec, clipped: bool) -> TileRuns:
    names, known = _names(boxes, axis), Memo()

    def named(found: tuple[Run, ...]) -> tuple[Run, ...]:
        # What their ends share, once.
        return tuple(
            replace(r, first=substitute(r.first, names, known), count=substitute(r.count, names, known)) for r in found
        )

    runs, tile = plain_runs(TileRuns(named(runs.full), named(runs.partial)), spec.sizes), boxes.first_tile("q")

    def of_call(found: tuple[Run, ...]) -> tuple[Run, ...]:
        return tuple(_from(run, tile) if clipped and run.step == 1 else run for run in found)

    return TileRuns(of_call(runs.full), of_call(runs.partial))


def _from(run: Run, tile: Scalar) -> Run:
    """The tiles of a run from one on: before it stand rows of earlier calls."""
    first = Call("max", (run.first, tile))
    left = Call("max", (Binary("-", run.count, Binary("-", first, run.first)), Const(0)))
    return replace(run, first=fold(first), count=fold(left))


def box_mask(piece: BoxPiece, boxes: Boxes, spec: Spec, block: tuple[int, int]) -> Scalar | None:
    """The condition for a pair of a visited box, in the indices of its axes; None where it always holds.

    Cells without a token stand at k = Nk.
    """
    missing = _ends_anywhere(piece.grid) or any(boxes.loose("k", a) for a in boxes.axes)
    found: list[Scalar] = [Compare("<", Var("k"), Var("Nk"))] if missing or prod(boxes.k_box) < block[1] else []
    for axis, part in enumerate(piece.axes):
        found.append(substitute(_axis_mask(part), _mask_names(part, boxes, axis)))
    joined = specialise(fold(Logic("and", (*found, *piece.tokens))), spec.sizes)
    return shaped(joined)


def _mask_names(part: AxisPart, boxes: Boxes, axis: int) -> dict[str, Scalar]:
    names = _names(boxes, axis)
    return names | {"q": names["i"], "k": names["j"]} if part.layout.plain else names


@remembered(1024)
def _axis_mask(part: AxisPart) -> Scalar:
    """The condition along an axis for cells that exist: as written, or as integer sets simplify it."""
    relation, layout = part.relation, part.layout
    existing = isl.Set.read_from_str(
        relation.pairs.get_ctx(),
        f"[Nq, Nk, residue] -> {{ [q, k] : {layout.q.text('q')} < Nq and k >= 0 and {layout.k.text('k')} < Nk }}",
    )
    pairs = relation.pairs.intersect_params(relation.context).gist(existing).gist_params(relation.context)
    if layout.plain and (relation.atoms or least_cost(pairs) >= pair_cost(part.cond)):
        return part.cond
    found = fold(normalise(condition(pairs, relation.context, relation.uniform | relation.atoms, layout)))
    return min(part.cond, found, key=pair_cost) if layout.plain else found
