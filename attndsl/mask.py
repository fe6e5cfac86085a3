"""The mask: under which condition a pair of a visited tile is allowed."""

from __future__ import annotations

from contextlib import suppress

from attndsl.effort import TooHard, bounded
from attndsl.program import Binary, Compare, Const, Logic, Read, Scalar, Table, Var, children, reads
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering, Relation
from attndsl.simplify import fold, specialise

# A pair's tokens, and their indices in a layout.
PAIR = ("q", "k", "i", "j")


def written_condition(lowering: Lowering, sizes: dict[str, int]) -> Scalar:
    """The pattern as its author wrote it, as a condition, less what is redundant, with the sizes of a call put in."""
    program = lowering.program
    written = fold(lowering.predicate(program.branch.pattern))
    with suppress(TooHard):  # … in which case the condition stays as it was written.
        written = bounded(lowering.ctx, lambda: without_redundant(lowering, written))
    return specialise(written, sizes)


def without_redundant(lowering: Lowering, cond: Scalar) -> Scalar:
    """The condition less those of its conjuncts that the others imply for existing pairs."""
    if not isinstance(cond, Logic) or cond.op != "and":
        return cond
    existing = lowering.set("[Nq, Nk] -> { [q, k] : q < Nq and 0 <= k < Nk }").intersect_params(lowering.context())
    sets = {x: lowering.holds(x, lowering.here) for x in cond.operands}
    kept = list(cond.operands)
    for x in cond.operands:
        left = existing
        for y in kept:
            left = left if y == x else left.intersect(sets[y])
        if len(kept) > 1 and left.is_subset(sets[x]):
            kept.remove(x)
    return kept[0] if len(kept) == 1 else Logic("and", tuple(kept))


def pair_mask(relation: Relation, written: Scalar) -> Scalar | None:
    """The condition for a pair of a visited tile, None where it always holds.

    The cheaper of the pattern as its author wrote it and as the integer sets simplified it.
    """
    in_range = Compare("<", Var("k"), Var("Nk"))
    candidates = [written if relation.keys_bounded else fold(Logic("and", (written, in_range)))]
    if not relation.atoms:
        candidates.append(fold(condition(relation.pairs, relation.context, relation.uniform)))
    return shaped(min(candidates, key=pair_cost))


def shaped(cond: Scalar) -> Scalar | None:
    """None for a condition that always holds. One that does not read the pair must have a tile's shape all the same."""
    if cond == Const(True):
        return None
    if cond == Const(False):
        return Compare("<", Var("k"), Const(0))
    return cond if reads(cond, *PAIR) else Logic("and", (cond, Compare(">=", Var("k"), Const(0))))


def pair_cost(e: Scalar) -> int:
    """Rough number of operations per pair: what does not read the pair is computed once."""
    costs: dict[int, int] = {}

    def cost(x: Scalar) -> int:
        if id(x) not in costs:
            costs[id(x)] = 0 if not reads(x, *PAIR) else _own_cost(x) + sum(cost(y) for y in children(x))
        return costs[id(x)]

    return cost(e)


def _own_cost(e: Scalar) -> int:
    match e:
        case Read() | Table():
            return 8
        case Binary(op="//" | "%"):
            return 4
        case _:
            return 1
