"""The example patterns of language models, each against a rule in plain numpy, and its scores in plain torch.

Nothing here comes from the language: masks are `tests/rules.py`'s, written from the papers and their code, and what
becomes of scores is dense torch in float64, which differentiates it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import attndsl
from attndsl.api import load_attention
from tests import rules
from tests.covered import covers
from tests.rules import BATCH, HEADS, KV_HEADS, Pairs, shape_of

Array = NDArray[Any]
Data = dict[str, Array]
EXAMPLES = Path(__file__).parent.parent / "examples" / "patterns"
DIM = 16


def softmax(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """Rows that see nothing are 0."""
    return s.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0) @ v


def scored(change: Callable[[Tensor, Pairs, Mapping[str, Tensor]], Tensor]) -> Any:
    def attend(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], p: Pairs) -> Tensor:
        return softmax(change(s, p, given), v, seen, given)

    return attend


def plain(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], p: Pairs) -> Tensor:
    return softmax(s, v, seen, given)


def with_sink(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], p: Pairs) -> Tensor:
    weights = s.masked_fill(~seen, -torch.inf).exp()
    return weights @ v / (weights.sum(-1, keepdim=True) + given["sinks"].view(1, -1, 1, 1).exp())


def gated(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], p: Pairs) -> Tensor:
    return softmax(s, v, seen, given) * torch.sigmoid(given["gate"])


def affine(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], p: Pairs) -> Tensor:
    total = seen.to(v.dtype) @ v
    return given["alpha"][..., None] * softmax(s, v, seen, given) + given["beta"][..., None] * total


def sigmoid(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], p: Pairs) -> Tensor:
    return torch.sigmoid(s - 2.0).masked_fill(~seen, 0.0) @ v


def stochastic(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], p: Pairs) -> Tensor:
    """A window of 6 by position, and one by place in the other order; the future of neither."""
    place = p.data["pi"].astype(np.int64)
    distance = place[p.q[0, 0]] - place[p.k[0, 0]]
    near = seen & torch.from_numpy(p.q - p.k < 6)
    mixed = seen & torch.from_numpy((distance >= 0) & (distance < 6))
    gate = given["gate"][..., None]
    return gate * softmax(s, v, mixed, given) + (1 - gate) * softmax(s, v, near, given)


def alibi(s: Tensor, p: Pairs, given: Mapping[str, Tensor]) -> Tensor:
    penalty: Tensor = torch.from_numpy(2.0 ** (-8 * (p.h + 1) / HEADS) * (p.q - p.k))
    return s - penalty


def t5(s: Tensor, p: Pairs, given: Mapping[str, Tensor]) -> Tensor:
    bucket = np.vectorize(rules.t5_bucket)(p.k - p.q)[0, 0]
    scores: Tensor = s * DIM**0.5
    return scores + given["bias"][:, torch.from_numpy(bucket)]


def softcap(s: Tensor, p: Pairs, given: Mapping[str, Tensor]) -> Tensor:
    return 50.0 * torch.tanh(s / 50.0)


def everything(p: Pairs) -> Array:
    return np.ones((1, 1, 1, 1), bool)


def causal(p: Pairs) -> Array:
    return p.causal


def rat(p: Pairs) -> Array:
    """The own state, and the last one of every chunk of 5 that ended before."""
    return np.asarray((p.k == p.q) | (p.k < p.q) & np.isin(p.k, np.arange(4, p.n, 5)))


def window_of_6(p: Pairs) -> Array:
    return p.causally(p.q - p.k < 6)


def longformer(p: Pairs) -> Array:
    """Window by window, two keys to each side; the last head's are three tokens apart."""
    seen = np.zeros((1, HEADS, p.shape.rows, p.n), bool)
    for h, row in np.ndindex(HEADS, p.shape.rows):
        step = 3 if h == HEADS - 1 else 1
        for k in (int(p.q[0, 0, row, 0]) + step * i for i in range(-2, 3)):
            if 0 <= k < p.n:
                seen[0, h, row, k] = True
    at_q, at_k = p.of_token("flag")
    return np.asarray(seen | at_q | at_k)


def floats(**sizes: tuple[str, ...]) -> Callable[[np.random.Generator, int, int], Data]:
    """Random float inputs: of heads, rows and so on."""

    def make(rng: np.random.Generator, n: int, rows: int) -> Data:
        known = {"b": BATCH, "h": HEADS, "q": rows, "d": DIM}
        return {name: rng.standard_normal([known[x] for x in dims]) for name, dims in sizes.items()}

    return make


@dataclass(frozen=True)
class Example:
    rule: Callable[[Pairs], Array]
    params: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[np.random.Generator, int, int], Data] = lambda rng, n, rows: {}
    attend: Callable[..., Tensor] = plain
    learned: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (1, 17, 61, 130)


