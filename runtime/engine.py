"""A program's kernels at run time: chosen, compiled and launched per kind of call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.plan import DType, ForwardPlan, Loads, Spec, Tiling, default_tiling, forward_plan
from attndsl.program import CallShape, Program, TableDecl, Type
from attndsl.properties import takes_more_rows_than_keys

from attndsl.runtime.call import call_shape, check_inputs, check_tables, device_target, dtype_of

Generate = Callable[[ForwardPlan], str]
BACKENDS = ("auto", "triton", "cpu")


@dataclass(frozen=True, slots=True)
class Generators:
    """Source printers, handed in by the API: the runtime knows plans, not how they are printed."""

    triton_forward: Generate
    cpu_forward: Generate


@dataclass(slots=True)
class Engine:
    """The kernels of one program. Thread-safe: preparing a call twice is harmless."""

    program: Program
    generators: Generators
    tiling: Tiling | None = None
    _prepared: dict[Any, Any] = field(default_factory=dict)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Nq, Dv] and lse float32 [B, Hq, Nq] (float64 for float64 tensors)."""
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.device, backend, scale is None or scale > 0,
            tuple((x.shape, x.stride(), x.dtype) for x in inputs), (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15 == 0,
        )  # fmt: skip
        launch = self._prepared.get(key)
        if launch is None:
            launch = self._prepared[key] = self._prepare(q, k, v, inputs, scale, backend, aligned=key[-1])
        return launch(q, k, v, inputs, args, scale)  # type: ignore[no-any-return]

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None, backend: str, aligned: bool
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """Checks a kind of call and prepares its launch."""
        shape = call_shape(q, k, v)
        check_tables(self.program, shape)
        check_inputs(self.program, shape, inputs, q.device)
        if shape.rows > shape.k_len and not takes_more_rows_than_keys(self.program):
            raise error(
                "A507",
                f"{shape.rows} query rows for {shape.k_len} keys: the first rows would stand before the first token",
                self.program.branch.span,
                help="write `align start` if row i stands at position i",
            )
        target = device_target(q.device)
        spec = Spec(
            shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype_of(q), target,
            scale_sign=1 if scale is None or scale > 0 else -1,
        )  # fmt: skip
        if self._choose(backend, target) == "cpu":
            from attndsl.runtime.cpu import CpuForward

            plan = forward_plan(self.program, spec, self.tiling or default_tiling(spec))
            return CpuForward(plan, self.generators.cpu_forward(plan))
        from attndsl.runtime.triton_launch import TritonForward, loads_for

        if spec.dtype is DType.FLOAT64:
            raise error("A508", "float64 runs on the CPU backend only", help="convert to float32, or pass backend='cpu'")
        spec = replace(spec, loads=loads_for(spec, k, v, aligned))
        plan = forward_plan(self.program, spec, self.tiling or default_tiling(spec))
        return TritonForward(plan, self.generators.triton_forward(plan), q, k, v, inputs, aligned)

    def _choose(self, backend: str, target: str) -> str:
        if backend not in BACKENDS:
            raise error("A509", f"there is no backend {backend!r}", help=f"one of {', '.join(BACKENDS)}")
        if backend == "auto":
            return "cpu" if target == "cpu" else "triton"
        if backend == "cpu" and target != "cpu":
            raise error("A510", "the CPU backend takes tensors on the CPU", help="move q, k and v, or leave `backend` out")
        if backend == "triton" and target == "cpu":
            from attndsl.runtime.triton_launch import INTERPRETED

            if not INTERPRETED:
                raise error(
                    "A510", "Triton kernels run on a GPU",
                    help="move q, k and v to one, or set TRITON_INTERPRET=1 to interpret the kernel",
                )  # fmt: skip
        return backend


def empty_output(q: Tensor, shape: CallShape) -> tuple[Tensor, Tensor]:
    """Uninitialised output in the memory order of q (heads inside tokens where q has them so), and lse."""
    if q.stride(1) < q.stride(2):
        out = q.new_empty(shape.batch, shape.rows, shape.heads, shape.v_dim).transpose(1, 2)
    else:
        out = q.new_empty(shape.batch, shape.heads, shape.rows, shape.v_dim)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, torch.empty(shape.batch, shape.heads, shape.rows, dtype=dtype, device=q.device)


def table_tensor(table: TableDecl, device: torch.device) -> Tensor:
    """A compile-time table as a tensor of its declared shape."""
    dtype = {Type.INT: torch.int32, Type.FLOAT: torch.float32, Type.BOOL: torch.bool}[table.type]
    return torch.tensor(table.values, dtype=dtype, device=device).reshape(table.shape)


def default_scale(dim: int) -> float:
    return 1.0 / math.sqrt(dim)


__all__ = ["BACKENDS", "Engine", "Generators", "Loads", "default_scale", "empty_output", "table_tensor"]
