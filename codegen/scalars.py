"""Scalars as source text: one printer, three dialects.

The printer writes an expression with as few parentheses as its precedence allows. `Names` gives leaves their
text and holds what already has a name, so that a value is computed once: outside the loops where it reads
neither keys nor scores, and once per tile where several expressions share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Protocol, assert_never

from attndsl.codegen.lines import Lines
from attndsl.program import (
    FLOAT_CALLS,
    Arg,
    Binary,
    Call,
    Compare,
    Const,
    If,
    Logic,
    Read,
    Scalar,
    Table,
    Type,
    Unary,
    Var,
    children,
    reads,
)  # fmt: skip
from attndsl.widths import LARGEST


class Level(IntEnum):
    """Precedence of a printed expression, loosest first."""

    COND = 0
    OR = 1
    AND = 2
    NOT = 3
    COMPARE = 4
    BIT_OR = 5
    BIT_AND = 6
    SHIFT = 7
    SUM = 8
    TERM = 9
    UNARY = 10
    ATOM = 11


Printed = tuple[str, Level]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How functions and logic are spelled.

    `functions`: spelling of `Call`s. `bitwise`: booleans are tensors, joined by `& | ~`. `select`: the function that
    chooses by a condition, None for Python's own conditional. `floor`: names of the helpers for `//` and `%`
    where the operators round towards zero, None where they round down. `real`: an integer as a float.
    `language`: the name of the module that leaves load through. `wide`: the helper that puts an integer in 64 bits,
    None where integers have as many.
    """

    functions: Mapping[str, str]
    bitwise: bool
    select: str | None
    floor: tuple[str, str] | None
    infinity: str
    real: str
    language: str = ""
    wide: str | None = None


TRITON = Dialect(
    functions={
        "min": "tl.minimum", "max": "tl.maximum", "abs": "tl.abs", "clamp": "clamp", "bit_length": "bit_length",
        "mix64": "mix64", "drawn": "drawn",
        "is_power_of_two": "is_power_of_two", "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "sqrt": "tl.sqrt",
        "tanh": "tanh", "sigmoid": "sigmoid", "softcap": "softcap",
    },
    bitwise=True, select="tl.where", floor=("floor_div", "floor_mod"), infinity='float("inf")',
    real="({}).to(tl.float32)", language="tl", wide="wide",
)  # fmt: skip
GLUON = replace(
    TRITON,
    functions={f: name.replace("tl.", "gl.") for f, name in TRITON.functions.items()},
    select="gl.where", real="({}).to(gl.float32)", language="gl",
)  # fmt: skip
TORCH = Dialect(
    functions={
        "min": "minimum", "max": "maximum", "abs": "abs", "clamp": "clamp", "bit_length": "bit_length",
        "mix64": "mix64", "drawn": "drawn",
        "is_power_of_two": "is_power_of_two", "exp": "torch.exp", "exp2": "torch.exp2", "log": "torch.log",
        "sqrt": "torch.sqrt", "tanh": "torch.tanh", "sigmoid": "torch.sigmoid", "softcap": "softcap",
    },
    bitwise=True, select="where", floor=None, infinity="math.inf", real="real({}, compute)",
)  # fmt: skip
PYTHON = Dialect(
    functions={"min": "min", "max": "max", "abs": "abs", "clamp": "clamp", "bit_length": "bit_length",
               "is_power_of_two": "is_power_of_two"},
    bitwise=False, select=None, floor=None, infinity="math.inf", real="float({})",
)  # fmt: skip


class LeafText(Protocol):
    """Text of leaves."""

    def __call__(self, e: Scalar, printer: Printer) -> str: ...

    def any_integers(self, e: Read | Table) -> bool:
        """Whether an input holds integers that a call gives: any that its memory has, however long the call is. Or a
        table the largest of 32 bits."""


class Width(IntEnum):
    """What is known of the bits of an integer: it is smaller than the largest of 32 (`attndsl/widths.py`), it is any
    of 32 as an input holds them, or it is computed from such and has 64."""

    FITS = 0
    ANY = 1
    WIDE = 2


@dataclass(slots=True)
class Names:
    """Text of leaves, and names of values computed so far."""

    leaf: LeafText
    known: dict[Scalar, str] = field(default_factory=dict)
    widths: dict[Scalar, Width] = field(default_factory=dict)

    def inner(self) -> Names:
        """A scope inside this one: what is named there is forgotten after it."""
        return Names(self.leaf, dict(self.known), self.widths)

    def width(self, e: Scalar) -> Width:
        """The width of an integer as it is computed in kernels of 32 bits."""
        if (found := self.widths.get(e)) is None:
            found = self.widths[e] = self._width(e)
        return found

    def _width(self, e: Scalar) -> Width:
        match e:
            case Read() | Table():
                return Width.ANY if self.leaf.any_integers(e) else Width.FITS
            case Const(value=value) if e.type is Type.INT and abs(value) >= LARGEST:
                return Width.ANY
            case Call(function="bit_length"):
                return Width.FITS
            case Binary(op="%", left=x, right=Const()) if self.width(x) is Width.ANY:
                return Width.FITS
            case Binary() | Unary() | If() | Call() if e.type is Type.INT:
                of = max(self.width(x) for x in (children(e)[1:] if isinstance(e, If) else children(e)))
                return Width.WIDE if of is Width.ANY and _grows(e) else of
            case _:
                return Width.FITS


