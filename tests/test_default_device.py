"""Calls on the CPU where torch makes tensors elsewhere, unless it is told where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl

PROGRAMS = {
    "window": "causal & (window(8) | sink(2))",
    "pieces": "causal & { q % 4 == k % 4 }",
    "grid": "attention a { axes y[6], x[6]\n attend neighborhood(3) on (y, x) }",
    "lists": "attention a { attend causal & top(2, blocks(8), per = rows(8), by = dot(mean(Q), mean(K))) }",
    "routed": "attention a { attend causal & top(2, blocks(8), by = dot(Q, mean(K)), always = same_block(8)) }",
    "drawn": "attention a { attend causal & random(2, blocks(8), per = rows(8), seed = 3) }",
    "learned": "attention a { input bias : float[h] learnable\n softmax with sink bias[h]\n attend causal }",
    "views": "attention a { attend causal & window(8), causal over pool(mean, 4, counted) }",
    "observed": "attention a { x = attend causal & window(8)\n observe m = probs(x, sum, head, tokens)\n output x }",
}


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)  # a device, the CPU too, would stay as a mode that torch.compile cannot trace


def results(text: str, device: str, dropout: float) -> list[Tensor]:
    """Output, lse, what is observed, gradients and a decode, of one new program and the same tensors."""
    made = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 36, 16, generator=made).requires_grad_() for h in (4, 2, 2))
    bias, lengths = torch.randn(4, generator=made).requires_grad_(), torch.tensor([36, 9], dtype=torch.int32)
    inputs: dict[str, Any] = {"bias": bias} if "bias" in text else {}
    with default_device(device):
        attn = attndsl.compile(text)
        seed: dict[str, Any] = {"dropout": dropout, "seed": 5} if dropout else {}
        out, lse, observed = attn(q, k, v, **inputs, **seed, return_lse=True, return_observed=True)
        found = [out, lse, *observed.values()]
        found += torch.autograd.grad(out.square().sum(), [q, k, v, *inputs.values()])
        with torch.no_grad():
            found.append(attn.decode(q[:, :, -1:], k, v, lengths, **inputs))
    return found


@pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_elsewhere(name: str, dropout: float) -> None:
    there, here = (results(PROGRAMS[name], device, dropout) for device in ("meta", "cpu"))
    for a, b in zip(there, here, strict=True):
        assert a.device.type == "cpu" and torch.equal(a, b)
