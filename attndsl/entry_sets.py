"""What integer sets say of patterns over extents: which rows see one that data tells, in closed form of its ends, where
no data of tokens is read; and whether what data says is one truth for all of an extent."""

from __future__ import annotations

from typing import Any

from attndsl.branches import Queries, View
from attndsl.effort import TooHard, bounded
from attndsl.isl_sets import involves_param
from attndsl.program import Binary, Const, Program, Scalar, Set, Var, reads, rebuild, substitute
from attndsl.quasi_affine import condition
from attndsl.relation import POSITION_BITS, Lowering

# The ends of an extent, in what `seen_from` says of one.
FIRST, LAST = Var("i"), Var("j")


def seen_whole(program: Program, pattern: Set, first: Scalar, last: Scalar, queries: int = 1) -> Scalar | None:
    """The condition for a pattern of a derived program to hold for every token from `first` to `last`; None where data
    of tokens decides, or it is too hard to say. queries: at each of the row's class of so many."""
    lowering = Lowering(program)
    extent = lowering.map("[first, last] -> { [q, k] -> [q, j] : first <= k <= last }")
    try:
        written = lowering.lower(pattern, lowering.here)
        read = [x for name, x in lowering.atoms.items() if involves_param(written, name)]
        if any(reads(x, "k") or not of_classes(x, queries) for x in read):
            return None
        seen = bounded(lowering.ctx, lambda: written.complement().apply(extent).complement().coalesce())
        names = {**lowering.uniform, **lowering.atoms, "first": first, "last": last}
        seen = _by_classes(seen, lowering, queries)
        return bounded(lowering.ctx, lambda: condition(_of_positions(seen, lowering), lowering.context(), names))
    except TooHard:
        return None


def seen_from(program: Program, pattern: Set, size: int | None, unit: int, queries: int = 1) -> Scalar | None:
    """The condition for a pattern of a derived program to hold for the `size` tokens from `FIRST` on; without a size,
    for some token from there to `LAST`, which does not lie before it. None, queries: as in `seen_whole`.

    unit: extents lie in blocks of so many tokens (0: in none), so data of blocks that hold these whole is one truth.
    """
    lowering = Lowering(program)
    end = "k <= last" if size is None else f"k < first + {size}"
    extent = lowering.map(f"[first, last] -> {{ [q, k] -> [q, j] : first <= k and {end} }}")
    try:
        written = lowering.lower(pattern, lowering.here)
        atoms = dict(lowering.atoms)
        for name, x in lowering.atoms.items():
            if not involves_param(written, name):
                continue
            if not of_classes(x, queries):
                return None
            if reads(x, "k"):
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
        seen = _by_classes(seen, lowering, queries)
        return bounded(lowering.ctx, lambda: condition(_of_positions(seen, lowering), context, names))
    except TooHard:
        return None


def by_classes(lowering: Lowering, size: int) -> Any:
    """The map of each query to all of its class of so many."""
    own = f"{size} i <= q < {size} i + {size} and {size} i <= p < {size} i + {size}"
    return lowering.map(f"{{ [q, j] -> [p, j] : exists i : {own} }}")


def _by_classes(seen: Any, lowering: Lowering, size: int) -> Any:
    """What each query of a class sees."""
    if size == 1:
        return seen
    alike = by_classes(lowering, size)
    return bounded(lowering.ctx, lambda: seen.complement().apply(alike).complement().coalesce())


def _of_positions(seen: Any, lowering: Lowering) -> Any:
    """Without what only rows past every position see: it would be written with numbers past 32 bits."""
    last = (1 << POSITION_BITS) - 1
    there = lowering.set(f"[first, last] -> {{ [q, j] : q <= {last} and 0 <= first <= last <= {last} }}")
    return seen.intersect(there).coalesce().gist(there)


def undecided(program: Program, pattern: Set, view: View, queries: Queries | None) -> bool:
    """Whether data whose truth is not one for all tokens of an entry, or for all queries of a class, decides which
    entries see a pattern of a derived program."""
    lowering = Lowering(program)
    try:
        written = lowering.lower(pattern, lowering.here)
    except TooHard:
        return True
    return of_extents(lowering, written, view, queries) is None


def of_extents(lowering: Lowering, written: Any, view: View, queries: Queries | None) -> dict[str, Scalar] | None:
    """The data atoms of a set that read keys, each as one truth for all of an entry k; None where one is not, or not
    one for all queries of a class."""
    found = dict[str, Scalar]()
    for name, scalar in lowering.atoms.items():
        if not involves_param(written, name):
            continue
        if queries is not None and not of_classes(scalar, queries.size):
            return None
        # A key that is an entry: what is read is of that.
        if not reads(scalar, "k") or view.size == view.stride == 1:
            continue
        # Data of blocks that hold whole extents is one truth for each of these; a truth of each key is not.
        known = at_entries(scalar, view.stride) if view.size <= view.stride else None
        if known is None:
            return None
        found[name] = known
    return found


def at_entries(e: Scalar, stride: int) -> Scalar | None:
    """A scalar that reads k as k // m only, m a multiple of the stride, in terms of the entry k; None for another.

    >>> from attndsl.notation import scalar_text
    >>> scalar_text(at_entries(Binary("//", Var("k"), Const(64)), 16))
    'k // 4'
    """

    def step(x: Scalar) -> Scalar:
        match x:
            case Binary(op="//", left=Var(name="k"), right=Const(value=int(m))) if m % stride == 0:
                return Var("j") if m == stride else Binary("//", Var("j"), Const(m // stride))
            case _:
                return x

    found = rebuild(e, step)
    return None if reads(found, "k") else substitute(found, {"j": Var("k")})


def of_classes(e: Scalar, size: int) -> bool:
    """Whether a scalar reads q as q // m only, m a multiple of the size, so that it is one for each class."""
    if size == 1:
        return True

    def step(x: Scalar) -> Scalar:
        match x:
            case Binary(op="//", left=Var(name="q"), right=Const(value=int(m))) if m % size == 0:
                return Const(0)
            case _:
                return x

    return not reads(rebuild(e, step), "q")


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
