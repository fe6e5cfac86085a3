"""The typed program: what an attention means, every name resolved and every parameter bound.

    scalar  e ::= Const v | Var x | Arg x | Table t[e*] | Read input[e*]
                | Unary op e | Binary op e e | Compare op e e | Logic op e* | If e e e | Call f e*
    set     P ::= Where e | Union P* | Inter P* | Minus P P | Complement P | Choose e P P
                | On P place | Coarsen P | Random P e | Selected plan[e*]
    place     ::= Blocks B | Permuted input | Segment input | Along axis
    program   ::= inputs, arguments, tables, branches, output      branches and output: see `branches`

`grammar.lower` makes it, the oracle (`attndsl.oracle`, `runtime.reference`) says what it means, and the compiler
turns it into kernels. Substituted `where` bindings make expressions a graph with shared nodes; the front end bounds
their expanded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias, assert_never

from attndsl.branches import Branch as Branch
from attndsl.branches import Output, Part
from attndsl.call_shape import CallShape as CallShape
from attndsl.derivation import Random, Segment
from attndsl.diagnostics import Source, Span, error
from attndsl.grid import AXIS_NAMES, Along, Grid
from attndsl.inputs import KERNEL_TENSORS as KERNEL_TENSORS
from attndsl.inputs import Axis as Axis
from attndsl.inputs import Dim as Dim
from attndsl.inputs import InputDecl as InputDecl
from attndsl.inputs import TableDecl as TableDecl
from attndsl.members import Placed, Runs
from attndsl.observation import Observation
from attndsl.selection import Selected as Selected
from attndsl.selection import Selection


class Type(Enum):
    """Type of a scalar."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"


# ---------------------------------------------------------------------------------------- scalars

# What a pattern may read: positions q and k, query head h, its KV head g, batch entry b, the pair's scaled dot product
# s, and Nq and Nk, one past the last positions.
BUILTINS = frozenset({"q", "k", "b", "h", "g", "s", "Nq", "Nk", "H", "G", "D", "Dv"})
# Names that only the compiler introduces: the tile indices, their difference, the position of a call's first row,
# those of a layout (`layout.py`): the residue, a query's and a key's index in its order, and that of the first row;
# in an output the channel; the place of an entry in a list of tiles; that of a token in its tile, and the tile's first.
TILE_NAMES = AXIS_NAMES.union("q_tile k_tile diagonal start residue i j i_start d place in_tile tile_first".split())

