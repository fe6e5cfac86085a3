"""What tests on a GPU share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.runtime.reference import reference
from attndsl.runtime.reference_plans import oracle_plans
from benchmarks.dense import judge

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
for_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
# Where there is one, kernels are compiled for it and take no tensors of the CPU.
interprets = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")
PATTERN = "causal & (window(100) | sink(4))"


def tensors(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(*shape, device="cuda", dtype=dtype, generator=generator) for _ in range(3))
    return q, k, v


def close(
    attn: attndsl.Attention, out: Tensor, q: Tensor, k: Tensor, v: Tensor, plans: dict[str, Tensor] | None = None,
    **inputs: Any,
) -> bool:  # fmt: skip
    """Whether an output errs at most twice as far as the definition computed in its dtype. plans: those it used."""
    exact = attn.reference(q, k, v, plans=plans, **inputs)
    known = oracle_plans(attn.program, q, k, inputs, {}, None, plans or {})
    plain = reference(attn.program, q, k, v, {**inputs, **known}, {}, dtype=out.dtype)
    return judge(out, exact, plain).passed


def recorded(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of a step, and what it writes. The step runs once before, on a stream of its own: autograd's threads go
    on with the stream of the forward pass, and the default one cannot be captured."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step()
    return graph, written
