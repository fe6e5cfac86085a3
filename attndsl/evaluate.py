"""Values of what the compiler derives: integer scalars on numpy arrays."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from attndsl.program import Arg, Binary, Call, Compare, Const, If, Logic, Read, Scalar, Table, Unary, Var

Value = NDArray[Any]

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": np.floor_divide, "%": np.mod,
}  # fmt: skip
_COMPARE = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


def evaluate(e: Scalar, variables: Mapping[str, Value], leaves: Mapping[Scalar, Value]) -> Value:
    """Value of an integer or boolean scalar; `leaves` gives those of its tables, inputs and arguments."""
    memo: dict[int, Value] = {}

    def value(x: Scalar) -> Value:
        if id(x) not in memo:
            memo[id(x)] = step(x)
        return memo[id(x)]

    def step(x: Scalar) -> Value:
        match x:
            case Const(value=v):
                return np.asarray(v)
            case Var(name=name):
                return variables[name]
            case Arg() | Table() | Read():
                return leaves[x]
            case Unary(op="not", operand=a):
                return np.logical_not(value(a))
            case Unary(operand=a):
                return -value(a)
            case Binary(op=op, left=a, right=b):
                return np.asarray(_BINARY[op](value(a), value(b)))
            case Compare(op=op, left=a, right=b):
                return np.asarray(_COMPARE[op](value(a), value(b)))
            case Logic(op="and", operands=xs):
                return np.asarray(reduce(np.logical_and, map(value, xs)))
            case Logic(operands=xs):
                return np.asarray(reduce(np.logical_or, map(value, xs)))
            case If(cond=c, then=a, other=b):
                return np.where(value(c), value(a), value(b))
            case Call(function="min", args=xs):
                return np.asarray(reduce(np.minimum, map(value, xs)))
            case Call(function="max", args=xs):
                return np.asarray(reduce(np.maximum, map(value, xs)))
            case Call(function="abs", args=(a,)):
                return np.abs(value(a))
            case Call(function="clamp", args=(a, low, high)):
                return np.asarray(np.minimum(np.maximum(value(a), value(low)), value(high)))
            case Call(function="bit_length", args=(a,)):
                return np.asarray(np.frexp(np.maximum(value(a), 0).astype(np.float64))[1].astype(np.int64))
            case Call(function="is_power_of_two", args=(a,)):
                number = value(a)
                return np.asarray((number > 0) & ((number & (number - 1)) == 0))
            case Call(function=function):
                raise AssertionError(f"the compiler derives no {function}")
            case _:
                assert_never(x)

    result = value(e)
    # The two functions refer to each other: without this the arrays would live until a garbage collection.
    memo.clear()
    return result
