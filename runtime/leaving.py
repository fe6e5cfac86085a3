"""The kernels that find which tiles `skip below` leaves, one for each part of a branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attndsl.left_tiles import TILE
from attndsl.plan import Backend, ForwardPlan
from attndsl.program import CallShape
from attndsl.runtime.call import call_shape
from attndsl.runtime.cpu import call_values, cpu_function
from attndsl.runtime.engine import Engine, default_scale
from attndsl.runtime.entries import keys_of
from attndsl.runtime.lasting import table_tensor
from attndsl.skipping import left_plans

FUNCTION = "attention_left"


def prepare_left(
    engine: Engine, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None, backend: str,
    aligned: bool,
) -> Callable[..., list[Tensor]]:  # fmt: skip
    """What finds the tiles of a kind of call, as `Engine.left_tiles` returns them."""
    program, spec = engine.program_of(scale), engine.spec_of(q, k, v, inputs, scale)
    # Hopper's own kernels do not skip: the portable one does.
    chosen = engine.choose("auto" if backend == "gluon" else backend, spec, max(q.shape[2], k.shape[2]))
    on_cpu = chosen == "cpu"
    steps = []
    for plan in left_plans(program, replace(spec, backend=Backend.CPU if on_cpu else Backend.TRITON)):
        deriving = engine.deriving(plan.program, q, k, v, inputs)
        step: Callable[..., Tensor]
        if on_cpu:
            step = CpuLeft(plan, engine.generators.cpu_left(plan))
        else:
            text = engine.generators.triton_left(plan)
            step = TritonLeft(plan, text, q, k, v, [*inputs, *deriving.examples], aligned)
        steps.append(deriving.forward(step))

    def find(
        q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
    ) -> list[Tensor]:
        return [row_numbers(q), *(step(q, k, v, inputs, args, scale, None) for step in steps)]

    return find


def row_numbers(q: Tensor) -> Tensor:
    """The number of each row's tile, int32 [rows]."""
    return torch.arange(q.shape[2], dtype=torch.int32, device=q.device) // TILE


@dataclass(frozen=True, slots=True)
class CpuLeft:
    """A generated function."""

    plan: ForwardPlan
    source: str

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        _: None,
    ) -> Tensor:  # fmt: skip
        plan, shape = self.plan, call_shape(q, k, v)
        keys, _values = keys_of(plan, k, v, inputs)
        left = torch.zeros(sizes(shape, keys.shape[2]), dtype=torch.bool)
        grouped = (shape.kv_heads, shape.heads // shape.kv_heads)
        scale = default_scale(shape.dim) if scale is None else scale
        cpu_function(self.source, "cpu_left", FUNCTION)(
            q.unflatten(1, grouped), keys, left.unflatten(1, grouped), scale,
            **call_values(plan, shape.k_len, inputs, args, None),
            **{f"{t.name}_table": table_tensor(t, torch.device("cpu")) for t in plan.tables},
        )  # fmt: skip
        return left


class TritonLeft:
    """The kernel for one kind of call."""

    def __init__(
        self, plan: ForwardPlan, text: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool
    ) -> None:
        from attndsl.runtime.triton_launch import prepare

        shape = call_shape(q, k, v)
        self.plan, self.default_scale = plan, default_scale(shape.dim)
        self.sizes = sizes(shape, keys_of(plan, k, v, inputs)[0].shape[2])
        grid = shape.batch * shape.heads * self.sizes[2] if self.sizes[3] else 0
        self.launch: Callable[[Sequence[Any]], None] | None = None
        if grid:
            sources = left_sources(plan, q, k, v, inputs)
            self.launch = prepare(plan, text, FUNCTION, grid, sources, aligned, q.device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        _: None,
    ) -> Tensor:  # fmt: skip
        # Tiles that nothing visits are not written.
        left = torch.zeros(self.sizes, dtype=torch.uint8, device=q.device)
        if self.launch is not None:
            k, v = keys_of(self.plan, k, v, inputs)
            self.launch((q, k, v, None, None, self.default_scale if scale is None else scale, *inputs, *args, left))
        return left.view(torch.bool)


def left_sources(plan: ForwardPlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
    """What each parameter that the kernel may have is given. Only shapes, strides and dtypes are read."""
    from attndsl.runtime.launcher import Slot
    from attndsl.runtime.triton_launch import INPUTS, parameter_sources

    place = INPUTS + len(inputs) + len(plan.program.args)
    key_tiles = sizes(call_shape(q, k, v), keys_of(plan, k, v, inputs)[0].shape[2])[3]
    return {**parameter_sources(plan, q, k, v, inputs), "left_ptr": Slot(place, "*u8"), "key_tiles": key_tiles}


def sizes(shape: CallShape, keys: int) -> tuple[int, int, int, int]:
    """[B, Hq, row tiles, key tiles] of a part with so many keys."""
    return shape.batch, shape.heads, -(-shape.rows // TILE), -(-keys // TILE)
