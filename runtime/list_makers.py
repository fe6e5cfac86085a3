"""What makes the lists of tiles of a kind of call, kept from its first call on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attndsl.derivation import Gathering, TileList
from attndsl.program import Arg, CallShape, InputDecl, Program, Read, walk
from attndsl.runtime.lasting import capturing, hold, lasting, stream_of
from attndsl.runtime.lists import Maker
from attndsl.runtime.plans import Listing, maker, of_heads, run_ends
from attndsl.runtime.values import Values


@dataclass(slots=True)
class ListMakers:
    """Those of one kind of call of a derived program, whose plans have the same sizes, strides and dtypes."""

    program: Program
    shape: CallShape
    device: torch.device
    # By the input that a list is, and a stream; there are few of either.
    _kept: dict[tuple[str, int], Maker] = field(default_factory=dict, init=False)

    def made(
        self, decl: InputDecl, d: TileList | Gathering, plan: Tensor, values: Callable[[], Values],
        of_sizes: Callable[[], Values],
    ) -> Tensor:  # fmt: skip
        """The list of a plan. values: of scalars in this call; of_sizes: in every call of its kind."""
        key = decl.name, stream_of(self.device)
        make = self._kept.get(key)
        if make is None:
            nodes = (x for run in d.runs.full + d.runs.partial for e in (run.first, run.count) for x in walk(e))
            # What tiles a plan may choose follows from the call's sizes alone.
            lasts = not any(isinstance(x, Arg | Read) for x in nodes)
            ends = lasting(self.device, lambda: self._ends(d, of_sizes())) if lasts else self._ends(d, values())
            make = self._maker(decl, d, plan, ends)
            if lasts:
                self._kept[key] = make
        if capturing(self.device):
            hold(make)
        return make(plan)

    def _ends(self, d: TileList | Gathering, values: Values) -> Tensor:
        first, q_len, k_len = self.shape.first_position(self.program), self.shape.q_len(self.program), self.shape.k_len
        return run_ends(d, values.at(start=first, i_start=first, Nq=q_len, Nk=k_len))

    def _maker(self, decl: InputDecl, d: TileList | Gathering, plan: Tensor, ends: Tensor) -> Maker:
        """What makes the list of this plan, or of another with its sizes and strides."""
        first, dims = self.shape.first_position(self.program), self.program.input(d.plan).dims

        def four(plan: Tensor) -> Tensor:
            # A table of truths is a map.
            plan = plan.view(torch.uint8) if plan.dtype == torch.bool else plan
            return of_heads(plan, dims, decl, self.shape)

        make = maker(Listing(d, self.shape, four(plan), ends, first), decl)
        return lambda plan: make(four(plan))
