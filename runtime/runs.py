"""Runs of equal ids along tokens: which there are, where they lie, what they hold, and entries pooled of them.

The operators `attndsl::pool_runs` and its backward: generated kernels on GPUs, torch elsewhere, as `runtime/pool.py`.
There is room for as many runs as tokens, since their number is known on the device alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.functional import pad

from attndsl.branches import Pool, PoolFunction
from attndsl.derivation import DocumentEntries, EntryPlace, OrderedRuns, RunCount, RunEnds, RunExtents
from attndsl.pooling import PoolPlan, entries, told_covers
from attndsl.program import Axis, InputDecl
from attndsl.runtime.call import device_target, dtype_of
from attndsl.runtime.outputs import empty_gradient
from attndsl.runtime.pool import POOLED, launch, wide
from attndsl.runtime.run_ends import entries_by_kernel
from attndsl.runtime.transforms import differentiable, mapped
from attndsl.runtime.triton_version import INTERPRETED
from attndsl.runtime.values import Values

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "pool_runs(str program, Tensor x, str function, int covers, bool kernel, Tensor number, Tensor first, Tensor end) "
    "-> Tensor"
)
_LIBRARY.define(
    "pool_runs_backward(str program, Tensor gradient, Tensor x, str function, int covers, bool kernel, Tensor number, "
    "Tensor first, Tensor end) -> Tensor"
)


class Runs(NamedTuple):
    """Runs of ids [..., tokens], int32 of that size: the run of each token, counted from 0; the first token of each run
    and one past its last, which are both past the end where there is no such run."""

    number: Tensor
    first: Tensor
    end: Tensor


def document_entries(ids: Tensor, size: int, stride: int, present: Tensor | None = None) -> tuple[Runs, Tensor]:
    """The entries of documents of ids [..., tokens], as `derivation.DocumentEntries` has them: of a token the last that
    begins no later than it. And the first token of each entry's document. present: how many tokens are, of each
    batch entry, [...] but for the last dimension."""
    tokens = ids.shape[-1]
    if ids.is_cuda and tokens:
        number, first, end, begin = entries_by_kernel(ids, size, stride, present)
        return Runs(number, first, end), begin
    every = torch.arange(tokens, dtype=torch.int32, device=ids.device).expand(ids.shape).contiguous()
    if not tokens:
        return Runs(every, every, every), every
    of = runs_of(ids)
    begin, stop = (x.gather(-1, of.number.to(torch.int64)) for x in (of.first, of.end))
    number = ((every - begin) % stride == 0).cumsum(-1, dtype=torch.int32) - 1
    first = torch.searchsorted(number, every, out_int32=True)
    at = first.clamp(max=tokens - 1).to(torch.int64)
    exists = first < tokens
    end = torch.minimum(first + size, stop.gather(-1, at))
    if present is not None:
        end = torch.minimum(end, present.unsqueeze(-1).to(torch.int32))
    past = torch.full_like(first, tokens)
    return Runs(number, first, torch.where(exists, end, past)), torch.where(exists, begin.gather(-1, at), past)


def document_blocks(ids: Tensor, size: int) -> Tensor:
    """As `derivation.DocumentBlocks` has it, of documents of ids [..., tokens]."""
    entries, begin = document_entries(ids, size, size)
    if not ids.shape[-1]:
        return begin
    begin = begin.gather(-1, entries.number.to(torch.int64))
    return entries.number.gather(-1, begin.to(torch.int64))


def present_runs(ids: Tensor, present: Tensor | None, documents: Tensor | None = None) -> Tensor:
    """Ids [B, ..., tokens] as `derivation.PresentRuns` has them. present: int [B], how many tokens are, where not all
    are. documents: of the size of ids."""
    ids, tokens = ids.to(torch.int64), ids.shape[-1]
    if not tokens:
        return ids
    if documents is not None:
        ids = _begins(ids, documents).cumsum(-1)
    if present is None:
        return ids
    present = present.to(torch.int64).view(-1, *[1] * (ids.dim() - 1))
    last = ids.gather(-1, (present - 1).clamp(0, tokens - 1).expand(*ids.shape[:-1], 1))
    return torch.where(torch.arange(tokens, device=ids.device) < present, ids, last + 1)


def _begins(*ids: Tensor) -> Tensor:
    """At which tokens one of ids [..., tokens] is not that of the token before, bool [..., tokens]."""
    changes = torch.stack([x[..., 1:] != x[..., :-1] for x in ids]).any(0)
    return pad(changes, (1, 0), value=True)[..., : ids[0].shape[-1]]


def runs_in_order(ids: Tensor, place: Tensor, tokens: int | Tensor) -> Tensor:
    """As `derivation.OrderedRuns` has them, of ids and places [..., tokens], of which so many are present."""
    ids, place = torch.broadcast_tensors(ids.to(torch.int64), place.to(torch.int64))
    every = torch.arange(ids.shape[-1], device=ids.device)
    placed = (place >= 0) & (place < tokens) & (every < tokens)
    order = torch.where(placed, place, ids.shape[-1]).sort(dim=-1, stable=True).indices
    in_order = ids.expand(order.shape).gather(-1, order)
    begins = pad(in_order[..., 1:] != in_order[..., :-1], (1, 0), value=True)[..., : every.numel()]
    first = torch.where(begins, every, 0)
    first = first.cummax(-1).values if every.numel() else first
    return torch.where(placed, torch.zeros_like(first).scatter(-1, order, first), -1)


def ordered_runs(d: OrderedRuns, values: Values, size: list[int]) -> Tensor:
    """A derived input of runs in the order of places, of that size."""
    tokens = values.shape.k_len
    most = tokens if values.lengths is None else values.lengths
    k = torch.arange(tokens, device=values.device).view(1, 1, 1, -1)
    here = values.at(q=0, k=k, Nk=most)
    present = most if d.present is None else here.tensor(d.present).clamp(max=tokens)
    found = runs_in_order(here.tensor(d.ids), here.tensor(d.place), present)
    return found.expand(*found.shape[:3], tokens).reshape(size)


def runs_of(ids: Tensor) -> Runs:
    """The maximal runs of equal ids [..., tokens]."""
    if ids.is_cuda and ids.shape[-1]:
        number, first, end, _ = entries_by_kernel(ids, ids.shape[-1], ids.shape[-1])
        return Runs(number, first, end)
    number = _begins(ids).cumsum(-1, dtype=torch.int32) - 1
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


def entry_input(wanted: DocumentEntries, ids: Tensor) -> Tensor:
    """A derived input of entries of documents. ids: what divides tokens, in whole."""
    found, document = document_entries(ids, wanted.size, wanted.stride)
    return {EntryPlace.FIRST: found.first, EntryPlace.END: found.end, EntryPlace.DOCUMENT: document}[wanted.place]


def along(x: Tensor, own: InputDecl, dims: InputDecl, size: list[int]) -> Tensor:
    """An input over tokens in the dimensions of another, of a size, all of its own among these."""
    axes = [dim.axis for dim in own.dims[:-1]]
    for at, dim in enumerate(dims.dims[:-1]):
        if dim not in own.dims[:-1]:
            x = x.unsqueeze(at)
            axes.insert(at, dim.axis)
    order = [axes.index(dim.axis) for dim in dims.dims[:-1]]
    return x.permute(*order, -1).expand(size).contiguous()


def of_heads(
    ids: Tensor, decl: InputDecl, batch: int, kv_heads: int, present: Tensor | None = None,
    documents: Tensor | None = None,
) -> Runs:  # fmt: skip
    """The runs of an input int[b?, g?, k] for each batch entry and key head: [B, Hkv, tokens]. present: int [B], how
    many tokens are, where not all are: others are of a run without tokens. documents: [B or 1?, tokens], at whose ends
    runs end too."""
    for at, axis in enumerate((Axis.B, Axis.G)):
        if all(dim.axis is not axis for dim in decl.dims):
            ids = ids.unsqueeze(at)
    ids = ids.expand(batch, kv_heads, -1)
    if documents is not None:
        documents = documents.expand(batch, -1).unsqueeze(1).expand(ids.shape)
    apart = present is not None or documents is not None
    found = runs_of((present_runs(ids, present, documents) if apart else ids).contiguous())
    if present is None:
        return found
    there = found.first < present.view(-1, 1, 1)
    return Runs(found.number, found.first, torch.where(there, found.end, found.first))


def entries_of_heads(ids: Tensor, pool: Pool, batch: int, kv_heads: int, present: Tensor | None) -> Runs:
    """The entries of a pool of documents, of ids [B or 1?, tokens], for each batch entry and key head.
    present: int [B]."""
    found, _ = document_entries(ids.expand(batch, -1).contiguous(), pool.size, pool.stride, present)
    return Runs(*(x.unsqueeze(1).expand(-1, kv_heads, -1).contiguous() for x in found))


# ----------------------------------------------------------------------------------------- entries


def pooled_runs(program: str, x: Tensor, pool: Pool, runs: Runs, backend: str = "auto") -> Tensor:
    """The entries of x [B, H, N, D], one for each of its runs, or entries of documents, [B, H, N], in order:
    [B, H, N, D]; zeros where there are no more. program, backend: as in `pool.pooled`."""
    return _called(program, x, pool.function.value, told_covers(pool), by_kernel(x, backend), *runs)


def by_kernel(x: Tensor, backend: str = "auto") -> bool:
    """Whether a generated kernel pools."""
    return x.is_cuda or (backend == "triton" and INTERPRETED)


def plan_of(x: Tensor, function: str, covers: int) -> PoolPlan:
    return PoolPlan(PoolFunction(function), covers, 1, x.shape[3], dtype_of(x), device_target(x.device), told=True)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def pool_tokens(
    program: str, x: Tensor, function: str, covers: int, kernel: bool, number: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    if kernel and x.dtype != torch.float64:
        plan, found = plan_of(x, function, covers), x.new_empty(x.shape)
        launch(program, plan, POOLED, entries(found.shape[2], plan.block), _dense(x), (found, first, end))
        return found
    start = {"max": -torch.inf, "min": torch.inf}.get(function, 0.0)
    # A token of no entry goes to a place of its own, which is dropped.
    total = torch.full((*x.shape[:2], x.shape[2] + 1, x.shape[3]), start, dtype=wide(x), device=x.device)
    for at, _ in _entries_of(x, covers, number, end):
        if function in ("max", "min"):
            total.scatter_reduce_(2, at, x.to(total.dtype), f"a{function}")
        else:
            total.scatter_add_(2, at, x.to(total.dtype))
    total, count = total[:, :, :-1], (end - first)[..., None]
    if function in ("max", "min"):
        return total.masked_fill(count <= 0, 0).to(x.dtype)
    return (total / count.clamp(min=1) if function == "mean" else total).to(x.dtype)


def _entries_of(x: Tensor, covers: int, number: Tensor, end: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The entries that tokens belong to, the last first: int64 [B, H, N, D], N where there is none, and which have one,
    bool [B, H, N, 1]."""
    token = torch.arange(x.shape[2], device=x.device)
    for back in range(covers):
        at = number.to(torch.int64) - back
        inside = (at >= 0) & (token < end.gather(2, at.clamp(min=0)))
        yield torch.where(inside, at, x.shape[2])[..., None].expand(*x.shape), inside[..., None]


