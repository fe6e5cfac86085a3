"""What may be forgotten: against the oracle's masks of all later rows, and a cache that forgets it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

import attndsl
import attndsl.serving
from attndsl import oracle
from attndsl.eviction import retention
from attndsl.program import CallShape
from tests.accuracy import examples
from tests.strategies import Case, composed_programs

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
STREAMING = "causal & (window(20) | sink(3))"


@given(case=composed_programs(lengths=(24, 33), scores=False), page=st.sampled_from((1, 4)), tokens=st.integers(0, 33))
@examples(15)
def test_what_is_evictable_is_not_read(case: Case, page: int, tokens: int) -> None:
    """No row from `tokens` on, of the case's own length, reads an evictable page."""
    program, shape = case.load(), case.shape
    if program.align_start:
        reject()
    whole = CallShape(shape.batch, shape.heads, shape.kv_heads, shape.k_len, shape.k_len, 8, 8)
    rows_of = {d for decl in program.inputs for d in decl.dims if d.axis.value == "q" and d.block == 1}
    if rows_of and shape.rows != shape.k_len:
        reject()  # Its rows are given for a part of the positions.
    kept = retention(program, page)
    mask = oracle.mask(program, whole, case.inputs, case.args)
    read = np.asarray(mask[:, :, tokens:].any((0, 1, 2)))
    pages = np.arange(-(-shape.k_len // page))
    for i in pages[kept.evictable(tokens, pages)]:
        assert (i + 1) * page <= tokens
        assert not read[i * page : (i + 1) * page].any()


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("causal", range(100)),
        ("causal & window(10)", range(91, 100)),
        ("causal & (window(10) | sink(4))", [*range(4), *range(91, 100)]),
        # A column comes back 16 rows later, and again.
        ("causal & dilated(16)", range(100)),
        ("causal & dilated(16) & window(33)", range(68, 100)),
        ("{ q - k == 40 }", range(60, 100)),
        ("causal & same_block(32)", range(96, 100)),
        ("causal & (strided(25) | window(3))", [0, 25, 50, 75, 98, 99]),
        ("{ k <= q and (k < Nk // 4 or q - k < 3) }", range(100)),
        ("none", ()),
    ],
)
def test_evictable(text: str, needed: range | list[int]) -> None:
    assert attndsl.compile(text).evictable(100) == sorted(set(range(100)) - set(needed))


def test_evictable_with_what_is_known() -> None:
    local = attndsl.compile("attention a(span : runtime int) { attend causal & window(span) }")
    assert local.evictable(100, 4) == []
    assert local.evictable(100, 4, span=10) == list(range(22))
    duo = attndsl.compile(
        "attention duo { input full : bool[g]  attend causal & (if full[g] then all else window(10)) }"
    )
    assert duo.evictable(100, 4) == []
    assert duo.evictable(100, 4, full=np.array([False, True])) == []
    assert duo.evictable(100, 4, full=np.array([False, False])) == list(range(22))
    spans = attndsl.compile("attention a(span : int[h]) { attend causal & window(span[h]) }", span=[5, 30])
    assert spans.evictable(100, 4) == list(range(17))
    documents = attndsl.compile("attention a { input doc : int[b, k]  attend causal & document(doc) & window(10) }")
    assert documents.evictable(100, 4) == list(range(22))


