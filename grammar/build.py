"""From lark's parse tree to the surface syntax tree (`attndsl.syntax`)."""

from __future__ import annotations

from typing import Any

from lark import Token, Tree
from lark.tree import Meta
from lark.visitors import Transformer_NonRecursive, v_args

from attndsl import syntax as ast
from attndsl.diagnostics import Source, Span
from attndsl.grammar.report import Report

# Integers are bounded to what int64 tensors and integer-set libraries hold.
INT_MAX = 2**63 - 1

Items = list[Any]


@v_args(meta=True)
class Builder(Transformer_NonRecursive[Token, Any]):
    """One method per rule. Trees are untyped, so this is the one place with `Any`."""

    def __init__(self, source: Source, report: Report) -> None:
        super().__init__()
        self.source = source
        self.report = report

    def at(self, meta: Meta | Token) -> Span:
        start = getattr(meta, "start_pos", None)
        if start is None:
            return Span(self.source, 0, len(self.source.text))
        end = meta.end_pos
        assert end is not None
        return Span(self.source, start, end)

    # ------------------------------------------------------------------------------- documents
    def start(self, meta: Meta, items: Items) -> ast.Document:
        whole = Span(self.source, 0, len(self.source.text))
        if len(items) == 1 and not isinstance(items[0], ast.Pattern | ast.Attention | ast.Input):
            return ast.Document((), items[0], whole)
        return ast.Document(tuple(items), None, whole)

    def pattern(self, meta: Meta, items: Items) -> ast.Pattern:
        name, params, body = items
        return ast.Pattern(str(name), params or (), body, self.at(name), self.at(meta))

    def attention(self, meta: Meta, items: Items) -> ast.Attention:
        name, params, *clauses = items
        return ast.Attention(str(name), params or (), tuple(clauses), self.at(name), self.at(meta))

    def params(self, meta: Meta, items: Items) -> tuple[ast.Param, ...]:
        return tuple(item for item in items if item is not None)

    def param(self, meta: Meta, items: Items) -> ast.Param:
        name, *middle, default = items
        type = next((item for item in middle if isinstance(item, ast.TypeExpr)), None)
        runtime = any(isinstance(item, Token) for item in middle)
        return ast.Param(str(name), type, runtime, default, self.at(meta))

    def type_expr(self, meta: Meta, items: Items) -> ast.TypeExpr:
        name, size, *dims = items
        return ast.TypeExpr(str(name), size, tuple(d for d in dims if d is not None), self.at(meta))

    # --------------------------------------------------------------------------------- clauses
    def input(self, meta: Meta, items: Items) -> ast.Input:
        name, type, *flags = items
        return ast.Input(str(name), type, tuple(str(flag) for flag in flags), self.at(meta))

    def plan(self, meta: Meta, items: Items) -> ast.Plan:
        return ast.Plan(str(items[0]), items[1], self.at(meta))

    def axes(self, meta: Meta, items: Items) -> ast.Axes:
        *axes, first, order = items
        return ast.Axes(tuple(axes), first, order, self.at(meta))

    def axis(self, meta: Meta, items: Items) -> ast.AxisDecl:
        return ast.AxisDecl(str(items[0]), items[1], self.at(meta))

    def align(self, meta: Meta, items: Items) -> ast.Align:
        return ast.Align(str(items[0]), self.at(meta))

    def packed(self, meta: Meta, items: Items) -> ast.Packed:
        return ast.Packed(str(items[0]), self.at(meta))

    def lengths(self, meta: Meta, items: Items) -> ast.Lengths:
        return ast.Lengths(str(items[0]), self.at(meta))

    def branch(self, meta: Meta, items: Items) -> ast.Branch:
        name, *rest = items
        parts = tuple(item for item in rest if isinstance(item, ast.Part))
        modifiers = tuple(item for item in rest if not isinstance(item, ast.Part | None))
        return ast.Branch(None if name is None else str(name), parts, modifiers, self.at(meta))

    def part(self, meta: Meta, items: Items) -> ast.Part:
        pattern, over, queries, within, weight = items
        return ast.Part(pattern, over, queries, within, weight, self.at(meta))

    def observe(self, meta: Meta, items: Items) -> ast.Observe:
        return ast.Observe(str(items[0]), items[1], self.at(meta))

    def output(self, meta: Meta, items: Items) -> ast.Output:
        return ast.Output(items[0], self.at(meta))

    def scale(self, meta: Meta, items: Items) -> ast.Scale:
        return ast.Scale(items[0], self.at(meta))

    def score(self, meta: Meta, items: Items) -> ast.Score:
        return ast.Score(items[0], self.at(meta))

    def softmax(self, meta: Meta, items: Items) -> ast.Softmax:
        _, word, value = items
        return ast.Softmax(None if word is None else str(word), value, self.at(meta))

    def weights(self, meta: Meta, items: Items) -> ast.Weights:
        return ast.Weights(items[0], self.at(meta))

    def skip(self, meta: Meta, items: Items) -> ast.Skip:
        return ast.Skip(str(items[0]), items[1], self.at(meta))

    # ----------------------------------------------------------------------------- expressions
    def cond(self, meta: Meta, items: Items) -> ast.Conditional:
        return ast.Conditional(items[0], items[1], items[2], self.at(meta))

    def disj(self, meta: Meta, items: Items) -> ast.Logic:
        return ast.Logic("or", tuple(items), self.at(meta))

    def conj(self, meta: Meta, items: Items) -> ast.Logic:
        return ast.Logic("and", tuple(items), self.at(meta))

    def union(self, meta: Meta, items: Items) -> ast.Algebra:
        return ast.Algebra("|", tuple(items), self.at(meta))

    def inter(self, meta: Meta, items: Items) -> ast.Algebra:
        return ast.Algebra("&", tuple(items), self.at(meta))

    def compare(self, meta: Meta, items: Items) -> ast.Comparison:
        return ast.Comparison(items[0], _pairs(items), self.at(meta))

    def sum(self, meta: Meta, items: Items) -> ast.Arithmetic:
        return ast.Arithmetic(items[0], _pairs(items), self.at(meta))

    term = sum

    def not_(self, meta: Meta, items: Items) -> ast.Prefix:
        return ast.Prefix("not", items[0], self.at(meta))

    def minus(self, meta: Meta, items: Items) -> ast.Prefix:
        return ast.Prefix("-", items[0], self.at(meta))

    def complement(self, meta: Meta, items: Items) -> ast.Prefix:
        return ast.Prefix("~", items[0], self.at(meta))

    def place(self, meta: Meta, items: Items) -> ast.Expr:
        operand: ast.Expr = items[0]
        whole = self.at(meta)
        for place in items[1:]:
            end = whole.end if place is items[-1] else place.span.end
            operand = ast.Place(operand, place, Span(self.source, whole.start, end))
        return operand

    def name(self, meta: Meta, items: Items) -> ast.Name:
        return ast.Name(str(items[0]), self.at(meta))

    def call(self, meta: Meta, items: Items) -> ast.Apply:
        args = tuple(self._argument(item) for item in items[1:] if item is not None)
        return ast.Apply(str(items[0]), args, self.at(items[0]), self.at(meta))

    def _argument(self, item: Any) -> ast.Argument:
        return item if isinstance(item, ast.Argument) else ast.Argument(None, item, item.span)

    def named(self, meta: Meta, items: Items) -> ast.Argument:
        return ast.Argument(str(items[0]), items[1], self.at(meta))

    def index(self, meta: Meta, items: Items) -> ast.Subscript:
        return ast.Subscript(str(items[0]), tuple(items[1:]), self.at(items[0]), self.at(meta))

    def coord(self, meta: Meta, items: Items) -> ast.Coordinate:
        return ast.Coordinate(str(items[0]), str(items[1]), self.at(meta))

    def group(self, meta: Meta, items: Items) -> ast.Group:
        return ast.Group(tuple(item for item in items if item is not None), self.at(meta))

    def braces(self, meta: Meta, items: Items) -> ast.Comprehension:
        cond, *bindings = items
        return ast.Comprehension(cond, tuple(b for b in bindings if b is not None), self.at(meta))

    def bind(self, meta: Meta, items: Items) -> ast.Binding:
        return ast.Binding(str(items[0]), items[1], self.at(meta))

    def int_(self, meta: Meta, items: Items) -> ast.Number:
        digits = str(items[0]).replace("_", "").lstrip("0") or "0"
        # int() refuses thousands of digits, so the length is looked at first.
        if len(digits) > 19 or int(digits) > INT_MAX:
            self.report.error("A007", "this integer does not fit in 63 bits", self.at(meta), help=f"at most {INT_MAX}")
            return ast.Number(1, self.at(meta))
        return ast.Number(int(digits), self.at(meta))

    def float_(self, meta: Meta, items: Items) -> ast.Number:
        value = float(str(items[0]).replace("_", ""))
        if value == float("inf"):
            self.report.error("A007", "this number is not finite", self.at(meta), help="at most 1.7e308")
            return ast.Number(1.0, self.at(meta))
        return ast.Number(value, self.at(meta))

    def true(self, meta: Meta, items: Items) -> ast.Truth:
        return ast.Truth(True, self.at(meta))

    def false(self, meta: Meta, items: Items) -> ast.Truth:
        return ast.Truth(False, self.at(meta))


def _pairs(items: Items) -> tuple[tuple[str, Any], ...]:
    return tuple((str(items[i]), items[i + 1]) for i in range(1, len(items), 2))


def build(tree: Tree[Token], source: Source, report: Report) -> ast.Document:
    """The document of a parse tree; numbers out of range are reported."""
    document = Builder(source, report).transform(tree)
    assert isinstance(document, ast.Document)
    return document
