"""Which rows see an extent that data tells, in closed form of its ends: for patterns that read no data of tokens."""

from __future__ import annotations

from attndsl.effort import TooHard, bounded
from attndsl.program import Program, Scalar, Set, reads
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering


def seen_whole(program: Program, pattern: Set, first: Scalar, last: Scalar) -> Scalar | None:
    """The condition for a pattern of a derived program to hold for every token from `first` to `last`; None where data
    of tokens decides, or it is too hard to say."""
    lowering = Lowering(program)
    extent = lowering.map("[first, last] -> { [q, k] -> [q, j] : first <= k <= last }")
    try:
        written = lowering.lower(pattern, lowering.here)
        if any(reads(x, "k") and lowering.involves(written, name) for name, x in lowering.atoms.items()):
            return None
        seen = bounded(lowering.ctx, lambda: written.complement().apply(extent).complement().coalesce())
        names = {**lowering.uniform, **lowering.atoms, "first": first, "last": last}
        return bounded(lowering.ctx, lambda: condition(seen, lowering.context(), names))
    except TooHard:
        return None
