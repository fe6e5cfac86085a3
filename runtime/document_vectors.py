"""Vectors and masses of the blocks of documents (`document_blocks.py`), for rows of which each has a document's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attndsl.runtime.document_blocks import Blocks
from attndsl.runtime.document_members import InGroups


class MemberVectors(Protocol):
    """Vectors of members of documents of one kind. width: how many numbers are held of each row."""

    @property
    def width(self) -> int: ...

    def dots(self, x: Tensor, begin: Tensor, count: int) -> Tensor:
        """x [B, H, n, D] . the first `count` members of documents that begin at tokens [B, n]: [B, H, n, count]."""
        ...


@dataclass(slots=True)
class BlockVectors:
    """Vectors of blocks of documents of one kind. of: [B, heads, n, D] of those that begin at tokens [B, n]. few: a
    document has one, or few, so that what a row needs is picked."""

    blocks: Blocks
    of: Callable[[Tensor], Tensor]
    few: bool
    _every: Tensor | None = None

    @property
    def width(self) -> int:
        return 1 if self.few else self.blocks.room

    def dots(self, x: Tensor, begin: Tensor, count: int) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class GroupVectors:
    """Vectors [B, heads, tokens, D] of groups of keys."""

    members: InGroups
    of: Tensor

    @property
    def width(self) -> int:
        return self.members.count * self.of.shape[3] if self._picks else self.members.groups.tokens

    @property
    def _picks(self) -> bool:
        """Whether each row is given the vectors of its own columns, which are fewer numbers than all groups."""
        return self.members.count * self.of.shape[3] <= self.members.groups.tokens

    def dots(self, x: Tensor, begin: Tensor, count: int) -> Tensor:
        group = self.members.of_documents(begin)
        heads = max(self.of.shape[1], group.shape[1])
        y, group = self.of.expand(-1, heads, -1, -1), group.expand(-1, heads, -1, -1)
        x = x.unflatten(1, (heads, -1))
        if self._picks:
            at = group.flatten(2)[..., None].expand(-1, -1, -1, y.shape[3])
            own = y.gather(2, at).unflatten(2, (-1, count)).unsqueeze(2)
            found: Tensor = (x.unsqueeze(4) * own).sum(-1).flatten(1, 2)
            return found
        whole: Tensor = x @ y.unsqueeze(2).transpose(-1, -2)
        return whole.gather(-1, group.unsqueeze(2).expand(*whole.shape[:4], -1)).flatten(1, 2)


def picked(x: Tensor, at: Tensor) -> Tensor:
    """[B, H, n, D] of vectors [B, H, .., D] at places [B, n]."""
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


__all__ = ["BlockVectors", "GroupVectors", "MemberVectors", "picked"]
