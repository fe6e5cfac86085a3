"""Serving: caches that follow a pattern. Importing this module imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attndsl import api, wiring
from attndsl.paging import page_choices
from attndsl.wiring import page_kernels

if TYPE_CHECKING:
    from attndsl.wiring import PagePool
else:
    PagePool = wiring.page_pool()


class PagedCache(PagePool):
    """Keys and values of B sequences in a pool of pages; pages that the pattern can no longer read are given back.

    >>> import attndsl.serving, torch
    >>> attn = attndsl.compile("causal & (window(64) | sink(4))")
    >>> cache = attndsl.serving.PagedCache(attn, batch=1, kv_heads=2, head_dim=16, pages=8, max_len=1 << 20)
    >>> for _ in range(300):
    ...     cache.append(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16))
    ...     out = cache.decode(torch.randn(1, 4, 1, 16))
    >>> cache.lengths, cache.pages_held
    ([300], 6)

    attn: a compiled attention. batch: sequences. pages: of `page` tokens each, in the pool.
    max_len: tokens of the longest sequence, for which the table has room (four bytes a page). The pool must hold what
    the pattern keeps of one: a pattern that comes back to its columns (`dilated`) keeps all, and is refused in a pool
    that is smaller (`PatternError` A562).
    dtype: of the pool (default: torch's), float8_e4m3fn included. bounds: also keep the least and largest key of each
    page, `k_min` and `k_max` [pages, Hkv, D], in the pool's dtype (float32 for 8-bit pools), by which `top` chooses
    pages as Quest does (arXiv 2406.10774). inputs: arguments and inputs of the pattern that are known and stay so, such
    as a runtime span.

    Attributes: k, v: the pools, [pages, Hkv, page, D] and Dv. page_table: int32 [batch, max_len / page], -1 where there
    is no page. seq_lens: int32 [batch], and lengths, the same on the host. pages_held, bytes.
    """

    def __init__(
        self,
        attn: api.Attention,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        pages: int,
        max_len: int,
        page: int = 16,
        v_dim: int | None = None,
        dtype: Any = None,
        device: Any = None,
        bounds: bool = False,
        **inputs: Any,
    ) -> None:
        super().__init__(
            attn, attn.retention(page, **inputs), batch, kv_heads, head_dim, head_dim if v_dim is None else v_dim,
            pages, max_len, dtype, device, page_kernels() if bounds else None,
            page_choices(attn.program, page),
        )  # fmt: skip


def update_bounds(k: Any, k_min: Any, k_max: Any, seq_lens: Any, page_table: Any, new: int) -> None:
    """Make the bounds of the pages that hold the last `new` tokens of each sequence anew, for caches of one's own.

    >>> import attndsl.serving, torch
    >>> k, table, lengths = torch.randn(3, 1, 4, 8), torch.tensor([[2, 0]]).int(), torch.tensor([6]).int()
    >>> low, high = torch.zeros(3, 1, 8), torch.zeros(3, 1, 8)
    >>> attndsl.serving.update_bounds(k, low, high, lengths, table, new=2)
    >>> torch.equal(low[0], k[0, :, :2].amin(1)), torch.equal(high[2], torch.zeros(1, 8))
    (True, True)

    k: [pages, Hkv, page, D]. k_min, k_max: [pages, Hkv, D], dense, of k's dtype or float32. seq_lens: int32 [B], the
    new tokens included. page_table: int32 [B, P]; a page that does not exist is neither read nor written. One kernel on
    a GPU, the same to the bit each time; a CUDA graph of it serves all lengths.
    """
    page_kernels().update(k, k_min, k_max, seq_lens, page_table, new)


__all__ = ["PagedCache", "update_bounds"]
