"""Systems whose members are no blocks in a row: choice, output and gradients are those of their published rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import routing_rules as rules
from tests.covered import covers
from tests.routing_rules import DIM, HEADS, SHARE, call, check

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")


@covers("vertical_slash")
@pytest.mark.parametrize("tokens", [1, 9, 60])
def test_vertical_slash(tokens: int) -> None:
    """Jiang et al. 2024, algorithm 2: the softmax of the last queries, summed vertically and along diagonals."""
    columns, slashes, probe, sinks, near = 6, 9, 8, 2, 3
    q, k, v = call(tokens)
    place = np.arange(tokens)
    lag = place[:, None] - place
    allowed = np.zeros((HEADS, tokens, tokens), np.bool_)
    for h in range(HEADS):
        logits = np.where(lag >= 0, (q[0, h] @ k[0, h // SHARE].T).numpy() / DIM**0.5, -np.inf)[-probe:]
        mass = np.exp(logits - logits.max(1, keepdims=True))
        mass /= mass.sum(1, keepdims=True)
        vertical, slash = mass.sum(0), np.array([mass[lag[-probe:] == d].sum() for d in place])
        vertical[:sinks], slash[:near] = np.inf, np.inf
        kept = np.argsort(-vertical, kind="stable")[:columns], np.argsort(-slash, kind="stable")[:slashes]
        allowed[h] = (lag >= 0) & (np.isin(place, kept[0]) | np.isin(lag, kept[1]))
    params = {"columns": columns, "slashes": slashes, "probe": probe, "sinks": sinks, "near": near}
    check("vertical_slash", [q, k, v], lambda q, k, v, _: rules.attend(q, k, v, allowed), params=params)


@covers("pbs")
@pytest.mark.parametrize("tokens", [1, 16, 75])
def test_pbs(tokens: int) -> None:
    """Wang et al. 2025: blocks of permuted keys by the softmax of their means' products, until they cover a share."""
    segment, block, share = 16, 8, 0.7
    q, k, v = call(tokens)
    draw = np.random.default_rng(tokens)
    pi = np.empty((HEADS, tokens), np.int64)
    for first in range(0, tokens, segment):
        count = min(segment, tokens - first)
        for h in range(HEADS):
            pi[h, first : first + count] = first + draw.permutation(count)
    place, blocks = np.arange(tokens), -(-tokens // block)
    own = (place[:, None] >= place) & (place[:, None] // segment == place // segment)
    earlier = place[:, None] // segment > place // segment
    allowed = np.repeat(own[None], HEADS, 0)
    for h in range(HEADS):
        inverse = np.argsort(pi[h])
        keys = [inverse[m * block : (m + 1) * block] for m in range(blocks)]
        means = np.stack([k[0, h // SHARE, x].mean(0).numpy() for x in keys])
        for r in range(blocks):
            rows = place[r * block : (r + 1) * block]
            candidates = [m for m in range(blocks) if earlier[np.ix_(rows, keys[m])].any()]
            if not candidates:
                continue
            logits = means[candidates] @ q[0, h, rows].mean(0).numpy() / DIM**0.5
            mass = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            kept, covered = {pi[h, 0] // block}, 0.0
            for i in np.argsort(-mass, kind="stable"):
                if covered >= share:
                    break
                kept.add(candidates[i])
                covered += mass[i]
            for m in kept:
                allowed[h][np.ix_(rows, keys[m])] |= earlier[np.ix_(rows, keys[m])]
    params = {"segment": segment, "block": block, "share": share}
    check(
        "pbs",
        [q, k, v],
        lambda q, k, v, _: rules.attend(q, k, v, allowed),
        params=params,
        pi=torch.from_numpy(pi)[None],
    )
