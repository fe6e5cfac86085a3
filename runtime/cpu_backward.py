"""Running the CPU lowering of the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attndsl.plan import BackwardPlan
from attndsl.runtime.call import call_shape
from attndsl.runtime.cpu import call_values
from attndsl.runtime.dropout import Dropout
from attndsl.runtime.engine import Gradients, default_scale, empty_gradient, table_tensor
from attndsl.runtime.load import load_source


@dataclass(slots=True)
class CpuBackward:
    """A generated backward function, with what it takes besides the call's tensors."""

    plan: BackwardPlan
    source: str
    _function: Any = field(init=False)
    _tables: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._function = load_source(self.source, "cpu_backward").attention_backward
        self._tables = {f"{t.name}_table": table_tensor(t, torch.device("cpu")) for t in self.plan.tables}

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, dropout: Dropout | None,
    ) -> Gradients:  # fmt: skip
        plan, shape = self.plan, call_shape(q, k, v)
        high = torch.float64 if q.dtype == torch.float64 else torch.float32
        dq = empty_gradient(q).zero_()
        # Sums over many query tiles: rounded once, at the end.
        dk, dv = (empty_gradient(x).to(high).zero_() for x in (k, v))
        # In float64 `index_put_` adds in one order; in float32 its threads race.
        learned = {
            decl.name: torch.zeros(x.shape, dtype=torch.float64)
            for decl, x in zip(plan.program.inputs, inputs, strict=True)
            if decl in plan.learnable_inputs
        }
        tensors = {"q": q, "dout": dout, "out": out, "lse": lse, "d_lse": dlse, "dq": dq}
        if plan.weights is not None:
            tensors = {name: tensors[name] for name in ("q", "dout", "dq")}
        grouped = (shape.kv_heads, shape.heads // shape.kv_heads)
        self._function(
            **{name: x.unflatten(1, grouped) for name, x in tensors.items() if x is not None},
            k=k, v=v, dk=dk, dv=dv, scale=default_scale(shape.dim) if scale is None else scale,
            **{f"d_{name}": x for name, x in learned.items()}, **call_values(plan, inputs, args, dropout),
            **self._tables,
        )  # fmt: skip
        found = [
            learned[decl.name].to(x.dtype) if decl.name in learned else None
            for decl, x in zip(plan.program.inputs, inputs, strict=True)
        ]
        return dq, dk.to(k.dtype), dv.to(v.dtype), found
