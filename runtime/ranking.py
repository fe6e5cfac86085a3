"""What a selection chooses of members that are scored: normalise, sum over the heads that share, rank and choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.members import Runs
from attndsl.runtime.choose import MOST, chosen_by_kernel
from attndsl.runtime.competing import masses_around, normalised_together
from attndsl.runtime.masses import floor_share, running_sums
from attndsl.runtime.vote import voted_by_kernel
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

# A score and a member in one number: below the first bits of a score are those of a member, of which there are fewer
# than 2**28 (`widths.py`).
_INDEX_BITS, _FORCED, _NONE = 30, 1 << 62, -(1 << 63)

# The largest number that a score may be: infinity would make a softmax of NaN.
LARGEST = 3.0e38


@dataclass(frozen=True, slots=True)
class Ranking:
    """The choices of one selection. heads: query and key heads. budgets: int64 [1, heads or 1, 1, 1] of a `top`."""

    selection: Selection
    heads: tuple[int, int]
    budgets: Tensor | None

    def chosen(self, raw: Tensor, candidates: Tensor, forced: Tensor, heads: int, room: int | None) -> Tensor:
        """What is chosen, for so many heads of a plan: lists as `listed` has them, or where room is None bytes as
        `decided` does. raw: scores, of whatever is no candidate too."""
        step = self.heads[0] // heads
        if self._by_kernel(raw):
            how, extra = self.selection.normalise, self.selection.forced is Forced.EXTRA
            score, competing = voted_by_kernel(
                raw, candidates, forced, how, extra=extra, masses=self._masses, size=self._sharing, step=step
            )
            return chosen_by_kernel(
                self.selection, score, competing, forced[:, ::step], self._limit(competing, step), room
            )
        raw = of_candidates(raw, candidates)
        if room is not None and self.finds_best(raw.dtype):
            return self.best(raw, candidates, forced, room)[:, ::step]
        level = self.decided(raw, candidates, forced)[:, ::step]
        return level if room is None else listed(level, room)

    def _by_kernel(self, raw: Tensor) -> bool:
        one = not isinstance(self.selection.rule, Levels) and self._compete is Compete.ROW
        return one and raw.is_cuda and raw.dtype == torch.float32 and 0 < raw.shape[-1] <= MOST and raw.numel() > 0

    def _limit(self, competing: Tensor, step: int) -> Tensor | int:
        """How many rank in all of those that compete, an int or [B or 1, heads or 1, classes or 1]."""
        match self.selection.rule:
            case Top(count=None, fraction=share):
                assert share is not None
                return floor_share(share, competing.sum(-1)).clamp(min=1)
            case Top():
                assert self.budgets is not None
                return self.budgets.squeeze(-1)[:, ::step]
            case Cover(at_most=most) | Above(at_most=most):
                return competing.shape[-1] if most is None else most
            case Levels():
                raise AssertionError("levels are several choices")
            case _:
                assert_never(self.selection.rule)

    def decided(self, raw: Tensor, candidates: Tensor, forced: Tensor, documents: Tensor | None = None) -> Tensor:
        """What is chosen, uint8 [B, Hq, classes, members]: 0 where a member is out, else its factor.

        raw: scores, -inf of what is no candidate. candidates, forced: bool of that size. documents: int64 [B, classes],
        of a packed call the document of each, where members of several classes compete.
        """
        score, competing = self._scores(raw, candidates, forced, documents)
        # Two stable sorts: by score, and then what is forced and counted first, what is no candidate last.
        first = forced if self.selection.forced is Forced.COUNTED else torch.zeros_like(forced)
        place = torch.where(competing, torch.where(first, 0, 1), 2).to(torch.int8)
        order = score.sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, place.gather(-1, order).sort(dim=-1, stable=True).indices)
        level = self._ranked(score, competing, order, place, documents) * competing
        top = self.selection.rule.factors[0] if isinstance(self.selection.rule, Levels) else 1
        return torch.where(forced, top, level).to(torch.uint8)

    def finds_best(self, dtype: torch.dtype) -> bool:
        """Whether the best are found without ranking all others: of segments, which have as many numbers as there are
        tokens, by scores of which one fits a number beside that of a member."""
        selection = self.selection
        # Of heads that share one may withdraw what another is forced to take.
        counted = selection.always is None or (selection.forced is Forced.COUNTED and selection.share is Share.NONE)
        return isinstance(selection.members, Runs) and self.budgets is not None and counted and dtype == torch.float32

    def best(self, raw: Tensor, candidates: Tensor, forced: Tensor, room: int) -> Tensor:
        """The members that `decided` chooses, in increasing order and -1 after them, int32 [B, Hq, classes, room]."""
        assert self.budgets is not None
        if self.selection.always is None and self._sharing == 1 and self.selection.normalise is Normalise.NONE:
            score, competing = raw, raw > -torch.inf
        else:
            score, competing = self._scores(raw, candidates, forced)
        members = score.shape[-1]
        bits = (score + 0.0).view(torch.int32)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << _INDEX_BITS
        # Scores in order, equal ones by the lower member; what is forced before all others.
        key = order | torch.arange(members - 1, -1, -1, device=score.device)
        if self.selection.always is not None:
            key = torch.where(forced, key + _FORCED, key)
        key = torch.where(competing, key, _NONE)
        found, index = key.topk(min(room, members), dim=-1)
        inside = torch.arange(found.shape[-1], device=score.device) < self.budgets
        inside = (inside & (found != _NONE)) | (found >= _FORCED // 2)
        made = torch.where(inside, index, members).sort(-1).values
        made = torch.where(made < members, made, -1).to(torch.int32)
        return pad(made, (0, room - made.shape[-1]), value=-1)

    def _scores(
        self, raw: Tensor, candidates: Tensor, forced: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The scores by which members are ranked, and which of them compete."""
        selection = self.selection
        extra = selection.forced is Forced.EXTRA
        withdrawn = candidates & ~forced & (raw == -torch.inf)
        competing = candidates & ~withdrawn
        if extra:
            competing = competing & ~forced
        normal = normalised_together(raw, competing, selection.normalise, self._compete, documents)
        score, withdrawn = self._summed(normal, competing, withdrawn)
        competing = candidates & ~withdrawn
        if extra:
            competing = competing & ~forced
        return torch.where(competing, score, -torch.inf), competing

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

    @property
    def _masses(self) -> bool:
        """Whether scores are masses: what one head has none of is not withdrawn from the others."""
        return self.selection.normalise is not Normalise.NONE or isinstance(self.selection.score, Antidiagonal | Probs)

    def _summed(self, score: Tensor, competing: Tensor, withdrawn: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, and which members are withdrawn, after the heads that share have added theirs up."""
        size = self._sharing
        if size == 1:
            return score, withdrawn
        added = torch.where(competing, score, 0).unflatten(1, (-1, size)).sum(2)
        gone = withdrawn.unflatten(1, (-1, size)).any(2)
        if self._masses:
            gone = gone & ~competing.unflatten(1, (-1, size)).any(2)
        return added.repeat_interleave(size, 1), gone.repeat_interleave(size, 1)

    def _ranked(
        self, score: Tensor, competing: Tensor, order: Tensor, place: Tensor, documents: Tensor | None
    ) -> Tensor:
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
                    around = masses_around(inside, place, score, compete, self._sharing, documents)
                    before, after, total = around
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


def of_candidates(raw: Tensor, candidates: Tensor) -> Tensor:
    """Finite scores, or minus infinity: of what is no candidate, and where there is none (NaN)."""
    return torch.where(candidates & ~raw.isnan(), raw, -torch.inf).clamp(max=LARGEST)


def listed(level: Tensor, room: int) -> Tensor:
    """The members of bytes [..., members] that are not 0, in increasing order and -1 after them: int32 [..., room]."""
    members = level.shape[-1]
    index = torch.arange(members, device=level.device, dtype=torch.int32)
    found = torch.where(level > 0, index, members).sort(-1).values[..., :room]
    return pad(torch.where(found < members, found, -1).to(torch.int32), (0, room - found.shape[-1]), value=-1)
