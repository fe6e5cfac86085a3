"""Pooled views: each entry a function of the tokens of its extent that are present, and the gradient of that.

The operators `attndsl::pool` and `attndsl::pool_backward`. Sums are in float32 (float64 of float64), in one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define("pool(Tensor x, str function, int size, int stride) -> Tensor")
_LIBRARY.define("pool_backward(Tensor gradient, Tensor x, str function, int size, int stride) -> Tensor")


def pooled(x: Tensor, function: str, size: int, stride: int) -> Tensor:
    """The entries of x [B, H, N, D]: [B, H, ceil(N / stride), D] in its dtype; entry j is over the tokens
    [j * stride, j * stride + size) below N."""
    return torch.ops.attndsl.pool(x, function, size, stride)  # type: ignore[no-any-return]


def entries(tokens: int | torch.SymInt, stride: int) -> Any:
    """How many entries so many tokens have."""
    return (tokens + stride - 1) // stride


def _windows(x: Tensor, size: int, stride: int) -> tuple[Tensor, Tensor]:
    """The tokens of each entry [B, H, entries, size, D], and which are present [entries, size, 1]."""
    tokens = x.shape[2]
    at = torch.arange(entries(tokens, stride), device=x.device)[:, None] * stride + torch.arange(size, device=x.device)
    present = (at < tokens)[..., None]
    return x[:, :, at.clamp(max=max(tokens - 1, 0))], present


def _high(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pool(x: Tensor, function: str, size: int, stride: int) -> Tensor:
    windows, present = _windows(x, size, stride)
    match function:
        case "max":
            return windows.masked_fill(~present, -torch.inf).amax(3)
        case "min":
            return windows.masked_fill(~present, torch.inf).amin(3)
        case _:
            total = windows.to(_high(x)).masked_fill(~present, 0).sum(3)
            return (total / present.sum(1) if function == "mean" else total).to(x.dtype)


def _pool_backward(gradient: Tensor, x: Tensor, function: str, size: int, stride: int) -> Tensor:
    high = gradient.to(_high(x))
    windows, present = _windows(x, size, stride)
    if function in ("max", "min"):
        filled = windows.masked_fill(~present, -torch.inf if function == "max" else torch.inf)
        # The first of the largest (or least).
        first = (filled.argmax if function == "max" else filled.argmin)(3, keepdim=True)
        share = torch.zeros_like(filled, dtype=high.dtype).scatter_(3, first, high[:, :, :, None])
    else:
        share = (high / present.sum(1) if function == "mean" else high)[:, :, :, None] * present
    found = torch.zeros(x.shape, dtype=high.dtype, device=x.device)
    tokens, count = x.shape[2], windows.shape[2]
    # Entry by entry's place in its extent, so that what overlaps is added in one order.
    for i in range(size):
        reached = min(count, entries(max(tokens - i, 0), stride))
        found[:, :, i : i + reached * stride : stride] += share[:, :, :reached, i]
    return found.to(x.dtype)


def _fake(x: Tensor, function: str, size: int, stride: int) -> Tensor:
    return x.new_empty(*x.shape[:2], entries(x.shape[2], stride), x.shape[3])


def _backward_fake(gradient: Tensor, x: Tensor, function: str, size: int, stride: int) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.how = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return torch.ops.attndsl.pool_backward(gradient, x, *ctx.how), None, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("pool", _pool, _device)
    _LIBRARY.impl("pool_backward", _pool_backward, _device)
_LIBRARY.impl("pool", _fake, "Meta")
_LIBRARY.impl("pool_backward", _backward_fake, "Meta")
torch.library.register_autograd("attndsl::pool", _differentiate, setup_context=_setup, lib=_LIBRARY)
