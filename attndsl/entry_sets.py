"""Which rows see an extent that data tells, in closed form of its ends: for patterns that read no data of tokens."""

from __future__ import annotations

from attndsl.effort import TooHard, bounded
from attndsl.isl_sets import involves_param
from attndsl.program import Binary, Const, Program, Scalar, Set, Var, reads, rebuild
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering

# The ends of an extent, in what `seen_from` says of one.
FIRST, LAST = Var("i"), Var("j")


def seen_whole(program: Program, pattern: Set, first: Scalar, last: Scalar) -> Scalar | None:
    """The condition for a pattern of a derived program to hold for every token from `first` to `last`; None where data
    of tokens decides, or it is too hard to say."""
    lowering = Lowering(program)
    extent = lowering.map("[first, last] -> { [q, k] -> [q, j] : first <= k <= last }")
    try:
        written = lowering.lower(pattern, lowering.here)
        if any(reads(x, "k") and involves_param(written, name) for name, x in lowering.atoms.items()):
            return None
        seen = bounded(lowering.ctx, lambda: written.complement().apply(extent).complement().coalesce())
        names = {**lowering.uniform, **lowering.atoms, "first": first, "last": last}
        return bounded(lowering.ctx, lambda: condition(seen, lowering.context(), names))
    except TooHard:
        return None


def seen_from(program: Program, pattern: Set, size: int | None, unit: int) -> Scalar | None:
    """The condition for a pattern of a derived program to hold for the `size` tokens from `FIRST` on; without a size,
    for some token from there to `LAST`, which does not lie before it. None as in `seen_whole`.

    unit: extents lie in blocks of so many tokens (0: in none), so data of blocks that hold these whole is one truth.
    """
    lowering = Lowering(program)
    end = "k <= last" if size is None else f"k < first + {size}"
    extent = lowering.map(f"[first, last] -> {{ [q, k] -> [q, j] : first <= k and {end} }}")
    try:
        written = lowering.lower(pattern, lowering.here)
        atoms = dict(lowering.atoms)
        for name, x in lowering.atoms.items():
            if reads(x, "k") and involves_param(written, name):
                known = _of_blocks(x, unit)
                if known is None:
                    return None
                atoms[name] = known
        names = {**lowering.uniform, **atoms, "first": FIRST, "last": LAST}
        context = lowering.context().intersect(lowering.set("[first, last] -> { : 0 <= first <= last }").params())
        if size is None:
            seen = bounded(lowering.ctx, lambda: written.apply(extent).coalesce())
        else:
            seen = bounded(lowering.ctx, lambda: written.complement().apply(extent).complement().coalesce())
        return bounded(lowering.ctx, lambda: condition(seen, context, names))
    except TooHard:
        return None


def _of_blocks(e: Scalar, unit: int) -> Scalar | None:
    """A scalar that reads k as k // m only, m a multiple of the unit, at the first token of an extent."""

    def step(x: Scalar) -> Scalar:
        match x:
            case Binary(op="//", left=Var(name="k"), right=Const(value=int(m))) if unit and m % unit == 0:
                return Binary("//", FIRST, Const(m))
            case _:
                return x

    found = rebuild(e, step)
    return None if reads(found, "k") else found
