"""How the keys of documents of one kind divide into members, for rows of which each has those of its own document.

A row has *columns*: the blocks of its document in a row, the groups of its keys that are of one member each
(`document_groups.py`), or its diagonals. What is asked of single keys, or known of them, is put together for these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.program import Scalar
from attndsl.runtime.document_blocks import Kind
from attndsl.runtime.document_groups import DocumentGroups
from attndsl.runtime.masses import shares_of_documents
from attndsl.runtime.values import Values


@dataclass(frozen=True, slots=True)
class Rows:
    """Some of a call's rows: their positions, of each the first token of its document and one past the last, int64
    [B, n], and whether it is of a document of the kind, bool [B, n]."""

    position: Tensor
    first: Tensor
    end: Tensor
    there: Tensor

    @property
    def length(self) -> Tensor:
        """Of their documents, [B, 1, n, 1]."""
        return (self.end - self.first)[:, None, :, None]


class Members(Protocol):
    """The members of documents of one kind. count: columns of a row. width: how many numbers are held of each row."""

    @property
    def count(self) -> int: ...

    @property
    def width(self) -> int: ...

    def touched(self, condition: Scalar, values: Values, rows: Rows) -> Tensor:
        """Whether rows have a pair with each of their columns: bool [B, H or 1, n, count]."""
        ...

    def given(self, masses: Tensor, entry: tuple[int, int], rows: Rows, largest: bool) -> Tensor:
        """Masses [B, H, n, entries] of the entries of rows' documents, of a size and so far apart, as those of columns,
        [B, H, n, count]: each has the share of an entry's tokens that it holds."""
        ...

    def first(self, begin: Tensor) -> Tensor:
        """The first token of each column of documents that begin at these tokens [B, n]: [B, H or 1, n, count]."""
        ...

    def numbers(self, begin: Tensor) -> Tensor | None:
        """The members that columns are, as many as there may be where there is none; None: a member each."""
        ...


