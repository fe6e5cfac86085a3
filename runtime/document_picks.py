"""Tokens listed in the documents of a packed call, in positions of the call, and what each of them counts for.

A list of so many tokens is every document's. There may be as many documents as tokens, so what is listed twice is one
entry, which counts for both: then a document has no more entries than tokens, and a call has room for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attndsl.branches import Pick
from attndsl.compose import Composition, Pooling
from attndsl.program import Axis, Dim, InputDecl
from attndsl.runtime.document_blocks import Documents
from attndsl.runtime.pick import of_heads, summed
from attndsl.runtime.runs import document_entries


@dataclass(frozen=True, slots=True)
class DocumentPicks:
    """`token`: of each entry its token, as many as there are tokens where there is none, int64 [B, Hkv, tokens].
    `listed`: where documents list the same, that, int64 [B, Hkv, n], and `position`, of `token` in its document."""

    token: Tensor
    listed: Tensor | None = None
    position: Tensor | None = None

    @classmethod
    def of(cls, listed: Tensor, room: Dim, ids: Tensor, present: Tensor | None) -> DocumentPicks:
        """listed: int64 [B, Hkv, n], over this dimension. ids: [B or 1?, tokens], what divides tokens. present: int
        [B], how many are, where not all are."""
        (batch, heads), tokens = listed.shape[:2], ids.shape[-1]
        ids = ids.expand(batch, -1).contiguous()
        if not tokens:
            return cls(listed.new_zeros(batch, heads, 0))
        documents = Documents.of(ids, present)
        if room.axis is Axis.K:
            entries, begin = document_entries(ids, room.block, room.block)
            begin = begin.to(torch.int64)
            end = documents.end.gather(-1, begin.clamp(max=tokens - 1))
            token = begin[:, None] + listed.clamp(max=tokens)
            there = (listed >= 0) & (entries.first < end)[:, None] & (token < end[:, None])
            return cls(torch.where(there, token, tokens))
        # Whether a document lists its i-th token; what is listed beyond all documents goes to a place of its own.
        inside = (listed >= 0) & (listed < tokens)
        lists = torch.zeros(batch, heads, tokens + 1, dtype=torch.bool, device=listed.device)
        lists.scatter_(-1, torch.where(inside, listed, tokens), torch.ones_like(inside))
        position = (documents.every - documents.first)[:, None].expand(-1, heads, -1)
        there = lists[..., :tokens].gather(-1, position) & (documents.every < documents.end)[:, None]
        nth = torch.arange(1, tokens + 1, device=listed.device).expand(batch, heads, tokens)
        token = torch.searchsorted(there.cumsum(-1), nth.contiguous())
        return cls(token, listed, position.gather(-1, token.clamp(max=tokens - 1)))

    def mass(self, program: str, weights: Tensor | None, dtype: torch.dtype, kernel: bool) -> Tensor:
        """What each entry counts for, [B, Hkv, tokens]: of what lists it the sum of `weights` that are above 0, of the
        list's shape; how many do where there are none. program, kernel: as in `pick.summed`."""
        if not self.token.shape[-1]:
            return torch.zeros_like(self.token, dtype=dtype)
        there = self.token < self.token.shape[-1]
        if self.listed is None or self.position is None:
            each = torch.ones_like(self.token, dtype=dtype) if weights is None else weights.to(dtype)
        else:
            given = torch.ones_like(self.listed, dtype=dtype) if weights is None else weights.to(dtype).clamp(min=0)
            sums = summed(program, given.unsqueeze(-1), self.listed, self.token.shape[-1], kernel)
            each = sums.squeeze(-1).gather(-1, self.position)
        return torch.where(there, each, 0)


def of_documents(x: Tensor, decl: InputDecl, pick: Pick, sizes: Sequence[int]) -> Tensor:
    """What an input of the dimensions of a list holds, for each batch entry and key head, whose numbers `sizes` begin
    with, then that of the tokens: [B, Hkv, n]. Of each document's own entries there are as many as tokens."""
    return of_heads(x, decl, sizes[2] if pick.room.axis is Axis.K else pick.room.size, sizes)


def documents_of(
    composition: Composition, pick: Pick, sizes: Sequence[int], inputs: Mapping[str, Tensor], present: Tensor | None
) -> DocumentPicks:
    """What a pick of a packed call is. sizes: as in `of_documents`. present: as in `DocumentPicks.of`."""
    assert pick.packed is not None
    listed = of_documents(inputs[pick.input], composition.own.input(pick.input), pick, sizes)
    return DocumentPicks.of(listed.to(torch.int64), pick.room, inputs[pick.packed], present)


def told_of(
    program: str, composition: Composition, pooling: Pooling, found: DocumentPicks, inputs: Mapping[str, Tensor],
    dtype: torch.dtype, kernel: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """What data tells of tokens listed in documents, by the inputs that hold it. dtype: what of masses is at least as
    exact as float32. program, kernel: as in `pick.summed`."""
    pick, told = pooling.pool, pooling.picked
    assert isinstance(pick, Pick) and told is not None
    made, own = {told.tokens: found.token.to(torch.int32)}, composition.own
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for by, name in told.masses:
        weights = of_documents(inputs[by], own.input(by), pick, found.token.shape) if by else None
        made[name] = found.mass(program, weights, real, kernel)
    return made


__all__ = ["DocumentPicks", "documents_of", "of_documents", "told_of"]
