"""Patterns put so that conditions on data which mean the same, or the opposite, are one scalar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from attndsl.derivation import Random, Segment
from attndsl.members import Placed, Runs
from attndsl.program import (
    Choose,
    Coarsen,
    Compare,
    Complement,
    Const,
    Inter,
    Minus,
    On,
    Permuted,
    Scalar,
    Selected,
    Set,
    Type,
    Unary,
    Union,
    Where,
    rebuild,
)  # fmt: skip
from attndsl.simplify import fold


def canonical(pattern: Set) -> Set:
    """The same set, its integer comparisons written with `==` and `<` alone, constants on the right.

    So conditions on data that mean the same, or the opposite, become one scalar. Constants are folded first, which
    parameters leave many of; a condition that is one only then stays what its author wrote.
    """
    return map_scalars(pattern, _put_canonically)


def _put_canonically(e: Scalar) -> Scalar:
    folded = fold(e)
    return rebuild(e if isinstance(folded, Const) else folded, _canonical)


def _canonical(e: Scalar) -> Scalar:
    match e:
        case Compare(left=a, right=b) if Type.FLOAT in (a.type, b.type):
            return e
        case Compare(op="!=", left=a, right=b):
            return Unary("not", _equal(a, b))
        case Compare(op="==", left=a, right=b):
            return _equal(a, b)
        case Compare(op="<", left=a, right=b):
            return _less(a, b)
        case Compare(op=">", left=a, right=b):
            return _less(b, a)
        case Compare(op="<=", left=a, right=b):
            return Unary("not", _less(b, a))
        case Compare(op=">=", left=a, right=b):
            return Unary("not", _less(a, b))
        case _:
            return e


def _equal(a: Scalar, b: Scalar) -> Scalar:
    match a, b:
        case Unary(op="not", operand=x), Unary(op="not", operand=y):
            a, b = x, y
        case _:
            pass
    if isinstance(a, Const) or (not isinstance(b, Const) and repr(b) < repr(a)):
        a, b = b, a
    return Compare("==", a, b)


def _less(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, Const) and a.type is Type.INT:
        return Unary("not", Compare("<", b, Const(int(a.value) + 1)))
    return Compare("<", a, b)


def map_scalars(pattern: Set, change: Callable[[Scalar], Scalar]) -> Set:
    """The set with `change` applied to every scalar written in it."""

    def inner(p: Set) -> Set:
        return map_scalars(p, change)

    match pattern:
        case Where(cond=cond):
            return replace(pattern, cond=change(cond))
        case Union(parts=parts) | Inter(parts=parts):
            return replace(pattern, parts=tuple(map(inner, parts)))
        case Minus(left=left, right=right):
            return replace(pattern, left=inner(left), right=inner(right))
        case Complement(operand=operand) | Coarsen(operand=operand):
            return replace(pattern, operand=inner(operand))
        case Choose(cond=cond, then=then, other=other):
            return replace(pattern, cond=change(cond), then=inner(then), other=inner(other))
        case On(operand=operand, place=place):
            if isinstance(place, Permuted | Segment):
                place = replace(place, lead=tuple(map(change, place.lead)))
            return replace(pattern, operand=inner(operand), place=place)
        case Random(seed=seed, among=among):
            return replace(pattern, seed=change(seed), among=inner(among))
        case Selected(index=index, members=members):
            if isinstance(members, Placed | Runs):
                members = replace(members, lead=tuple(map(change, members.lead)))
            if isinstance(members, Runs) and members.order is not None:
                order = replace(members.order, lead=tuple(map(change, members.order.lead)))
                members = replace(members, order=order)
            return replace(pattern, index=tuple(map(change, index)), members=members)
        case _:
            assert_never(pattern)


def has_coarsen(pattern: Set) -> bool:
    """Whether somewhere in it a set is coarsened, or drawn from: a pair then depends on others."""
    match pattern:
        case Coarsen() | Random():
            return True
        case Where() | Selected():
            return False
        case Union(parts=parts) | Inter(parts=parts):
            return any(map(has_coarsen, parts))
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            return has_coarsen(a) or has_coarsen(b)
        case Complement(operand=operand) | On(operand=operand):
            return has_coarsen(operand)
        case _:
            assert_never(pattern)