def spread_entries(
    program: str, gradient: Tensor, x: Tensor, function: str, covers: int, kernel: bool, number: Tensor, first: Tensor,
    end: Tensor,
) -> Tensor:  # fmt: skip
    if kernel and x.dtype != torch.float64:
        plan, others, x = plan_of(x, function, covers), [gradient.contiguous()], _dense(x)
        if plan.picks:
            others.append(torch.empty(gradient.shape, dtype=torch.int32, device=x.device))
            launch(program, plan, "pick_tokens", entries(x.shape[2], plan.block), x, (others[1], first, end))
        found = empty_gradient(x)
        launch(
            program, plan, "spread_entries", entries(x.shape[2], plan.token_block), found,
            (*others, number, first, end),
        )  # fmt: skip
        return found
    share = gradient.to(wide(x))
    if function == "mean":
        share = share / (end - first).clamp(min=1)[..., None]
    tokens, found = x.shape[2], torch.zeros(x.shape, dtype=share.dtype, device=x.device)
    picked: Tensor | None = None
    if function in ("max", "min"):
        # The first of the largest (or least).
        best = pad(pool_tokens(program, x, function, covers, False, number, first, end), (0, 0, 0, 1))
        token = torch.arange(tokens, device=x.device).view(-1, 1)
        picked = torch.full((*x.shape[:2], tokens + 1, x.shape[3]), tokens, device=x.device)
        for at, _ in _entries_of(x, covers, number, end):
            picked.scatter_reduce_(2, at, torch.where(x == best.gather(2, at), token, tokens), "amin")
    for at, inside in _entries_of(x, covers, number, end):
        here = inside if picked is None else inside & (picked.gather(2, at) == token)
        found += torch.where(here, share.gather(2, at.clamp(max=tokens - 1)), 0)
    return found.to(x.dtype)


def _fake(
    program: str, x: Tensor, function: str, covers: int, kernel: bool, number: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    program: str, gradient: Tensor, x: Tensor, function: str, covers: int, kernel: bool, number: Tensor, first: Tensor,
    end: Tensor,
) -> Tensor:  # fmt: skip
    return empty_gradient(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.program, x, *ctx.how, number, first, end = inputs
    ctx.save_for_backward(x, number, first, end)


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    x, *runs = ctx.saved_tensors
    found = torch.ops.attndsl.pool_runs_backward(ctx.program, gradient, x, *ctx.how, *runs)
    return None, found, None, None, None, None, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("pool_runs", pool_tokens, _device)
    _LIBRARY.impl("pool_runs_backward", spread_entries, _device)
_LIBRARY.impl("pool_runs", _fake, "Meta")
_LIBRARY.impl("pool_runs_backward", _backward_fake, "Meta")
mapped(_LIBRARY, "pool_runs", "pool_runs_backward")
_called = differentiable(_LIBRARY, "pool_runs", _setup, _differentiate)
