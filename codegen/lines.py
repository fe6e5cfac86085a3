"""A builder of indented source lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Lines:
    """Collects source lines at a current indent."""

    def __init__(self, indent: int = 0) -> None:
        self._lines: list[str] = []
        self._indent = indent

    def add(self, *lines: str) -> None:
        """Append lines; an empty one stays empty."""
        self._lines += ["    " * self._indent + line if line else "" for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """A compound statement: its head line, then what is added inside, indented."""
        self.add(head)
        self._indent += 1
        yield
        self._indent -= 1

    def followed_by(self, other: Lines) -> Lines:
        """These lines, then the other's."""
        self._lines += other._lines
        return self

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"
