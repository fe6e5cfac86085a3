"""Members of the documents of a packed call, and what the entries of a view of it give them.

Of a row they are those of its own document, counted from its first token; of all rows those of all documents, one after
the other, with room for as many as there are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attndsl.branches import View
from attndsl.program import CallShape, Program
from attndsl.runtime.masses import shares_of_documents
from attndsl.runtime.runs import document_blocks, document_entries, runs_of


@dataclass(frozen=True, slots=True)
class Members:
    """Where the documents of a call begin and end, int64 [batch or 1, tokens]: of each token the first of its own, one
    past its last that is present, and its document's first entry, of `size` tokens every `stride`.
    ids: what divides tokens, of the same size; k_len: the call's tokens."""

    ids: Tensor
    first: Tensor
    end: Tensor
    entry: Tensor
    size: int
    stride: int
    k_len: int

    def of_rows(self, masses: Tensor, position: Tensor, member: int, largest: bool) -> Tensor:
        """Masses [B, H, rows, entries] of rows at these positions, [rows] or [B, rows], as those of their documents'
        members: float [B, H, rows, members], 0 past a document's last."""
        at = position.clamp(0, max(0, self.k_len - 1))
        at = at.expand(len(self.first), -1) if at.dim() == 1 else at
        begins, first, end = (
            (x.expand(len(at), -1).gather(-1, at) if self.k_len else x)[:, None, :, None]
            for x in (self.entry, self.first, self.end)
        )
        start = torch.arange(-(-self.k_len // member), device=masses.device).view(1, 1, 1, -1) * member
        return shares_of_documents(masses, begins, end - first, start, self.size, self.stride, member, largest)

    def classes(self, rows: int, first: int, count: int) -> Tensor:
        """The class of each of `count` rows from position `first` on, classes of so many rows of all documents one
        document after the other: int64 [batch or 1, rows]; as many as there are tokens of a row before them."""
        position = torch.arange(first, first + count, device=self.ids.device)
        at = position.clamp(0, max(0, self.k_len - 1))
        if not self.k_len:
            return at.expand(self.ids.shape[0], -1)
        of = document_blocks(self.ids, rows)[:, at] + (at - self.first[:, at]) // rows
        return torch.where(position >= 0, of, self.k_len)

    def of_all(self, masses: Tensor, member: int, largest: bool) -> Tensor:
        """Masses [B, H, 1, entries] as those of the members of all documents: float [B, H, 1, tokens]."""
        if not self.k_len:
            return masses
        found, document = document_entries(self.ids, member, member)
        exists = found.first < self.k_len
        at = document.clamp(max=self.k_len - 1).to(torch.int64)
        begins, first, end = (x.gather(-1, at) for x in (self.entry, self.first, self.end))
        tokens, start = torch.where(exists, end - first, 0), torch.where(exists, found.first - first, 0)
        begins, tokens, start = (x[:, None, None] for x in (begins, tokens, start))
        return shares_of_documents(masses, begins, tokens, start, self.size, self.stride, member, largest)


def members_of(
    program: Program, view: View | None, shape: CallShape, inputs: Sequence[Tensor], present: Tensor | None
) -> Members | None:
    """Those of a branch's part, whose entries they have; None where a call is not packed. inputs: a call's own.
    present: int64 [B, 1, 1, 1], how many tokens are, where not all are."""
    if program.packed is None:
        return None
    size, stride = (1, 1) if view is None else (view.size, view.stride)
    ids = inputs[[decl.name for decl in program.inputs].index(program.packed)]
    ids = ids.expand(shape.batch if present is not None or ids.dim() == 2 else 1, shape.k_len).contiguous()
    of, (entries, _) = runs_of(ids), document_entries(ids, size, stride)
    number = of.number.to(torch.int64)
    first, end = (x.to(torch.int64).gather(-1, number) for x in (of.first, of.end))
    if present is not None:
        end = torch.minimum(end, present.view(-1, 1))
    return Members(ids, first, end, entries.number.to(torch.int64).gather(-1, first), size, stride, shape.k_len)
