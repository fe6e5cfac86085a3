"""What tests on a GPU share."""

from __future__ import annotations

import pytest
import torch

import attndsl

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
for_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
PATTERN = "causal & (window(100) | sink(4))"


def tensors(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(*shape, device="cuda", dtype=dtype, generator=generator) for _ in range(3))
    return q, k, v


def close(attn: attndsl.Attention, out: torch.Tensor, *qkv: torch.Tensor) -> bool:
    error = (out.double() - attn.reference(*qkv)).abs().max().item()
    return bool(error < 2e-2)
