"""Derivatives of scores: by the scaled dot product, and by the learnable inputs that they read.

sympy differentiates and is used nowhere else. It sees arithmetic and opaque symbols: a symbol stands for whatever does
not change with the variable, for the dot product, for a read. So it decides nothing about integers (it simplifies
nested quotients wrongly, sympy#28744), and what a derivative shares with its score stays the same expression.
Choices (`if`, `min`, `max`, `abs`, `clamp`) are symbols too, whose derivatives are choices between derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeAlias, assert_never

import sympy

from attndsl.program import (
    Arg,
    Binary,
    Call,
    Compare,
    Const,
    If,
    Logic,
    Program,
    Read,
    Scalar,
    Table,
    Type,
    Unary,
    Var,
    walk,
)  # fmt: skip
from attndsl.simplify import fold


def derivative(e: Scalar, variable: Var | Read) -> Scalar:
    """The derivative of a scalar by `s`, or by an entry of an input; the other leaves are held constant.

    >>> derivative(Binary("*", Var("s"), Var("s")), Var("s"))
    Binary(op='*', left=Const(value=2.0), right=Var(name='s'))

    Where a choice has two one-sided derivatives, it is that of the side taken (of the first, among equals); that of
    `abs` at 0 is 0. A factor that is not taken may be infinite or not a number: choices select, they do not multiply.
    """
    return fold(_Differentiation(variable).of(fold(e)))


def learnable_reads(e: Scalar, program: Program) -> tuple[Read, ...]:
    """The distinct reads of learnable inputs in a scalar, in order of their inputs."""
    names = [decl.name for decl in program.inputs if decl.learnable]
    found = {x: None for x in walk(e) if isinstance(x, Read) and x.input in names}
    return tuple(sorted(found, key=lambda read: names.index(read.input)))


def derivatives(e: Scalar | None, program: Program) -> tuple[tuple[Read, Scalar], ...]:
    """Each learnable read that changes a scalar, with the derivative by it."""
    if e is None:
        return ()
    found = ((read, derivative(e, read)) for read in learnable_reads(e, program))
    return tuple((read, slope) for read, slope in found if slope != Const(0.0))


# ------------------------------------------------------------------------------------ functions

_Rule: TypeAlias = Callable[[Any, int], Any]


def _softcap_slope(y: Any, argument: int) -> Any:
    """Of cap * tanh(x / cap)."""
    x, cap = y.args
    ratio = y / cap
    flank = 1 - ratio * ratio
    return flank if argument == 1 else ratio - x / cap * flank


# The derivative of y = f(x), given y: what a score and its derivative share is then the same expression.
_RULES: dict[str, _Rule] = {
    "exp": lambda y, _: y,
    "exp2": lambda y, _: sympy.Float(math.log(2.0)) * y,
    "log": lambda y, _: 1 / y.args[0],
    "sqrt": lambda y, _: 1 / (2 * y),
    "tanh": lambda y, _: 1 - y * y,
    "sigmoid": lambda y, _: y * (1 - y),
    "softcap": _softcap_slope,
}

# Functions of our own, which sympy neither rewrites nor merges (its exp(x) * exp(y) becomes exp(x + y)).
_FUNCTIONS: dict[str, Any] = {name: type(name, (sympy.Function,), {"fdiff": rule}) for name, rule in _RULES.items()}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}


class _Differentiation:
    """The derivative by one variable: to sympy, differentiated, and back."""

    def __init__(self, variable: Var | Read) -> None:
        self.variable = variable
        self._symbols: dict[Scalar, Any] = {}
        self._scalars: dict[Any, Scalar] = {}
        self._varies: dict[Scalar, bool] = {}
        self._slopes: dict[Scalar, Scalar] = {}

    def of(self, e: Scalar) -> Scalar:
        """The derivative of a number; equal parts are differentiated once."""
        if e not in self._slopes:
            self._slopes[e] = self._of(e)
        return self._slopes[e]

    def _of(self, e: Scalar) -> Scalar:
        if not self._depends(e):
            return Const(0.0)
        if _is_choice(e):
            return self._choice(e)
        smooth = self._smooth(e)
        total: Scalar = Const(0.0)
        for symbol in sorted(smooth.free_symbols, key=str):
            leaf = self._scalars[symbol]
            if self._depends(leaf):
                inner = Const(1.0) if leaf == self.variable else self.of(leaf)
                total = _sum(total, _product(self._scalar(sympy.diff(smooth, symbol)), inner))
        return total

    def _depends(self, e: Scalar) -> bool:
        """Whether a number changes with the variable other than in conditions and indices, which have no derivative."""
        if e not in self._varies:
            match e:
                case Unary(operand=x):
                    found = self._depends(x)
                case Binary(left=a, right=b) | If(then=a, other=b):
                    found = self._depends(a) or self._depends(b)
                case Call(args=xs):
                    found = any(map(self._depends, xs))
                case Const() | Var() | Read() | Arg() | Table() | Compare() | Logic():
                    found = e == self.variable
                case _:
                    assert_never(e)
            self._varies[e] = found
        return self._varies[e]

    def _choice(self, e: Scalar) -> Scalar:
        match e:
            case If(cond=c, then=a, other=b):
                return _if(c, self.of(a), self.of(b))
            case Call(function="min" | "max" as name, args=(first, *others)):
                value, slope = first, self.of(first)
                for x in others:
                    slope = _if(Compare("<=" if name == "min" else ">=", value, x), slope, self.of(x))
                    value = Call(name, (value, x))
                return slope
            case Call(function="clamp", args=(x, low, high)):
                return self.of(Call("min", (Call("max", (x, low)), high)))
            case Call(function="abs", args=(x,)):
                slope = self.of(x)
                below = _if(Compare("<", x, Const(0)), _product(Const(-1.0), slope), Const(0.0))
                return _if(Compare(">", x, Const(0)), slope, below)
            case _:
                raise AssertionError(f"not a choice: {e}")

    # ------------------------------------------------------------------------------- to sympy

    def _smooth(self, e: Scalar) -> Any:
        """The scalar as sympy's, opaque where it does not depend on the variable or is a choice."""
        match e:
            case Const(value=value) if math.isfinite(value):
                whole = float(value).is_integer()
                return sympy.Integer(int(value)) if whole else sympy.Float(value)
            case _ if not self._depends(e) or _is_choice(e):
                return self._symbol(e)
            case Unary(operand=x):
                return -self._smooth(x)
            case Binary(op="+", left=a, right=b):
                return self._smooth(a) + self._smooth(b)
            case Binary(op="-", left=a, right=b):
                return self._smooth(a) - self._smooth(b)
            case Binary(op="*", left=a, right=b):
                return self._smooth(a) * self._smooth(b)
            case Binary(op="/", left=a, right=b):
                # A quotient by 0 stays one: sympy has one infinity for all of them.
                return self._smooth(a) / (self._symbol(b) if b in (Const(0), Const(0.0)) else self._smooth(b))
            case Call(function=name, args=xs) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*map(self._smooth, xs))
            case _:
                return self._symbol(e)

    def _symbol(self, e: Scalar) -> Any:
        if e not in self._symbols:
            # Numbered in order of appearance, on which sympy's order of terms depends.
            symbol = sympy.Symbol(f"x{len(self._symbols):04}", real=True)
            self._symbols[e], self._scalars[symbol] = symbol, e
        return self._symbols[e]

    # ------------------------------------------------------------------------------ from sympy

    def _scalar(self, x: Any) -> Scalar:
        if x.is_Symbol:
            return self._scalars[x]
        if x.is_Atom:
            # Not a number, or sympy's infinity of no sign: the score is undefined everywhere.
            return Const(float(x) if x.is_finite else math.inf)
        if x.is_Add:
            return reduce(_sum, map(self._scalar, x.as_ordered_terms()))
        if x.is_Mul:
            if x.args[0].is_Number and x.args[0].is_negative:
                return _product(Const(-1.0), self._scalar(-x))
            below = [f for f in x.as_ordered_factors() if f.is_Pow and f.exp.is_negative]
            above = [self._scalar(f) for f in x.as_ordered_factors() if f not in below]
            product: Scalar = Const(1.0)
            for factor in sorted(above, key=lambda f: f.type is Type.INT):
                product = _product(product, factor)
            for factor in below:
                product = Binary("/", product, self._power(factor.base, -factor.exp))
            return product
        if x.is_Pow:
            if x.exp.is_negative:
                return Binary("/", Const(1.0), self._power(x.base, -x.exp))
            return self._power(x.base, x.exp)
        return Call(_NAMES[x.func], tuple(map(self._scalar, x.args)))

    def _power(self, base: Any, exponent: Any) -> Scalar:
        scalar = self._scalar(base)
        return reduce(_product, [scalar] * (int(exponent) - 1), scalar)


