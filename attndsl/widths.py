"""How large numbers may be for a program's integers to fit the 32 bits in which kernels for GPUs compute.

A kernel serves all lengths, so what its integers come to is bounded by those of a call: for a program there is a
longest call, and a largest runtime int. Past them a number would wrap and a mask be wrong in silence; such calls are
refused. What is computed from integers of inputs, which no one bounds, has 64 bits (`codegen/scalars.py`), as all on
the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from attndsl.branches import factors
from attndsl.diagnostics import error
from attndsl.program import (
    Arg,
    Binary,
    Call,
    Compare,
    Const,
    If,
    Program,
    Read,
    Scalar,
    Table,
    Type,
    Unary,
    Var,
    children,
    scalars,
    walk,
)  # fmt: skip

LARGEST, LARGEST_WIDE = (1 << 31) - 1, (1 << 63) - 1
# Batches and heads are never near 32 bits; what is multiplied with them may be.
_SIZES = {"b": 1 << 20, "h": 1 << 12, "g": 1 << 12, "H": 1 << 12, "G": 1 << 12, "D": 256, "Dv": 256}
# Runtime ints are allowed as much as leaves calls this long, where that is possible.
_LONG = 1 << 22
_ARGUMENTS = tuple(1 << bits for bits in (30, 24, 20, 16, 12, 8))


@dataclass(frozen=True, slots=True)
class Widths:
    """A program fits calls of at most `tokens` rows and keys, whose runtime ints lie within ±`argument`; `tokens` is 0
    where no call fits, since a number written does not."""

    tokens: int
    argument: int


@functools.lru_cache(maxsize=256)
def widths(program: Program) -> Widths:
    """How large a call's numbers may be."""
    tables = _of_tables(program)
    roots = [e for e in _written(program) if any(x.type is Type.INT for x in walk(e))]
    inputs = _of_inputs(program)

    def longest(argument: int) -> int:
        sizes = (1 << bits for bits in range(29, -1, -1))
        return next((n for n in sizes if _Magnitudes(n, argument, tables, inputs).fit(roots)), 0)

    found = Widths(0, _ARGUMENTS[0])
    for argument in _ARGUMENTS if program.args else _ARGUMENTS[:1]:
        found = Widths(longest(argument), argument)
        if found.tokens >= _LONG:
            break
    return found


def largest(e: Scalar, program: Program) -> int:
    """A bound of an integer of a program in the calls that it fits."""
    fits = widths(program)
    return _Magnitudes(fits.tokens, fits.argument, _of_tables(program), _of_inputs(program)).bound(e, {}, set())


def _of_tables(program: Program) -> dict[str, int]:
    return {x.name: max((abs(int(v)) for v in x.values), default=0) for x in program.tables if x.type is Type.INT}


def _of_inputs(program: Program) -> frozenset[str]:
    return frozenset(decl.name for decl in program.inputs if decl.holds_integers)


def check_tokens(program: Program, tokens: int) -> None:
    """Raises `PatternError` (A515) for a call of so many rows or keys that a kernel's integers could wrap."""
    most = widths(program).tokens
    if tokens > most:
        what = f"calls of at most {most:,} tokens" if most else "no call"
        raise error(
            "A515", f"the integers of this pattern fit 32 bits in {what}, and this one has {tokens:,}", program.span,
            help="GPUs compute in 32 bits: write smaller factors, or divide before multiplying",
        )  # fmt: skip


def check_argument(program: Program, name: str, value: int) -> None:
    """Raises `PatternError` (A516) for a runtime int with which a kernel's integers could wrap."""
    most = widths(program).argument
    if not -most <= value <= most:
        raise error(
            "A516", f"`{name}` is {value:,}, and the runtime ints of this pattern lie within ±{most:,}", program.span,
            help="their products and sums have to fit 32 bits",
        )  # fmt: skip


def _written(program: Program) -> Iterator[Scalar]:
    """Every scalar that a kernel may compute."""
    for branch in program.branches:
        for part in branch.parts:
            yield from scalars(part.pattern)
            yield from () if part.entries is None else scalars(part.entries)
        yield from (e for e in (branch.scale, branch.score, branch.sink, branch.weights) if e is not None)
    for selection in program.selections:
        yield from scalars(selection.among)
        yield from () if selection.always is None else scalars(selection.always)
    yield from () if program.output is None else factors(program.output)


@dataclass(slots=True)
class _Magnitudes:
    """Bounds of integers where positions and lengths are at most `tokens`; `inputs`: those that hold any of 32 bits.

    Of a comparison it counts both sides together: the compiler moves terms from one to the other.
    """

    tokens: int
    argument: int
    tables: dict[str, int]
    inputs: frozenset[str]

    def fit(self, roots: list[Scalar]) -> bool:
        """Whether no integer that is computed on the way passes 32 bits, or 64 where it is made of an input's."""
        memo: dict[int, int] = {}
        wide: set[int] = set()
        for e in roots:
            self.bound(e, memo, wide)
        return all(most <= (LARGEST_WIDE if e in wide else LARGEST) for e, most in memo.items())

    def _wide(self, e: Scalar, wide: set[int]) -> bool:
        """Whether a kernel has 64 bits for an integer, or needs none; `wide`: those of its operands."""
        match e:
            case Read(input=name):
                return name in self.inputs
            case Binary(op="%", right=Const()) | Call(function="bit_length"):
                return False
            case _:
                return any(id(x) in wide for x in children(e))

    def bound(self, e: Scalar, memo: dict[int, int], wide: set[int]) -> int:
        """That of one integer, and in `memo` those of all on the way; `wide`: those for which there are 64 bits."""
        found = memo.get(id(e))
        if found is None:
            operands = [self.bound(x, memo, wide) for x in children(e)]
            found = memo[id(e)] = self._bound(e, operands) if _counts(e) else 0
            if _counts(e) and self._wide(e, wide):
                wide.add(id(e))
        return found

    def _bound(self, e: Scalar, operands: list[int]) -> int:
        match e:
            case Const(value=value):
                return abs(int(value))
            case Var(name=name):
                return _SIZES.get(name, self.tokens)
            case Arg():
                return self.argument
            case Read(input=name):
                return LARGEST + 1 if name in self.inputs else self.tokens
            case Table(name=name):
                return self.tables[name]
            case Binary(op="*"):
                return operands[0] * operands[1]
            case Binary(op="//", right=Const(value=int(n))) if n > 0:
                return operands[0] // n + 1
            case Binary(op="//") | Unary():
                return operands[0]
            case Binary(op="%"):
                return operands[1]
            case Binary() | Compare():
                return sum(operands)
            case If():
                return max(operands[1:])
            case Call(function="bit_length"):
                return 32
            case _:
                return max(operands, default=0)


def _counts(e: Scalar) -> bool:
    """Whether a scalar is an integer, or compares some."""
    return e.type is Type.INT or (isinstance(e, Compare) and e.left.type is e.right.type is Type.INT)
