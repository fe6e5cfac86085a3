"""What the entries of a view that data tells give blocks of tokens, with a gradient, as weights of members need one.

Forward an entry gives each of its tokens its share, and a block gets those of its own. Backward an entry gets what its
tokens' blocks are given, on average: of a run a difference of running sums. So nothing is added in no fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from attndsl.runtime.entry_tokens import EntryTokens
from attndsl.runtime.masses import running_sums


def of_members(masses: Tensor, entries: EntryTokens, member: int) -> Tensor:
    """Masses [B, H, rows, entries] as those of blocks of `member` tokens, [B, H, rows, members]."""
    found: Tensor = _OfMembers.apply(masses, entries, member)
    return found


class _OfMembers(Function):
    @staticmethod
    def forward(ctx: Any, masses: Tensor, entries: EntryTokens, member: int) -> Tensor:
        ctx.entries, ctx.member = entries, member
        given = entries.given(masses, None)
        whole: Tensor = pad(given, (0, -entries.tokens % member)).unflatten(3, (-1, member)).sum(4)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _means(gradient, ctx.entries, ctx.member).to(gradient.dtype), None, None


def _means(x: Tensor, entries: EntryTokens, member: int) -> Tensor:
    """Of what blocks of `member` tokens have, [B, H, rows, members], the mean over each entry's tokens, 0 without."""
    assert entries.spans is not None, "data tells what the entries are of"
    first, end = (y.clamp(0, entries.tokens).expand(*x.shape[:3], -1) for y in entries.spans)
    if not x.shape[3]:
        return x.new_zeros(first.shape)
    until = pad(running_sums(x.to(torch.float64), 3), (1, 0)) * member

    def before(token: Tensor) -> Tensor:
        # Summed over the tokens before it.
        block = (token // member).clamp(max=x.shape[3] - 1)
        return until.gather(3, block) + x.gather(3, block) * (token - block * member)

    block = first // member
    alone = x.gather(3, block.clamp(max=x.shape[3] - 1))
    several = (before(end) - before(first)) / (end - first).clamp(min=1)
    means = torch.where((end - 1) // member == block, alone.to(torch.float64), several)
    return torch.where(end > first, means, 0.0)
