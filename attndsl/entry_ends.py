"""Patterns over views whose extents data tells, as conditions on an extent's first and last token.

Where a condition holds for a whole extent is where it holds at one of its ends, the worse one, if what it compares does
not turn back between them: `k <= q` at the last token, `q - k < 512` at the first, an equation at both. Data of single
keys has a least and a largest, as in `extents`; that by which a view is divided is one for all of an extent. Where what
reads no data turns back, integer sets say in closed form of both ends when it holds (`entry_sets.py`). Entries of one
token ask nothing of their pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from attndsl.coordinates import coordinate, length
from attndsl.diagnostics import PatternError, Span, error
from attndsl.grid import Along
from attndsl.monotone import direction
from attndsl.program import (
    Axis,
    Binary,
    Blocks,
    Choose,
    Coarsen,
    Compare,
    Complement,
    Const,
    Dim,
    If,
    InputDecl,
    Inter,
    Logic,
    Minus,
    On,
    Permuted,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Unary,
    Union,
    Var,
    Where,
    reads,
    rebuild,
    scalars,
    substitute,
    walk,
)  # fmt: skip

# A token of an extent, which stands in the place of k: k is the entry.
_TOKEN = Var("j")
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


@dataclass(frozen=True, slots=True)
class Ends:
    """What is known of the extents of a view. `first`, `last`: their ends, of the entry k; the same for one token.

    same: reads of a token that are one for all of its extent, as functions of it, and what they are there.
    least: declares an input of the least, or the largest, that another holds of each extent, and says where it is read
    beside the other's own indices; None: extents are one token.
    """

    program: Program
    first: Scalar
    last: Scalar
    same: Mapping[Scalar, Scalar]
    least: Callable[[InputDecl, bool], tuple[str, tuple[Scalar, ...]]] | None
    span: Span | None

    def over(self, pattern: Set) -> Set:
        """The entries that rows see of a derived pattern over tokens. Raises `PatternError` (A912) where its ends do
        not decide."""
        return Inter(tuple(map(self._term, terms(pattern))), self.span)

    def _term(self, pattern: Set) -> Set:
        try:
            return self._set(pattern, {"k": _TOKEN}, True)
        except PatternError:
            # Relations are made of derived programs: only here does deriving ask for one.
            from attndsl.entry_sets import seen_whole

            known = {decl.name for decl in self.program.inputs}
            plain = all(x.input in known for e in scalars(pattern) for x in walk(e) if isinstance(x, Read))
            found = seen_whole(self.program, pattern, self.first, self.last) if plain else None
            if found is None:
                raise
            return Where(found, self.span)

    # ------------------------------------------------------------------------------------------ sets

    def _set(self, pattern: Set, names: Mapping[str, Scalar], holds: bool) -> Set:
        """Where a pattern holds for a whole extent; or, unless `holds`, for none of it. names: where it stands."""
        match pattern:
            case Where(cond=cond):
                return replace(pattern, cond=self._condition(substitute(cond, names), holds))
            case Union(parts=parts) | Inter(parts=parts):
                both = isinstance(pattern, Inter) == holds
                if not both:
                    self._alone([self._depends(x, names) for x in parts])
                made = tuple(self._set(x, names, holds) for x in parts)
                return Inter(made, pattern.span) if both else Union(made, pattern.span)
            case Minus(left=left, right=right):
                return self._set(Inter((left, Complement(right)), pattern.span), names, holds)
            case Complement(operand=operand):
                return self._set(operand, names, not holds)
            case Choose(cond=cond, then=then, other=other):
                known = self._entry(substitute(cond, names))
                return Choose(known, self._set(then, names, holds), self._set(other, names, holds), pattern.span)
            case On(operand=operand, place=Blocks(size=size)):
                return self._set(operand, _blocks(names, size), holds)
            case On(operand=operand, place=Permuted(input=name, lead=lead)):
                placed: dict[str, Scalar] = {x: Read(name, (*lead, names.get(x, Var(x))), Type.INT) for x in "qk"}
                return self._set(operand, {**names, **placed}, holds)
            case On(operand=operand, place=Along(grid=grid, axis=axis)):
                cells = {x: coordinate(grid, axis, names.get(x, Var(x))) for x in "qk"}
                sizes = {x: length(grid, axis, names.get(x, Var(x))) for x in ("Nq", "Nk")}
                return self._set(operand, cells | sizes, holds)
            case Coarsen(map=found) if found is not None:
                return self._set(Where(found, pattern.span), names, holds)
            case _:
                raise self._refused()

    def _depends(self, pattern: Set, names: Mapping[str, Scalar]) -> bool:
        """Whether a set may hold for some tokens of an extent and not for others."""
        if isinstance(pattern, Where):
            return reads(self._fixed(substitute(pattern.cond, names)), _TOKEN.name)
        return any(reads(self._fixed(substitute(e, names)), _TOKEN.name) for e in scalars(pattern)) or _placed(pattern)

    # -------------------------------------------------------------------------------------- conditions

    def _condition(self, e: Scalar, holds: bool) -> Scalar:
        """Where a condition on a token holds for all of an extent, or for none, as one on the entry k."""
        e = self._fixed(e)
        if self.least is None or not reads(e, _TOKEN.name):
            found = self._at(e, self.first)
            return found if holds else Unary("not", found)
        match e:
            case Unary(op="not", operand=x):
                return self._condition(x, not holds)
            case Logic(op=op, operands=operands):
                both = (op == "and") == holds
                if not both:
                    self._alone([reads(x, _TOKEN.name) for x in operands])
                return Logic("and" if both else "or", tuple(self._condition(x, holds) for x in operands))
            case If(cond=cond, then=then, other=other) if e.type is Type.BOOL:
                return If(self._entry(cond), self._condition(then, holds), self._condition(other, holds))
            case Read(type=Type.BOOL) if self._of_token(e):
                return self._end(e, largest=False) if holds else Unary("not", self._end(e, largest=True))
            case Compare(op=op, left=left, right=right):
                return self._compared(op if holds else _NEGATED[op], left, right)
        raise self._refused()

    def _compared(self, op: str, left: Scalar, right: Scalar) -> Scalar:
        """A comparison for all of an extent."""
        if not reads(right, _TOKEN.name) and self._of_token(left):
            return self._of_data(op, left, right)
        if not reads(left, _TOKEN.name) and self._of_token(right):
            return self._of_data(_SWAPPED[op], right, left)
        grows = direction(Binary("-", left, right), _TOKEN.name)
        e = Compare(op, left, right)
        if grows is None or op == "!=":
            raise self._refused()
        if op == "==":
            return Logic("and", (self._at(e, self.first), self._at(e, self.last)))
        return self._at(e, self.last if (grows > 0) == (op in ("<", "<=")) else self.first)

    def _of_data(self, op: str, read: Scalar, other: Scalar) -> Scalar:
        """A comparison with what an input holds of each token of an extent."""
        least, largest = (self._end(read, largest=x) for x in (False, True))
        match op:
            case "==":
                return Logic("and", (Compare(op, least, other), Compare(op, largest, other)))
            case "<" | "<=":
                return Compare(op, largest, other)
            case ">" | ">=":
                return Compare(op, least, other)
            case _:
                raise self._refused()

    def _of_token(self, e: Scalar) -> bool:
        """Whether it reads an input over tokens at the token itself, and nothing else of it."""
        if not isinstance(e, Read):
            return False
        # Others are derived, as what a plan chooses: their entries may be of many tokens.
        own = {decl.name: decl.dims for decl in self.program.inputs if decl.derivation is None}
        dims = own.get(e.input, ())
        plain = bool(dims) and dims[-1] == Dim(Axis.K) and e.index[-1] == _TOKEN
        return plain and not any(reads(x, _TOKEN.name) for x in e.index[:-1])

    def _end(self, read: Scalar, *, largest: bool) -> Read:
        assert isinstance(read, Read)
        assert self.least is not None
        name, more = self.least(self.program.input(read.input), largest)
        return Read(name, (*read.index[:-1], *more, Var("k")), read.type)

    def _fixed(self, e: Scalar) -> Scalar:
        """A scalar with what is one for all of an extent in terms of the entry: what still reads the token is not."""
        return rebuild(e, lambda x: self.same.get(x, x))

    def _entry(self, cond: Scalar) -> Scalar:
        """A condition that is one for all of an extent."""
        found = self._fixed(cond)
        if self.least is None:
            return self._at(found, self.first)
        if reads(found, _TOKEN.name):
            raise self._refused()
        return found

    def _at(self, e: Scalar, end: Scalar) -> Scalar:
        return substitute(e, {_TOKEN.name: end})

    def _alone(self, depend: list[bool]) -> None:
        """Of alternatives one may depend on the token: which holds may else differ from one to the next."""
        if self.least is not None and sum(depend) > 1:
            raise self._refused()

    def _refused(self) -> Exception:
        return error(
            "A912", "the ends of an entry's tokens do not decide which rows see it: not yet supported", self.span,
            help="compare k, or what an input holds at k, by one of `==`, `<=`, `>=`, `<`, `>`",
        )  # fmt: skip


def terms(pattern: Set) -> tuple[Set, ...]:
    """Sets whose intersection a pattern is."""
    match pattern:
        case Inter(parts=parts):
            return tuple(x for part in parts for x in terms(part))
        case Minus(left=left, right=right):
            return (*terms(left), Complement(right))
        case _:
            return (pattern,)


def token_read(name: str, lead: tuple[Scalar, ...]) -> Read:
    """What an int input holds of a token."""
    return Read(name, (*lead, _TOKEN), Type.INT)


def first_of(offsets: str, lead: tuple[Scalar, ...]) -> Scalar:
    """The first token of a token's segment, as sets of segments write it."""
    return Binary("-", _TOKEN, token_read(offsets, lead))


def _placed(pattern: Set) -> bool:
    """Whether it places tokens somewhere in it: scalars do not say where they are read."""
    match pattern:
        case On():
            return True
        case Union(parts=parts) | Inter(parts=parts):
            return any(map(_placed, parts))
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            return _placed(a) or _placed(b)
        case Complement(operand=p):
            return _placed(p)
        case _:
            return False


def _blocks(names: Mapping[str, Scalar], size: int) -> dict[str, Scalar]:
    here = {x: names.get(x, Var(x)) for x in ("q", "k", "Nq", "Nk")}
    quotient: dict[str, Scalar] = {x: Binary("//", here[x], Const(size)) for x in "qk"}
    return quotient | {x: Binary("//", Binary("+", here[x], Const(size - 1)), Const(size)) for x in ("Nq", "Nk")}


__all__ = ["Ends", "first_of", "terms", "token_read"]
