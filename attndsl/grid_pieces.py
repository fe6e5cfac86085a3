"""Patterns on a grid as pieces by boxes: one piece a disjoint product, after what stands off the grid.

Each axis of a product is a relation of one dimension, with runs of tiles, transposed runs and a mask as any pattern
has. The shape of boxes is what visits the fewest, counted axis by axis on the pairs of each: of boxes of so many cells
the visited ones are a product of counts, so that all shapes are compared at the cost of a few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import islpy as isl
import numpy as np
from numpy.typing import NDArray

from attndsl.boxes import Boxes
from attndsl.compared import WORTH_IT, Way
from attndsl.effort import TooHard, bounded, remembered
from attndsl.evaluate import evaluate
from attndsl.grid import Grid
from attndsl.layout import PLAIN, Comb, Layout
from attndsl.periods import periods
from attndsl.products import NoProduct, Term, apart, off_grid_part, products
from attndsl.program import (
    Arg,
    Call,
    Const,
    Program,
    Read,
    Scalar,
    Set,
    Table,
    Var,
    Where,
    walk,
)  # fmt: skip
from attndsl.reindex import in_layout
from attndsl.relation import Lowering, Relation
from attndsl.simplify import fold, specialise

# Tokens of a sequence, and coordinates of an axis, on which shapes are compared: kernels do not depend on lengths.
TOKENS, COORDINATES = 16384, 512
# What masks cost of a tile, and what a program costs apart from its tiles, in tiles.
MASKED, PROGRAM = 0.25, 2.5
# Elementary isl operations allowed to taking terms apart.
APART_EFFORT = 400_000


@dataclass(frozen=True, slots=True, eq=False)
class AxisPart:
    """A product's set along one axis. `layout`: the residues in which it is dense, `relation` in its indices.

    divisors: the constants by which it divides. cond: the set as a condition on coordinates q and k, of an axis of Nq
    and Nk; local: the same less what reads neither q nor k.
    """

    divisors: frozenset[int]
    cond: Scalar
    local: Scalar
    layout: Layout
    relation: Relation

    @property
    def period(self) -> int:
        return self.layout.classes


@dataclass(frozen=True, slots=True, eq=False)
class BoxPiece:
    """The pairs of a product, to be visited by boxes. tokens: conditions on tokens that its pairs meet besides."""

    grid: Grid
    axes: tuple[AxisPart, ...]
    tokens: tuple[Scalar, ...]

    @property
    def layout(self) -> Boxes:
        """The boxes of kernels with tiles of 128 x 64."""
        return self.boxes(128, 64)

    def boxes(self, block_q: int, block_k: int) -> Boxes:
        """The boxes of at most so many cells that cost least; 1 for single cells."""
        q_box, k_box = _best_boxes(self, block_q, block_k)[1:]
        return Boxes(self.grid, tuple(part.period for part in self.axes), q_box, k_box)

    def has_full(self, boxes: Boxes) -> bool:
        """Whether some boxes are full, as far as the counted coordinates tell."""
        along = zip(_tables(self), boxes.q_box, boxes.k_box, strict=True)
        return not self.tokens and all(table.count(q, k)[1] for table, q, k in along)

    def cost(self, block_q: int, block_k: int) -> tuple[float, float]:
        """What they cost, in tiles: the visited ones, and the programs besides."""
        cost, q_box, _ = _best_boxes(self, block_q, block_k)
        cells = (-(-table.cells // size) for table, size in zip(_tables(self), q_box, strict=True))
        programs = PROGRAM * prod(part.period for part in self.axes) * prod(cells)
        return cost - programs, programs


@dataclass(frozen=True, slots=True, eq=False)
class OnGrid:
    """A pattern of products. boxes: its pieces on the grid; ways: tokens in order, and these; rest: the pairs off the
    grid, None where there can be none or boxes gain nothing."""

    boxes: tuple[BoxPiece, ...]
    ways: tuple[Way, Way]
    rest: Relation | None = None

    @property
    def gain(self) -> bool:
        """Whether boxes are worth it."""
        return self.ways[1].cost < WORTH_IT * self.ways[0].cost

    def __str__(self) -> str:
        sizes = (str(table.cells * table.part.period) for table in _tables(self.boxes[0]))
        return f"on a grid of {' x '.join(sizes)} cells"


@remembered(256)
def grid_pieces(program: Program, heads: tuple[int, int]) -> OnGrid | None:
    """The pairs of a program on its grid as pieces by boxes; None where the pattern is not made of products."""
    grid = program.grid
    if grid is None:
        return None
    pattern, lowering = program.branch.pattern, Lowering(program, heads)
    try:
        terms = products(pattern, grid, lowering.predicate)
        if len(terms) > 1:
            terms = bounded(lowering.ctx, lambda: apart(terms, _Empty(program, grid, lowering)), APART_EFFORT)
        pieces = tuple(_box_piece(program, grid, term, heads) for term in terms)
    except (NoProduct, TooHard):
        return None
    if not pieces:
        return None
    in_order = _added((PLAIN,), map(_cost_in_order, pieces))
    found = OnGrid(pieces, (in_order, _added(tuple(x.layout for x in pieces), (x.cost(128, 64) for x in pieces))))
    if not found.gain:
        return found
    rest = off_grid_part(pattern, grid)
    if grid.everywhere or (rest == Where(Const(False)) and program.branch.sink is None):
        return found
    return replace(found, rest=Lowering(program, heads).relation(rest))


def _added(layouts: tuple[Layout | Boxes, ...], costs: Iterable[tuple[float, float]]) -> Way:
    """What pieces cost together."""
    tiles, programs = map(sum, zip(*costs, strict=True))
    return Way(layouts, tiles, programs)


class _Empty:
    """Whether a term is known to hold no pair: along some axis its set is empty."""

    def __init__(self, program: Program, grid: Grid, lowering: Lowering) -> None:
        self.program, self.grid, self.lowering = program, grid, lowering
        self.known: dict[tuple[int, Set], bool] = {}

    def __call__(self, term: Term) -> bool:
        return any(self._empty(axis, term.along(axis)) for axis in range(len(self.grid.axes)))

    def _empty(self, axis: int, pattern: Set) -> bool:
        key = (axis, pattern)
        if key not in self.known:
            pairs = self.lowering.lower(pattern, self.lowering.here)
            cells = _cells(self.lowering.ctx, self.grid, axis)
            self.known[key] = bool(pairs.intersect(cells).intersect_params(self.lowering.context()).is_empty())
        return self.known[key]


def _cells(ctx: isl.Context, grid: Grid, axis: int) -> isl.Set:
    """The pairs of coordinates that an axis has."""
    size = grid.sizes[axis]
    bounds = "0 <= q < Nq and 0 <= k < Nk" + ("" if size is None else f" and Nq = {size} and Nk = {size}")
    return isl.Set.read_from_str(ctx, f"[Nq, Nk] -> {{ [q, k] : {bounds} }}")


def _box_piece(program: Program, grid: Grid, term: Term, heads: tuple[int, int]) -> BoxPiece:
    axes = []
    for axis, parts in enumerate(term.factors):
        divisors = frozenset(p for part in parts for p, width in periods(part, {}) if width == 1 and p > 1)
        one_axis = replace(program.with_branch(pattern=term.along(axis)), grid=None)
        local = replace(term, uniform=()).along(axis)
        axes.append(_axis_part(one_axis, local, grid.sizes[axis], divisors, heads))
    return BoxPiece(grid, tuple(axes), term.tokens)


@remembered(256)
def _axis_part(
    program: Program, local: Set, size: int | None, divisors: frozenset[int], heads: tuple[int, int]
) -> AxisPart:
    """program: one of a single dimension, the coordinates of an axis, which has this size."""
    lowering = Lowering(program, heads, length=size)
    relation = _relation(lowering, size)
    layout = _residues(relation, divisors, size)
    sizes = {"H": heads[0], "G": heads[1]}
    cond, of_pairs = (specialise(fold(lowering.predicate(p)), sizes) for p in (program.branch.pattern, local))
    relation = in_layout(relation, relation.pairs, layout)
    return AxisPart(divisors, cond, of_pairs, layout, relation)


def _relation(lowering: Lowering, size: int | None) -> Relation:
    """The relation of a pattern along an axis, of the size that is declared."""
    relation = lowering.relation(lowering.program.branch.pattern)
    if size is None:
        return relation
    known = isl.Set.read_from_str(relation.pairs.get_ctx(), f"[Nq, Nk] -> {{ : Nq = {size} and Nk = {size} }}")
    return replace(relation, context=relation.context.intersect(known))


def _residues(relation: Relation, divisors: frozenset[int], size: int | None) -> Layout:
    """The most residues of which a key always has the query's, so that the cells of one lie close together."""
    for period in sorted((p for p in divisors if size is None or 2 * p <= size), reverse=True):
        pairs = relation.project_atoms(relation.pairs.intersect_params(relation.context)).project_out_all_params()
        apart = isl.Map.read_from_str(pairs.get_ctx(), f"{{ [q, k] -> [(k - q) mod {period}] }}")
        if pairs.apply(apart).is_subset(isl.Set.read_from_str(pairs.get_ctx(), "{ [0] }")):
            return Layout(Comb(period, step=1), Comb(period, step=1), period)
    return PLAIN


