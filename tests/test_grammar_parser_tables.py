"""The parser's kept tables are those of the grammar, and parse as it does."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from attndsl.grammar import parser_tables


def kept() -> str:
    return files("attndsl.grammar").joinpath(parser_tables.TABLES).read_text("utf-8")


def test_tables_are_those_of_the_grammar() -> None:
    # `python -m attndsl.grammar.parser_tables` writes them anew.
    assert json.loads(kept())["digest"] == parser_tables.digest()


def test_tables_parse_as_the_grammar_does() -> None:
    made = parser_tables.make_parser()
    assert parser_tables.parser() is not made
    for path in (Path(__file__).parent / "programs").glob("*.attn"):
        text = path.read_text("utf-8")
        assert parser_tables.parser().parse(text) == made.parse(text)
