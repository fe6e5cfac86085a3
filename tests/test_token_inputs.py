"""Inputs that a paged cache keeps with its tokens: rows read them, and pages go by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
import attndsl.serving
from tests.routing_rules import EXAMPLES

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
NATS = attndsl.compile(EXAMPLES / "nats.attn")
HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 4


def cache_of(attn: attndsl.Attention, on_device: bool, pages: int = 12, max_len: int = 64, **options: Any) -> Any:
    return attndsl.serving.PagedCache(
        attn, 2, KV_HEADS, DIM, pages=pages, max_len=max_len, page=PAGE, on_device=on_device, **options
    )


@pytest.mark.parametrize("on_device", [False, True])
def test_nats(on_device: bool) -> None:
    """Each key is seen up to a row of its own: rows are those of the whole, and what no head sees any more is given
    back, so that a pool of a third of all pages is enough."""
    generator, tokens = torch.Generator().manual_seed(0), 60
    q, k, v = (torch.randn(2, heads, tokens, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    place = torch.arange(tokens)
    until = place + torch.randint(0, 9, (2, HEADS, tokens), generator=generator)
    until[0, :, 8:12] = 1000  # Global tokens.
    expected = NATS.reference(q, k, v, until=until.int())
    cache, first = cache_of(NATS, on_device, at_tokens=["until"]), 0
    for new in (7, 1, 1, 5, 3, *[1] * 43):
        rows = slice(first, first + new)
        cache.append(k[:, :, rows], v[:, :, rows], until=until[..., rows])
        out, first = cache.decode(q[:, :, rows]), first + new
        torch.testing.assert_close(out.double(), expected[:, :, rows], rtol=1e-5, atol=1e-5)
        assert cache.pages_held <= 12 and not (on_device and cache.full.any())
        for b in range(2):
            # Given back before these tokens came: pages of which no key was seen by the first of their rows.
            before = first - new
            whole = until[b].amax(0)[: before // PAGE * PAGE].view(-1, PAGE).amax(1)
            held = cache.page_table[b, : before // PAGE] >= 0
            assert torch.equal(held, whole >= before)
    assert cache.pages_held < 2 * -(-first // PAGE) / 2 and cache.inputs["until"].shape == (2, HEADS, 64)
    assert cache.bytes > cache.k.nbytes + cache.v.nbytes + cache.inputs["until"].nbytes


def test_what_is_changed_in_place_decides() -> None:
    """A local token is seen until the next global one, which is not known when it comes."""
    cache = cache_of(NATS, on_device=False, at_tokens=("until",))
    k = torch.randn(2, KV_HEADS, 8, DIM)
    far = torch.full((2, HEADS, 8), 10_000, dtype=torch.int32)
    cache.append(k, k, until=far)
    cache.inputs["until"][:, :, :4] = 7
    one = slice(0, 1)
    cache.append(k[:, :, one], k[:, :, one], until=far[..., one])
    assert (cache.page_table[:, 0] == -1).all() and (cache.page_table[:, 1:3] >= 0).all()


def test_other_inputs_of_tokens() -> None:
    """What does not decide of keys alone is kept and read, and evicts nothing."""
    text = "attention d { input doc : int[b, k]  attend causal & document(doc) & window(9) }"
    attn, generator = attndsl.compile(text), torch.Generator().manual_seed(1)
    k, v, q = (torch.randn(2, n, 30, DIM, generator=generator) for n in (KV_HEADS, KV_HEADS, HEADS))
    doc = torch.randint(0, 3, (2, 30), generator=generator)
    cache = cache_of(attn, on_device=False, at_tokens=["doc"])
    for i in range(30):
        at = slice(i, i + 1)
        cache.append(k[:, :, at], v[:, :, at], doc=doc[:, at])
        out = cache.decode(q[:, :, at])
        torch.testing.assert_close(out.double(), attn.reference(q[:, :, : i + 1], k[:, :, : i + 1], v[:, :, : i + 1],
                                   doc=doc[:, : i + 1])[:, :, -1:], rtol=1e-5, atol=1e-5)  # fmt: skip
    assert cache.pages_held == 2 * 3, "nine tokens that end at the last one lie in three pages"


def test_some_sequences_and_a_full_pool() -> None:
    """Sequences of their own lengths; where the device keeps the books, what does not fit is written nowhere."""
    cache = cache_of(NATS, on_device=False, at_tokens=["until"])
    k, until = torch.randn(1, KV_HEADS, 6, DIM), torch.full((1, HEADS, 6), 99, dtype=torch.int32)
    cache.append(k, k, sequences=[1], until=until)
    assert cache.inputs["until"][1, :, :6].eq(99).all() and not cache.inputs["until"][0].any()
    full = cache_of(NATS, on_device=True, pages=3, max_len=12, at_tokens=["until"])
    for n in (8, 8):
        some = torch.randn(2, KV_HEADS, n, DIM)
        full.append(some, some, until=torch.full((2, HEADS, n), n, dtype=torch.int32))
    assert full.full.all() and full.lengths[0] == 8
    assert full.inputs["until"][0, :, :8].eq(8).all() and not full.inputs["until"][0, :, 8:].any()


def test_wrong_inputs() -> None:
    k = torch.randn(2, KV_HEADS, 2, DIM)
    for names in (["until", "nothing"], ["nothing"]):
        with pytest.raises(attndsl.PatternError, match="is not kept with tokens"):
            cache_of(NATS, on_device=False, at_tokens=names)
    tree = attndsl.compile("attention t { input near : bool[b, q, 8]  attend { near[q, k - Nk + 8] } }")
    with pytest.raises(attndsl.PatternError, match="A568"):
        cache_of(tree, on_device=False, at_tokens=["near"])
    cache = cache_of(NATS, on_device=False, at_tokens=["until"])
    until = torch.zeros(2, HEADS, 2, dtype=torch.int32)
    wrong: list[dict[str, Tensor]] = [{}, {"until": until[..., :1]}, {"until": until[:1]}, {"until": until, "x": until}]
    for given in wrong:
        with pytest.raises(attndsl.PatternError, match="append was given"):
            cache.append(k, k, **given)
    cache.append(k, k, until=until)
    with pytest.raises(attndsl.PatternError, match="A568"):
        cache.append(k, k, until=until[:, :1])
    assert cache.lengths == [2, 2] and np.array_equal(cache.seq_lens.numpy(), [2, 2])
    # Where it keeps none, it takes none: neither an input of the program nor what is none.
    bare = cache_of(NATS, on_device=False, pages=32)
    for name in ("until", "x"):
        with pytest.raises(attndsl.PatternError, match="append was given"):
            bare.append(k, k, **{name: until})
    assert bare.lengths == [0, 0] and not bare.inputs
