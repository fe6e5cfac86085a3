"""The keys of a cache in pages or of 8 bits, in their order: for what looks at every one of them."""

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
