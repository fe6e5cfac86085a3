"""What published systems choose, written again in plain numpy, and dense attention to it in torch, float64.

A rule gives the members chosen for each row class of each head. It is written from the paper or the reference code,
never from the program: with loops over rows, in the terms of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import attndsl

EXAMPLES = Path(__file__).parent.parent / "examples" / "patterns"
Array = NDArray[np.float64]
Pairs = NDArray[np.bool_]
# For each query head and row class the members that it takes.
Chosen = list[list[set[int]]]
# Attention from q, k, v and the inputs.
Formula = Callable[[Tensor, Tensor, Tensor, Mapping[str, Any]], Tensor]
HEADS, KV_HEADS, DIM = 4, 2, 8
SHARE = HEADS // KV_HEADS


def call(tokens: int, rows: int | None = None, seed: int = 0) -> list[Tensor]:
    """float64 q [1, HEADS, rows, DIM], k and v [1, KV_HEADS, tokens, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, rows or tokens), (KV_HEADS, tokens), (KV_HEADS, tokens))
    return [torch.randn(1, *size, DIM, generator=generator, dtype=torch.float64) for size in sizes]


def noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Pairs, added: Tensor | float = 0.0) -> Tensor:
    """Softmax attention over the pairs allowed [Hq, rows, keys]; rows that see nothing are 0."""
    seen = torch.from_numpy(np.ascontiguousarray(allowed))
    k, v = (x.repeat_interleave(SHARE, dim=1) for x in (k, v))
    logits = (q @ k.mT / DIM**0.5 + added).masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    out: Tensor = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ v
    return out


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of blocks [.., tokens, D], of the last one over the tokens that it has."""
    blocks = [x[..., i : i + size, :].mean(-2) for i in range(0, x.shape[-2], size)]
    return torch.stack(blocks, -2)


def pairs(tokens: int, rows: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of queries, a column, and of keys, a row."""
    rows = rows or tokens
    return np.arange(tokens - rows, tokens)[:, None], np.arange(tokens)[None, :]


