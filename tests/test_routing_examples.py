"""The routing systems among the examples choose what their published rules say, written here again in plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import attndsl

EXAMPLES = Path(__file__).parent.parent / "examples" / "patterns"
pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
Array = npt.NDArray[np.float64]
Rule = Callable[..., set[int]]
HEADS, KV_HEADS, DIM = 4, 2, 8


def call(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(1, h, tokens, DIM, generator=generator, dtype=torch.float64) for h in sizes)
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: npt.NDArray[np.bool_], bias: float | Array = 0.0) -> Array:
    """Softmax attention over allowed pairs [Hq, N, N]."""
    out = np.zeros((HEADS, q.shape[2], DIM))
    for h in range(HEADS):
        g = h // (HEADS // KV_HEADS)
        logits = q[0, h].numpy() @ k[0, g].numpy().T / DIM**0.5 + (bias if isinstance(bias, float) else bias[g])
        logits = np.where(allowed[h], logits, -np.inf)
        mass = np.exp(logits - logits.max(1, keepdims=True))
        out[h] = mass / mass.sum(1, keepdims=True) @ v[0, g].numpy()
    return out


def spread(
    chosen: list[list[set[int]]], rows: int, keys: int, tokens: int, causal: bool = True
) -> npt.NDArray[np.bool_]:
    """The pairs of members chosen for row classes, [Hq][R] sets."""
    q, k = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    found = np.zeros((HEADS, tokens, tokens), np.bool_)
    for h in range(HEADS):
        for r, members in enumerate(chosen[h]):
            for m in members:
                found[h] |= (q // rows == r) & (k // keys == m)
    return found & (k <= q) if causal else found


def best(scores: dict[int, float], n: int) -> list[int]:
    return sorted(scores, key=lambda m: (-scores[m], m))[: max(0, n)]


def check(
    name: str, tokens: int, allowed: npt.NDArray[np.bool_], added: Any = 0.0, params: Any = None, **inputs: Any
) -> None:
    attn = attndsl.compile(EXAMPLES / f"{name}.attn", **(params or {}))
    q, k, v = call(tokens)
    out = attn(q, k, v, **inputs)
    np.testing.assert_allclose(out[0].numpy(), dense(q, k, v, allowed, added), atol=1e-9)
    torch.testing.assert_close(out, attn.reference(q, k, v, **inputs), atol=1e-10, rtol=1e-10)


def blocks_of(x: Tensor, size: int) -> list[Array]:
    return [x[i : i + size].numpy() for i in range(0, x.shape[0], size)]


def softmax(x: Array) -> Array:
    mass = np.exp(x - x.max())
    return np.asarray(mass / mass.sum())


@pytest.mark.parametrize("name", ["moba", "flash_moba"])
def test_moba(name: str) -> None:
    q, k, _ = call(40)
    kr = torch.randn(1, KV_HEADS, 40, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ranked = kr if name == "flash_moba" else k
    chosen: list[list[set[int]]] = []
    for h in range(HEADS):
        means = [x.mean(0) for x in blocks_of(ranked[0, h // 2], 8)]
        rows = []
        for t in range(40):
            own = t // 8
            gate = {m: float(means[m] @ q[0, h, t].numpy()) for m in range(own)}
            rows.append({own, *best(gate, 2)})
        chosen.append(rows)
    inputs = {"kr": kr} if name == "flash_moba" else {}
    check(name, 40, spread(chosen, 1, 8, 40), params={"block": 8, "n": 3}, **inputs)


def test_quest() -> None:
    q, k, _ = call(37)
    chosen = []
    for h in range(HEADS):
        pages = blocks_of(k[0, h // 2], 4)
        rows = []
        for t in range(37):
            x = q[0, h, t].numpy()
            bound = {m: float(np.maximum(x * p.min(0), x * p.max(0)).sum()) for m, p in enumerate(pages) if m * 4 <= t}
            rows.append(set(best(bound, 3)))
        chosen.append(rows)
    check("quest", 37, spread(chosen, 1, 4, 37), params={"page": 4, "budget": 12})


def test_seer() -> None:
    gate = 4 * torch.randn(1, HEADS, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = []
    for h in range(HEADS):
        rows = []
        for r in range(3):
            share = softmax(gate[0, h, r, : r + 1].numpy())
            rows.append({r, *(m for m in range(r + 1) if share[m] >= 0.002)})
        chosen.append(rows)
    check("seer", 130, spread(chosen, 64, 64, 130), gate=gate)


def test_xattention() -> None:
    q, k, _ = call(48)
    size, stride = 8, 4
    chosen = []
    for h in range(HEADS):
        groups = 48 // stride
        logits = np.full((groups, groups), -np.inf)
        for i in range(groups):
            for j in range(i + 1):
                x, y = q[0, h, i * stride : (i + 1) * stride], k[0, h // 2, j * stride : (j + 1) * stride].flip(0)
                logits[i, j] = float((x * y).sum()) / stride / DIM**0.5
        mass = np.stack([softmax(row) for row in logits])
        rows = []
        for r in range(6):
            of_blocks = mass[r * 2 : r * 2 + 2].sum(0).reshape(6, 2).sum(1)[: r + 1]
            kept, total = {0, r}, float(of_blocks.sum())
            for m in best({m: float(of_blocks[m]) for m in range(r + 1) if m not in (0, r)}, 6):
                if sum(of_blocks[x] for x in kept) < 0.9 * total:
                    kept.add(m)
            rows.append(kept)
        chosen.append(rows)
    check("xattention", 48, spread(chosen, size, size, 48), params={"block": size, "stride": stride})


def test_minference_blocks() -> None:
    q, k, _ = call(330)
    chosen = []
    for h in range(HEADS):
        x, y = ([b.mean(0) for b in blocks_of(t, 64)] for t in (q[0, h], k[0, h // 2]))
        chosen.append([set(best({m: float(x[r] @ y[m]) for m in range(r + 1)}, 2)) for r in range(6)])
    check("minference_blocks", 330, spread(chosen, 64, 64, 330), params={"n": 2})


def test_sparge() -> None:
    tokens = 300
    q, k, _ = call(tokens)
    generator = torch.Generator().manual_seed(1)
    fixed_q = torch.rand(1, HEADS, 3, generator=generator) < 0.2
    fixed_k = torch.rand(1, KV_HEADS, 5, generator=generator) < 0.3
    chosen = []
    for h in range(HEADS):
        x, y = [b.mean(0) for b in blocks_of(q[0, h], 128)], [b.mean(0) for b in blocks_of(k[0, h // 2], 64)]
        rows = []
        for r in range(3):
            # A block of 128 rows sees blocks of 64 keys up to its last row.
            seen = [m for m in range(5) if m * 64 <= min(r * 128 + 127, tokens - 1)]
            forced = {m for m in seen if bool(fixed_q[0, h, r]) or bool(fixed_k[0, h // 2, m])}
            rest = [m for m in seen if m not in forced]
            kept = set(forced)
            if rest:
                share = dict(zip(rest, softmax(np.array([x[r] @ y[m] / DIM**0.5 for m in rest])), strict=True))
                ahead = 0.0
                for m in best({m: float(s) for m, s in share.items()}, 9):
                    ahead += float(share[m])
                    if ahead <= 0.98:
                        kept.add(m)
            rows.append(kept)
        chosen.append(rows)
    attn = attndsl.compile(EXAMPLES / "sparge.attn")
    plan = attn.plan(q, k, fixed_q=fixed_q, fixed_k=fixed_k)["cover"]
    wanted = [[[int(m in rows) for m in range(5)] for rows in heads] for heads in chosen]
    assert plan[0].tolist() == wanted


def test_dsa_and_dma() -> None:
    tokens = 30
    generator = torch.Generator().manual_seed(1)
    index = torch.randn(1, tokens, tokens, generator=generator, dtype=torch.float64)
    rows = [set(best({m: float(index[0, t, m]) for m in range(t + 1)}, 5)) for t in range(tokens)]
    check("dsa", tokens, spread([rows] * HEADS, 1, 1, tokens), params={"n": 5}, index=index)
    bias = torch.randn(1, KV_HEADS, tokens, generator=generator, dtype=torch.float64)
    chosen = []
    for h in range(HEADS):
        of_key = bias[0, h // 2].numpy()
        chosen.append([set(best({m: float(of_key[m]) for m in range(t + 1)}, 5)) for t in range(tokens)])
    of_pairs = np.broadcast_to(bias[0].numpy()[:, None, :], (KV_HEADS, tokens, tokens))
    check("dma", tokens, spread(chosen, 1, 1, tokens), of_pairs, params={"n": 5}, bias=bias)


def test_token_select() -> None:
    tokens, first, near, n = 30, 2, 4, 3
    q, k, _ = call(tokens)
    rows = []
    for t in range(tokens):
        free = list(range(first, t - near + 1))
        votes = np.zeros(len(free))
        for h in range(HEADS if free else 0):
            votes += softmax(k[0, h // 2].numpy()[free] @ q[0, h, t].numpy() / DIM**0.5)
        always = {m for m in range(t + 1) if m < first or t - m < near}
        rows.append(always | set(best({m: float(x) for m, x in zip(free, votes, strict=True)}, n)))
    check("token_select", tokens, spread([rows] * HEADS, 1, 1, tokens), params={"first": first, "near": near, "n": n})


def test_long_heads() -> None:
    tokens = 256 * 5
    ck = torch.randn(1, KV_HEADS, 5, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, _ = call(tokens)
    attn = attndsl.compile(EXAMPLES / "long_heads.attn", n=4)
    plan = attn.plan(q, k, ck=ck)["top"]
    for h, t in ((0, 100), (1, 600), (3, 900), (2, 1279), (0, 1024)):
        own = t // 256
        always = {0, own, max(0, own - 1)}
        rest = {m: float(ck[0, h // 2, m] @ q[0, h, t]) for m in range(own + 1) if m not in always}
        assert set(plan[0, h, t][plan[0, h, t] >= 0].tolist()) == always | set(best(rest, 4 - len(always)))


def test_regions() -> None:
    q, k, _ = call(60)
    chosen = []
    for h in range(HEADS):
        x, y = ([b.mean(0) for b in blocks_of(t, 9)] for t in (q[0, h], k[0, h // 2]))
        chosen.append([set(best({m: float(x[r] @ y[m]) for m in range(7)}, 2)) for r in range(7)])
    check("regions", 60, spread(chosen, 9, 9, 60, causal=False), params={"region": 9, "n": 2})


def test_nsa() -> None:
    tokens, block = 40, 8
    q, k, v = call(tokens)
    gate = torch.rand(1, HEADS, tokens, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attn = attndsl.compile(EXAMPLES / "nsa.attn", block=block, n=2, span=6)
    out = attn(q, k, v, gate=gate)
    means = [np.stack([b.mean(0) for b in blocks_of(k[0, g], block)]) for g in range(KV_HEADS)]
    values = [np.stack([b.mean(0) for b in blocks_of(v[0, g], block)]) for g in range(KV_HEADS)]
    summary, chosen = np.zeros((HEADS, tokens, DIM)), [[set[int]() for _ in range(tokens)] for _ in range(HEADS)]
    for t in range(tokens):
        finished, own = (t + 1) // block, t // block
        for g in range(KV_HEADS):
            votes = np.zeros(5)
            for h in (2 * g, 2 * g + 1):
                if finished:
                    share = softmax(means[g][:finished] @ q[0, h, t].numpy() / DIM**0.5)
                    summary[h, t] = share @ values[g][:finished]
                    votes[:finished] += share
            for h in (2 * g, 2 * g + 1):
                chosen[h][t] = {own, *best({m: float(votes[m]) for m in range(own)}, 1)}
    routed = dense(q, k, v, spread(chosen, 1, block, tokens))
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    near = dense(q, k, v, np.broadcast_to((distance >= 0) & (distance < 6), (HEADS, tokens, tokens)))
    weights = gate[0].numpy()
    wanted = weights[..., :1] * summary + weights[..., 1:2] * routed + weights[..., 2:] * near
    np.testing.assert_allclose(out[0].numpy(), wanted, atol=1e-9)
