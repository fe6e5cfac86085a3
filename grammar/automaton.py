"""The parser: tokens of a text, and the automaton that reads them and has the builder make what it recognises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attndsl.diagnostics import Source, Span
from attndsl.grammar.parser_tables import END, Rule, tables

# The type of a character that begins no token.
WRONG = "WRONG"


class Token(str):
    """A piece of the text, and where it stands. type: the grammar's terminal."""

    __slots__ = ("end_pos", "start_pos", "type")
    type: str
    start_pos: int
    end_pos: int

    def __new__(cls, text: str, type: str, start_pos: int) -> Token:
        self = super().__new__(cls, text)
        self.type, self.start_pos, self.end_pos = type, start_pos, start_pos + len(text)
        return self

    def span(self, source: Source) -> Span:
        return Span(source, self.start_pos, self.end_pos)


def lex(text: str) -> Iterator[Token]:
    """The tokens of a text; a character that begins none is one of type WRONG."""
    read = tables()
    words = read.words
    for match in read.lexer.finditer(text):
        kind = match.lastgroup
        if kind == "IGNORED":
            continue
        assert kind is not None
        found = match.group()
        yield Token(found, words.get(found, kind), match.start())


class Automaton:
    """What has been read so far: states, and beside each the value of the symbol that led to it, with the places of its
    first and its last token (None where it has none)."""

    def __init__(self, source: Source, builder: Any) -> None:
        self._source, self._builder, self._tables = source, builder, tables()
        self._states = [self._tables.start]
        self._values: list[tuple[Any, int | None, int | None]] = []

    def feed(self, token: Token) -> bool:
        """Whether the token fits; it is taken if it does."""
        actions, states = self._tables.actions, self._states
        while isinstance(action := actions(states[-1]).get(token.type), Rule):
            self._reduce(action)
            if token.type == END and states[-1] == self._tables.end:
                return True
        if action is None:
            return False
        states.append(action)
        self._values.append((token, token.start_pos, token.end_pos))
        return True

    @property
    def result(self) -> Any:
        """What the whole text is, after its end was fed."""
        (value, _, _) = self._values[-1]
        return value

    def _reduce(self, rule: Rule) -> None:
        taken = self._values[len(self._values) - rule.length :]
        if rule.length:
            del self._values[-rule.length :], self._states[-rule.length :]
        start = next((first for _, first, _ in taken if first is not None), None)
        end = next((last for _, _, last in reversed(taken) if last is not None), None)
        items: list[Any] = []
        for i in rule.items:
            if i is None:
                items.append(None)
            elif i >= 0:
                items.append(taken[i][0])
            elif items:
                items += taken[~i][0]
            else:
                # Nobody else has it: a long list is not copied with each item.
                items = taken[~i][0]
        if not rule.callback:
            value: Any = items
        elif rule.single and len(items) == 1:
            value = items[0]
        else:
            # What has no tokens is given the whole text.
            here = (0, len(self._source.text)) if start is None or end is None else (start, end)
            span = Span(self._source, *here)
            value = getattr(self._builder, rule.callback)(span, items)
        goto = self._tables.actions(self._states[-1])[rule.origin]
        assert isinstance(goto, int)
        self._states.append(goto)
        self._values.append((value, start, end))

    def accepts(self) -> set[str]:
        """The types of tokens that fit here, END where the text may end."""
        return {kind for kind in self._tables.actions(self._states[-1]) if kind.isupper() and self._fits(kind)}

    def _fits(self, kind: str) -> bool:
        states = list(self._states)
        while isinstance(action := self._tables.actions(states[-1]).get(kind), Rule):
            if action.length:
                del states[-action.length :]
            goto = self._tables.actions(states[-1])[action.origin]
            assert isinstance(goto, int)
            states.append(goto)
            if kind == END and goto == self._tables.end:
                return True
        return action is not None


__all__ = ["END", "WRONG", "Automaton", "Token", "lex"]
