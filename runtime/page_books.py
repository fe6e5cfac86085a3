"""Which pages sequences hold, and which are free: kept on the host, which can say at once what does not fit, or on the
device, so that a CUDA graph of a step serves all lengths.

Both give pages back before they take new ones, and write the same page table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.eviction import Retention
from attndsl.program import CallShape, Const, Program, Where
from attndsl.runtime.token_inputs import TokenInputs
from attndsl.runtime.values import Values


class Books(Protocol):
    """The pages of a pool; `page_table` int32 [B, places] and `seq_lens` int32 [B] are the pool's own."""

    def take(self, sequences: Sequence[int] | None, rows: slice | Tensor, new: int) -> Tensor | None:
        """Make room for so many tokens of each sequence, and count them. Returns whether each fits, bool [b], or None
        where all do."""

    def release(self, b: int) -> None:
        """Give back all that a sequence holds."""

    @property
    def lengths(self) -> list[int]: ...

    @property
    def pages_held(self) -> int: ...


class HostBooks:
    """Lists on the host."""

    def __init__(
        self, retention: Retention, page_table: Tensor, seq_lens: Tensor, pages: int, max_len: int, inputs: TokenInputs
    ) -> None:
        self.retention, self.page, self.max_len, self.pages = retention, retention.page, max_len, pages
        self.page_table, self.seq_lens, self.inputs = page_table, seq_lens, inputs
        self.lengths = [0] * len(seq_lens)
        self._free = list(range(pages - 1, -1, -1))
        # For each sequence, place in the sequence -> page.
        self._held: list[dict[int, int]] = [{} for _ in self.lengths]

    @property
    def pages_held(self) -> int:
        return sum(map(len, self._held))

    def take(self, sequences: Sequence[int] | None, rows: slice | Tensor, new: int) -> None:
        """Raises `PatternError` (A557) where the pool has no page left, or a sequence would pass `max_len`; nothing has
        changed then but what was given back."""
        chosen = range(len(self.lengths)) if sequences is None else sequences
        self._give_back(chosen)
        places = [
            (b, i)
            for b in chosen
            for i in range(-(-self.lengths[b] // self.page), -(-(self.lengths[b] + new) // self.page))
        ]
        self._check_room(chosen, new, len(places))
        if places:
            pages = [self._free.pop() for _ in places]
            for (b, i), page in zip(places, pages, strict=True):
                self._held[b][i] = page
            self._set_entries(places, pages)
        for b in chosen:
            self.lengths[b] += new
        self.seq_lens[rows] += new

    def release(self, b: int) -> None:
        self._drop([(b, i) for i in self._held[b]])
        self.lengths[b] = 0
        self.seq_lens[b] = 0

    def _give_back(self, sequences: Sequence[int]) -> None:
        places: list[tuple[int, int]] = []
        for b in sequences:
            held, length = np.fromiter(self._held[b], dtype=np.int64), self.lengths[b]
            if not len(held):
                continue
            arrays = self.inputs.arrays(b, length) if self.retention.by_key else None
            places += [(b, int(i)) for i in held[self.retention.evictable(length, held, arrays)]]
        self._drop(places)

    def _drop(self, places: list[tuple[int, int]]) -> None:
        if places:
            self._free += [self._held[b].pop(i) for b, i in places]
            self._set_entries(places, [-1] * len(places))

    def _set_entries(self, places: list[tuple[int, int]], pages: list[int]) -> None:
        b, i = torch.tensor(places, device=self.page_table.device).T
        self.page_table[b, i] = torch.tensor(pages, dtype=torch.int32, device=self.page_table.device)

    def _check_room(self, sequences: Sequence[int], new: int, wanted: int) -> None:
        longest = max((self.lengths[b] + new for b in sequences), default=0)
        if longest > self.max_len:
            raise error(
                "A557", f"a sequence of {longest} tokens passes max_len = {self.max_len}", help="make the table longer"
            )
        if wanted > len(self._free):
            raise error(
                "A557", f"{wanted} more pages are needed and {len(self._free)} of {self.pages} are free: "
                f"the pattern keeps {self.pages_held} pages of the {sum(self.lengths)} tokens so far",
                help="make the pool larger, or release a sequence",
            )  # fmt: skip


class DeviceBooks:
    """Tensors, changed in place, by operators that ask nothing of the device.

    `free`: a stack of pages, of which the first `count` are free; one more entry takes what is not to be written.
    `full`: sequences for whose tokens there was no room. These tokens are left out, and no more are taken.
    """

    def __init__(
        self, retention: Retention, page_table: Tensor, seq_lens: Tensor, pages: int, max_len: int, inputs: TokenInputs
    ) -> None:
        device = page_table.device
        self.retention, self.page, self.max_len, self.pages = retention, retention.page, max_len, pages
        self.page_table, self.seq_lens, self.inputs = page_table, seq_lens, inputs
        self.free = torch.arange(pages, -1, -1, dtype=torch.int32, device=device)
        self.free[:pages] -= 1
        self.count = torch.full((1,), pages, dtype=torch.int64, device=device)
        self.full = torch.zeros(len(seq_lens), dtype=torch.bool, device=device)
        self._places = torch.arange(page_table.shape[1], device=device)

    @property
    def lengths(self) -> list[int]:
        """Waits for the device."""
        found: list[int] = self.seq_lens.tolist()
        return found

    @property
    def pages_held(self) -> int:
        """Waits for the device."""
        return self.pages - int(self.count)

    def take(self, sequences: Sequence[int] | None, rows: slice | Tensor, new: int) -> Tensor:
        lengths, table = self.seq_lens[rows].to(torch.int64), self.page_table[rows]
        table = self._drop(table, self._evictable(lengths, rows))
        before, after = (-(-x // self.page) for x in (lengths, lengths + new))
        takes = (lengths + new <= self.max_len) & ~self.full[rows]
        wanted = torch.where(takes, after - before, 0)
        # One sequence after another, until the pool has no more.
        room = takes & (wanted.cumsum(0) <= self.count)
        taken = torch.where(room, wanted, 0)
        self.full[rows] = ~room
        most = -(-new // self.page)
        if most:
            offset = torch.arange(min(most, table.shape[1]), device=table.device)
            places = before[:, None] + offset
            inside = (offset < taken[:, None]) & (places < table.shape[1])
            nth = self.count - 1 - (taken.cumsum(0) - taken)[:, None] - offset
            pages = self.free[torch.where(inside, nth, self.pages).clamp(0, self.pages)]
            # What is not written falls into a column beside.
            wide = torch.nn.functional.pad(table, (0, 1))
            wide.scatter_(1, torch.where(inside, places, table.shape[1]), pages)
            table = wide[:, :-1]
        self.page_table[rows] = table
        self.count -= taken.sum()
        self.seq_lens[rows] = (lengths + torch.where(room, new, 0)).to(torch.int32)
        return room

    def release(self, b: int) -> None:
        rows = slice(b, b + 1)
        self.page_table[rows] = self._drop(self.page_table[rows], self.page_table[rows] >= 0)
        self.seq_lens[b] = 0
        self.full[b] = False

    def _evictable(self, lengths: Tensor, rows: slice | Tensor) -> Tensor:
        """Which places of sequences of these lengths no later row reads, bool [b, places]."""
        places, tokens = self._places[None], lengths[:, None]
        sizes, nothing = CallShape(1, 1, 1, 1, 1, 8, 8), Program.of("pages", Where(Const(True)))
        values = Values(nothing, sizes, places.device, {}, {}, {}, {"q": 0, "k": places, "Nk": tokens})
        needed = values.tensor(self.retention.needed)
        for each in self.retention.by_key:
            if any(read.input not in self.inputs.tensors for _, read in each.reads):
                # Nothing was appended yet.
                return torch.zeros_like(needed.expand(len(lengths), places.shape[1]))
            held: Any = {arg.name: self.inputs.by_lead(read, rows) for arg, read in each.reads}
            at = torch.arange(self.inputs.capacity, device=places.device)
            of_keys = {"q": 0, "k": at, "Nk": lengths.view(-1, 1, 1, 1)}
            read = replace(values, args=held, variables=of_keys, memo={}).tensor(each.needed)
            needed = needed | read.any(2).any(1).unflatten(1, (-1, self.page)).any(2)
        return ~needed & ((places + 1) * self.page <= tokens)

    def _drop(self, table: Tensor, places: Tensor) -> Tensor:
        """The rows of a table without the pages at these places, which are free then."""
        given = places & (table >= 0) & (table < self.pages)
        flat = given.flatten()
        at = torch.where(flat, self.count - 1 + flat.cumsum(0), self.pages)
        self.free.scatter_(0, at.clamp(0, self.pages), table.flatten())
        self.count += flat.sum()
        return torch.where(given, -1, table)
