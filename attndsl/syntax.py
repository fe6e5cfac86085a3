"""The surface syntax tree: what a text says, before names are resolved and kinds are decided.

    document  ::= item* | e                            item ::= pattern | attention | input
    pattern   ::= pattern name(param*) = e             param ::= name [: [runtime] type] [= e]
    attention ::= attention name(param*) { clause* }   type ::= name[(e)][e*]
    clause    ::= input | pattern | Plan | Axes | Align | Packed | Lengths | Branch | Observe | Output | modifier
    modifier  ::= Scale e | Score e | Softmax [sink e] | Weights e | Skip e
    e         ::= Name | Number | Truth | Prefix op e | Arithmetic e (op e)* | Comparison e (op e)*
                | Logic op e* | Algebra op e* | Conditional e e e | Apply name(argument*) | Subscript name[e*]
                | Coordinate name.axis | Place e on e | Group (e, e*) | Comprehension { e where binding* }

One family of expressions serves sets, numbers, booleans and views: `grammar.lower` decides which a node is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TypeAlias

from attndsl.diagnostics import Span


def _span() -> Span:
    return field(compare=False, repr=False)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------ expressions


@dataclass(frozen=True, slots=True)
class Name:
    id: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Number:
    value: int | float
    span: Span = _span()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Number) and (type(self.value), self.value) == (type(other.value), other.value)

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True, slots=True)
class Truth:
    value: bool
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Prefix:
    """`-` on a number, `~` on a set, `not` on a boolean."""

    op: str
    operand: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A left-associative chain of one precedence level: `+ -` (`-` also on sets), or `* / // %`."""

    first: Expr
    rest: tuple[tuple[str, Expr], ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Comparison:
    """`first < a <= b`: every neighbouring pair compares."""

    first: Expr
    rest: tuple[tuple[str, Expr], ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Logic:
    """`and`, `or` on booleans."""

    op: str
    operands: tuple[Expr, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Algebra:
    """`&`, `|` on sets."""

    op: str
    operands: tuple[Expr, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Conditional:
    cond: Expr
    then: Expr
    other: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Argument:
    """`value`, or `name = value`."""

    name: str | None
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Apply:
    function: str
    args: tuple[Argument, ...]
    name_span: Span = _span()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Subscript:
    name: str
    index: tuple[Expr, ...]
    name_span: Span = _span()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Coordinate:
    """`q.t`: the coordinate of a position on an axis."""

    name: str
    axis: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Place:
    """`operand on place`."""

    operand: Expr
    place: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Group:
    """A tuple, `(y, x)`."""

    items: tuple[Expr, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Binding:
    """`name = value` after `where`."""

    name: str
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Comprehension:
    cond: Expr
    bindings: tuple[Binding, ...]
    span: Span = _span()


Expr: TypeAlias = (
    Name
    | Number
    | Truth
    | Prefix
    | Arithmetic
    | Comparison
    | Logic
    | Algebra
    | Conditional
    | Apply
    | Subscript
    | Coordinate
    | Place
    | Group
    | Comprehension
)


# --------------------------------------------------------------------------------- items, clauses


@dataclass(frozen=True, slots=True)
class TypeExpr:
    """`int`, `float[h]`, `blocks(64)[b, h]`."""

    name: str
    size: Expr | None
    dims: tuple[Expr, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Param:
    name: str
    type: TypeExpr | None
    runtime: bool
    default: Expr | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Input:
    name: str
    type: TypeExpr
    flags: tuple[str, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Pattern:
    name: str
    params: tuple[Param, ...]
    body: Expr
    name_span: Span = _span()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class AxisDecl:
    name: str
    size: Expr | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Axes:
    axes: tuple[AxisDecl, ...]
    first: Expr | None
    order: Expr | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Align:
    word: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Packed:
    input: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Lengths:
    input: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Part:
    """`pattern over view from queries within of with weight`."""

    pattern: Expr
    over: Expr | None
    queries: Expr | None
    within: Expr | None
    weight: Expr | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Observe:
    name: str
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Output:
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Scale:
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Score:
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Softmax:
    """`word` is the option after `with` (`sink`), `value` its expression."""

    word: str | None
    value: Expr | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Weights:
    value: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Skip:
    word: str
    value: Expr
    span: Span = _span()


Modifier: TypeAlias = Scale | Score | Softmax | Weights | Skip


@dataclass(frozen=True, slots=True)
class Branch:
    name: str | None
    parts: tuple[Part, ...]
    modifiers: tuple[Modifier, ...]
    span: Span = _span()


Clause: TypeAlias = Input | Pattern | Plan | Axes | Align | Packed | Lengths | Branch | Observe | Output | Modifier


@dataclass(frozen=True, slots=True)
class Attention:
    name: str
    params: tuple[Param, ...]
    clauses: tuple[Clause, ...]
    name_span: Span = _span()
    span: Span = _span()


Item: TypeAlias = Pattern | Attention | Input


@dataclass(frozen=True, slots=True)
class Document:
    """A text: declarations, or one bare expression."""

    items: tuple[Item, ...]
    expr: Expr | None
    span: Span = _span()


Node: TypeAlias = Document | Item | Clause | Expr | Argument | Binding | Param | TypeExpr | AxisDecl | Part


def children(node: Node) -> Iterator[Node]:
    """The nodes directly under a node, in the order of the text."""
    for item in fields(node):
        yield from _nodes(getattr(node, item.name))


def _nodes(value: object) -> Iterator[Node]:
    if isinstance(value, tuple):
        for item in value:
            yield from _nodes(item)
    elif isinstance(value, _NODE_CLASSES):
        yield value


_NODE_CLASSES = (
    Document, Pattern, Attention, Input, Plan, Axes, Align, Packed, Lengths, Branch, Observe, Output, Scale, Score,
    Softmax, Weights, Skip, Name, Number, Truth, Prefix, Arithmetic, Comparison, Logic, Algebra, Conditional, Apply,
    Subscript, Coordinate, Place, Group, Comprehension, Argument, Binding, Param, TypeExpr, AxisDecl, Part,
)  # fmt: skip


def depth(node: Node) -> tuple[int, Node]:
    """Levels under a node, and a deepest node (walked with a list: the tree may be deeper than the call stack)."""
    deepest, where = 0, node
    stack = [(node, 1)]
    while stack:
        item, level = stack.pop()
        if level > deepest:
            deepest, where = level, item
        stack.extend((child, level + 1) for child in children(item))
    return deepest, where
