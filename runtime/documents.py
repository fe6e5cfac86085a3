"""Members of the documents of a packed call: each row's are those of its own document, counted from its first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attndsl.program import CallShape, Program
from attndsl.runtime.masses import shares_of_documents
from attndsl.runtime.runs import document_entries, runs_of


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a call begin and end, int64 [batch or 1, tokens]: of each token the first of its own, one
    past its last that is present, and its document's first entry, of `size` tokens every `stride`.
    k_len: the call's tokens."""

    first: Tensor
    end: Tensor
    entry: Tensor
    size: int
    stride: int
    k_len: int

    def shares(self, masses: Tensor, position: Tensor, member: int, largest: bool) -> Tensor:
        """Masses [B, H, rows, entries] of rows at these positions as those of their documents' members: float
        [B, H, rows, members], 0 past a document's last."""
        at = position.clamp(0, max(0, self.k_len - 1))
        begins, first, end = (x[:, at] if self.k_len else x for x in (self.entry, self.first, self.end))
        members = -(-self.k_len // member)
        return shares_of_documents(masses, begins, end - first, self.size, self.stride, member, members, largest)


def documents_of(
    program: Program, shape: CallShape, inputs: Sequence[Tensor], present: Tensor | None
) -> Documents | None:
    """Those of a branch of one part, whose entries they have; None where a call is not packed. inputs: a call's own.
    present: int64 [B, 1, 1, 1], how many tokens are, where not all are."""
    if program.packed is None:
        return None
    (part,) = program.only.parts
    size, stride = (1, 1) if part.view is None else (part.view.size, part.view.stride)
    ids = inputs[[decl.name for decl in program.inputs].index(program.packed)]
    ids = ids.expand(ids.shape[0] if ids.dim() == 2 else 1, shape.k_len).contiguous()
    of, (entries, _) = runs_of(ids), document_entries(ids, size, stride)
    number = of.number.to(torch.int64)
    first, end = (x.to(torch.int64).gather(-1, number) for x in (of.first, of.end))
    if present is not None:
        end = torch.minimum(end, present.view(-1, 1))
        first = first.expand(end.shape)
    entry = entries.number.to(torch.int64).gather(-1, first[: ids.shape[0]])
    return Documents(first, end, entry.expand(first.shape), size, stride, shape.k_len)