# ----------------------------------------------------------------------------------------- the pool


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_cache_that_forgets(dtype: torch.dtype) -> None:
    """Generation token by token, after a prompt in chunks, equals attention to everything; memory stays flat."""
    torch.manual_seed(0)
    attn = attndsl.compile(STREAMING)
    cache = attndsl.serving.PagedCache(
        attn, batch=2, kv_heads=1, head_dim=8, pages=16, page=4, max_len=80, dtype=dtype, bounds=True
    )
    size = cache.bytes
    k, v = draw(2, 1, 65, 8).to(dtype), draw(2, 1, 65, 8).to(dtype)
    at = 0
    for step in (7, 1, 12, *[1] * 45):
        rows = slice(at, at + step)
        at += step
        q = draw(2, 2, step, 8)
        cache.append(k[:, :, rows], v[:, :, rows])
        out = cache.decode(q)
        if at % 11 < 2 or step > 1:
            exact = attn.reference(q, k[:, :, :at].float(), v[:, :, :at].float())
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert cache.lengths == [65, 65] == cache.seq_lens.tolist()
    assert cache.pages_held <= 2 * 7 and cache.bytes == size
    # The bounds of a page are those of its keys.
    assert cache.k_min is not None and cache.k_max is not None
    for b in range(2):
        for place in (0, 15, 16):
            page = int(cache.page_table[b, place])
            keys = k[b, 0, 4 * place : 4 * place + 4].float()
            assert torch.equal(cache.k_min[page, 0].float(), keys.amin(0))
            assert torch.equal(cache.k_max[page, 0].float(), keys.amax(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_pages_by_their_bounds(dtype: torch.dtype) -> None:
    """A page that was given back and taken again has the bounds of its new keys; the best pages are found by them."""
    torch.manual_seed(0)
    attn = attndsl.compile("causal")
    cache = attndsl.serving.PagedCache(
        attn, batch=2, kv_heads=1, head_dim=8, pages=12, page=4, max_len=32, dtype=dtype, bounds=True
    )
    cache.append(draw(2, 1, 20, 8), draw(2, 1, 20, 8))
    cache.release(1)
    keys = draw(1, 1, 18, 8).to(dtype)
    cache.append(keys, keys, sequences=[1])
    q = draw(2, 2, 1, 8)
    found = cache.top(q, 2, recent=1)
    assert found.shape == (2, 1, 1, 2) and found[1, 0, 0, 1] == 4, "the last page comes first"
    parts = torch.split(keys[0, 0].float(), 4)
    most = torch.stack([torch.maximum(q[1, :, 0] * x.amin(0), q[1, :, 0] * x.amax(0)).sum() for x in parts])
    assert found[1, 0, 0, 0] == most[:4].argmax()
    assert cache.top(q, 3, shared=False).shape == (2, 2, 1, 3)
    plain = attndsl.serving.PagedCache(attn, batch=1, kv_heads=1, head_dim=8, pages=2, page=4, max_len=8)
    with pytest.raises(attndsl.PatternError, match="keeps no bounds"):
        plain.top(q[:1], 1)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("causal & dilated(16)", 256),
        ("causal & (strided(64) | window(9))", 65),
        ("causal & (window(90) | sink(3))", None),
    ],
)
def test_columns_that_come_back_are_refused(text: str, needed: int | None) -> None:
    """In a pool that cannot hold what the pattern keeps of one sequence."""

    def make() -> attndsl.serving.PagedCache:
        return attndsl.serving.PagedCache(
            attndsl.compile(text), batch=1, kv_heads=1, head_dim=8, pages=8, page=16, max_len=4096
        )

    if needed is None:
        make()
        return
    with pytest.raises(attndsl.PatternError, match=f"{needed} pages of a sequence of 4096 tokens may be read again"):
        make()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_refused_append_changes_nothing(on_device: bool) -> None:
    """Sizes that would broadcast, or that torch would refuse too late, and sequences that are not there."""
    attn = attndsl.compile("causal")
    cache = attndsl.serving.PagedCache(
        attn, batch=2, kv_heads=2, head_dim=8, v_dim=16, pages=9, page=4, max_len=16, on_device=on_device
    )
    cache.append(draw(2, 2, 3, 8), draw(2, 2, 3, 16))
    before, held = (
        (cache.k.clone(), cache.v.clone(), cache.page_table.clone(), cache.seq_lens.clone()),
        cache.pages_held,
    )
    wrong = [(1, 2, 3, 8), (2, 1, 3, 8), (2, 3, 3, 8), (2, 2, 4, 8), (2, 2, 3, 1), (2, 3, 8)]
    for size in wrong:
        with pytest.raises(attndsl.PatternError, match="A504"):
            cache.append(draw(*size), draw(2, 2, 3, 16))
    for size in ((1, 2, 3, 16), (2, 2, 1, 16), (2, 2, 3, 8), (3, 16)):
        with pytest.raises(attndsl.PatternError, match="A504"):
            cache.append(draw(2, 2, 3, 8), draw(*size))
    for sequences in ([0, 0], [0, 2], [-1, 0]):
        with pytest.raises(attndsl.PatternError, match="A557"):
            cache.append(draw(2, 2, 3, 8), draw(2, 2, 3, 16), sequences=sequences)
    with pytest.raises(attndsl.PatternError, match="A557"):
        cache.release(2)
    cache.append(draw(0, 2, 3, 8), draw(0, 2, 3, 16), sequences=[])
    after = cache.k, cache.v, cache.page_table, cache.seq_lens
    assert cache.pages_held == held and all(map(torch.equal, before, after)) and cache.lengths == [3, 3]


