"""Which example files the tests of published rules cover: each such test says so, and `test_example_list.py` asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])


def covers(*names: str) -> Callable[[Test], Test]:
    """Marks a test as one of these files of `examples/patterns/` against a rule of its own."""

    def mark(test: Test) -> Test:
        test.covered = names  # type: ignore[attr-defined]
        return test

    return mark
