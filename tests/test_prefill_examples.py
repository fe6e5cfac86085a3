"""The training-free systems among the examples: choice, output and gradients are those of their published rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from tests import routing_rules as rules
from tests.covered import covers
from tests.routing_rules import DIM, HEADS, KV_HEADS, SHARE, by_choice, call, check, noise

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")


@covers("minference_blocks")
@pytest.mark.parametrize("tokens", [1, 128, 330])
def test_minference_blocks(tokens: int) -> None:
    q, k, v = call(tokens)
    by_choice("minference_blocks", [q, k, v], rules.block_means(q, k, 64, 2), 64, 64, params={"n": 2})


@covers("proxy")
@pytest.mark.parametrize("tokens", [1, 40, 45])
def test_proxy(tokens: int) -> None:
    """Heads that share keys rank blocks by their mean query, and take as many as each may."""
    counts = [1, 3, 2, 2]
    q, k, v = call(tokens)
    of_group = q.view(1, KV_HEADS, SHARE, tokens, DIM).mean(2).repeat_interleave(SHARE, dim=1)
    chosen = rules.block_means(of_group, k, 8, counts)
    by_choice("proxy", [q, k, v], chosen, 8, 8, params={"block": 8, "n": counts})


@covers("xattention")
@pytest.mark.parametrize("tokens", [1, 6, 80, 83])
def test_xattention(tokens: int) -> None:
    q, k, v = call(tokens)
    q = 8 * q
    chosen = rules.xattention(q, k, 8, 4, 0.9)
    assert tokens < 80 or sum(len(row) for head in chosen for row in head) < 0.8 * HEADS * 55
    by_choice("xattention", [q, k, v], chosen, 8, 8, params={"block": 8, "stride": 4})


@covers("sparge")
@pytest.mark.parametrize("tokens", [1, 256, 300])
def test_sparge(tokens: int) -> None:
    q, k, v = call(tokens)
    generator = torch.Generator().manual_seed(1)
    fixed_q = torch.rand(1, HEADS, -(-tokens // 128), generator=generator) < 0.2
    fixed_k = torch.rand(1, KV_HEADS, -(-tokens // 64), generator=generator) < 0.3
    chosen = rules.sparge(q, k, fixed_q[0].numpy(), fixed_k[0].numpy())
    # A block of 128 rows may see the first of two blocks of keys whole and the second in part.
    allowed = rules.spread(chosen, 128, 64, tokens)
    check("sparge", [q, k, v], lambda q, k, v, _: rules.attend(q, k, v, allowed), fixed_q=fixed_q, fixed_k=fixed_k)


@covers("sale")
@pytest.mark.parametrize("tokens", [1, 250, 330])
def test_sale(tokens: int) -> None:
    """Scores in few bits against what an exact pass over the first and the nearest keys added up to."""
    tau, sinks, span = 0.4, 4, 60
    q, k, v = call(tokens)
    queries, keys = rules.numbers(q, k)
    i, j = rules.pairs(tokens)
    exact_pass = (j <= i) & ((j < sinks) | (i - j < span))
    rows, blocks = -(-tokens // 64), -(-tokens // 32)
    estimate, kept = np.zeros((HEADS, rows, blocks)), np.zeros((HEADS, tokens, tokens), bool)
    for h in range(HEADS):
        coarse = [np.round(4 * x) / 4 for x in (queries[h], keys[h // SHARE])]
        exact = np.where(exact_pass, queries[h] @ keys[h // SHARE].T / DIM**0.5, -np.inf)
        most = exact.max(1, keepdims=True)
        total = np.exp(exact - most).sum(1, keepdims=True)
        low_bits = coarse[0] @ coarse[1].T / DIM**0.5
        for r, m in np.ndindex(rows, blocks):
            of = np.ix_(range(r * 64, min(r * 64 + 64, tokens)), range(m * 32, min(m * 32 + 32, tokens)))
            present = (j <= i)[of]
            stays = present & (low_bits > most + np.log(tau * total))[of]
            kept[h][of] = stays.any() or exact_pass[of].any()
            estimate[h, r, m] = np.where(present, np.exp(low_bits - most)[of] / total[of[0][:, 0]], 0.0).max()
    assert tokens < 100 or 0.3 < kept[:, (j <= i)].mean() < 0.9
    params: dict[str, Any] = {"tau": tau, "sinks": sinks, "span": span}
    allowed = kept & (j <= i)
    formula = lambda q, k, v, _: rules.attend(q, k, v, allowed)  # noqa: E731
    check("sale", [q, k, v], formula, params, estimate=torch.from_numpy(estimate)[None])


@covers("hip")
@pytest.mark.parametrize("tokens", [1, 150, 330])
def test_hip(tokens: int) -> None:
    classes = -(-tokens // 64)
    keep = torch.full((1, HEADS, classes, 2), -1, dtype=torch.int32)
    generator, chosen = np.random.default_rng(3), list[list[set[int]]]()
    for h in range(HEADS):
        chosen.append([])
        for r in range(classes):
            taken = sorted(generator.choice(r + 1, min(2, r + 1), replace=False).tolist())
            keep[0, h, r, : len(taken)] = torch.tensor(taken, dtype=torch.int32)
            chosen[h].append(set(taken))
    i, j = rules.pairs(tokens)
    allowed = rules.spread(chosen, 64, 64, tokens) | (j <= i) & ((j < 5) | (i - j < 30))
    formula = lambda q, k, v, _: rules.attend(q, k, v, allowed)  # noqa: E731
    check("hip", call(tokens), formula, {"sinks": 5, "span": 30}, keep=keep)


@covers("pisa")
@pytest.mark.parametrize("tokens", [1, 40, 61])
def test_pisa(tokens: int) -> None:
    """A block that is not chosen weighs |B| exp(q . mean of keys), and brings the mean of its values with it."""
    block, blocks = 8, -(-tokens // 8)
    q, k, v = call(tokens)
    chosen = rules.block_means(q, k, block, max(1, int(0.3 * blocks)), causal=False)
    near = rules.spread(chosen, block, block, tokens, causal=False)
    last = np.minimum(np.arange(blocks) * block + block, tokens) - 1
    sizes = torch.tensor([min(block, tokens - m * block) for m in range(blocks)], dtype=q.dtype)
    rest = ~near[:, :, last]

    def formula(q: Tensor, k: Tensor, v: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        keys, values = (torch.cat([x, rules.pooled(x, block)], -2) for x in (k, v))
        added = torch.cat([torch.zeros(tokens, dtype=q.dtype), sizes.log()])
        return rules.attend(q, keys, values, np.concatenate([near, rest], -1), added)

    check("pisa", [q, k, v], formula, {"block": block, "share": 0.3})


@covers("svg_ear")
@pytest.mark.parametrize("tokens", [1, 40, 61])
def test_svg_ear(tokens: int) -> None:
    """Clusters of any size, in each key head its own: the best few by what is handed in, the others by their means."""
    block, n = 8, 3
    q, k, v = call(tokens)
    generator = np.random.default_rng(3)
    c = np.sort(generator.integers(0, 9, (HEADS // SHARE, tokens)), -1)
    # What stands at tokens that begin no cluster is not read.
    gain = generator.standard_normal((HEADS, -(-tokens // block), tokens))

    def formula(q: Tensor, k: Tensor, v: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        out = torch.zeros(1, HEADS, tokens, DIM, dtype=q.dtype)
        for h, i in np.ndindex(HEADS, tokens):
            own, keys, values = c[h // SHARE], k[0, h // SHARE], v[0, h // SHARE]
            firsts = [j for j in range(tokens) if j == 0 or own[j] != own[j - 1]]
            best = sorted(firsts, key=lambda j: (-gain[h, i // block, j], j))[:n]
            logits, found = [], []
            for first in firsts:
                mine = own == own[first]
                if first in best:
                    logits += [q[0, h, i] @ keys[j] / DIM**0.5 for j in np.flatnonzero(mine)]
                    found += [values[j] for j in np.flatnonzero(mine)]
                else:
                    logits.append(q[0, h, i] @ keys[mine].mean(0) / DIM**0.5 + np.log(mine.sum()))
                    found.append(values[mine].mean(0))
            out[0, h, i] = torch.stack(logits).softmax(0) @ torch.stack(found)
        return out

    inputs = {"c": torch.from_numpy(c)[None].int(), "gain": torch.from_numpy(gain)[None]}
    check("svg_ear", [q, k, v], formula, {"block": block, "n": n}, c=inputs["c"], gain=inputs["gain"])


@covers("hyper")
@pytest.mark.parametrize("tokens", [1, 40, 61])
def test_hyper(tokens: int) -> None:
    """Blocks on the diagonal of the sorted order, and m keys drawn for all: those in the row's own block do not count,
    the others for n / m each, in one softmax."""
    block, m = 8, 6
    q, k, v = call(tokens)
    generator = np.random.default_rng(5)
    rq, rk = (np.stack([generator.permutation(tokens) for _ in range(HEADS)]) for _ in range(2))
    drawn = generator.choice(tokens, m)
    near = rq[:, :, None] // block == rk[:, None, :] // block
    sampled = ~near[:, :, drawn]
    weight = float(np.log(tokens / m))

    def formula(q: Tensor, k: Tensor, v: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        keys, values = torch.cat([k, k[:, :, drawn]], -2), torch.cat([v, v[:, :, drawn]], -2)
        added = torch.cat([torch.zeros(tokens, dtype=q.dtype), torch.full((m,), weight, dtype=q.dtype)])
        return rules.attend(q, keys, values, np.concatenate([near, sampled], -1), added)

    inputs = {"rq": torch.from_numpy(rq)[None].int(), "rk": torch.from_numpy(rk)[None].int()}
    drawn_by = torch.from_numpy(drawn)[None, None].int()
    check("hyper", [q, k, v], formula, {"block": block, "m": m}, rq=inputs["rq"], rk=inputs["rk"], drawn=drawn_by)


@covers("long_heads")
@pytest.mark.parametrize("tokens", [300, 1280])
def test_long_heads(tokens: int) -> None:
    """Counted inside n: the first chunk and the last two."""
    n, chunks = 4, -(-tokens // 256)
    ck = noise(1, KV_HEADS, chunks, DIM)
    q, k, v = call(tokens)
    queries, represented = rules.numbers(q, ck)

    def choose(h: int, g: int) -> list[set[int]]:
        rows = []
        for t in range(tokens):
            own = t // 256
            always = {0, own, max(0, own - 1)}
            rest = {m: float(represented[g, m] @ queries[h, t]) for m in range(own + 1) if m not in always}
            rows.append(always | set(rules.best(rest, n - len(always))))
        return rows

    by_choice("long_heads", [q, k, v], rules.for_heads(choose), 1, 256, params={"n": n}, ck=ck)


@covers("dhsa")
@pytest.mark.parametrize("tokens", [1, 30, 41])
def test_dhsa(tokens: int) -> None:
    """Chunks of any lengths: means times roots of lengths, and their products stand for every pair of tokens."""
    chunks, n = 6, 7
    q, k, v = call(tokens)
    queries, keys = rules.numbers(q, k)
    chunk = np.sort(np.random.default_rng(2).integers(0, chunks, tokens))
    similar = np.zeros((HEADS, tokens, chunks))
    for h in range(HEADS):
        for x, y in np.ndindex(chunks, chunks):
            of_rows, of_keys = chunk == x, chunk == y
            if of_rows.any() and of_keys.any():
                row = queries[h, of_rows].mean(0) * np.sqrt(of_rows.sum())
                key = keys[h // SHARE, of_keys].mean(0) * np.sqrt(of_keys.sum())
                similar[h, of_rows, y] = row @ key
    # Tokens of one chunk are equals: the earlier ones are taken.
    score = np.round(similar, 3).sum(0)[:, chunk]
    chosen = [rules.by_score(score, n)] * HEADS
    given: dict[str, Any] = {
        "chunk": torch.from_numpy(chunk)[None].int(),
        "similar": torch.from_numpy(np.round(similar, 3))[None],
    }
    by_choice("dhsa", [q, k, v], chosen, 1, 1, params={"n": n, "chunks": chunks}, **given)


@covers("star_merge")
@pytest.mark.parametrize(("tokens", "hosts"), [(1, 1), (30, 3), (41, 4)])
def test_star_merge(tokens: int, hosts: int) -> None:
    """Hosts one after another, each with the keys that it holds; together they give attention to all."""
    q, k, v = call(tokens)
    rows = max(1, tokens // 5)
    q = q[:, :, :rows]
    ends = [tokens * (host + 1) // hosts for host in range(hosts)]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for host, end in enumerate(ends):
        attn = attndsl.compile(rules.EXAMPLES / "star_merge.attn", last=int(host == hosts - 1))
        own = slice(ends[host - 1] if host else 0, end)
        out, lse = attn(q, k[:, :, own], v[:, :, own], others=out, others_lse=lse, return_lse=True)
    i, j = rules.pairs(tokens, rows)
    allowed = np.broadcast_to(j <= i, (HEADS, rows, tokens))
    torch.testing.assert_close(out, rules.attend(q, k, v, allowed))
