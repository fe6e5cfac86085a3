"""Coarsened sets of which a condition is the same for all pairs of a block: it stands beside what is coarsened."""

from __future__ import annotations

from attndsl.program import Coarse, Coarsen, Inter, Set, Union, Where
from attndsl.scalar import Binary, Const, Scalar, Var, children


def coarsened(pattern: Set, rows: int, keys: int) -> Set:
    """The pairs of blocks of so many rows and keys that hold a pair of a set, asked of their first row and key.

    What reads data of blocks (`fixed[k // 64]` for members of 64 keys) has one answer for a block. Left inside it would
    be looked up for each pair of the call.
    """
    if rows == keys == 1:
        return pattern
    beside = tuple(x for x in _conjuncts(pattern) if _constant(x, rows, keys))
    if not beside:
        return Coarsen(pattern, rows, keys, Coarse.ANY)
    rest = tuple(x for x in _conjuncts(pattern) if not _constant(x, rows, keys))
    inside: Set = Inter(rest) if len(rest) > 1 else rest[0] if rest else Where(Const(True))
    return Inter((Coarsen(inside, rows, keys, Coarse.ANY), *beside))


def _conjuncts(pattern: Set) -> tuple[Set, ...]:
    if isinstance(pattern, Inter):
        return tuple(x for part in pattern.parts for x in _conjuncts(part))
    return (pattern,)


def _constant(pattern: Set, rows: int, keys: int) -> bool:
    match pattern:
        case Where(cond=cond):
            return _of_blocks(cond, rows, keys)
        case Union(parts=parts) | Inter(parts=parts):
            return all(_constant(x, rows, keys) for x in parts)
        case _:
            return False


def _of_blocks(e: Scalar, rows: int, keys: int) -> bool:
    """Whether positions are read by their blocks alone, or by multiples of these."""
    match e:
        case Binary(op="//", left=Var(name="q"), right=Const(value=int(size))) if size > 0 and size % rows == 0:
            return True
        case Binary(op="//", left=Var(name="k"), right=Const(value=int(size))) if size > 0 and size % keys == 0:
            return True
        case Var(name="q"):
            return rows == 1
        case Var(name="k"):
            return keys == 1
        case _:
            return all(_of_blocks(x, rows, keys) for x in children(e))
