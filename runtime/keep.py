"""Entries of caches, made and kept up to date on their device: each a function of the tokens of its extent.

The operator `attndsl::update_entries`: a generated kernel on GPUs, torch elsewhere. Lengths and page tables are read
on the device only, and nothing waits for it, so a CUDA graph of a step serves all lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.diagnostics import error
from attndsl.keeping import KeepPlan, Kept
from attndsl.runtime.call import device_target, dtype_of
from attndsl.runtime.decode import FP8, DecodeTensors, check_lengths, check_scales, reach
from attndsl.runtime.engine import MAX_PREPARED
from attndsl.runtime.launcher import Slot
from attndsl.runtime.ops import traced
from attndsl.runtime.registry import engine_of
from attndsl.runtime.triton_version import INTERPRETED
from attndsl.selection import Pool

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "update_entries(str program, Tensor x, Tensor? scale, Tensor(a!) entries, Tensor seq_lens, Tensor? page_table, "
    "str function, int size, int stride, SymInt new, bool kernel) -> ()"
)
# Elements of tokens that torch gathers at once.
_GATHERED = 1 << 24
# Launches by kind of call.
_PREPARED: dict[Any, Callable[[Sequence[Any]], None]] = {}
_WARPS = 4
# The entries that are kept of a cache by name: keys [B, Hkv, entries, D], and of views values [B, Hkv, entries, Dv].
Entries = dict[str, tuple[Tensor, ...]]


class Keeper:
    """What is kept of one cache, for the pool that holds it. kept: all that it is to keep."""

    def __init__(self, program: str, kept: Sequence[Kept], call: DecodeTensors) -> None:
        """call: the cache, empty, as a decode reads it."""
        self.program, self.kept = program, kept
        self.entries = empty_entries(kept, call)

    def update(self, call: DecodeTensors, new: int, rows: Tensor | None) -> None:
        """Make anew what the last `new` tokens of sequences change: of all of them, or of `rows`, whose lengths and
        pages are the call's."""
        if rows is None:
            update_entries(self.program, self.kept, self.entries, call, new)
            return
        chosen = {name: tuple(x[rows] for x in entries) for name, entries in self.entries.items()}
        update_entries(self.program, self.kept, chosen, call, new)
        for name, entries in self.entries.items():
            for x, part in zip(entries, chosen[name], strict=True):
                x[rows] = part


def make_entries(program: str, kept: Sequence[Kept], call: DecodeTensors, backend: str = "auto") -> Entries:
    """The entries of a cache that has any number of tokens: with room for as many as it can hold."""
    found = empty_entries(kept, call)
    update_entries(program, kept, found, call, call.capacity, backend)
    return found


def empty_entries(kept: Sequence[Kept], call: DecodeTensors) -> Entries:
    """Room for the entries of a cache."""
    check_cache(call)
    found: Entries = {}
    for each in kept:
        if call.q.dtype == FP8:
            raise error(
                "A566", f"`{each.name}` of a pool of 8 bits is not kept by it",
                help="keep it beside: `attn.views(k, v, seq_lens, page_table, k_scale=…, v_scale=…)`",
            )  # fmt: skip
        size = (len(call.seq_lens), call.k.shape[1], each.entries(call.capacity))
        made = (
            torch.zeros(*size, x.shape[3], dtype=_dtype(each, x, call), device=x.device) for x in _tokens(each, call)
        )  # fmt: skip
        found[each.name] = tuple(made)
    return found


