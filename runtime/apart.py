"""Pairs of block pairs in sequences of their own (`derivation.Document`): counted for each position, whose blocks begin
where its sequence does. Strip by strip, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attndsl.derivation import Document
from attndsl.program import Scalar
from attndsl.runtime.strip_blocks import block_sums
from attndsl.runtime.values import Values


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of the `positions` of the rows of a call: where each position's begins and ends, and where its rows
    do, int64 [batch or 1, 1, positions, 1], and their coordinates, of `unit` positions each."""

    first: Tensor
    end: Tensor
    rows_end: Tensor
    unit: int

    @classmethod
    def of(cls, document: Document, values: Values, positions: int) -> Sequences:
        at = values.at(q=_range(values, positions).view(-1, 1))
        ends = [at.tensor(e) for e in (document.first, document.end, document.rows or document.end)]
        size = (max(x.shape[0] if x.dim() == 4 else 1 for x in ends), 1, positions, 1)
        first, end, rows_end = (x.expand(size) for x in ends)
        return cls(first, end, rows_end, document.unit)

    def count(self, end: Tensor) -> Tensor:
        """How many coordinates there are in each position's sequence before an end of it."""
        return ((end - self.first + self.unit - 1) // self.unit).clamp(min=0)

    def row_block(self, position: Tensor, rows: int | None) -> tuple[Tensor, Tensor]:
        """The first coordinate of each position's block of rows, and how many of them there are. None: all of its
        sequence is one block."""
        count = self.count(self.rows_end)
        if rows is None:
            return torch.zeros_like(self.first), count
        begin = (position - self.first) // self.unit // rows * rows
        return begin, (count - begin).clamp(0, rows)


def counts_apart(
    document: Document, condition: Scalar, block: tuple[int | None, int], values: Values, sizes: tuple[int, int],
    strip: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:  # fmt: skip
    """Some positions after the other: how many pairs of their block of rows and each block of keys meet a condition,
    int64 [batch or 1, heads or 1, positions, key blocks], and how many there are.

    block: rows (None: all of a sequence) and keys of a block pair. sizes: positions of rows, and of keys. strip: how
    many pairs to look at together.
    """
    positions, tokens = sizes
    sequences, (rows, keys) = Sequences.of(document, values, positions), block
    position = _range(values, positions).view(-1, 1)
    columns = -(-tokens // document.unit)
    each = rows == document.unit == 1
    found = list[Tensor]()
    begin, present = sequences.row_block(position, rows)
    existing = present * (sequences.count(sequences.end) - keys * _range(values, -(-columns // keys))).clamp(0, keys)
    for low in range(0, positions, step := max(1, strip // max(1, columns))):
        at = slice(low, min(low + step, positions))
        count = _of_rows(sequences, condition, keys, values, position[at], at, columns)
        if each:
            yield at, count, existing[..., at, :]
        else:
            found.append(count)
    if each or not found:
        return
    # Of a block's rows the difference of two running sums.
    sums = torch.cat(found, -2).cumsum(-2)
    sums = torch.nn.functional.pad(sums, (0, 0, 1, 0))
    low_end, high_end = (
        (sequences.first + x * document.unit).minimum(sequences.rows_end).clamp(0, positions)
        for x in (begin, begin + present)
    )
    size = (max(sums.shape[0], begin.shape[0]), *sums.shape[1:2], positions, sums.shape[-1])
    sums = sums.expand(size[0], -1, -1, -1)
    yield slice(0, positions), sums.gather(-2, high_end.expand(size)) - sums.gather(-2, low_end.expand(size)), existing


def _of_rows(
    sequences: Sequences, condition: Scalar, keys: int, values: Values, position: Tensor, at: slice, columns: int
) -> Tensor:
    """The counts of single rows, 0 of those that are not the first of their coordinate."""
    first, end, rows_end = (x[..., at, :] for x in (sequences.first, sequences.end, sequences.rows_end))
    unit = sequences.unit
    k_pos = first + unit * _range(values, columns)
    exists = (k_pos < end) & (position < rows_end) & ((position - first) % unit == 0)
    inside = values.at(q=position, k=k_pos).tensor(condition) & exists
    return block_sums(inside, 1, keys)


def _range(values: Values, end: int) -> Tensor:
    return torch.arange(end, device=values.device)
