"""Pooled views: each entry a function of the tokens of its extent that are present, and the gradient of that.

The operators `attndsl::pool` and `attndsl::pool_backward`: generated kernels on GPUs, torch elsewhere. Sums are in
float32 (float64 of float64), in one order; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.branches import Pool, PoolFunction, Queries
from attndsl.pooling import PoolPlan, entries
from attndsl.runtime.call import device_target, dtype_of
from attndsl.runtime.engine import MAX_PREPARED
from attndsl.runtime.launcher import Slot
from attndsl.runtime.outputs import empty_gradient
from attndsl.runtime.registry import engine_of
from attndsl.runtime.transforms import differentiable, mapped
from attndsl.runtime.triton_version import INTERPRETED

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "pool(str program, Tensor x, str function, int size, int stride, bool kernel, Tensor? lengths=None) -> Tensor"
)
_LIBRARY.define(
    "pool_backward(str program, Tensor gradient, Tensor x, str function, int size, int stride, bool kernel, "
    "Tensor? lengths=None) -> Tensor"
)
# Launches by kind of call.
_PREPARED: dict[Any, Callable[[Sequence[Any]], None]] = {}
WARPS = 4
POOLED = "pool_tokens"


def pooled(program: str, x: Tensor, pool: Pool, backend: str = "auto", lengths: Tensor | None = None) -> Tensor:
    """The entries of x [B, H, N, D]: [B, H, ceil(N / stride), D] in its dtype, dense; entry j is over the tokens
    [j * stride, j * stride + size) below N.

    program: the key of the attention, which knows the printers. backend: where it is "triton" kernels are interpreted
    on tensors of the CPU. lengths: int32 [B], how many tokens of each batch entry are present, where not all are: at
    least 0. An entry without such tokens is 0.
    """
    kernel = x.is_cuda or (backend == "triton" and INTERPRETED)
    return _called(program, x, pool.function.value, pool.size, pool.stride, kernel, lengths)


def pooled_queries(
    program: str, q: Tensor, queries: Queries, first: int, backend: str = "auto", lengths: Tensor | None = None
) -> Tensor:
    """q [B, H, rows, D], the first at position `first`, with each row the function of those of the call that have the
    same position // size. lengths: int32 [B], before which position a row is present, where not all are."""
    pool, pieces = Pool(queries.function, queries.size, queries.size), []
    head = min(-first % queries.size, q.shape[2])
    for x, begin in ((q[:, :, :head], first), (q[:, :, head:], first + head)):
        if x.shape[2]:
            present = None if lengths is None else (lengths - begin).clamp(min=0)
            # Expanded and not indexed: the gradient is a sum in one order.
            each = pooled(program, x, pool, backend, present).unsqueeze(3).expand(-1, -1, -1, queries.size, -1)
            pieces.append(each.flatten(2, 3)[:, :, : x.shape[2]])
    return torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0] if pieces else q