@dataclass(frozen=True, slots=True)
class InBlocks:
    """Blocks of so many keys in a row."""

    kind: Kind
    size: int

    @property
    def _tokens(self) -> int:
        return self.kind.documents.first.shape[-1]

    @property
    def count(self) -> int:
        return -(-min(self.kind.most, self._tokens) // self.size)

    @property
    def width(self) -> int:
        return self.count

    def touched(self, condition: Scalar, values: Values, rows: Rows) -> Tensor:
        """condition: of a row and a block, read at the block's first key."""
        k = rows.first[..., None] + torch.arange(self.count, device=rows.first.device) * self.size
        exists = (k < rows.end[..., None]) & rows.there[..., None]
        here = values.at(q=rows.position[:, None, :, None], k=k.clamp(max=self._tokens - 1)[:, None])
        return here.tensor(condition) & exists[:, None]

    def given(self, masses: Tensor, entry: tuple[int, int], rows: Rows, largest: bool) -> Tensor:
        return to_members(masses, entry, (self.size, self.count), rows.length, largest)

    def first(self, begin: Tensor) -> Tensor:
        k = begin[..., None] + torch.arange(self.count, device=begin.device) * self.size
        return k.clamp(max=self._tokens - 1)[:, None]

    def numbers(self, begin: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class InLags:
    """Diagonals of `size` keys each, counted back from the row."""

    kind: Kind
    size: int

    @property
    def _reach(self) -> int:
        return min(self.kind.most, self.kind.documents.first.shape[-1])

    @property
    def count(self) -> int:
        return -(-self._reach // self.size)

    @property
    def width(self) -> int:
        return self._reach

    def _keys(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The keys of rows from their own back, [B, 1, n, keys], and which there are."""
        k = rows.position[..., None] - torch.arange(self._reach, device=rows.first.device)
        exists = (k >= rows.first[..., None]) & rows.there[..., None]
        return k.clamp(min=0)[:, None], exists[:, None]

    def touched(self, condition: Scalar, values: Values, rows: Rows) -> Tensor:
        k, exists = self._keys(rows)
        inside = values.at(q=rows.position[:, None, :, None], k=k).tensor(condition) & exists
        return self._apart(inside).any(-1)

    def given(self, masses: Tensor, entry: tuple[int, int], rows: Rows, largest: bool) -> Tensor:
        k, exists = self._keys(rows)
        first = rows.first[:, None, :, None]
        each = shares_of_tokens(masses, entry, k - first, exists, rows.length)
        if not largest:
            return self._apart(torch.stack([x for _, x in each]).sum(0)).sum(-1)
        # One past the last of the keys that lie as far back as each does, in blocks of distances.
        until = (
            rows.position[:, None, :, None] - torch.arange(self._reach, device=k.device) // self.size * self.size + 1
        )
        (size, stride), found = entry, masses.new_zeros(*masses.shape[:3], self.count)
        for nth, x in each:
            begin = first + (torch.div(k - first, stride, rounding_mode="floor") - nth) * stride
            end = torch.minimum(begin + size, rows.end[:, None, :, None])
            # All tokens that the diagonal has of an entry: each gives what they give together.
            together = torch.minimum(end, until) - torch.maximum(begin, until - self.size)
            found = torch.maximum(found, self._apart(x * together).amax(-1))
        return found

    def _apart(self, x: Tensor) -> Tensor:
        found: Tensor = pad(x, (0, -x.shape[-1] % self.size)).unflatten(-1, (self.count, self.size))
        return found

    def first(self, begin: Tensor) -> Tensor:
        raise AssertionError("a diagonal has no key of its own")

    def numbers(self, begin: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class InGroups:
    """Groups of keys. most: columns of a row. members: the numbers that members may have."""

    kind: Kind
    groups: DocumentGroups
    most: int
    members: int

    @property
    def count(self) -> int:
        return min(self.most, self._reach)

    @property
    def _reach(self) -> int:
        return min(self.kind.most, self.groups.tokens)

    @property
    def width(self) -> int:
        return self._reach

    @property
    def apart(self) -> bool:
        """Whether each head has groups of its own."""
        return self.groups.order.shape[1] > 1

    def _of(self, x: Tensor, at: Tensor) -> Tensor:
        """What groups or places [B, H or 1, tokens] have at some, [B, H or 1, n, m]."""
        return x.gather(-1, at.expand(-1, x.shape[1], -1, -1).flatten(2)).view(*x.shape[:2], *at.shape[2:])

    def _keys(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The keys of rows' documents in the order of their members, [B, H or 1, n, keys], which column each is of, and
        whether there is one."""
        at = rows.first[..., None] + torch.arange(self._reach, device=rows.first.device)
        here = (at < rows.end[..., None]) & rows.there[..., None]
        at = at.clamp(max=self.groups.tokens - 1)[:, None]
        number = self._of(self.groups.number, at)
        exists = here[:, None] & (number < self.groups.tokens)
        base = self._of(self.groups.base, rows.first[:, None, :, None])
        return self._of(self.groups.order, at), torch.where(exists, number - base, self.count), exists

    def _columns(self, begin: Tensor) -> tuple[Tensor, Tensor]:
        """The groups of documents that begin at these tokens, and which there are: [B, H or 1, n, count]."""
        at = begin[:, None, :, None]
        nth = torch.arange(self.count, device=begin.device)
        group, exists = self._of(self.groups.base, at) + nth, nth < self._of(self.groups.count, at)
        return group.clamp(max=self.groups.tokens - 1), exists

    def touched(self, condition: Scalar, values: Values, rows: Rows) -> Tensor:
        k, column, exists = self._keys(rows)
        inside = values.at(q=rows.position[:, None, :, None], k=k).tensor(condition) & exists
        return self._largest(inside.to(torch.int32), column) > 0

    def given(self, masses: Tensor, entry: tuple[int, int], rows: Rows, largest: bool) -> Tensor:
        k, column, exists = self._keys(rows)
        each = shares_of_tokens(masses, entry, k - rows.first[:, None, :, None], exists, rows.length)
        if not largest:
            return self._sum(torch.stack([x for _, x in each]).sum(0), column, rows)
        found = masses.new_zeros(*masses.shape[:3], self.count)
        for nth, x in each:
            # All tokens that a member has of an entry: each gives what they give together.
            together = 1 if entry == (1, 1) else self._of(self._alike(entry, nth), k)
            found = torch.maximum(found, self._largest(x * together, column))
        return found

    def _largest(self, x: Tensor, column: Tensor) -> Tensor:
        """The largest of each column's keys of what is at least 0."""
        lead = torch.broadcast_shapes(x.shape[:3], column.shape[:3])
        found = x.new_zeros(*lead, self.count + 1)
        found.scatter_reduce_(-1, column.expand(*lead, -1), x.expand(*lead, -1), "amax")
        return found[..., : self.count]

    def _sum(self, x: Tensor, column: Tensor, rows: Rows) -> Tensor:
        """The sum of each column's keys, which follow one another: by doubling, so that equal keys have equal sums."""
        reach = 1
        while reach < x.shape[-1]:
            same = column[..., reach:] == column[..., :-reach]
            x = x + pad(torch.where(same, x[..., :-reach], 0), (reach, 0))
            reach *= 2
        group, exists = self._columns(rows.first)
        last = (self._of(self.groups.stop, group) - 1 - rows.first[:, None, :, None]).clamp(0, x.shape[-1] - 1)
        return torch.where(exists, x.gather(-1, last.expand(*x.shape[:3], -1)), 0)

    def _alike(self, entry: tuple[int, int], nth: int) -> Tensor:
        """Of each token how many tokens its member has of the entry that is the `nth` of those it lies in, counted
        back: int64 [B, H or 1, tokens]."""
        (size, stride), of, documents = entry, self.groups.of_token, self.kind.documents
        first, end, every = documents.first[:, None], documents.end[:, None], documents.every
        begin = first + ((every - first) // stride - nth) * stride
        found = torch.zeros_like(of)
        for i in range(min(size, self._reach)):
            token = begin + i
            own = of.gather(-1, token.clamp(0, self.groups.tokens - 1).expand(of.shape))
            found += (own == of) & (token >= first) & (token < end)
        return found

    def first(self, begin: Tensor) -> Tensor:
        return self._of(self.groups.token, self.of_documents(begin))

    def numbers(self, begin: Tensor) -> Tensor | None:
        group, exists = self._columns(begin)
        return torch.where(exists, self._of(self.groups.member, group), self.members)

    def of_documents(self, begin: Tensor) -> Tensor:
        """The groups of documents that begin at these tokens [B, n], some group where there is none."""
        return self._columns(begin)[0]


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


def shares_of_tokens(
    masses: Tensor, entry: tuple[int, int], offset: Tensor, exists: Tensor, length: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Masses [B, H, n, entries] of a document's entries, of a size and so far apart, as those of the tokens at these
    offsets in it, [B, H or 1, n, keys], of which some exist. A token may lie in several: the n-th, counted back from
    the last that begins no later than it, and of it each token's share."""
    size, stride = entry
    for nth in range(-(-size // stride)):
        at = torch.div(offset, stride, rounding_mode="floor") - nth
        inside = exists & (at >= 0) & (offset < at * stride + size)
        tokens = (torch.minimum(at * stride + size, length) - at * stride).clamp(min=1)
        at = at.clamp(0, masses.shape[3] - 1).expand(*masses.shape[:3], -1)
        yield nth, torch.where(inside, masses.gather(-1, at) / tokens, 0)


__all__ = ["InBlocks", "InGroups", "InLags", "Members", "Rows", "to_members"]
