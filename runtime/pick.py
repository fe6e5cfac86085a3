"""Listed tokens as entries of a view, and the gradient of tokens from those of the entries that list them.

The operators `attndsl::pick` and `attndsl::pick_backward`: torch, but that on GPUs a generated kernel adds up what each
token gets, in the order of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.branches import Pick, PoolFunction
from attndsl.pooling import entries
from attndsl.program import Axis, InputDecl
from attndsl.runtime.outputs import empty_gradient
from attndsl.runtime.pool import POOLED, launch, wide
from attndsl.runtime.runs import plan_of
from attndsl.runtime.transforms import differentiable, mapped
from attndsl.runtime.triton_version import INTERPRETED

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define("pick(str program, Tensor x, Tensor listed, bool kernel) -> Tensor")
_LIBRARY.define("pick_backward(str program, Tensor gradient, Tensor x, Tensor listed, bool kernel) -> Tensor")


def listed_of_heads(listed: Tensor, decl: InputDecl, pick: Pick, sizes: Sequence[int]) -> Tensor:
    """A list int[b?, g?, entries] for each batch entry and key head, whose numbers `sizes` begin with, then that of
    the tokens: int64 [B, Hkv, entries]."""
    return of_heads(listed, decl, pick.entries(sizes[2]), sizes).to(torch.int64)


def of_heads(x: Tensor, decl: InputDecl, entries: int, sizes: Sequence[int]) -> Tensor:
    """An input [b?, g?, entries] for each batch entry and key head: [B, Hkv, entries]."""
    for at, axis in enumerate((Axis.B, Axis.G)):
        if all(dim.axis is not axis for dim in decl.dims[:-1]):
            x = x.unsqueeze(at)
    return x.expand(*sizes[:2], entries).contiguous()


def summed(program: str, x: Tensor, listed: Tensor, tokens: int, kernel: bool) -> Tensor:
    """The sum of what x [B, H, entries, D] holds of the entries that list a token, in the order of the list:
    [B, H, tokens, D]. kernel: by a generated one, as `picked` says it of its gradient."""
    return _pick_backward(program, x, x.new_empty(*x.shape[:2], tokens, x.shape[3]), listed, kernel)


def picked(program: str, x: Tensor, listed: Tensor, backend: str = "auto") -> Tensor:
    """The tokens of x [B, H, N, D] that are listed, int64 [B, H, entries]: [B, H, entries, D]; zeros where none is.
    program, backend: as in `pool.pooled`."""
    kernel = x.is_cuda or (backend == "triton" and INTERPRETED)
    return _called(program, x, listed, kernel)


def _pick(program: str, x: Tensor, listed: Tensor, kernel: bool) -> Tensor:
    if not x.shape[2]:
        return _fake(program, x, listed, kernel).zero_()
    there = (listed >= 0) & (listed < x.shape[2])
    at = listed.clamp(0, x.shape[2] - 1)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, at).masked_fill_(~there[..., None], 0)


def _pick_backward(program: str, gradient: Tensor, x: Tensor, listed: Tensor, kernel: bool) -> Tensor:
    tokens, found = x.shape[2], empty_gradient(x)
    if not listed.shape[2] or not tokens:
        return found.zero_()
    by_token, order = torch.where((listed >= 0) & (listed < tokens), listed, tokens).sort(dim=-1, stable=True)
    in_order = gradient.gather(2, order[..., None].expand(gradient.shape))
    if kernel and x.dtype != torch.float64:
        # Sorted by token, what a token gets is a run.
        every = torch.arange(tokens, device=x.device).expand(*x.shape[:2], tokens).contiguous()
        first, end = (torch.searchsorted(by_token, every, right=right, out_int32=True) for right in (False, True))
        total, plan = torch.empty(x.shape, dtype=x.dtype, device=x.device), plan_of(x, PoolFunction.SUM.value, 1)
        launch(program, plan, POOLED, entries(tokens, plan.block), in_order, (total, first, end))
        return found.copy_(total)
    sums = torch.zeros(*x.shape[:2], tokens + 1, x.shape[3], dtype=wide(x), device=x.device)
    sums.scatter_add_(2, by_token[..., None].expand(gradient.shape), in_order.to(sums.dtype))
    return found.copy_(sums[:, :, :tokens])


def _fake(program: str, x: Tensor, listed: Tensor, kernel: bool) -> Tensor:
    return x.new_empty(*listed.shape, x.shape[3])


def _backward_fake(program: str, gradient: Tensor, x: Tensor, listed: Tensor, kernel: bool) -> Tensor:
    return empty_gradient(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.program, x, listed, ctx.kernel = inputs
    ctx.save_for_backward(x, listed)


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    return None, torch.ops.attndsl.pick_backward(ctx.program, gradient, *ctx.saved_tensors, ctx.kernel), None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("pick", _pick, _device)
    _LIBRARY.impl("pick_backward", _pick_backward, _device)
_LIBRARY.impl("pick", _fake, "Meta")
_LIBRARY.impl("pick_backward", _backward_fake, "Meta")
mapped(_LIBRARY, "pick", "pick_backward")
_called = differentiable(_LIBRARY, "pick", _setup, _differentiate)
