"""The keys of a cache in pages or of 8 bits, in their order: for what looks at every one of them, or at some."""

from __future__ import annotations

import torch
from torch import Tensor

from attndsl.runtime.decode import FP8, DecodeTensors, reach


def in_one_piece(pool: Tensor, page_table: Tensor) -> Tensor:
    """What pages [pages, Hkv, page, D] hold of each sequence, [B, Hkv, P * page, D]: zeros for a page that does not
    exist."""
    exists = (page_table >= 0) & (page_table < len(pool))
    bits = pool.view(torch.uint8) if pool.dtype == FP8 else pool  # few operators take 8-bit floats
    pages = torch.where(exists, page_table, 0).to(torch.int64)[:, None]
    heads = torch.arange(pool.shape[1], device=pool.device)[:, None]
    found = bits[pages, heads].masked_fill_(~exists[:, None, :, None, None], 0)
    return found.view(pool.dtype).flatten(2, 3)[:, :, : reach(pool.shape[2], page_table)]


def keys_in_order(call: DecodeTensors) -> Tensor:
    """The keys of a decode, [B, Hkv, M, D]: where they lie, a copy of those in pages, and of those of 8 bits the
    numbers that they stand for, in float32 (float64 beside such queries)."""
    k = call.k if call.page_table is None else in_one_piece(call.k, call.page_table)
    if k.dtype != FP8:
        return k
    k = k.to(torch.promote_types(call.q.dtype, torch.float32))
    return k if call.k_scale is None else k * call.k_scale.to(k.dtype).view(-1, 1, 1)


def numbers_in_order(call: DecodeTensors) -> tuple[Tensor, Tensor]:
    """The keys and values of a cache, [B, Hkv, M, D], in the dtype of the queries: where they lie, or else a copy."""
    found = []
    for x, scale in ((call.k, call.k_scale), (call.v, call.v_scale)):
        x = x if call.page_table is None else in_one_piece(x, call.page_table)
        if x.dtype == FP8:
            x = x.to(torch.promote_types(call.q.dtype, torch.float32))
            x = (x if scale is None else x * scale.to(x.dtype).view(-1, 1, 1)).to(call.q.dtype)
        found.append(x)
    return found[0], found[1]


def tokens_of_cache(call: DecodeTensors, listed: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values that a cache has of listed tokens, int64 [B, Hkv, entries], in the dtype of the queries;
    zeros of a number that is no token's, or past a sequence's last."""
    lengths = call.seq_lens.clamp(0, call.capacity).view(-1, 1, 1)
    there, at = (listed >= 0) & (listed < lengths), listed.clamp(0, max(call.capacity - 1, 0))
    head = torch.arange(listed.shape[1], device=listed.device).view(-1, 1)
    pages = torch.arange(len(listed), device=listed.device).view(-1, 1, 1)
    if call.page_table is not None:
        page = call.k.shape[2]
        pages = call.page_table.to(torch.int64).gather(1, (at // page).flatten(1)).view(at.shape)
        there &= (pages >= 0) & (pages < len(call.k))
        pages, at = torch.where(there, pages, 0), at % page
    keys, values = (
        _numbers(call, x, scale, (pages, head, at), there)
        for x, scale in ((call.k, call.k_scale), (call.v, call.v_scale))
    )
    return keys, values


def _numbers(
    call: DecodeTensors, x: Tensor, scale: Tensor | None, at: tuple[Tensor, Tensor, Tensor], there: Tensor
) -> Tensor:
    """What some places of a cache [pages or B, Hkv, tokens, D] stand for; zeros where `there` says that none is."""
    if not x.numel():
        return x.new_zeros(*there.shape, x.shape[3], dtype=call.q.dtype)
    if x.dtype != FP8:
        return x[at].masked_fill_(~there[..., None], 0)
    found = x.view(torch.uint8)[at].masked_fill_(~there[..., None], 0).view(FP8)
    wide = found.to(torch.promote_types(call.q.dtype, torch.float32))
    return (wide if scale is None else wide * scale.to(wide.dtype).view(-1, 1, 1)).to(call.q.dtype)
