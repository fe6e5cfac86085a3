"""The books of a pool that the device keeps: the same pages as the host's, in a step that asks the device nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
import attndsl.serving
from tests.test_keep import POOLED, ROUTED, NoQuestions

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
STREAMING = attndsl.compile("causal & (window(9) | sink(3))")


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cache_of(attn: attndsl.Attention, on_device: bool, pages: int = 30, max_len: int = 60) -> Any:
    return attndsl.serving.PagedCache(
        attn, 3, 2, 16, pages=pages, page=4, max_len=max_len, dtype=torch.float64, on_device=on_device
    )


@pytest.mark.parametrize("attn", [STREAMING, POOLED, ROUTED], ids=["streaming", "pooled", "routed"])
def test_as_the_host_keeps_them(attn: attndsl.Attention) -> None:
    """Sequences that come and go, some tokens at a time; no page belongs to two, and what is free is counted."""
    pages = 45
    host, device = (cache_of(attn, on_device, pages) for on_device in (False, True))
    for step in range(14):
        chosen = None if step % 3 else [step % 2, 2]
        new = (1, 5, 2, 0, 4)[step % 5]
        batch = 3 if chosen is None else len(chosen)
        k, v, q = (
            draw(batch, 2, new, 16, seed=step),
            draw(batch, 2, new, 16, seed=50 + step),
            draw(3, 4, 1, 16, seed=step),
        )
        for cache in (host, device):
            cache.append(k, v, chosen)
            if step == 8:
                cache.release(1)
        assert host.lengths == device.lengths
        assert host.pages_held == device.pages_held == int((device.page_table >= 0).sum())
        assert torch.equal(host.page_table >= 0, device.page_table >= 0)
        held = device.page_table[device.page_table >= 0]
        free = device._books.free[: int(device._books.count)]
        assert sorted([*held.tolist(), *free.tolist()]) == list(range(pages))
        torch.testing.assert_close(device.decode(q), host.decode(q))
    assert not device.full.any()


def test_a_step_asks_nothing_of_the_device() -> None:
    mode: Any = NoQuestions
    for attn in (STREAMING, POOLED, ROUTED):
        cache = cache_of(attn, on_device=True)
        for step in range(3):
            k = draw(3, 2, 1 + 2 * step, 16, seed=step)
            with mode():
                cache.append(k, k)
        assert cache.lengths == [9] * 3
    with pytest.raises(AssertionError), mode():
        cache.lengths  # noqa: B018


def test_what_does_not_fit_is_marked() -> None:
    """One sequence after another gets pages, until there are none; what holds some keeps them, and is attended to."""
    attn = attndsl.compile("causal")
    cache = cache_of(attn, on_device=True, pages=15)
    first = draw(3, 2, 18, 16, seed=0)
    cache.append(first, first)
    assert cache.full.tolist() == [False] * 3 and cache.pages_held == 15
    more = draw(3, 2, 3, 16, seed=1)
    cache.append(more, more)
    assert cache.full.tolist() == [True] * 3 and cache.lengths == [18] * 3
    q = draw(3, 4, 1, 16, seed=2)
    torch.testing.assert_close(cache.decode(q), attn.reference(q, first, first))
    cache.release(1)
    cache.append(more[:1], more[:1], [1])
    assert cache.full.tolist() == [True, False, True] and cache.lengths == [18, 3, 18]
    torch.testing.assert_close(cache.decode(q)[1:2], attn.reference(q[1:2], more[:1], more[:1]))
    # What takes no more leaves the pool to the others.
    rest = draw(3, 2, 14, 16, seed=3)
    cache.append(rest, rest)
    assert cache.full.tolist() == [True, False, True] and cache.lengths == [18, 17, 18]
    # Nor does a sequence pass its table.
    short = cache_of(STREAMING, on_device=True, max_len=18)
    for step in range(3):
        short.append(first[:, :, :8], first[:, :, :8])
        assert short.full.tolist() == [step == 2] * 3
    assert short.lengths == [16] * 3
