"""Launching the fused kernel of a selection: its members' vectors, in two parts, and the kernel that ranks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attndsl.plan import Loads, Spec
from attndsl.program import CallShape, Const, Program
from attndsl.runtime.call import device_target, dtype_of
from attndsl.runtime.derive import Deriver
from attndsl.runtime.launcher import Slot
from attndsl.runtime.triton_launch import ELEMENT, POINTER_ALIGNMENT, prepare, program_sources
from attndsl.select_plan import SelectPlan, select_plan
from attndsl.selection import Probs, Selection

FUNCTION = "attention_select"


class TritonSelect:
    """The fused kernel for one kind of call: same shapes, strides and dtypes."""

    def __init__(
        self, program: Program, selection: Selection, shape: CallShape, q: Tensor, vector_heads: int,
        given: Sequence[Tensor], printer: Callable[[SelectPlan], str],
    ) -> None:  # fmt: skip
        spec = Spec(
            shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype_of(q), device_target(q.device), Loads.POINTER
        )
        known = selection.scale
        if isinstance(selection.score, Probs):
            known = program.named(selection.score.branch).scale
        self.scale = float(known.value) if isinstance(known, Const) else shape.dim**-0.5
        self.plan = plan = select_plan(program, selection, spec)
        self.deriver = Deriver(plan.program, shape, q.device, given=given)
        inputs = [*given, *self.deriver.examples()]
        self.text, self.device = printer(plan), q.device
        self.sources = select_sources(plan, shape, q, vector_heads, inputs)
        self.batch = shape.batch
        groups = shape.batch * shape.heads // plan.share
        self.grid = -(-shape.rows // plan.tiling.block_q) * groups if shape.k_len and plan.capacity else 0
        # By whether what it loads begins where 16 bytes do: else it loads element by element.
        self._launches: dict[bool, Callable[[Sequence[Any]], None]] = {}

    def __call__(
        self,
        into: Tensor,
        q: Tensor,
        vectors: Tensor,
        inputs: Sequence[Tensor],
        args: Sequence[int],
        scale: float | None,
        lse: Tensor | None = None,
    ) -> None:
        """Writes the plan int32 [B, H', rows, capacity].

        vectors: float32 [B, heads, members, D] of the members, or for `probs` the branch's keys, in q's dtype; lse:
        what that branch had, float32 [B, Hq, rows].
        """
        if not self.grid:
            into.fill_(-1)
            return
        vectors = vectors.expand(self.batch, -1, -1, -1).contiguous()
        high = vectors.to(q.dtype)
        low = high if q.dtype == torch.float32 or lse is not None else (vectors - high.float()).to(q.dtype)
        scale = self.scale if scale is None else scale
        aligned = (q.data_ptr() | high.data_ptr() | low.data_ptr()) % POINTER_ALIGNMENT == 0
        if aligned not in self._launches:
            prepared = prepare(self.plan, self.text, FUNCTION, self.grid, self.sources, aligned, self.device)
            self._launches[aligned] = prepared
        self._launches[aligned]((q, high, low, into, lse, scale, *inputs, *self.deriver(inputs, args), *args))


def select_sources(
    plan: SelectPlan, shape: CallShape, q: Tensor, vector_heads: int, inputs: Sequence[Tensor]
) -> dict[str, Any]:
    """What the kernel's parameters are given; of tensors, only shapes, strides and dtypes are read."""
    element = f"*{ELEMENT[plan.spec.dtype]}"
    return {
        "q_ptr": Slot(0, element), "high_ptr": Slot(1, element), "low_ptr": Slot(2, element),
        "plan_ptr": Slot(3, "*i32"), "lse_ptr": Slot(4, "*fp32"), "scale": Slot(5, "fp32"),
        "rows": shape.rows, "k_len": shape.k_len,
        "members": -(-shape.k_len // plan.selection.keys), "vector_share": shape.heads // vector_heads,
        **{f"stride_q{axis}": q.stride(i) for i, axis in enumerate("bhn")},
        **program_sources(plan, shape, inputs, q.device),
    }  # fmt: skip