KNOWN: dict[str, Example] = {
    "streaming": Example(rules.streaming, {"span": 6, "sinks": 2}),
    "minference_a_shape": Example(rules.streaming, {"span": 6, "sinks": 2}),
    "block_causal": Example(rules.block_diffusion_inference, {"size": 5}),
    "rat": Example(rat, {"size": 5}),
    "duo": Example(rules.duo, {"sinks": 3, "span": 5}, lambda rng, n, rows: {"full": np.array([True, False])}),
    "moa": Example(
        rules.moa_formula, {"alpha": [-3, 4, 9, 0], "beta": [128, 0, 256, 640], "block": 4, "least": 8}
    ),
    "power": Example(rules.power_attention, {"block": 2, "near": 3}),
    "s2": Example(rules.s2, {"block": 3, "near": 2, "v": 4, "off": 1, "dense": 1}),
    "longlora": Example(rules.longlora, {"group": 6}),
    "dilated": Example(rules.strided_transformer, {"span": 3, "step": 5}),
    "fixed": Example(rules.fixed_transformer, {"segment": 6, "summary": 2}),
    "longformer": Example(
        longformer, {"reach": 2, "dilation": 3, "far": 1},
        lambda rng, n, rows: {"flag": rng.random((BATCH, n)) < 0.15},
    ),
    "prefix": Example(rules.prefix_lm, data=lambda rng, n, rows: {"P": np.array([0, n // 2], np.int32)}),
    "alibi": Example(causal, attend=scored(alibi)),
    "t5": Example(
        everything, attend=scored(t5), learned=("bias",),
        data=lambda rng, n, rows: {
            "bucket": np.array([rules.t5_bucket(x) for x in range(-128, 129)], np.int32),
            "bias": rng.standard_normal((HEADS, 32)),
        },
    ),
    "softcap": Example(window_of_6, {"span": 6}, attend=scored(softcap)),
    "sink": Example(window_of_6, {"span": 6}, floats(sinks=("h",)), with_sink, ("sinks",)),
    "sigmoid": Example(causal, {"bias": -2.0}, attend=sigmoid),
    "gated": Example(causal, {}, floats(gate=("b", "h", "q", "d")), gated, ("gate",)),
    "affine_scaled": Example(
        causal, {}, floats(alpha=("b", "h", "q"), beta=("b", "h", "q")), affine, ("alpha", "beta")
    ),
    "stochastic": Example(
        causal, {"span": 6}, lambda rng, n, rows: {
            "pi": rng.permutation(n).astype(np.int32),
            "gate": rng.standard_normal((BATCH, HEADS, rows)),
        },
        stochastic, ("gate",),
    ),
}  # fmt: skip


@covers(*KNOWN)
@pytest.mark.parametrize("name", KNOWN)
def test_forward_and_backward(name: str) -> None:
    example = KNOWN[name]
    attn = attndsl.compile(EXAMPLES / f"{name}.attn", **example.params)
    for n in example.lengths:
        for rows in sorted({n, max(1, n // 3)}):
            rng = np.random.default_rng(n)
            data = example.data(rng, n, rows)
            p = Pairs(shape_of(n, rows, DIM), data)
            seen = torch.from_numpy(np.broadcast_to(example.rule(p), (BATCH, HEADS, rows, n)).copy())
            sizes = ((HEADS, rows), (KV_HEADS, n), (KV_HEADS, n))
            qkv = [torch.from_numpy(rng.standard_normal((BATCH, heads, size, DIM))) for heads, size in sizes]
            tensors = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in data.items()}
            found = gradients(lambda q, k, v, given: attn(q, k, v, **given), qkv, tensors, example.learned)

            def dense(q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Tensor]) -> Tensor:
                k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
                return example.attend(q @ k.mT / DIM**0.5, v, seen, given, p)  # noqa: B023

            for x, y in zip(found, gradients(dense, qkv, tensors, example.learned), strict=True):
                torch.testing.assert_close(x, torch.nan_to_num(y), msg=lambda m: f"{name} of {rows} x {n}: {m}")  # noqa: B023


def gradients(
    attend: Callable[..., Tensor], qkv: list[Tensor], given: Mapping[str, Tensor], learned: tuple[str, ...]
) -> list[Tensor]:
    """The output, and the gradients of q, k, v and of what is learned, for one random gradient of the output."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    tensors = {name: x.clone().requires_grad_(name in learned) for name, x in given.items()}
    out = attend(*leaves, tensors)
    passed = torch.from_numpy(np.random.default_rng(1).standard_normal(out.shape))
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *(tensors[name] for name in learned)], passed)]


@covers("bigbird")
@pytest.mark.parametrize(("n", "block", "draws"), [(1, 4, 3), (61, 4, 2), (130, 16, 3)])
def test_bigbird(n: int, block: int, draws: int) -> None:
    """What is drawn is ours to choose: everything else is fixed, and how much is drawn."""
    # The last block stands where the sequence ends, which `compile` warns of.
    attn = load_attention(EXAMPLES / "bigbird.attn", block=block, draws=draws)
    seen = attn.mask(n, n, heads=HEADS)
    blocks = -(-n // block)
    of_row, of_key = (np.arange(n) // block for _ in range(2))
    last, i, j = blocks - 1, of_row[:, None], of_key[None, :]
    fixed = (abs(i - j) <= 1) | (i == 0) | (j == 0) | (i == last) | (j == last)
    assert np.all(seen | ~fixed)
    drawn = seen & ~fixed
    for h in range(HEADS):
        for row in range(n):
            chosen = {int(x) for x in of_key[drawn[h, row]]}
            assert len(chosen) <= draws
            assert all(drawn[h, row][of_key == x].all() for x in chosen), "whole blocks"
            assert np.array_equal(drawn[h, row], drawn[h, row // block * block]), "one draw a block of rows"
    if blocks > 8:
        assert len({drawn[h].tobytes() for h in range(HEADS)}) == HEADS, "others for each head"
    q, k, v = (torch.randn(1, HEADS, n, DIM, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = torch.from_numpy(seen)
    found = gradients(lambda q, k, v, _: attn(q, k, v), [q.detach(), k.detach(), v.detach()], {}, ())
    right = gradients(
        lambda q, k, v, _: softmax(q @ k.mT / 4, v, mask, {}), [q.detach(), k.detach(), v.detach()], {}, ()
    )
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y)
