"""The parser's tables, made once from `attn.lark` and kept beside it: making them takes 0.1 s, reading them a tenth.

After a change of the grammar `python -m attndsl.grammar.parser_tables` writes them anew; a test holds the two
together. Another release of lark than made them makes its own.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import lark
from lark import Lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

GRAMMAR = "attn.lark"
TABLES = "attn.tables.json"


def grammar() -> str:
    return files("attndsl.grammar").joinpath(GRAMMAR).read_text("utf-8")


def digest() -> str:
    """What tables must have been made from: the grammar's text and the release of lark."""
    return hashlib.sha256(f"{lark.__version__}\n{grammar()}".encode()).hexdigest()


def make_parser() -> Lark:
    """The parser, made from the grammar."""
    return Lark(grammar(), parser="lalr", lexer="basic", propagate_positions=True, maybe_placeholders=True)


def make_tables() -> str:
    """The text of the tables of the grammar as it stands."""
    data, memo = make_parser().memo_serialize([TerminalDef, Rule])
    return json.dumps({"digest": digest(), "data": data, "memo": memo}, separators=(",", ":")) + "\n"


@cache
def parser() -> Lark:
    """The parser, from its tables."""
    tables = json.loads(files("attndsl.grammar").joinpath(TABLES).read_text("utf-8"))
    if tables["digest"] != digest():
        return make_parser()
    data, memo = tables["data"], _integer_keys(tables["memo"])
    table = data["parser"]["parser"]
    # JSON has strings for keys.
    table["states"] = {int(state): _integer_keys(actions) for state, actions in table["states"].items()}
    table["tokens"] = _integer_keys(table["tokens"])
    loaded: Lark = Lark._load_from_dict(data, memo)  # type: ignore[no-untyped-call]
    return loaded


def _integer_keys(entries: dict[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in entries.items()}


if __name__ == "__main__":
    Path(str(files("attndsl.grammar").joinpath(TABLES))).write_text(make_tables(), encoding="utf-8")
