"""The periods that a pattern's own constants suggest: what it divides by."""

from __future__ import annotations

from collections.abc import Iterator

from attndsl.program import (
    Binary,
    Blocks,
    Choose,
    Coarsen,
    Complement,
    Const,
    Inter,
    Minus,
    On,
    Scalar,
    Set,
    Union,
    Where,
    walk,
)  # fmt: skip
from attndsl.simplify import specialise


def periods(pattern: Set, sizes: dict[str, int], unit: int = 1) -> Iterator[tuple[int, int]]:
    """Periods, and widths of what they repeat; `unit`: tokens of a coordinate."""
    match pattern:
        case Where(cond=cond):
            for period, width in _divisors(cond, sizes):
                yield period * unit, width * unit
        case Union(parts=parts) | Inter(parts=parts):
            for part in parts:
                yield from periods(part, sizes, unit)
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            yield from periods(a, sizes, unit)
            yield from periods(b, sizes, unit)
        case Complement(operand=p) | Coarsen(operand=p):
            yield from periods(p, sizes, unit)
        case On(operand=p, place=place):
            if isinstance(place, Blocks):
                yield from periods(p, sizes, unit * place.size)


def _divisors(e: Scalar, sizes: dict[str, int]) -> Iterator[tuple[int, int]]:
    """The constants that a scalar divides by, with width 1; those of the rest of a quotient, (x // w) % c, with w."""
    for x in walk(e):
        if isinstance(x, Binary) and x.op in ("//", "%") and (c := _constant(x, sizes)):
            yield c, 1
            if x.op == "%":
                quotients = (y for y in walk(x.left) if isinstance(y, Binary) and y.op == "//")
                yield from ((c * w, w) for y in quotients if (w := _constant(y, sizes)))


def _constant(quotient: Binary, sizes: dict[str, int]) -> int:
    """The divisor, 0 where it is not a constant above 1."""
    divisor = specialise(quotient.right, sizes)
    return divisor.value if isinstance(divisor, Const) and isinstance(divisor.value, int) and divisor.value > 1 else 0
