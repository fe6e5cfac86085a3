"""Which gradients are ahead on Hopper: those made in one pass over key tiles, or in two by the portable kernels.

A model of both is compared at a call's own lengths, by counts that the plan of one pass gives: of its key tiles, of
what visits them, and of what visits the one that is visited most, which a program goes over by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attndsl.plan import BackwardPlan
from attndsl.program import CallShape
from attndsl.tiling import key_visits


@dataclass(frozen=True, slots=True)
class _Cost:
    """Microseconds of an H100, fitted to calls of RESULTS.md: of a call, and of one multiprocessor for a tile of a
    query head's rows, one of a key head's keys, one of these again for each further query head that shares them, and
    one of their pairs, full or partial; `alone` for these where they are of one program that others have ended before.
    """

    call: float
    rows: float
    keys: float
    shared: float
    full: float
    partial: float
    full_alone: float
    partial_alone: float

    def time(self, tiles: _Tiles) -> float:
        again, (full, partial) = tiles.group - 1, tiles.longest
        programs = (
            (self.keys + again * self.shared) * tiles.keys + self.full * tiles.full + self.partial * tiles.partial
        )
        alone = self.keys + again * self.shared + self.full_alone * full + self.partial_alone * partial
        # Programs do not end at once, but half of one apart.
        spread = programs / _MULTIPROCESSORS + programs / max(tiles.keys, 1) / 2
        return self.call + self.rows * tiles.rows / _MULTIPROCESSORS + max(spread, alone)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The tiles of a call in one pass: of rows, of keys, and of pairs, and of these what the longest program has; and
    how many query heads share keys."""

    rows: int
    keys: int
    full: float
    partial: float
    longest: tuple[float, float]
    group: int


# By head dimension. Both count the tiles of one pass: 128 keys, and 64 rows, or 128 at D = 64. Of 194 timed calls of
# eight patterns they choose the slower one for 18, which costs 0.3 % on average over all.
_ONE_PASS = {
    64: _Cost(1.9, 5.1, 7.7, 0.0, 2.55, 2.3, 2.4, 3.0),
    128: _Cost(2.4, 5.1, 5.9, 11.0, 2.12, 2.8, 2.26, 3.1),
}
_TWO_PASSES = {
    64: _Cost(6.8, 9.9, 1.7, 0.0, 3.03, 0.8, 1.74, 2.1),
    128: _Cost(6.9, 7.3, 4.6, 0.0, 2.7, 1.0, 1.14, 2.1),
}
_MULTIPROCESSORS = 132
# The share of all tiles that are taken to be visited where data decides it, and the rows of a key tile's partial ones.
_OF_DATA, _PARTIAL_ROWS = 1 / 5, 256


def prefers_two_passes(plan: BackwardPlan, shape: CallShape) -> bool:
    """Whether the portable kernels are predicted to be ahead of the plan of one pass for a call: where so few tiles are
    visited that what goes before and after them, the sums of dq above all, counts for more; and where heads share keys
    in small calls, since programs of one pass are few and long.

    Heads of dimensions that were not timed are not taken in one pass.
    """
    dim = plan.spec.dim
    if dim not in _ONE_PASS:
        return True
    tiles = _tiles(plan, shape)
    return _TWO_PASSES[dim].time(tiles) < _ONE_PASS[dim].time(tiles)


def _tiles(plan: BackwardPlan, shape: CallShape) -> _Tiles:
    of_rows, of_keys = -(-shape.rows // plan.key_tiling.block_q), -(-shape.k_len // plan.key_tiling.block_k)
    full, partial = (key_visits(plan, shape, None, runs) for runs in (plan.key_runs.full, plan.key_runs.partial))
    if full is None or partial is None:
        visits = np.full((shape.heads, of_keys), of_rows * _OF_DATA)
        partial = np.minimum(visits, _PARTIAL_ROWS // plan.key_tiling.block_q)
        full = visits - partial
    # A program goes over the rows of all heads that share its keys.
    group = shape.heads // shape.kv_heads
    full, partial = (x.reshape(shape.kv_heads, group, of_keys).sum(1) for x in (full, partial))
    place = int((full + partial).argmax()) if full.size else None
    longest = (0.0, 0.0) if place is None else (float(full.flat[place]), float(partial.flat[place]))
    batch = shape.batch
    return _Tiles(
        batch * shape.heads * of_rows, batch * shape.kv_heads * of_keys, batch * float(full.sum()),
        batch * float(partial.sum()), longest, group,
    )  # fmt: skip
