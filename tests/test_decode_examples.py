"""The systems among the examples that choose while decoding, and reuse a choice: as their published rules say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attndsl
import attndsl.serving
from tests import routing_rules as rules
from tests.covered import covers
from tests.routing_rules import DIM, HEADS, KV_HEADS, SHARE, by_choice, call, check
from tests.test_two_levels import two_levels

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning", "ignore:::triton.runtime.interpreter")


@covers("quest")
@pytest.mark.parametrize("tokens", [1, 30, 37])
def test_quest(tokens: int) -> None:
    q, k, v = call(tokens)
    by_choice("quest", [q, k, v], rules.quest(q, k, 4, 3), 1, 4, params={"page": 4, "budget": 12})


@covers("token_select")
@pytest.mark.parametrize("tokens", [1, 30, 41])
def test_token_select(tokens: int) -> None:
    """Each head's softmax over the tokens that compete is a vote; all heads take the same."""
    first, near, n = 2, 4, 3
    q, k, v = call(tokens)
    queries, keys = rules.numbers(q, k)
    rows = list[set[int]]()
    for t in range(tokens):
        free = list(range(first, t - near + 1))
        votes = np.zeros(len(free))
        for h in range(HEADS if free else 0):
            votes += rules.softmax(keys[h // SHARE][free] @ queries[h, t] / DIM**0.5)
        always = {m for m in range(t + 1) if m < first or t - m < near}
        rows.append(always | set(rules.best(dict(zip(free, votes.tolist(), strict=True)), n)))
    params = {"first": first, "near": near, "n": n}
    by_choice("token_select", [q, k, v], [rows] * HEADS, 1, 1, params=params)


@covers("tidal_select", "tidal_reuse")
@pytest.mark.parametrize("tokens", [1, 30, 41])
def test_tidal(tokens: int) -> None:
    """A layer with full attention chooses for each group of heads; another layer, with other keys, takes its tokens and
    what came since; so does the next step, whose row of the plan is the last one's."""
    n, span = 5, 3
    q, k, v = call(tokens)
    queries, keys = rules.numbers(q, k)
    chosen = [[set[int]() for _ in range(tokens)] for _ in range(HEADS)]
    for g in range(KV_HEADS):
        mass = np.zeros((tokens, tokens))
        for h in range(g * SHARE, (g + 1) * SHARE):
            for t in range(tokens):
                mass[t, : t + 1] += rules.softmax(keys[g][: t + 1] @ queries[h, t] / DIM**0.5)
        for h in range(g * SHARE, (g + 1) * SHARE):
            chosen[h] = rules.by_score(mass, n)
    i, j = rules.pairs(tokens)
    full = np.broadcast_to(j <= i, (HEADS, tokens, tokens))
    check("tidal_select", [q, k, v], lambda q, k, v, _: rules.attend(q, k, v, full), {"n": n})
    keep = attndsl.compile(rules.EXAMPLES / "tidal_select.attn", n=n).plan(q, k)["keep"]
    assert keep.shape[1] == KV_HEADS
    lists = [[set(row[row >= 0].tolist()) for row in group] for group in keep[0]]
    assert lists == chosen[::SHARE]
    later = call(tokens, seed=3)
    allowed = rules.spread(chosen, 1, 1, tokens) | (j <= i) & (i - j < span)
    reuse = lambda q, k, v, _: rules.attend(q, k, v, allowed)  # noqa: E731
    check("tidal_reuse", later, reuse, {"span": span}, keep=keep)
    # The step after, in a cache that is one token longer.
    step = call(tokens + 1, rows=1, seed=4)
    one = np.zeros((HEADS, 1, tokens + 1), bool)
    for h in range(HEADS):
        one[h, 0, [*chosen[h][-1], *range(max(0, tokens + 1 - span), tokens + 1)]] = True
    stepped = lambda q, k, v, _: rules.attend(q, k, v, one)  # noqa: E731
    check("tidal_reuse", step, stepped, {"span": span}, keep=keep[:, :, -1:])


def test_a_plan_for_all_heads_is_less_is_more() -> None:
    """LessIsMore: the union of what heads want, one list for all of them."""
    text = (rules.EXAMPLES / "tidal_select.attn").read_text("utf-8").replace("share = group", "share = heads")
    q, k, _ = call(30)
    queries, keys = rules.numbers(q, k)
    mass = np.zeros((30, 30))
    for h in range(HEADS):
        for t in range(30):
            mass[t, : t + 1] += rules.softmax(keys[h // SHARE][: t + 1] @ queries[h, t] / DIM**0.5)
    keep = attndsl.compile(text, n=5).plan(q, k)["keep"]
    assert keep.shape[1] == 1
    assert [set(row[row >= 0].tolist()) for row in keep[0, 0]] == rules.by_score(mass, 5)


def test_each_head_for_itself_is_recycled_attention() -> None:
    """Recycled Attention: a full step's best tokens of each head, which the steps after it see beside recent ones."""
    text = (rules.EXAMPLES / "tidal_select.attn").read_text("utf-8").replace("share = group", "share = none")
    q, k, _ = call(30, rows=1)
    queries, keys = rules.numbers(q, k)
    keep = attndsl.compile(text, n=5).plan(q, k)["keep"]
    assert keep.shape[1] == HEADS
    for h in range(HEADS):
        mass = rules.softmax(keys[h // SHARE] @ queries[h, 0] / DIM**0.5)
        assert set(keep[0, h, 0].tolist()) == set(rules.best(dict(enumerate(mass.tolist())), 5))


def test_pages_of_a_full_layer_are_delta() -> None:
    """DELTA: whole pages, by what all heads gave to them in a layer of full attention."""
    text = (rules.EXAMPLES / "tidal_select.attn").read_text("utf-8")
    text = text.replace("tokens,", "blocks(4),").replace("share = group", "share = heads")
    q, k, _ = call(37, rows=1)
    queries, keys = rules.numbers(q, k)
    mass = np.zeros(40)
    for h in range(HEADS):
        mass[:37] += rules.softmax(keys[h // SHARE] @ queries[h, 0] / DIM**0.5)
    keep = attndsl.compile(text, n=3).plan(q, k)["keep"]
    pages = dict(enumerate(mass.reshape(10, 4).sum(1).tolist()))
    assert keep.shape == (1, 1, 1, 3)
    assert set(keep.flatten().tolist()) == set(rules.best(pages, 3))
    assert torch.equal(keep, keep.sort(-1).values)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_tidal_in_a_cache(backend: str) -> None:
    """Two sequences of their own lengths: one step of a full layer chooses, a second layer takes its tokens and what is
    near, in that step and in the next one, whose caches are a token longer. By hand, in numpy."""
    n, span, lengths, capacity = 5, 3, [40, 9], 48
    select = attndsl.compile(rules.EXAMPLES / "tidal_select.attn", n=n)
    reuse = attndsl.compile(rules.EXAMPLES / "tidal_reuse.attn", span=span)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if backend == "cpu" else torch.float32

    def draw(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(2, heads, tokens, DIM, generator=generator, dtype=dtype)

    q, k, v = draw(HEADS, 1), draw(KV_HEADS, capacity), draw(KV_HEADS, capacity)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    keep = attndsl.serving.plan(select, q, k, v, seq_lens)["keep"]
    queries, keys = q.double().numpy(), k.double().numpy()
    chosen = []
    for b, length in enumerate(lengths):
        for g in range(KV_HEADS):
            heads = range(g * SHARE, (g + 1) * SHARE)
            mass = sum(rules.softmax(keys[b, g, :length] @ queries[b, h, 0] / DIM**0.5) for h in heads)
            chosen.append(set(rules.best(dict(enumerate(np.asarray(mass).tolist())), n)))
            assert set(keep[b, g, 0].tolist()) == chosen[-1]
    for later in range(2):
        q, k, v = draw(HEADS, 1), draw(KV_HEADS, capacity), draw(KV_HEADS, capacity)
        out = reuse.decode(q, k, v, seq_lens + later, keep=keep, backend=backend)
        for b, length in enumerate(lengths):
            for h in range(HEADS):
                seen = chosen[b * KV_HEADS + h // SHARE] | set(range(length + later - span, length + later))
                rows = sorted(seen)
                logits = k[b, h // SHARE, rows].double().numpy() @ q[b, h, 0].double().numpy() / DIM**0.5
                right = rules.softmax(logits) @ v[b, h // SHARE, rows].double().numpy()
                np.testing.assert_allclose(out[b, h, 0].double().numpy(), right, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("name", "given"), [("hsa", "summary"), ("landmark", "marks")])
def test_two_levels_in_a_cache(name: str, given: str, backend: str) -> None:
    """Two sequences of their own lengths, whose last rows are those of their whole texts by the published rule."""
    rows, lengths, capacity = 2, [200, 66], 256
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if backend == "cpu" else torch.float32

    def draw(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(2, heads, tokens, DIM, generator=generator, dtype=dtype)

    q, k, v, marks = draw(HEADS, capacity), draw(KV_HEADS, capacity), draw(KV_HEADS, capacity), draw(KV_HEADS, 4)
    last = torch.stack([q[b, :, length - rows : length] for b, length in enumerate(lengths)])
    attn = attndsl.compile(rules.EXAMPLES / f"{name}.attn", n=2)
    asked: dict[str, Any] = {given: marks, "backend": backend}
    out = attn.decode(last, k, v, torch.tensor(lengths, dtype=torch.int32), **asked)
    for b, length in enumerate(lengths):
        queries, keys, values = (x[b : b + 1, :, :length].double() for x in (q, k, v))
        right = two_levels(queries, keys, values, marks[b : b + 1].double(), 2, name == "landmark")
        torch.testing.assert_close(out[b].double(), right[0, :, -rows:], rtol=1e-5, atol=1e-5)