ARITHMETIC = frozenset({"+", "-", "*", "//", "%", "/"})
COMPARISONS = frozenset({"<", "<=", ">", ">=", "==", "!="})
INT_CALLS: dict[str, int | None] = {"min": None, "max": None, "abs": 1, "clamp": 3, "bit_length": 1}
BOOL_CALLS: dict[str, int | None] = {"is_power_of_two": 1}
# Only the compiler calls `mix64(x, y)`, 64 bits of hash of y after x, and `drawn(hash, member, last_hash, last)`.
FLOAT_CALLS: dict[str, int | None] = {
    "exp": 1, "exp2": 1, "log": 1, "sqrt": 1, "tanh": 1, "sigmoid": 1, "softcap": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Const:
    value: int | float | bool

    @property
    def type(self) -> Type:
        if isinstance(self.value, bool):
            return Type.BOOL
        return Type.INT if isinstance(self.value, int) else Type.FLOAT


@dataclass(frozen=True, slots=True)
class Var:
    """One of `BUILTINS` (or of `TILE_NAMES`, in what the compiler derives)."""

    name: str

    def __post_init__(self) -> None:
        assert self.name in BUILTINS or self.name in TILE_NAMES, self.name

    @property
    def type(self) -> Type:
        return Type.FLOAT if self.name == "s" else Type.INT


@dataclass(frozen=True, slots=True)
class Arg:
    """A `runtime int` parameter: an argument of the kernel."""

    name: str

    @property
    def type(self) -> Type:
        return Type.INT


@dataclass(frozen=True, slots=True)
class Table:
    """An entry of a compile-time table (`Program.tables`); every index is clamped to its dimension."""

    name: str
    index: tuple[Scalar, ...]
    type: Type


@dataclass(frozen=True, slots=True)
class Read:
    """An entry of an input, one index per declared dimension; every index is clamped to its dimension.

    The index of a `q` dimension is a query position; the tensor holds the rows of the call, so its row is the position
    less (Nk - rows), or the position itself under `align start`.
    """

    input: str
    index: tuple[Scalar, ...]
    type: Type


@dataclass(frozen=True, slots=True)
class Unary:
    """`-` on a number, `not` on a boolean."""

    op: str
    operand: Scalar

    @property
    def type(self) -> Type:
        return self.operand.type


@dataclass(frozen=True, slots=True)
class Binary:
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
class Compare:
    op: str
    left: Scalar
    right: Scalar

    def __post_init__(self) -> None:
        assert self.op in COMPARISONS, self.op

    @property
    def type(self) -> Type:
        return Type.BOOL


@dataclass(frozen=True, slots=True)
class Logic:
    """`and`, `or` of two or more booleans."""

    op: str
    operands: tuple[Scalar, ...]

    @property
    def type(self) -> Type:
        return Type.BOOL


@dataclass(frozen=True, slots=True)
class If:
    cond: Scalar
    then: Scalar
    other: Scalar
    type: Type = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        types = (self.then.type, self.other.type)
        object.__setattr__(self, "type", Type.FLOAT if Type.FLOAT in types else types[0])


@dataclass(frozen=True, slots=True)
class Call:
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


def children(e: Scalar) -> tuple[Scalar, ...]:
    """The direct operands of a scalar."""
    match e:
        case Const() | Var() | Arg():
            return ()
        case Table(index=index) | Read(index=index):
            return index
        case Unary(operand=x):
            return (x,)
        case Binary(left=a, right=b) | Compare(left=a, right=b):
            return (a, b)
        case Logic(operands=xs) | Call(args=xs):
            return xs
        case If(cond=c, then=a, other=b):
            return (c, a, b)


def walk(e: Scalar) -> Iterator[Scalar]:
    """Every distinct node under a scalar (shared nodes once), the scalar itself first."""
    seen: set[int] = set()
    stack: list[Scalar] = [e]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack.extend(children(node))


def reads(e: Scalar, *names: str) -> bool:
    """Whether the scalar reads one of these variables anywhere."""
    return any(isinstance(x, Var) and x.name in names for x in walk(e))


# ------------------------------------------------------------------------------------------- sets


@dataclass(frozen=True, slots=True)
class Where:
    """The pairs that satisfy a boolean: a set comprehension."""

    cond: Scalar
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Union:
    parts: tuple[Set, ...]
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Inter:
    parts: tuple[Set, ...]
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Minus:
    left: Set
    right: Set
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Complement:
    operand: Set
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Choose:
    """`if c then P else Q`: `({c} & P) | (~{c} & Q)`."""

    cond: Scalar
    then: Set
    other: Set
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Coordinate x // size."""

    size: int


@dataclass(frozen=True, slots=True)
class Permuted:
    """Coordinate input[..., x] of an int input whose last dimension is k; `lead` holds its other indices.

    Inside, Nq and Nk stay what they are (the input is taken for a permutation of the tokens).
    """

    input: str
    lead: tuple[Scalar, ...]


Place: TypeAlias = Blocks | Permuted | Segment | Along


@dataclass(frozen=True, slots=True)
class On:
    """(q, k) is in it when (place(q), place(k)) is in the operand; inside, Nq and Nk: one past the last coordinate."""

    operand: Set
    place: Place
    span: Span | None = field(default=None, compare=False, repr=False)


class Coarse(Enum):
    ANY = "any"
    ALL = "all"
    FRACTION = "fraction"


@dataclass(frozen=True, slots=True)
class Coarsen:
    """Block pairs of which any, all, or at least a fraction of the existing pairs (0 <= q < Nq, 0 <= k < Nk) are in
    the operand, whatever rows the call holds. `map`: in a derived program, the read that says so of a pair's blocks.
    """

    operand: Set
    block_q: int
    block_k: int
    mode: Coarse
    fraction: float = 1.0
    map: Scalar | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


Set: TypeAlias = Where | Union | Inter | Minus | Complement | Choose | On | Coarsen | Random | Selected


# --------------------------------------------------------------------------------------- programs


@dataclass(frozen=True, slots=True)
class Program:
    """A whole attention. Equality and hash ignore spans, so equal programs share kernels."""

    name: str
    branches: tuple[Branch, ...]
    inputs: tuple[InputDecl, ...] = ()
    args: tuple[str, ...] = ()
    tables: tuple[TableDecl, ...] = ()
    align_start: bool = False
    selections: tuple[Selection, ...] = ()
    grid: Grid | None = None
    output: Output | None = None  # None: that of the only branch
    packed: str | None = None  # the input that tells documents apart, each of which stands alone
    lengths: str | None = None  # … and that says how many tokens of a batch entry are present
    observations: tuple[Observation, ...] = ()
    source: Source | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, pattern: Set, **parts: Any) -> Program:
        """A program of one branch over one pattern of raw tokens."""
        return cls(name, (Branch((Part(pattern),)),), **parts)

    @property
    def plain(self) -> bool:
        """Whether it is one branch over one pattern of raw tokens."""
        return self.output is None and len(parts := self.branches[0].parts) == 1 and parts[0].plain

    @property
    def branch(self) -> Branch:
        """The branch of a plain program. Raises `PatternError` (A911) for another: whoever asks knows but one."""
        if not self.plain:
            what = "this is not yet supported for views and several branches"
            raise error("A911", what, self.span, help="ask one branch over raw tokens")
        return self.branches[0]

    @property
    def only(self) -> Branch:
        """The branch of a program that has one, whatever its parts. Raises `PatternError` (A911) for another."""
        return self.branches[0] if self.output is None else self.branch

    @property
    def span(self) -> Span | None:
        return self.branches[0].span

    def with_branch(self, **changes: Any) -> Program:
        """The program with its only branch changed; `pattern` stands for its only part's."""
        branch = self.only
        if "pattern" in changes:
            changes["parts"] = (replace(branch.parts[0], pattern=changes.pop("pattern")),)
        return replace(self, branches=(replace(branch, **changes),))

    def named(self, branch: str) -> Branch:
        return next(x for x in self.branches if x.name == branch)

    def input(self, name: str) -> InputDecl:
        return next(decl for decl in self.inputs if decl.name == name)

    def selection(self, name: str) -> Selection:
        return next(selection for selection in self.selections if selection.name == name)

    def table(self, name: str) -> TableDecl:
        return next(decl for decl in self.tables if decl.name == name)


