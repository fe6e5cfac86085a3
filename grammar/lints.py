"""Lints: legal texts that read as something else than they mean."""

from __future__ import annotations

from attndsl import syntax as ast
from attndsl.diagnostics import Source, Span
from attndsl.grammar.parse import Parsed
from attndsl.grammar.report import Report


def lint(parsed: Parsed, source: Source, report: Report) -> None:
    for item in parsed.document.items:
        if isinstance(item, ast.Attention):
            _clause_lines(item, source, report)
    _placed_operands(parsed.document, report)


def _clause_lines(node: ast.Attention, source: Source, report: Report) -> None:
    """In an attention of several lines, a clause that starts in the middle of one is easily taken for a part of
    the clause before it."""
    if "\n" not in source.text[node.span.start : node.span.end]:
        return
    previous_end = node.span.start
    for clause in node.clauses:
        before = source.text[source.text.rfind("\n", 0, clause.span.start) + 1 : clause.span.start]
        first = source.text.rfind("\n", previous_end, clause.span.start) < 0 and previous_end > node.span.start
        if before.strip() and first:
            word = Span(source, clause.span.start, min(clause.span.end, clause.span.start + 1))
            report.lint(
                "A802",
                "this clause does not start its line",
                _first_word(word),
                "a clause begins here",
                "start a new line",
            )
        previous_end = clause.span.end


def _first_word(span: Span) -> Span:
    text, end = span.source.text, span.start
    while end < len(text) and (text[end].isalnum() or text[end] == "_"):
        end += 1
    return Span(span.source, span.start, max(end, span.end))


def _placed_operands(document: ast.Document, report: Report) -> None:
    """`a & b | c on blocks(64)` places only c."""
    stack: list[ast.Node] = [document]
    while stack:
        node = stack.pop()
        stack.extend(ast.children(node))
        if isinstance(node, ast.Algebra) and _misleads(node):
            last = node.operands[-1]
            report.lint(
                "A803", "`on` places only its nearest operand", last.span, "only this is placed", "add brackets"
            )


def _misleads(node: ast.Algebra) -> bool:
    """`a & b | c on blocks(64)`: a mixed chain, of which only the last operand is placed."""
    *before, last = _leaves(node)
    mixed = node.op == "|" and any(isinstance(operand, ast.Algebra) for operand in node.operands)
    named = isinstance(last, ast.Place) and isinstance(last.operand, ast.Apply | ast.Name)
    return mixed and named and not any(isinstance(operand, ast.Place) for operand in before)


def _leaves(node: ast.Expr) -> list[ast.Expr]:
    if isinstance(node, ast.Algebra):
        return [leaf for operand in node.operands for leaf in _leaves(operand)]
    return [node]