def spread(chosen: Chosen, rows: int, keys: int, tokens: int, causal: bool = True) -> Pairs:
    """The pairs of the members chosen for row classes of `rows` rows."""
    q, k = pairs(tokens)
    taken = np.zeros((HEADS, -(-tokens // rows), -(-tokens // keys)), np.bool_)
    for h, classes in enumerate(chosen):
        for r, members in enumerate(classes):
            taken[h, r, sorted(members)] = True
    found = taken[:, q // rows, k // keys]
    return found & (k <= q) if causal else found


def check(
    name: str,
    qkv: list[Tensor],
    formula: Formula,
    params: Mapping[str, Any] | None = None,
    learned: tuple[str, ...] = (),
    **inputs: Any,
) -> None:
    """An example's output and gradients are the formula's, and its output the oracle's."""
    attn = attndsl.compile(EXAMPLES / f"{name}.attn", **(params or {}))
    results = []
    ours: Formula = lambda q, k, v, given: attn(q, k, v, **given)  # noqa: E731
    for run in (ours, formula):
        leaves = [x.clone().requires_grad_() for x in qkv]
        given = {key: x.clone().requires_grad_(key in learned) for key, x in inputs.items()}
        q, k, v = leaves
        out = run(q, k, v, given)
        passed = noise(*out.shape, seed=7)
        asked = [*leaves, *(given[key] for key in learned)]
        results.append([out.detach(), *torch.autograd.grad(out, asked, passed, materialize_grads=True)])
    for what, found, wanted in zip(("out", *"qkv", *learned), *results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9, msg=lambda m: f"{name}, {what}: {m}")  # noqa: B023
    torch.testing.assert_close(results[0][0], attn.reference(qkv[0], qkv[1], qkv[2], **inputs), atol=1e-10, rtol=1e-10)


def by_choice(
    name: str, qkv: list[Tensor], chosen: Chosen, rows: int, keys: int, causal: bool = True,
    params: Mapping[str, Any] | None = None, **inputs: Any,
) -> None:  # fmt: skip
    """An example attends to what is chosen."""
    allowed = spread(chosen, rows, keys, qkv[1].shape[2], causal)
    check(name, qkv, lambda q, k, v, _: attend(q, k, v, allowed), params, **inputs)


# ---------------------------------------------------------------------------------------- choices


def softmax(x: Array) -> Array:
    mass = np.exp(x - x.max())
    return np.asarray(mass / mass.sum())


def best(scores: Mapping[int, float], n: int) -> list[int]:
    """The n greatest, the lower index first among equals."""
    return sorted(scores, key=lambda m: (-scores[m], m))[: max(0, n)]


def means(x: Array, size: int) -> list[Array]:
    return [x[i : i + size].mean(0) for i in range(0, len(x), size)]


def numbers(*tensors: Tensor) -> list[Array]:
    """[heads, tokens, D] of the only batch entry."""
    return [x[0].numpy() for x in tensors]


def for_heads(choose: Callable[[int, int], list[set[int]]]) -> Chosen:
    """A choice made for each head by itself: from its number, and that of its keys."""
    return [choose(h, h // SHARE) for h in range(HEADS)]


def moba(q: Tensor, k: Tensor, block: int, n: int) -> Chosen:
    """The own block inside n; the others are finished blocks."""
    queries, keys = numbers(q, k)

    def choose(h: int, g: int) -> list[set[int]]:
        gates, rows = means(keys[g], block), list[set[int]]()
        for t, x in enumerate(queries[h]):
            own = t // block
            rows.append({own, *best({m: float(gates[m] @ x) for m in range(own)}, n - 1)})
        return rows

    return for_heads(choose)


def nsa(q: Tensor, k: Tensor, block: int, n: int) -> Chosen:
    """The own block inside n; finished blocks by their probabilities added up over the heads of a group."""
    queries, keys = numbers(q, k)
    chosen: Chosen = [[] for _ in range(HEADS)]
    for t in range(queries[0].shape[0]):
        finished, own = (t + 1) // block, t // block
        for g in range(KV_HEADS):
            heads = range(g * SHARE, (g + 1) * SHARE)
            votes = np.zeros(own + 1)
            for h in heads if finished else ():
                entries = np.stack(means(keys[g], block)[:finished])
                votes[:finished] += softmax(entries @ queries[h][t] / DIM**0.5)
            for h in heads:
                chosen[h].append({own, *best({m: float(votes[m]) for m in range(own)}, n - 1)})
    return chosen


def vmoba(q: Tensor, k: Tensor, block: int, share: float) -> Chosen:
    """Scope of one query: the own block is credited, then the best others until their part of the sum is reached; the
    one that reaches it is in, and one is always taken."""
    queries, keys = numbers(q, k)

    def choose(h: int, g: int) -> list[set[int]]:
        gates, rows = np.stack(means(keys[g], block)), list[set[int]]()
        for t, x in enumerate(queries[h]):
            own, gate = t // block, gates @ x
            width = gate.max() - gate.min()
            gate = (gate - gate.min()) / (width if width > 1e-6 else 1.0)
            missing = max(0.0, share - gate[own] / max(gate.sum(), 1e-300))
            taken, sofar = {own}, 0.0
            for m in best({m: float(x) for m, x in enumerate(gate) if m != own}, len(gate)):
                taken.add(m)
                sofar += gate[m] / gate.sum()
                if sofar >= missing:
                    break
            rows.append(taken)
        return rows

    return for_heads(choose)


def quest(q: Tensor, k: Tensor, page: int, n: int) -> Chosen:
    queries, keys = numbers(q, k)

    def choose(h: int, g: int) -> list[set[int]]:
        pages = [keys[g][i : i + page] for i in range(0, len(keys[g]), page)]
        rows = list[set[int]]()
        for t, x in enumerate(queries[h], len(keys[g]) - len(queries[h])):
            bound = {m: float(np.maximum(x * p.min(0), x * p.max(0)).sum()) for m, p in enumerate(pages)}
            rows.append(set(best({m: s for m, s in bound.items() if m * page <= t}, n)))
        return rows

    return for_heads(choose)


def seer(gate: Array) -> Chosen:
    """From the gate's logits [H, R, M]."""

    def choose(h: int, g: int) -> list[set[int]]:
        shares = [softmax(gate[h, r, : r + 1]) for r in range(gate.shape[1])]
        return [{r, *(m for m, x in enumerate(share) if x >= 0.002)} for r, share in enumerate(shares)]

    return for_heads(choose)


def xattention(q: Tensor, k: Tensor, size: int, stride: int, tau: float) -> Chosen:
    """Sums along antidiagonals of stride x stride, softmax over these, and only then sums over blocks."""
    queries, keys = (np.pad(x, ((0, 0), (0, -x.shape[1] % stride), (0, 0))) for x in numbers(q, k))
    groups, of = queries.shape[1] // stride, size // stride

    def choose(h: int, g: int) -> list[set[int]]:
        logits = np.full((groups, groups), -np.inf)
        for i in range(groups):
            for j in range(i + 1):
                x, y = queries[h][i * stride : (i + 1) * stride], keys[g][j * stride : (j + 1) * stride]
                logits[i, j] = float((x * y[::-1]).sum()) / stride / DIM**0.5
        mass, rows = np.stack([softmax(row) for row in logits]), list[set[int]]()
        for r in range(-(-groups // of)):
            of_groups = mass[r * of : (r + 1) * of].sum(0)
            share = [float(of_groups[m * of : (m + 1) * of].sum()) for m in range(r + 1)]
            kept = {0, r}
            for m in best({m: share[m] for m in range(r + 1) if m not in kept}, r):
                if sum(share[x] for x in kept) < tau * sum(share):
                    kept.add(m)
            rows.append(kept)
        return rows

    return for_heads(choose)


def block_means(q: Tensor, k: Tensor, block: int, n: int | Iterable[int], causal: bool = True) -> Chosen:
    """The n best blocks for a block of queries by the products of their means, nothing forced."""
    queries, keys = numbers(q, k)
    counts = [n] * HEADS if isinstance(n, int) else list(n)

    def choose(h: int, g: int) -> list[set[int]]:
        x, y = means(queries[h], block), means(keys[g], block)
        last = [r + 1 if causal else len(y) for r in range(len(x))]
        return [set(best({m: float(x[r] @ y[m]) for m in range(last[r])}, counts[h])) for r in range(len(x))]

    return for_heads(choose)


def sparge(q: Tensor, k: Tensor, fixed_q: Pairs, fixed_k: Pairs, p: float = 0.98) -> Chosen:
    """Rows in blocks of 128, keys in blocks of 64; what is fixed stays out of the softmax; what crosses p is out."""
    queries, keys = numbers(q, k)
    tokens = keys.shape[1]

    def choose(h: int, g: int) -> list[set[int]]:
        x, y, rows = means(queries[h], 128), means(keys[g], 64), list[set[int]]()
        for r in range(len(x)):
            seen = [m for m in range(len(y)) if m * 64 <= min(r * 128 + 127, tokens - 1)]
            kept = {m for m in seen if fixed_q[h, r] or fixed_k[g, m]}
            rest = [m for m in seen if m not in kept]
            shares = softmax(np.array([x[r] @ y[m] / DIM**0.5 for m in rest])) if rest else np.zeros(0)
            ahead = 0.0
            for m in best(dict(zip(rest, shares.tolist(), strict=True)), len(rest)):
                ahead += float(shares[rest.index(m)])
                if ahead <= p:
                    kept.add(m)
            rows.append(kept)
        return rows

    return for_heads(choose)


def by_score(score: Array, n: int, causal: bool = True) -> list[set[int]]:
    """For each row of [rows, tokens] the n best tokens."""
    rows, tokens = score.shape
    last = [t + 1 if causal else tokens for t in range(tokens - rows, tokens)]
    return [set(best({m: float(score[i, m]) for m in range(last[i])}, n)) for i in range(rows)]
