"""The parser's tables, made once from `attn.lark` and kept beside it: making them takes 0.1 s, reading them a tenth.

After a change of the grammar `python -m attndsl.grammar.parser_tables` writes them anew; a test holds the two
together. Another release of lark than made them makes its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lark
from lark import Lark, Token
from lark.grammar import Rule
from lark.lexer import LexerThread, TerminalDef
from lark.parsers.lalr_analysis import Reduce, Shift

GRAMMAR = "attn.lark"
TABLES = "attn.tables.json"


def _beside(name: str) -> Path:
    # Not through importlib.resources, whose import takes a millisecond or two.
    return Path(__file__).with_name(name)


def grammar() -> str:
    return _beside(GRAMMAR).read_text("utf-8")


def digest() -> str:
    """What tables must have been made from: the grammar's text and the release of lark."""
    return hashlib.sha256(f"{lark.__version__}\n{grammar()}".encode()).hexdigest()


def make_parser() -> Lark:
    """The parser, made from the grammar."""
    return Lark(grammar(), parser="lalr", lexer="basic", propagate_positions=True, maybe_placeholders=True)


def make_tables() -> str:
    """The text of the tables of the grammar as it stands.

    Most of them are what a state of the parser does on each token. A pattern comes to a few of the states, so each is a
    string of its own, that is read when the parser first comes to it.
    """
    data, memo = make_parser().memo_serialize([TerminalDef, Rule])
    table = data["parser"]["parser"]
    table["states"] = {state: _written(actions) for state, actions in table["states"].items()}
    return json.dumps({"digest": digest(), "data": data, "memo": memo}, separators=(",", ":")) + "\n"


def _written(actions: dict[int, Any]) -> str:
    """`3r56 4s18`: on token 3 reduce by rule 56, on token 4 go to state 18."""
    return " ".join(f"{token}r{to['@']}" if reduces else f"{token}s{to}" for token, (reduces, to) in actions.items())


class _States(dict[int, dict[str, Any]]):
    """What each state of the parser does on each token, read when it is first asked for."""

    def __init__(self, written: dict[str, str], tokens: dict[str, str], rules: dict[int, Rule]) -> None:
        self._written, self._tokens, self._rules = written, tokens, rules

    def __missing__(self, state: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for action in self._written[str(state)].split():
            token, reduces, rule = action.partition("r")
            if reduces:
                found[self._tokens[token]] = Reduce, self._rules[int(rule)]
            else:
                token, _, to = action.partition("s")
                found[self._tokens[token]] = Shift, int(to)
        self[state] = found
        return found


@cache
def parser() -> Lark:
    """The parser, from its tables."""
    tables = json.loads(_beside(TABLES).read_text("utf-8"))
    if tables["digest"] != digest():
        return make_parser()
    # JSON has strings for keys.
    data, memo = tables["data"], {int(key): value for key, value in tables["memo"].items()}
    table = data["parser"]["parser"]
    written, table["states"] = table["states"], {}
    loaded: Lark = Lark._load_from_dict(data, memo)  # type: ignore[no-untyped-call]
    rules = {entry["@"]: rule for entry, rule in zip(data["rules"], loaded.rules, strict=True)}
    loaded.parser.parser._parse_table.states = _States(written, table["tokens"], rules)
    return loaded


def lex(text: str) -> Iterator[Token]:
    """The tokens of a text, by the parser's own lexer: `Lark.lex` makes one anew each time.

    Raises lark's `UnexpectedCharacters`.
    """
    tokens: Iterator[Token] = LexerThread.from_text(parser().parser.lexer, text).lex(None)  # type: ignore[no-untyped-call]
    return tokens


if __name__ == "__main__":
    _beside(TABLES).write_text(make_tables(), encoding="utf-8")
