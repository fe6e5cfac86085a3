"""Decode of `skip below t`: each head of a call drops the tiles that the oracle drops of its sequence's rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attndsl
from attndsl.decode import Cache, decode_plan, split_count
from attndsl.plan import DType, Spec
from tests.accuracy import examples
from tests.decoding import paged
from tests.routing_rules import EXAMPLES
from tests.test_skip import PATTERNS, SCORED, dropped, peaked

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
LENGTHS = [333, 40, 0, 250]
# How near to the bound a decision may be that rounding could turn, and what outputs may differ by.
CLEAR = {"cpu": 1e-9, "triton": 1e-3}
TOLERANCE = {"cpu": 1e-10, "triton": 2e-5}


class Call:
    """Last rows of sequences whose caches hold NaN past their ends."""

    def __init__(
        self, pattern: str, below: float, lengths: list[int], heads: tuple[int, int], rows: int, backend: str,
        seed: int = 0, dim: int = 16,
    ) -> None:  # fmt: skip
        self.attn = attndsl.compile(f"attention a {{ attend {pattern} skip below {below} }}")
        self.below, self.lengths, self.backend = below, lengths, backend
        dtype = torch.float64 if backend == "cpu" else torch.float32
        q, k, v = (x.to(dtype) for x in peaked(len(lengths), *heads, rows, 336, dim, seed))
        for b, length in enumerate(lengths):
            k[b, :, length:] = v[b, :, length:] = float("nan")
        self.q, self.k, self.v, self.seq_lens = q, k, v, torch.tensor(lengths, dtype=torch.int32)

    def decoded(self, page: int | None) -> tuple[Tensor, Tensor]:
        k, v, table = (self.k, self.v, None) if page is None else paged(self.k, self.v, page)
        asked: Any = {"return_lse": True, "backend": self.backend}
        out, lse = self.attn.decode(self.q, k, v, self.seq_lens, table, **asked)
        return out, lse

    def check(self, page: int | None) -> float:
        """The largest share of tiles that a sequence drops. Sequences with a decision that rounding may turn are left
        out."""
        found, most = self.decoded(page), 0.0
        for b, length in enumerate(self.lengths):
            before = max(0, self.q.shape[2] - length)
            assert not found[0][b, :, :before].any() and (found[1][b, :, :before] == -torch.inf).all()
            if length == 0:
                continue
            q, k, v = self.q[b : b + 1, :, before:], self.k[b : b + 1, :, :length], self.v[b : b + 1, :, :length]
            q, k, v = q.double(), k.double(), v.double()
            share, nearest = dropped(self.attn, q, k, self.below)
            if nearest < CLEAR[self.backend]:
                continue
            most = max(most, share)
            for x, y in zip(found, self.attn.reference(q, k, v, return_lse=True), strict=True):
                tolerance = TOLERANCE[self.backend]
                torch.testing.assert_close(x[b, :, before:].double(), y[0], rtol=tolerance, atol=tolerance)
        return most


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("pattern", [*PATTERNS, "band(300, 9)"])
def test_each_head_drops_for_itself(pattern: str, backend: str) -> None:
    """Heads that share a tile of queries, with padding; rows before the first token, which have no say."""
    shares = []
    for number, (heads, rows) in enumerate([((4, 2), 1), ((6, 1), 20), ((3, 1), 3), ((1, 1), 64)]):
        page, below = (None, 16, 128)[number % 3], (0.2, 0.01)[number % 2]
        shares.append(Call(pattern, below, LENGTHS, heads, rows, backend, number).check(page))
    assert max(shares) > 0, "some tile is dropped"


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_more_rows_than_a_tile(backend: str) -> None:
    """Rows of the call are counted from its first."""
    assert Call("causal", 0.1, [333, 150], (2, 1), 100, backend, dim=80).check(None) > 0


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_scores_sinks_documents_and_branches(backend: str) -> None:
    attn, lengths = attndsl.compile(SCORED), [150, 97]
    dtype = torch.float64 if backend == "cpu" else torch.float32
    q, k, v = (x.to(dtype) for x in peaked(2, 2, 1, 3, 160, 16))
    doc = (torch.arange(160) // torch.tensor([[140], [60]])).int()
    sinks = torch.tensor([0.5, -1.0], dtype=dtype)
    asked: Any = {"sinks": sinks, "doc": doc, "backend": backend}
    out = attn.decode(q, k, v, torch.tensor(lengths, dtype=torch.int32), **asked)
    for b, length in enumerate(lengths):
        alone = (x[b : b + 1].double() for x in (q, k[:, :, :length], v[:, :, :length]))
        right = attn.reference(*alone, sinks=sinks, doc=doc[b : b + 1, :length])
        tolerance = TOLERANCE[backend]
        torch.testing.assert_close(out[b].double(), right[0], atol=tolerance, rtol=tolerance)


@given(
    st.sampled_from([*PATTERNS, "band(300, 9)", "causal & window(90)"]), st.sampled_from([0.5, 0.1, 1e-3, 1e-6]),
    st.lists(st.integers(0, 336), min_size=1, max_size=2), st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    st.integers(1, 64), st.sampled_from([None, 8, 64]), st.integers(0, 1000),
)  # fmt: skip
@examples(20)
def test_random(
    pattern: str, below: float, lengths: list[int], heads: tuple[int, int], rows: int, page: int | None, seed: int
) -> None:
    Call(pattern, below, lengths, heads, rows, "cpu", seed, 8).check(page)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_blasst(backend: str) -> None:
    """What is dropped of published scores is near nothing."""
    q, k, v = (x.float() for x in peaked(1, 2, 1, 1, 200, 16))
    lengths = torch.tensor([200], dtype=torch.int32)
    out = attndsl.compile(EXAMPLES / "blasst.attn").decode(q, k, v, lengths, backend=backend)
    torch.testing.assert_close(out, attndsl.compile("causal")(q, k, v), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_hostile_lengths_and_tables(backend: str) -> None:
    of = Call("causal", 0.1, [336, 0, 0], (2, 1), 2, backend)
    k, v = of.k.nan_to_num(), of.v.nan_to_num()
    wild = torch.tensor([2**31 - 1, -5, -(2**31)], dtype=torch.int32)
    outs = [of.attn.decode(of.q, k, v, lengths, backend=backend) for lengths in (wild, of.seq_lens)]
    assert torch.equal(*outs) and not outs[0][1:].any()
    keys, values, table = paged(k, v, 16)
    table[0, ::2], table[1], table[2, 1] = -1, 2**31 - 1, -(2**31)
    out = of.attn.decode(of.q, keys.nan_to_num(), values.nan_to_num(), of.seq_lens, table, backend=backend)
    assert out.isfinite().all()


def test_keys_are_gone_over_in_order() -> None:
    """By one program, in tiles of the language's size, the heads of a key head beside each other."""
    program = attndsl.compile("attention a { attend causal skip below 0.01 }").program
    spec = Spec(8, 2, 128, 128, DType.BFLOAT16, "cuda:90")
    for rows, tile in ((1, 16), (8, 32), (64, 64), (65, 64)):
        plan = decode_plan(program, spec, rows, Cache(16))
        assert (plan.tiling.block_k, plan.tiling.block_q * plan.pack, plan.split) == (64, tile, False)
        assert split_count(plan, 4, rows, 1 << 20, 132) == 1
        assert plan.runs.full == ()
