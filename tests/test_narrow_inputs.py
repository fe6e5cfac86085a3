"""Integer inputs of every width: arithmetic with them is that of integers, not of what their memory holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl

# What wraps in 8 bits, signed or not: differences below 0, sums, products, negations, constants that do not fit.
ATTEND = "ids[q] - ids[k] < 0 or 3 * ids[q] > 2 * ids[k] + 130 or -ids[k] < -100 or (ids[k] + q) % 300 < 9"
MASKED = f"attention narrow {{ input ids : int[b, k]  attend causal & {{ {ATTEND} }} }}"
SCORED = """attention scored {
    input ids : int[b, k]
    input span : int[h]
    score s + 0.01 * (ids[q] - 2 * ids[k])
    attend { 0 <= q - k < 2 * span[h] - 150 }
}"""
GATED = """attention gated {
    input step : int[b, h, q]
    near = attend causal & window(5)
    far = attend causal
    output (0.001 * (step - 2 * step * step)) * near + far
}"""
DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int64)


def call(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 4, 33, 16), torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33, 16)
    top = 120 if dtype is torch.int8 else 250
    return [q, k, v], {
        "ids": torch.randint(0, top, (2, 33)).to(dtype), "span": torch.tensor([90, 100, 80, 76]).to(dtype),
        "step": torch.randint(0, top, (2, 4, 33)).to(dtype),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [MASKED, SCORED, GATED], ids=["masked", "scored", "gated"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_widths(text: str, dtype: torch.dtype, backend: str) -> None:
    attn, (tensors, given) = attndsl.compile(text), call(dtype)
    inputs = {decl.name: given[decl.name] for decl in attn.program.inputs}
    exact = attn.reference(*tensors, **inputs)
    assert torch.allclose(attn(*tensors, backend=backend, **inputs).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_decode(dtype: torch.dtype) -> None:
    attn, ((q, k, v), given) = attndsl.compile(MASKED), call(dtype)
    lengths = torch.tensor([33, 30], dtype=torch.int32)
    exact = attn.reference(q, k, v, ids=given["ids"])[:1, :, -2:]
    for backend in ("cpu", "triton"):
        out = attn.decode(q[:, :, -2:], k, v, lengths, backend=backend, ids=given["ids"])
        assert torch.allclose(out[:1].double(), exact, rtol=1e-5, atol=1e-5), backend