@dataclass(frozen=True, slots=True)
class Printer:
    """Prints scalars in a dialect; `helpers` collects the prelude functions that the text calls."""

    dialect: Dialect
    names: Names
    helpers: set[str] = field(default_factory=set)

    def text(self, e: Scalar, level: Level = Level.COND) -> str:
        """The expression's text, in parentheses if it binds more loosely than `level`."""
        text, own = self._print(e)
        return text if own >= level else f"({text})"

    def within(self, names: Names) -> Printer:
        return Printer(self.dialect, names, self.helpers)

    def _print(self, e: Scalar) -> Printed:
        if e in self.names.known:
            return self.names.known[e], Level.ATOM
        match e:
            case Const(value=value):
                return self._constant(value)
            case Var() | Arg() | Table() | Read():
                return self.names.leaf(e, self), Level.ATOM
            case Unary(op="not", operand=x):
                if self.dialect.bitwise:
                    return f"~{self.text(x, Level.UNARY)}", Level.UNARY
                return f"not {self.text(x, Level.NOT)}", Level.NOT
            case Unary(operand=x):
                return f"-{self._operand(x, Level.UNARY)}", Level.UNARY
            case Binary(op=op, left=a, right=b):
                return self._binary(op, a, b)
            case Compare(op=op, left=a, right=b):
                return f"{self._compared(a, b)} {op} {self._compared(b, a)}", Level.COMPARE
            case Logic(op=op, operands=xs):
                sign, level = self._joint(op)
                return f" {sign} ".join(self.text(x, Level(level + 1)) for x in xs), level
            case If(cond=c, then=a, other=b):
                if self.dialect.select is None:
                    then, cond = self.text(a, Level.OR), self.text(c, Level.OR)
                    return f"{then} if {cond} else {self.text(b)}", Level.COND
                self.helpers.add(self.dialect.select)
                return f"{self.dialect.select}({self.text(c)}, {self.text(a)}, {self.text(b)})", Level.ATOM
            case Call(function=f, args=args):
                return self._call(f, args), Level.ATOM
            case _:
                assert_never(e)

    def _constant(self, value: int | float | bool) -> Printed:
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            sign = "-" if value < 0 else ""
            return f"{sign}{self.dialect.infinity}", Level.UNARY
        return repr(value), Level.ATOM if isinstance(value, bool) or value >= 0 else Level.UNARY

    def _joint(self, op: str) -> tuple[str, Level]:
        if self.dialect.bitwise:
            return ("&", Level.BIT_AND) if op == "and" else ("|", Level.BIT_OR)
        return (op, Level.AND) if op == "and" else (op, Level.OR)

    def _binary(self, op: str, a: Scalar, b: Scalar) -> Printed:
        # Two integers, or an integer and a literal, make a float32 in torch, whatever the precision of the call.
        if op == "/" or Type.FLOAT in (a.type, b.type):
            left = self._real(a) if self._loose(a, b) else self.text(a, Level.SUM if op in "+-" else Level.TERM)
            right = self._real(b) if self._loose(b, a) else self.text(b, Level.TERM if op in "+-" else Level.UNARY)
            return f"{left} {op} {right}", Level.SUM if op in "+-" else Level.TERM
        match op:
            case "+" | "-":
                return f"{self._operand(a, Level.SUM)} {op} {self._operand(b, Level.TERM)}", Level.SUM
            case "//" | "%" if self.dialect.floor is not None:
                return self._floored(op, a, b)
            case _:
                return f"{self._operand(a, Level.TERM)} {op} {self._operand(b, Level.UNARY)}", Level.TERM

    def _compared(self, e: Scalar, other: Scalar) -> str:
        """The text of one side of a comparison. Between one of 64 bits and one smaller than the largest of 32 these
        decide."""
        types = e.type is other.type is Type.INT
        if self.dialect.wide is None or not types or self.names.width(e) is not Width.WIDE:
            return self.text(e, Level.BIT_OR)
        if self.names.width(other) is not Width.FITS:
            return self.text(e, Level.BIT_OR)
        self.helpers.add("narrow")
        return f"narrow({self.text(e)})"

    def _operand(self, e: Scalar, level: Level) -> str:
        """The text of an operand of what may be larger than it: any integer of an input in 64 bits."""
        number = e.type is not Type.INT or isinstance(e, Const)
        if self.dialect.wide is None or number or self.names.width(e) is not Width.ANY:
            return self.text(e, level)
        self.helpers.add(self.dialect.wide)
        return f"{self.dialect.wide}({self.text(e)})"

    def _loose(self, e: Scalar, other: Scalar) -> bool:
        """Whether an operand is an integer that the other one gives no precision."""
        return e.type is Type.INT and not isinstance(e, Const) and (other.type is Type.INT or isinstance(other, Const))

    def _floored(self, op: str, a: Scalar, b: Scalar) -> Printed:
        """Division that rounds down where the operators do not: shifts and masks for powers of two, else a helper."""
        assert self.dialect.floor is not None
        if isinstance(b, Const) and int(b.value) & (int(b.value) - 1) == 0:
            if op == "%":
                return f"{self.text(a, Level.TERM)} & {int(b.value) - 1}", Level.BIT_AND
            return f"{self.text(a, Level.TERM)} >> {int(b.value).bit_length() - 1}", Level.SHIFT
        name = self.dialect.floor[op == "%"]
        self.helpers.add(name)
        return f"{name}({self.text(a)}, {self.text(b)})", Level.ATOM

    def _call(self, function: str, args: tuple[Scalar, ...]) -> str:
        name = self.dialect.functions[function]
        self.helpers.add(name)
        argument = self._operand if function == "abs" else self.text
        texts = [self._real(x) if function in FLOAT_CALLS else argument(x, Level.COND) for x in args]
        if name.rpartition(".")[2] in ("minimum", "maximum"):
            # These take two.
            joined = texts[0]
            for text in texts[1:]:
                joined = f"{name}({joined}, {text})"
            return joined
        return f"{name}({', '.join(texts)})"

    def _real(self, e: Scalar) -> str:
        """The scalar as a float: functions of floats take no integers, and what torch makes of one is a float32."""
        if isinstance(e, Const):
            return self.text(Const(float(e.value)))
        if e.type is Type.FLOAT:
            return self.text(e)
        self.helpers.add("real")
        return self.dialect.real.format(self.text(e))

    # ------------------------------------------------------------------------------------ naming

    def name(self, lines: Lines, e: Scalar, name: str) -> str:
        """Compute a value into a local of this name, unless it is a leaf or has a name already."""
        if e in self.names.known:
            return self.names.known[e]
        text, level = self._print(e)
        if isinstance(e, Const) or (isinstance(e, Var) and level is Level.ATOM):
            return text
        lines.add(f"{name} = {text}")
        self.names.known[e] = name
        return name

    def hoist(self, lines: Lines, roots: list[Scalar], inside: tuple[str, ...], prefix: str) -> None:
        """Name, in the present scope, the largest parts of `roots` that are worth it and do not read `inside`."""
        for root in roots:
            for part in _independent(root, inside):
                if part not in self.names.known and self._is_work(part):
                    self.name(lines, part, f"{prefix}{len(self.names.known)}")

    def share(self, lines: Lines, roots: list[Scalar], prefix: str) -> None:
        """Name what occurs more than once in `roots` and is worth a name, innermost first."""
        uses: Counter[Scalar] = Counter()
        order: dict[Scalar, None] = {}
        for root in roots:
            for e in self._unnamed(root):
                order[e] = None
                uses.update(children(e))
        for e in reversed(order):
            if uses[e] > 1 and e not in self.names.known and self._is_work(e):
                self.name(lines, e, f"{prefix}{len(self.names.known)}")

    def _unnamed(self, root: Scalar) -> Iterator[Scalar]:
        """What is left to compute of a scalar: each part once, outermost first, none inside of what has a name."""
        pending, seen = [root], set[int]()
        while pending:
            e = pending.pop()
            if id(e) not in seen:
                seen.add(id(e))
                yield e
                pending += () if e in self.names.known else children(e)

    def _is_work(self, e: Scalar) -> bool:
        """Whether a value is worth a name: it reads memory, divides, or takes several operations."""
        return self._work(e) >= 2

    def _work(self, e: Scalar) -> int:
        match e:
            case Const() | Var() | Arg():
                return 0
            case _ if e in self.names.known:
                return 0
            case Read() | Table():
                return 2
            case Binary(op="//" | "%"):
                return 2
            case _:
                return 1 + sum(self._work(x) for x in children(e))


def _grows(e: Scalar) -> bool:
    """Whether an integer may be larger than those that it is computed from."""
    match e:
        case Unary() | Binary(op="+" | "-" | "*") | Call(function="abs"):
            return True
        case _:
            return False


def _independent(e: Scalar, inside: tuple[str, ...]) -> list[Scalar]:
    if not reads(e, *inside):
        return [e]
    return [part for x in children(e) for part in _independent(x, inside)]
