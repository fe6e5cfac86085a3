"""Decode over pools of segments: the entries of each sequence are those of its own tokens, whatever lies past them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attndsl
import attndsl.serving
from tests.test_decode_views import Sequences, with_lse
from tests.test_segment_views import BODIES, compiled, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
CAPACITY = 44
LENGTHS = [37, 44, 2, 0]


def sequences(body: str, rows: int, dtype: torch.dtype = torch.float64, lengths: list[int] = LENGTHS) -> Sequences:
    attn = compiled(body)
    of = Sequences(attn, lengths, rows, dtype, capacity=CAPACITY)
    made = inputs_of(attn, (len(lengths), 4, 2, rows, CAPACITY, 16, 24), dtype, seed=rows)
    of.inputs |= {name: x.detach() for name, x in made.items()}
    return of


@pytest.mark.parametrize("body", BODIES)
def test_cpu(body: str) -> None:
    for rows, page in ((1, None), (5, 4)):
        of = sequences(body, rows)
        of.check_both(of.attn.decode(of.q, *of.cache(page), return_lse=with_lse(of.attn), **of.inputs))


@pytest.mark.parametrize("number", [0, 1, 4, 9])
def test_triton(number: int) -> None:
    of = sequences(BODIES[number], 3, torch.float32, [37, 2])
    given: Any = {"return_lse": with_lse(of.attn), "backend": "triton", **of.inputs}
    of.check_both(of.attn.decode(of.q, *of.cache(4), **given), 2e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_segment_that_goes_on_past_a_sequence_ends_with_it(rows: int) -> None:
    """Ids of tokens that are not there may be those of the last ones, or anything; nor does what the cache holds there
    show."""
    of = sequences("attend all over pool(mean, segments(own), counted)", rows)
    of.inputs["own"] = torch.zeros(CAPACITY, dtype=torch.int32)
    of.check_both(of.attn.decode(of.q, *of.cache(None), return_lse=True, **of.inputs))


def test_a_page_that_does_not_exist_is_not_read() -> None:
    of = sequences(BODIES[2], 2)
    k, v, lengths, table = of.cache(4)
    assert table is not None
    table[0, ::2], table[1], table[2, 1:] = -1, 2**31 - 1, -(2**31)
    out = of.attn.decode(of.q, k.nan_to_num(), v.nan_to_num(), lengths, table, **of.inputs)
    assert out.isfinite().all()
    wild = torch.tensor([2**31 - 1, -5, -(2**31), 3], dtype=torch.int32)
    k, v = of.k.nan_to_num(), of.v.nan_to_num()
    outs = [of.attn.decode(of.q, k, v, x, **of.inputs) for x in (wild, wild.clamp(0, CAPACITY))]
    assert torch.equal(*outs)


def test_eight_bits_and_a_paged_cache() -> None:
    of = sequences(BODIES[2], 2, torch.float32)
    (k, v), pages, scales = of.of_eight_bits(4)
    wanted = of.attn.decode(of.q, k, v, of.seq_lens, **of.inputs)
    out = of.attn.decode(of.q, *pages, **(scales | of.inputs))
    torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)

    cache = attndsl.serving.PagedCache(of.attn, 4, 2, 16, v_dim=24, pages=44, max_len=CAPACITY, page=4)
    cache.append(k[:, :, :37], v[:, :, :37])
    assert cache.views is None, "nothing is kept of segments"
    out = cache.decode(of.q, **of.inputs)
    alone = of.attn.decode(of.q, k, v, torch.full((4,), 37, dtype=torch.int32), **of.inputs)
    torch.testing.assert_close(out, alone, rtol=2e-5, atol=2e-5)


def test_what_each_step_makes_of_all_tokens_forgets_none() -> None:
    chosen = "top(1, segments(ids), among = causal & window(4), by = dot(Q, mean(K)))"
    for body in (BODIES[2], f"attend causal & {chosen}"):
        attn = compiled(body)
        assert attn.evictable(40, 4) == []
        cache = attndsl.serving.PagedCache(attn, 1, 2, 16, pages=11, max_len=CAPACITY, page=4)
        for _ in range(40):
            cache.append(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16))
        assert cache.pages_held == 10
    # Entries that are kept, and blocks in a row, need theirs no more.
    near = "attention a { attend causal & window(4), causal over pool(mean, 4) }"
    assert attndsl.compile(near).evictable(40, 4) == list(range(9))