def update_entries(
    program: str, kept: Sequence[Kept], entries: Mapping[str, tuple[Tensor, ...]], call: DecodeTensors, new: int,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Make those entries anew that the last `new` tokens of each sequence belong to, in place."""
    check_cache(call)
    for each in kept:
        check_entries(each, entries[each.name], call)
        scales = (call.k_scale, call.v_scale)
        for x, scale, into in zip(_tokens(each, call), scales, entries[each.name], strict=False):
            kernel = x.is_cuda or (backend == "triton" and INTERPRETED)
            given: Any = (program, x, scale, into, call.seq_lens, call.page_table)
            given += (each.function.value, each.size, each.stride)
            update: Any = torch.ops.attndsl.update_entries if traced((x, into)) else _update
            update(*given, new, kernel)


def check_cache(call: DecodeTensors) -> None:
    """Raises `PatternError` where a cache's tensors do not go together."""
    k, v = call.k, call.v
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.dtype != v.dtype or k.device != v.device:
        said = f"k_cache {k.dtype} {list(k.shape)} and v_cache {v.dtype} {list(v.shape)}".replace("torch.", "")
        raise error("A504", f"{said} do not go together", help="[B, Hkv, M, D] and [B, Hkv, M, Dv], or pools of pages")
    check_scales(call)
    slots = len(call.seq_lens) if call.page_table is not None and call.seq_lens.dim() == 1 else k.shape[0]
    check_lengths(call, slots)


def check_entries(kept: Kept, entries: Sequence[Tensor], call: DecodeTensors) -> None:
    """Raises `PatternError` (A567) where entries do not fit a cache."""
    tokens = _tokens(kept, call)
    if not _tensors(entries):
        what = f"`{kept.name}` is {repr(entries)[:40]}, and no tuple of tensors"
        raise error("A567", what, help="pass what `attn.views(k_cache, v_cache, seq_lens)` returns")
    sizes = [[len(call.seq_lens), call.k.shape[1], kept.entries(call.capacity), x.shape[3]] for x in tokens]
    fits = len(entries) == len(tokens) and all(
        list(y.shape) == size and y.dtype == _dtype(kept, x, call) and y.device == x.device and y.stride(3) == 1
        for x, y, size in zip(tokens, entries, sizes, strict=True)
    )
    if not fits:
        have = ", ".join(f"{y.dtype} {list(y.shape)}".removeprefix("torch.") for y in entries)
        want = ", ".join(
            f"{_dtype(kept, x, call)} {size}".removeprefix("torch.") for x, size in zip(tokens, sizes, strict=True)
        )
        raise error(
            "A567", f"`{kept.name}` is {have}, for a cache that needs {want}",
            help="entries have room for all tokens that the cache can hold: `attn.views(k_cache, v_cache, seq_lens)`",
        )  # fmt: skip


def _tensors(entries: object) -> bool:
    return isinstance(entries, tuple | list) and all(isinstance(x, Tensor) and x.dim() == 4 for x in entries)


def _tokens(kept: Kept, call: DecodeTensors) -> tuple[Tensor, ...]:
    """What entries are made of."""
    return (call.k, call.v) if kept.values else (call.k,)


def _dtype(kept: Kept, x: Tensor, call: DecodeTensors) -> torch.dtype:
    """That of entries of x: what is attended is in q's, which caches of 8 bits are not."""
    if kept.exact:
        return torch.float64 if torch.float64 in (x.dtype, call.q.dtype) else torch.float32
    return call.q.dtype if x.dtype == FP8 else x.dtype


def touched(kept_size: int, stride: int, new: int, entries: int) -> int:
    """How many entries the last `new` tokens belong to at most."""
    return min((new + kept_size - 2) // stride + 1, entries) if new > 0 else 0


def _update(
    program: str, x: Tensor, scale: Tensor | None, entries: Tensor, seq_lens: Tensor, page_table: Tensor | None,
    function: str, size: int, stride: int, new: int, kernel: bool,
) -> None:  # fmt: skip
    new = min(new, reach(x.shape[2], page_table))
    count = touched(size, stride, new, entries.shape[2])
    if entries.numel() == 0 or count == 0:
        return
    if not kernel or x.dtype == torch.float64:
        update_in_torch(x, entries, seq_lens, page_table, Pool(function), size, stride, new, count, scale)
        return
    from attndsl.runtime.triton_launch import POINTER, prepare_small

    page = None if page_table is None else x.shape[2]
    fp8 = x.dtype == FP8
    x = x.view(torch.uint8) if fp8 else x
    kept_as = dtype_of(entries if fp8 else x)
    plan = KeepPlan(
        Pool(function), size, stride, x.shape[3], kept_as, device_target(x.device), page, fp8, scale is not None
    )
    table = None if page_table is None else (page_table.shape, page_table.stride())
    scales = None if scale is None else (scale.shape, scale.stride(), scale.dtype)
    kind = (x.shape, x.stride(), entries.shape, entries.stride(), entries.dtype, seq_lens.shape, seq_lens.stride())
    key = (plan, kind, table, scales, new, x.device)
    if key not in _PREPARED:
        if len(_PREPARED) >= MAX_PREPARED:
            _PREPARED.clear()
        heads = x.shape[1]
        sources: dict[str, Any] = {
            f"stride_{name}{axis}": n
            for name, y in (("x", x), ("entries", entries))
            for axis, n in zip("bhn", y.stride(), strict=False)
        }
        sources |= {
            "x_ptr": Slot(0, POINTER[x.dtype]), "entries_ptr": Slot(1, POINTER[entries.dtype]),
            "seq_lens_ptr": Slot(2, "*i32"), "page_table_ptr": Slot(3, "*i32"), "stride_lens": seq_lens.stride(0),
            "heads": heads, "new": new, "touched": count, "pages": x.shape[0],
            "capacity": reach(x.shape[2], page_table),
        }  # fmt: skip
        if page_table is not None:
            sources["stride_table"] = page_table.stride(0)
        if scale is not None:
            sources["scale_ptr"] = Slot(4, POINTER[scale.dtype])
            sources["stride_scale"] = scale.stride(0) if scale.numel() > 1 else 0
        text, grid = engine_of(program).generators.triton_keep(plan), len(seq_lens) * count * heads
        _PREPARED[key] = prepare_small(text, "update_entries", plan.target, _WARPS, grid, sources, x.device)
    _PREPARED[key]((x, entries, seq_lens, page_table, scale))


def update_in_torch(
    x: Tensor, entries: Tensor, seq_lens: Tensor, page_table: Tensor | None, function: Pool, size: int, stride: int,
    new: int, count: int, scale: Tensor | None = None,
) -> None:  # fmt: skip
    device, page = x.device, x.shape[2]
    capacity = reach(page, page_table)
    size = max(1, min(size, capacity))  # An entry has no more tokens than the cache.
    lengths = seq_lens.clamp(0, capacity).to(torch.int64).view(-1, 1)
    before = (lengths - new).clamp(min=0) - size
    first = torch.where(before < 0, 0, before // stride + 1)
    # As many entries for each sequence, of which those are made that its new tokens belong to.
    begin = first.clamp(max=entries.shape[2] - count)
    step = max(1, _GATHERED // (len(lengths) * size * x.shape[1] * x.shape[3]))
    for low in range(0, count, step):
        entry = begin + torch.arange(low, min(low + step, count), device=device)
        _update_some(x, scale, entries, lengths, page_table, function, size, stride, entry, entry >= first)


def _update_some(
    x: Tensor, scale: Tensor | None, entries: Tensor, lengths: Tensor, page_table: Tensor | None, function: Pool,
    size: int, stride: int, entry: Tensor, asked: Tensor,
) -> None:  # fmt: skip
    """Make those of the entries [B, n] anew that are asked for and exist. lengths: int64 [B, 1]."""
    device, page = x.device, x.shape[2]
    capacity = reach(page, page_table)
    made = asked & (entry * stride < lengths)
    token = entry[..., None] * stride + torch.arange(size, device=device)
    present = made[..., None] & (token < lengths[..., None])
    at, slots = token.clamp(max=capacity - 1), torch.arange(len(lengths), device=device).view(-1, 1, 1)
    if page_table is not None:
        slots = page_table[slots, at // page].to(torch.int64)
        present &= (slots >= 0) & (slots < len(x))
        slots, at = slots.clamp(0, len(x) - 1), at % page
    # [B, n, size, heads, D]
    tokens, here = (x.view(torch.uint8) if x.dtype == FP8 else x)[slots, :, at], present[..., None, None]
    wide = tokens.view(x.dtype).to(torch.promote_types(entries.dtype, torch.float32))
    if scale is not None:
        wide = wide * scale.to(wide.dtype).view(-1, 1)
    some = present.sum(2).view(*entry.shape, 1, 1)
    match function:
        case Pool.MEAN | Pool.SUM:
            found = torch.where(here, wide, 0).sum(2)
            found = found / some.clamp(min=1) if function is Pool.MEAN else found
        case Pool.MAX:
            found = torch.where(here, wide, -torch.inf).amax(2)
        case Pool.MIN:
            found = torch.where(here, wide, torch.inf).amin(2)
        case Pool.FIRST | Pool.LAST:
            last = (lengths[..., None] - 1 - entry[..., None] * stride).clamp(0, size - 1)
            place = last if function is Pool.LAST else torch.zeros_like(last)
            index = place[..., None, None].expand(-1, -1, 1, *wide.shape[3:])
            found = torch.where(present.gather(2, place)[..., None], wide.gather(2, index).squeeze(2), 0)
    found = torch.where(some > 0, found, 0).to(entries.dtype)
    batch = torch.arange(len(lengths), device=device).view(-1, 1)
    entries[batch, :, entry] = torch.where(made[..., None, None], found, entries[batch, :, entry])


def _fake(*call: Any) -> None:
    return


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("update_entries", _update, _device)
_LIBRARY.impl("update_entries", _fake, "Meta")
