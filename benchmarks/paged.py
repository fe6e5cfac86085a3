"""Caches in pages, and FlashInfer's decode over them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.peers import CannotRun

if TYPE_CHECKING:
    from benchmarks.decode import Caches, DecodeRow, Step

PAGE = 16
# What FlashInfer asks for, for partial results.
_WORKSPACE_BYTES = 128 << 20


def in_pages(caches: Caches, page: int = PAGE) -> Tensor:
    """Put the caches into pools [pages, kv_heads, page, dim] in random order, in place: the same tensors taken for
    pools, so that no second copy is needed. Returns the page table, int32 [batch, pages of a sequence]."""
    sizes = caches.sizes
    each = sizes.n // page
    order = torch.randperm(sizes.batch * each, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    table = order.view(sizes.batch, each).to(sizes.device)
    shape = (sizes.batch * each, sizes.kv_heads, page, sizes.dim)
    for tensors in (caches.k, caches.v):
        for i, x in enumerate(tensors):
            by_page = x.view(sizes.batch, sizes.kv_heads, each, page, sizes.dim).transpose(1, 2).reshape(shape)
            pool = torch.empty_like(by_page)
            pool[table.flatten().long()] = by_page
            tensors[i] = pool
    return table


def with_flashinfer(row: DecodeRow, caches: Caches, mask: Tensor, tensor_cores: bool) -> Step:
    """Its batch decode over the pages that the last row reads, as a cache that evicts the others would hold them.

    mask: bool [n], what the last row sees. Its plan is made outside the timing. Raises `CannotRun` where it sees a part
    of a page only, which FlashInfer could not leave out.
    """
    try:
        peer: Any = importlib.import_module("flashinfer")
    except ImportError as error:
        raise CannotRun("not installed") from error
    sizes, seen = caches.sizes, mask.view(-1, PAGE)
    if not torch.equal(seen.any(1), seen.all(1)):
        raise CannotRun("reads parts of pages")
    table = in_pages(caches)[:, seen.all(1)]
    batch, each = table.shape
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=sizes.device) * each
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=sizes.device)
    indices = table.flatten().contiguous()
    wrapper: Any = peer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=sizes.device), "HND", use_cuda_graph=True,
        use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    wrapper.plan(
        indptr, indices, last, sizes.heads, sizes.kv_heads, sizes.dim, PAGE, q_data_type=sizes.dtype,
        kv_data_type=sizes.dtype,
    )  # fmt: skip

    def step(i: int) -> Tensor:
        out: Tensor = wrapper.run(caches.q[i].squeeze(2), (caches.k[i], caches.v[i]))
        return out.unsqueeze(2)

    return step
