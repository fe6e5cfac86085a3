"""What a selection chooses of members that are scored: normalise, sum over the heads that share, rank and choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.runtime.competing import masses_around, normalised_together
from attndsl.runtime.masses import floor_share, running_sums
from attndsl.selection import (
    Above,
    Antidiagonal,
    Compete,
    Cover,
    Forced,
    Levels,
    Normalise,
    Probs,
    Selection,
    Share,
    Top,
)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The choices of one selection. heads: query and key heads. budgets: int64 [1, heads or 1, 1, 1] of a `top`."""

    selection: Selection
    heads: tuple[int, int]
    budgets: Tensor | None

    def decided(self, raw: Tensor, candidates: Tensor, forced: Tensor) -> Tensor:
        """What is chosen, uint8 [B, Hq, classes, members]: 0 where a member is out, else its factor.

        raw: scores, -inf of what is no candidate. candidates, forced: bool of that size.
        """
        selection = self.selection
        extra = selection.forced is Forced.EXTRA
        withdrawn = candidates & ~forced & (raw == -torch.inf)
        competing = candidates & ~withdrawn
        if extra:
            competing = competing & ~forced
        normal = normalised_together(raw, competing, selection.normalise, self._compete)
        score, withdrawn = self._summed(normal, competing, withdrawn)
        competing = candidates & ~withdrawn
        if extra:
            competing = competing & ~forced
        score = torch.where(competing, score, -torch.inf)
        # Two stable sorts: by score, and then what is forced and counted first, what is no candidate last.
        first = forced if selection.forced is Forced.COUNTED else torch.zeros_like(forced)
        place = torch.where(competing, torch.where(first, 0, 1), 2).to(torch.int8)
        order = score.sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, place.gather(-1, order).sort(dim=-1, stable=True).indices)
        level = self._ranked(score, competing, order, place) * competing
        top = selection.rule.factors[0] if isinstance(selection.rule, Levels) else 1
        return torch.where(forced, top, level).to(torch.uint8)

    @property
    def _compete(self) -> Compete:
        rule = self.selection.rule
        return rule.compete if isinstance(rule, Cover) else Compete.ROW

    @property
    def _sharing(self) -> int:
        """Heads that decide together."""
        return {Share.NONE: 1, Share.GROUP: self.heads[0] // self.heads[1], Share.HEADS: self.heads[0]}[
            self.selection.share
        ]

    def _summed(self, score: Tensor, competing: Tensor, withdrawn: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, and which members are withdrawn, after the heads that share have added theirs up."""
        selection = self.selection
        size = self._sharing
        if size == 1:
            return score, withdrawn
        masses = selection.normalise is not Normalise.NONE or isinstance(selection.score, Antidiagonal | Probs)
        added = torch.where(competing, score, 0).unflatten(1, (-1, size)).sum(2)
        gone = withdrawn.unflatten(1, (-1, size)).any(2)
        if masses:
            gone = gone & ~competing.unflatten(1, (-1, size)).any(2)
        return added.repeat_interleave(size, 1), gone.repeat_interleave(size, 1)

    def _ranked(self, score: Tensor, competing: Tensor, order: Tensor, place: Tensor) -> Tensor:
        """What each member gets by its rank, int64."""
        rule = self.selection.rule
        index = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
        rank = torch.empty_like(order).scatter_(-1, order, index)
        count = competing.sum(-1, keepdim=True)
        if isinstance(rule, Top):
            if self.budgets is None:
                assert rule.fraction is not None
                return (rank < floor_share(rule.fraction, count).clamp(min=1)).to(torch.int64)
            return (rank < self.budgets).to(torch.int64)
        inside = torch.where(competing, score.clamp(min=0), 0)
        # Rounded sums may fall by a last bit where nothing is added: a cover is of the first ranks all the same.
        sums = running_sums(inside.gather(-1, order), -1)
        until = pad(sums.cummax(-1).values if sums.shape[-1] else sums, (1, 0))
        total = inside.sum(-1, keepdim=True)
        before, after = until.gather(-1, rank), until.gather(-1, rank + 1)
        match rule:
            case Cover(share=share, exclusive=exclusive, at_least=least, at_most=most, compete=compete):
                if compete is not Compete.ROW:
                    before, after, total = masses_around(inside, place, score, compete, self._sharing)
                within = after <= share * total if exclusive else before < share * total
                found = (within & (inside > 0)) | (rank < least)
                return (found if most is None else found & (rank < most)).to(torch.int64)
            case Above(share=share, relative=relative, at_most=most):
                found = score >= (share * score.amax(-1, keepdim=True) if relative else share)
                return (found if most is None else found & (rank < most)).to(torch.int64)
            case Levels(factors=factors, bounds=bounds, masses=masses):
                level = torch.zeros_like(rank)
                for factor, bound in reversed(list(zip(factors, bounds, strict=True))):
                    below = before < bound * total if masses else rank < floor_share(bound, count)
                    level = torch.where(below, factor, level)
                return level
            case _:
                assert_never(rule)
