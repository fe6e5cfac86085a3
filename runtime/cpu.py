"""Running the CPU lowering."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attndsl.plan import ForwardPlan, Plan
from attndsl.runtime.call import call_shape
from attndsl.runtime.dropout import Dropout
from attndsl.runtime.engine import default_scale
from attndsl.runtime.entries import keys_of
from attndsl.runtime.lasting import table_tensor
from attndsl.runtime.load import load_source
from attndsl.runtime.outputs import empty_output

_CPU = torch.device("cpu")


def cpu_function(source: str, kind: str, name: str) -> Callable[..., None]:
    """A generated function. It does not say where it makes tensors: on the CPU, whatever torch's default device is."""
    function = getattr(load_source(source, kind), name)

    def call(*given: Any, **named: Any) -> None:
        if torch.get_default_device() == _CPU:
            function(*given, **named)
            return
        with _CPU:
            function(*given, **named)

    return call


@dataclass(slots=True)
class CpuForward:
    """A generated forward function, with what it takes besides the call's tensors."""

    plan: ForwardPlan
    source: str
    _function: Any = field(init=False)
    _tables: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._function = cpu_function(self.source, "cpu_forward", "attention_forward")
        self._tables = {f"{t.name}_table": table_tensor(t, _CPU) for t in self.plan.tables}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = empty_output(q, call_shape(q, k, v))
        lse.fill_(-math.inf)
        if not self.plan.layout.all_rows(call_shape(q, k, v), self.plan.program):
            out.zero_()
        self.into(out, lse, q, k, v, inputs, args, scale, dropout)
        return out, lse

    def into(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, dropout: Dropout | None,
    ) -> None:  # fmt: skip
        """Write out and lse (preset to -inf), or where the plan follows others, add to them."""
        shape = call_shape(q, k, v)
        k, v = keys_of(self.plan, k, v, inputs)
        grouped = (shape.kv_heads, shape.heads // shape.kv_heads)
        self._function(
            q.unflatten(1, grouped), k, v, out.unflatten(1, grouped), lse.unflatten(1, grouped),
            default_scale(shape.dim) if scale is None else scale,
            **call_values(self.plan, shape.k_len, inputs, args, dropout), **self._tables,
        )  # fmt: skip


def call_values(
    plan: Plan, tokens: int, inputs: Sequence[Tensor], args: Sequence[int], dropout: Dropout | None
) -> dict[str, Any]:
    """What a CPU function takes beside q, k and v, by the names of its parameters: inputs, arguments, the values of
    dropout, and the number of tokens where keys are entries."""
    declared = dict(zip((decl.name for decl in plan.program.inputs), inputs, strict=True))
    given = dict(zip(plan.program.args, args, strict=True))
    found: dict[str, Any] = {f"{decl.name}_input": declared[decl.name] for decl in plan.inputs}
    found |= {f"arg_{name}": given[name] for name in plan.args}
    if plan.view is not None:
        found["tokens"] = tokens
    if dropout is not None:
        found |= zip(("seed", "drop_below", "keep_scale"), dropout.values(), strict=True)
    return found
