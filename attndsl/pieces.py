"""The layout search: a pattern as disjoint pieces, each in the layout in which it visits the fewest tiles.

Candidates come from the pattern itself: the constants by which it divides. A part of the pattern fits a candidate if
its keys have a residue that follows from the query's, or lie in one band of every period. Parts that fit go there,
earlier pieces are subtracted from later ones, and of all such divisions the one that should cost least is taken, by
the tiles that it visits at one length. Nothing of it depends on the lengths of a call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations

import islpy as isl
import numpy as np

from attndsl.compared import WORTH_IT, Comparison, Way
from attndsl.derivation import Draw
from attndsl.derive import derive
from attndsl.effort import EFFORT, TooHard, bounded, remembered
from attndsl.grid_pieces import BoxPiece, grid_pieces
from attndsl.isl_sets import project_param
from attndsl.layout import PLAIN, Comb, Layout
from attndsl.left_tiles import reads_tiles
from attndsl.mixing import mixture
from attndsl.periods import periods
from attndsl.permuting import PermutedPiece, permuted
from attndsl.program import Program, Read, walk
from attndsl.reindex import in_layout, with_pairs
from attndsl.relation import Relation, lowered
from attndsl.set_values import held
from attndsl.splitting import Split, SplitPiece, split
from attndsl.tiles import touched_tiles

# Periods beyond this leave too few tokens to a residue.
MAX_PERIOD = 4096
# Bounds of the search: candidates, parts of the pattern, residues that a row's keys have.
MAX_CANDIDATES = 6
MAX_PARTS = 8
MAX_SHIFTS = 4
# Tile sizes and length for which divisions are compared: kernels do not depend on lengths.
BLOCK_Q, BLOCK_K, TOKENS = 128, 64, 16384
# What a program costs apart from its tiles, and more of it where it takes up the results of earlier pieces, in tiles.
PROGRAM, TAKEN_UP = 2.5, 2.5
# Tiles of rows at that length, and how `explain` names it.
ROWS, AT = TOKENS // BLOCK_Q, f"at {TOKENS:,} tokens"
# Elementary isl operations allowed to the whole search.
SEARCH_EFFORT = 2 * EFFORT


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Pairs of a pattern, and the layout in which they are visited: `relation` is in the layout's indices."""

    layout: Layout
    relation: Relation


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """A way to divide a pattern: layouts, the parts that each holds, and their cost."""

    groups: tuple[tuple[Layout, frozenset[int]], ...]
    way: Way

    @property
    def cost(self) -> float:
        return self.way.cost


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The pieces of a pattern, in the order in which they run, none where it stays whole, its tokens in order.

    `considered`: what was compared to tokens in order, kind of layout by kind.
    """

    pieces: tuple[Piece | BoxPiece | PermutedPiece | SplitPiece, ...] = ()
    considered: tuple[Comparison, ...] = ()
    note: str = ""

    @property
    def plain(self) -> bool:
        """Whether the pattern stays whole, its tokens in order."""
        return not self.pieces


@remembered(256)
def choose_pieces(program: Program, heads: tuple[int, int]) -> Choice:
    """The pieces of a program's pattern for (H, G) heads."""
    compared: list[Comparison] = []
    return replace(_choose(derive(program), heads, compared), considered=tuple(compared))


def _choose(program: Program, heads: tuple[int, int], compared: list[Comparison]) -> Choice:
    """compared: where comparisons are put down."""
    if program.branch.skip is not None:
        return Choice(note="tokens in order: which tiles are skipped depends on it")
    if reads_tiles(program):
        return Choice(note="tokens in order: tiles that were skipped are of these")
    if (found := _by_boxes(program, heads, compared)) is not None:
        return found
    if (in_order := permuted(program, heads)) is not None:
        return Choice((in_order,), note=f"{in_order.layout}: sorted, the data bounds the keys of a row")
    if (apart := _apart(program, heads, compared)) is not None:
        return apart
    if (mixed := _mixed(program, heads, compared)) is not None:
        return mixed
    candidates = _candidates(program, heads)
    if not candidates:
        return Choice()
    lowering, relation = lowered(program, heads)
    if _reads_derived(program, relation):
        return Choice(note="tokens in order: the pattern holds parts that are computed before the kernel")
    try:
        return bounded(lowering.ctx, lambda: _Search(program, relation, candidates).choice(compared), SEARCH_EFFORT)
    except TooHard:
        return Choice(note="layouts were not compared: too hard within the effort bound")


