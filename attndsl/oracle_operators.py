"""The oracle of operators: the value of one int or bool operator on those of its operands, in numpy.

Where the language leaves numpy a choice, this is what it is: `clamp(x, low, high)` is
min(max(x, low), high); `bit_length(x)` counts the bits of max(x, 0); `is_power_of_two(x)` is false
below 1; an unguarded division by zero gives 0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from attndsl.program import Binary, Call, Compare, Logic, Unary

Array: TypeAlias = npt.NDArray[Any]
Operator: TypeAlias = Unary | Binary | Compare | Logic | Call

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
INT_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


def apply(e: Operator, operands: Sequence[Array]) -> Array:
    """Value of one int or bool operator on the values of its operands."""
    match e:
        case Unary(op=op):
            return -operands[0] if op == "-" else ~operands[0]
        case Binary(op=op):
            # A guard may stand before a division by zero: both sides are evaluated, so it must not fail.
            with np.errstate(divide="ignore"):
                return np.asarray(INT_ARITHMETIC[op](*operands))
        case Compare(op=op):
            return np.asarray(COMPARE[op](*operands))
        case Logic(op=op):
            return np.asarray(reduce(np.logical_and if op == "and" else np.logical_or, operands))
        case Call(function=function):
            return _call(function, operands)
        case _ as never:
            assert_never(never)


def _call(function: str, operands: Sequence[Array]) -> Array:
    match function, operands:
        case "min", _:
            return np.asarray(reduce(np.minimum, operands))
        case "max", _:
            return np.asarray(reduce(np.maximum, operands))
        case "abs", [x]:
            return np.asarray(np.abs(x))
        case "clamp", [x, low, high]:
            return np.asarray(np.minimum(np.maximum(x, low), high))
        case "bit_length", [x]:
            # Exact up to 63 bits, which a logarithm in float64 is not.
            return np.asarray(sum(((x >> bit) > 0).astype(np.int64) for bit in range(63)))
        case "is_power_of_two", [x]:
            return np.asarray((x > 0) & ((x & (x - 1)) == 0))
        case _:
            raise ValueError(f"`{function}` has no integer value")
