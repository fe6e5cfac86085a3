"""The typed program: what an attention means, every name resolved and every parameter bound.

    scalar  e                                                      as in `scalar`
    set     P ::= Where e | Union P* | Inter P* | Minus P P | Complement P | Choose e P P
                | On P place | Coarsen P | Random P e | Selected plan[e*]
    place     ::= Blocks B | Permuted input | Segment input | Along axis
    program   ::= inputs, arguments, tables, branches, output      branches and output: see `branches`

`grammar.lower` makes it, the oracle (`attndsl.oracle`, `runtime.reference`) says what it means, and the compiler
turns it into kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias, TypeVar, assert_never

from attndsl.branches import Branch as Branch
from attndsl.branches import Output, Part
from attndsl.call_shape import CallShape as CallShape
from attndsl.derivation import Document, Random, Segment
from attndsl.diagnostics import Source, Span, error
from attndsl.grid import Along, Grid
from attndsl.inputs import KERNEL_TENSORS as KERNEL_TENSORS
from attndsl.inputs import Axis as Axis
from attndsl.inputs import Dim as Dim
from attndsl.inputs import InputDecl as InputDecl
from attndsl.inputs import TableDecl as TableDecl
from attndsl.members import Placed, Runs
from attndsl.observation import Observation
from attndsl.scalar import ARITHMETIC as ARITHMETIC
from attndsl.scalar import BOOL_CALLS as BOOL_CALLS
from attndsl.scalar import BUILTINS as BUILTINS
from attndsl.scalar import COMPARISONS as COMPARISONS
from attndsl.scalar import FLOAT_CALLS as FLOAT_CALLS
from attndsl.scalar import INT_CALLS as INT_CALLS
from attndsl.scalar import TILE_NAMES as TILE_NAMES
from attndsl.scalar import Arg as Arg
from attndsl.scalar import Binary as Binary
from attndsl.scalar import Call as Call
from attndsl.scalar import Compare as Compare
from attndsl.scalar import Const as Const
from attndsl.scalar import HashedOnce
from attndsl.scalar import If as If
from attndsl.scalar import Logic as Logic
from attndsl.scalar import Memo as Memo
from attndsl.scalar import Read as Read
from attndsl.scalar import Scalar as Scalar
from attndsl.scalar import Table as Table
from attndsl.scalar import Type as Type
from attndsl.scalar import Unary as Unary
from attndsl.scalar import Var as Var
from attndsl.scalar import children as children
from attndsl.scalar import reads as reads
from attndsl.scalar import rebuild as rebuild
from attndsl.scalar import substitute as substitute
from attndsl.scalar import walk as walk
from attndsl.selection import Selected as Selected
from attndsl.selection import Selection

# ------------------------------------------------------------------------------------------- sets


@dataclass(frozen=True, slots=True)
class Where(HashedOnce):
    """The pairs that satisfy a boolean: a set comprehension."""

    cond: Scalar
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Union(HashedOnce):
    parts: tuple[Set, ...]
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Inter(HashedOnce):
    parts: tuple[Set, ...]
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Minus(HashedOnce):
    left: Set
    right: Set
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Complement(HashedOnce):
    operand: Set
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Choose(HashedOnce):
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
class On(HashedOnce):
    """(q, k) is in it when (place(q), place(k)) is in the operand; inside, Nq and Nk: one past the last coordinate."""

    operand: Set
    place: Place
    span: Span | None = field(default=None, compare=False, repr=False)


class Coarse(Enum):
    ANY = "any"
    ALL = "all"
    FRACTION = "fraction"


@dataclass(frozen=True, slots=True)
class Coarsen(HashedOnce):
    """Block pairs of which any, all, or at least a fraction of the existing pairs (0 <= q < Nq, 0 <= k < Nk) are in
    the operand, whatever rows the call holds. `map`: in a derived program, the read that says so of a pair's blocks.
    `document`: blocks and existing pairs are those of a sequence of its own. The operand is then one of the call's
    positions, and in a derived program `document.alone`.
    """

    operand: Set
    block_q: int
    block_k: int
    mode: Coarse
    fraction: float = 1.0
    map: Scalar | None = None
    document: Document | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


Set: TypeAlias = Where | Union | Inter | Minus | Complement | Choose | On | Coarsen | Random | Selected


# --------------------------------------------------------------------------------------- programs


@dataclass(frozen=True, slots=True)
class Program(HashedOnce):
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
    def past_the_ends(self) -> bool:
        """Whether patterns are asked of positions past the last: extents and classes of queries reach there."""
        return any(branch.queries or any(part.view for part in branch.parts) for branch in self.branches)

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
        return _named(self.branches, branch)

    def input(self, name: str) -> InputDecl:
        return _named(self.inputs, name)

    def selection(self, name: str) -> Selection:
        return _named(self.selections, name)

    def table(self, name: str) -> TableDecl:
        return _named(self.tables, name)


_Named = TypeVar("_Named", Branch, InputDecl, Selection, TableDecl)


def _named(among: tuple[_Named, ...], name: str) -> _Named:
    """The one of a name. Raises `KeyError`: a StopIteration would end an iteration that asks, and be taken for its
    end."""
    for each in among:
        if each.name == name:
            return each
    raise KeyError(name)


def nodes(pattern: Set) -> Iterator[Set]:
    """Every set expression in a pattern, the pattern itself first."""
    yield pattern
    match pattern:
        case Where() | Selected():
            parts: tuple[Set, ...] = ()
        case Union(parts=parts) | Inter(parts=parts):
            pass
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            parts = (a, b)
        case Complement(operand=p) | Coarsen(operand=p) | On(operand=p) | Random(among=p):
            parts = (p,)
        case _:
            assert_never(pattern)
    for part in parts:
        yield from nodes(part)


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
        case Coarsen(operand=p, map=found, document=document):
            yield from scalars(p)
            yield from () if found is None else (found,)
            yield from () if document is None else (document.first, document.end)
        case Random(seed=seed, among=p, document=document):
            yield seed
            yield from scalars(p)
            yield from () if document is None else (document.first, document.end)
        case Selected(index=index, members=members):
            yield from index
            if isinstance(members, Placed | Runs):
                yield Read(members.input, (*members.lead, Var("k")), Type.INT)
            if isinstance(members, Runs) and members.order is not None:
                yield Read(members.order.input, (*members.order.lead, Var("k")), Type.INT)
        case Choose(cond=c, then=a, other=b):
            yield c
            yield from scalars(a)
            yield from scalars(b)
        case On(operand=p, place=place):
            yield from scalars(p)
            yield from place.lead if isinstance(place, Permuted | Segment) else ()


def equal_quotients(e: Compare) -> bool:
    """Whether a comparison asks for equal quotients by one number."""
    match e:
        case Compare(op="==", left=Binary(op="//", right=Const() as m), right=Binary(op="//", right=Const() as n)):
            return m == n
        case _:
            return False
