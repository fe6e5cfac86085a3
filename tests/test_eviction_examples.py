"""Examples that observe probabilities: what a cache keeps, and what a gate learns, are those of published rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from tests.covered import covers
from tests.routing_rules import DIM, EXAMPLES, HEADS, SHARE, call

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")


def load(name: str, **params: Any) -> attndsl.Attention:
    return attndsl.compile(EXAMPLES / f"{name}.attn", **params)


def weights(q: Tensor, k: Tensor, seen: list[int]) -> np.ndarray:
    """The probabilities of one row of one head over the keys that it sees."""
    logits = np.array([float(q @ k[j]) / DIM**0.5 for j in seen])
    found = np.exp(logits - logits.max())
    return np.asarray(found / found.sum())


def lists(kept: list[set[int]]) -> Tensor:
    """A plan of single tokens, one list a head."""
    longest = max(1, *map(len, kept))
    return torch.tensor([[sorted(x) + [-1] * (longest - len(x)) for x in kept]], dtype=torch.int32)


@covers("h2o")
def test_h2o() -> None:
    """Token by token, a cache of heavy + recent tokens: by its rule alone, and by what the attention observes."""
    heavy, recent, tokens = 3, 4, 24
    attn = load("h2o", recent=recent)
    q, k, v = call(tokens)
    for h in range(HEADS):
        keys, values = k[0, h // SHARE], v[0, h // SHARE]
        mass, cache, wanted = np.zeros(tokens), list[int](), []
        for t in range(tokens):
            cache.append(t)
            p = weights(q[0, h, t], keys, cache)
            wanted.append(sum(w * values[j] for w, j in zip(p, cache, strict=True)))
            mass[cache] += p
            if len(cache) >= heavy + recent:
                # The own token of the next step is recent too.
                older = [j for j in cache if j <= t + 1 - recent]
                cache.remove(min(older, key=lambda j: (mass[j], -j)))
        found, kept = torch.zeros(tokens, dtype=torch.float64), set[int]()
        for t in range(tokens):
            # Of the other heads nothing older is kept.
            plan = lists([kept if other == h else set() for other in range(HEADS)])
            call_ = (q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
            out, observed = attn(*call_, kept=plan, return_observed=True)
            torch.testing.assert_close(out[0, h, 0], wanted[t])
            found[: t + 1] += observed["mass"][0, h, 0]
            if t + 1 >= recent:
                kept.add(t + 1 - recent)
            if len(kept) > heavy:
                kept.remove(min(kept, key=lambda j: (float(found[j]), -j)))
        np.testing.assert_allclose(found.numpy(), mass, atol=1e-12)
        assert len(kept) == heavy and kept <= set(cache)


@covers("snapkv")
def test_snapkv() -> None:
    """The prompt, its votes smoothed by a maximum of 7 keys, and a row that attends to what they keep."""
    span, budget, tokens = 8, 6, 45
    attn = load("snapkv", span=span)
    q, k, v = call(tokens + 1)
    prompt = tuple(x[:, :, :tokens] for x in (q, k, v))
    everything = torch.arange(tokens, dtype=torch.int32).expand(1, HEADS, -1)
    out, observed = attn(*prompt, kept=everything, return_observed=True)
    torch.testing.assert_close(out, attndsl.compile("causal").reference(*prompt))
    smooth = torch.nn.functional.max_pool1d(observed["votes"][0, :, 0, : tokens - span], 7, 1, 3)
    plan = smooth.topk(budget).indices.sort().values.to(torch.int32)[None]
    row = attn(q[:, :, tokens:], k, v, kept=plan)
    for h in range(HEADS):
        keys, values = k[0, h // SHARE], v[0, h // SHARE]
        votes = np.zeros(tokens - span)
        for t in range(tokens - span, tokens):
            votes += weights(q[0, h, t], keys, list(range(t + 1)))[: tokens - span]
        around = [votes[max(0, j - 3) : j + 4].max() for j in range(tokens - span)]
        # Neighbours of a key with many votes have as many: which of them are kept, `topk` leaves open.
        least = sorted(around)[-budget]
        kept = plan[0, h].tolist()
        assert {j for j, x in enumerate(around) if x > least + 1e-12} <= set(kept)
        assert all(around[j] >= least - 1e-12 for j in kept) and len(set(kept)) == budget
        seen = sorted({*kept, *range(tokens + 1 - span, tokens + 1)})
        p = weights(q[0, h, tokens], keys, seen)
        torch.testing.assert_close(row[0, h, 0], sum(w * values[j] for w, j in zip(p, seen, strict=True)))


@covers("seer_target")
@pytest.mark.parametrize("tokens", [1, 16, 45])
def test_seer_target(tokens: int) -> None:
    block = 16
    q, k, v = call(tokens)
    found = load("seer_target", block=block)(q, k, v, return_observed=True)[1]["map"]
    blocks = -(-tokens // block)
    expected = np.zeros((HEADS, blocks, blocks))
    for h in range(HEADS):
        for t in range(tokens):
            for j, p in enumerate(weights(q[0, h, t], k[0, h // SHARE], list(range(t + 1)))):
                cell = (h, t // block, j // block)
                expected[cell] = max(expected[cell], p)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-12)
