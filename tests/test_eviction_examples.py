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


@covers("razor")
@pytest.mark.parametrize("after", [1, 6])
def test_razor(after: int) -> None:
    """Rows after a prompt: in heads that do not retrieve, what was dropped weighs N exp(q . mean of keys)."""
    sinks, recent, prompt = 2, 5, 30
    tokens = prompt + after
    q, k, v = call(tokens, after)
    retrieves = torch.tensor([True, False, False, True])
    part = torch.tensor([0] * sinks + [1] * (prompt - recent - sinks) + [2] * (recent + after), dtype=torch.int32)
    dropped = part == 1
    found = load("razor")(q, k, v, retrieves=retrieves, part=part)
    for h, i in np.ndindex(HEADS, after):
        keys, values = k[0, h // SHARE, : prompt + i + 1], v[0, h // SHARE, : prompt + i + 1]
        masses = (keys @ q[0, h, i] / DIM**0.5).exp()
        if not retrieves[h]:
            away = dropped[: prompt + i + 1]
            count = int(away.sum())
            one = count * (keys[away].mean(0) @ q[0, h, i] / DIM**0.5).exp()
            masses = torch.cat([masses[~away], one[None]])
            values = torch.cat([values[~away], values[away].mean(0)[None]])
        torch.testing.assert_close(found[0, h, i], masses @ values / masses.sum())


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


def stepped(name: str, observed: str, tokens: int, recent: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What each step observes of head 1, with every second older token kept; and the same by rule."""
    attn, (q, k, v) = load(name, recent=recent), call(tokens)
    found, wanted = np.zeros((2, tokens, tokens))
    for t in range(tokens):
        older = set(range(0, max(0, t + 1 - recent), 2))
        plan = lists([older] * HEADS)
        out, seen = attn(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], kept=plan, return_observed=True)
        found[t, : t + 1] = seen[observed][0, 1, 0].numpy()
        here = sorted(older | set(range(max(0, t + 1 - recent), t + 1)))
        wanted[t, here] = weights(q[0, 1, t], k[0, 1 // SHARE], here)
        values = sum((w * v[0, 1 // SHARE, j] for j, w in enumerate(wanted[t])), torch.zeros(DIM, dtype=torch.float64))
        torch.testing.assert_close(out[0, 1, 0], values)
    return found, wanted


@covers("a2sf")
def test_a2sf() -> None:
    """Sums that are multiplied by a forgetting factor before a step is added: older votes weigh less."""
    found, wanted = stepped("a2sf", "mass", 20, 4)
    sums = np.zeros(20)
    for row in found:
        sums = 0.5 * sums + row
    by_rule = np.array([sum(0.5 ** (19 - t) * wanted[t, j] for t in range(20)) for j in range(20)])
    np.testing.assert_allclose(sums, by_rule, atol=1e-12)
    assert np.argmax(sums) != np.argmax(found.sum(0)), "forgetting changes who is kept"


@covers("lazy_eviction")
def test_lazy_eviction() -> None:
    """When a token last mattered, and the longest time that it took to come back."""
    found, wanted = stepped("lazy_eviction", "most", 24, 4)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    intervals = []
    for masses in (found, wanted):
        last, longest = np.arange(24), np.zeros(24, int)
        for t, row in enumerate(masses):
            back = row > 0.15
            longest[back] = np.maximum(longest[back], t - last[back])
            last[back] = t
        intervals.append((last.tolist(), longest.tolist()))
    assert intervals[0] == intervals[1]
    assert max(intervals[0][1]) > 1


@covers("scissorhands")
def test_scissorhands() -> None:
    """The last rows vote; of a prompt everything is there."""
    tokens, history = 30, 6
    attn, (q, k, v) = load("scissorhands", recent=8, history=history), call(tokens)
    everything = torch.arange(tokens, dtype=torch.int32).expand(1, HEADS, -1)
    out, observed = attn(q, k, v, kept=everything, return_observed=True)
    torch.testing.assert_close(out, attndsl.compile("causal").reference(q, k, v))
    for h in range(HEADS):
        votes = np.zeros(tokens)
        for t in range(tokens - history, tokens):
            votes[: t + 1] += weights(q[0, h, t], k[0, h // SHARE], list(range(t + 1)))
        np.testing.assert_allclose(observed["votes"][0, h, 0].numpy(), votes, atol=1e-12)


@covers("lychee")
def test_lychee() -> None:
    """Heads 0 and 3 retrieve; 1 and 2 take what heads of an earlier layer chose: here 3's and 0's."""
    tokens, n, mapped = 30, 4, [0, 3, 0, 3]
    attn = load("lychee", n=n)
    retrieves = torch.tensor([True, False, False, True])
    q, k, _ = call(tokens, rows=1)
    nothing = torch.full((1, HEADS, 1), -1, dtype=torch.int32)
    choice = attn.plan(q, k, retrieves=retrieves, taken=nothing)["choice"][:, :, 0]
    later = call(tokens, rows=1, seed=5)
    taken = choice[:, mapped]
    out = attn(*later, retrieves=retrieves, taken=taken)
    for h in range(HEADS):
        p = weights(q[0, h, 0], k[0, h // SHARE], list(range(tokens)))
        assert set(choice[0, h].tolist()) == set(np.argsort(-p, kind="stable")[:n].tolist())
        seen = list(range(tokens)) if retrieves[h] else sorted({*choice[0, mapped[h]].tolist(), tokens - 1})
        own = weights(later[0][0, h, 0], later[1][0, h // SHARE], seen)
        expected = sum(w * later[2][0, h // SHARE, j] for w, j in zip(own, seen, strict=True))
        torch.testing.assert_close(out[0, h, 0], expected)
