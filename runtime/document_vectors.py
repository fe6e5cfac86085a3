"""Vectors and masses of the blocks of documents (`document_blocks.py`), for rows of which each has a document's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.runtime.document_blocks import Blocks
from attndsl.runtime.masses import shares_of_documents


@dataclass(slots=True)
class BlockVectors:
    """Vectors of blocks of documents of one kind. of: [B, heads, n, D] of those that begin at tokens [B, n]. few: a
    document has one, or few, so that what a row needs is picked."""

    blocks: Blocks
    of: Callable[[Tensor], Tensor]
    few: bool
    _every: Tensor | None = None

    def dots(self, x: Tensor, begin: Tensor, count: int) -> Tensor:
        """x [B, H, n, D] . the first `count` blocks of documents that begin at tokens [B, n]: [B, H, n, count]."""
        tokens = self.blocks.number.shape[-1]
        nth = torch.arange(count, device=begin.device)
        if self.few:
            at = (begin[..., None] + nth * self.blocks.size).clamp(max=tokens - 1)
            y = self.of(at.flatten(1)).unflatten(2, (-1, count))
            apart = x.unflatten(1, (y.shape[1], -1)).unsqueeze(4)
            dots: Tensor = (apart * y.unsqueeze(2)).sum(-1).flatten(1, 2)
            return dots
        if self._every is None:
            self._every = self.of(self.blocks.place.clamp(max=tokens - 1))
        whole: Tensor = x.unflatten(1, (self._every.shape[1], -1)) @ self._every.unsqueeze(2).transpose(-1, -2)
        at = (self.blocks.first_of(begin)[..., None] + nth).clamp(max=self.blocks.room - 1)
        dots = whole.flatten(1, 2).gather(-1, at[:, None].expand(-1, x.shape[1], -1, -1))
        return dots


def picked(x: Tensor, at: Tensor) -> Tensor:
    """[B, H, n, D] of vectors [B, H, .., D] at places [B, n]."""
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def to_members(
    masses: Tensor, entry: tuple[int, int], members: tuple[int, int], length: Tensor, largest: bool
) -> Tensor:
    """Masses [B, H, rows, entries] of documents of these lengths, [B, 1, rows, 1], as those of members, [B, H, rows,
    members]. entry: its size, and how far apart entries begin. members: the keys of one, and how many there are."""
    (size, stride), (keys, count) = entry, members
    if size == stride and keys % size == 0:
        whole = pad(masses, (0, count * (keys // size) - masses.shape[3])).unflatten(3, (count, -1))
        found: Tensor = whole.amax(4) if largest else whole.sum(4)
        return found
    start = torch.arange(count, device=masses.device) * keys
    begins = torch.zeros((), dtype=torch.int64, device=masses.device)
    return shares_of_documents(masses, begins, length, start.view(1, 1, 1, -1), size, stride, keys, largest)


__all__ = ["BlockVectors", "picked", "to_members"]
