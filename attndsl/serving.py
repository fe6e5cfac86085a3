"""Serving: caches that follow a pattern. Importing this module imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attndsl import api, wiring
from attndsl.asking import check_new, of_lengths
from attndsl.diagnostics import error
from attndsl.keeping import check_pool, kept_beside
from attndsl.paging import page_choices
from attndsl.wiring import decode_kept, page_kernels, token_inputs

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
    pages as Quest does (arXiv 2406.10774). on_device: the device knows which pages are free, and the host does not,
    so that a CUDA graph of `append` and `decode` serves all lengths; a sequence that does not fit is then left as it
    is, and `full` marks it. at_tokens: inputs over tokens, as NAtS's `until : int[b, h, k]`, that the cache keeps:
    `append` is given what new tokens hold, `decode` reads it, and what may be forgotten follows from it. inputs:
    arguments and inputs of the pattern that are known and stay so, such as a runtime span.

    Attributes: k, v: the pools, [pages, Hkv, page, D] and Dv. page_table: int32 [batch, max_len / page], -1 where there
    is no page. seq_lens: int32 [batch], and lengths, the same on the host. pages_held, bytes. inputs: what those in
    `at_tokens` hold, by name, as `decode` takes it; to be changed in place, so long as what no row reads stays unread.
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
        on_device: bool = False,
        at_tokens: Sequence[str] = (),
        **inputs: Any,
    ) -> None:
        check_attention(attn)
        choices = page_choices(attn.program, page) if bounds else ()
        kept = kept_beside(attn.program, attn._composition, {choice.name for choice in choices})
        check_pool(attn.program, bool(kept or choices))
        self.attn = attn
        super().__init__(
            attn, attn.retention(page, at_tokens, **inputs), batch, kv_heads, head_dim,
            head_dim if v_dim is None else v_dim, pages, max_len, dtype, device, page_kernels() if bounds else None,
            choices, attn._key, kept, on_device,
            token_inputs(attn.program, at_tokens, batch, -(-max_len // page) * page),
        )  # fmt: skip

    def plan(self, q: Any, plans: Mapping[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
        """What the attention's selections choose for q [B, Hq, n, D], the last n tokens of each sequence, by name, with
        those given: for `decode` here, in the caches of other layers, and at later steps.

        inputs: as `decode` takes them.
        """
        found, attn = self._by_bounds(q, plans), self.attn
        if {x.name for x in attn.program.selections} <= set(found):
            return found
        cache = (self.k, self.v, self.seq_lens, self.page_table)
        return plan(attn, q, *cache, plans=found, views=self.views, **inputs)


def check_attention(attn: object) -> None:
    """Raises `PatternError` (A569) for what is no compiled attention."""
    if not isinstance(attn, api.Attention):
        raise error(
            "A569", f"a compiled attention is served, not {repr(attn)[:40]}", help="pass `attndsl.compile(…)`"
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
    check_new(new)
    page_kernels().update(k, k_min, k_max, seq_lens, page_table, new)


def update_views(
    attn: api.Attention, views: Mapping[str, tuple[Any, ...]], k: Any, v: Any, seq_lens: Any, page_table: Any = None,
    *, new: int = 1, layout: str = "hnd", k_scale: Any = None, v_scale: Any = None, **inputs: Any,
) -> None:  # fmt: skip
    """Make what the last `new` tokens of each sequence change of its views anew, in place, for caches of one's own.

    >>> import attndsl.serving, torch
    >>> attn = attndsl.compile("attention a { attend causal over pool(mean, 4) }")
    >>> k, v, lengths = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16), torch.tensor([9]).int()
    >>> views = attn.views(k, v, lengths)
    >>> lengths += 2
    >>> attndsl.serving.update_views(attn, views, k, v, lengths, new=2)
    >>> out = attn.decode(torch.randn(1, 2, 1, 16), k, v, lengths, views=views)

    views: what `attn.views` returned for these caches. seq_lens: int32 [B], the new tokens included. k_scale, v_scale:
    of 8-bit caches, as `attn.decode` takes them. inputs: what `lengths` reads; tokens that it said are not present, and
    says so no more, count as new. Of tokens that were taken back (drafts that were rejected) nothing is left once the
    next ones have come. One kernel for the keys of
    a view and one for its values on a GPU; a CUDA graph of them serves all lengths.
    """
    check_attention(attn)
    check_new(new)
    update = decode_kept().update_views
    known = (attn.program, attn._key, attn._composition)
    count = of_lengths(attn.program, inputs)
    update(*known, views, k, v, seq_lens, page_table, new, layout, k_scale, v_scale, count)


def plan(
    attn: api.Attention, q: Any, k_cache: Any, v_cache: Any, seq_lens: Any, page_table: Any = None, *,
    layout: str = "hnd", scale: float | None = None, plans: Mapping[str, Any] | None = None,
    views: Mapping[str, tuple[Any, ...]] | None = None, **inputs: Any,
) -> dict[str, Any]:  # fmt: skip
    """What an attention's selections choose in a decode, by name: to be handed to `attn.decode` of other layers, and of
    later steps. Parameters are those of `attn.decode`.

    >>> import attndsl.serving, torch
    >>> attn = attndsl.compile("causal & top(2, blocks(4), by = dot(Q, mean(K)), always = same_block(4))")
    >>> q, k, lengths = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 32, 8), torch.tensor([11]).int()
    >>> attndsl.serving.plan(attn, q, k, k, lengths)["top"]
    tensor([[[[0, 2]]]], dtype=torch.int32)
    """
    check_attention(attn)
    composed = (attn.program, attn._key, attn._composition, attn._parts)
    cache = (k_cache, v_cache, seq_lens, page_table, layout)
    found: dict[str, Any] = decode_kept().plan_decode(*composed, q, *cache, *attn._given(inputs), scale, plans, views)
    return found


__all__ = ["PagedCache", "plan", "update_bounds", "update_views"]
