"""Launching the generated backward kernel for Hopper, which makes dq, dk and dv in one pass.

A kernel of rows goes before it. dq is summed in float32, in a tensor of its own, which another kernel rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attndsl.plan import Backend, BackwardPlan, Spec
from attndsl.program import Program
from attndsl.runtime.call import call_shape
from attndsl.runtime.dropout import Dropout
from attndsl.runtime.engine import Gradients, default_scale
from attndsl.runtime.launcher import Slot
from attndsl.runtime.outputs import empty_gradient, empty_output, in_order_of
from attndsl.runtime.triton_backward import backward_parameters, row_stride
from attndsl.runtime.triton_launch import INPUTS, descriptor, prepare, together, why_not_gluon, without_memory
from attndsl.targets import gradients_refusal, layout_refusal

GRADIENTS = "attention_gradients"
ROWS = "attention_rows"
ROUND = "attention_round"


def why_not(program: Program, spec: Spec, q: Tensor, backend: str) -> str:
    """Why a call's gradients do not come from the kernel for Hopper, empty where they may. `spec` has its `loads`.

    dk and dv repeat to the bit, but in which order programs add to dq differs from run to run: who asks torch for
    deterministic algorithms gets the portable kernels, whose gradients all repeat.
    """
    if backend == "triton":
        return "backend='triton' asks for the portable kernels"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms were asked for"
    return gradients_refusal(program, spec) or why_not_gluon(program, spec, True, q) or layout_refusal(program, spec)


class GluonBackward:
    """The backward kernels for one kind of call: same shapes, strides, dtypes and alignment."""

    def __init__(
        self, plan: BackwardPlan, rows_text: str, text: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
        inputs: Sequence[Tensor], aligned: bool,
    ) -> None:  # fmt: skip
        shape = call_shape(q, k, v)
        self.plan, self.shape = plan, shape
        self.default_scale = default_scale(shape.dim)
        grid = -(-shape.rows // plan.tiling.block_q) * shape.batch * shape.heads
        key_grid = -(-shape.k_len // plan.key_tiling.block_k) * shape.batch * shape.kv_heads
        self._kernels: list[Callable[[Sequence[Any]], None]] = []
        if grid and key_grid:
            portable = replace(plan, spec=replace(plan.spec, backend=Backend.TRITON))
            of_rows = rows_parameters(portable, q, k, v, inputs, dout)
            of_keys = gradients_parameters(plan, q, k, v, inputs, dout)
            self._kernels = together([
                lambda: prepare(portable, rows_text, ROWS, grid, of_rows, aligned, q.device),
                lambda: prepare(plan.of_keys(), text, GRADIENTS, key_grid, of_keys, aligned, q.device),
                lambda: prepare(portable, rows_text, ROUND, grid, of_rows, aligned, q.device),
            ])  # fmt: skip

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, dropout: Dropout | None,
    ) -> Gradients:  # fmt: skip
        dq, dk, dv = map(empty_gradient, (q, k, v))
        if not self._kernels:
            return dq.zero_(), dk.zero_(), dv.zero_(), [None] * len(inputs)
        out, lse = in_order_of(q, out), lse.contiguous()
        d_lse = None if dlse is None else dlse.contiguous()
        shape = self.shape
        delta, row_lse = lse.new_empty(2, shape.batch * shape.heads, row_stride(shape.rows))
        sums = torch.empty(dq.shape, dtype=torch.float32, device=dq.device)
        scale = self.default_scale if scale is None else scale
        call = (q, k, v, out, lse, scale, *inputs, *args, dout, d_lse, dq, dk, dv, delta, row_lse, sums)
        for kernel in self._kernels:
            kernel(call)
        return dq, dk, dv, [None] * len(inputs)


def _after(plan: BackwardPlan, inputs: Sequence[Tensor]) -> int:
    """Where the sums stand among a call's values: after the gradients, and what is kept of rows."""
    return INPUTS + len(inputs) + len(plan.program.args) + len(("dout", "d_lse", "dq", "dk", "dv", "delta", "row_lse"))


def rows_parameters(
    plan: BackwardPlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], dout: Tensor | None = None
) -> Mapping[str, Any]:
    """What each parameter of the kernels before and after it is given."""
    return {**backward_parameters(plan, q, k, v, inputs, dout), "sums_ptr": Slot(_after(plan, inputs), "*fp32")}


def gradients_parameters(
    plan: BackwardPlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], dout: Tensor | None = None
) -> Mapping[str, Any]:
    """What each parameter of the kernel for Hopper is given. Only shapes, strides and dtypes are read."""
    portable = replace(plan, spec=replace(plan.spec, backend=Backend.TRITON))
    found = dict(backward_parameters(portable, q, k, v, inputs, dout))
    if dout is None:
        dout, _ = empty_output(without_memory(q), call_shape(q, k, v))
    block_q, half = plan.key_tiling.block_q, plan.key_tiling.block_k // 2
    sums_at = _after(plan, inputs)
    first = INPUTS + len(inputs) + len(plan.program.args)
    _, dk, dv = (empty_gradient(without_memory(x)) for x in (q, k, v))
    sums = torch.empty(q.shape, dtype=torch.float32, device="meta")
    # A warpgroup adds half of a tile's rows to dq, or half of its columns.
    dq_rows, dq_columns = (64, 1) if block_q > 64 else (block_q, 2)
    for name, index, x, rows, columns in (
        ("q", 0, q, block_q, 1), ("k", 1, k, half, 1), ("v", 2, v, half, 1), ("dout", first, dout, block_q, 1),
        ("dk", first + 3, dk, half, 1), ("dv", first + 4, dv, half, 1), ("dq", sums_at, sums, dq_rows, dq_columns),
    ):  # fmt: skip
        found[f"{name}_desc"] = descriptor(plan.spec, index, x, rows, x.shape[3] // columns)
    return found