def test_sequences_come_and_go() -> None:
    attn = attndsl.compile("causal")
    cache = attndsl.serving.PagedCache(attn, batch=3, kv_heads=1, head_dim=8, pages=6, page=4, max_len=16)
    k = draw(3, 1, 5, 8)
    cache.append(k[:2], k[:2], sequences=[2, 0])
    assert cache.lengths == [5, 0, 5] and cache.pages_held == 4
    q = draw(3, 1, 1, 8)
    out = cache.decode(q)
    assert not out[1].any()
    torch.testing.assert_close(out[2:].double(), attn.reference(q[2:], k[:1], k[:1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(attndsl.PatternError, match="3 more pages are needed and 2 of 6 are free") as caught:
        cache.append(draw(1, 1, 9, 8), draw(1, 1, 9, 8), sequences=[1])
    assert caught.value.diagnostics[0].code == "A557"
    assert cache.lengths == [5, 0, 5]
    cache.release(2)
    cache.append(draw(1, 1, 9, 8), draw(1, 1, 9, 8), sequences=[1])
    assert cache.lengths == [5, 9, 0] and cache.pages_held == 5
    with pytest.raises(attndsl.PatternError, match="passes max_len = 16"):
        cache.append(draw(1, 1, 8, 8), draw(1, 1, 8, 8), sequences=[1])


def test_a_million_tokens_in_constant_memory() -> None:
    """What is held after 2^20 tokens is what was held after 2^10: the sets hold for every length."""
    kept = attndsl.compile("causal & (window(1024) | sink(64))").retention(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tokens in (1 << 14, 1 << 20, (1 << 20) + 7):
            pages = np.arange(-(-tokens // 16))
            assert (~kept.evictable(tokens, pages)).sum() in (4 + 64, 4 + 65)


# ---------------------------------------------------------------------- what inputs hold at keys

AT_KEYS = {
    "nats": "input until : int[b, h, k]  attend causal & { q <= until[k] }",
    "one head": "input until : int[k]  attend causal & ({ q <= until[k] } | sink(2))",
    "two": "input until : int[b, h, k]  input kind : int[b, k]  attend causal & { q <= until[k] and kind[k] == 1 }",
    "windows": "input reach : int[b, k]  attend causal & { q - k < reach[k] } & window(20)",
    "not": "input until : int[g, k]  attend causal - { q > until[k] + k % 3 }",
    "elsewhere": "input until : int[b, k]  attend causal & coarsen({ q <= until[k] }, 4, any)",
}


@pytest.mark.parametrize("name", AT_KEYS)
def test_inputs_at_keys_decide(name: str) -> None:
    """By the oracle's mask of a longer sequence: what is evictable no later row sees, and what no row of a much longer
    one sees is evictable, page by page."""
    attn, rng, n, far = attndsl.compile(f"attention a {{ {AT_KEYS[name]} }}"), np.random.default_rng(5), 33, 90
    sizes = {"b": 2, "h": 4, "g": 2, "k": far}
    arrays: dict[str, Any] = {}
    for decl in attn.program.inputs:
        shape = [sizes[dim.axis.value] for dim in decl.dims]
        high = {"until": 60, "kind": 2, "reach": 9}[decl.name]
        arrays[decl.name] = rng.integers(0, high, shape)
    masks = [attn.mask(far, far, 4, 2, batch=b, **arrays) for b in range(2 if "b" in AT_KEYS[name] else 1)]
    for page in (1, 4):
        for tokens in (n, 8, 0):
            seen = np.any([mask[:, tokens:].any((0, 1)) for mask in masks], 0)[:tokens]
            whole = tokens // page
            unseen = np.flatnonzero(~seen[: whole * page].reshape(whole, page).any(1)).tolist() if whole else []
            found = attn.evictable(tokens, page, **arrays)
            assert set(found) <= set(unseen)
            if name != "elsewhere":
                assert found == unseen
    assert attn.evictable(n, 1) == ([] if name != "windows" else list(range(n - 19))), "unknown, all may be read"
