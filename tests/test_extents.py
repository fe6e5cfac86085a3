"""Patterns over views that read data of single keys: the least and the largest of an extent decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from tests.gradients import TOLERANCE
from tests.routing_rules import HEADS, KV_HEADS, SHARE, call, softmax

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
INPUTS = {
    "doc": "int[b, k]", "ids": "int[b, k]", "keep": "bool[b, h, k]", "drop": "bool[k]", "limit": "int[g, k]",
}  # fmt: skip
BODIES = [
    "attend causal & document(doc) over pool(mean, 4)",
    "attend causal & document(ids), causal & document(ids) over pool(max, 3)",
    "attend { keep[k] } over pool(mean, 4, 5)",
    "attend causal & { not drop[k] and k < limit[q] + 30 } over pool(sum, 2, counted) { softmax with sink 0.5 }",
    "attend { limit[k] <= q and 1 < limit[k] } over pool(min, 4)",
    "attend { q > limit[k] and q + 40 >= limit[k] } over pool(mean, 5)",
    "coarse = attend causal & document(doc) over pool(mean, 8)\n"
    "fine = attend causal & document(doc) & top(2, blocks(8), by = probs(coarse), always = same_block(8))\n"
    "output coarse + fine",
    "votes = attend causal & document(doc) over pool(mean, 16)\n"
    "far = attend causal & document(doc) within blocks(16) with probs(votes)\n output far",
]
SHAPES = [(43, 43), (43, 13), (1, 1)]


def program(body: str) -> attndsl.Attention:
    declared = "".join(f"input {name} : {kind}\n" for name, kind in INPUTS.items() if name in body)
    return attndsl.compile(f"attention a {{\n{declared}{body}\n}}")


def data(attn: attndsl.Attention, tokens: int, broadcast: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    batch = 1 if broadcast else 2
    found: dict[str, Any] = {
        "doc": torch.arange(tokens)[None].repeat(batch, 1) // 11, "drop": torch.rand(tokens, generator=generator) < 0.2,
        "ids": torch.randint(0, 2, (batch, tokens), generator=generator).to(torch.int32),
        "keep": torch.rand(batch, 1 if broadcast else HEADS, tokens, generator=generator) < 0.9,
        "limit": torch.randint(0, 30, (KV_HEADS, tokens), generator=generator),
    }  # fmt: skip
    return {decl.name: found[decl.name] for decl in attn.program.inputs if decl.name in found}


def judge(body: str, tokens: int, rows: int, dtype: torch.dtype, backend: str, broadcast: bool = False) -> None:
    attn = program(body)
    given = data(attn, tokens, broadcast)
    generator = torch.Generator().manual_seed(rows)
    sizes = ((2, HEADS, rows, 16), (2, KV_HEADS, tokens, 16), (2, KV_HEADS, tokens, 16))
    qkv = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    q, k, v = qkv
    plans = attn.plan(q, k, **given) if attn.program.selections else None
    found, expected = (
        attn(q, k, v, backend=backend, **given),
        attn.reference(exact[0], exact[1], exact[2], plans=plans, **given),
    )
    torch.testing.assert_close(found.double(), expected, atol=10 * TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])
    passed = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(x, y, passed.to(x.dtype), materialize_grads=True, allow_unused=True)
        for x, y in ((found, qkv), (expected, exact))
    )
    for x, y in zip(ours, theirs, strict=True):
        assert float((x.double() - y).abs().max()) <= 20 * TOLERANCE[dtype] * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("tokens", "rows"), SHAPES)
def test_on_the_cpu(body: str, tokens: int, rows: int) -> None:
    judge(body, tokens, rows, torch.float64, "cpu")


@pytest.mark.parametrize("body", BODIES)
def test_in_triton(body: str) -> None:
    judge(body, 43, 13, torch.float32, "triton", broadcast=True)


def test_the_rule() -> None:
    """A row sees the finished entries whose tokens all lie in its document."""
    q, k, v = call(43)
    doc = np.arange(43) // 11
    found = program(BODIES[0])(q, k, v, doc=torch.from_numpy(doc)[None])
    for h, t in np.ndindex(HEADS, 43):
        keys, values = k[0, h // SHARE].numpy(), v[0, h // SHARE].numpy()
        seen = [m for m in range(t // 4 + 1) if 4 * m + 3 <= t and (doc[4 * m : 4 * m + 4] == doc[t]).all()]
        expected = np.zeros(8)
        if seen:
            logits = np.array([keys[4 * m : 4 * m + 4].mean(0) @ q[0, h, t].numpy() for m in seen]) / 8**0.5
            expected = softmax(logits) @ np.stack([values[4 * m : 4 * m + 4].mean(0) for m in seen])
        np.testing.assert_allclose(found[0, h, t].numpy(), expected, atol=1e-12)


def test_it_is_explained() -> None:
    assert "the least `doc` of each entry's tokens" in str(program(BODIES[0]).explain(64))