def sorted_by_data(program: Program, heads: tuple[int, int]) -> Comparison | None:
    """The order of data that a pattern is visited in, beside tokens in order: what the search need not count, since of
    the first only the data tells. None where no data orders the pattern, or counting is too hard."""
    program = derive(program)
    found = permuted(program, heads)
    if found is None:
        return None
    lowering, relation = lowered(program, heads)
    try:
        tiles = bounded(lowering.ctx, lambda: _touched(relation, program), SEARCH_EFFORT)
    except TooHard:
        return None
    by_data = Way((found.layout,), 0.0, _programs_of(1), known=False)
    return Comparison(AT, (by_data, Way((PLAIN,), tiles, _programs_of(1))), by_data)


def _by_boxes(program: Program, heads: tuple[int, int], compared: list[Comparison]) -> Choice | None:
    """The pieces of a pattern on a grid, after what stands off it; None where boxes do not help."""
    if any(decl.derivation is not None for decl in program.inputs):
        return None
    found = grid_pieces(program, heads)
    if found is None:
        return None
    compared.append(Comparison(str(found), found.ways, found.ways[1] if found.gain else None))
    if not found.gain:
        return None
    first = () if found.rest is None else (Piece(PLAIN, found.rest),)
    note = f"products of sets along the axes: pieces by boxes, {len(found.boxes)} of them"
    return Choice((*first, *found.boxes), note=note)


