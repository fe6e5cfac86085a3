"""Members of documents that are no blocks in a row: tiles, segments, blocks of a permutation, and tiles of queries.

A document's tokens are put in order by their members, at the places where its tokens lie, and a *group* is those of one
member: so groups of all documents are numbered one after the other, a document's in the order of its members, and there
are no more than tokens. A member without tokens is no group: nothing needs room for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.member_numbers import has_member, number, read
from attndsl.members import Placed, Runs, Tiles
from attndsl.runtime.document_blocks import Documents
from attndsl.runtime.values import Values


@dataclass(frozen=True, slots=True)
class DocumentGroups:
    """Groups of a call's documents, int64 [B, H or 1, tokens] each; `tokens` stands for none.

    order, number: the token at each place, and its group. of_token: the group of each token. place, stop: of each group
    the first place, and one past the last. member: its member's number. base, count: of each token's document the first
    group, and how many it has.
    """

    order: Tensor
    number: Tensor
    of_token: Tensor
    place: Tensor
    stop: Tensor
    member: Tensor
    base: Tensor
    count: Tensor

    @classmethod
    def of(cls, documents: Documents, label: Tensor, valid: Tensor, members: int) -> DocumentGroups:
        """label: int64 [B or 1, H or 1, tokens], the member of each token among those of its document, of which there
        are so many at most; valid: bool, of which tokens."""
        first, end = (x[:, None].expand(-1, label.shape[1], -1) for x in (documents.first, documents.end))
        label, valid = (x.expand(first.shape) for x in (label, valid))
        tokens = first.shape[-1]
        code = first * (members + 1) + torch.where(valid, label, members)
        ordered, order = code.sort(dim=-1, stable=True)
        here = valid.gather(-1, order)
        begins = here & pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)
        until = begins.cumsum(-1)
        found = torch.where(here, until - 1, tokens)
        nth = torch.arange(1, tokens + 1, device=label.device).expand(first.shape)
        place = torch.searchsorted(until, nth.contiguous())
        at = place.clamp(max=tokens - 1)
        stop = torch.searchsorted(ordered, ordered.gather(-1, at), right=True)
        base = (until - begins.to(torch.int64)).gather(-1, first)
        last = until.gather(-1, (end - 1).clamp(min=0))
        return cls(
            order, found, torch.empty_like(found).scatter_(-1, order, found), place,
            torch.where(place < tokens, stop, tokens), label.gather(-1, order.gather(-1, at)), base,
            torch.where(end > first, last - base, 0).clamp(min=0),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.order.shape[-1]

    @property
    def token(self) -> Tensor:
        """The first token of each group, some token of none."""
        return self.order.gather(-1, self.place.clamp(max=self.tokens - 1))


def labels(of: Tiles | Placed | Runs, values: Values, documents: Documents) -> tuple[Tensor, Tensor]:
    """The member of each token among those of its document, int64 [B or 1, H or 1, tokens], and which have one."""
    first, end, every = documents.first[:, None], documents.end[:, None], documents.every
    present = every < end
    if isinstance(of, Tiles):
        # Values are kept by the identity of their scalars, which therefore live as long.
        of_token, inside = number(of, "k"), has_member(of)
        here = values.at(q=0, k=(every - first).unsqueeze(2))
        label = here.tensor(of_token).squeeze(2)
        return label, present if inside is None else present & here.tensor(inside).squeeze(2)
    if isinstance(of, Placed):
        of_token, inside = number(of, "k"), has_member(of)
        assert inside is not None
        here = values.at(q=0, k=every.view(1, 1, 1, -1), Nk=(end - first).unsqueeze(2))
        return here.tensor(of_token).squeeze(2).clamp(min=0), present & here.tensor(inside).squeeze(2)
    told = read(of)
    said = values.at(q=0, k=every.view(1, 1, 1, -1)).tensor(told).squeeze(2)
    begins = pad(said[..., 1:] != said[..., :-1], (1, 0), value=True)[..., : every.numel()] | (every == first)
    return torch.where(begins, every, 0).cummax(-1).values - first, present


__all__ = ["DocumentGroups", "labels"]
