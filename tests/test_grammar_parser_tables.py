"""The parser's kept tables are those of the grammar, and its automaton reads texts as lark does."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lark import Lark, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput

from attndsl.diagnostics import Source, Span
from attndsl.grammar import automaton, parser_tables
from attndsl.grammar.automaton import END, WRONG, Automaton

ROOT = Path(__file__).parent.parent
TEXTS = sorted(
    path.read_text("utf-8")
    for folder in ("tests/programs", "examples/patterns", "grammar")
    for path in (ROOT / folder).glob("*.attn")
)


@cache
def lark() -> Lark:
    text = files("attndsl.grammar").joinpath(parser_tables.GRAMMAR).read_text("utf-8")
    return Lark(text, parser="lalr", lexer="basic", propagate_positions=True, maybe_placeholders=True)


class Recorder:
    """Builds what it is told, as it is told."""

    def __getattr__(self, name: str) -> Callable[[Span, list[Any]], Any]:
        return lambda span, items: (name, span.start, span.end, items)


def read(text: str) -> Any:
    """What the automaton makes of a text, or the index of the token that does not fit, and what would."""
    reader = Automaton(Source("<pattern>", text), Recorder())
    for i, token in enumerate([*automaton.lex(text), automaton.Token("", END, len(text))]):
        if not reader.feed(token):
            return i, reader.accepts()
    return reader.result


def read_by_lark(text: str) -> Any:
    tokens = list(lark().lex(text))
    parser = lark().parse_interactive()
    for i, token in enumerate(tokens):
        try:
            parser.feed_token(token)
        except UnexpectedInput:
            return i, parser.accepts()  # type: ignore[no-untyped-call]
    try:
        return recorded(parser.feed_eof(tokens[-1] if tokens else None), text)  # type: ignore[no-untyped-call]
    except UnexpectedInput:
        return len(tokens), parser.accepts()  # type: ignore[no-untyped-call]


def recorded(node: Any, text: str) -> Any:
    if not isinstance(node, Tree):
        return node
    items = [recorded(child, text) for child in node.children]
    whole = node.meta.empty
    return str(node.data), 0 if whole else node.meta.start_pos, len(text) if whole else node.meta.end_pos, items


def mutated(text: str, rng: random.Random) -> str:
    """The text with pieces left out, said twice, or of another text."""
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(text) + 1), rng.choice(TEXTS)
        to, cut = min(len(text), at + rng.randint(0, 12)), rng.randrange(len(other))
        text = text[:at] + rng.choice(["", text[at:to] * 2, other[cut : cut + rng.randint(0, 12)], "$"]) + text[to:]
    return text


def test_tables_are_those_of_the_grammar() -> None:
    # `python -m attndsl.grammar.parser_tables` writes them anew.
    kept = files("attndsl.grammar").joinpath(parser_tables.TABLES).read_text("utf-8")
    assert kept == parser_tables.written()


def test_texts_are_read_as_lark_reads_them() -> None:
    # Every other one: lark takes long.
    for text in TEXTS[::2]:
        found = read(text)
        assert isinstance(found[0], str)
        assert found == read_by_lark(text)


def test_broken_texts_are_refused_where_lark_refuses_them() -> None:
    rng, refused = random.Random(0), 0
    for _ in range(100):
        text = mutated(rng.choice(TEXTS)[:600], rng)
        found = [(str(x), x.type, x.start_pos, x.end_pos) for x in automaton.lex(text)]
        try:
            wanted = [(str(x), x.type, x.start_pos, x.end_pos) for x in lark().lex(text)]
        except UnexpectedCharacters as bad:
            wrong = [start for _, kind, start, _ in found if kind == WRONG]
            assert bad.pos_in_stream in wrong
            continue
        assert found == wanted
        assert read(text) == read_by_lark(text)
        refused += isinstance(read(text)[0], int)
    assert refused > 30


def test_tokens_are_texts() -> None:
    (token,) = automaton.lex(" abc ")
    assert token == "abc"
    assert (token.type, token.start_pos, token.end_pos) == ("NAME", 1, 4)