# ------------------------------------------------------------------------------------------- shapes

Counts = NDArray[np.int64]


@remembered(256)
def _tables(piece: BoxPiece) -> list[_Counted]:
    return [_Counted(part, _extent(piece.grid, axis)) for axis, part in enumerate(piece.axes)]


@remembered(1024)
def _best_boxes(piece: BoxPiece, block_q: int, block_k: int) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """The cost of the best boxes, and the boxes of queries and of keys."""
    tables = _tables(piece)
    sizes = [table.sizes(max(block_q, block_k)) for table in tables]
    q_boxes, k_boxes = (list(_shapes(sizes, block)) for block in (block_q, block_k))
    # Thousands of pairs of shapes are compared, of few sizes along each axis.
    of_axis = [set(ks) for ks in zip(*k_boxes, strict=True)]
    masked = [bool(piece.tokens) or prod(k_box) < block_k for k_box in k_boxes]
    classes = prod(part.period for part in piece.axes)
    found: tuple[float, tuple[int, ...], tuple[int, ...]] | None = None
    for q_box in q_boxes:
        programs = prod(-(-t.cells // size) for t, size in zip(tables, q_box, strict=True))
        along = [{k: t.count(q, k) for k in ks} for t, q, ks in zip(tables, q_box, of_axis, strict=True)]
        for k_box, none_full in zip(k_boxes, masked, strict=True):
            touched, full = 1, 0 if none_full else 1
            for counts, k in zip(along, k_box, strict=True):
                both = counts[k]
                touched, full = touched * both[0], full * both[1]
            cost = classes * (touched + MASKED * (touched - full) + PROGRAM * programs)
            # Of equal ones the longer along the axis that runs fastest: its tokens lie in a row.
            if found is None or (cost, *k_box[:-1]) < (found[0], *found[2][:-1]):
                found = (cost, q_box, k_box)
    assert found is not None
    return found


def _shapes(sizes: list[tuple[int, ...]], block: int) -> Iterator[tuple[int, ...]]:
    """Boxes of more than half of so many cells, at most of all; where an axis is short, of fewer."""
    shapes = [shape for shape in product(*sizes) if prod(shape) <= block]
    most = max(map(prod, shapes))
    yield from (shape for shape in shapes if 2 * prod(shape) > min(block, most))


def _extent(grid: Grid, axis: int) -> int:
    """The size of an axis on which shapes are compared."""
    size = grid.sizes[axis]
    return min(COORDINATES, max(8, TOKENS // grid.stride) if size is None else size)


class _Counted:
    """The tiles of one axis that are touched and that are full, counted on its pairs: of one residue, for all."""

    def __init__(self, part: AxisPart, extent: int) -> None:
        self.part = part
        at = np.arange(0, extent, part.period)
        self.cells = at.size
        allowed = np.broadcast_to(_pairs(part.local, at, extent), (at.size, at.size))
        self._some: dict[tuple[int, int], NDArray[np.bool_]] = {(1, 1): allowed}
        self._every: dict[tuple[int, int], NDArray[np.bool_]] = {(1, 1): allowed}
        self._counts: dict[tuple[int, int], tuple[int, int]] = {}

    def sizes(self, most: int) -> tuple[int, ...]:
        """Sizes of boxes along the axis: powers of two, and what the pattern divides by."""
        powers = [1 << i for i in range(most.bit_length()) if 1 << i < 2 * self.cells and 1 << i <= most]
        own = {p << i for p in self.part.divisors if self.part.period == 1 and p <= 16 for i in range(3)}
        return tuple(sorted({*powers, *(p for p in own if p <= most)}))

    def count(self, q: int, k: int) -> tuple[int, int]:
        if (q, k) not in self._counts:
            self._counts[q, k] = (int(np.count_nonzero(self._of(self._some, q, k, np.logical_or))),
                                  int(np.count_nonzero(self._of(self._every, q, k, np.logical_and))))  # fmt: skip
        return self._counts[q, k]

    def _of(self, known: dict[tuple[int, int], NDArray[np.bool_]], q: int, k: int, join: np.ufunc) -> Any:
        """The tiles of q x k cells, from tiles of half the size where there are such; no pair is past the last."""
        if (q, k) not in known:
            half = (q // 2, k, 2, 1) if q % 2 == 0 else (q, k // 2, 1, 2) if k % 2 == 0 else (1, 1, q, k)
            finer = self._of(known, half[0], half[1], join)
            rows, columns = half[2:]
            if finer.shape[0] % rows or finer.shape[1] % columns:
                whole = np.zeros(
                    [-(-n // size) * size for n, size in zip(finer.shape, half[2:], strict=True)], np.bool_
                )
                whole[: finer.shape[0], : finer.shape[1]] = finer
                finer = whole
            if rows * columns == 2:
                pairs = (finer[::2], finer[1::2]) if rows == 2 else (finer[:, ::2], finer[:, 1::2])
                known[q, k] = join(*pairs)
            else:
                grid = finer.reshape(finer.shape[0] // rows, rows, finer.shape[1] // columns, columns)
                known[q, k] = join.reduce(grid, axis=(1, 3))
        return known[q, k]


def _pairs(cond: Scalar, at: NDArray[Any], extent: int) -> NDArray[np.bool_]:
    """The pairs of some cells of an axis; all of them where that depends on what no plan knows."""
    for e in walk(cond):
        called = isinstance(e, Call) and e.function not in ("min", "max", "abs", "clamp")
        if called or isinstance(e, Read | Table | Arg) or (isinstance(e, Var) and e.name not in ("q", "k", "Nq", "Nk")):
            return np.ones((1, 1), np.bool_)
    size = np.asarray(extent)
    return np.asarray(evaluate(cond, {"q": at[:, None], "k": at[None, :], "Nq": size, "Nk": size}, {}))


def _cost_in_order(piece: BoxPiece) -> tuple[float, float]:
    """What tokens in order cost: whole rows of the tiles that the first axis touches, in tiles of 128 x 64, and the
    programs besides."""
    grid, part = piece.grid, piece.axes[0]
    extent = _extent(grid, 0)
    at = np.arange(extent)
    allowed = np.broadcast_to(_pairs(part.local, at, extent), (extent, extent))
    q, k = (max(1, block // grid.stride) for block in (128, 64))
    padded = np.pad(allowed, ((0, -extent % q), (0, -extent % k)))
    touched = np.count_nonzero(padded.reshape(padded.shape[0] // q, q, padded.shape[1] // k, k).any(axis=(1, 3)))
    rows: float = max(1.0, grid.stride / 128)
    tiles: float = touched * rows * max(1.0, grid.stride / 64)
    return tiles, PROGRAM * (padded.shape[0] // q) * rows