def scalars(pattern: Set) -> Iterator[Scalar]:
    """The scalars written directly in a set expression (conditions, and the indices of its places)."""
    match pattern:
        case Where(cond=c):
            yield c
        case Union(parts=parts) | Inter(parts=parts):
            for part in parts:
                yield from scalars(part)
        case Minus(left=a, right=b):
            yield from scalars(a)
            yield from scalars(b)
        case Complement(operand=p):
            yield from scalars(p)
        case Coarsen(operand=p, map=found):
            yield from scalars(p)
            yield from () if found is None else (found,)
        case Random(seed=seed, among=p):
            yield seed
            yield from scalars(p)
        case Selected(index=index, members=members):
            yield from index
            if isinstance(members, Placed | Runs):
                yield Read(members.input, (*members.lead, Var("k")), Type.INT)
        case Choose(cond=c, then=a, other=b):
            yield c
            yield from scalars(a)
            yield from scalars(b)
        case On(operand=p, place=place):
            yield from scalars(p)
            yield from place.lead if isinstance(place, Permuted | Segment) else ()


def rebuild(e: Scalar, step: Callable[[Scalar], Scalar], memo: dict[int, Scalar] | None = None) -> Scalar:
    """The scalar with `step` applied to every node, operands first; shared nodes stay shared."""
    memo = {} if memo is None else memo
    if id(e) in memo:
        return memo[id(e)]

    def inner(x: Scalar) -> Scalar:
        return rebuild(x, step, memo)

    result: Scalar
    match e:
        case Const() | Var() | Arg():
            result = e
        case Table(name=name, index=index, type=type):
            result = Table(name, tuple(map(inner, index)), type)
        case Read(input=name, index=index, type=type):
            result = Read(name, tuple(map(inner, index)), type)
        case Unary(op=op, operand=x):
            result = Unary(op, inner(x))
        case Binary(op=op, left=a, right=b):
            result = Binary(op, inner(a), inner(b))
        case Compare(op=op, left=a, right=b):
            result = Compare(op, inner(a), inner(b))
        case Logic(op=op, operands=xs):
            result = Logic(op, tuple(map(inner, xs)))
        case If(cond=c, then=a, other=b):
            result = If(inner(c), inner(a), inner(b))
        case Call(function=f, args=xs):
            result = Call(f, tuple(map(inner, xs)))
        case _:
            assert_never(e)
    memo[id(e)] = step(result)
    return memo[id(e)]


def substitute(e: Scalar, values: Mapping[str, Scalar]) -> Scalar:
    """The scalar with variables replaced by other scalars."""
    return rebuild(e, lambda x: values.get(x.name, x) if isinstance(x, Var) else x)
