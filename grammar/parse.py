"""Text to surface syntax, with recovery: after a syntax error parsing resumes at the next clause word."""

from __future__ import annotations

from dataclasses import dataclass

from attndsl import syntax as ast
from attndsl.diagnostics import Source, Span
from attndsl.grammar.automaton import END, WRONG, Automaton, Token, lex
from attndsl.grammar.build import Builder
from attndsl.grammar.parser_tables import tables
from attndsl.grammar.report import Report, TooLarge, nearest
from attndsl.source_files import MAX_BYTES, too_long

MAX_TOKENS = 20_000
MAX_NESTING = 64
MAX_SYNTAX_ERRORS = 20

CLAUSE_WORDS = frozenset(
    "pattern attention input plan axes align packed lengths observe attend output".split()
    + "scale score softmax weights skip".split()
)
KEYWORDS = CLAUSE_WORDS | frozenset(
    "within over on with from in where if then else and or not true false runtime learnable sorted".split()
)
# The parser takes one of these exactly where a clause or item may begin.
_STARTS = frozenset({"ATTEND", "ATTENTION"})
_OPEN = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A document, its tokens, and the words of the clauses that did not parse (unknown names among them
    say nothing)."""

    document: ast.Document
    tokens: tuple[Token, ...]
    lost: frozenset[str]
    broken: bool


def parse(text: str, *, name: str = "<pattern>") -> ast.Document:
    """The surface syntax of a text.

    >>> from attndsl.grammar import parse
    >>> parse("causal & window(512)").expr.op
    '&'

    Parameters: text, and the name under which messages show it.
    Raises: `PatternError` with every syntax error of the text.
    """
    report = Report()
    parsed = parse_source(Source(name, text), report)
    report.raise_errors()
    return parsed.document


def parse_source(source: Source, report: Report) -> Parsed:
    """Parses what can be parsed; errors go to the report."""
    try:
        return _parse(source, report)
    except TooLarge:
        return Parsed(ast.Document((), None, Span(source, 0, 0)), (), frozenset(), broken=True)


def _parse(source: Source, report: Report) -> Parsed:
    if len(source.text) > MAX_BYTES:
        for diagnostic in too_long(source.name).diagnostics:
            report.add(diagnostic)
        raise TooLarge
    tokens = _tokens(source, report)
    _check_nesting(tokens, source, report)
    remaining, lost = list(tokens), set[str]()
    broken = bool(report.errors)
    for _ in range(MAX_SYNTAX_ERRORS):
        document, failed = _attempt(remaining, source, report)
        if document is not None:
            break
        assert failed is not None
        broken = True
        index, expected = failed
        _syntax_error(remaining, index, expected, source, report)
        start, stop = _clause_around(remaining, index, complete=bool(expected & _STARTS))
        if (start, stop) == (0, len(remaining)):
            break
        lost.update(str(t) for t in remaining[start:stop] if t.type == "NAME")
        del remaining[start:stop]
    if document is None:
        return Parsed(ast.Document((), None, Span(source, 0, 0)), tokens, frozenset(lost), broken=True)
    levels, deepest = ast.depth(document)
    # A clause of an attention stands four levels under its document.
    if levels > MAX_NESTING + 8:
        raise report.fatal("A004", f"expressions nest more than {MAX_NESTING} levels", _span(deepest), help=_FLATTER)
    return Parsed(document, tokens, frozenset(lost), broken)


_FLATTER = "name inner parts as patterns, or with `where`"


def _span(node: ast.Node) -> Span:
    return node.span


def _tokens(source: Source, report: Report) -> tuple[Token, ...]:
    """The tokens; characters outside the language are reported and left out."""
    found = list[Token]()
    for token in lex(source.text):
        if token.type == WRONG:
            help = _CHARACTER_HELP.get(token, "remove it")
            report.error("A005", f"unexpected character {str(token)!r}", token.span(source), help=help)
            if len(report.errors) >= MAX_SYNTAX_ERRORS:
                raise TooLarge
            continue
        if len(found) == MAX_TOKENS:
            what = f"the text has more than {MAX_TOKENS:,} tokens"
            raise report.fatal("A003", what, token.span(source), help="split it")
        found.append(token)
    return tuple(found)


_CHARACTER_HELP = {
    "!": "write `not`, or `!=` for unequal",
    "^": "there are no powers: write `exp2(x)` in a score",
    ";": "clauses need no separator: remove it",
    "\u2264": "write `<=`",
    "\u2265": "write `>=`",
    "\u2260": "write `!=`",
    "\u2227": "write `and`, or `&` on sets",
    "\u2228": "write `or`, or `|` on sets",
    "\u00ac": "write `not`, or `~` on sets",
    "\u2212": "write the ASCII `-`",
}


def _check_nesting(tokens: tuple[Token, ...], source: Source, report: Report) -> None:
    level = 0
    for token in tokens:
        if token in _OPEN:
            level += 1
            if level > MAX_NESTING:
                raise report.fatal(
                    "A004", f"brackets nest more than {MAX_NESTING} levels", token.span(source), help=_FLATTER
                )
        elif token in _OPEN.values():
            level = max(0, level - 1)


def _attempt(
    tokens: list[Token], source: Source, report: Report
) -> tuple[ast.Document | None, tuple[int, set[str]] | None]:
    """The document, or the index of the first token that does not fit and what would."""
    builder = Builder(source)
    automaton = Automaton(source, builder)
    for index, token in enumerate([*tokens, Token("", END, len(source.text))]):
        if not automaton.feed(token):
            return None, (index, automaton.accepts())
    for code, message, span, help in builder.problems:
        report.error(code, message, span, help=help)
    document = automaton.result
    assert isinstance(document, ast.Document)
    return document, None


def _syntax_error(tokens: list[Token], index: int, expected: set[str], source: Source, report: Report) -> None:
    words = sorted(_spelled(name) for name in expected if name != END)
    wanted = f"expected {' or '.join(words)}" if 0 < len(words) <= 6 else ""
    if index == len(tokens):
        end = len(source.text.rstrip())
        span = Span(source, max(0, end - 1), max(end, 1))
        help = _unclosed(tokens, source) or wanted or "finish the expression"
        report.error("A002", "the text ends too early", span, label="something is missing after this", help=help)
        return
    token = tokens[index]
    help = _hint(tokens, index, expected) or wanted or "an expression belongs here"
    report.error("A002", f"unexpected `{token}`", token.span(source), label="does not fit here", help=help)


def _hint(tokens: list[Token], index: int, expected: set[str]) -> str:
    token, before = tokens[index], tokens[index - 1] if index else None
    if token == "attend" and before is None:
        return "clauses stand in an attention: write `attention name { attend ... }`, or the pattern alone"
    if token in KEYWORDS and "NAME" in expected and "LPAR" not in expected:
        return f"`{token}` is a reserved word: choose another name"
    if token in CLAUSE_WORDS and not expected & _STARTS:
        return f"finish what stands before `{token}`"
    if token == "=" and before is not None:
        return f"leave out the `=` after `{before}`" if before in CLAUSE_WORDS else "equality is `==`"
    if token in ("&", "|") and before == token:
        return f"write `{token}` between sets, `{'and' if token == '&' else 'or'}` between booleans"
    if before == "=" and token.type in ("INT", "FLOAT") and expected == {"ATTEND"}:
        name = tokens[index - 2]
        return f"numbers are parameters: write `attention ...({name} = {token}) {{`"
    if token == "[" and index > 1 and tokens[index - 2] == "]" and _clause_of(tokens, index) == "axes":
        return "write `,` between axes"
    if before is not None and before.type == "NAME" and token.type == "NAME":
        return nearest(before, KEYWORDS) or nearest(token, KEYWORDS) or "an operator is missing between these names"
    if token in ("*", "/") and before == token:
        return "there are no powers: write `exp2(x)` in a score"
    return ""


def _clause_of(tokens: list[Token], index: int) -> str:
    """The word that begins the clause of a token."""
    return next((str(tokens[at]) for at in range(index, -1, -1) if _is_clause_start(tokens, at)), "")


def _unclosed(tokens: list[Token], source: Source) -> str:
    stack: list[Token] = []
    for token in tokens:
        if token in _OPEN:
            stack.append(token)
        elif token in _OPEN.values() and stack:
            stack.pop()
    if not stack:
        return ""
    line, _ = source.position(stack[-1].start_pos)
    return f"close the `{stack[-1]}` of line {line} with `{_OPEN[stack[-1]]}`"


def _spelled(terminal: str) -> str:
    names = {"NAME": "a name", "INT": "a number", "FLOAT": "a number", "CMP": "a comparison", "MULOP": "`*`"}
    return names.get(terminal) or f"`{tables().texts[terminal]}`"


def _is_clause_start(tokens: list[Token], index: int) -> bool:
    if tokens[index].type == "NAME" or tokens[index] not in CLAUSE_WORDS:
        return False
    # `normalise = softmax` is an argument, not a clause.
    return not (tokens[index] == "softmax" and index > 0 and tokens[index - 1] in ("=", "(", ","))


def _clause_around(tokens: list[Token], index: int, *, complete: bool) -> tuple[int, int]:
    """The tokens to leave out: from the start of the clause that holds the error to the next clause word, or to
    the brace that closes the attention."""
    # A clause word in the middle of a clause: the clause before it is the broken one.
    unfinished = index < len(tokens) and _is_clause_start(tokens, index) and not complete
    start = min(index - unfinished, len(tokens) - 1)
    while start > 0 and not _is_clause_start(tokens, start):
        start -= 1
    start = max(start, 0)
    whole = tokens[start] == "attention" if tokens else False
    if tokens and tokens[start] == "attend" and start >= 2 and tokens[start - 1] == "=":
        start -= 2
    words = ("attention", "pattern") if whole else CLAUSE_WORDS
    return start, _clause_end(tokens, start, index - unfinished, frozenset(words))


def _clause_end(tokens: list[Token], start: int, index: int, words: frozenset[str]) -> int:
    """The next clause word past the error: outside brackets if there is one, else the next at all."""
    depth, fallback = 0, len(tokens)
    for stop in range(start + 1, len(tokens)):
        token = tokens[stop]
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            if depth < 0:
                return min(stop, fallback)
        if stop > index and token in words and _is_clause_start(tokens, stop):
            begin = stop - 2 if token == "attend" and tokens[stop - 1] == "=" else stop
            if depth <= 0 or token == "attention":
                return min(begin, fallback) if token == "attention" else begin
            fallback = min(fallback, begin)
    return fallback
