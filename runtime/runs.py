"""Runs of equal ids along tokens: which there are, where they lie, what they hold, and entries pooled of them.

The operators `attndsl::pool_runs` and its backward: generated kernels on GPUs, torch elsewhere, as `runtime/pool.py`.
There is room for as many runs as tokens, since their number is known on the device alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.functional import pad

from attndsl.branches import Pool, PoolFunction
from attndsl.derivation import RunCount, RunEnds, RunExtents
from attndsl.pooling import PoolPlan, entries
from attndsl.program import Axis, InputDecl
from attndsl.runtime.call import device_target, dtype_of
from attndsl.runtime.outputs import empty_gradient
from attndsl.runtime.pool import POOLED, launch, wide
from attndsl.runtime.triton_version import INTERPRETED

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "pool_runs(str program, Tensor x, str function, bool kernel, Tensor number, Tensor first, Tensor end) -> Tensor"
)
_LIBRARY.define(
    "pool_runs_backward(str program, Tensor gradient, Tensor x, str function, bool kernel, Tensor number, "
    "Tensor first, Tensor end) -> Tensor"
)


class Runs(NamedTuple):
    """Runs of ids [..., tokens], int32 of that size: the run of each token, counted from 0; the first token of each run
    and one past its last, which are both past the end where there is no such run."""

    number: Tensor
    first: Tensor
    end: Tensor


def runs_of(ids: Tensor) -> Runs:
    """The maximal runs of equal ids [..., tokens]."""
    begins = pad(ids[..., 1:] != ids[..., :-1], (1, 0), value=True)[..., : ids.shape[-1]]
    number = begins.cumsum(-1, dtype=torch.int32) - 1
    every = torch.arange(ids.shape[-1], dtype=torch.int32, device=ids.device).expand(ids.shape).contiguous()
    first, end = (torch.searchsorted(number, every, right=right, out_int32=True) for right in (False, True))
    return Runs(number, first, end)


# ---------------------------------------------------------------------------------- derived inputs


def run_input(decl: InputDecl, wanted: RunEnds | RunCount | RunExtents, x: Tensor, ids: Tensor) -> Tensor:
    """A derived input of runs. x: what the input that it is of holds, ids: what divides tokens, both in whole."""
    number, first, end = runs_of(ids)
    match wanted:
        case RunEnds(last=last):
            return end - 1 if last else first
        case RunCount():
            return number.amax(-1, keepdim=True) + 1 if ids.shape[-1] else number.new_zeros(*ids.shape[:-1], 1)
        case RunExtents(largest=largest):
            kept = x.to(torch.int64)
            found = torch.zeros_like(kept)
            reduce = "amax" if largest else "amin"
            found.scatter_reduce_(-1, number.to(torch.int64), kept, reduce, include_self=False)
            return found.to(torch.bool) if x.dtype == torch.bool else found


def along(x: Tensor, own: InputDecl, dims: InputDecl, size: list[int]) -> Tensor:
    """An input over tokens in the dimensions of another, of a size, all of its own among these."""
    axes = [dim.axis for dim in own.dims[:-1]]
    for at, dim in enumerate(dims.dims[:-1]):
        if dim not in own.dims[:-1]:
            x = x.unsqueeze(at)
            axes.insert(at, dim.axis)
    order = [axes.index(dim.axis) for dim in dims.dims[:-1]]
    return x.permute(*order, -1).expand(size).contiguous()


def of_heads(ids: Tensor, decl: InputDecl, batch: int, kv_heads: int) -> Runs:
    """The runs of an input int[b?, g?, k] for each batch entry and key head: [B, Hkv, tokens]."""
    for at, axis in enumerate((Axis.B, Axis.G)):
        if all(dim.axis is not axis for dim in decl.dims):
            ids = ids.unsqueeze(at)
    return runs_of(ids.expand(batch, kv_heads, -1).contiguous())


# ----------------------------------------------------------------------------------------- entries


def pooled_runs(program: str, x: Tensor, pool: Pool, runs: Runs, backend: str = "auto") -> Tensor:
    """The entries of x [B, H, N, D], one for each of its runs [B, H, N], in order: [B, H, N, D]; zeros where there are
    no more. program, backend: as in `pool.pooled`."""
    kernel = x.is_cuda or (backend == "triton" and INTERPRETED)
    found: Tensor = torch.ops.attndsl.pool_runs(program, x, pool.function.value, kernel, *runs)
    return found


def plan_of(x: Tensor, function: str) -> PoolPlan:
    return PoolPlan(PoolFunction(function), 1, 1, x.shape[3], dtype_of(x), device_target(x.device), told=True)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pool(program: str, x: Tensor, function: str, kernel: bool, number: Tensor, first: Tensor, end: Tensor) -> Tensor:
    if kernel and x.dtype != torch.float64:
        plan, found = plan_of(x, function), _fake(program, x, function, kernel, number, first, end)
        launch(program, plan, POOLED, entries(found.shape[2], plan.block), _dense(x), (found, first, end))
        return found
    at = number[..., None].to(torch.int64).expand(*x.shape)
    zeros = torch.zeros(x.shape, dtype=wide(x), device=x.device)
    if function in ("max", "min"):
        return zeros.scatter_reduce_(2, at, x.to(zeros.dtype), f"a{function}", include_self=False).to(x.dtype)
    total = zeros.scatter_add_(2, at, x.to(zeros.dtype))
    return (total / (end - first).clamp(min=1)[..., None] if function == "mean" else total).to(x.dtype)


def _pool_backward(
    program: str, gradient: Tensor, x: Tensor, function: str, kernel: bool, number: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    if kernel and x.dtype != torch.float64:
        plan, others, x = plan_of(x, function), [gradient.contiguous()], _dense(x)
        if plan.picks:
            others.append(torch.empty(gradient.shape, dtype=torch.int32, device=x.device))
            launch(program, plan, "pick_tokens", entries(x.shape[2], plan.block), x, (others[1], first, end))
        found = empty_gradient(x)
        where = (number, first, end) if function == "mean" else (number,)
        launch(program, plan, "spread_entries", entries(x.shape[2], plan.token_block), found, (*others, *where))
        return found
    at = number[..., None].to(torch.int64).expand(*x.shape)
    share = gradient.to(wide(x))
    if function == "mean":
        share = share / (end - first).clamp(min=1)[..., None]
    share = share.gather(2, at)
    if function in ("max", "min"):
        # The first of the largest (or least).
        token = torch.arange(x.shape[2], device=x.device).view(-1, 1)
        best = _pool(program, x, function, False, number, first, end).gather(2, at)
        place = torch.where(x == best, token, x.shape[2])
        picked = torch.full_like(place, x.shape[2]).scatter_reduce_(2, at, place, "amin")
        share = torch.where(picked.gather(2, at) == token, share, 0)
    return share.to(x.dtype)


def _fake(program: str, x: Tensor, function: str, kernel: bool, number: Tensor, first: Tensor, end: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    program: str, gradient: Tensor, x: Tensor, function: str, kernel: bool, number: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    return empty_gradient(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.program, x, *ctx.how, number, first, end = inputs
    ctx.save_for_backward(x, number, first, end)


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    x, *runs = ctx.saved_tensors
    found = torch.ops.attndsl.pool_runs_backward(ctx.program, gradient, x, *ctx.how, *runs)
    return None, found, None, None, None, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("pool_runs", _pool, _device)
    _LIBRARY.impl("pool_runs_backward", _pool_backward, _device)
_LIBRARY.impl("pool_runs", _fake, "Meta")
_LIBRARY.impl("pool_runs_backward", _backward_fake, "Meta")
torch.library.register_autograd("attndsl::pool_runs", _differentiate, setup_context=_setup, lib=_LIBRARY)
