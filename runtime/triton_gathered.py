"""Launching the kernels of rows that are gathered by the members they chose (`codegen/triton_gathered.py`).

What a row gets from each of its members goes to a slot of its own, in float32: rows * C * D numbers a head, of a plan
that lists C members a row. A second kernel merges the slots of a row. Heads take turns where their slots would be far
more than the output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attndsl.derivation import Gathering
from attndsl.plan import BackwardPlan, Printed
from attndsl.program import CallShape
from attndsl.runtime.call import call_shape
from attndsl.runtime.dropout import PARAMETERS, Dropout
from attndsl.runtime.engine import default_scale
from attndsl.runtime.launcher import Slot
from attndsl.runtime.long_lists import LongLists
from attndsl.runtime.outputs import empty_output
from attndsl.runtime.plans import gathered_tiles, slot_bits
from attndsl.runtime.sums import Totals
from attndsl.runtime.triton_backward import DKDV, DQ, SUM_PARTS, TritonBackward, backward_parameters
from attndsl.runtime.triton_launch import FUNCTION, INPUTS, Planned, parameter_sources, prepare, together

MERGE, ROWS, SUM = "merge_slots", "attention_rows", "sum_slots"
# Rows of a program that merges slots.
_MERGED = 16
# Bytes of slots at once: of so many outputs, or where that is little, so many.
_OUTPUTS, _LEAST_BYTES = 2, 1 << 28


class GatheredForward:
    """The forward kernel and its merge for one kind of call."""

    def __init__(
        self, kernel: Printed, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool
    ) -> None:
        self.shape = shape = call_shape(q, k, v)
        self.softmax = kernel.softmax
        self.default_scale = default_scale(shape.dim)
        tiles, self.slots = _tiles(kernel, q, k, v, inputs)
        sources = forward_sources(kernel, q, k, v, inputs)
        self.turn = turn = heads_at_once(shape, self.slots, shape.v_dim, q.element_size())
        self._attend = self._merge = None
        if turn:
            merged = turn * -(-shape.rows // _MERGED)
            grids = {FUNCTION: turn * tiles, MERGE: merged}

            def ready(function: str) -> Any:
                return prepare(kernel, kernel.text, function, grids[function], sources, aligned, q.device)

            self._attend, self._merge = together([lambda: ready(FUNCTION) if tiles else None, lambda: ready(MERGE)])

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = empty_output(q, self.shape)
        if self._merge is None:
            return out, lse
        part_lse = lse.new_empty(self.turn, self.shape.rows, self.slots) if self.softmax else None
        part = lse.new_empty(self.turn, self.shape.rows, self.slots, self.shape.v_dim)
        scale = self.default_scale if scale is None else scale
        call = (q, k, v, out, lse, scale, *inputs, *args, *(dropout.values() if dropout else ()), part, part_lse)
        for first_head in range(0, self.shape.batch * self.shape.heads, self.turn):
            if part_lse is not None:
                part_lse.fill_(-math.inf)
            else:
                # What has no lse counts wherever it stands.
                part.zero_()
            if self._attend is not None:
                self._attend((*call, first_head))
            self._merge((*call, first_head))
        return out, lse


def heads_at_once(shape: CallShape, slots: int, dim: int, element_size: int) -> int:
    """The heads, of all batch entries, whose slots of `dim` numbers there is room for: a divisor of their number, 0
    where there are no rows."""
    heads = shape.batch * shape.heads
    each = max(1, shape.rows * slots * dim * torch.float32.itemsize)
    room = max(_LEAST_BYTES, _OUTPUTS * heads * shape.rows * shape.v_dim * element_size)
    most = min(heads, max(1, room // each)) if shape.rows else 0
    return next((n for n in range(most, 0, -1) if heads % n == 0), 0)


class GatheredBackward(TritonBackward):
    """The backward kernels for one kind of call."""

    def __init__(
        self, plan: BackwardPlan, dq_text: str, dkdv_text: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
        inputs: Sequence[Tensor], aligned: bool,
    ) -> None:  # fmt: skip
        self.plan, self.shape = plan, call_shape(q, k, v)
        shape, self.default_scale = self.shape, default_scale(self.shape.dim)
        tiles, self.slots = _tiles(plan, q, k, v, inputs)
        sources, heads = gathered_parameters(plan, q, k, v, inputs, dout), shape.batch * shape.heads
        # One query of a key head's heads, whose list it follows: there are no slots.
        packed = plan.tiling.pack > 1
        self.turn = turn = 0 if packed else heads_at_once(shape, self.slots, shape.dim, q.element_size())
        if packed:
            grids = {DQ: -(-shape.rows // plan.tiling.block_q) * shape.batch * shape.kv_heads}
        else:
            grids = {
                ROWS: heads * -(-shape.rows // plan.tiling.block_q) if plan.softmax else 0,
                DQ: turn * tiles,
                SUM: turn * -(-shape.rows // _MERGED),
            }
        self._long = LongLists.of(plan, shape, inputs, q.device) if plan.cuts_lists and tiles else None
        parts = self._long.programs if self._long else 0
        grids[DKDV] = -(-shape.k_len // plan.key_tiling.block_k) * shape.batch * shape.kv_heads if tiles else 0
        grids |= {DKDV: grids[DKDV] + parts, SUM_PARTS: parts}

        def ready(function: str) -> Any:
            of_keys = function in (DKDV, SUM_PARTS)
            planned, text = (plan.of_keys(), dkdv_text) if of_keys else (plan, dq_text)
            return prepare(planned, text, function, grids[function], sources, aligned, q.device)

        needed = [function for function, size in grids.items() if size]
        made = together([functools.partial(ready, function) for function in needed])
        self._kernels: Mapping[str, Any] = dict(zip(needed, made, strict=True))

    def run(self, call: Sequence[Any], dk: Tensor, dv: Tensor, totals: Totals) -> list[Any]:
        shape, kernels, call = self.shape, self._kernels, [*call, *(self._long(call) if self._long else ())]
        if DKDV not in kernels:
            dk.zero_()
            dv.zero_()
        if self.turn:
            if ROWS in kernels:
                kernels[ROWS](call)
            part = torch.empty(self.turn, shape.rows, self.slots, shape.dim, dtype=torch.float32, device=dk.device)
            for first_head in range(0, shape.batch * shape.heads, self.turn):
                part.zero_()
                for function in (DQ, SUM):
                    if function in kernels:
                        kernels[function]((*call, part, first_head))
        elif DQ in kernels:
            kernels[DQ](call)
        for function in (DKDV, SUM_PARTS):
            if function in kernels:
                kernels[function](call)
        return call


def forward_sources(kernel: Planned, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
    """What each parameter of the forward kernel and of its merge is given. Only shapes, strides and dtypes are read."""
    first = INPUTS + len(inputs) + len(kernel.program.args) + (len(PARAMETERS) if kernel.spec.dropout else 0)
    parts = {"part_ptr": Slot(first, "*fp32"), "part_lse_ptr": Slot(first + 1, "*fp32")}
    parts["first_head"] = Slot(first + 2, "i32")
    return parameter_sources(kernel, q, k, v, inputs) | _sizes(kernel, q, k, v, inputs) | parts


def gathered_parameters(
    plan: BackwardPlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], dout: Tensor | None = None
) -> Mapping[str, Any]:
    """What each parameter of the backward kernels is given. Only shapes, strides and dtypes are read."""
    found = {**backward_parameters(plan, q, k, v, inputs, dout), **_sizes(plan, q, k, v, inputs)}
    return found | {"first_head": Slot(found["part_ptr"].index + 1, "i32")}


def _sizes(plan: Planned, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> dict[str, int]:
    """How many gathered tiles a head has, and slots a row; of an entry the bits that say which slot."""
    tiles, slots = _tiles(plan, q, k, v, inputs)
    return {"gathered_tiles": tiles, "slots": slots, "slot_bits": slot_bits(slots)}


def _tiles(plan: Planned, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Gathered tiles of a head, and slots of a row."""
    assert plan.gathered is not None
    shape, named = call_shape(q, k, v), dict(zip((d.name for d in plan.program.inputs), inputs, strict=True))
    derivation = plan.program.input(plan.gathered.entry.input).derivation
    assert isinstance(derivation, Gathering)
    slots = named[plan.gathered.plan].shape[-1]
    return gathered_tiles(derivation, shape, slots) if slots else 0, slots


__all__ = ["GatheredBackward", "GatheredForward", "forward_sources", "gathered_parameters", "heads_at_once"]
