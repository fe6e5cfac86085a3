"""Makes scalar nodes: folds constants, keeps integer bounds, and holds the bounds on untrusted input.

Only what the checker needs is folded: operations on constants, and `and`, `or`, `if` that a constant decides
(so that `if layer % 2 == 0` picks its side). Nothing is rearranged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attndsl.diagnostics import Span
from attndsl.grammar.build import INT_MAX
from attndsl.grammar.report import Report
from attndsl.observation import Observation
from attndsl.program import (
    Arg,
    Binary,
    Call,
    Compare,
    Const,
    If,
    InputDecl,
    Logic,
    Read,
    Scalar,
    Table,
    TableDecl,
    Type,
    Unary,
    Var,
    children,
    walk,
)
from attndsl.selection import Selection

MAX_SIZE = 20_000
MAX_DEPTH = 128
MAX_TERMS = 256
MAX_WORK = 60_000


@dataclass(frozen=True, slots=True)
class Bounds:
    """Least and greatest value of an integer; None where unbounded."""

    low: int | None = None
    high: int | None = None


_ANY = Bounds()
_VARS = {
    "q": Bounds(0), "k": Bounds(0), "b": Bounds(0), "h": Bounds(0), "g": Bounds(0), "Nq": Bounds(0), "Nk": Bounds(0),
    "H": Bounds(1), "G": Bounds(1), "D": Bounds(1), "Dv": Bounds(1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Facts:
    node: Scalar  # keeps the node alive, so that its id stays its own
    size: int
    depth: int
    bounds: Bounds


class Maker:
    """Makes the nodes of one program. `work` is what lowering may cost, in surface nodes."""

    def __init__(self, report: Report, work: int = MAX_WORK) -> None:
        self.report = report
        self.work = work
        self.tables: dict[str, TableDecl] = {}
        self.inputs: dict[str, InputDecl] = {}
        self.selections: dict[str, Selection] = {}
        # Selections that leave to the place where they stand what they choose among.
        self.open_selections: set[str] = set()
        self.observations: list[Observation] = []
        self._facts: dict[int, _Facts] = {}
        self._coordinates = set[int]()
        self._terms = 0
        # In a branch that a constant condition has ruled out, values are not judged.
        self.dead = 0

    def selection_name(self, function: str) -> str:
        """A name for a selection that has none: `top`, `top_2`, …"""
        taken = {*self.selections, *self.inputs, *self.tables}
        numbered = (function if i == 1 else f"{function}_{i}" for i in range(1, len(taken) + 2))
        return next(name for name in numbered if name not in taken)

    # -------------------------------------------------------------------------------- budgets
    def step(self, span: Span) -> None:
        """Counts one surface node being lowered."""
        self.work -= 1
        if self.work < 0:
            raise self.report.fatal(
                "A006", "the pattern expands to too much", span, help="patterns that call patterns multiply: call fewer"
            )

    def term(self, span: Span) -> None:
        """Counts one set term."""
        self._terms += 1
        if self._terms > MAX_TERMS:
            raise self.report.fatal(
                "A006", f"the pattern expands to more than {MAX_TERMS} set terms", span, help="write one comprehension"
            )

    def bounds(self, e: Scalar) -> Bounds:
        return self._facts[id(e)].bounds

    def keep(self, e: Scalar, span: Span) -> Scalar:
        """Notes a new node: its expanded size, its depth and its bounds."""
        below = [self._facts[id(child)] for child in children(e)]
        size = 1 + sum(f.size for f in below)
        depth = 1 + max((f.depth for f in below), default=0)
        if size > MAX_SIZE or depth > MAX_DEPTH:
            what = f"more than {MAX_SIZE:,} nodes" if size > MAX_SIZE else f"more than {MAX_DEPTH} levels"
            raise self.report.fatal(
                "A006", f"the expression expands to {what}", span, help="`where` bindings that use each other multiply"
            )
        self._facts[id(e)] = _Facts(e, size, depth, self._bounds(e, [f.bounds for f in below]))
        return e

    def coordinate(self, e: Scalar, span: Span) -> Scalar:
        """Notes a coordinate of a grid, as arithmetic of a position, and whatever is under it."""
        self._coordinates.add(id(e))
        return self._adopt(e, span)

    def _adopt(self, e: Scalar, span: Span) -> Scalar:
        for child in children(e):
            self._adopt(child, span)
        return self.keep(e, span)

    def reads_grid(self, e: Scalar) -> bool:
        """Whether a scalar reads a coordinate."""
        return any(id(x) in self._coordinates for x in walk(e))

    # -------------------------------------------------------------------------------- making
    def const(self, value: int | float | bool, span: Span) -> Scalar:
        if isinstance(value, int) and not isinstance(value, bool) and not -INT_MAX - 1 <= value <= INT_MAX:
            self.report.error("A007", "this value does not fit in 63 bits", span, help=f"at most {INT_MAX}")
            value = 1
        if isinstance(value, float) and not math.isfinite(value):
            self.report.error("A007", "this value is not finite", span, help="at most 1.7e308")
            value = 1.0
        return self.keep(Const(value), span)

    def make(self, e: Scalar, span: Span) -> Scalar:
        """The node, or the constant that it is."""
        folded = _fold(e)
        return self.keep(e, span) if folded is None else self.const(folded, span)

    def if_(self, cond: Scalar, then: Scalar, other: Scalar, span: Span) -> Scalar:
        if isinstance(cond, Const):
            chosen, left = (then, other) if cond.value else (other, then)
            # The type stays that of the whole: int beside float is float.
            if chosen.type is Type.INT and left.type is Type.FLOAT:
                return self.make(Binary("*", self.const(1.0, span), chosen), span)
            return chosen
        return self.keep(If(cond, then, other), span)

    def logic(self, op: str, operands: list[Scalar], span: Span) -> Scalar:
        """`and`, `or`; operands are looked at from the left, as they guard each other."""
        decides = op == "or"
        kept: list[Scalar] = []
        for operand in operands:
            if isinstance(operand, Const):
                if operand.value is decides:
                    if not kept:
                        return operand
                    kept.append(operand)
                    break
                continue
            kept.append(operand)
        if not kept:
            return self.const(not decides, span)
        return kept[0] if len(kept) == 1 else self.keep(Logic(op, tuple(kept)), span)

    # -------------------------------------------------------------------------------- bounds
    def _bounds(self, e: Scalar, below: list[Bounds]) -> Bounds:
        match e:
            case Const(value=v):
                return Bounds(v, v) if isinstance(v, int) and not isinstance(v, bool) else _ANY
            case Var(name=name):
                return _VARS.get(name, _ANY)
            case Table(name=name, type=Type.INT):
                values = [int(v) for v in self.tables[name].values]
                return Bounds(min(values), max(values))
            case Unary(op="-"):
                return Bounds(_neg(below[0].high), _neg(below[0].low))
            case Binary(op=op) if e.type is Type.INT:
                return _binary(op, *below)
            case If() if e.type is Type.INT:
                return _hull(below[1:])
            case Call(function=function) if e.type is Type.INT:
                return _call(function, below)
            case _:
                return _ANY


def _neg(x: int | None) -> int | None:
    return None if x is None else -x


def _hull(parts: list[Bounds]) -> Bounds:
    lows, highs = [p.low for p in parts], [p.high for p in parts]
    low = None if None in lows else min(x for x in lows if x is not None)
    return Bounds(low, None if None in highs else max(x for x in highs if x is not None))


def _binary(op: str, a: Bounds, b: Bounds) -> Bounds:
    def plus(x: int | None, y: int | None) -> int | None:
        return None if x is None or y is None else x + y

    match op:
        case "+":
            return Bounds(plus(a.low, b.low), plus(a.high, b.high))
        case "-":
            return Bounds(plus(a.low, _neg(b.high)), plus(a.high, _neg(b.low)))
        case "*":
            if Bounds(0, 0) in (a, b):
                return Bounds(0, 0)
            ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high) if x is not None and y is not None]
            if len(ends) == 4:
                return Bounds(min(ends), max(ends))
            nonnegative = a.low is not None and a.low >= 0 and b.low is not None and b.low >= 0
            return Bounds(a.low * b.low) if nonnegative and a.low is not None and b.low is not None else _ANY
        case "%":
            positive = b.low is not None and b.low > 0
            return Bounds(0, None if b.high is None else b.high - 1) if positive else _ANY
        case "//":
            if b.low is None or b.low <= 0:
                return _ANY
            low = None if a.low is None else (a.low // b.low if a.low < 0 else (a.low // b.high if b.high else 0))
            return Bounds(low, None if a.high is None else (a.high // b.low if a.high >= 0 else -1))
        case _:
            return _ANY


def _call(function: str, args: list[Bounds]) -> Bounds:
    match function:
        case "min":
            highs = [a.high for a in args if a.high is not None]
            return Bounds(_hull(args).low, min(highs) if highs else None)
        case "max":
            lows = [a.low for a in args if a.low is not None]
            return Bounds(max(lows) if lows else None, _hull(args).high)
        case "clamp":
            return Bounds(_hull(args[1:]).low, args[2].high)
        case "abs" | "bit_length":
            return Bounds(0)
        case _:
            return _ANY


def _fold(e: Scalar) -> int | float | bool | None:
    values: list[int | float | bool] = []
    for child in children(e):
        if not isinstance(child, Const):
            return None
        values.append(child.value)
    match e:
        case Unary(op="not"):
            return not values[0]
        case Unary():
            return -values[0]
        case Compare(op=op):
            return _compare(op, values[0], values[1])
        case Binary(op=op):
            return _arithmetic(op, values[0], values[1])
        case Call(function=function):
            return _apply(function, values)
        case Const() | Var() | Arg() | Table() | Read() | Logic() | If():
            return None


def _compare(op: str, a: float, b: float) -> bool:
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b, "!=": a != b}[op]


def _arithmetic(op: str, a: float, b: float) -> int | float | None:
    try:
        match op:
            case "+":
                return a + b
            case "-":
                return a - b
            case "*":
                return a * b
            case "//":
                return a // b
            case "%":
                return a % b
            case _:
                return a / b
    except (ZeroDivisionError, OverflowError):
        # Whoever makes the division has reported the divisor.
        return None


def _apply(function: str, values: list[int | float | bool]) -> int | float | bool | None:
    match function:
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "abs":
            return abs(values[0])
        case "clamp":
            return min(max(values[0], values[1]), values[2])
        case "bit_length":
            return max(int(values[0]), 0).bit_length()
        case "is_power_of_two":
            n = int(values[0])
            return n > 0 and n & (n - 1) == 0
        case _:
            return None


def reads_inputs(e: Scalar) -> bool:
    """Whether a value is known only when the attention is called: it reads an argument, an input or a length."""
    if isinstance(e, Arg | Read) or (isinstance(e, Var) and e.name in ("Nq", "Nk")):
        return True
    return any(reads_inputs(child) for child in children(e))
