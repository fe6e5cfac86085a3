"""Collects diagnostics, so that one run shows all mistakes of a text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from attndsl.diagnostics import Diagnostic, PatternError, Severity, Span

# A text with more mistakes than this is something else than a pattern with mistakes.
MAX_ERRORS = 50


class TooLarge(Exception):
    """A bound on untrusted input was passed; it is already reported."""


class Report:
    """Diagnostics in the order found. A message is kept once per place and code."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int, int], Diagnostic] = {}
        self._calls: list[Span] = []

    def error(
        self, code: str, message: str, span: Span | None, label: str = "", help: str = "", notes: tuple[str, ...] = ()
    ) -> None:
        self.add(Diagnostic(code, Severity.ERROR, message, span, label, help, notes))

    def warning(self, code: str, message: str, span: Span | None, label: str = "", help: str = "") -> None:
        self.add(Diagnostic(code, Severity.WARNING, message, span, label, help))

    def lint(self, code: str, message: str, span: Span | None, label: str = "", help: str = "") -> None:
        self.add(Diagnostic(code, Severity.LINT, message, span, label, help))

    def add(self, diagnostic: Diagnostic) -> None:
        diagnostic = self._at_call(diagnostic)
        span = diagnostic.span
        key = (diagnostic.code, span.start if span else -1, span.end if span else -1)
        if len(self._found) < MAX_ERRORS:
            self._found.setdefault(key, diagnostic)

    def fatal(self, code: str, message: str, span: Span | None, label: str = "", help: str = "") -> TooLarge:
        """Reports the passing of a bound; the caller raises what is returned."""
        self.error(code, message, span, label, help)
        return TooLarge(message)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        return tuple(sorted(self._found.values(), key=_position))

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        return tuple(d for d in self.diagnostics if d.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        return tuple(d for d in self.diagnostics if d.severity is not Severity.ERROR)

    def raise_errors(self) -> None:
        """Raises one `PatternError` with every error (and the warnings, after them)."""
        if self.errors:
            raise PatternError((*self.errors, *self.warnings))

    @contextmanager
    def calling(self, span: Span) -> Iterator[None]:
        """While it lasts, a mistake inside another text (the standard library) is shown at this call."""
        self._calls.append(span)
        try:
            yield
        finally:
            self._calls.pop()

    def _at_call(self, diagnostic: Diagnostic) -> Diagnostic:
        span = diagnostic.span
        if span is None or not self._calls or span.source is self._calls[0].source:
            return diagnostic
        call = next(call for call in reversed(self._calls) if call.source is self._calls[0].source)
        row, _ = span.source.position(span.start)
        note = f"in {span}: {span.source.line(row).strip()}"
        return replace(diagnostic, span=call, notes=(*diagnostic.notes, note))


def _position(diagnostic: Diagnostic) -> int:
    return -1 if diagnostic.span is None else diagnostic.span.start


def nearest(name: str, known: Iterable[str]) -> str:
    """A help line that names the closest known word, or the empty string."""
    close = difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""
