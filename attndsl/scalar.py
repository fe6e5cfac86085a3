"""Scalars: the integers, floats and booleans that a program computes, as immutable graphs.

    e ::= Const v | Var x | Arg x | Table t[e*] | Read input[e*]
        | Unary op e | Binary op e e | Compare op e e | Logic op e* | If e e e | Call f e*

Substituted `where` bindings make them graphs with shared nodes; the front end bounds their expanded size.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, TypeAlias, assert_never

from attndsl.grid import AXIS_NAMES


class HashedOnce:
    """A frozen dataclass whose hash is computed once.

    Memos, caches and sums of terms ask for it all the time, and each time it would go over everything that is shared
    below, written out.
    """

    __slots__ = ("_hash",)
    _hash: int

    def __init_subclass__(cls) -> None:
        # In the class itself, where a dataclass leaves it alone.
        cls.__hash__ = HashedOnce.__hash__  # type: ignore[method-assign]

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            found = hash(_compared(type(self))(self))  # type: ignore[arg-type]
            object.__setattr__(self, "_hash", found)
            return found


@functools.cache
def _compared(cls: Any) -> operator.attrgetter[Any]:
    """What reads the fields of a dataclass that count in comparisons."""
    return operator.attrgetter(*(x.name for x in fields(cls) if x.compare))


class Type(Enum):
    """Type of a scalar."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"


# What a pattern may read: positions q and k, query head h, its KV head g, batch entry b, the pair's scaled dot product
# s, and Nq and Nk, one past the last positions.
BUILTINS = frozenset({"q", "k", "b", "h", "g", "s", "Nq", "Nk", "H", "G", "D", "Dv"})
# Names that only the compiler introduces: the tile indices, their difference, the position of a call's first row,
# those of a layout (`layout.py`): the residue, a query's and a key's index in its order, and that of the first row;
# in an output the channel; the place of an entry in a list of tiles; that of a token in its tile, and the tile's first;
# where tiles begin that begin anywhere, and the position of such a tile's last row.
TILE_NAMES = AXIS_NAMES.union(
    "q_tile k_tile diagonal start residue i j i_start d place in_tile tile_first shift q_last".split()
)

ARITHMETIC = frozenset({"+", "-", "*", "//", "%", "/"})
COMPARISONS = frozenset({"<", "<=", ">", ">=", "==", "!="})
INT_CALLS: dict[str, int | None] = {"min": None, "max": None, "abs": 1, "clamp": 3, "bit_length": 1}
BOOL_CALLS: dict[str, int | None] = {"is_power_of_two": 1}
# Only the compiler calls `mix64(x, y)`, 64 bits of hash of y after x, and `drawn(hash, member, last_hash, last)`.
FLOAT_CALLS: dict[str, int | None] = {
    "exp": 1, "exp2": 1, "log": 1, "sqrt": 1, "tanh": 1, "sigmoid": 1, "softcap": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Const(HashedOnce):
    """A literal. One of another type is another: `1`, `1.0` and `true`, which Python takes for equal."""

    value: int | float | bool

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Const):
            return NotImplemented
        return self.value == other.value and type(self.value) is type(other.value)

    @property
    def type(self) -> Type:
        if isinstance(self.value, bool):
            return Type.BOOL
        return Type.INT if isinstance(self.value, int) else Type.FLOAT


@dataclass(frozen=True, slots=True)
class Var(HashedOnce):
    """One of `BUILTINS` (or of `TILE_NAMES`, in what the compiler derives)."""

    name: str

    def __post_init__(self) -> None:
        assert self.name in BUILTINS or self.name in TILE_NAMES, self.name

    @property
    def type(self) -> Type:
        return Type.FLOAT if self.name == "s" else Type.INT


@dataclass(frozen=True, slots=True)
class Arg(HashedOnce):
    """A `runtime int` parameter: an argument of the kernel."""

    name: str

    @property
    def type(self) -> Type:
        return Type.INT


@dataclass(frozen=True, slots=True)
class Table(HashedOnce):
    """An entry of a compile-time table (`Program.tables`); every index is clamped to its dimension."""

    name: str
    index: tuple[Scalar, ...]
    type: Type


@dataclass(frozen=True, slots=True)
class Read(HashedOnce):
    """An entry of an input, one index per declared dimension; every index is clamped to its dimension.

    The index of a `q` dimension is a query position; the tensor holds the rows of the call, so its row is the position
    less (Nk - rows), or the position itself under `align start`.
    """

    input: str
    index: tuple[Scalar, ...]
    type: Type


@dataclass(frozen=True, slots=True)
class Unary(HashedOnce):
    """`-` on a number, `not` on a boolean."""

    op: str
    operand: Scalar

    @property
    def type(self) -> Type:
        return self.operand.type


@dataclass(frozen=True, slots=True)
class Binary(HashedOnce):
    """`+ - *` on numbers, `/` (always float), `//` and `%` on ints, rounding towards minus infinity."""

    op: str
    left: Scalar
    right: Scalar
    type: Type = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.op in ARITHMETIC, self.op
        isfloat = self.op == "/" or Type.FLOAT in (self.left.type, self.right.type)
        object.__setattr__(self, "type", Type.FLOAT if isfloat else Type.INT)


