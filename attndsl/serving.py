"""Serving: caches that follow a pattern. Importing this module imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attndsl import api

if TYPE_CHECKING:
    from attndsl.api import PagePool
else:
    PagePool = api.page_pool()


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
    max_len: tokens of the longest sequence, for which the table has room (four bytes a page).
    dtype: of the pool (default: torch's), float8_e4m3fn included. bounds: also keep the least and largest key of each
    page, `k_min` and `k_max` [pages, Hkv, D], in the pool's dtype (float32 for 8-bit pools), as Quest selects pages by
    (arXiv 2406.10774). inputs: arguments and inputs of the pattern that are known and stay so, such as a runtime span.

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
            pages, max_len, dtype, device, bounds,
        )  # fmt: skip


__all__ = ["PagedCache"]
