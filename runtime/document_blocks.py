"""Blocks of the documents of a packed call, on a device: where they lie, numbered one document after the other.

How many documents there are only the device knows. But those of more than n tokens are few, and so are their blocks: a
*kind* of documents is those of some lengths, and has room for as many blocks as it can have. Nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.runtime.cuts import document_ends


@dataclass(frozen=True, slots=True)
class Documents:
    """Of each token, int64 [B, tokens], the first of its document, and one past the last of it that is present."""

    first: Tensor
    end: Tensor

    @classmethod
    def of(cls, ids: Tensor, present: Tensor | None) -> Documents:
        """Of ids [B, tokens]. present: int [B], how many tokens are, where not all are."""
        first, end = (document_ends(ids, ends).to(torch.int64) for ends in (False, True))
        return cls(first, end if present is None else torch.minimum(end, present.view(-1, 1)))

    @property
    def every(self) -> Tensor:
        """The positions of all tokens."""
        return torch.arange(self.first.shape[-1], device=self.first.device)

    def kinds(self, tokens: int) -> tuple[Kind, ...]:
        """Those of at most so many tokens, and those of more."""
        return tuple(Kind(self, least, most) for least, most in lengths(tokens, self.first.shape[-1]))


def lengths(tokens: int, most: int) -> list[tuple[int, int]]:
    """The least and the greatest lengths of kinds of documents, of at most so many tokens and of more, in a call of
    `most`."""
    most = max(1, most)
    return [(1, most)] if tokens >= most else [(1, tokens), (tokens + 1, most)]


def room(tokens: int, size: int, least: int) -> int:
    """How many blocks of a size documents of at least so many tokens may have in a call."""
    return min(tokens, tokens // size + tokens // least + 1)


@dataclass(frozen=True, slots=True)
class Kind:
    """The documents of `least` to `most` tokens that are present."""

    documents: Documents
    least: int
    most: int

    @property
    def holds(self) -> Tensor:
        """Which tokens are present and of such a document, bool [B, tokens]."""
        of, length = self.documents, self.documents.end - self.documents.first
        return (of.every < of.end) & (length >= self.least) & (length <= self.most)

    def blocks(self, size: int) -> Blocks:
        """Their blocks of so many tokens."""
        of, holds = self.documents, self.holds
        most = room(of.first.shape[-1], size, self.least)
        until = (holds & ((of.every - of.first) % size == 0)).cumsum(-1)
        nth = torch.arange(1, most + 1, device=until.device).expand(*until.shape[:-1], most)
        place = torch.searchsorted(until, nth.contiguous())
        number = (until - 1).gather(-1, of.first) + (of.every - of.first) // size
        return Blocks(size, place, torch.where(holds, number, most))


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of `size` tokens of documents of one kind. place: int64 [B, room], the first token of each, as many as
    there are tokens where there is none. number: int64 [B, tokens], that of each token's block, `room` of a token of no
    such document."""

    size: int
    place: Tensor
    number: Tensor

    @property
    def room(self) -> int:
        """How many there may be."""
        return self.place.shape[-1]

    def first_of(self, begin: Tensor) -> Tensor:
        """The numbers of the first blocks of documents that begin at these tokens; some block's of others."""
        return self.number.gather(-1, begin).clamp(max=max(0, self.room - 1))


class BlockSums:
    """Numbers of rows that come strip by strip, added up (or the largest of what is at least 0) for each block.

    A block's rows follow one another, or are put in order, so of a strip it gets one number, in one order: nothing is
    added atomically.
    """

    def __init__(self, room: int, size: int, largest: bool, in_order: bool = True) -> None:
        """room: how many blocks there may be, each of at most `size` rows, which follow one another if `in_order`."""
        self.room, self.size, self.largest, self.in_order = room, size, largest, in_order
        self._found: Tensor | None = None

    def add(self, x: Tensor, number: Tensor) -> None:
        """x: [B, H, rows, n], of rows in these blocks [B, rows]; `room` of a row that counts for none."""
        batch, heads, rows, width = x.shape
        if self._found is None:
            # With a place for rows of no block, which is dropped.
            self._found = x.new_zeros(batch, heads, self.room + 1, width)
        if not rows:
            return
        if self.largest:
            self._found.scatter_reduce_(2, number[:, None, :, None].expand(x.shape), x, "amax")
            return
        if not self.in_order:
            number, order = number.sort(dim=-1, stable=True)
            x = x.gather(2, order[:, None, :, None].expand(x.shape))
        reach = 1
        while reach < min(rows, self.size):
            # By doubling, of each block's own rows alone: equal numbers of two members stay equal sums.
            same = (number[:, reach:] == number[:, :-reach])[:, None, :, None]
            x = x + pad(torch.where(same, x[:, :, :-reach], 0), (0, 0, reach, 0))
            reach *= 2
        last = pad(number[:, 1:] != number[:, :-1], (0, 1), value=True)
        to = torch.where(last, number, self.room)[:, None, :, None].expand(x.shape)
        self._found.scatter_(2, to, self._found.gather(2, to) + x)

    @property
    def found(self) -> Tensor:
        """[B, H, room, n]"""
        assert self._found is not None, "nothing was added"
        return self._found[:, :, : self.room]


__all__ = ["BlockSums", "Blocks", "Documents", "Kind", "lengths", "room"]
