"""A pattern on a grid as disjoint products: sets that each read one axis, and what no axis decides alone.

    term ::= set along axis 0 & … & set along axis n & conditions on tokens

A neighbourhood is one term, rows and columns are two. In the coordinates of its axis a factor is a pattern of one
dimension like any other. What stands off the grid is a pattern of its own, of tokens in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from attndsl.coordinates import coordinate, on_grid
from attndsl.grid import Along, Grid
from attndsl.program import (
    Choose,
    Coarsen,
    Complement,
    Const,
    If,
    Inter,
    Logic,
    Minus,
    On,
    Scalar,
    Set,
    Unary,
    Union,
    Var,
    Where,
    reads,
    rebuild,
    substitute,
)  # fmt: skip
from attndsl.simplify import negated

# Terms of a pattern, and of what is left of one of them once others are taken away.
MAX_TERMS = 16

_Item = TypeVar("_Item")
_ALL, _NONE = Where(Const(True)), Where(Const(False))


class NoProduct(Exception):
    """The pattern has too many terms, or one that is no product."""


@dataclass(frozen=True, slots=True)
class Term:
    """factors: of each axis the sets that a pair is in, q and k their coordinates. uniform: conditions that read
    neither. tokens: conditions on a pair's tokens."""

    factors: tuple[tuple[Set, ...], ...]
    uniform: tuple[Scalar, ...] = ()
    tokens: tuple[Scalar, ...] = ()

    def along(self, axis: int) -> Set:
        """The set along an axis; what reads neither q nor k goes with the first."""
        parts = (*self.factors[axis], *(map(Where, self.uniform) if axis == 0 else ()))
        return Inter(parts) if len(parts) > 1 else parts[0] if parts else _ALL

    def joined(self, other: Term) -> Term:
        factors = tuple(_distinct(a + b) for a, b in zip(self.factors, other.factors, strict=True))
        return Term(factors, _distinct(self.uniform + other.uniform), _distinct(self.tokens + other.tokens))

    def parts(self) -> Iterator[Term]:
        """The conditions of which it is the intersection, one by one."""
        nothing = ((),) * len(self.factors)
        for axis, sets in enumerate(self.factors):
            for part in sets:
                yield Term((*nothing[:axis], (part,), *nothing[axis + 1 :]))
        yield from (Term(nothing, uniform=(e,)) for e in self.uniform)
        yield from (Term(nothing, tokens=(e,)) for e in self.tokens)

    def negation(self) -> Term:
        """The complement, of a term that is a single condition."""
        return Term(
            tuple(tuple(x.operand if isinstance(x, Complement) else Complement(x) for x in f) for f in self.factors),
            tuple(map(negated, self.uniform)),
            tuple(map(negated, self.tokens)),
        )


def products(pattern: Set, grid: Grid, predicate: Callable[[Set], Scalar]) -> tuple[Term, ...]:
    """The pairs of a pattern that lie on its grid, as terms that may overlap.

    `predicate`: a set of tokens as a condition. Raises NoProduct.
    """
    return _Terms(grid, predicate).of(pattern, False)


def apart(terms: tuple[Term, ...], empty: Callable[[Term], bool]) -> tuple[Term, ...]:
    """The same pairs as disjoint terms; `empty`: whether a term is known to hold no pair. Raises NoProduct."""
    found: list[Term] = []
    for term in terms:
        left = [term]
        for earlier in found:
            left = [rest for x in left for rest in _without(x, earlier, empty)]
            if len(left) > MAX_TERMS:
                raise NoProduct
        found += [x for x in left if not empty(x)]
        if len(found) > MAX_TERMS:
            raise NoProduct
    return tuple(found)


def _without(term: Term, other: Term, empty: Callable[[Term], bool]) -> Iterator[Term]:
    if empty(term.joined(other)):
        yield term
        return
    for part in other.parts():
        rest = term.joined(part.negation())
        if not empty(rest):
            yield rest
        term = term.joined(part)


def off_grid_part(pattern: Set, grid: Grid) -> Set:
    """The pairs of a pattern of which a token lies off the grid: sets along axes hold none of them."""
    off = Where(negated(on_grid(grid)))
    return _both(_off(pattern, Where(on_grid(grid)), off), off)


