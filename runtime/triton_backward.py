"""Launching the generated Triton kernels of the backward pass.

The kernels write the gradients of q, k and v. Of those of learnable inputs they write sums, and for each sum the entry
that it belongs to: here these are added up, in one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.plan import BackwardPlan, Learned, Over
from attndsl.program import CallShape
from attndsl.runtime.call import call_shape, dim_size
from attndsl.runtime.engine import Gradients, default_scale, empty_gradient, empty_output, in_order_of
from attndsl.runtime.launcher import Slot
from attndsl.runtime.triton_launch import ELEMENT, INPUTS, parameter_sources, prepare

DQ = "attention_dq"
DKDV = "attention_dkdv"


def check_learned(plan: BackwardPlan) -> None:
    """Raises `PatternError` (A923) for a learnable input whose gradient no kernel sums."""
    for x in plan.learned:
        if x.over is Over.NOTHING:
            raise error(
                "A923", "the gradient of an input indexed by q and k together is not yet supported on the GPU",
                plan.program.input(x.read.input).span, help="pass backend='cpu', or declare it without `learnable`",
            )  # fmt: skip


class TritonBackward:
    """The backward kernels for one kind of call: same shapes, strides, dtypes and alignment."""

    def __init__(
        self, plan: BackwardPlan, dq_text: str, dkdv_text: str, q: Tensor, k: Tensor, v: Tensor,
        inputs: Sequence[Tensor], aligned: bool,
    ) -> None:  # fmt: skip
        shape = call_shape(q, k, v)
        self.plan, self.shape = plan, shape
        self.default_scale = default_scale(shape.dim)
        layout = plan.layout
        self.q_tiles = -(-layout.q.most(shape.rows) // plan.tiling.block_q) * layout.classes
        grid = self.q_tiles * shape.batch * shape.heads
        key_tiles = -(-layout.k.most(shape.k_len) // plan.key_tiling.block_k) * layout.classes
        key_grid = key_tiles * shape.batch * shape.kv_heads
        sources = backward_parameters(plan, q, k, v, inputs)
        # Without rows the gradients of k and v are 0; without keys there are none.
        self._dq = prepare(plan, dq_text, DQ, grid, sources, aligned, q.device) if grid else None
        self._dkdv = None
        if grid and key_grid:
            self._dkdv = prepare(plan.of_keys(), dkdv_text, DKDV, key_grid, sources, aligned, q.device)

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    ) -> Gradients:  # fmt: skip
        return InTurn((self,))(dout, dlse, q, k, v, out, lse, inputs, args, scale)

    def run(self, call: tuple[Any, ...], dk: Tensor, dv: Tensor, learned: dict[str, Tensor]) -> None:
        """Write the gradients of q, k, v, or where the plan follows others, add to them; add those of inputs.

        call: what the kernels take, from q to delta; dk and dv are among it. learned: float64, by the inputs' names.
        """
        sums = [self._empty_sums(x, dk.device) for x in self.plan.learned]
        call = (*call, *(tensor for pair in sums for tensor in pair))
        if not self.plan.follows and (self._dkdv is None or not self.plan.layout.all_keys):
            dk.zero_()
            dv.zero_()
        if self._dq is not None:
            self._dq(call)
        if self._dkdv is not None:
            self._dkdv(call)
        self._learn(sums, learned)

    def _empty_sums(self, x: Learned, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for the sums of a read, [batch * heads, tiles, rows or keys], and for the entries they belong to."""
        heads = self.shape.batch * self.shape.heads
        size = {Over.TILE: self.q_tiles, Over.KEYS: self.shape.rows, Over.ROWS: self.shape.k_len}[x.over]
        places = heads if x.over is Over.TILE else heads * size
        # In a layout some programs have no tokens, and some tokens no program.
        make = torch.empty if self.plan.layout.plain else torch.zeros
        return make(heads, size, dtype=torch.float32, device=device), make(places, dtype=torch.int64, device=device)

    def _learn(self, sums: Sequence[tuple[Tensor, Tensor]], found: dict[str, Tensor]) -> None:
        """Add to the gradients of the inputs."""
        plan = self.plan
        for x, (values, places) in zip(plan.learned, sums, strict=True):
            name = x.read.input
            if name not in found:
                size = _declared_size(plan, name, self.shape)
                found[name] = torch.zeros(size, dtype=torch.float64, device=values.device)
            if (self._dkdv if x.over is Over.ROWS else self._dq) is None:
                continue  # No kernel ran, and nothing was summed.
            # In float64, where `index_put_` adds in one order on the CPU too.
            wide = values.double()
            terms = wide.sum(1) if x.over is Over.TILE else wide.flatten()
            found[name].view(-1).index_put_((places,), terms, accumulate=True)


@dataclass(frozen=True, slots=True)
class InTurn:
    """The backward kernels of a program's pieces. Each but the first adds to the gradients of those before it."""

    pieces: tuple[TritonBackward, ...]

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    ) -> Gradients:  # fmt: skip
        first = self.pieces[0]
        dq, dk, dv = map(empty_gradient, (q, k, v))
        dout, out, lse = in_order_of(q, dout), in_order_of(q, out), lse.contiguous()
        d_lse = None if dlse is None else dlse.contiguous()
        scale = first.default_scale if scale is None else scale
        call = (q, k, v, out, lse, scale, *inputs, *args, dout, d_lse, dq, dk, dv, torch.empty_like(lse))
        learned: dict[str, Tensor] = {}
        for piece in self.pieces:
            piece.run(call, dk, dv, learned)
        gradients = [
            learned[decl.name].sum_to_size(x.shape).to(x.dtype) if decl.name in learned else None
            for decl, x in zip(first.plan.program.inputs, inputs, strict=True)
        ]
        return dq, dk, dv, gradients


def _declared_size(plan: BackwardPlan, name: str, shape: CallShape) -> list[int]:
    """The shape that an input has where nothing of it is broadcast."""
    return [dim_size(dim, plan.program, shape) for dim in plan.program.input(name).dims]


def backward_parameters(
    plan: BackwardPlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]
) -> Mapping[str, Any]:
    """What each parameter that the kernels may have is given. Only shapes, strides and dtypes are read."""
    found = dict(parameter_sources(plan, q, k, v, inputs))
    first = INPUTS + len(inputs) + len(plan.program.args)
    element, real = f"*{ELEMENT[plan.spec.dtype]}", "*fp32"
    types = {"dout": element, "d_lse": real, "dq": element, "dk": element, "dv": element, "delta": real}
    for n in range(len(plan.learned)):
        types |= {f"sum_{n}": real, f"at_{n}": "*i64"}
    found |= {f"{name}_ptr": Slot(first + i, type) for i, (name, type) in enumerate(types.items())}
    dout, _ = empty_output(q, call_shape(q, k, v))
    for name, x in (("dout", dout), ("dq", empty_gradient(q)), ("dk", empty_gradient(k)), ("dv", empty_gradient(v))):
        found |= {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}
    return found


__all__ = ["InTurn", "TritonBackward", "backward_parameters", "check_learned"]
