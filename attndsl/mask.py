"""The mask: under which condition a pair of a visited tile is allowed."""

from __future__ import annotations

from contextlib import suppress

from attndsl.cuts import by_cuts
from attndsl.derivation import Cut
from attndsl.effort import TooHard, bounded, remembered
from attndsl.isl_sets import implied
from attndsl.mask_cost import PAIR, both_cost, pair_cost
from attndsl.one_sided import folded
from attndsl.program import Compare, Const, Logic, Program, Read, Scalar, Var, reads
from attndsl.quasi_affine import comparisons, condition
from attndsl.relation import Lowering, Relation
from attndsl.simplify import fold, specialise

# What a comparison that reads the pair costs at least.
COMPARISON = 2

IN_RANGE = Compare("<", Var("k"), Var("Nk"))


def written_condition(lowering: Lowering, sizes: dict[str, int]) -> Scalar:
    """The pattern as its author wrote it, as a condition that no key past the last one meets, less what is redundant,
    with the sizes of a call put in."""
    return _written_condition(lowering, tuple(sizes.items()))


@remembered(64)
def _written_condition(lowering: Lowering, sizes: tuple[tuple[str, int], ...]) -> Scalar:
    """Once for the kernels of a program."""
    program = lowering.program
    written = fold(lowering.predicate(program.branch.pattern))
    try:
        written = bounded(lowering.ctx, lambda: without_redundant(lowering, written))
    except TooHard:
        written = fold(Logic("and", (written, IN_RANGE)))
    return specialise(written, dict(sizes))


def without_redundant(lowering: Lowering, cond: Scalar) -> Scalar:
    """The condition and `k < Nk`, less those of its conjuncts that the others imply for existing rows.

    The last tile reaches past the last key, so `k < Nk` goes only where what is kept implies it.
    """
    existing = lowering.set("[Nq] -> { [q, k] : q < Nq and 0 <= k }").intersect_params(lowering.context())
    if not lowering.program.align_start:
        existing = existing.intersect_params(lowering.set("[Nq, Nk] -> { : Nq = Nk }"))
    conjuncts = cond.operands if isinstance(cond, Logic) and cond.op == "and" else (cond,)
    kept = [x for x in conjuncts if x != IN_RANGE and x != Const(True)] + [IN_RANGE]
    sets = {x: lowering.holds(x, lowering.here) for x in kept}
    # The author's own conditions stay where either would do.
    for x in (IN_RANGE, *kept[:-1]):
        if implied(sets[x], existing, [sets[y] for y in kept if y != x]):
            kept.remove(x)
    return kept[0] if len(kept) == 1 else Logic("and", tuple(kept))


def pair_mask(relation: Relation, written: Scalar, apart: bool = False, folds: Program | None = None) -> Scalar | None:
    """The condition for a pair of a visited tile, None where it always holds.

    The cheaper of the pattern as its author wrote it (`written_condition`) and as the integer sets simplified it.
    apart: what reads one of the pair's tokens is computed for each row and each key, and costs next to nothing. folds:
    the program, where such conditions go into what is compared (`one_sided.py`).
    """
    candidates = [written]
    if not relation.atoms and COMPARISON * comparisons(relation.pairs) <= pair_cost(written):
        with suppress(TooHard):
            simplified = bounded(
                relation.pairs.get_ctx(), lambda: condition(relation.pairs, relation.context, relation.uniform)
            )
            candidates.append(fold(simplified))
    if folds is not None:
        candidates = [folded(e, folds) for e in candidates]
    return shaped(min(candidates, key=lambda e: (both_cost(e), pair_cost(e)) if apart else (pair_cost(e),)))


def mask_by_cuts(cond: Scalar, program: Program, owner: str, relation: Relation) -> Scalar:
    """A condition on the pairs of a relation as kernels that own rows (`owner` q) or keys (k) test it fastest."""
    if not any(isinstance(decl.derivation, Cut) for decl in program.inputs):
        return cond
    return by_cuts(cond, program, owner, relation.orders())


def from_first_key(cond: Scalar | None, program: Program) -> Scalar:
    """A mask that no key before the first one meets either: the ends of intervals all lie after it."""
    conjuncts = cond.operands if isinstance(cond, Logic) and cond.op == "and" else () if cond is None else (cond,)
    for x in conjuncts:
        match x:
            case Compare(op=">=" | ">", left=Var(name="k"), right=Read(input=name)):
                if isinstance(program.input(name).derivation, Cut):
                    assert cond is not None
                    return cond
    return fold(Logic("and", (*conjuncts, Compare(">=", Var("k"), Const(0)))))


def shaped(cond: Scalar) -> Scalar | None:
    """None for a condition that always holds. One that does not read the pair must have a tile's shape all the same."""
    if cond == Const(True):
        return None
    if cond == Const(False):
        return Compare("<", Var("k"), Const(0))
    return cond if reads(cond, *PAIR) else Logic("and", (cond, Compare(">=", Var("k"), Const(0))))
