"""The parser's tables, made once from `attn.lark` and kept beside it: lark is asked when the grammar changes, and not
when texts are read, for which its import and its own tables take five times as long as the texts.

After a change of the grammar `python -m attndsl.grammar.parser_tables` writes them anew; a test holds the two together.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

GRAMMAR = "attn.lark"
TABLES = "attn.tables.json"
# The type of what stands after the last token.
END = "$END"


def _beside(name: str) -> Path:
    # Not through importlib.resources, whose import takes a millisecond or two.
    return Path(__file__).with_name(name)


def grammar() -> str:
    return _beside(GRAMMAR).read_text("utf-8")


def digest() -> str:
    """What tables must have been made from."""
    return hashlib.sha256(grammar().encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Rule:
    """How symbols on the stack become one.

    origin: the symbol. length: how many it takes. callback: the builder's method that makes it, empty for what only
    gathers items for the rule around it. single: whether an only item stands for itself. items: what is handed to the
    method, of the symbols taken the i-th (i), all that the i-th gathered (~i), or what an option left out (None).
    """

    origin: str
    length: int
    callback: str
    single: bool
    items: tuple[int | None, ...]


class Tables:
    """An LALR(1) automaton and its lexer.

    lexer: matches one token anywhere, its group the type: a terminal, `WORD` for one of `words` (keywords and symbols,
    with their types), `IGNORED`, or `WRONG`.
    """

    def __init__(self, made: dict[str, Any]) -> None:
        self.lexer = re.compile(made["lexer"])
        self.words: dict[str, str] = made["words"]
        self.texts = {name: text for text, name in self.words.items()}
        self.rules = [
            Rule(origin, length, callback, single, tuple(items))
            for origin, length, callback, single, items in made["rules"]
        ]
        self.start: int = made["start"]
        self.end: int = made["end"]
        self._symbols: list[str] = made["symbols"]
        self._written: list[str] = made["states"]
        self._states: dict[int, dict[str, int | Rule]] = {}

    def actions(self, state: int) -> dict[str, int | Rule]:
        """What a state does on each symbol: go to another state, or reduce by a rule.

        A text comes to a few of the states, so each is read when the automaton first comes to it.
        """
        found = self._states.get(state)
        if found is None:
            found = {}
            for action in self._written[state].split():
                symbol, reduces, rule = action.partition("r")
                if reduces:
                    found[self._symbols[int(symbol)]] = self.rules[int(rule)]
                else:
                    symbol, _, to = action.partition("s")
                    found[self._symbols[int(symbol)]] = int(to)
            self._states[state] = found
        return found


@cache
def tables() -> Tables:
    """The tables of the grammar as it stands."""
    made = json.loads(_beside(TABLES).read_text("utf-8"))
    return Tables(made if made["digest"] == digest() else make_tables())


# ------------------------------------------------------------------------------------------- making


def make_tables() -> dict[str, Any]:
    """The tables, from the grammar, by lark."""
    from lark import Lark
    from lark.lexer import PatternStr
    from lark.parsers.lalr_analysis import Reduce

    made: Any = Lark(grammar(), parser="lalr", lexer="basic", propagate_positions=True, maybe_placeholders=True)
    table = made.parser.parser._parse_table
    words = {t.pattern.value: t.name for t in made.terminals if isinstance(t.pattern, PatternStr)}
    rules = {id(rule): i for i, rule in enumerate(made.rules)}
    symbols = sorted({symbol for actions in table.states.values() for symbol in actions})
    # lark numbers states otherwise in every process: here in the order in which sorted symbols come to them.
    order = [table.start_states["start"]]
    numbers = {order[0]: 0}
    for state in order:
        for _, (action, to) in sorted(table.states[state].items()):
            if action is not Reduce and to not in numbers:
                numbers[to] = len(order)
                order.append(to)
    states = [
        " ".join(
            f"{symbols.index(symbol)}r{rules[id(to)]}" if action is Reduce else f"{symbols.index(symbol)}s{numbers[to]}"
            for symbol, (action, to) in sorted(table.states[state].items())
        )
        for state in order
    ]
    return {
        "digest": digest(),
        "lexer": _lexer(made, words),
        "words": dict(sorted(words.items())),
        "rules": [_rule(rule) for rule in made.rules],
        "symbols": symbols,
        "start": 0,
        "end": numbers[table.end_states["start"]],
        "states": states,
    }


def _lexer(made: Any, words: dict[str, str]) -> str:
    """One pattern for all terminals: what is not a word in lark's order, then the words that are symbols."""
    patterns = [(t.name, t.pattern.to_regexp()) for t in made.parser.lexer.terminals if t.pattern.value not in words]
    ignored = "|".join(pattern for name, pattern in patterns if name in made.ignore_tokens)
    kept = [f"(?P<{name}>{pattern})" for name, pattern in patterns if name not in made.ignore_tokens]
    symbols = "|".join(re.escape(x) for x in sorted(sorted(words), key=len, reverse=True) if not x.isalpha())
    # Keywords are names that `words` has: a name ends where no letter follows.
    return "|".join([*kept, f"(?P<WORD>{symbols})", f"(?P<IGNORED>{ignored})", "(?P<WRONG>(?s:.))"])


def _rule(rule: Any) -> list[Any]:
    name = rule.origin.name
    left_out = list(rule.options.empty_indices) or [False] * len(rule.expansion)
    symbols = iter(enumerate(rule.expansion))
    items: list[int | None] = []
    for nothing in left_out:
        if nothing:
            items.append(None)
            continue
        i, symbol = next(symbols)
        if symbol.is_term and symbol.filter_out:
            continue
        items.append(~i if not symbol.is_term and symbol.name.startswith("_") else i)
    callback = "" if name.startswith("_") else rule.alias or name
    return [name, len(rule.expansion), callback, bool(rule.options.expand1 and not rule.alias), items]


def written() -> str:
    """The text of the tables of the grammar as it stands."""
    return json.dumps(make_tables(), separators=(",", ":")) + "\n"


if __name__ == "__main__":
    _beside(TABLES).write_text(written(), encoding="utf-8")
