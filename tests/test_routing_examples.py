"""The trainable routing systems among the examples: choice, output and gradients are those of their published rules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import attndsl
from tests import routing_rules as rules
from tests.covered import covers
from tests.grid_rules import cells
from tests.routing_rules import DIM, HEADS, KV_HEADS, SHARE, by_choice, call, check, noise

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
RAGGED = (1, 9, 40, 45)


@covers("moba")
@pytest.mark.parametrize("tokens", RAGGED)
def test_moba(tokens: int) -> None:
    q, k, v = call(tokens)
    by_choice("moba", [q, k, v], rules.moba(q, k, 8, 3), 1, 8, params={"block": 8, "n": 3})


@covers("flash_moba")
@pytest.mark.parametrize("tokens", RAGGED)
def test_flash_moba(tokens: int) -> None:
    q, k, v = call(tokens)
    kr = noise(1, KV_HEADS, tokens, DIM)
    by_choice("flash_moba", [q, k, v], rules.moba(q, kr, 8, 3), 1, 8, params={"block": 8, "n": 3}, kr=kr)


@covers("vmoba")
@pytest.mark.parametrize("tokens", RAGGED)
def test_vmoba(tokens: int) -> None:
    q, k, v = call(tokens)
    chosen, params = rules.vmoba(q, k, 8, 0.6), {"block": 8, "share": 0.6}
    assert tokens < 40 or {len(row) for heads in chosen for row in heads} >= {2, 3}
    by_choice("vmoba", [q, k, v], chosen, 1, 8, causal=False, params=params)


@covers("nsa")
@pytest.mark.parametrize("tokens", [1, 8, 40, 45])
def test_nsa(tokens: int) -> None:
    block, n = 8, 2
    q, k, v = call(tokens)
    i, j = rules.pairs(tokens)
    routed = rules.spread(rules.nsa(q, k, block, n), 1, block, tokens)
    near = np.broadcast_to((i - j >= 0) & (i - j < 6), routed.shape)
    ends = np.arange(-(-tokens // block)) * block + block
    finished_entries = np.broadcast_to(ends <= i + 1, (HEADS, tokens, len(ends)))

    def formula(q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        summary = rules.attend(q, rules.pooled(k, block), rules.pooled(v, block), finished_entries)
        gate = given["gate"]
        parts = (summary, rules.attend(q, k, v, routed), rules.attend(q, k, v, near))
        return sum((gate[..., i : i + 1] * part for i, part in enumerate(parts)), torch.zeros_like(q))

    params = {"block": block, "n": n, "span": 6}
    check("nsa", [q, k, v], formula, params, ("gate",), gate=noise(1, HEADS, tokens, 3))


@covers("dsa")
@pytest.mark.parametrize("tokens", [1, 30, 33])
def test_dsa(tokens: int) -> None:
    index = noise(1, tokens, tokens)
    chosen = [rules.by_score(index[0].numpy(), 5)] * HEADS
    by_choice("dsa", call(tokens), chosen, 1, 1, params={"n": 5}, index=index)


@covers("dma")
@pytest.mark.parametrize("tokens", [1, 30, 33])
def test_dma(tokens: int) -> None:
    """The bias that ranks keys joins the logits, and learns through them."""
    bias = noise(1, KV_HEADS, tokens)
    scores = [np.broadcast_to(bias[0, h // SHARE].numpy(), (tokens, tokens)) for h in range(HEADS)]
    allowed = rules.spread([rules.by_score(score, 5) for score in scores], 1, 1, tokens)

    def formula(q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        return rules.attend(q, k, v, allowed, given["bias"].repeat_interleave(SHARE, dim=1)[:, :, None, :])

    check("dma", call(tokens), formula, {"n": 5}, ("bias",), bias=bias)


@covers("seer")
@pytest.mark.parametrize("tokens", [1, 130, 200])
def test_seer(tokens: int) -> None:
    blocks = -(-tokens // 64)
    gate = 4 * noise(1, HEADS, blocks, blocks)
    by_choice("seer", call(tokens), rules.seer(gate[0].numpy()), 64, 64, gate=gate)


@covers("regions")
@pytest.mark.parametrize("tokens", [1, 54, 60])
def test_regions(tokens: int) -> None:
    q, k, v = call(tokens)
    chosen = rules.block_means(q, k, 9, 2, causal=False)
    by_choice("regions", [q, k, v], chosen, 9, 9, causal=False, params={"region": 9, "n": 2})


def in_tiles(tokens: int, sizes: tuple[int, ...], tile: tuple[int, ...]) -> NDArray[np.int64]:
    """The tile of each token, numbered line by line."""
    place = cells(tokens, sizes) // tile
    wide = [-(-size // t) for size, t in zip(sizes, tile[1:], strict=True)]
    return np.array([np.ravel_multi_index(at[1:], wide) + at[0] * int(np.prod(wide)) for at in place])


@covers("biformer")
@pytest.mark.parametrize("tokens", [1, 48, 53])
def test_biformer(tokens: int) -> None:
    q, k, v = call(tokens)
    tile = in_tiles(tokens, (8,), (3, 3))
    # The last line of regions may have fewer than it is wide: those that are there are candidates.
    there = sorted(set(tile.tolist()))
    queries, keys = rules.numbers(q, k)
    allowed = np.zeros((HEADS, tokens, tokens), bool)
    for h in range(HEADS):
        x, y = ({m: of[tile == m].mean(0) for m in there} for of in (queries[h], keys[h // SHARE]))
        for r in there:
            taken = rules.best({m: float(x[r] @ y[m]) for m in there}, 2)
            allowed[h] |= (tile == r)[:, None] & np.isin(tile, taken)
    params = {"n": 2, "region": 3, "width": 8}
    check("biformer", [q, k, v], lambda q, k, v, _: rules.attend(q, k, v, allowed), params)


@covers("vmoba_video")
@pytest.mark.parametrize("tokens", [1, 60, 67])
def test_vmoba_video(tokens: int) -> None:
    q, k, v = call(tokens)
    tile = in_tiles(tokens, (3, 5), (2, 2, 2))
    there, share = sorted(set(tile.tolist())), 0.6
    queries, keys = rules.numbers(q, k)
    allowed = np.zeros((HEADS, tokens, tokens), bool)
    for h in range(HEADS):
        y = np.stack([keys[h // SHARE][tile == m].mean(0) for m in there])
        for t in range(tokens):
            gate, own = y @ queries[h, t], there.index(tile[t])
            gate = (gate - gate.min()) / (np.ptp(gate) or 1.0)
            taken, sofar = {own}, gate[own]
            for m in rules.best({m: float(x) for m, x in enumerate(gate) if m != own}, len(gate)):
                if len(taken) > 1 and sofar >= share * gate.sum():
                    break
                taken.add(m)
                sofar += gate[m]
            allowed[h, t] = np.isin(tile, [there[m] for m in taken])
    params = {"share": share, "tile_t": 2, "tile": 2, "height": 3, "width": 5}
    check("vmoba_video", [q, k, v], lambda q, k, v, _: rules.attend(q, k, v, allowed), params)


@covers("routing_transformer")
@pytest.mark.parametrize("tokens", [12, 30, 35])
def test_routing_transformer(tokens: int) -> None:
    """As its code has it: every centroid gathers its best tokens in order, and a token's output is the mean of what it
    gets from the centroids that took it, 0 if none did."""
    size, centroids = 6, 4
    q, k, v = call(tokens)
    near = noise(HEADS, centroids, tokens).numpy()
    taken = np.sort(np.argsort(-near, axis=-1, kind="stable")[..., :size], axis=-1)
    places = torch.from_numpy(taken.reshape(1, HEADS, -1, 1))

    def gather(x: Tensor) -> Tensor:
        x = x.repeat_interleave(HEADS // x.shape[1], dim=1)
        return x.gather(2, places.expand(-1, -1, -1, DIM))

    attn = attndsl.compile(rules.EXAMPLES / "routing_transformer.attn", size=size)
    here, there = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    index = places.expand(-1, -1, -1, DIM)
    times = torch.zeros(1, HEADS, tokens, 1, dtype=q.dtype).scatter_add(2, places, torch.ones_like(places).double())
    summed = torch.zeros_like(q).scatter_add(2, index, attn(*map(gather, here)))
    out = summed / times.clamp(min=1)
    # Row by row, over the centroids that took the token.
    wanted = []
    for h in range(HEADS):
        for t in range(tokens):
            found = []
            for members in taken[h]:
                if t in members:
                    sees = torch.from_numpy(members[members <= t])
                    x, y = there[1][0, h // SHARE, sees], there[2][0, h // SHARE, sees]
                    found.append((x @ there[0][0, h, t] / DIM**0.5).softmax(0) @ y)
            wanted.append(torch.stack(found).mean(0) if found else torch.zeros(DIM, dtype=q.dtype))
    expected = torch.stack(wanted).view(1, HEADS, tokens, DIM)
    torch.testing.assert_close(out, expected)
    passed = noise(*out.shape)
    for x, y in zip(torch.autograd.grad(out, here, passed), torch.autograd.grad(expected, there, passed), strict=True):
        torch.testing.assert_close(x, y)


@covers("cca")
@pytest.mark.parametrize("tokens", [1, 45, 80])
def test_cca(tokens: int) -> None:
    """Groups of 16, merged by the weights of their last query; near ones token by token; one softmax."""
    groups, near = -(-tokens // 16), 2
    i, j = rules.pairs(tokens)
    shape = (HEADS, tokens, -1)
    raw = np.broadcast_to((j <= i) & (i // 16 - j // 16 < near), (HEADS, tokens, tokens))
    far = np.broadcast_to(i // 16 - np.arange(groups)[None, :] >= near, (HEADS, tokens, groups)).reshape(shape)
    q, k, v = call(tokens)

    def core(x: Tensor, k: Tensor) -> Tensor:
        found = []
        for first in range(0, tokens, 16):
            of = slice(first, min(first + 16, tokens))
            last = q[:, ::SHARE, of][:, :, -1:]
            found.append((last @ k[:, :, of].mT / DIM**0.5).softmax(-1) @ x[:, :, of])
        return torch.cat(found, -2)

    def formula(q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        keys, values = torch.cat([k, given["kc"]], -2), torch.cat([v, given["vc"]], -2)
        return rules.attend(q, keys, values, np.concatenate([raw, far], -1))

    check("cca", [q, k, v], formula, {"near": near}, kc=core(k, k), vc=core(v, k))
