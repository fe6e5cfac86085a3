"""Sets { [x, y] } of tiles of queries and of keys: those that a relation touches, and of these the full ones."""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import dataclass

import islpy as isl

from attndsl.effort import EFFORT, Budget, TooHard, bounded, eased, remembered
from attndsl.isl_sets import common_multiple, named_space, where_all, where_param
from attndsl.layout import Layout
from attndsl.relation import Relation
from attndsl.tile_cuts import TileCuts

# Elementary isl operations allowed to the tiles of one side of one pattern, whatever is tried.
TILES_EFFORT = 4 * EFFORT
# … and to telling full tiles from partial ones, whose operations are the slowest.
SPLIT_EFFORT = 120_000
# … half of it for patterns of more parts, whose complements either are found soon or pass any bound.
MANY_PARTS = 16
# … and to writing one piece of it as an interval.
PIECE_EFFORT = EFFORT // 10
# Conditions on sorted data up to which full tiles are told from partial ones: with more, that takes too long.
MAX_KNOWN = 2
# Quotients in the tiles that are touched past which it pays to simplify these first: of many most may go.
FEW_QUOTIENTS = 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a relation, in its layout: as `tiles.tile_runs` has them, of either side."""

    relation: Relation
    block_q: int
    block_k: int
    align_start: bool
    layout: Layout
    shifted: bool = False

    def budget(self) -> Budget:
        """What may be spent on them and their runs."""
        return Budget(eased(TILES_EFFORT, common_multiple(self.relation.pairs)))


@dataclass(frozen=True, slots=True)
class Split:
    """The tiles that are touched, and of these the full ones and the rest: None where telling them apart is too hard,
    or left out. taken: the operations for the touched ones, and for the rest."""

    touched: isl.Set
    kinds: tuple[isl.Set, isl.Set] | None
    taken: tuple[int, int]


def tile_sets(tiles: Tiles, cuts: TileCuts) -> TileSets:
    """The sets of some tiles: for both sides the same, unless these know cuts of their own."""
    return TileSets(tiles, cuts) if cuts.pairs else _alike(tiles)


@remembered(64)
def _alike(tiles: Tiles) -> TileSets:
    return TileSets(tiles, TileCuts())


@remembered(64)
def split_tiles(sets: TileSets) -> Split:
    """The tiles of a relation, the full ones told from the others, once for both sides."""
    budget = sets.of.budget()
    whole, touched = budget.left, sets.touched(budget)
    left, kinds = budget.left, None
    if len(sets.known) <= MAX_KNOWN:
        with suppress(TooHard):
            kinds = sets.split(touched, budget)
    return Split(touched, kinds, (whole - left, left - budget.left))


class TileSets:
    """What sets of tiles are made with: `tiles`, which takes pairs to them, those `existing`, and what is `known` of
    conditions on sorted data."""

    def __init__(self, of: Tiles, cuts: TileCuts) -> None:
        self.of, self.relation, self.ctx = of, of.relation, of.relation.pairs.get_ctx()
        self.tiles, self.existing = self._tiles(), self._exist().intersect_params(self.relation.context)
        if of.shifted:
            self.existing = self.existing.intersect_params(self._set(f"[start] -> {{ : {-of.block_q} < start <= 0 }}"))
        self.known = {name: tuple(map(self._set, texts)) for name, texts in cuts.pairs.items()}
        parameters = ", ".join(["start", *cuts.scalars])
        for fact in cuts.tiles:
            self.existing = self.existing.intersect(self._set(f"[{parameters}] -> {{ [x, y] : {fact} }}"))

    def _set(self, text: str) -> isl.Set:
        return isl.Set.read_from_str(self.ctx, text)

    def _tiles(self) -> isl.Map:
        space, bounds = named_space(self.ctx, ("start",), ("q", "k"), ("x", "y")), list[dict[str, int]]()
        for token, tile, block, start in zip("qk", "xy", (self.of.block_q, self.of.block_k), self._starts, strict=True):
            bounds.append({token: 1, "start": -start, tile: -block})
            bounds.append({token: -1, "start": start, tile: block, "1": block - 1})
        return isl.Map.from_basic_map(isl.BasicMap.universe(space).add_constraints(where_all(space, *bounds)))

    def _exist(self) -> isl.Set:
        """The tiles of tokens that exist. Rows are always below Nq."""
        length, stride = "Nq" if self.of.align_start else "Nk", self.relation.stride
        block_q, block_k, layout, (start, k_start) = self.of.block_q, self.of.block_k, self.of.layout, self._starts
        if not layout.plain:
            return self._set(
                f"[Nq, Nk, start, residue] -> {{ [x, y] : x >= 0 and y >= 0 and Nk >= 1 and Nq >= 1 and "
                f"{layout.q.text(f'{block_q} x + {start} start')} < {length} and "
                f"{stride} * ({layout.k.text(f'{block_k} y + {k_start} start')}) < Nk }}"
            )
        space = named_space(self.ctx, ("Nq", "Nk", "start", "residue"), ("x", "y"))
        bounds = where_all(
            space, {"x": 1}, {length: 1, "x": -block_q, "start": -start, "1": -1},
            {"y": 1}, {"Nk": 1, "y": -stride * block_k, "start": -stride * k_start, "1": -1},
            {"Nk": 1, "1": -1}, {"Nq": 1, "1": -1},
        )  # fmt: skip
        return isl.Set.from_basic_set(isl.BasicSet.universe(space).add_constraints(bounds))

    @property
    def _starts(self) -> tuple[int, int]:
        """Whether tiles of queries and of keys count from `start`: the position of row 0, or in a layout its index; of
        shifted tiles that of the first row and key."""
        return int(not self.of.align_start), int(self.of.shifted)

    @functools.cached_property
    def reach(self) -> isl.Set:
        """What a full tile has to hold: a key tile all its keys below Nk; a query tile (transposed) has no such duty,
        since the rows that do not exist are zero where the kernel reads them."""
        return self._set("{ [q, k] }" if self.of.shifted else "{ [q, k] : k >= 0 }")

    def touched(self, budget: Budget) -> isl.Set:
        """The tiles that exist and have a pair, put plainly; all that exist where that is too hard."""

        def touched() -> isl.Set:
            found = self._in_quotients(self._some(self.relation.pairs).apply(self.tiles))
            quotients = sum(part.dim(isl.dim_type.div) for part in found.get_basic_sets())
            plain = found if quotients <= FEW_QUOTIENTS else found.gist(self.existing)
            return plain.intersect(self.existing).coalesce()

        try:
            return budget.bounded(self.ctx, touched, EFFORT // 2)
        except TooHard:
            return self.existing

    def some_touched(self) -> isl.Set:
        """The same, as they come."""

        def touched() -> isl.Set:
            return self._some(self.relation.pairs).apply(self.tiles).intersect(self.existing)

        try:
            return self.of.budget().bounded(self.ctx, touched, EFFORT // 2)
        except TooHard:
            return self.existing

    def split(self, touched: isl.Set, budget: Budget) -> tuple[isl.Set, isl.Set]:
        """The full tiles of those touched, and the partial ones. Raises TooHard."""
        split = self._full if len(self.known) < MAX_KNOWN else self._full_by_parts

        def both() -> tuple[isl.Set, isl.Set]:
            full = split(touched)
            return full, touched.subtract(full).coalesce()

        few = self.relation.pairs.n_basic_set() <= MANY_PARTS
        return budget.bounded(self.ctx, both, SPLIT_EFFORT if few else SPLIT_EFFORT // 2)

    def _full(self, touched: isl.Set) -> isl.Set:
        missing = self.reach.subtract(self.relation.pairs)
        holes = self._some(missing).apply(self.tiles).coalesce()
        return self._existing(touched.subtract(holes))

    def _full_by_parts(self, touched: isl.Set) -> isl.Set:
        """The same, but tiles that only several parts of the pattern fill together are partial."""
        full = isl.Set.empty(touched.get_space())
        for part in self._certain().get_basic_sets():
            holes = self.reach.subtract(isl.Set.from_basic_set(part)).apply(self.tiles).coalesce()
            full = full.union(self._existing(touched.subtract(holes)))
        return self._existing(full)

    def _some(self, pairs: isl.Set) -> isl.Set:
        """The pairs that are in a set for some truth of the data that a tile does not rule out."""
        for name, (may_hold, may_fail) in self.known.items():
            if pairs.find_dim_by_name(isl.dim_type.param, name) < 0:
                continue
            holds, fails = where_param(pairs, name, 1), where_param(pairs, name, 0)
            # Where it only adds pairs, what is there without it needs no bound.
            pairs = (fails if fails.is_subset(holds) else fails.intersect(may_fail)).union(
                holds if holds.is_subset(fails) else holds.intersect(may_hold)
            ).coalesce()  # fmt: skip
        return self.relation.project_atoms(pairs)

    def _certain(self) -> isl.Set:
        """The pairs of the relation, whatever the truth of the data, as far as a tile knows it."""
        pairs = self.relation.pairs
        for name in self.relation.atoms:
            holds, fails = where_param(pairs, name, 1), where_param(pairs, name, 0)
            pairs = holds.intersect(fails)
            if name in self.known:
                may_hold, may_fail = self.known[name]
                pairs = pairs.union(holds.subtract(may_fail)).union(fails.subtract(may_hold))
            pairs = pairs.coalesce()
        return pairs

    def _in_quotients(self, tiles: isl.Set) -> isl.Set:
        # Quotients come out in fewer pieces by themselves than while tiles are simplified; hard ones take longer.
        with suppress(TooHard):
            tiles = bounded(self.ctx, tiles.compute_divs, PIECE_EFFORT)
        return tiles.coalesce()

    def _existing(self, tiles: isl.Set) -> isl.Set:
        """The tiles that exist, written as plainly as that allows."""
        return self._in_quotients(tiles).gist(self.existing).intersect(self.existing).coalesce()