def _off(pattern: Set, on: Where, off: Where) -> Set:
    match pattern:
        case Where():
            return _NONE if pattern == on else _ALL if pattern == off else pattern
        case Union(parts=parts):
            kept = tuple(x for x in (_off(p, on, off) for p in parts) if x != _NONE)
            return kept[0] if len(kept) == 1 else Union(kept) if kept else _NONE
        case Inter(parts=parts):
            found = tuple(_off(p, on, off) for p in parts)
            return _NONE if _NONE in found else Inter(found)
        case Minus(left=a, right=b):
            left, right = _off(a, on, off), _off(b, on, off)
            return left if right == _NONE else Minus(left, right)
        case Complement(operand=p):
            inner = _off(p, on, off)
            return _ALL if inner == _NONE else _NONE if inner == _ALL else Complement(inner)
        case Choose(then=a, other=b):
            return replace(pattern, then=_off(a, on, off), other=_off(b, on, off))
        case On(place=Along()):
            return _NONE
        case _:
            return pattern


def _both(a: Set, b: Set) -> Set:
    return _NONE if a == _NONE else b if a == _ALL else Inter((a, b))


@dataclass(frozen=True, slots=True)
class _Terms:
    grid: Grid
    predicate: Callable[[Set], Scalar]

    def of(self, pattern: Set, negative: bool) -> tuple[Term, ...]:
        """The terms of a set, or of its complement."""
        match pattern:
            case Where(cond=cond):
                return self._condition(cond, negative)
            case Union(parts=parts):
                found = [self.of(p, negative) for p in parts]
                return self._all(found) if negative else self._any(found)
            case Inter(parts=parts):
                found = [self.of(p, negative) for p in parts]
                return self._any(found) if negative else self._all(found)
            case Minus(left=a, right=b):
                left, right = self.of(a, negative), self.of(b, not negative)
                return self._any([left, right]) if negative else self._all([left, right])
            case Complement(operand=p):
                return self.of(p, not negative)
            case Choose(cond=cond, then=a, other=b):
                then = self._all([self._condition(cond, False), self.of(a, negative)])
                return self._any([then, self._all([self._condition(cond, True), self.of(b, negative)])])
            case On(operand=p, place=Along(axis=axis)):
                return (self._factor(axis, Complement(p) if negative else p),)
            case On():
                cond = self.predicate(pattern)
                return (self._tokens(negated(cond) if negative else cond),)
            case Coarsen():
                raise NoProduct
            case _:
                raise NoProduct

    def _any(self, alternatives: list[tuple[Term, ...]]) -> tuple[Term, ...]:
        found = _distinct(tuple(term for terms in alternatives for term in terms))
        if len(found) > MAX_TERMS:
            raise NoProduct
        return found

    def _all(self, conditions: list[tuple[Term, ...]]) -> tuple[Term, ...]:
        found: tuple[Term, ...] = (self._nothing,)
        for terms in conditions:
            found = _distinct(tuple(a.joined(b) for a, b in product(found, terms)))
            if len(found) > MAX_TERMS:
                raise NoProduct
        return found

    @property
    def _nothing(self) -> Term:
        return Term(((),) * len(self.grid.axes))

    def _factor(self, axis: int, part: Set) -> Term:
        nothing = self._nothing.factors
        return Term((*nothing[:axis], (part,), *nothing[axis + 1 :]))

    def _tokens(self, cond: Scalar) -> Term:
        return replace(self._nothing, tokens=(cond,))

    def _condition(self, cond: Scalar, negative: bool) -> tuple[Term, ...]:
        if cond == on_grid(self.grid) or cond == Const(True):
            return () if negative else (self._nothing,)
        if cond == negated(on_grid(self.grid)) or cond == Const(False):
            return (self._nothing,) if negative else ()
        match cond:
            case Logic(op=op, operands=xs):
                found = [self._condition(x, negative) for x in xs]
                return self._all(found) if (op == "and") != negative else self._any(found)
            case Unary(op="not", operand=x):
                return self._condition(x, not negative)
            case If(cond=c, then=a, other=b):
                then = self._all([self._condition(c, False), self._condition(a, negative)])
                return self._any([then, self._all([self._condition(c, True), self._condition(b, negative)])])
            case _:
                return (self._single(negated(cond) if negative else cond),)

    def _single(self, cond: Scalar) -> Term:
        if not reads(cond, "q", "k", "Nq", "Nk"):
            return replace(self._nothing, uniform=(cond,))
        for axis in range(len(self.grid.axes)):
            along = self._along(cond, axis)
            if not reads(along, "q", "k", "Nq", "Nk"):
                return self._factor(axis, Where(substitute(along, {"i": Var("q"), "j": Var("k")})))
        return self._tokens(cond)

    def _along(self, cond: Scalar, axis: int) -> Scalar:
        """The condition with i and j in the place of coordinates along an axis."""
        names = {coordinate(self.grid, axis, Var(x)): Var(y) for x, y in (("q", "i"), ("k", "j"))}
        return rebuild(cond, lambda e: names.get(e, e))


def _distinct(items: tuple[_Item, ...]) -> tuple[_Item, ...]:
    return tuple(dict.fromkeys(items))
