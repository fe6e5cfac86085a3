"""Diagnostics: the one way in which attndsl tells a user what is wrong, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum


class Severity(Enum):
    ERROR = "error"
    WARNING = "warning"
    LINT = "lint"


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A pattern text and the name under which messages show it."""

    name: str
    text: str

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column (both from 1) of a character offset."""
        line = self.text.count("\n", 0, offset)
        return line + 1, offset - (self.text.rfind("\n", 0, offset) + 1) + 1

    def line(self, number: int) -> str:
        """Text of a line (from 1), without its end."""
        return self.text.split("\n")[number - 1].rstrip("\r")


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of characters [start, end) in a source."""

    source: Source
    start: int
    end: int

    def __str__(self) -> str:
        line, column = self.source.position(self.start)
        return f"{self.source.name}:{line}:{column}"

    def to(self, other: Span) -> Span:
        return Span(self.source, self.start, max(self.end, other.end))


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One message: what is wrong, where, and one suggested fix.

    `code` is stable across releases. `label` stands beside the carets. `help` is one suggestion.
    `notes` hold further facts, such as a witness pair.
    """

    code: str
    severity: Severity
    message: str
    span: Span | None = None
    label: str = ""
    help: str = ""
    notes: tuple[str, ...] = field(default=())

    def render(self) -> str:
        lines = [f"{self.severity.value}[{self.code}]: {self.message}"]
        gutter = " "
        if self.span is not None:
            source = self.span.source
            row, column = source.position(self.span.start)
            text = source.line(row)
            # A span may cross lines: the carets then run to the end of its first line.
            length = max(1, min(self.span.end - self.span.start, len(text) - column + 1))
            # Very long lines are shown as the part around the span.
            left = max(0, column - 60)
            shown = text[left : left + 120].replace("\t", " ")
            length = min(length, max(1, len(shown) - (column - 1 - left)))
            gutter = " " * len(str(row))
            lines.append(f"{gutter}--> {source.name}:{row}:{column}")
            lines.append(f"{gutter} |")
            lines.append(f"{row} | {shown}".rstrip())
            carets = " " * (column - 1 - left) + "^" * length
            lines.append(f"{gutter} | {carets} {self.label}".rstrip())
        lines += [f"{gutter} = note: {note}" for note in self.notes]
        if self.help:
            lines.append(f"{gutter} = help: {self.help}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


class PatternError(ValueError):
    """A mistake in a pattern, or in how it is called. `diagnostics` holds every message."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)
        super().__init__("\n\n".join(d.render() for d in self.diagnostics))


class PatternWarning(UserWarning):
    """Something in a pattern that is legal and probably not meant."""


def error(code: str, message: str, span: Span | None = None, label: str = "", help: str = "") -> PatternError:
    """A `PatternError` of a single diagnostic."""
    return PatternError([Diagnostic(code, Severity.ERROR, message, span, label, help)])
