"""Integer expressions in a normal form: sums of multiples of terms, with like terms gathered.

isl writes ceil(x / 64) as x - (63 x) // 64 and the number of tiles from a to b as b - a + 1. Here whole multiples
leave quotients, so that no product outgrows 32 bits, and what cancels goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from attndsl.program import Binary, Call, Compare, Const, If, Logic, Scalar, Type, Unary, Var
from attndsl.simplify import fold, negated, specialise


@dataclass(slots=True)
class _Sum:
    """constant + the sum of coefficient * term."""

    constant: int = 0
    terms: dict[Scalar, int] = field(default_factory=dict)

    def add(self, other: _Sum, factor: int = 1) -> None:
        self.constant += factor * other.constant
        for term, coefficient in other.terms.items():
            self.terms[term] = self.terms.get(term, 0) + factor * coefficient
            if self.terms[term] == 0:
                del self.terms[term]


def normalise(e: Scalar) -> Scalar:
    """The integer or boolean scalar, its sums and quotients in normal form; its value is unchanged."""
    return _Normaliser().scalar(e)


def plainly(found: Iterable[Scalar], sizes: Mapping[str, int] = {}) -> list[Scalar]:
    """Scalars with H, G, D, Dv (those in `sizes`) put in, in normal form and folded: what they share, once."""
    put_in, normaliser, folded = dict[int, Scalar](), _Normaliser(), dict[int, Scalar]()
    # All of them stay while memos know them by identity.
    known = [specialise(e, sizes, put_in) for e in found]
    normal = [normaliser.scalar(e) for e in known]
    return [fold(e, folded) for e in normal]


def terms(e: Scalar) -> tuple[int, dict[Scalar, int]]:
    """The integer scalar as a constant and multiples of terms that are no sums: the terms with their factors."""
    found = _Normaliser().sum(e)
    return found.constant, found.terms


def total(constant: int, terms: dict[Scalar, int]) -> Scalar:
    """The sum of a constant and of multiples of terms, as a scalar."""
    return _write(_Sum(constant, terms))


class _Normaliser:
    """Normalises expressions whose nodes are shared: each once."""

    def __init__(self) -> None:
        self.memo: dict[int, Scalar] = {}

    def scalar(self, e: Scalar) -> Scalar:
        found = self.memo.get(id(e))
        if found is None:
            found = self.memo[id(e)] = self.condition(e) if e.type is Type.BOOL else _write(self.sum(e))
        return found

    def sum(self, e: Scalar) -> _Sum:
        match e:
            case Const(value=int(value)):
                return _Sum(value)
            case Var():
                return _Sum(0, {e: 1})
            case Unary(op="-", operand=x):
                found = _Sum()
                found.add(self.sum(x), -1)
                return found
            case Binary(op="+" | "-" as op, left=a, right=b):
                found = self.sum(a)
                found.add(self.sum(b), 1 if op == "+" else -1)
                return found
            case Binary(op="*", left=a, right=b):
                left, right = self.sum(a), self.sum(b)
                if left.terms and right.terms:
                    return _Sum(0, {Binary("*", _write(left), _write(right)): 1})
                if left.terms:
                    left, right = right, left
                found = _Sum()
                found.add(right, left.constant)
                return found
            case Binary(op="//", left=a, right=Const(value=int(n))):
                return _quotient(self.sum(a), n)
            case Binary(op="%", left=a, right=Const(value=int(n))):
                # Multiples of n do not matter.
                left = self.sum(a)
                rest = _Sum(left.constant % n, {t: r for t, c in left.terms.items() if (r := _residue(c, n))})
                return _Sum(rest.constant % n) if not rest.terms else _Sum(0, {Binary("%", _write(rest), Const(n)): 1})
            case If(cond=c, then=a, other=b):
                cond, then, otherwise = self.scalar(c), self.scalar(a), self.scalar(b)
                return self.sum(then) if then == otherwise else _Sum(0, {If(cond, then, otherwise): 1})
            case Call(function=f, args=args) if e.type is Type.INT:
                return _Sum(0, {Call(f, tuple(self.scalar(x) for x in args)): 1})
            case _:
                return _Sum(0, {e: 1})

    def condition(self, e: Scalar) -> Scalar:
        match e:
            case Compare(op=op, left=a, right=b) if a.type is b.type is Type.INT:
                # All terms on the side where they are positive, the constant on the right.
                difference = self.sum(a)
                difference.add(self.sum(b), -1)
                positive = _Sum(0, {t: c for t, c in difference.terms.items() if c > 0})
                negative = _Sum(-difference.constant, {t: -c for t, c in difference.terms.items() if c < 0})
                return Compare(op, _write(positive), _write(negative))
            case Logic(op=op, operands=xs):
                return Logic(op, tuple(self.condition(x) for x in xs))
            case Unary(op="not", operand=x):
                return negated(self.condition(x))
            case _:
                return e


def _quotient(x: _Sum, n: int) -> _Sum:
    """(constant + sum) // n, whole multiples of n taken out."""
    whole, rest = _Sum(x.constant // n), _Sum(x.constant % n)
    for term, coefficient in x.terms.items():
        residue = _residue(coefficient, n)
        if (coefficient - residue) // n:
            whole.terms[term] = (coefficient - residue) // n
        if residue:
            rest.terms[term] = residue
    if rest.terms:
        whole.add(_Sum(0, {Binary("//", _write(rest), Const(n)): 1}))
    return whole


def _residue(coefficient: int, n: int) -> int:
    """The residue nearest to 0, positive where two are."""
    residue = coefficient % n
    return residue - n if 2 * residue > n else residue


def _write(x: _Sum) -> Scalar:
    positive = [(t, c) for t, c in x.terms.items() if c > 0]
    negative = [(t, -c) for t, c in x.terms.items() if c < 0]
    written: Scalar | None = None
    for term, coefficient in positive:
        part = term if coefficient == 1 else Binary("*", Const(coefficient), term)
        written = part if written is None else Binary("+", written, part)
    constant = x.constant
    if written is None and (constant or not negative):
        written, constant = Const(constant), 0
    for term, coefficient in negative:
        part = term if coefficient == 1 else Binary("*", Const(coefficient), term)
        written = Unary("-", part) if written is None else Binary("-", written, part)
    assert written is not None
    if constant:
        written = Binary("+" if constant > 0 else "-", written, Const(abs(constant)))
    return written