def _apart(program: Program, heads: tuple[int, int], compared: list[Comparison]) -> Choice | None:
    """What a draw adds to a pattern apart from the rest, where that spares tiles."""
    if not any(isinstance(decl.derivation, Draw) for decl in program.inputs):
        return None

    def counted() -> tuple[Split, float, float] | None:
        found = split(program, heads)
        if found is None:
            return None
        return found, _touched(found.without, program), _touched(found.whole, program)

    try:
        compared_to = bounded(lowered(program, heads)[0].ctx, counted, SEARCH_EFFORT)
    except TooHard:
        return None
    if compared_to is None:
        return None
    found, rest, whole = compared_to
    drawn = found.drawn
    assert isinstance(drawn.plan.derivation, Draw)
    # Rows of smaller classes have smaller tiles, each with a list of its own.
    lists = max(1, BLOCK_Q // 2 // (drawn.rows or BLOCK_Q)) * drawn.plan.derivation.drawn.count * drawn.keys / BLOCK_K
    apart = Way((PLAIN, "what `random` lists"), rest + ROWS * lists, _programs_of(2))
    if not _worth_it(apart, Way((PLAIN,), whole, _programs_of(1)), compared):
        return None
    return Choice(found.pieces, note="what `random` adds to the rest is a piece of its own, its tiles listed")


def _mixed(program: Program, heads: tuple[int, int], compared: list[Comparison]) -> Choice | None:
    """What lies in the order of unsorted data apart from the rest, where that rest is so much the less."""
    found = mixture(program, heads)
    if not found:
        return None

    def counted() -> tuple[float, float]:
        in_order = sum(_touched(lowered(x.program, heads)[1], x.program) for x in found if x.layout.plain)
        return in_order, _touched(lowered(program, heads)[1], program)

    try:
        less, all_of_it = bounded(lowered(program, heads)[0].ctx, counted, SEARCH_EFFORT)
    except TooHard:
        return None
    # What is visited in the order of data, the data says.
    apart = Way(tuple(x.layout for x in found), less, _programs_of(len(found)), known=False)
    if not _worth_it(apart, Way((PLAIN,), all_of_it, _programs_of(1)), compared):
        return None
    return Choice(found, note="alternatives in the orders of their data, each a piece beside the rest")


def _programs_of(pieces: int) -> float:
    """What the programs of so many pieces of all rows cost besides their tiles."""
    return ROWS * (PROGRAM * pieces + TAKEN_UP * (pieces - 1))


def _worth_it(apart: Way, whole: Way, compared: list[Comparison]) -> bool:
    """Whether pieces are so much less than the whole in order; the comparison is put down."""
    gain = apart.cost < WORTH_IT * whole.cost
    compared.append(Comparison(AT, (whole, apart), apart if gain else None))
    return gain


def _touched(relation: Relation, program: Program) -> float:
    """The tiles that a relation touches at the length for which costs are compared, whatever data and heads say."""
    pairs = relation.project_atoms(relation.pairs)
    for name in relation.uniform:
        pairs = project_param(pairs, name)
    known = _at_one_length(relation)
    return _tiles(in_layout(known, pairs.intersect_params(known.context), PLAIN), PLAIN, program.align_start)


def _at_one_length(relation: Relation) -> Relation:
    """The relation at the length for which costs are compared, for pairs that no other parameter decides."""
    length = f"[Nq, Nk, start] -> {{ : Nq = {TOKENS} and Nk = {TOKENS} and start = 0 }}"
    return replace(relation, context=isl.Set.read_from_str(relation.pairs.get_ctx(), length))


def _reads_derived(program: Program, relation: Relation) -> bool:
    """Whether a kernel of the pattern reads inputs that the runtime makes."""
    derived = {decl.name for decl in program.inputs if decl.derivation is not None}
    data = (*relation.uniform.values(), *relation.atoms.values())
    return any(isinstance(x, Read) and x.input in derived for e in data for x in walk(e))


# ------------------------------------------------------------------------------------- candidates


def _candidates(program: Program, heads: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Periods and widths (of combs) that the pattern's own constants suggest, few and without repetition."""
    found = dict.fromkeys(periods(program.branch.pattern, {"H": heads[0], "G": heads[1]}, 1))
    return tuple((p, w) for p, w in found if w < p <= MAX_PERIOD)[:MAX_CANDIDATES]


# ----------------------------------------------------------------------------------------- search


class _Search:
    """The divisions of one pattern, compared."""

    def __init__(self, program: Program, relation: Relation, candidates: tuple[tuple[int, int], ...]) -> None:
        self.program, self.relation, self.candidates = program, relation, candidates
        self.ctx = relation.pairs.get_ctx()
        self._maps: dict[str, isl.Map] = {}
        self.parts = [relation.pairs]
        basic = relation.pairs.get_basic_sets()
        fits_whole = any(len(family) == 1 for family, _ in self._families())
        if 1 < len(basic) <= MAX_PARTS and not fits_whole:
            self.parts = [isl.Set.from_basic_set(part) for part in basic]
        self.tiles: dict[tuple[Layout, frozenset[int]], float] = {}
        # What costs no less is not counted to the end.
        self.limit = math.inf
        self.known = _at_one_length(relation)

    def choice(self, compared: list[Comparison]) -> Choice:
        families = dict(self._families())
        if not families:
            return Choice()
        plain = self._divide((), families)
        self.limit = plain.cost
        alone = {family: self._divide((family,), families) for family in families}
        # Two candidates together, of those that gain by themselves; what fits neither stays in order.
        gaining = sorted((f for f in families if alone[f].cost < plain.cost), key=lambda f: alone[f].cost)[:2]
        together = [self._divide(chosen, families) for chosen in permutations(gaining, 2)]
        considered = tuple({division.groups: division for division in (plain, *alone.values(), *together)}.values())
        best = min(considered, key=lambda division: division.cost)
        taken = best if best.cost < WORTH_IT * plain.cost else plain
        if len(considered) > 1:
            compared.append(Comparison(AT, tuple(division.way for division in considered), taken.way))
        return Choice() if taken is plain else Choice(self._pieces(dict(best.groups)))

    def _divide(
        self, chosen: tuple[tuple[Layout, ...], ...], families: dict[tuple[Layout, ...], frozenset[int]]
    ) -> Division:
        """Parts that fit the first of some families go there, of the rest those that fit the next."""
        groups: dict[Layout, frozenset[int]] = {}
        left = frozenset(range(len(self.parts)))
        for family in chosen:
            fits = families[family] & left
            groups |= {layout: fits for layout in family if fits}
            left -= fits
        groups = ({PLAIN: left} if left else {}) | groups
        return Division(tuple(groups.items()), self._way(groups))

    def _families(self) -> Iterator[tuple[tuple[Layout, ...], frozenset[int]]]:
        """Layouts that together hold some parts, and those parts."""
        found: dict[tuple[Layout, ...], set[int]] = {}
        # The pairs of any head, length and data.
        of_any = [self.relation.project_atoms(part).project_out_all_params() for part in self.parts]
        for period, width in self.candidates:
            for n, part in enumerate(of_any):
                for family in self._fitting(part, period, width):
                    found.setdefault(family, set()).add(n)
        for family, parts in found.items():
            yield family, frozenset(parts)

    def _fitting(self, part: isl.Set, period: int, width: int) -> Iterator[tuple[Layout, ...]]:
        """The families that hold a part: by residues that follow from the query's, and by a band of the keys."""
        classes = period // width
        shifts = self._values(
            part, f"e : exists a, b, c : {width} a <= q < {width} a + {width} and {width} b <= k < {width} b + {width} "
            f"and e = b - a - {classes} c and 0 <= e < {classes}", MAX_SHIFTS,
        )  # fmt: skip
        if shifts and 2 * len(shifts) <= classes:
            rows = Comb(period, width, step=width)
            yield tuple(Layout(rows, Comb(period, width, width, width * s), classes) for s in shifts)
        if width == 1:
            low, high = self._ends(part, f"e : exists c : e = k - {period} c and 0 <= e < {period}")
            if 0 <= low <= high < low + period // 2:
                yield (Layout(k=Comb(period, high - low + 1, shift=low)),)

    def _image(self, part: isl.Set, text: str) -> isl.Set:
        if text not in self._maps:
            self._maps[text] = isl.Map.read_from_str(self.ctx, f"{{ [q, k] -> [e] : {text.removeprefix('e : ')} }}")
        return part.apply(self._maps[text])

    def _values(self, part: isl.Set, text: str, limit: int) -> tuple[int, ...]:
        """The values that a function takes on the part's pairs, none where there are more than `limit`."""
        image, found = self._image(part, text), list[int]()
        while not image.is_empty():
            if len(found) == limit:
                return ()
            found.append(int(image.dim_min_val(0).to_python()))
            image = image.lower_bound_val(isl.dim_type.set, 0, isl.Val.int_from_si(self.ctx, found[-1] + 1))
        return tuple(found)

    def _ends(self, part: isl.Set, text: str) -> tuple[int, int]:
        """The least and the greatest value, (1, 0) where there is none."""
        image = self._image(part, text)
        if image.is_empty():
            return 1, 0
        return int(image.dim_min_val(0).to_python()), int(image.dim_max_val(0).to_python())

    # ------------------------------------------------------------------------------------- costs

    def _way(self, groups: dict[Layout, frozenset[int]]) -> Way:
        """What a division costs, or where that is no less than the limit, at least."""
        count = [_programs(layout) for layout in groups]
        # What all of them cost apart from their tiles is known before any are counted.
        programs, tiles = PROGRAM * sum(count) + TAKEN_UP * sum(count[1:]), 0.0
        for counted, (layout, parts) in enumerate(groups.items()):
            if programs + tiles >= self.limit and counted:
                return Way(tuple(groups), tiles, programs, known=False)
            tiles += self._tiles_of(layout, parts)
        return Way(tuple(groups), tiles, programs)

    def _tiles_of(self, layout: Layout, parts: frozenset[int]) -> float:
        key = (layout, parts)
        if key not in self.tiles:
            found = self.relation.project_atoms(self._union(parts))
            for name in self.relation.uniform:
                # The pairs of any head, any call.
                found = project_param(found, name)
            found = found.intersect_params(self.known.context)
            self.tiles[key] = _tiles(in_layout(self.known, found, layout), layout, self.program.align_start)
        return self.tiles[key]

    def _union(self, parts: frozenset[int]) -> isl.Set:
        found = self.parts[min(parts)]
        for n in sorted(parts)[1:]:
            found = found.union(self.parts[n])
        return found.coalesce()

    # ------------------------------------------------------------------------------------ pieces

    def _pieces(self, groups: dict[Layout, frozenset[int]]) -> tuple[Piece, ...]:
        """The pieces of a division, each without the pairs of those before it."""
        pieces: list[Piece] = []
        for n, (layout, parts) in enumerate(groups.items()):
            found = in_layout(self.relation, self._union(parts), layout)
            # Layouts that hold the same parts hold other residues of them.
            for other in dict.fromkeys(p for p in list(groups.values())[:n] if p != parts):
                # In the layout, where periods are gone.
                earlier = in_layout(self.relation, self._union(other), layout)
                found = with_pairs(found, found.pairs.subtract(earlier.pairs).coalesce())
            if pieces and found.pairs.intersect_params(found.context).is_empty():
                continue
            pieces.append(Piece(layout, found))
        return tuple(pieces)


def _programs(layout: Layout) -> int:
    """Query tiles over all residues."""
    return layout.classes * -(-layout.q.most(TOKENS) // BLOCK_Q)


def _tiles(relation: Relation, layout: Layout, align_start: bool) -> float:
    """Tiles visited over all residues: counted where they lie, which is less work than to write them as runs."""
    tiles = touched_tiles(relation, BLOCK_Q, BLOCK_K, align_start, layout)
    length, zero, residue = np.asarray(TOKENS), np.asarray(0), np.arange(layout.classes)
    variables = {
        "Nq": length, "Nk": length, "start": zero, "residue": residue[:, None, None],
        "x": np.arange(-(-layout.q.most(TOKENS) // BLOCK_Q))[:, None],
        "y": np.arange(-(-layout.k.most(TOKENS) // BLOCK_K)),
    }  # fmt: skip
    return float(np.count_nonzero(held(tiles, variables)))
