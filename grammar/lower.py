"""From a text to the typed program: which attention of a file, its clauses, its branch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from attndsl import syntax as ast
from attndsl.diagnostics import Diagnostic, Source
from attndsl.grammar.clauses import lower_attention, lower_bare
from attndsl.grammar.declare import declare_input
from attndsl.grammar.lints import lint
from attndsl.grammar.make import MAX_WORK, Maker
from attndsl.grammar.parse import Parsed, parse_source
from attndsl.grammar.report import Report, TooLarge, nearest
from attndsl.grammar.scope import Bound, Context, PatternRef, Scope
from attndsl.program import Program


@dataclass(frozen=True, slots=True)
class Loaded:
    """A typed program, what there is to warn about, and the syntax it came from.

    `names` are the programs of the text: its attentions, or its patterns where it has none.
    """

    program: Program
    warnings: tuple[Diagnostic, ...]
    document: ast.Document
    names: tuple[str, ...]


def load(
    text: str, *, name: str = "<pattern>", select: str | None = None, params: Mapping[str, object] | None = None
) -> Loaded:
    """Parses, checks and lowers a text.

    >>> from attndsl.grammar import load
    >>> load("pattern local(span = 4) = causal & window(span)", params={"span": 8}).program.name
    'local'

    Parameters: text; name shown in messages; select, the program of a text that holds several; params, the
    compile-time values of its parameters (tables as nested sequences or arrays).
    Raises: `PatternError` with every mistake of the text.
    """
    source = Source(name, text)
    report = Report()
    parsed = parse_source(source, report)
    document = parsed.document
    program: Program | None = None
    if not report.errors or document.items or document.expr:
        chosen = _choose(document, select, source, report, broken=parsed.broken)
        ctx = _context(parsed, report)
        program = _lower(parsed, chosen, dict(params or {}), ctx)
        _check_others(parsed, chosen, ctx)
    lint(parsed, source, report)
    report.raise_errors()
    assert program is not None
    return Loaded(replace(program, source=source), report.warnings, document, _names(document))


def _names(document: ast.Document) -> tuple[str, ...]:
    attentions = tuple(item.name for item in document.items if isinstance(item, ast.Attention))
    return attentions or tuple(item.name for item in document.items if isinstance(item, ast.Pattern))


def _choose(
    document: ast.Document, select: str | None, source: Source, report: Report, *, broken: bool
) -> ast.Pattern | ast.Attention | None:
    """A file's program: the one named, else its only attention, else its last pattern."""
    attentions = [item for item in document.items if isinstance(item, ast.Attention)]
    patterns = [item for item in document.items if isinstance(item, ast.Pattern)]
    everything: list[ast.Pattern | ast.Attention] = [*attentions, *patterns]
    if select is not None:
        found = [item for item in everything if item.name == select]
        if found:
            return found[0]
        if not broken:
            names = [item.name for item in everything]
            help = nearest(select, names) or (f"it has {', '.join(names[:8])}" if names else "it is a bare pattern")
            report.error("A016", f"`{source.name}` has no program `{select}`", None, help=help)
        return None
    if len(attentions) > 1:
        listed = ", ".join(item.name for item in attentions[:8])
        second = attentions[1].name_span
        report.error("A016", "this text has several attentions", second, "which one?", f"name one of {listed}")
        return None
    if attentions:
        return attentions[0]
    if patterns:
        return patterns[-1]
    if document.expr is None and not broken:
        report.error("A016", f"`{source.name}` holds no pattern", None, help="write one: `causal & window(512)`")
    return None


class _Library(Scope):
    """The patterns that every text may use, written in the language. One is parsed when a text first names it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        starts = [(match[1], match.start()) for match in re.finditer(r"^pattern (\w+)", text, re.MULTILINE)]
        ends = [start for _, start in starts[1:]] + [len(text)]
        self._places = {name: (start, end) for (name, start), end in zip(starts, ends, strict=True)}

    def find(self, name: str) -> Bound | None:
        if name in self._places and name not in self._names:
            start, end = self._places[name]
            # At its own line, for messages that point at it.
            text = "\n" * self._text.count("\n", 0, start) + self._text[start:end]
            report = Report()
            (item,) = parse_source(Source("std.attn", text), report).document.items
            report.raise_errors()
            assert isinstance(item, ast.Pattern)
            self.set(name, PatternRef(item, self), item.name_span)
        return super().find(name)

    def names(self) -> Iterator[str]:
        yield from self._places


@cache
def standard_library() -> Scope:
    """The scope around every text's own."""
    return _Library(Path(__file__).with_name("std.attn").read_text("utf-8"))


def _context(parsed: Parsed, report: Report) -> Context:
    """The scope of a text: the standard library, under the text's own patterns and inputs."""
    scope = Scope(standard_library())
    ctx = Context(Maker(report), report, scope, lost=parsed.lost)
    for item in parsed.document.items:
        if isinstance(item, ast.Input):
            declare_input(item, ctx)
        elif isinstance(item, ast.Pattern):
            scope.declare(item.name, PatternRef(item, scope), item.name_span, report)
    return replace(ctx, file_inputs=dict(ctx.maker.inputs))


def _lower(
    parsed: Parsed, chosen: ast.Pattern | ast.Attention | None, params: dict[str, object], ctx: Context
) -> Program | None:
    try:
        match chosen:
            case ast.Attention():
                return lower_attention(chosen, params, ctx, broken=parsed.broken)
            case ast.Pattern():
                return lower_bare(chosen.name, chosen.body, chosen.params, params, ctx, chosen.name_span)
            case None if parsed.document.expr is not None:
                expr = parsed.document.expr
                return lower_bare("pattern", expr, (), params, ctx, expr.span)
            case None:
                return None
    except TooLarge:
        return None


def _check_others(parsed: Parsed, chosen: ast.Pattern | ast.Attention | None, ctx: Context) -> None:
    """Checks the declarations that are not the program; what they cannot know without arguments stays open.

    Together they may cost as much as the program: past that, the rest is checked when it is used.
    """
    work = MAX_WORK
    for item in parsed.document.items:
        if item is chosen or isinstance(item, ast.Input):
            continue
        inner = Report()
        maker = Maker(inner, work)
        maker.inputs.update(ctx.file_inputs)
        alone = replace(ctx, maker=maker, report=inner)
        try:
            if isinstance(item, ast.Attention):
                lower_attention(item, {}, alone, broken=parsed.broken, assume=True)
            else:
                lower_bare(item.name, item.body, item.params, {}, alone, item.name_span, assume=True)
        except TooLarge:
            if maker.work < 0:
                return
        work = maker.work
        for diagnostic in inner.errors:
            # What is not supported matters only in the program that runs.
            if not diagnostic.code.startswith("A9"):
                ctx.report.add(diagnostic)
