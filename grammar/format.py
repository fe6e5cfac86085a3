"""The canonical layout of a text.

Works on the tokens, so a program cannot change its meaning: only blanks between tokens change. An item or
clause starts its own line, clauses are indented by four, lines longer than 100 break at the loosest
operator outside brackets. Comments stay between the tokens where they stood: one that ends a line still
ends it, one on its own line still has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from attndsl import syntax as ast
from attndsl.diagnostics import Source
from attndsl.grammar.automaton import Token
from attndsl.grammar.parse import KEYWORDS, parse_source
from attndsl.grammar.report import Report

WIDTH = 100
INDENT = 4

# Where a long line may break, loosest first: before these words, or after a `,` or `=`.
_BREAKS = (
    frozenset({"where", ","}),
    frozenset({"over", "from", "within", "with", ","}),
    frozenset({"then", "else"}),
    frozenset({"or", "|"}),
    frozenset({"and", "&"}),
    frozenset({"="}),
)
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")
# After these a `-` is a sign.
_BEFORE_OPERAND = frozenset("( [ { , = : ~ - + * / // % < <= > >= == != & |".split())


@dataclass(slots=True)
class _Comment:
    text: str
    own_line: bool
    blank_before: bool


@dataclass(slots=True)
class _Piece:
    """A token and what stands before it."""

    token: Token
    comments: list[_Comment] = field(default_factory=list)
    blank_before: bool = False


@dataclass(slots=True)
class _Statement:
    indent: int
    pieces: list[_Piece]


def format_source(text: str, name: str = "<pattern>") -> str:
    """The text in canonical layout.

    >>> from attndsl.grammar import format_source
    >>> print(format_source("attention a{attend causal&(window( 8 )|sink(4))}"), end="")
    attention a {
        attend causal & (window(8) | sink(4))
    }

    Parameters: text, and the name under which messages show it.
    Raises: `PatternError` if the text does not parse.
    """
    source, report = Source(name, text), Report()
    parsed = parse_source(source, report)
    report.raise_errors()
    pieces, tail = _pieces(text, parsed.tokens)
    lines: list[str] = []
    for statement in _statements(pieces, parsed.document):
        _emit(statement, lines)
    for comment in tail:
        _place_comment(comment, 0, lines)
    return "\n".join(lines).lstrip("\n") + "\n"


# --------------------------------------------------------------------------------------- comments
def _pieces(text: str, tokens: Sequence[Token]) -> tuple[list[_Piece], list[_Comment]]:
    """Tokens with the comments before them, and the comments after the last."""
    pieces: list[_Piece] = []
    end = 0
    for token in tokens:
        comments, blank = _comments(text[end : token.start_pos], at_start=end == 0)
        pieces.append(_Piece(token, comments, blank))
        end = token.end_pos
    return pieces, _comments(text[end:], at_start=end == 0)[0]


def _comments(gap: str, *, at_start: bool) -> tuple[list[_Comment], bool]:
    """Comments of the text between two tokens, and whether a blank line comes last."""
    found: list[_Comment] = []
    blank = False
    for number, line in enumerate(gap.split("\n")):
        stripped = line.strip()
        if stripped:
            found.append(_Comment(stripped, number > 0 or at_start, blank))
            blank = False
        elif 0 < number < gap.count("\n"):
            blank = True
    return found, blank


def _place_comment(comment: _Comment, indent: int, lines: list[str]) -> None:
    if not comment.own_line and lines:
        lines[-1] += f"  {comment.text}"
        return
    if comment.blank_before and lines:
        lines.append("")
    lines.append(" " * indent + comment.text)


# ------------------------------------------------------------------------------------- statements
def _statements(pieces: list[_Piece], document: ast.Document) -> list[_Statement]:
    """The items, clauses and closing braces, each of which starts a line."""
    starts: dict[int, int] = {}
    closing: set[int] = set()
    for item in document.items:
        starts[item.span.start] = 0
        if isinstance(item, ast.Attention):
            closing.add(item.span.end - 1)
            for clause in item.clauses:
                starts[clause.span.start] = INDENT
    statements: list[_Statement] = []
    for piece in pieces:
        at = piece.token.start_pos
        assert at is not None
        if at in closing:
            statements.append(_Statement(0, [piece]))
        elif at in starts or not statements:
            statements.append(_Statement(starts.get(at, 0), [piece]))
        else:
            statements[-1].pieces.append(piece)
    return statements


def _emit(statement: _Statement, lines: list[str]) -> None:
    first = statement.pieces[0]
    # Comments before a closing brace belong to the clauses above it.
    indent = INDENT if first.token == "}" else statement.indent
    for comment in first.comments:
        _place_comment(comment, indent, lines)
    if first.blank_before and lines and first.token != "}":
        lines.append("")
    is_input = first.token == "input"
    chunk, indent = [first.token], statement.indent
    for piece in statement.pieces[1:]:
        if piece.comments:
            lines.extend(_wrap(chunk, indent, statement.indent + INDENT, is_input))
            chunk, indent = [], statement.indent + INDENT
            for comment in piece.comments:
                _place_comment(_Comment(comment.text, comment.own_line, False), indent, lines)
        chunk.append(piece.token)
    lines.extend(_wrap(chunk, indent, statement.indent + INDENT, is_input))


# ------------------------------------------------------------------------------------------ lines
def _wrap(tokens: Sequence[Token], indent: int, further: int, is_input: bool) -> list[str]:
    """The tokens in as many lines as they need; the first at `indent`, the others at `further`."""
    line = " " * indent + _joined(tokens, is_input)
    segments = _segments(tokens)
    if len(line) <= WIDTH or len(segments) == 1:
        return [line]
    lines: list[str] = []
    current: list[Token] = []
    for segment in segments:
        start = further if lines else indent
        if current and start + len(_joined([*current, *segment], is_input)) > WIDTH:
            lines.extend(_wrap(current, start, further + INDENT, is_input))
            current = []
        current.extend(segment)
    lines.extend(_wrap(current, further if lines else indent, further + INDENT, is_input))
    return lines


def _segments(tokens: Sequence[Token]) -> list[list[Token]]:
    """The tokens cut at the outermost places where a line may break."""
    depths: list[int] = []
    depth = 0
    for token in tokens:
        if token in _CLOSE:
            depth -= 1
        depths.append(depth)
        if token in _OPEN:
            depth += 1
    cuts: dict[tuple[int, int], list[int]] = {}
    for index in range(1, len(tokens)):
        here = min(depths[index], depths[index - 1])
        for order, words in enumerate(_BREAKS):
            after = tokens[index - 1] in words and tokens[index - 1] in (",", "=")
            if after or (tokens[index] in words and tokens[index] not in (",", "=")):
                cuts.setdefault((here, order), []).append(index)
    # Without a `where`, the commas are those of a list.
    usable = {
        key: places for key, places in cuts.items() if key[1] > 0 or any(tokens[place] == "where" for place in places)
    }
    if not usable:
        return [list(tokens)]
    places = [0, *usable[min(usable)], len(tokens)]
    return [list(tokens[a:b]) for a, b in pairwise(places)]


def _joined(tokens: Sequence[Token], is_input: bool) -> str:
    text = ""
    before: Token | None = None
    sign = False
    for token in tokens:
        if before is not None and _spaced(before, token, sign, is_input):
            text += " "
        sign = token == "-" and (before is None or before in _BEFORE_OPERAND or before in KEYWORDS)
        text += token
        before = token
    return text


def _spaced(before: Token, token: Token, sign: bool, is_input: bool) -> bool:
    if before == "{" or token == "}":
        return True
    if sign or before in ("(", "[", ".", "~") or token in (")", "]", ",", "."):
        return False
    if is_input and "/" in (before, token):
        return False
    if token in ("(", "["):
        return before.type != "NAME"
    return True
