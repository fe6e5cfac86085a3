"""Host overhead of one call: what Python and the dispatcher cost beside the kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.failures import short_reason
from benchmarks.timing import host_microseconds

PATTERN = "causal & window(32)"


def run_overhead(device: torch.device) -> list[list[str]]:
    """A table of host µs per call at a tiny shape: forward without and with autograd, forward and backward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, 2, 64, 64, device=device, dtype=dtype) for _ in range(3))
    table = [["host µs per call", "no_grad", "autograd", "forward + backward"]]
    for name, build in (("attndsl", build_ours), ("SDPA", build_sdpa), ("Flex, compiled", build_flex)):
        if name.startswith("Flex") and device.type != "cuda":
            continue
        try:
            table.append([name, *(f"{us:.1f}" for us in overheads(build(q, k, v), (q, k, v), device))])
        except Exception as error:  # noqa: BLE001 - a peer that breaks costs its line and not the run
            table.append([name, short_reason(error), "", ""])
    return table


def overheads(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: tuple[Tensor, ...], device: torch.device
) -> tuple[float, float, float]:
    q, k, v = tensors
    with torch.no_grad():
        bare = host_microseconds(lambda: call(q, k, v), device)
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    graph = host_microseconds(lambda: call(leaves[0], leaves[1], leaves[2]), device)
    dout = torch.ones_like(q)
    both = host_microseconds(lambda: torch.autograd.grad(call(leaves[0], leaves[1], leaves[2]), leaves, dout), device)
    return bare, graph, both


def build_ours(q: Tensor, k: Tensor, v: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    import attndsl

    attn = attndsl.compile(PATTERN)
    return lambda q, k, v: attn(q, k, v)


def build_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)


def build_flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = q.shape[2]
    block_mask = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < 32), None, None, n, n, device=str(q.device))
    fn = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: fn(q, k, v, block_mask=block_mask)
