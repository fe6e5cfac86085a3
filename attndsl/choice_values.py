"""The oracle of scores that are expressions: values of scalars that may read floats, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, assert_never

import numpy as np

from attndsl.oracle import Array, Evaluator, index_origin
from attndsl.oracle_operators import COMPARE
from attndsl.program import (
    Arg,
    Binary,
    Call,
    Compare,
    Const,
    Dim,
    If,
    Logic,
    Read,
    Scalar,
    Table,
    Type,
    Unary,
    Var,
    children,
    walk,
)

_FLOAT_CALLS: dict[str, Callable[..., Any]] = {
    "min": lambda *x: reduce(np.minimum, x),
    "max": lambda *x: reduce(np.maximum, x),
    "abs": np.abs,
    "clamp": lambda x, low, high: np.minimum(np.maximum(x, low), high),
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softcap": lambda x, cap: cap * np.tanh(x / cap),
}
_FLOAT_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide,
}  # fmt: skip


def real(call: Evaluator, e: Scalar) -> Array:
    """Value of a scalar that may read floats."""
    if not any(node.type is Type.FLOAT for node in walk(e)):
        return call.scalar(e)
    operands = [real(call, child) for child in children(e)]
    match e:
        case Const(value=value):
            return np.asarray(value)
        case Table(name=name, index=_):
            table = call.program.table(name)
            return _entry(call, np.asarray(table.values).reshape(table.shape), table.dims, operands)
        case Read(input=name, index=_):
            if name not in call.inputs:
                raise ValueError(f"input `{name}` is missing")
            return _entry(call, np.asarray(call.inputs[name], np.float64), call.program.input(name).dims, operands)
        case If():
            return np.where(operands[0], operands[1], operands[2])
        case Unary(op=op):
            return -operands[0] if op == "-" else ~operands[0]
        case Binary(op=op):
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(_FLOAT_ARITHMETIC[op](*operands))
        case Compare(op=op):
            return np.asarray(COMPARE[op](*operands))
        case Logic(op=op):
            return np.asarray(reduce(np.logical_and if op == "and" else np.logical_or, operands))
        case Call(function=function):
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                return np.asarray(_FLOAT_CALLS[function](*operands))
        case Var() | Arg():
            raise ValueError("`s` is read where there is no pair")
        case _ as never:
            assert_never(never)


def _entry(call: Evaluator, values: Array, dims: tuple[Dim, ...], index: list[Array]) -> Array:
    places = []
    for dim, size, at in zip(dims, values.shape, index, strict=True):
        places.append(np.clip(at - index_origin(dim, call.program, call.shape), 0, size - 1))
    return np.asarray(values[tuple(places)])
