"""Points of integer sets on arrays, beside what isl says of each."""

from __future__ import annotations

import islpy as isl
import numpy as np
import pytest

from attndsl.effort import TooHard
from attndsl.set_values import MAX_CELLS, held

SETS = (
    "[n] -> { [x, y] : 0 <= x < n and y <= x }",
    "[n] -> { [x, y] : exists e : y = 2 e + x and 3 * floor(x / 5) + y >= n and y <= 10 }",
    "[n] -> { [x, y] : x mod 4 = 0 and 2 y <= floor((x + floor(y / 3)) / 2) or y = n }",
    "[n] -> { [x, y] : exists a, b : 3 a <= x < 3 a + 2 and 5 b <= y < 5 b + 2 and a + b < n and 7 * (a - b) <= x }",
    "{ [x, y] : 1 = 0 }",
    "{ [x, y] }",
)


@pytest.mark.parametrize("text", SETS)
def test_points(text: str) -> None:
    items = isl.Set.read_from_str(isl.Context(), text)
    x, y = np.arange(-6, 12), np.arange(-7, 13)
    for n in (-3, 0, 4, 9):
        found = held(items, {"n": np.asarray(n), "x": x[:, None], "y": y})
        at_n = items.intersect_params(isl.Set.read_from_str(items.get_ctx(), f"[n] -> {{ : n = {n} }}"))
        points = at_n.project_out_all_params()
        expected = [
            [not points.intersect(isl.Set.read_from_str(items.get_ctx(), f"{{ [{a}, {b}] }}")).is_empty() for b in y]
            for a in x
        ]
        assert found.tolist() == expected


def test_too_many() -> None:
    items = isl.Set.read_from_str(isl.Context(), "{ [x, y] : 0 <= x and y <= x }")
    side = np.arange(1 + MAX_CELLS // 1024)
    with pytest.raises(TooHard):
        held(items, {"x": np.arange(1024)[:, None], "y": side})
