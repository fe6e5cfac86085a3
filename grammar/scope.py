"""What names mean where: bindings, scopes, and the context in which an expression stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias

from attndsl import syntax as ast
from attndsl.diagnostics import Span
from attndsl.grammar.make import Maker
from attndsl.grammar.report import Report, nearest
from attndsl.grid import Grid
from attndsl.program import BUILTINS, InputDecl, Scalar, Set, TableDecl

RESERVED = BUILTINS | {"Q", "K", "V"}
# What other tools and papers call positions.
_ELSEWHERE = {"i": "q", "q_idx": "q", "j": "k", "kv_idx": "k", "k_idx": "k"}
SELECTIONS = frozenset({"top", "cover", "above", "levels"})


class Use(Enum):
    """What an expression is for; it decides what may be read there."""

    SET = "a set"
    SCORE = "a score"
    WEIGHTS = "weights"
    SINK = "a sink"
    SCALE = "a scale"
    PICKED = "the weight of a listed token"
    SEED = "a seed"
    STATIC = "a compile-time value"
    BY = "a routing score"
    OUTPUT = "the output"


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar bound to a name. `places` counts the `on` and `coarsen` around the binding."""

    scalar: Scalar
    places: int


@dataclass(frozen=True, slots=True)
class SetValue:
    """A set passed to a pattern."""

    set: Set
    places: int


@dataclass(frozen=True, slots=True)
class TableRef:
    decl: TableDecl


@dataclass(frozen=True, slots=True)
class InputRef:
    decl: InputDecl


@dataclass(frozen=True, slots=True)
class PlanRef:
    """A selection: a `plan`, or an input that holds one (`decl`)."""

    decl: InputDecl | None = None


@dataclass(frozen=True, slots=True)
class LevelsRef:
    """A plan made with `levels`: a view."""


@dataclass(frozen=True, slots=True)
class BranchRef:
    pass


@dataclass(frozen=True, slots=True)
class ObservedRef:
    """What an `observe` names: a result, which nothing in the text reads."""


@dataclass(frozen=True, slots=True)
class AxisRef:
    """An axis of the grid; None where a mistake in its declaration was reported."""

    grid: Grid | None
    axis: int


@dataclass(frozen=True, slots=True)
class PatternRef:
    decl: ast.Pattern
    scope: Scope


@dataclass(frozen=True, slots=True)
class Poison:
    """A name whose declaration was wrong: using it says nothing new."""


Bound: TypeAlias = (
    Value
    | SetValue
    | TableRef
    | InputRef
    | PlanRef
    | LevelsRef
    | BranchRef
    | ObservedRef
    | AxisRef
    | PatternRef
    | Poison
)


class Scope:
    """Names of one level, and the level around it."""

    def __init__(self, outer: Scope | None = None) -> None:
        self._outer = outer
        self._names: dict[str, tuple[Bound, Span | None]] = {}

    def find(self, name: str) -> Bound | None:
        if name in self._names:
            return self._names[name][0]
        return None if self._outer is None else self._outer.find(name)

    def hides(self, name: str) -> bool:
        """Whether what the name means here hides a pattern of a level around."""
        outer = self._outer
        if name not in self._names:
            return outer is not None and outer.hides(name)
        return outer is not None and isinstance(outer.find(name), PatternRef)

    def set(self, name: str, bound: Bound, span: Span | None = None) -> None:
        self._names[name] = (bound, span)

    def declare(self, name: str, bound: Bound, span: Span, report: Report) -> None:
        """Binds a name that the text declares; twice is an error."""
        if name in RESERVED:
            report.error(
                "A011", f"`{name}` is a built-in name", span, label="cannot be redeclared", help=f"call it `{name}_`"
            )
            self._names[name] = (Poison(), span)
            return
        if name in self._names:
            first = self._names[name][1]
            where = f"it is first declared at {first}" if first else "it is already declared"
            report.error("A011", f"`{name}` is declared twice", span, label=where, help="choose another name")
            return
        self._names[name] = (bound, span)

    def names(self) -> Iterator[str]:
        yield from self._names
        if self._outer is not None:
            yield from self._outer.names()


@dataclass(frozen=True, slots=True)
class Context:
    """Where an expression stands."""

    maker: Maker
    report: Report
    scope: Scope
    use: Use = Use.SET
    # `on` and `coarsen` around it, and the innermost of them
    places: int = 0
    inside: str = ""
    align_start: bool = False
    packed: bool = False  # documents stand for themselves
    # patterns being expanded (declaration and name), outermost first
    calls: tuple[tuple[int, str], ...] = ()
    level: int = 0
    # whether positions are coordinates along an axis here
    along: bool = False
    # why a selection here must write `among`
    among: str = ""
    # conditions that hold here, as `and`, `or` and `if` guard what follows them
    known: tuple[Scalar, ...] = ()
    lost: frozenset[str] = frozenset()
    # the inputs declared outside attentions
    file_inputs: Mapping[str, InputDecl] = field(default_factory=dict)

    def of(self, use: Use) -> Context:
        return replace(self, use=use)

    def under(self, scope: Scope) -> Context:
        return replace(self, scope=scope)

    def unknown(self, name: str, span: Span, also: frozenset[str] = frozenset()) -> None:
        """Reports an unknown name, with the nearest known one."""
        if name in self.lost:
            return
        known = {*self.scope.names(), *BUILTINS, *also}
        other = _ELSEWHERE.get(name)
        help = (
            f"write `{other}`" if other else nearest(name, known) or "declare it as an input, a parameter or a pattern"
        )
        self.report.error("A010", f"unknown name `{name}`", span, label="not declared", help=help)