def queries_of_decode(
    q: Tensor, queries: Queries, lengths: Tensor, present: Tensor, documents: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """As `pooled_queries`, of the last rows of sequences of these lengths, int [B]: where a class begins in a call
    differs among them, and only the device knows. present: int [B], before which position a row is present. documents:
    of each token the first of its document and one past its last, [B, tokens]: classes begin and end with these."""
    rows, wanted = q.shape[2], queries.function
    if not rows:
        return q
    at = torch.arange(rows, device=q.device)
    first_row = lengths.to(torch.int64).view(-1, 1) - rows
    begin, end = at - (first_row + at) % queries.size, present.to(torch.int64).view(-1, 1) - first_row
    if documents is not None and documents[0].shape[-1]:
        token = (first_row + at).clamp(min=0)
        first, last = (x.to(torch.int64).expand(len(q), -1).gather(-1, token) - first_row for x in documents)
        begin, end = at - (at - first) % queries.size, torch.minimum(end, last)
    x = q.to(wide(q))
    outside = {PoolFunction.MAX: -torch.inf, PoolFunction.MIN: torch.inf}.get(wanted, 0.0)
    found, count = torch.full_like(x, outside), torch.zeros_like(begin)
    for i in range(queries.size):
        row = begin + i
        there = (row >= 0) & (row < end)
        of_row = x.gather(2, row.clamp(0, rows - 1)[:, None, :, None].expand(x.shape))
        of_row = torch.where(there[:, None, :, None], of_row, outside)
        count += there
        match wanted:
            case PoolFunction.MAX:
                found = torch.maximum(found, of_row)
            case PoolFunction.MIN:
                found = torch.minimum(found, of_row)
            case _:
                found = found + of_row
    count = count[:, None, :, None]
    if wanted is PoolFunction.MEAN:
        found = found / count.clamp(min=1)
    return torch.where(count > 0, found, 0).to(q.dtype)


# ---------------------------------------------------------------------------------------- kernels


def launch(program: str, plan: PoolPlan, function: str, owned: int, x: Tensor, others: Sequence[Tensor]) -> None:
    """Run a kernel on x and the tensors that it has beside: `others`, in the order of its parameters.

    owned: blocks of what its programs own.
    """
    from attndsl.runtime.triton_launch import prepare_small

    grid = x.shape[0] * x.shape[1] * owned
    if not grid:
        return
    key = (plan, function, x.shape, x.stride(), x.dtype, x.device, others[0].shape)
    if key not in _PREPARED:
        if len(_PREPARED) >= MAX_PREPARED:
            _PREPARED.clear()
        text, sources = engine_of(program).generators.triton_pool(plan), pool_sources(plan, function, x, others)
        _PREPARED[key] = prepare_small(text, function, plan.target, WARPS, grid, sources, x.device)
    _PREPARED[key]((x, *others))


def pool_sources(plan: PoolPlan, function: str, x: Tensor, others: Sequence[Tensor]) -> dict[str, Any]:
    """What a kernel's parameters are given; of tensors, only shapes, strides and dtypes are read."""
    from attndsl.runtime.triton_launch import POINTER

    names = {"pool_tokens": ("pooled",), "pick_tokens": ("picked",), "spread_entries": ("gradient", "picked")}[function]
    names = (*names[: 2 if plan.picks else 1], *(("lengths",) if plan.ragged else ()))
    if plan.told:
        names = (*names, *(("number",) if function == "spread_entries" else ()), "first", "end")
    found: dict[str, Any] = {f"stride_x{axis}": n for axis, n in zip("bhn", x.stride(), strict=False)}
    found |= {
        "heads": x.shape[1],
        "tokens": x.shape[2],
        "entries": others[0].shape[2] if plan.told else entries(x.shape[2], plan.stride),
    }
    found["x_ptr"] = Slot(0, POINTER[x.dtype])
    for i, (name, y) in enumerate(zip(names, others, strict=False), 1):
        found[f"{name}_ptr"] = Slot(i, POINTER[y.dtype])
    return found


def _plan(x: Tensor, function: str, size: int, stride: int, lengths: Tensor | None) -> PoolPlan:
    ragged = lengths is not None
    return PoolPlan(PoolFunction(function), size, stride, x.shape[3], dtype_of(x), device_target(x.device), ragged)


def _by_kernel(program: str, x: Tensor, plan: PoolPlan, lengths: Sequence[Tensor]) -> Tensor:
    found = _fake(program, x, plan.function.value, plan.size, plan.stride, True)
    launch(program, plan, POOLED, entries(found.shape[2], plan.block), x, (found, *lengths))
    return found


def _backward_by_kernel(program: str, gradient: Tensor, x: Tensor, plan: PoolPlan, lengths: Sequence[Tensor]) -> Tensor:
    others = [gradient]
    if plan.picks:
        picked = torch.empty(gradient.shape, dtype=torch.int32, device=x.device)
        launch(program, plan, "pick_tokens", entries(picked.shape[2], plan.block), x, (picked, *lengths))
        others.append(picked)
    found = empty_gradient(x)
    launch(program, plan, "spread_entries", entries(x.shape[2], plan.token_block), found, (*others, *lengths))
    return found


# ------------------------------------------------------------------------------------------ torch


def _windows(x: Tensor, size: int, stride: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens of each entry [B, H, entries, size, D], and which are present [B or 1, 1, entries, size, 1].

    Of entries that are longer than the call as many as this has.
    """
    tokens = x.shape[2]
    size = max(1, min(size, tokens))
    at = torch.arange(entries(tokens, stride), device=x.device)[:, None] * stride + torch.arange(size, device=x.device)
    present = (at < tokens)[None, None, ..., None]
    if lengths is not None:
        present = present & (at[..., None] < lengths.view(-1, 1, 1, 1, 1))
    return x[:, :, at.clamp(max=max(tokens - 1, 0))], present


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pool(
    program: str, x: Tensor, function: str, size: int, stride: int, kernel: bool, lengths: Tensor | None = None
) -> Tensor:
    if kernel and x.dtype != torch.float64:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return _by_kernel(program, x, _plan(x, function, size, stride, lengths), _given(lengths))
    windows, present = _windows(x, size, stride, lengths)
    if function in ("max", "min"):
        filled = windows.masked_fill(~present, -torch.inf if function == "max" else torch.inf)
        found = filled.amax(3) if function == "max" else filled.amin(3)
        return found if lengths is None else found.masked_fill(~present.any(3), 0)
    total = windows.to(wide(x)).masked_fill(~present, 0).sum(3)
    return (total / present.sum(3).clamp(min=1) if function == "mean" else total).to(x.dtype)


def _given(lengths: Tensor | None) -> tuple[Tensor, ...]:
    return () if lengths is None else (lengths.contiguous(),)


def _pool_backward(
    program: str, gradient: Tensor, x: Tensor, function: str, size: int, stride: int, kernel: bool,
    lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if kernel and x.dtype != torch.float64:
        x = x if x.stride(-1) == 1 else x.contiguous()
        plan = _plan(x, function, size, stride, lengths)
        return _backward_by_kernel(program, gradient.contiguous(), x, plan, _given(lengths))
    high = gradient.to(wide(x))
    windows, present = _windows(x, size, stride, lengths)
    if function in ("max", "min"):
        filled = windows.masked_fill(~present, -torch.inf if function == "max" else torch.inf)
        # The first of the largest (or least).
        first = (filled.argmax if function == "max" else filled.argmin)(3, keepdim=True)
        share = torch.zeros_like(filled, dtype=high.dtype).scatter_(3, first, high[:, :, :, None]) * present
    else:
        mean = high / present.sum(3).clamp(min=1) if function == "mean" else high
        share = mean[:, :, :, None] * present
    found = torch.zeros(x.shape, dtype=high.dtype, device=x.device)
    tokens, count = x.shape[2], windows.shape[2]
    # Entry by entry's place in its extent, so that what overlaps is added in one order.
    for i in range(windows.shape[3]):
        reached = min(count, entries(max(tokens - i, 0), stride))
        found[:, :, i : i + reached * stride : stride] += share[:, :, :reached, i]
    return found.to(x.dtype)


# -------------------------------------------------------------------------------------- operators


def _fake(
    program: str, x: Tensor, function: str, size: int, stride: int, kernel: bool, lengths: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:2], entries(x.shape[2], stride), x.shape[3])


def _backward_fake(
    program: str, gradient: Tensor, x: Tensor, function: str, size: int, stride: int, kernel: bool,
    lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return empty_gradient(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.program, x, *ctx.how, lengths = inputs
    ctx.save_for_backward(x, lengths)


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    x, lengths = ctx.saved_tensors
    found = torch.ops.attndsl.pool_backward(ctx.program, gradient, x, *ctx.how, lengths)
    return None, found, None, None, None, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("pool", _pool, _device)
    _LIBRARY.impl("pool_backward", _pool_backward, _device)
_LIBRARY.impl("pool", _fake, "Meta")
_LIBRARY.impl("pool_backward", _backward_fake, "Meta")
mapped(_LIBRARY, "pool", "pool_backward")
_called = differentiable(_LIBRARY, "pool", _setup, _differentiate)
