"""The example programs with views, against rules written out in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import attndsl
from tests.covered import covers
from tests.view_rules import Array, Rule, attended, pooled, tokens

PATTERNS = Path(__file__).parent.parent / "examples" / "patterns"
REST_APPROXIMATED = """
# What a selection leaves out, approximated (as in PISA): the chosen blocks token by token, all others through one entry
# each, in one softmax.
attention rest_approximated(block = 64, n = 8) {
    plan   sel = top(n, blocks(block), per = rows(block), among = causal, by = dot(mean(Q), mean(K)),
                     always = same_block(block))
    attend causal & sel, causal - sel over pool(mean, block, counted)
}
"""
pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")


def qkv(n: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    sizes = ((1, 2, n, 8), (1, 1, n, 8), (1, 1, n, 8))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


def by_head(rules: list[Rule], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Array:
    heads = [attended(rules, x, k[0, 0].numpy(), v[0, 0].numpy())[0] for x in q[0].numpy()]
    return np.stack(heads)[None]


@covers("combiner")
@pytest.mark.parametrize("n", [1, 23, 40])
def test_combiner(n: int) -> None:
    q, k, v = qkv(n)
    attn = attndsl.compile(PATTERNS / "combiner.attn", segment=8)
    own = tokens(lambda q, k: k <= q and q // 8 == k // 8)
    expected = by_head([own, pooled(lambda q, k: k <= q and q // 8 != k // 8, "mean", 8)], q, k, v)
    np.testing.assert_allclose(attn(q, k, v).numpy(), expected, atol=1e-12)


@covers("pyramid")
@pytest.mark.parametrize("n", [1, 70, 101])
def test_pyramid(n: int) -> None:
    """Each token counts once: with scores that are all equal the weights are those of dense attention."""
    q, k, v = qkv(n)
    attn = attndsl.compile(PATTERNS / "pyramid.attn", near=1, middle=3)
    rules = [
        tokens(lambda q, k: k <= q and q // 16 - k // 16 < 1),
        pooled(lambda q, k: 1 <= q // 16 - k // 16 < 3, "mean", 4, counted=True),
        pooled(lambda q, k: q // 16 - k // 16 >= 3, "mean", 16, counted=True),
    ]
    np.testing.assert_allclose(attn(q, k, v).numpy(), by_head(rules, q, k, v), atol=1e-12)
    dense = attndsl.compile("causal")(torch.zeros_like(q), k, v)
    torch.testing.assert_close(attn(torch.zeros_like(q), k, v), dense)


@covers("coarse_and_near")
@pytest.mark.parametrize("n", [1, 23, 40])
def test_coarse_and_near(n: int) -> None:
    q, k, v = qkv(n)
    gate = torch.randn(1, 2, n, 2, dtype=torch.float64)
    attn = attndsl.compile(PATTERNS / "coarse_and_near.attn", block=8, span=5)
    weight = 1 / (1 + np.exp(-gate.numpy()))
    coarse = by_head([pooled(lambda q, k: k <= q, "mean", 8)], q, k, v)
    near = by_head([tokens(lambda q, k: 0 <= q - k < 5)], q, k, v)
    expected = weight[..., :1] * coarse + weight[..., 1:] * near
    np.testing.assert_allclose(attn(q, k, v, gate=gate).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("n", [8, 23, 40])
def test_rest_approximated(n: int) -> None:
    """The choice by hand: of the past blocks those of the greatest product of means, the row's own always."""
    q, k, v = qkv(n)
    attn = attndsl.compile(REST_APPROXIMATED, block=8, n=2)
    blocks = range(-(-n // 8))
    keys = [k[0, 0, 8 * m : 8 * m + 8].mean(0) for m in blocks]
    expected = []
    for x in q[0]:
        queries = [x[8 * m : 8 * m + 8].mean(0) for m in blocks]
        scores = np.array([[float(x @ y) for y in keys] for x in queries])
        chosen = {(r, m) for r in blocks for m in (r, *scores[r, :r].argsort()[-1:].tolist())}

        def sees(q: int, k: int, chosen: set[tuple[int, int]] = chosen) -> bool:
            return k <= q and (q // 8, k // 8) in chosen

        def left_out(q: int, k: int, chosen: set[tuple[int, int]] = chosen) -> bool:
            return k <= q and (q // 8, k // 8) not in chosen

        rules = [tokens(sees), pooled(left_out, "mean", 8, counted=True)]
        expected.append(attended(rules, x.numpy(), k[0, 0].numpy(), v[0, 0].numpy())[0])
    np.testing.assert_allclose(attn(q, k, v).numpy(), np.stack(expected)[None], atol=1e-12)
