"""Python values given for parameters: numbers, nested sequences, and arrays by their `tolist`."""

from __future__ import annotations

from collections.abc import Sequence

MAX_ENTRIES = 1_000_000


def table_value(value: object) -> tuple[tuple[int, ...], tuple[int | float | bool, ...]] | str | None:
    """Shape and row-major entries (shape () for a number); a message if ragged; None if not numbers."""
    listed = getattr(value, "tolist", None)
    if callable(listed):
        value = listed()
    if isinstance(value, bool | int | float):
        return (), (value,)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return None
    if len(value) == 0:
        return "it is empty"
    if len(value) > MAX_ENTRIES:
        return f"more than {MAX_ENTRIES:,} entries"
    parts = [table_value(item) for item in value]
    shapes: set[tuple[int, ...]] = set()
    entries: list[int | float | bool] = []
    for part in parts:
        if part is None or isinstance(part, str):
            return part
        shapes.add(part[0])
        entries.extend(part[1])
    if len(shapes) > 1:
        return "its rows have different lengths"
    return (len(value), *shapes.pop()), tuple(entries)
