"""`skip below t`: which tiles are dropped, against a rule in numpy, and the kernels against the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attndsl
from attndsl.runtime.reference_skip import left_by_skipping
from tests.accuracy import examples
from tests.covered import covers
from tests.routing_rules import EXAMPLES

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
PATTERNS = (
    "causal",
    "all",
    "causal & (window(150) | sink(3))",
    "causal & dilated(3)",
    "causal & { k // 64 != 1 or h == 0 }",
    "causal & { k % 96 < 70 }",
)
SHAPES = ((2, 4, 2, 200, 333, 16), (1, 2, 1, 65, 257, 80), (1, 1, 1, 1, 130, 8), (1, 1, 1, 1, 1, 8))


def peaked(batch: int, heads: int, kv_heads: int, rows: int, k_len: int, dim: int, seed: int = 0) -> list[Tensor]:
    """float64 q, k, v of which some blocks of keys are near what the queries look for, and most are not."""
    generator = torch.Generator().manual_seed(seed + rows + k_len)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    q, k, v = draw(batch, heads, rows, dim), draw(batch, kv_heads, k_len, dim), draw(batch, kv_heads, k_len, dim)
    strength = torch.rand(batch, kv_heads, -(-k_len // 32), generator=generator, dtype=torch.float64)
    strength = (strength < 0.3).double().repeat_interleave(32, 2)[..., :k_len, None]
    strength[:, :, :4] = 1
    look = torch.full((dim,), dim**-0.5, dtype=torch.float64)
    return [q + 3 * dim**0.25 * look, k + 3 * dim**0.25 * strength * look, v]


def dropped(attn: attndsl.Attention, q: Tensor, k: Tensor, below: float) -> tuple[float, float]:
    """The share of the visited tiles that are dropped, and how near to the bound the nearest decision is."""
    seen = torch.from_numpy(attn.mask(q.shape[2], k.shape[2], q.shape[1], k.shape[1])).expand(q.shape[0], -1, -1, -1)
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[3] ** 0.5
    left = left_by_skipping(logits, seen, below)
    logits = torch.where(seen, logits, -torch.inf)
    tiles, gone, nearest = 0, 0, math.inf
    for low in range(0, q.shape[2], 64):
        most = torch.full(q.shape[:2] + logits[:, :, low : low + 64].shape[2:3], -torch.inf, dtype=torch.float64)
        for first in range(0, k.shape[2], 64):
            found = logits[:, :, low : low + 64, first : first + 64].amax(-1)
            gain = (found - most).nan_to_num(-math.inf).amax(-1) - math.log(below)
            visited = (found > -torch.inf).any(-1)
            tiles += int(visited.sum())
            gone += int((visited & ~left[:, :, low, first]).sum())
            if bool(visited.any()):
                nearest = min(nearest, float(gain[visited].abs().amin()))
            most = torch.maximum(most, found)
    return gone / max(1, tiles), nearest


@pytest.mark.parametrize("rows", [1, 64, 150])
def test_the_oracle_by_a_rule(rows: int) -> None:
    """Row by row, tile by tile, with a running sum: what is dropped is as if it were not there."""
    below, k_len, dim = 0.01, 200, 8
    q, k, v = peaked(1, 2, 1, rows, k_len, dim)
    attn = attndsl.compile(f"attention a {{ attend causal skip below {below} }}")
    out, lse = attn.reference(q, k, v, return_lse=True)
    skipped = 0
    for h in range(2):
        for low in range(0, rows, 64):
            block = range(low, min(low + 64, rows))
            total, weighted = dict.fromkeys(block, 0.0), {i: np.zeros(dim) for i in block}
            most = dict.fromkeys(block, -math.inf)
            for first in range(0, k_len, 64):
                scores = {
                    i: [(j, float(q[0, h, i] @ k[0, 0, j]) / dim**0.5)
                        for j in range(first, min(first + 64, k_len)) if j <= i + k_len - rows]
                    for i in block
                }  # fmt: skip
                best = {i: max((s for _, s in found), default=-math.inf) for i, found in scores.items()}
                if all(best[i] == -math.inf or math.exp(best[i] - most[i]) < below for i in block):
                    skipped += any(found for found in scores.values())
                    continue
                for i in block:
                    most[i] = max(most[i], best[i])
                    for j, s in scores[i]:
                        total[i] += math.exp(s)
                        weighted[i] += math.exp(s) * v[0, 0, j].numpy()
            for i in block:
                np.testing.assert_allclose(out[0, h, i].numpy(), weighted[i] / total[i], rtol=1e-9)
                assert abs(float(lse[0, h, i]) - math.log(total[i])) < 1e-9
    assert skipped, "the rule was put to use"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cpu(pattern: str, shape: tuple[int, ...]) -> None:
    q, k, v = peaked(*shape)
    for below in (0.2, 0.001):
        attn = attndsl.compile(f"attention a {{ attend {pattern} skip below {below} }}")
        for found, wanted in zip(attn(q, k, v, return_lse=True), attn.reference(q, k, v, return_lse=True), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_triton(pattern: str) -> None:
    """In float32, on tensors whose decisions are all clear."""
    below = 0.05
    attn = attndsl.compile(f"attention a {{ attend {pattern} skip below {below} }}")
    for rows, k_len in ((130, 200), (1, 1)):
        q, k, v = (x.float() for x in peaked(1, 2, 1, rows, k_len, 16))
        share, nearest = dropped(attn, q.double(), k.double(), below)
        assert nearest > 1e-3
        assert share > 0 or rows == 1, "some tile is dropped"
        found = attn(q, k, v, return_lse=True, backend="triton")
        for x, y in zip(found, attn.reference(q, k, v, return_lse=True), strict=True):
            torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)


SCORED = """attention scored {
    input sinks : float[h]
    input doc : int[b, k] sorted
    score softcap(s, 20.0) - 0.01 * (q - k)
    softmax with sink sinks[h]
    skip below 0.05
    near = attend causal & document(doc)
    far = attend causal - window(64)
    output near + far
}"""


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_scores_sinks_documents_and_branches(backend: str) -> None:
    attn = attndsl.compile(SCORED)
    q, k, v = peaked(2, 2, 1, 150, 150, 16)
    dtype = torch.float64 if backend == "cpu" else torch.float32
    q, k, v = (x.to(dtype) for x in (q, k, v))
    doc = (torch.arange(150) // torch.tensor([[140], [60]])).int()
    given: dict[str, Any] = {"sinks": torch.tensor([0.5, -1.0], dtype=dtype), "doc": doc}
    out = attn(q, k, v, backend=backend, **given)
    tolerance = 1e-10 if backend == "cpu" else 2e-5
    torch.testing.assert_close(out.double(), attn.reference(q, k, v, **given), atol=tolerance, rtol=tolerance)


@given(
    pattern=st.sampled_from(PATTERNS), rows=st.integers(1, 150), more=st.integers(0, 150),
    below=st.sampled_from([0.5, 0.1, 1e-3, 1e-6]), seed=st.integers(0, 1000),
)  # fmt: skip
@examples(25)
def test_random(pattern: str, rows: int, more: int, below: float, seed: int) -> None:
    """Float64 scores decide as the oracle's do, up to what their rounding may turn."""
    q, k, v = peaked(1, 2, 1, rows, rows + more, 8, seed)
    attn = attndsl.compile(f"attention a {{ attend {pattern} skip below {below} }}")
    if dropped(attn, q, k, below)[1] > 1e-9:
        torch.testing.assert_close(attn(q, k, v), attn.reference(q, k, v), atol=1e-10, rtol=1e-10)


