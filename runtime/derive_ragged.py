"""Derived inputs of a decode: each sequence has a length of its own, which only the device knows.

What rows and keys exist, and which are the rows of the call, follows from the lengths there, so a CUDA graph serves all
of them. Tensors are as large as the longest sequence could ask for, and only row blocks that hold rows of the call are
computed, unless others are read too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from attndsl.cuts import reflexive
from attndsl.derivation import BlockMap, Cut, Document, Draw, EntryMap, Random
from attndsl.derive import class_hash, own_inputs
from attndsl.program import (
    Axis,
    CallShape,
    Coarse,
    Coarsen,
    Dim,
    InputDecl,
    Program,
    Read,
    Scalar,
    Type,
    Var,
    reads,
    walk,
)
from attndsl.relation import Lowering
from attndsl.runtime.apart import counts_apart
from attndsl.runtime.call import dim_size
from attndsl.runtime.derive import STRIP, Deriver
from attndsl.runtime.draws import last_drawn
from attndsl.runtime.strip_blocks import block_sums, gathered, pieces
from attndsl.runtime.values import Values
from attndsl.simplify import fold

# What a set of blocks reads where it has no closed form; no input has the name.
_NO_FORM = Read("", (), Type.BOOL)


@functools.lru_cache(maxsize=256)
def _touching(program: Program, heads: tuple[int, int], d: Draw) -> Scalar | None:
    """The condition on the first row of a row class and the first key of a member under which the member may be drawn
    for the class, None where it has no closed form."""
    drawn = d.drawn
    if drawn.rows is None or d.unit > 1:
        return None
    among = drawn.among
    if drawn.rows > 1 or drawn.keys > 1:
        among = Coarsen(among, drawn.rows, drawn.keys, Coarse.ANY, map=_NO_FORM)
    found = fold(Lowering(program, heads).predicate(among))
    return None if _NO_FORM in walk(found) else found


@dataclass(slots=True)
class RaggedDeriver(Deriver):
    """The derived inputs of one kind of decode. The shape's `k_len` is the cache's capacity."""

    def of(self, inputs: Sequence[Tensor], args: Sequence[int], lengths: Tensor) -> list[Tensor]:
        """The derived inputs, in their order. lengths: int32 [B], as they were given."""
        lengths = lengths.clamp(0, self.shape.k_len).to(torch.int64).view(-1, 1, 1, 1)
        return self.made(inputs, args, {}, lengths)

    def _first_row(self, decl: InputDecl) -> int:
        """As if all sequences were as long as they may be: how many rows are computed."""
        d, q_len = decl.derivation, self._lengths(self._unit(decl))[0]
        block_q = d.block_q if isinstance(d, BlockMap) else (d.drawn.rows if isinstance(d, Draw) else None) or q_len
        return max(0, q_len - self._blocks(decl, max(1, block_q), q_len) * block_q)

    def _unit(self, decl: InputDecl) -> int:
        assert isinstance(decl.derivation, BlockMap | Draw)
        return decl.derivation.unit

    def _blocks(self, decl: InputDecl, block_q: int, q_len: int) -> int:
        """How many blocks of rows are computed: all, or as many as the rows of a call can touch."""
        d, whole = decl.derivation, -(-q_len // block_q)
        assert isinstance(d, BlockMap | Draw)
        if d.everywhere or (isinstance(d, Draw) and d.drawn.rows is None):
            return whole
        return min(whole, (self.shape.rows - 1) // (d.unit * block_q) + 2) if self.shape.rows else 0

    def _first_block(self, decl: InputDecl, block_q: int, values: Values) -> Tensor:
        """The first of them for each sequence, int64 [B, 1, 1, 1]."""
        assert values.lengths is not None
        whole = -(-self._lengths(self._unit(decl))[0] // block_q)
        first = (values.lengths - self.shape.rows).clamp(min=0) // (self._unit(decl) * block_q)
        return torch.minimum(first, torch.full_like(first, whole - self._blocks(decl, block_q, whole * block_q)))

    def _made(self, decl: InputDecl, values: Values) -> Tensor:
        if isinstance(decl.derivation, Cut):
            return self._cut(decl, decl.derivation, values)
        return Deriver._made(self, decl, values)

    def _cut(self, decl: InputDecl, cut: Cut, values: Values) -> Tensor:
        """Of the rows of a call: how far the keys that a sequence has reach whose value is below a row's.

        As `make_cut` does it, an entry lies among the keys, or is one past the last, whatever the inputs hold.
        """
        assert values.lengths is not None
        lengths, rows, capacity = values.lengths.view(-1, 1), self.shape.rows, self.shape.k_len
        position = (lengths - rows + self._range(0, rows)).clamp(min=0)
        values = values.at(Nq=values.lengths, Nk=values.lengths, q=position[:, None, :, None])
        size = (self.shape.batch, rows if cut.owner else 1)
        own = values.tensor(cut.own).expand(size[0], 1, size[1], 1)[:, 0, :, 0]
        if isinstance(cut.other, Var):
            # Positions are their own values.
            found = own.to(torch.int64) + cut.inclusive
        else:
            place = self._range(0, capacity)
            other = values.at(k=place.view(1, 1, 1, -1)).tensor(cut.other).expand(size[0], 1, 1, capacity)[:, 0, 0]
            # What lies past a sequence's last token is above all.
            other = torch.where(place < lengths, other, torch.iinfo(other.dtype).max)
            found = torch.searchsorted(other, own.to(other.dtype).contiguous(), right=cut.inclusive)
        found = torch.minimum(found.clamp(min=0), lengths)
        if reflexive(cut, self.program):
            found = torch.maximum(found, position + 1) if cut.inclusive else torch.minimum(found, position)
        return found.to(torch.int32).reshape(self._size(decl))

    def _entry_map(self, decl: InputDecl, d: EntryMap, values: Values) -> Tensor:
        assert values.lengths is not None
        lengths = values.lengths
        first = lengths - self.shape.rows if d.rows == 1 else 0
        return self._entries_seen(decl, d, values.at(Nq=lengths, Nk=lengths), first)

    def _map(self, decl: InputDecl, d: BlockMap, values: Values) -> Tensor:
        if d.document is not None:
            return Deriver._map(self, decl, d, values)
        found = torch.zeros(self._size(decl), dtype=torch.bool, device=self.device)
        for at, count, existing in self._ragged_counts(decl, d.block_q, d.block_k, values):
            share = Fraction(repr(d.fraction)) if d.mode is Coarse.FRACTION else Fraction(1)
            needed = (existing * share.numerator + share.denominator - 1) // share.denominator
            chosen = count > 0 if d.mode is Coarse.ANY else (count >= needed) & (existing > 0)
            self._put(found, decl, at, chosen)
        return found

    def _draw(self, decl: InputDecl, d: Draw, values: Values) -> Tensor:
        assert values.lengths is not None
        if d.drawn.document is not None:
            return self._draw_of_documents(decl, d.drawn, d.drawn.document, values)
        block_q = max(1, self._lengths(d.unit)[0]) if d.drawn.rows is None else d.drawn.rows
        of_class, rows, size = class_hash(d.drawn.seed, Var("q")), decl.dims[-2], self._size(decl)
        of_call = (rows.axis, rows.block) == (Axis.Q, 1)
        # Rows of the call are counted from its first; those before it go to a place of their own, which is dropped.
        found = torch.zeros(*size[:-2], size[-2] + of_call, 2, dtype=torch.int64, device=self.device)
        for at, candidate in self._candidates(decl, d, block_q, values):
            last = last_drawn(values.at(q=at).tensor(of_class), candidate, d.drawn.count)
            if of_call:
                at = at - (values.lengths - self.shape.rows)
                at = torch.where((at >= 0) & (at < self.shape.rows), at, self.shape.rows)
            self._put(found, decl, at, last)
        return found[..., : size[-2], :].contiguous()

    def _draw_of_documents(self, decl: InputDecl, drawn: Random, document: Document, values: Values) -> Tensor:
        """Of each position, or of the call's rows, the last member that its row class draws."""
        assert values.lengths is not None
        size, rows = self._size(decl), self.shape.rows
        if decl.dims[-2].axis is not Axis.Q:
            return self._draw_apart(torch.full(size, -1, device=self.device), decl, drawn, document, values)
        # Rows of the call stand elsewhere in each sequence.
        every = torch.full((*size[:-2], self.shape.k_len, size[-1]), -1, device=self.device)
        of_tokens = replace(decl, dims=(*decl.dims[:-2], Dim(Axis.K), decl.dims[-1]))
        every = self._draw_apart(every, of_tokens, drawn, document, values)
        if not self.shape.k_len:
            return every.new_full(size, -1)
        at = (values.lengths.view(-1, 1) - rows + self._range(0, rows)).clamp(min=0)
        at = at.view(-1, *[1] * (every.dim() - 3), rows, 1)
        return every.gather(-2, at.expand(*every.shape[:-2], rows, size[-1]))

    def _counts_apart(
        self, decl: InputDecl, document: Document, block_q: int | None, block_k: int, values: Values
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        assert values.lengths is not None
        unit, strip = self._unit(decl), STRIP[self.device.type] // self._lead(decl)
        own, k_len = -(-values.lengths // unit), self._lengths(unit)[1]
        condition, values = self._conditions[decl.name], values.at(Nq=own, Nk=own)
        yield from counts_apart(document, condition, (block_q, block_k), values, (k_len, k_len), strip)

    def _candidates(self, decl: InputDecl, d: Draw, block_q: int, values: Values) -> Iterator[tuple[Tensor, Tensor]]:
        """Some row classes after the other: their places int64 [B, 1, n, 1], and which members may be drawn for them,
        bool [B or 1, heads or 1, n, members]. In closed form no pair is looked at."""
        condition = _touching(self.program, (self.shape.heads, self.shape.kv_heads), d)
        if condition is None:
            for at, count, _ in self._ragged_counts(decl, block_q, d.drawn.keys, values):
                yield at, count > 0
            return
        assert values.lengths is not None
        q_len, k_len = self._lengths(d.unit)
        blocks, lengths = self._blocks(decl, block_q, q_len), values.lengths
        if blocks == 0 or k_len == 0 or self.shape.batch == 0:
            return
        at = self._first_block(decl, block_q, values) + self._range(0, blocks).view(-1, 1)
        first_row, first_key = at * block_q, self._range(0, -(-k_len // d.drawn.keys)) * d.drawn.keys
        inside = values.at(Nq=lengths, Nk=lengths, q=first_row, k=first_key.view(1, 1, 1, -1)).tensor(condition)
        yield at, inside & (first_row < lengths) & (first_key < lengths)

    def _put(self, found: Tensor, decl: InputDecl, at: Tensor, values: Tensor) -> None:
        """Write values [B, heads or 1, n, columns] to the places [B, 1, n, 1] along an input's rows."""
        values = values.expand(self.shape.batch, *values.shape[1:])
        places = at.expand(values.shape)
        if not any(dim.axis is Axis.H for dim in decl.dims):
            values, places = values[:, 0], places[:, 0]
        else:
            values, places = (x.expand(-1, found.shape[1], -1, -1) for x in (values, places))
        found.scatter_(-2, places, values.to(found.dtype))

    def _ragged_counts(
        self, decl: InputDecl, block_q: int, block_k: int, values: Values
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some blocks of rows after the other: their places int64 [B, 1, n, 1], and for each of their block pairs how
        many pairs are in the counted set, int64 [B, heads or 1, n, key blocks], and how many exist."""
        assert values.lengths is not None
        unit = self._unit(decl)
        q_len, k_len = self._lengths(unit)
        blocks = self._blocks(decl, block_q, q_len)
        if blocks == 0 or k_len == 0 or self.shape.batch == 0:
            return
        condition, lengths = self._conditions[decl.name], -(-values.lengths // unit)
        values = values.at(Nq=lengths, Nk=lengths)
        first = self._first_block(decl, block_q, values)
        lead = prod(dim_size(dim, self.program, self.shape) for dim in decl.dims if dim.axis in (Axis.B, Axis.H))
        sparse = lead if reads(condition, "h", "g") else self.shape.batch
        strip = max(1, STRIP[self.device.type] // max(1, sparse))
        columns = list(pieces(0, k_len, block_k, strip))

        def of_rows(low: int, high: int) -> Tensor:
            q_pos = first * block_q + self._range(low, high).view(-1, 1)

            def of_keys(begin: int, end: int) -> Tensor:
                k_pos = self._range(begin, end)
                inside = values.at(q=q_pos, k=k_pos).tensor(condition) & (q_pos < lengths) & (k_pos < lengths)
                return block_sums(inside, block_q, block_k)

            return torch.cat([count for _, count in gathered(columns, block_k, k_len, of_keys)], -1)

        end = blocks * block_q
        for part, count in gathered(pieces(0, end, block_q, max(1, strip // min(k_len, strip))), block_q, end, of_rows):
            at = first + self._range(part.start, part.stop).view(-1, 1)
            of_rows_there = (lengths - at * block_q).clamp(0, block_q)
            of_keys_there = (lengths - self._range(0, count.shape[-1]) * block_k).clamp(0, block_k)
            yield at, count, of_rows_there * of_keys_there


def ragged_deriver(
    program: Program, shape: CallShape, device: torch.device, inputs: Sequence[Tensor]
) -> RaggedDeriver | None:
    """What derives the inputs of a decode's program, of a call's own; None where it has none."""
    if len(own_inputs(program)) == len(program.inputs):
        return None
    return RaggedDeriver(program, shape, device, {}, inputs)


__all__ = ["RaggedDeriver", "ragged_deriver"]
