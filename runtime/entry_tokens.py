"""What the entries of a view give the tokens that they stand for, in one call: an entry gives each its share of a mass.

A member of the tokens gets the shares of those that it has, or the most that one entry gives it, which is what all
tokens get that both have. So no table of entries and members is made, and nothing is added in no fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attndsl.branches import Given, Pick, View
from attndsl.program import CallShape, Program
from attndsl.runtime.groups import Groups
from attndsl.runtime.pick import listed_of_heads
from attndsl.runtime.runs import of_heads

# Of extents of tokens, from a first one to before an end, how many each token's own member has: all [B or 1, H or 1,
# rows or 1, tokens].
Count = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Extent:
    """An entry of each token, [B or 1, H or 1, 1, tokens]: which it is, its first token and the end of those that are
    present, and whether there is one."""

    entry: Tensor
    first: Tensor
    end: Tensor
    exists: Tensor


@dataclass(frozen=True, slots=True)
class EntryTokens:
    """The entries of a view: those that each token may be of, or (`listed`) the single token that each is.

    spans: where data tells, the first token of each entry and the end of its own, [B, H, 1, entries].
    """

    tokens: int
    extents: tuple[Extent, ...] = ()
    listed: Groups | None = None
    spans: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls, view: View, program: Program, shape: CallShape, device: torch.device, inputs: Sequence[Tensor],
        present: Tensor | None,
    ) -> EntryTokens:  # fmt: skip
        """inputs: those of a call, which the program declares. present: int64 [B, 1, 1, 1], how many tokens are, where
        not all are."""
        known = dict(zip((decl.name for decl in program.inputs), inputs, strict=False))
        group, tokens = shape.heads // shape.kv_heads, shape.k_len
        view = view.picked if isinstance(view, Given) and view.picked is not None else view
        if isinstance(view, Pick):
            decl = program.input(view.input)
            at = listed_of_heads(known[view.input], decl, view, (shape.batch, shape.kv_heads, tokens))
            at = torch.where((at >= 0) & (at < tokens), at, tokens).repeat_interleave(group, 1)
            own = at.unsqueeze(2)
            return cls(tokens, listed=Groups.labelled(at, tokens), spans=(own, own + 1))
        if view.runs is not None:
            decl = program.input(view.runs.input)
            count = None if present is None else present.view(-1)
            runs = of_heads(known[view.runs.input], decl, shape.batch, shape.kv_heads, count)
            number, first, end = (x.to(torch.int64).repeat_interleave(group, 1).unsqueeze(2) for x in runs)
            spans = first, end
            first, end = (x.gather(-1, number) for x in spans)
            k = torch.arange(tokens, device=number.device)
            return cls(tokens, (Extent(number, first, end, k < end),), spans=spans)
        k, extents = torch.arange(tokens, device=device).view(1, 1, 1, -1), []
        for i in range(min(-(-view.size // view.stride), tokens)):
            entry = k // view.stride - i
            first = entry * view.stride
            end = (first + view.size).clamp(max=tokens)
            if present is not None:
                end = torch.minimum(end, present)
            extents.append(Extent(entry, first, end, (entry >= 0) & (k < end)))
        return cls(tokens, tuple(extents))

    def given(self, masses: Tensor, count: Count | None) -> Tensor:
        """Of masses [B, H, rows, entries] what tokens get, [B, H, rows, tokens]: the shares of those that each is of,
        or with `count` the most that one of them gives the token's member."""
        if self.listed is not None:
            return self.listed.sum(masses) if count is None else self.listed.largest(masses)
        found = masses.new_zeros(*masses.shape[:3], self.tokens)
        if not masses.shape[3]:
            return found
        for x in self.extents:
            tokens = 1 if count is None else count(x.first, x.end)
            share = tokens / (x.end - x.first).clamp(min=1).to(masses.dtype)
            at = x.entry.clamp(0, masses.shape[3] - 1).expand(found.shape)
            got = torch.where(x.exists, masses.gather(3, at) * share, 0)
            found = found + got if count is None else torch.maximum(found, got)
        return found