def test_nothing_heavy_is_dropped() -> None:
    """The output is as near to the exact one as the bound says: each dropped pair weighs less than t in its row."""
    q, k, v = peaked(1, 2, 1, 300, 300, 16)
    exact = attndsl.compile("causal").reference(q, k, v)
    errors = []
    for below in (0.3, 0.05, 0.005):
        attn = attndsl.compile(f"attention a {{ attend causal skip below {below} }}")
        errors.append(float((attn(q, k, v) - exact).abs().amax()))
        assert errors[-1] <= 2 * 300 * below * float(v.abs().amax())
    assert errors[0] > errors[1] >= errors[2]
    assert dropped(attndsl.compile("causal"), q, k, 0.05)[0] > 0


def test_what_is_refused_and_said() -> None:
    attn = attndsl.compile("attention a { attend causal skip below 0.01 }")
    assert attn.kernels() == ("forward", "left", "dq", "dkdv", "decode")
    assert "skip below 0.01" in attn.source("left")
    assert "tiles_0" in attn.source("dkdv")
    said = "approximate: tiles of 64 rows and 64 keys, in the order of keys, are dropped below 0.01"
    assert said in str(attn.explain(64))
    assert "skip below 0.01" in attn.source()
    with pytest.raises(attndsl.PatternError, match="scores skip"):
        attn.source(backend="gluon")


@covers("blasst")
def test_blasst() -> None:
    q, k, v = peaked(1, 2, 1, 200, 200, 16)
    attn = attndsl.compile(EXAMPLES / "blasst.attn")
    torch.testing.assert_close(attn(q, k, v), attn.reference(q, k, v))
    torch.testing.assert_close(attn(q, k, v), attndsl.compile("causal").reference(q, k, v), atol=0.02, rtol=0.02)


def test_a_trial_takes_whole_tiles() -> None:
    """`attndsl run` compares the last rows of a long call, which share their tiles with others."""
    attn = attndsl.compile("attention a { attend causal skip below 0.5 }")
    trial = attndsl.api.measure(attn, n=1100, heads=2, dim=16, dtype="float32")
    assert trial.error <= trial.allowed_error
    # Without the slack for decisions that rounding turns, too.
    assert trial.error < 1e-4
