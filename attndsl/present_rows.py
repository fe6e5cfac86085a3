"""Outputs in rows of no sequence: 0, whatever the output says of them.

Packed and padded calls have rows that stand in no document, or past the tokens that are present. There the value of a
branch is 0, but the length of no sequence is 0 or less, and what an output makes of that may be no number.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import assert_never

from attndsl.branches import Attended, Factor, Handed, Merged, Output, Product, Sum, rewritten
from attndsl.program import Binary, Call, Const, If, Scalar, Type, rebuild


def of_present_rows(output: Output, present: Scalar) -> Output:
    """The output with the value 0, or the lse -inf, in rows that are not present, whatever its scalars make of them."""
    return _where_present(rewritten(output, lambda e: _finite(e, present)), present)


def _where_present(output: Output, present: Scalar) -> Output:
    match output:
        case Factor(value=value):
            return Factor(If(present, value, Const(0.0)))
        case Handed(out=out, lse=lse):
            return Handed(out, If(present, lse, Const(-math.inf)))
        case Merged(operands=operands):
            changed = (_where_present(x, present) for x in operands)
            return Merged(tuple(x for x in changed if isinstance(x, Attended | Handed | Merged)))
        case Sum(left=left, right=right):
            return Sum(_where_present(left, present), _where_present(right, present))
        case Product(factor=factor, operand=operand):
            return Product(factor, _where_present(operand, present))
        case Attended():
            return output
        case _:
            assert_never(output)


def _finite(e: Scalar, present: Scalar) -> Scalar:
    """A scalar that is finite, as its derivatives are, where a row is not present: what branches have there is 0, and 0
    times infinity would not be."""

    def held(x: Scalar) -> Scalar:
        return x if isinstance(x, Const) else If(present, x, Const(1 if x.type is Type.INT else 1.0))

    def step(x: Scalar) -> Scalar:
        match x:
            case Binary(op="/", right=divisor):
                return replace(x, right=held(divisor))
            case Call(function="log" | "sqrt" | "exp" | "exp2" | "softcap", args=operands):
                return replace(x, args=tuple(map(held, operands)))
            case _:
                return x

    return rebuild(e, step)
