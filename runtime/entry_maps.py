"""Maps of rows and entries, strip by strip: at which a set holds for all tokens of an extent, or for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.derivation import EntryMap
from attndsl.program import Scalar
from attndsl.runtime.values import Values


def entry_map(
    wanted: EntryMap, condition: Scalar, values: Values, first: Any, sizes: tuple[int, int], strip: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some rows, or classes, and entries after the other: bool [batch or 1, heads or 1, rows, entries].

    condition: of a pair of positions. values: of what reads them, with Nq and Nk. first: the position of the first
    row, a number or int64 [B, 1, 1, 1]. sizes: how many rows or classes and entries there are. strip: how many pairs
    are looked at at once, at least those of one class and entry.
    """
    if wanted.ends:
        yield from _of_told(wanted, condition, values, first, sizes, strip)
        return
    rows, entries = sizes
    size, stride, each = wanted.size, wanted.stride, wanted.rows
    k_len = values.variables["Nk"]
    columns = min(entries, max(1, strip // (max(size, stride) * each)))
    lines = max(1, strip // max(1, (columns * stride + size) * each))
    for low in range(0, rows, lines):
        high = min(low + lines, rows)
        q_pos = first + torch.arange(low * each, high * each, device=values.device).view(-1, 1)
        for begin in range(0, entries, columns):
            end = min(begin + columns, entries)
            k_pos = torch.arange(begin * stride, (end - 1) * stride + size, device=values.device)
            inside = values.at(q=q_pos, k=k_pos).tensor(condition)
            if not wanted.every:
                inside = inside & (k_pos < k_len)
            whole = torch.broadcast_shapes(inside.shape, (1, 1, (high - low) * each, k_pos.numel()))
            extents = inside.expand(whole).unfold(-1, size, stride)
            seen = extents.all(-1) if wanted.every else extents.any(-1)
            yield slice(low, high), slice(begin, end), seen if each == 1 else seen.unflatten(-2, (-1, each)).all(-2)


def _of_told(
    wanted: EntryMap, condition: Scalar, values: Values, first: Any, sizes: tuple[int, int], strip: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The same of entries that data tells: a running count of the tokens outside is the same at both of an entry's ends
    where all of its tokens are inside."""
    (rows, entries), each, tokens = sizes, wanted.rows, values.shape.k_len
    if not tokens:
        return
    lines = max(1, strip // ((tokens + entries) * each))
    token, entry = (torch.arange(n, device=values.device) for n in (tokens, entries))
    for low in range(0, rows, lines):
        high = min(low + lines, rows)
        q_pos = first + torch.arange(low * each, high * each, device=values.device).view(-1, 1)
        inside = values.at(q=q_pos, k=token).tensor(condition)
        ends = [values.at(q=q_pos, k=entry).tensor(x).clamp(0, tokens - 1) for x in wanted.ends]
        own = (1, 1, (high - low) * each)
        lead = torch.broadcast_shapes(own, *((*(1,) * (4 - x.dim()), *x.shape)[:3] for x in (inside, *ends)))
        outside = pad((~inside.expand(*lead, tokens)).cumsum(-1, dtype=torch.int32), (1, 0))
        begin, end = (x.expand(*lead, entries) for x in ends)
        seen = outside.gather(-1, end + 1) == outside.gather(-1, begin)
        yield slice(low, high), slice(0, entries), seen if each == 1 else seen.unflatten(-2, (-1, each)).all(-2)


__all__ = ["entry_map"]
