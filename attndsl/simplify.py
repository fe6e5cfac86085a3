"""Scalars made smaller: known sizes put in, constants folded, neutral operands dropped."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import assert_never

from attndsl.program import (
    FLOAT_CALLS,
    Arg,
    Binary,
    Call,
    Compare,
    Const,
    If,
    Logic,
    Memo,
    Read,
    Scalar,
    Table,
    Type,
    Unary,
    Var,
    rebuild,
)

_COMPARE = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_FLIPPED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def specialise(e: Scalar, sizes: Mapping[str, int], memo: Memo | None = None) -> Scalar:
    """The scalar with H, G, D, Dv (those in `sizes`) replaced by their values, then folded. memo: as in `rebuild`."""

    def step(x: Scalar) -> Scalar:
        return Const(sizes[x.name]) if isinstance(x, Var) and x.name in sizes else folded_once(x)

    return rebuild(e, step, memo)


def fold(e: Scalar, memo: Memo | None = None) -> Scalar:
    """The scalar with constants folded; its value is the same for every value of its variables. memo: as in
    `rebuild`."""
    return rebuild(e, folded_once, memo)


def negated(e: Scalar) -> Scalar:
    """The boolean's negation, pushed inwards to comparisons."""
    match e:
        case Const(value=value):
            return Const(not value)
        case Unary(op="not", operand=x):
            return x
        case Compare(op=op, left=a, right=b) if Type.FLOAT not in (a.type, b.type):
            return Compare(_FLIPPED[op], a, b)
        case Logic(op=op, operands=xs):
            return Logic("or" if op == "and" else "and", tuple(negated(x) for x in xs))
        case _:
            return Unary("not", e)


def folded_once(e: Scalar) -> Scalar:
    """The scalar folded, whose operands are."""
    # By class first: this is asked of every node of every expression.
    match e:
        case Const() | Var():
            return e
        case Binary(left=a, right=b):
            return _binary(e) if isinstance(a, Const) or isinstance(b, Const) else e
        case Compare(op=op, left=Const(value=a), right=Const(value=b)):
            return Const(bool(_COMPARE[op](a, b)))
        case Compare():
            return e
        case Logic(op=op, operands=xs):
            found = _logic(op, xs)
            return e if found == e else found
        case If():
            return _choice(e)
        case Call():
            return _call(e)
        case Unary(op="not", operand=x):
            return negated(x)
        case Unary(op="-", operand=Const(value=v)):
            return Const(-v)
        case Unary() | Arg() | Read() | Table():
            return e
        case _:
            assert_never(e)


def _binary(e: Binary) -> Scalar:
    match e:
        case Binary(op=op, left=Const(value=a), right=Const(value=b)):
            return _arithmetic(e, op, a, b)
        case Binary(op="+" | "-", left=x, right=Const(value=0)) if x.type is e.type:
            return x
        case Binary(op="+", left=Const(value=0), right=x) if x.type is e.type:
            return x
        # Ends of runs: constants gather on the right.
        case Binary(op="+", left=Binary(op="+", left=x, right=Const(value=int(a))), right=Const(value=int(b))):
            return _plus(x, a + b)
        case Binary(op="+", left=Binary(op="-", left=x, right=Const(value=int(a))), right=Const(value=int(b))):
            return _plus(x, b - a)
        case Binary(op="-", left=Binary(op="+", left=x, right=Const(value=int(a))), right=Const(value=int(b))):
            return _plus(x, a - b)
        case Binary(op="-", left=Binary(op="-", left=x, right=Const(value=int(a))), right=Const(value=int(b))):
            return _plus(x, -a - b)
        case Binary(op="*" | "//", left=x, right=Const(value=1)) if x.type is e.type:
            return x
        case Binary(op="*", left=Const(value=1), right=x) if x.type is e.type:
            return x
        case Binary(op="%", right=Const(value=1)):
            return Const(0)
        case _:
            return e


def _choice(e: If) -> Scalar:
    match e:
        case If(cond=Const(value=c), then=a, other=b):
            chosen = a if c else b
            return chosen if chosen.type is e.type else Binary("+", chosen, Const(0.0))
        case If(cond=c, then=a, other=b) if e.type is Type.BOOL:
            return _logic("or", (_logic("and", (c, a)), _logic("and", (negated(c), b))))
        case If(then=a, other=b) if a == b:
            return a
        case _:
            return e


def _call(e: Call) -> Scalar:
    match e:
        case Call(function="min" | "max" as name, args=xs) if e.type is Type.INT:
            found = _extremum(name, xs)
            return e if found == e else found
        case Call(function=name, args=xs) if name in FLOAT_CALLS and all(isinstance(x, Const) for x in xs):
            return _function(e, name, [float(x.value) for x in xs if isinstance(x, Const)])
        case Call(function="is_power_of_two", args=(Const(value=int(x)),)):
            return Const(x > 0 and x & (x - 1) == 0)
        case Call(function="bit_length", args=(Const(value=int(x)),)):
            return Const(max(x, 0).bit_length())
        case Call(function="abs", args=(Const(value=x),)):
            return Const(abs(x))
        case _:
            return e


def _arithmetic(e: Scalar, op: str, a: float, b: float) -> Scalar:
    match op:
        case "+":
            return Const(a + b)
        case "-":
            return Const(a - b)
        case "*":
            return Const(a * b)
        case "/" if b != 0:
            return Const(a / b)
        case "//" if b != 0:
            return Const(math.floor(a // b))
        case "%" if b != 0:
            return Const(a % b)
        case _:
            return e


def _function(e: Scalar, name: str, values: list[float]) -> Scalar:
    try:
        match name, values:
            case "exp2", [x]:
                return Const(2.0**x)
            case "log", [x]:
                return Const(math.log(x) if x else -math.inf)
            case "sigmoid", [x]:
                return Const(1.0 / (1.0 + math.exp(-x)))
            case "softcap", [x, cap]:
                return Const(cap * math.tanh(x / cap))
            case _, [x]:
                return Const({"exp": math.exp, "sqrt": math.sqrt, "tanh": math.tanh}[name](x))
            case _:
                return e
    except (ArithmeticError, ValueError):
        return e  # Not a number, or past the largest.


def _plus(x: Scalar, constant: int) -> Scalar:
    if constant == 0:
        return x
    return Binary("+", x, Const(constant)) if constant > 0 else Binary("-", x, Const(-constant))


def _logic(op: str, operands: tuple[Scalar, ...]) -> Scalar:
    """Nested and-s and or-s flattened, repeated and neutral operands dropped."""
    absorbing = Const(op == "or")
    kept: list[Scalar] = []
    for x in operands:
        for y in x.operands if isinstance(x, Logic) and x.op == op else (x,):
            if y == absorbing:
                return absorbing
            if not isinstance(y, Const) and y not in kept:
                kept.append(y)
    if not kept:
        return Const(op == "and")
    return kept[0] if len(kept) == 1 else Logic(op, tuple(kept))


def _extremum(name: str, args: tuple[Scalar, ...]) -> Scalar:
    flat = [y for x in args for y in (x.args if isinstance(x, Call) and x.function == name else (x,))]
    values = [x.value for x in flat if isinstance(x, Const)]
    rest: list[Scalar] = list(dict.fromkeys(x for x in flat if not isinstance(x, Const)))
    if values:
        rest.append(Const(min(values) if name == "min" else max(values)))
    return rest[0] if len(rest) == 1 else Call(name, tuple(rest))
