"""Integer expressions in a normal form: sums of multiples of terms, with like terms gathered.

isl writes ceil(x / 64) as x - (63 x) // 64 and the number of tiles from a to b as b - a + 1. Here whole multiples
leave quotients, so that no product outgrows 32 bits, and what cancels goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from attndsl.program import Binary, Call, Compare, Const, If, Logic, Memo, Scalar, Type, Unary, Var
from attndsl.simplify import folded_once, negated, specialise


@dataclass(slots=True)
class _Sum:
    """constant + the sum of coefficient * term."""

    constant: int = 0
    terms: dict[Scalar, int] = field(default_factory=dict)

    def add(self, other: _Sum, factor: int = 1) -> None:
        self.constant += factor * other.constant
        for term, coefficient in other.terms.items():
            self.add_term(term, factor * coefficient)

    def add_term(self, term: Scalar, factor: int) -> None:
        factor += self.terms.get(term, 0)
        if factor:
            self.terms[term] = factor
        else:
            self.terms.pop(term, None)


def normalise(e: Scalar) -> Scalar:
    """The integer or boolean scalar, its sums and quotients in normal form; its value is unchanged."""
    return _Normaliser().scalar(e)


def plainly(found: Iterable[Scalar], sizes: Mapping[str, int] = {}) -> list[Scalar]:
    """Scalars with H, G, D, Dv (those in `sizes`) put in, in normal form and folded: what they share, once."""
    plain = _Plain(sizes)
    return [plain.scalar(e) for e in found]


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
        self.memo: Memo = {}

    def scalar(self, e: Scalar) -> Scalar:
        found = self.memo.get(id(e))
        if found is None:
            found = self.memo[id(e)] = e, self.condition(e) if e.type is Type.BOOL else _write(self.sum(e))
        return found[1]

    def sum(self, e: Scalar) -> _Sum:
        found = _Sum()
        self.add(e, 1, found)
        return found

    def add(self, e: Scalar, factor: int, into: _Sum) -> None:
        """Adds a multiple of an integer to a sum."""
        match e:
            case Const(value=int(value)):
                into.constant += factor * value
            case Var():
                into.add_term(e, factor)
            case Binary(op="+" | "-" as op, left=a, right=b):
                self.add(a, factor, into)
                self.add(b, factor if op == "+" else -factor, into)
            case Binary(op="*", left=Const(value=int(n)), right=x) | Binary(op="*", left=x, right=Const(value=int(n))):
                self.add(x, factor * n, into)
            case Binary(op="*", left=a, right=b):
                left, right = self.sum(a), self.sum(b)
                if left.terms and right.terms:
                    into.add_term(Binary("*", _write(left), _write(right)), factor)
                elif left.terms:
                    into.add(left, factor * right.constant)
                else:
                    into.add(right, factor * left.constant)
            case Binary(op="//", left=a, right=Const(value=int(n))):
                into.add(_quotient(self.sum(a), n), factor)
            case Binary(op="%", left=a, right=Const(value=int(n))):
                # Multiples of n do not matter.
                left = self.sum(a)
                rest = _Sum(left.constant % n, {t: r for t, c in left.terms.items() if (r := _residue(c, n))})
                if rest.terms:
                    into.add_term(Binary("%", _write(rest), Const(n)), factor)
                else:
                    into.constant += factor * (rest.constant % n)
            case Unary(op="-", operand=x):
                self.add(x, -factor, into)
            case If(cond=c, then=a, other=b):
                cond, then, otherwise = self.scalar(c), self.scalar(a), self.scalar(b)
                if then == otherwise:
                    self.add(then, factor, into)
                else:
                    into.add_term(If(cond, then, otherwise), factor)
            case Call(function=f, args=args) if e.type is Type.INT:
                into.add_term(Call(f, tuple(self.scalar(x) for x in args)), factor)
            case _:
                into.add_term(e, factor)

    def condition(self, e: Scalar) -> Scalar:
        match e:
            case Compare(op=op, left=a, right=b) if a.type is b.type is Type.INT:
                # All terms on the side where they are positive, the constant on the right.
                difference = self.sum(a)
                self.add(b, -1, difference)
                positive = _Sum(0, {t: c for t, c in difference.terms.items() if c > 0})
                negative = _Sum(-difference.constant, {t: -c for t, c in difference.terms.items() if c < 0})
                return Compare(op, _write(positive), _write(negative))
            case Logic(op=op, operands=xs):
                return Logic(op, tuple(self.condition(x) for x in xs))
            case Unary(op="not", operand=x):
                return negated(self.condition(x))
            case _:
                return e


class _Plain(_Normaliser):
    """The same, with sizes put in, and everything folded on the way."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self._put_in: Memo = {}

    def scalar(self, e: Scalar) -> Scalar:
        if id(e) not in self.memo and isinstance(e, Call | If) and e.type is Type.INT:
            self.memo[id(e)] = e, self._folded(e)
        return super().scalar(e)

    def add(self, e: Scalar, factor: int, into: _Sum) -> None:
        match e:
            case Var(name=name) if name in self.sizes:
                into.constant += factor * self.sizes[name]
            case Const() | Var():
                super().add(e, factor, into)
            case Binary(op=op, left=a, right=b) if op != "/":
                if op in ("//", "%") and not isinstance(b, Const):
                    e = Binary(op, a, specialise(b, self.sizes, self._put_in))
                super().add(e, factor, into)
            case Call(function="min" | "max", args=(x,)):
                self.add(x, factor, into)
            case Call() | If() if e.type is Type.INT:
                found = self._folded(e)
                if isinstance(found, Call | If):
                    into.add_term(found, factor)
                else:
                    super().add(found, factor, into)
            case Unary():
                super().add(e, factor, into)
            case _:
                into.add_term(specialise(e, self.sizes, self._put_in), factor)

    def _folded(self, e: Call | If) -> Scalar:
        """A choice or a function of integers, in normal form."""
        if isinstance(e, If):
            return folded_once(If(self.scalar(e.cond), self.scalar(e.then), self.scalar(e.other)))
        return folded_once(Call(e.function, tuple(map(self.scalar, e.args))))

    def condition(self, e: Scalar) -> Scalar:
        match e:
            case If():
                return self.condition(specialise(e, self.sizes, self._put_in))
            case Compare(left=a, right=b) if a.type is b.type is Type.INT:
                return folded_once(super().condition(e))
            case Logic(op=op, operands=xs):
                return folded_once(Logic(op, tuple(self.condition(x) for x in xs)))
            case Unary(op="not", operand=x):
                return negated(self.condition(x))
            case _:
                return specialise(e, self.sizes, self._put_in)


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
