"""Running the CPU lowering of the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attndsl.plan import BackwardPlan
from attndsl.runtime.cpu import call_values, cpu_function
from attndsl.runtime.dropout import Dropout
from attndsl.runtime.engine import Gradients, default_scale
from attndsl.runtime.entries import keys_of
from attndsl.runtime.lasting import table_tensor
from attndsl.runtime.outputs import empty_gradient


@dataclass(slots=True)
class CpuBackward:
    """A generated backward function, with what it takes besides the call's tensors."""

    plan: BackwardPlan
    source: str
    _function: Any = field(init=False)
    _tables: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._function = cpu_function(self.source, "cpu_backward", "attention_backward")
        self._tables = {f"{t.name}_table": table_tensor(t, torch.device("cpu")) for t in self.plan.tables}

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, dropout: Dropout | None,
    ) -> Gradients:  # fmt: skip
        return InTurn((self,))(dout, dlse, q, k, v, out, lse, inputs, args, scale, dropout)

    def run(
        self, k: Tensor, v: Tensor, tensors: Mapping[str, Tensor | None], gradients: Mapping[str, Tensor],
        learned: Mapping[str, Tensor], inputs: Sequence[Tensor], args: Sequence[int], scale: float,
        dropout: Dropout | None,
    ) -> None:  # fmt: skip
        """Add to the gradients.

        tensors: q, dout, out, lse and d_lse, of a call with k and v. gradients: dq, dk, dv. learned: those of inputs
        by name.
        """
        plan = self.plan
        spec = plan.spec
        tokens = k.shape[2]
        k, v = keys_of(plan, k, v, inputs)
        tensors = {**tensors, "k": k, "v": v}
        if plan.view is not None:
            gradients = {**gradients, "dk": learned[plan.view.keys], "dv": learned[plan.view.values]}
        left_out = () if plan.softmax else ("out", "lse", "d_lse")
        given = {n: x for n, x in {**tensors, **gradients}.items() if x is not None and n not in left_out}
        grouped = (spec.kv_heads, spec.heads // spec.kv_heads)
        of_keys = ("k", "v", "dk", "dv")
        names = {decl.name for decl in plan.learnable_inputs}
        self._function(
            **{name: x if name in of_keys else x.unflatten(1, grouped) for name, x in given.items()}, scale=scale,
            **{f"d_{name}": x for name, x in learned.items() if name in names},
            **call_values(plan, tokens, inputs, args, dropout), **self._tables,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class InTurn:
    """The backward functions of a program's pieces, all adding to the same gradients."""

    pieces: tuple[CpuBackward, ...]

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, dropout: Dropout | None,
    ) -> Gradients:  # fmt: skip
        high = torch.float64 if q.dtype == torch.float64 else torch.float32
        # Sums over many query tiles, and of queries over the pieces: rounded once, at the end.
        dq = empty_gradient(q).to(high if len(self.pieces) > 1 else q.dtype).zero_()
        dk, dv = (empty_gradient(x).to(high).zero_() for x in (k, v))
        # In float64 `index_put_` adds in one order; in float32 its threads race.
        declared = self.pieces[0].plan.program.inputs
        names = {decl.name for piece in self.pieces for decl in piece.plan.learnable_inputs}
        learned = {
            decl.name: torch.zeros(x.shape, dtype=torch.float64, device=q.device)
            for decl, x in zip(declared, inputs, strict=True)
            if decl.name in names
        }
        for piece in self.pieces:
            if piece.plan.view is not None:
                # Of whole entries: what a broadcast dimension gets is summed at the end.
                keys, values = keys_of(piece.plan, k, v, inputs)
                learned |= {piece.plan.view.keys: torch.zeros(keys.shape, dtype=high, device=q.device)}
                learned |= {piece.plan.view.values: torch.zeros(values.shape, dtype=high, device=q.device)}
        tensors = {"q": q, "dout": dout, "out": out, "lse": lse, "d_lse": dlse}
        gradients = {"dq": dq, "dk": dk, "dv": dv}
        scale = default_scale(q.shape[3]) if scale is None else scale
        for piece in self.pieces:
            piece.run(k, v, tensors, gradients, learned, inputs, args, scale, dropout)
        found = [
            learned[decl.name].sum_to_size(x.shape).to(x.dtype) if decl.name in learned else None
            for decl, x in zip(declared, inputs, strict=True)
        ]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), found
