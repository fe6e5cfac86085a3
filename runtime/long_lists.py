"""Long lists of rows in the kernel of dk and dv (`codegen/row_lists.py`): how long they may be, and their parts.

A list may have twice the entries of the average one, or half of what falls to each program that a device runs at once,
if that is more. So there are at most as many parts as lists, and at most four times as many as programs at once: what
parts find takes as much room as dk and dv in float32, or that of so many key tiles, whichever is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attndsl.plan import BackwardPlan
from attndsl.program import Axis, CallShape, InputDecl
from attndsl.runs import LIST_HEAD
from attndsl.runtime import lists
from attndsl.runtime.triton_launch import INPUTS, programs_at_once

# Programs that share a multiprocessor, and multiprocessors where there is no GPU.
_BESIDE, _ELSEWHERE = 2, 132


@dataclass(frozen=True, slots=True)
class LongLists:
    """How a call's lists are cut. `heads`: key heads of all batch entries, each with a list for `each` key tiles.
    `longest`: entries of a list that is not cut. `parts`: the most that a head's long lists make. `at`: where the lists
    stand among a call's values. `make`: what makes the table of their parts, None where no list can be long."""

    plan: BackwardPlan
    shape: CallShape
    each: int
    longest: int
    parts: int
    at: int
    make: lists.Maker | None

    @classmethod
    def of(cls, plan: BackwardPlan, shape: CallShape, inputs: Sequence[Tensor], device: torch.device) -> LongLists:
        """For calls with inputs like these. Only their shapes, strides and dtypes are read."""
        named = {decl.name: x for decl, x in zip(plan.program.inputs, inputs, strict=True)}
        tiles = -(-shape.k_len // plan.key_tiling.block_k)
        if plan.gathered is not None:
            each, rows = plan.gathered.keys // plan.key_tiling.block_k, shape.rows
            entries = rows * named[plan.gathered.plan].shape[-1]
        else:
            assert plan.marked is not None
            each, rows = 1, -(-shape.rows // max(1, plan.key_tiling.unit_q))
            # Behind each entry stands a word.
            entries = max(0, named[plan.marked.input].shape[-1] - LIST_HEAD * tiles) // 2
        count, heads = -(-tiles // each), shape.batch * shape.kv_heads
        at_once = _BESIDE * (programs_at_once(device) if device.type == "cuda" else _ELSEWHERE)
        longest = max(1, 2 * -(-entries // max(1, count)), heads * each * entries // (2 * at_once))
        parts = min(2 * entries // longest, count * -(-rows // longest)) if rows > longest else 0
        assert plan.row_list is not None
        names = [decl.name for decl in plan.program.inputs]
        at, make = names.index(plan.row_list.input), None
        if heads and parts and device.type != "meta":
            make = _maker(plan.program.inputs[at], inputs[at], shape, count, longest, parts, device)
        return cls(plan, shape, each, longest, parts, INPUTS + at, make)

    @property
    def heads(self) -> int:
        return self.shape.batch * self.shape.kv_heads

    @property
    def programs(self) -> int:
        """Those that parts have."""
        return self.heads * self.parts * self.each

    @property
    def sizes(self) -> dict[str, int]:
        """What kernels are given."""
        return {"parts": self.parts, "longest": self.longest}

    def __call__(self, call: Sequence[Any]) -> tuple[Tensor | None, Tensor | None]:
        """Of a call's values the table of parts, int32 [heads, parts, 4], and room for what they find; None where no
        list can be long."""
        if self.make is None:
            return None, None
        tiling, shape = self.plan.key_tiling, self.shape
        found = self.make(call[self.at])
        size = (self.programs, tiling.columns, shape.dim + shape.v_dim)
        return found, torch.empty(size, dtype=torch.float32, device=found.device)


def _maker(
    decl: InputDecl, example: Tensor, shape: CallShape, count: int, longest: int, parts: int, device: torch.device
) -> lists.Maker:
    """What makes the table: heads and batch entries that share a list have its parts each."""
    axes = [dim.axis for dim in decl.dims]

    def of_heads(x: Tensor) -> Tensor:
        x = x if Axis.H in axes or Axis.G in axes else x.unsqueeze(-2)
        x = x if Axis.B in axes else x[None]
        return x.expand(shape.batch, shape.kv_heads, -1)

    make = lists.cut(of_heads(example), device, count, longest, parts)
    return lambda x: make(of_heads(x))
