"""The block graph in closed form: which key tiles a query tile visits, as runs that hold for every length.

For a query tile the visited key tiles are a few disjoint *runs* `first, first + step, …` (`count` of them), whose
ends are quasi-affine in the tile's index, the lengths and the uniform scalars. A run is *full* (every pair of
its tiles is allowed: no mask) or *partial*. Where data decides, the tiles are read from a list (`listed_runs`). The
transpose gives, for a key tile, the query tiles that visit it, and the skewed relation, for a diagonal of square tiles,
the query tiles at which it is visited.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import reduce
from typing import TypeVar, assert_never

import islpy as isl

from attndsl.effort import EFFORT, TooHard, bounded
from attndsl.layout import PLAIN, Layout
from attndsl.program import (
    Binary,
    Call,
    Const,
    Program,
    Scalar,
    Var,
)  # fmt: skip
from attndsl.quasi_affine import to_scalar
from attndsl.relation import Relation
from attndsl.run_ends import (
    either,
    exclusive,
    in_a_row,
    interval_ends,
    plain_interval,
    straightened,
    written_size,
)  # fmt: skip
from attndsl.runs import Run, Side, TileKind, TileRuns, plain_runs
from attndsl.tile_cuts import Grid, Owner, TileCuts, tile_cuts
from attndsl.tile_loops import loop_runs
from attndsl.tile_sets import PIECE_EFFORT, Tiles, split_tiles, tile_sets

# Elementary isl operations allowed to one attempt at runs.
SCAN_EFFORT = 2 * EFFORT
# After so many pieces past it the rest is not tried.
MAX_HARD = 2
# Nodes of the ends of runs, written out: what they share counts each time, as it does for whoever compares them.
MAX_WRITTEN = 20_000
# Up to so many pieces are tried for being parts of one interval.
MAX_JOINED = 6

T = TypeVar("T")


def tile_runs(
    relation: Relation,
    block_q: int,
    block_k: int,
    side: Side,
    align_start: bool = False,
    layout: Layout = PLAIN,
    program: Program | None = None,
    sizes: Mapping[str, int] | None = {},
    shifted: bool = False,
) -> TileRuns:
    """Closed-form runs for one side's tiles.

    Query tile t holds the rows [t * block_q, (t + 1) * block_q) of a call, whose positions start at Nk - rows
    (0 under `align start`); key tile t holds keys [t * block_k, (t + 1) * block_k).

    With a layout, `relation` is in its indices, and tiles are of these: the rows of a residue start at index `i_start`.
    With a program, the ends read the cuts that it declares (`cuts.py`), and tiles that data rules out are not visited.
    sizes: of H, G, D, Dv, where they are known; None where the ends are not to be put plainly yet.
    shifted: tiles of both sides count from the position `shift`, -block_q < shift <= 0: a query tile that begins at any
    position is one of these, whose rows after `q_last` do not count. The first key tile may begin before the first key.
    """
    runs = _Tiler(relation, block_q, block_k, side, align_start, layout, program, shifted).runs()
    return runs if sizes is None else plain_runs(runs, sizes)


def touched_runs(
    relation: Relation, block_q: int, block_k: int, side: Side, align_start: bool = False, layout: Layout = PLAIN
) -> TileRuns:
    """Runs as `tile_runs` gives them, all taken for partial: less work, where no tile is full or only their number
    counts. Raises TooHard."""
    return plain_runs(_Tiler(relation, block_q, block_k, side, align_start, layout).touched_runs())


def touched_tiles(relation: Relation, block_q: int, block_k: int, align_start: bool, layout: Layout = PLAIN) -> isl.Set:
    """The tiles { [x, y] } of queries and of keys that `touched_runs` visits, those that do not exist left out."""
    return tile_sets(Tiles(relation, block_q, block_k, align_start, layout), TileCuts()).some_touched()


def ordered_runs(
    relation: Relation, block_q: int, block_k: int, side: Side, align_start: bool, program: Program
) -> tuple[Run, ...]:
    """The runs of all visited tiles, taken for partial, one after another in the order of the tiles."""
    runs = _Tiler(relation, block_q, block_k, side, align_start, PLAIN, program).ordered_runs()
    return plain_runs(TileRuns((), runs)).partial


def full_first_runs(
    relation: Relation, block_q: int, block_k: int, side: Side, align_start: bool, program: Program,
    sizes: Mapping[str, int],
) -> TileRuns | None:  # fmt: skip
    """`tile_runs`, where one run of full tiles and then one of partial ones are all tiles in order; None elsewhere."""
    tiler = _Tiler(relation, block_q, block_k, side, align_start, PLAIN, program)
    runs = tiler.runs()
    plain = all(len(found) <= 1 and all(run.step == 1 for run in found) for found in (runs.full, runs.partial))
    return plain_runs(runs, sizes) if plain and tiler.full_first() else None


def _written_out(runs: TileRuns) -> int:
    return written_size(tuple(x for run in runs.full + runs.partial for x in (run.first, run.count)))


class _Tiler:
    def __init__(
        self, relation: Relation, block_q: int, block_k: int, side: Side, align_start: bool, layout: Layout,
        program: Program | None = None, shifted: bool = False,
    ) -> None:  # fmt: skip
        assert side is not Side.DIAGONAL or block_q == block_k
        assert not shifted or (side is Side.QUERY and layout.plain and not align_start and block_q % block_k == 0)
        self.relation, self.side, self.layout = relation, side, layout
        self.block_q, self.block_k = block_q, block_k
        self.align_start, self.shifted = align_start, shifted
        self.ctx = relation.pairs.get_ctx()
        of = Tiles(relation, block_q, block_k, align_start, layout, shifted)
        self.cuts = TileCuts() if program is None else tile_cuts(program, relation.atoms, self._owner(), self._grids())
        self.sets = tile_sets(of, self.cuts)
        self.existing = self.sets.existing
        self.hard, self.budget = 0, of.budget()

    @functools.cached_property
    def above(self) -> isl.Map:
        return isl.Map.lex_lt(isl.Space.set_alloc(self.ctx, 0, 1))

    @functools.cached_property
    def below(self) -> isl.Map:
        return isl.Map.lex_gt(isl.Space.set_alloc(self.ctx, 0, 1))

    def _grids(self) -> dict[str, Grid]:
        """The tiles of both sides."""
        origin, text = (None, "") if self.align_start else (self._start, " - start")
        return {
            "q": Grid(self.layout.q, self.block_q, origin, text, from_zero=self.align_start),
            "k": Grid(self.layout.k, self.block_k, *((origin, text) if self.shifted else (None, ""))),
        }

    def _owner(self) -> Owner | None:
        """The tiles that a program owns."""
        match self.side:
            case Side.QUERY:
                first: Scalar = Binary("*", Const(self.block_q), Var(self.side.value))
                first = first if self.align_start else Binary("+", self._start, first)
                text = f"{self.block_q} x" if self.align_start else f"{self.block_q} x + start"
                variable, comb, size = "q", self.layout.q, self.block_q
            case Side.KEY:
                first, text = Binary("*", Const(self.block_k), Var(self.side.value)), f"{self.block_k} y"
                variable, comb, size = "k", self.layout.k, self.block_k
            case Side.DIAGONAL:
                return None
            case _:
                assert_never(self.side)
        last = comb.position(Binary("+", first, Const(size - 1)))
        end = Binary("+", last, Const(1))
        if self.shifted:
            # The rows after it are another tile's.
            last = Call("min", (last, Var("q_last")))
        exists = self.align_start or self.side is Side.KEY
        return Owner(variable, comb.position(first), last, end, text, size, exists)

    def _map(self, text: str) -> isl.Map:
        return isl.Map.read_from_str(self.ctx, text)

    def runs(self) -> TileRuns:
        split = split_tiles(self.sets)
        # Both sides are charged with what was done once.
        self.budget.left -= sum(split.taken)
        # Past the effort bound every visited tile is partial: slower, never different.
        attempts = [(lambda: self._partial(split.touched), SCAN_EFFORT)]
        if (kinds := split.kinds) is not None:
            lines = (lambda: self._scan(*map(self._own_tile, kinds)), SCAN_EFFORT - split.taken[1])
            attempts.insert(0, lines)
        for attempt, effort in attempts:
            self.hard = 0
            try:
                found = self.budget.bounded(self.ctx, attempt, effort)
            except TooHard:
                continue
            if _written_out(found) <= MAX_WRITTEN:
                return found
        return self._partial(self.existing, gives_up=False)

    def touched_runs(self) -> TileRuns:
        touched = self.sets.touched(self.budget)
        return bounded(self.ctx, lambda: self._partial(touched), SCAN_EFFORT)

    def _partial(self, tiles: isl.Set, gives_up: bool = True) -> TileRuns:
        line = self._own_tile(tiles)
        return self._scan(isl.Set.empty(line.get_space()), line, gives_up)

    def full_first(self) -> bool:
        """Whether no partial tile comes before a full one."""
        if (kinds := split_tiles(self.sets).kinds) is None:
            return False
        full, partial = map(self._own_tile, kinds)
        return bool(self._tried(lambda: partial.apply(self.above).is_disjoint(full)))

    def ordered_runs(self) -> tuple[Run, ...]:
        touched = self.sets.touched(self.budget)
        context = self._own_tile(self.existing).params()

        def scanned(tiles: isl.Set) -> tuple[Run, ...]:
            return self._loops({TileKind.PARTIAL: self._own_tile(tiles)}, context).partial

        try:
            found = bounded(self.ctx, lambda: scanned(touched), SCAN_EFFORT)
        except TooHard:
            return scanned(self.existing)
        return found if _written_out(TileRuns((), found)) <= MAX_WRITTEN else scanned(self.existing)

    # -------------------------------------------------------------------------------------- runs

    def _scan(self, full: isl.Set, partial: isl.Set, gives_up: bool = True) -> TileRuns:
        """The runs of lines of both kinds: by intervals, or where tiles are no intervals as isl's loops over them.

        gives_up: raise TooHard where too many pieces were hard.
        """
        context = self._own_tile(self.existing).params()
        whole = isl.Set.from_params(context).add_dims(isl.dim_type.set, 1)
        lines = {
            kind: self._intervals(line).gist(whole)
            for kind, line in ((TileKind.FULL, full), (TileKind.PARTIAL, partial))
        }
        full_pieces, partial_pieces = (self._interval_pieces(line, context) for line in lines.values())
        if full_pieces is None or partial_pieces is None:
            if gives_up and self.hard >= MAX_HARD:
                # Loops over these pieces take longer still.
                raise TooHard
            return self._loops(lines, context)
        return TileRuns(
            self._interval_runs(full_pieces, TileKind.FULL, context),
            self._interval_runs(partial_pieces, TileKind.PARTIAL, context),
        )

    def _interval_pieces(self, line: isl.Set, context: isl.Set) -> list[isl.Set] | None:
        """The disjoint intervals of a line of tiles, or None if some piece is none."""
        pieces = []
        for basic in line.make_disjoint().get_basic_sets():
            piece = isl.Set.from_basic_set(basic)
            if piece.intersect_params(context).is_empty():
                continue
            if not plain_interval(basic) and not self._gapless(piece):
                return None
            pieces.append(piece)
        return pieces

    def _interval_runs(self, pieces: list[isl.Set], kind: TileKind, context: isl.Set) -> tuple[Run, ...]:
        """A run for each of some intervals, or for several that never have tiles together."""
        # Where data decides which pieces meet, each may have tiles or none: in a row they are no easier to visit.
        together = [[piece] for piece in pieces] if self.cuts.pairs else self._joined(pieces)
        build = isl.AstBuild.from_context(context)
        ends = [in_a_row([interval_ends(build, x, context, self.names) for x in joined]) for joined in together]
        params = [reduce(isl.Set.union, [x.params() for x in joined]) for joined in together]
        groups = exclusive([x.intersect(context) for x in params] if len(params) > 1 else params)
        return tuple(Run(*either([ends[i] for i in group]), 1, kind) for group in groups)

    def _joined(self, pieces: list[isl.Set]) -> list[list[isl.Set]]:
        """The pieces, those that always meet together, in order: fewer runs, and kernels need not choose among them."""
        if len(pieces) > MAX_JOINED:
            return [[piece] for piece in pieces]
        joined: list[list[isl.Set]] = []
        for piece in pieces:
            for i, others in enumerate(joined):
                if (both := self._meeting(others, piece)) is not None:
                    joined[i] = both
                    break
            else:
                joined.append([piece])
        return joined

    def _meeting(self, others: list[isl.Set], piece: isl.Set) -> list[isl.Set] | None:
        """Pieces that are one interval, and one more, in order, if they still are with it."""
        earlier = reduce(isl.Set.union, others)
        both = earlier.union(piece).coalesce()
        if both.n_basic_set() == 1 and plain_interval(both.get_basic_sets()[0]):
            return [both]
        return self._tried(lambda: self._in_order(earlier, others, piece, both))

    def _in_order(self, earlier: isl.Set, others: list[isl.Set], piece: isl.Set, both: isl.Set) -> list[isl.Set] | None:
        """The same of two intervals: where one comes after the other, only what lies between them can be missing."""
        if (after := earlier.apply(self.below)).is_disjoint(piece):
            between = earlier.apply(self.above).intersect(piece.apply(self.below))
            return [*others, piece] if between.is_subset(both) else None
        if earlier.apply(self.above).is_disjoint(piece):
            return [piece, *others] if after.intersect(piece.apply(self.above)).is_subset(both) else None
        return None

    def _gapless(self, line: isl.Set) -> bool:
        """Whether a set { [t] } is an interval, whatever its parameters."""

        def compute() -> bool:
            between = line.apply(self.above).intersect(line.apply(self.below))
            return bool(between.is_subset(line))

        return bool(self._tried(compute))

    def _loops(self, lines: dict[TileKind, isl.Set], context: isl.Set) -> TileRuns:
        return loop_runs(lines, context, lambda expr: to_scalar(expr, self.names), self._other_tiles())

    def _other_tiles(self) -> Scalar:
        """The number of tiles on the other side."""
        if self.side is Side.QUERY:
            return _tiles(self.layout.k.index(Var("Nk")), self.block_k * self.relation.stride)
        if self.align_start:
            return _tiles(self.layout.q.index(Var("Nq")), self.block_q)
        return _tiles(Binary("-", self.layout.q.index(Var("Nk")), self._start), self.block_q)

    def _own_tile(self, tiles: isl.Set) -> isl.Set:
        """{ [x, y] } as the line of the other side's tiles, the own tile a parameter."""
        if self.side is Side.DIAGONAL:
            tiles = tiles.apply(self._map("{ [x, y] -> [x - y, x] }"))
        own = 1 if self.side is Side.KEY else 0
        position = tiles.dim(isl.dim_type.param)
        tiles = tiles.move_dims(isl.dim_type.param, position, isl.dim_type.set, own, 1)
        return tiles.set_dim_name(isl.dim_type.param, position, self.side.value).coalesce()

    def _intervals(self, line: isl.Set) -> isl.Set:
        """The same set, its intervals written with ends in terms of the own tile."""
        pieces = isl.Set.empty(line.get_space())
        for basic in line.make_disjoint().get_basic_sets():
            straight = straightened(basic)
            piece = reduce(isl.Set.union, map(isl.Set.from_basic_set, straight))
            hull = None if all(map(plain_interval, straight)) else self._interval(piece)
            pieces = pieces.union(piece if hull is None else hull)
        return pieces.coalesce()

    def _interval(self, piece: isl.Set) -> isl.Set | None:
        """The piece written as everything from its first to its last tile, None where it is no interval."""
        # Whether it is one is soon known, its ends are not.
        return self._tried(lambda: self._hull(piece)) if self._gapless(piece) else None

    def _tried(self, step: Callable[[], T]) -> T | None:
        """What a step gives within the bound of one piece, None where it passes that."""
        if self.hard >= MAX_HARD:
            return None
        try:
            return bounded(self.ctx, step, PIECE_EFFORT)
        except TooHard:
            self.hard += 1
            return None

    def _hull(self, piece: isl.Set) -> isl.Set:
        tile = isl.PwAff.var_on_domain(isl.LocalSpace.from_space(piece.get_space()), isl.dim_type.set, 0)
        low = piece.dim_min(0).insert_domain(piece.get_space())
        high = piece.dim_max(0).insert_domain(piece.get_space())
        return tile.ge_set(low).intersect(tile.le_set(high))

    @functools.cached_property
    def names(self) -> dict[str, Scalar]:
        """What parameters stand for."""
        names: dict[str, Scalar] = {name: Var(name) for name in ("Nq", "Nk", "residue", self.side.value)}
        return names | {"start": self._start} | self.relation.uniform | self.cuts.scalars

    @property
    def _start(self) -> Scalar:
        if self.shifted:
            return Var("shift")
        return Var("start" if self.layout.q.every else "i_start")


def _tiles(length: Scalar, block: int) -> Scalar:
    return Binary("//", Binary("+", length, Const(block - 1)), Const(block))