@dataclass(frozen=True, slots=True)
class Compare(HashedOnce):
    op: str
    left: Scalar
    right: Scalar

    def __post_init__(self) -> None:
        assert self.op in COMPARISONS, self.op

    @property
    def type(self) -> Type:
        return Type.BOOL


@dataclass(frozen=True, slots=True)
class Logic(HashedOnce):
    """`and`, `or` of two or more booleans."""

    op: str
    operands: tuple[Scalar, ...]

    @property
    def type(self) -> Type:
        return Type.BOOL


@dataclass(frozen=True, slots=True)
class If(HashedOnce):
    cond: Scalar
    then: Scalar
    other: Scalar
    type: Type = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        types = (self.then.type, self.other.type)
        object.__setattr__(self, "type", Type.FLOAT if Type.FLOAT in types else types[0])


@dataclass(frozen=True, slots=True)
class Call(HashedOnce):
    """A function of `INT_CALLS` (float if an argument is), `BOOL_CALLS` or `FLOAT_CALLS`."""

    function: str
    args: tuple[Scalar, ...]
    type: Type = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.function in BOOL_CALLS or self.function == "drawn":
            type = Type.BOOL
        elif self.function in FLOAT_CALLS or any(a.type is Type.FLOAT for a in self.args):
            type = Type.FLOAT
        else:
            type = Type.INT
        object.__setattr__(self, "type", type)


Scalar: TypeAlias = Const | Var | Arg | Table | Read | Unary | Binary | Compare | Logic | If | Call


_NONE: tuple[Scalar, ...] = ()
# By class: this is asked of every node of every expression, many times. Plain functions, which torch.compile can trace.
_CHILDREN: dict[type, Callable[[Any], tuple[Scalar, ...]]] = {
    Const: lambda e: _NONE,
    Var: lambda e: _NONE,
    Arg: lambda e: _NONE,
    Table: lambda e: e.index,
    Read: lambda e: e.index,
    Unary: lambda e: (e.operand,),
    Binary: lambda e: (e.left, e.right),
    Compare: lambda e: (e.left, e.right),
    Logic: lambda e: e.operands,
    Call: lambda e: e.args,
    If: lambda e: (e.cond, e.then, e.other),
}


def children(e: Scalar) -> tuple[Scalar, ...]:
    """The direct operands of a scalar."""
    return _CHILDREN[type(e)](e)


def walk(*roots: Scalar) -> Iterator[Scalar]:
    """Every distinct node under some scalars (shared nodes once), a scalar before what is under it."""
    seen: set[int] = set()
    stack: list[Scalar] = list(reversed(roots))
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack += _CHILDREN[type(node)](node)


def reads(e: Scalar, *names: str) -> bool:
    """Whether the scalar reads one of these variables anywhere."""
    return any(isinstance(x, Var) and x.name in names for x in walk(e))


# What was made of nodes, by identity. It keeps the nodes too: one that goes would leave its identity to another.
Memo: TypeAlias = dict[int, tuple["Scalar", "Scalar"]]


def rebuild(e: Scalar, step: Callable[[Scalar], Scalar], memo: Memo | None = None) -> Scalar:
    """The scalar with `step` applied to every node, operands first; shared nodes stay shared, and those that it leaves
    as they are stay themselves. memo: what this step made of nodes before, and makes now."""
    known = {} if memo is None else memo

    def inner(x: Scalar) -> Scalar:
        found = known.get(id(x))
        if found is None:
            found = known[id(x)] = x, step(_with_children(x, inner))
        return found[1]

    return inner(e)


def _with_children(e: Scalar, inner: Callable[[Scalar], Scalar]) -> Scalar:
    """The scalar with other operands."""
    match e:
        case Const() | Var() | Arg():
            return e
        case Binary(op=op, left=a, right=b):
            left, right = inner(a), inner(b)
            return e if left is a and right is b else Binary(op, left, right)
        case Compare(op=op, left=a, right=b):
            left, right = inner(a), inner(b)
            return e if left is a and right is b else Compare(op, left, right)
        case If(cond=c, then=a, other=b):
            cond, then, other = inner(c), inner(a), inner(b)
            return e if cond is c and then is a and other is b else If(cond, then, other)
        case Unary(op=op, operand=x):
            operand = inner(x)
            return e if operand is x else Unary(op, operand)
        case Logic(op=op, operands=xs):
            found = tuple(map(inner, xs))
            return e if _same(found, xs) else Logic(op, found)
        case Call(function=f, args=xs):
            found = tuple(map(inner, xs))
            return e if _same(found, xs) else Call(f, found)
        case Table(name=name, index=xs, type=type):
            found = tuple(map(inner, xs))
            return e if _same(found, xs) else Table(name, found, type)
        case Read(input=name, index=xs, type=type):
            found = tuple(map(inner, xs))
            return e if _same(found, xs) else Read(name, found, type)
        case _:
            assert_never(e)


def _same(some: tuple[Scalar, ...], others: tuple[Scalar, ...]) -> bool:
    return all(map(operator.is_, some, others))


def substitute(e: Scalar, values: Mapping[str, Scalar], memo: Memo | None = None) -> Scalar:
    """The scalar with variables replaced by other scalars. memo: as in `rebuild`."""
    return rebuild(e, lambda x: values.get(x.name, x) if isinstance(x, Var) else x, memo)
