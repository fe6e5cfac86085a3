"""The probabilities of a branch in one call, computed again from its keys and its lse, as those of members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.branch_mass import BranchMass
from attndsl.members import Lags
from attndsl.runtime.entry_tokens import Count, EntryTokens
from attndsl.runtime.groups import Groups, along_lags
from attndsl.runtime.masses import shares
from attndsl.runtime.touched import as_rows, call_values
from attndsl.runtime.values import Values
from attndsl.unpack import of_present

if TYPE_CHECKING:
    from attndsl.runtime.select import Selector


@dataclass(frozen=True, slots=True)
class _Part:
    """One part: its keys, the scalars of a call, the factor of products, and which tokens entries are of (None: what
    blocks of tokens give to blocks is counted)."""

    mass: BranchMass
    keys: Tensor
    values: Values
    scale: float | Tensor
    tokens: EntryTokens | None


class BranchMasses:
    """exp(logit - lse) of the keys of a branch, given to members by their shares of tokens."""

    def __init__(
        self, of: Selector, groups: Groups | None, keys: Sequence[Tensor], inputs: Sequence[Tensor],
        args: Sequence[int], scale: float | None, real: torch.dtype, lengths: Tensor | None, present: Tensor | None,
    ) -> None:  # fmt: skip
        """groups: the members' keys, where they are no blocks in a row and no diagonals. keys: of each part, [B, Hkv,
        n, D]. scale: in the place of the branch's own. lengths: int64 [B, 1, 1, 1], where sequences have their own;
        present: the same, and of a call not all of whose tokens are."""
        self.shape, self.device, self.groups, self.real = of.shape, of.device, groups, real
        self.lengths, self.present = lengths, present
        self.size, self.members = of.selection.keys, of.members
        self.diagonals = isinstance(of.selection.members, Lags)
        self.parts, program = list[_Part](), of.program
        for mass, deriver, own in zip(of.masses, of.mass_derivers, keys, strict=True):
            values = call_values(mass.program, of.shape, deriver, inputs, args, of.tables, lengths)
            factor: float | Tensor = of.shape.dim**-0.5 if scale is None else scale
            if scale is None and mass.branch.scale is not None:
                factor = values.tensor(of_present(mass.branch.scale, program))
            tokens: EntryTokens | None = None
            if mass.view is not None and (mass.view.told or groups is not None or self.diagonals):
                tokens = EntryTokens.of(mass.view, program, of.shape, of.device, inputs, present)
            self.parts.append(_Part(mass, own, values, factor, tokens))

    @property
    def width(self) -> int:
        """Numbers that are held of each row."""
        in_tokens = self.diagonals or self.groups is not None or any(part.tokens is not None for part in self.parts)
        return max(self.shape.k_len * in_tokens, *(part.mass.keys(self.shape.k_len) for part in self.parts))

    def of_members(self, x: Tensor, lse: Tensor, position: Tensor, here: Tensor, largest: bool) -> Tensor:
        """[B, H, rows, members] of rows [B, H, rows, D] at these positions, [rows] or [B, rows], with lse [B, H, rows,
        1]. here: which of the rows are there."""
        if self.diagonals:
            lags = along_lags(self.of_tokens(x, lse, position, here, largest), position, self.size, self.members)
            return lags.amax(4) if largest else lags.sum(4)
        return self._joined(
            lambda part: self._given(part, self._masses(part, x, lse, position, here), largest), largest
        )

    def of_tokens(self, x: Tensor, lse: Tensor, position: Tensor, here: Tensor, largest: bool) -> Tensor:
        """The same of tokens, [B, H, rows, Nk], which on diagonals are summed, or of which the largest counts."""

        def count(first: Tensor, end: Tensor) -> Tensor:
            # The keys that lie as far back as each does, in blocks of distances.
            row, k = as_rows(position), torch.arange(self.shape.k_len, device=self.device)
            until = row - torch.div(row - k, self.size, rounding_mode="floor") * self.size + 1
            return torch.minimum(end, until) - torch.maximum(first, until - self.size)

        def given(part: _Part) -> Tensor:
            masses = self._masses(part, x, lse, position, here)
            return masses if part.tokens is None else part.tokens.given(masses, count if largest else None)

        return self._joined(given, largest)

    def _joined(self, given: Callable[[_Part], Tensor], largest: bool) -> Tensor:
        """What the parts give, added up or the most of it."""
        found, *others = map(given, self.parts)
        for other in others:
            found = torch.maximum(found, other) if largest else found + other
        return found

    def _masses(self, part: _Part, x: Tensor, lse: Tensor, position: Tensor, here: Tensor) -> Tensor:
        """[B, H, rows, keys] of a part."""
        keys = part.keys.to(self.real)
        index = torch.arange(keys.shape[2], device=self.device)
        grouped = x.to(self.real).unflatten(1, (keys.shape[1], -1))
        logits = (grouped @ keys.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * part.scale
        at = part.values.at(q=as_rows(position), k=index.view(1, 1, 1, -1), s=logits)
        if part.mass.logit is not None:
            logits = at.tensor(part.mass.logit).to(self.real)
        seen = at.tensor(part.mass.seen) & as_rows(here)
        if self.lengths is not None and not (part.mass.view is not None and part.mass.view.told):
            # What lies past a sequence's end in its cache may be anything.
            seen = seen & (index * part.mass.stride < self.lengths)
        return torch.where(seen, torch.exp(logits - lse.to(self.real)), 0).nan_to_num(0.0, posinf=0.0)

    def _given(self, part: _Part, masses: Tensor, largest: bool) -> Tensor:
        """[B, H, rows, keys of a part] as [B, H, rows, members], which are no diagonals."""
        mass, size = part.mass, self.size
        if part.tokens is not None:
            count: Count | None = None
            if largest:
                count = self._of_block if self.groups is None else self.groups.within
            masses = part.tokens.given(masses, count)
        if self.groups is not None:
            return self.groups.largest(masses) if largest else self.groups.sum(masses)
        if part.tokens is None and (not mass.of_blocks or size % mass.size):
            return shares(masses, mass.size, mass.stride, size, self.shape.k_len, largest, self.present)
        each = size if part.tokens is not None else size // mass.size
        whole: Tensor = pad(masses, (0, self.members * each - masses.shape[3])).unflatten(3, (self.members, -1))
        return whole.amax(4) if largest else whole.sum(4)

    def _of_block(self, first: Tensor, end: Tensor) -> Tensor:
        """Of extents of tokens how many each token's own block has."""
        start = torch.arange(self.shape.k_len, device=self.device) // self.size * self.size
        return torch.minimum(end, start + self.size) - torch.maximum(first, start)