def _is_choice(e: Scalar) -> bool:
    return isinstance(e, If) or (isinstance(e, Call) and e.function in ("min", "max", "abs", "clamp"))


def _if(cond: Scalar, then: Scalar, other: Scalar) -> Scalar:
    return then if then == other else If(cond, then, other)


def _sum(a: Scalar, b: Scalar) -> Scalar:
    match a, b:
        case Const(value=0), _:
            return b
        case _, Unary(op="-", operand=x):
            return Binary("-", _real(a), x)
        case _, Const(value=v) if v < 0:
            return Binary("-", a, Const(-v))
        case Unary(op="-", operand=x), _:
            return Binary("-", _real(b), x)
        case _:
            return Binary("+", _real(a), b)


def _product(a: Scalar, b: Scalar) -> Scalar:
    match a, b:
        case (Const(value=0), _) | (_, Const(value=0)):
            return Const(0.0)
        case Const(value=1), _:
            return b
        case _, Const(value=1):
            return a
        case Const(value=-1), Unary(op="-", operand=x):
            return x
        case Const(value=-1), _:
            return Unary("-", b)
        case _, Const(value=-1):
            return Unary("-", a)
        case _:
            return Binary("*", _real(a), b)


def _real(e: Scalar) -> Scalar:
    """Integers as floats, before they meet others: the product of two may pass 2**31."""
    return Binary("*", Const(1.0), e) if e.type is Type.INT else e
