"""The surface syntax tree (`attndsl.syntax`), made rule by rule as the automaton reads."""

from __future__ import annotations

from typing import Any

from attndsl import syntax as ast
from attndsl.diagnostics import Source, Span
from attndsl.grammar.automaton import Token

# Integers are bounded to what int64 tensors and integer-set libraries hold.
INT_MAX = 2**63 - 1

Items = list[Any]


class Builder:
    """One method per rule: the span of its tokens, and its items. These are untyped, so this is the one place with
    `Any`.

    problems: numbers out of range, each as `Report.error` takes it. A text that does not parse is read in several
    attempts, and only what the last one found is to be said.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[tuple[str, str, Span, str]] = []

    def at(self, token: Token) -> Span:
        return token.span(self.source)

    # ------------------------------------------------------------------------------- documents
    def start(self, span: Span, items: Items) -> ast.Document:
        whole = Span(self.source, 0, len(self.source.text))
        if len(items) == 1 and not isinstance(items[0], ast.Pattern | ast.Attention | ast.Input):
            return ast.Document((), items[0], whole)
        return ast.Document(tuple(items), None, whole)

    def pattern(self, span: Span, items: Items) -> ast.Pattern:
        name, params, body = items
        return ast.Pattern(str(name), params or (), body, self.at(name), span)

    def attention(self, span: Span, items: Items) -> ast.Attention:
        name, params, *clauses = items
        return ast.Attention(str(name), params or (), tuple(clauses), self.at(name), span)

    def params(self, span: Span, items: Items) -> tuple[ast.Param, ...]:
        return tuple(item for item in items if item is not None)

    def param(self, span: Span, items: Items) -> ast.Param:
        name, *middle, default = items
        type = next((item for item in middle if isinstance(item, ast.TypeExpr)), None)
        runtime = any(isinstance(item, Token) for item in middle)
        return ast.Param(str(name), type, runtime, default, span)

    def type_expr(self, span: Span, items: Items) -> ast.TypeExpr:
        name, size, *dims = items
        return ast.TypeExpr(str(name), size, tuple(d for d in dims if d is not None), span)

    # --------------------------------------------------------------------------------- clauses
    def input(self, span: Span, items: Items) -> ast.Input:
        name, type, *flags = items
        return ast.Input(str(name), type, tuple(str(flag) for flag in flags), span)

    def plan(self, span: Span, items: Items) -> ast.Plan:
        return ast.Plan(str(items[0]), items[1], span)

    def axes(self, span: Span, items: Items) -> ast.Axes:
        *axes, first, order = items
        return ast.Axes(tuple(axes), first, order, span)

    def axis(self, span: Span, items: Items) -> ast.AxisDecl:
        return ast.AxisDecl(str(items[0]), items[1], span)

    def align(self, span: Span, items: Items) -> ast.Align:
        return ast.Align(str(items[0]), span)

    def packed(self, span: Span, items: Items) -> ast.Packed:
        return ast.Packed(str(items[0]), span)

    def lengths(self, span: Span, items: Items) -> ast.Lengths:
        return ast.Lengths(str(items[0]), span)

    def branch(self, span: Span, items: Items) -> ast.Branch:
        name, *rest = items
        parts = tuple(item for item in rest if isinstance(item, ast.Part))
        modifiers = tuple(item for item in rest if not isinstance(item, ast.Part | None))
        return ast.Branch(None if name is None else str(name), parts, modifiers, span)

    def part(self, span: Span, items: Items) -> ast.Part:
        pattern, over, queries, within, weight = items
        return ast.Part(pattern, over, queries, within, weight, span)

    def observe(self, span: Span, items: Items) -> ast.Observe:
        return ast.Observe(str(items[0]), items[1], span)

    def output(self, span: Span, items: Items) -> ast.Output:
        return ast.Output(items[0], span)

    def scale(self, span: Span, items: Items) -> ast.Scale:
        return ast.Scale(items[0], span)

    def score(self, span: Span, items: Items) -> ast.Score:
        return ast.Score(items[0], span)

    def softmax(self, span: Span, items: Items) -> ast.Softmax:
        _, word, value = items
        return ast.Softmax(None if word is None else str(word), value, span)

    def weights(self, span: Span, items: Items) -> ast.Weights:
        return ast.Weights(items[0], span)

    def skip(self, span: Span, items: Items) -> ast.Skip:
        return ast.Skip(str(items[0]), items[1], span)

    # ----------------------------------------------------------------------------- expressions
    def cond(self, span: Span, items: Items) -> ast.Conditional:
        return ast.Conditional(items[0], items[1], items[2], span)

    def disj(self, span: Span, items: Items) -> ast.Logic:
        return ast.Logic("or", tuple(items), span)

    def conj(self, span: Span, items: Items) -> ast.Logic:
        return ast.Logic("and", tuple(items), span)

    def union(self, span: Span, items: Items) -> ast.Algebra:
        return ast.Algebra("|", tuple(items), span)

    def inter(self, span: Span, items: Items) -> ast.Algebra:
        return ast.Algebra("&", tuple(items), span)

    def compare(self, span: Span, items: Items) -> ast.Comparison:
        return ast.Comparison(items[0], _pairs(items), span)

    def sum(self, span: Span, items: Items) -> ast.Arithmetic:
        return ast.Arithmetic(items[0], _pairs(items), span)

    term = sum

    def not_(self, span: Span, items: Items) -> ast.Prefix:
        return ast.Prefix("not", items[0], span)

    def minus(self, span: Span, items: Items) -> ast.Prefix:
        return ast.Prefix("-", items[0], span)

    def complement(self, span: Span, items: Items) -> ast.Prefix:
        return ast.Prefix("~", items[0], span)

    def place(self, span: Span, items: Items) -> ast.Expr:
        operand: ast.Expr = items[0]
        for place in items[1:]:
            end = span.end if place is items[-1] else place.span.end
            operand = ast.Place(operand, place, Span(self.source, span.start, end))
        return operand

    def name(self, span: Span, items: Items) -> ast.Name:
        return ast.Name(str(items[0]), span)

    def call(self, span: Span, items: Items) -> ast.Apply:
        args = tuple(self._argument(item) for item in items[1:] if item is not None)
        return ast.Apply(str(items[0]), args, self.at(items[0]), span)

    def _argument(self, item: Any) -> ast.Argument:
        return item if isinstance(item, ast.Argument) else ast.Argument(None, item, item.span)

    def named(self, span: Span, items: Items) -> ast.Argument:
        return ast.Argument(str(items[0]), items[1], span)

    def index(self, span: Span, items: Items) -> ast.Subscript:
        return ast.Subscript(str(items[0]), tuple(items[1:]), self.at(items[0]), span)

    def coord(self, span: Span, items: Items) -> ast.Coordinate:
        return ast.Coordinate(str(items[0]), str(items[1]), span)

    def group(self, span: Span, items: Items) -> ast.Group:
        return ast.Group(tuple(item for item in items if item is not None), span)

    def braces(self, span: Span, items: Items) -> ast.Comprehension:
        cond, *bindings = items
        return ast.Comprehension(cond, tuple(b for b in bindings if b is not None), span)

    def bind(self, span: Span, items: Items) -> ast.Binding:
        return ast.Binding(str(items[0]), items[1], span)

    def int_(self, span: Span, items: Items) -> ast.Number:
        digits = str(items[0]).replace("_", "").lstrip("0") or "0"
        # int() refuses thousands of digits, so the length is looked at first.
        if len(digits) > 19 or int(digits) > INT_MAX:
            self.problems.append(("A007", "this integer does not fit in 63 bits", span, f"at most {INT_MAX}"))
            return ast.Number(1, span)
        return ast.Number(int(digits), span)

    def float_(self, span: Span, items: Items) -> ast.Number:
        value = float(str(items[0]).replace("_", ""))
        if value == float("inf"):
            self.problems.append(("A007", "this number is not finite", span, "at most 1.7e308"))
            return ast.Number(1.0, span)
        return ast.Number(value, span)

    def true(self, span: Span, items: Items) -> ast.Truth:
        return ast.Truth(True, span)

    def false(self, span: Span, items: Items) -> ast.Truth:
        return ast.Truth(False, span)


def _pairs(items: Items) -> tuple[tuple[str, Any], ...]:
    return tuple((str(items[i]), items[i + 1]) for i in range(1, len(items), 2))
