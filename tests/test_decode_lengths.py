"""Decode within `lengths`: one program for padded prompts and for caches. Of a sequence the tokens before min(n[b],
seq_len) are present, and each row is that of a padded call on the sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
import attndsl.serving
from attndsl.diagnostics import PatternError
from tests.decoding import paged
from tests.gpu import interprets
from tests.test_rank import both

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
CAPACITY = 48
# All of a sequence, what pads it before, among and after the last rows, and more than there is.
LENGTHS, PRESENT = [40, 23, 30, 33, 9, 17], [40, 29, 21, 32, 0, 15]
SUMMARY = "x = attend causal over pool(mean, 4)\n"
BODIES = {
    "entries": "attend causal over pool(mean, 6, 4)",
    "some token": "attend all over pool(max, 5, visible = any)",
    "counted": "attend all over pool(mean, 5, counted), causal & window(4)",
    "data of tokens": "input keep : bool[b, k]\n attend causal & { keep[k] } over pool(sum, 3)",
    "pooled queries": "attend { k // 4 != q // 4 } over pool(max, 3) from pool(mean, 4)",
    "blocks": "attend causal & top(2, blocks(8), among = causal, by = dot(Q, mean(K)), always = same_block(8))",
    "tokens": "attend top(5, tokens, share = group, among = all, by = dot(Q, K))",
    "bounds": "attend causal & top(1, blocks(3), share = group, among = causal, by = bound(Q, min(K), max(K)))",
    "last keys": "attend top(fraction(0.4), blocks(4), among = all, by = dot(Q, last(K)))",
    "rows": "attend top(2, blocks(4), per = rows(8), among = all, by = dot(mean(Q), max(K)))",
    "antidiagonals": "attend cover(0.6, blocks(8), per = rows(8), among = causal, by = antidiagonal(Q, K, 4))",
    "masses": SUMMARY + "y = attend causal & top(2, blocks(8), share = group, by = probs(x), always = same_block(8))\n"
    "output x * Nk + y",
    "overlapping masses": "x = attend all over pool(mean, 4, 2)\n"
    "y = attend top(2, blocks(3), among = all, by = probs(x, max))\n output merge(x, y)",
    "left out": "plan sel = top(2, blocks(4), among = causal, by = dot(Q, mean(K)))\n"
    "attend sel, causal - sel over pool(mean, 4, counted)",
    "tiles over entries": "axes y, u[4]\n plan sel = top(2, tiles(2, 2), among = all, by = dot(Q, mean(K)))\n"
    "attend causal - sel, sel over pool(max, 3, visible = any)",
    "segments": "input ids : int[b, k]\n x = attend all over pool(mean, 4, 2)\n"
    "y = attend top(2, segments(ids), among = all, by = probs(x))\n output x + y",
    "placed": "input places : int[b, k]\n"
    "attend causal & top(2, blocks(4) on permuted(places), share = group, among = causal, by = dot(Q, max(K)))",
    "pools of segments": "input ids : int[b, k]\n "
    "attend causal & window(3), all over pool(mean, segments(ids), counted)",
    "two levels": "x = attend all over pool(mean, 6, 3)\n y = attend causal within blocks(8) with probs(x)\n output y",
}


def check(body: str, rows: int, page: int | None, dtype: torch.dtype, backend: str) -> None:
    """Against the oracle of a padded call, with views handed in and without."""
    attn = attndsl.compile(f"attention a {{ input n : int[b]\n lengths n\n {body} }}")
    generator = torch.Generator().manual_seed(rows)
    batch, lengths = len(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)
    q, k, v = (
        torch.randn(batch, heads, tokens, 16, generator=generator, dtype=dtype)
        for heads, tokens in ((4, rows), (2, CAPACITY), (2, CAPACITY))
    )
    given: dict[str, Any] = {"n": torch.tensor(PRESENT)}
    drawn = torch.rand(batch, CAPACITY, generator=generator)
    told = {"keep": drawn < 0.7, "ids": torch.cumsum(drawn < 0.3, -1) % 3, "places": drawn.argsort(-1)}
    given |= {name: x for name, x in told.items() if f"input {name} :" in body}
    for b, length in enumerate(LENGTHS):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    kept, values, table = (k, v, None) if page is None else paged(k, v, page)
    cache = (kept, values, lengths, table)
    bound = 1e-9 if dtype == torch.float64 else 2e-4
    for views in (None, attn.views(*cache, n=given["n"])):
        out = attn.decode(q, *cache, views=views, backend=backend, **given)
        for b, length in enumerate(LENGTHS):
            own = {name: x[b : b + 1, :length] if x.dim() > 1 else x[b : b + 1] for name, x in given.items()}
            before = max(0, rows - length)
            call = (x[b : b + 1].double() for x in (q[:, :, before:], k[:, :, :length], v[:, :, :length]))
            exact = attn.reference(*call, **own)
            torch.testing.assert_close(out[b : b + 1, :, before:].double(), exact, atol=bound, rtol=bound)
            assert not out[b, :, :before].any()


@pytest.mark.parametrize("name", BODIES)
def test_on_the_cpu(name: str) -> None:
    for rows, page in ((1, 8), (5, None), (12, 16)):
        check(BODIES[name], rows, page, torch.float64, "cpu")


@interprets
@pytest.mark.parametrize("name", ["some token", "blocks", "masses"])
def test_in_triton(name: str) -> None:
    check(BODIES[name], 3, 8, torch.float32, "triton")


@pytest.mark.parametrize("choice", [
    "top(3, blocks(8), among = causal, by = dot(Q, mean(K)), always = same_block(8), share = group)",
    "top(9, tokens, share = group, among = causal, by = dot(Q, K))",
])  # fmt: skip
@interprets
def test_kernels_choose_what_strips_choose(choice: str) -> None:
    text = f"attention t {{ input n : int[b] lengths n plan sel = {choice} attend causal & sel }}"
    found = both(text, (4, 2), 2, [96, 61, 50, 30], n=torch.tensor([96, 60, 17, 200]))
    # What rows that are present choose; others have no candidates.
    assert (found[1, :, 1] < 0).all() and (found[2] < 0).all() and (found[3] >= 0).any()


def test_views_are_kept_of_present_tokens() -> None:
    """Chunks of padded prompts, each prompt's end among those of one chunk."""
    attn = attndsl.compile(f"attention a {{ input n : int[b]\n lengths n\n {BODIES['left out']} }}")
    q, k, v = (torch.randn(2, 2, 32, 16, dtype=torch.float64) for _ in range(3))
    n, lengths = torch.tensor([13, 32]), torch.zeros(2, dtype=torch.int32)
    views, found = attn.views(k, v, lengths, n=n), list[Tensor]()
    for low in range(0, 32, 8):
        lengths += 8
        attndsl.serving.update_views(attn, views, k, v, lengths, new=8, n=n)
        found.append(attn.decode(q[:, :, low : low + 8], k, v, lengths, views=views, n=n))
    torch.testing.assert_close(torch.cat(found, 2), attn.reference(q, k, v, n=n))


def test_what_says_how_many_are_present_is_asked_for() -> None:
    attn = attndsl.compile("attention a { input n : int[b]\n lengths n\n attend causal over pool(mean, 4) }")
    x, lengths = torch.randn(2, 1, 8, 8), torch.tensor([8, 3], dtype=torch.int32)
    with pytest.raises(PatternError, match="A522"):
        attn.views(x, x, lengths)
    with pytest.raises(PatternError, match="A513"):
        attn.views(x, x, lengths, n=torch.tensor([8, 8, 8]))
    with pytest.raises(PatternError, match="A511"):
        attndsl.serving.update_views(attn, attn.views(x, x, lengths, n=lengths), x, x, lengths, n=torch.ones(2))
    with pytest.raises(PatternError, match="A911"):
        attndsl.serving.PagedCache(attn, batch=1, kv_heads=1, head_dim=8, pages=4, max_len=64)
