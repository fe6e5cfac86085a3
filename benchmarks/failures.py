"""What a check or a measurement says when it goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.check_cases import Shape


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that differed or raised: which quantity, and by how much or why."""

    program: str
    shape: Shape
    what: str
    detail: str


def short_reason(error: Exception) -> str:
    """An exception in a few words, for a cell of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 60 else text[:57] + "..."
