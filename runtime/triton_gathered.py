"""Launching the kernels of rows that are gathered by the members they chose (`codegen/triton_gathered.py`).

What a row gets from each of its members goes to a slot of its own, in float32: rows * C * D numbers a head, of a plan
that lists C members a row. A second kernel merges the slots of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attndsl.derivation import Gathering
from attndsl.plan import BackwardPlan, Printed
from attndsl.runtime.call import call_shape
from attndsl.runtime.dropout import PARAMETERS, Dropout
from attndsl.runtime.engine import default_scale, empty_output
from attndsl.runtime.launcher import Slot
from attndsl.runtime.plans import gathered_tiles
from attndsl.runtime.sums import Totals
from attndsl.runtime.triton_backward import DKDV, DQ, TritonBackward, backward_parameters
from attndsl.runtime.triton_launch import FUNCTION, INPUTS, Planned, parameter_sources, prepare, together

MERGE, ROWS, SUM = "merge_slots", "attention_rows", "sum_slots"
# Rows of a program that merges slots.
_MERGED = 16


class GatheredForward:
    """The forward kernel and its merge for one kind of call."""

    def __init__(
        self, kernel: Printed, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool
    ) -> None:
        self.shape = shape = call_shape(q, k, v)
        self.softmax = kernel.program.branch.weights is None
        self.default_scale = default_scale(shape.dim)
        grid, self.slots = _tiles(kernel, q, k, v, inputs)
        sources = forward_sources(kernel, q, k, v, inputs)
        merged = shape.batch * shape.heads * -(-shape.rows // _MERGED)
        self._attend = self._merge = None
        if merged:
            self._attend, self._merge = together([
                lambda: prepare(kernel, kernel.text, FUNCTION, grid, sources, aligned, q.device) if grid else None,
                lambda: prepare(kernel, kernel.text, MERGE, merged, sources, aligned, q.device),
            ])  # fmt: skip

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = empty_output(q, self.shape)
        if self._merge is None:
            return out, lse
        slots = (*lse.shape, self.slots)
        part_lse = lse.new_full(slots, -math.inf) if self.softmax else None
        # What has no lse counts wherever it stands.
        part = (lse.new_empty if self.softmax else lse.new_zeros)((*slots, self.shape.v_dim))
        scale = self.default_scale if scale is None else scale
        call = (q, k, v, out, lse, scale, *inputs, *args, *(dropout.values() if dropout else ()), part, part_lse)
        if self._attend is not None:
            self._attend(call)
        self._merge(call)
        return out, lse


class GatheredBackward(TritonBackward):
    """The backward kernels for one kind of call."""

    def __init__(
        self, plan: BackwardPlan, dq_text: str, dkdv_text: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
        inputs: Sequence[Tensor], aligned: bool,
    ) -> None:  # fmt: skip
        self.plan, self.shape = plan, call_shape(q, k, v)
        shape, self.default_scale = self.shape, default_scale(self.shape.dim)
        grid, self.slots = _tiles(plan, q, k, v, inputs)
        sources, heads = gathered_parameters(plan, q, k, v, inputs, dout), shape.batch * shape.heads
        self.packed = plan.tiling.pack > 1
        if self.packed:
            # One query of a key head's heads, whose list it follows: there are no slots.
            grids = {DQ: -(-shape.rows // plan.tiling.block_q) * shape.batch * shape.kv_heads}
        else:
            grids = {
                ROWS: heads * -(-shape.rows // plan.tiling.block_q) if plan.softmax else 0,
                DQ: grid,
                SUM: heads * -(-shape.rows // _MERGED),
            }
        grids[DKDV] = -(-shape.k_len // plan.key_tiling.block_k) * shape.batch * shape.kv_heads if grid else 0

        def ready(function: str) -> Any:
            of_keys = function == DKDV
            planned, text = (plan.of_keys(), dkdv_text) if of_keys else (plan, dq_text)
            return prepare(planned, text, function, grids[function], sources, aligned, q.device)

        needed = [function for function, size in grids.items() if size]
        made = together([lambda function=function: ready(function) for function in needed])  # type: ignore[misc]
        self._kernels: Mapping[str, Any] = dict(zip(needed, made, strict=True))

    def run(self, call: Sequence[Any], dk: Tensor, dv: Tensor, totals: Totals) -> list[Any]:
        shape = self.shape
        slots = (shape.batch, shape.heads, shape.rows, self.slots, shape.dim)
        part = None if self.packed else torch.zeros(slots, dtype=torch.float32, device=dk.device)
        given = [*call, part]
        if DKDV not in self._kernels:
            dk.zero_()
            dv.zero_()
        for kernel in self._kernels.values():
            kernel(given)
        return given


def forward_sources(kernel: Planned, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
    """What each parameter of the forward kernel and of its merge is given. Only shapes, strides and dtypes are read."""
    first = INPUTS + len(inputs) + len(kernel.program.args) + (len(PARAMETERS) if kernel.spec.dropout else 0)
    parts = {"part_ptr": Slot(first, "*fp32"), "part_lse_ptr": Slot(first + 1, "*fp32")}
    return parameter_sources(kernel, q, k, v, inputs) | _sizes(kernel, q, k, v, inputs) | parts


def gathered_parameters(
    plan: BackwardPlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], dout: Tensor | None = None
) -> Mapping[str, Any]:
    """What each parameter of the backward kernels is given. Only shapes, strides and dtypes are read."""
    return {**backward_parameters(plan, q, k, v, inputs, dout), **_sizes(plan, q, k, v, inputs)}


def _sizes(plan: Planned, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> dict[str, int]:
    """How many gathered tiles a head has, and slots a row."""
    shape, (programs, slots) = call_shape(q, k, v), _tiles(plan, q, k, v, inputs)
    return {"gathered_tiles": programs // max(shape.batch * shape.heads, 1), "slots": slots}


def _tiles(plan: Planned, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Programs that own gathered tiles, and slots of a row."""
    assert plan.gathered is not None
    shape, named = call_shape(q, k, v), dict(zip((d.name for d in plan.program.inputs), inputs, strict=True))
    derivation = plan.program.input(plan.gathered.entry.input).derivation
    assert isinstance(derivation, Gathering)
    slots = named[plan.gathered.plan].shape[-1]
    tiles = gathered_tiles(derivation, shape, slots) if slots else 0
    return tiles * shape.batch * shape.heads, slots


__all__ = ["GatheredBackward", "GatheredForward", "forward_sources", "gathered_parameters"]
