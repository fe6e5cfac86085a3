"""Bounds of the keys of a cache's pages, and the pages that a row may get most from, by them.

On GPUs by three generated kernels, elsewhere in torch. Nothing waits for the device, and lengths stay there: what is
recorded in a CUDA graph serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.paging import PagePlan
from attndsl.plan import Spec
from attndsl.runtime.call import check_heads, device_target, dtype_of
from attndsl.runtime.decode import FP8, reach
from attndsl.runtime.engine import MAX_PREPARED
from attndsl.runtime.launcher import Slot

# Warps of a kernel: one scores its pages without waiting for others (benchmarks/RESULTS.md), and that of the choice
# compares 8192 keys at once.
_WARPS = {"bound_pages": 4, "score_pages": 1, "choose_pages": 8}


@dataclass(slots=True)
class PageKernels:
    """Both operations, launched per kind of call. `generate`: the printer of kernels, handed in by the API."""

    generate: Callable[[PagePlan], str]
    _prepared: dict[Any, Callable[[Sequence[Any]], None]] = field(default_factory=dict)

    def update(
        self, k: Tensor, k_min: Tensor, k_max: Tensor, seq_lens: Tensor, page_table: Tensor, new: int,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        """Make the bounds of the pages that hold the last `new` tokens of each sequence anew, of all their tokens.

        k: [pages, Hkv, page, D]. k_min, k_max: [pages, Hkv, D], dense. seq_lens: int32 [B], the new tokens included.
        page_table: int32 [B, P]. A page that does not exist is neither read nor written.
        """
        check_bounds(k, k_min, k_max, seq_lens, page_table)
        batch, (_, kv_heads, page, dim) = len(seq_lens), k.shape
        if new <= 0 or batch == 0:
            return
        if not _on_gpu(k, backend):
            _update(k, k_min, k_max, seq_lens, page_table, new)
            return
        touched = min((new - 1 + page - 1) // page + 1, page_table.shape[1])
        new = min(new, reach(page, page_table))
        spec = Spec(kv_heads, kv_heads, dim, dim, dtype_of(k_min), device_target(k.device))
        sources: dict[str, Any] = {
            "new": new, "touched": touched, "k_ptr": Slot(0, "*u8" if k.dtype == FP8 else _pointer(k)),
            "k_min_ptr": Slot(1, _pointer(k_min)), "k_max_ptr": Slot(2, _pointer(k_max)),
        } | _of_cache(len(k), page, seq_lens, page_table, 3)  # fmt: skip
        sources |= {f"stride_k{axis}": x for axis, x in zip("bhn", k.stride(), strict=False)}
        plan = PagePlan(spec, page, k.dtype == FP8)
        launch = self._launch(plan, "bound_pages", batch * touched * kv_heads, sources, k.device)
        launch((k.view(torch.uint8) if k.dtype == FP8 else k, k_min, k_max, seq_lens, page_table))

    def top(
        self, q: Tensor, k_min: Tensor, k_max: Tensor, seq_lens: Tensor, page_table: Tensor, page: int, count: int,
        recent: int = 1, shared: bool = True, backend: str = "auto",
    ) -> Tensor:  # fmt: skip
        """For each row the `count` pages of the greatest bound, as their places in the sequence.

        q: [B, Hq, n, D]; other tensors as in `update`. recent: so many pages, the row's own and those before it, come
        first. shared: the heads of a key head choose together. Only pages that begin no later than the row take part.

        Returns int32 [B, H', n, count], H' the key heads if shared, else the query heads: places in increasing order,
        -1 after them. Of equal bounds the earlier page is taken.
        """
        (batch, heads, rows, dim), kv_heads, members = q.shape, k_min.shape[1], page_table.shape[1]
        check_heads(heads, kv_heads, dim, dim)
        if q.dtype != k_min.dtype and k_min.dtype != torch.float32:
            raise error("A502", f"q is {q.dtype} and the bounds of pages are {k_min.dtype}", help="keep one dtype")
        lists = kv_heads if shared else heads
        if not _on_gpu(q, backend):
            return _top(q, k_min, k_max, seq_lens, page_table, page, count, recent, shared)
        keys = torch.empty((batch, lists, rows, members), dtype=torch.int32, device=q.device)
        found = torch.empty((batch, lists, rows, count), dtype=torch.int32, device=q.device)
        if found.numel() == 0:
            return found
        q = q if q.stride(-1) == 1 else q.contiguous()
        plan = PagePlan(Spec(heads, kv_heads, dim, dim, dtype_of(q), device_target(q.device)), page, shared=shared)
        sources: dict[str, Any] = {
            "rows": rows, "members": members, "recent": recent, "count": count, "q_ptr": Slot(0, _pointer(q)),
            "k_min_ptr": Slot(1, _pointer(k_min)), "k_max_ptr": Slot(2, _pointer(k_max)), "keys_ptr": Slot(3, "*i32"),
            "list_ptr": Slot(4, "*i32"),
        } | _of_cache(len(k_min), page, seq_lens, page_table, 5)  # fmt: skip
        sources |= {f"stride_q{axis}": x for axis, x in zip("bhn", q.stride(), strict=False)}
        values = (q, k_min, k_max, keys, found, seq_lens, page_table)
        grid = batch * rows * kv_heads * -(-members // plan.scored)
        self._launch(plan, "score_pages", grid, sources, q.device)(values)
        self._launch(plan, "choose_pages", batch * rows * lists, sources, q.device)(values)
        return found

    def _launch(
        self, plan: PagePlan, function: str, grid: int, sources: Mapping[str, Any], device: torch.device
    ) -> Callable[[Sequence[Any]], None]:
        from attndsl.runtime.triton_launch import prepare_small

        key = (plan, function, grid, device, tuple(sources.items()))
        if key not in self._prepared:
            if len(self._prepared) >= MAX_PREPARED:
                self._prepared.clear()
            self._prepared[key] = prepare_small(
                self.generate(plan), function, plan.spec.target, _WARPS[function], grid, sources, device
            )
        return self._prepared[key]


def _of_cache(pages: int, page: int, seq_lens: Tensor, page_table: Tensor, first: int) -> dict[str, Any]:
    """Parameters of a cache's lengths and table, which stand at `first` among a call's values."""
    return {
        "seq_lens_ptr": Slot(first, "*i32"), "page_table_ptr": Slot(first + 1, "*i32"), "pages": pages,
        "capacity": reach(page, page_table), "stride_lens": seq_lens.stride(0),
        "stride_table": page_table.stride(0),
    }  # fmt: skip


def _pointer(x: Tensor) -> str:
    from attndsl.runtime.triton_launch import POINTER

    return POINTER[x.dtype]


def _on_gpu(x: Tensor, backend: str) -> bool:
    return backend == "triton" or (backend == "auto" and x.is_cuda)


def check_bounds(k: Tensor, k_min: Tensor, k_max: Tensor, seq_lens: Tensor, page_table: Tensor) -> None:
    """Raises `PatternError` (A550, A551, A560) where the tensors do not go together."""
    sizes = (*k.shape[:2], k.shape[3])
    for name, x in (("k_min", k_min), ("k_max", k_max)):
        if x.shape != sizes or not x.is_contiguous() or x.dtype not in (k.dtype, torch.float32) or x.dtype == FP8:
            raise error(
                "A560", f"{name} is {x.dtype} {list(x.shape)}, for pages of {k.dtype} {list(k.shape)}",
                help="bounds are dense, [pages, Hkv, D], of the keys' dtype or float32",
            )  # fmt: skip
    if seq_lens.dtype != torch.int32 or seq_lens.dim() != 1:
        raise error("A550", f"seq_lens is {seq_lens.dtype} {list(seq_lens.shape)}", help="int32, one length a sequence")
    table = page_table
    if table.dtype != torch.int32 or table.dim() != 2 or len(table) != len(seq_lens) or table.stride(1) != 1:
        raise error("A551", f"page_table is {table.dtype} {list(table.shape)}", help="int32 [B, pages of a sequence]")


# ------------------------------------------------------------------------------------------ in torch


def _update(
    k: Tensor, k_min: Tensor, k_max: Tensor, seq_lens: Tensor, page_table: Tensor, new: int
) -> None:  # fmt: skip
    page, offsets = k.shape[2], torch.arange(k.shape[2], device=k.device)
    for b, length in enumerate(seq_lens.clamp(0, page_table.shape[1] * page).tolist()):
        for place in range(max(length - new, 0) // page, -(-length // page)):
            at = int(page_table[b, place])
            if 0 <= at < len(k):
                keys = k[at, :, offsets[: length - place * page]].to(k_min.dtype)
                k_min[at], k_max[at] = keys.amin(1), keys.amax(1)


def _top(
    q: Tensor, k_min: Tensor, k_max: Tensor, seq_lens: Tensor, page_table: Tensor, page: int, count: int, recent: int,
    shared: bool,
) -> Tensor:  # fmt: skip
    (batch, heads, rows, _), (pages, kv_heads, _), members = q.shape, k_min.shape, page_table.shape[1]
    group = heads // kv_heads
    lengths = seq_lens.clamp(0, members * page).view(-1, 1, 1)
    q_pos = lengths - rows + torch.arange(rows, device=q.device).view(1, -1, 1)
    member = torch.arange(members, device=q.device)
    exists = (page_table >= 0) & (page_table < pages)
    # [batch, rows, members]
    candidate = (member * page <= q_pos) & exists[:, None]
    at = page_table.clamp(0, pages - 1).long()
    found = torch.empty(batch, kv_heads if shared else heads, rows, count, dtype=torch.int32, device=q.device)
    for b in range(batch):
        low, high = (x[at[b]].transpose(0, 1).float().repeat_interleave(group, 0) for x in (k_min, k_max))
        rows_of = q[b].float()
        scores = rows_of.clamp(min=0) @ high.mT + rows_of.clamp(max=0) @ low.mT
        if shared:
            scores = scores.unflatten(0, (kv_heads, group)).sum(1)
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        scores = torch.where(member > q_pos[b] // page - recent, torch.inf, scores)
        taking_part = candidate[b].expand(scores.shape) & (scores > -torch.inf)
        order = torch.where(taking_part, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :count]
        chosen = torch.where(taking_part.gather(-1, order), order, members).sort(-1).values
        missing = torch.full((*chosen.shape[:2], count - chosen.shape[2]), members, device=q.device)
        chosen = torch.cat((chosen, missing), -1)
        found[b] = torch.where(chosen < members, chosen, -1)
    return found
