"""Lists of rows so long that their key tiles are made by several programs: a member that every row chose."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attndsl.program import CallShape
from attndsl.runtime import lists
from attndsl.runtime.long_lists import LongLists
from tests.gpu import interprets
from tests.test_plans import attend, sizes

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning"),
    interprets,
]


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 9), st.integers(1, 1200), st.integers(0, 99))
def test_cut(batch: int, longest: int, most: int, count: int, seed: int) -> None:
    """Parts cover long lists and no others, in order, none longer than it may be."""
    rng = np.random.default_rng(seed)
    size = rng.integers(0, 3 * longest, (batch, 2, count)) * (rng.random((batch, 2, count)) < 0.2)
    size[..., rng.integers(0, count)] = most * longest
    begin = np.cumsum(size, -1) - size + 3 * count
    head = np.stack((begin, begin + size // 2, begin + size), -1).reshape(batch, 2, -1)
    room = int(np.where(size > longest, -(-size // longest), 0).sum(-1).max()) + seed % 3
    if room == 0:
        return
    found = torch.from_numpy(np.concatenate((head, rng.integers(0, 9, (batch, 2, 5))), -1).astype(np.int32))
    made = lists.cut(found, found.device, count, longest, room)(found)
    assert made.shape == (2 * batch, room, 4)
    for row, starts, of in zip(made.tolist(), begin.reshape(-1, count), size.reshape(-1, count), strict=True):
        rest = list(row)
        for n in np.flatnonzero(of > longest):
            parts = -(-of[n] // longest)
            own, rest = rest[:parts], rest[parts:]
            assert [x[0] for x in own] == [n] * parts
            assert [x[3] for x in own] == [parts] + [0] * (parts - 1)
            assert own[0][1] == starts[n] and own[-1][2] == starts[n] + of[n]
            assert all(a[2] == b[1] for a, b in pairwise(own))
            assert all(0 < x[2] - x[1] <= longest for x in own)
        assert rest == [[0, 0, 0, 0]] * len(rest)


def chosen_by_all(dims: str, shape: CallShape, keys: int, seed: int) -> Tensor:
    """A plan whose rows all choose the first member, and one of the last."""
    rng, members = np.random.default_rng(seed), -(-shape.k_len // keys)
    plan = np.sort(rng.integers(-1, members + 1, (*sizes(dims, shape), 2)), -1)
    plan[..., 0] = 0
    return torch.from_numpy(plan.astype(np.int32))


# Members' tokens, the plan's dimensions, clauses; rows and keys; heads; the head dimension.
CASES = {
    "group": (16, "b, g, q", "attend causal & p", (24, 110), (8, 1), 16),
    "heads": (16, "b, h, q", "attend causal & p - window(3)", (24, 110), (2, 2), 80),
    "every_batch": (16, "g, q", "attend p", (24, 110), (1, 1), 16),
    "several_tiles": (128, "b, h, q", "attend p", (24, 600), (1, 1), 16),
    "scaled_by_head": (16, "b, g, q", "scale 0.1 * (h + 1)\n attend causal & p", (24, 110), (8, 1), 16),
    "tokens": (1, "b, g, q", "attend causal & p", (32, 170), (2, 1), 16),
    "small_blocks": (4, "b, h, q/4", "attend p", (200, 200), (1, 1), 16),
    "lists_of_heads": (16, "b, h, q", "attend causal & p", (24, 110), (2, 1), 16),
    "one_row": (16, "b, h, q", "attend causal & p", (1, 90), (2, 2), 16),
}
# What heads that share keys choose for themselves is not cut, and one row makes no list long.
WHOLE = ("lists_of_heads", "one_row")


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, dims, clauses, lengths, heads, dim = CASES[name]
    made = spied(monkeypatch)
    shape = CallShape(1 + (name == "every_batch"), *heads, *lengths, dim, 24)
    text = f"attention planned {{ input p : {'tokens' if keys == 1 else f'blocks({keys})'}[{dims}]\n {clauses} }}"
    attend(text, shape, chosen_by_all(dims, shape, keys, seed=5), "triton", tiling=None)
    assert any(found.parts for found in made) == (name not in WHOLE)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[LongLists]:
    """How the lists of the calls that follow are cut."""
    made, own = [], LongLists.of

    def of(*given: Any) -> LongLists:
        made.append(own(*given))
        return made[-1]

    monkeypatch.setattr(LongLists, "of", of)
    return made
