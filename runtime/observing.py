"""The kernels that observe a branch, one for each of its parts, and what they find as row classes and members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.branches import View
from attndsl.observation import classes
from attndsl.observing import Cells, ObservePlan, cells_of, observe_plans
from attndsl.plan import Backend
from attndsl.program import CallShape, Program
from attndsl.properties import classes_rows_before
from attndsl.runtime.call import call_shape, check_rows, present_lengths
from attndsl.runtime.cpu import call_values, cpu_function
from attndsl.runtime.documents import members_of
from attndsl.runtime.engine import Engine, default_scale
from attndsl.runtime.entries import keys_of
from attndsl.runtime.lasting import table_tensor
from attndsl.runtime.masses import shares

FUNCTION = "attention_observe"


@dataclass(slots=True)
class Observer:
    """The kernels that observe a branch, for one kind of call: one for each part."""

    program: Program
    shape: CallShape
    wanted: Cells
    steps: tuple[tuple[View | None, Cells, Callable[..., Tensor]], ...]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None,
    ) -> Tensor:  # fmt: skip
        found: Tensor | None = None
        present = present_lengths(self.program, self.shape, inputs)
        for view, cells, step in self.steps:
            part = step(q, k, v, lse, inputs, args, scale, None)
            members = members_of(self.program, view, self.shape, inputs, present)
            if members is not None:
                part = members.of_all(part, self.wanted.keys, self.wanted.largest)
            else:
                part = _of_members(part, view, cells, self.wanted, self.shape, present)
            if found is None:
                found = part
            else:
                found = torch.maximum(found, part) if self.wanted.largest else found + part
        assert found is not None
        return found


def _of_members(
    x: Tensor, view: View | None, cells: Cells, wanted: Cells, shape: CallShape, present: Tensor | None
) -> Tensor:
    """What a kernel found of its cells as row classes and members. present: how many tokens are, as `shares` has it."""
    if cells.rows is not None and wanted.rows != cells.rows:
        assert wanted.rows is not None
        x = _joined(x, 2, wanted.rows // cells.rows, wanted.largest)
    whole = cells_of(view, wanted).keys
    if whole != cells.keys:
        x = _joined(x, 3, whole // cells.keys, wanted.largest)
    if view is None or (whole * view.stride == wanted.keys and view.size == view.stride):
        return x
    return shares(x, view.size, view.stride, wanted.keys, shape.k_len, wanted.largest, present)


def _joined(x: Tensor, dim: int, count: int, largest: bool) -> Tensor:
    """Each so many cells along a dimension, of which the last may be fewer."""
    missing = -x.shape[dim] % count
    x = pad(x, (0, missing) if dim == 3 else (0, 0, 0, missing)).unflatten(dim, (-1, count))
    return x.amax(dim + 1) if largest else x.sum(dim + 1)


# ------------------------------------------------------------------------------------------ kernels


def prepare_observer(
    engine: Engine, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None,
    backend: str, wanted: Cells, aligned: bool,
) -> Observer:  # fmt: skip
    program = engine.program_of(scale)
    spec = engine.spec_of(q, k, v, inputs, scale)
    check_rows(program, call_shape(q, k, v), classes_rows_before)
    # Hopper's own kernels do not observe: the portable one does.
    chosen = engine.choose("auto" if backend == "gluon" else backend, spec, max(q.shape[2], k.shape[2]))
    on_cpu = chosen == "cpu"
    views = [part.view for part in program.only.parts]
    # Where blocks of documents lie is data: of single tokens and entries they are put together.
    cells = tuple(cells_of(view, wanted) if program.packed is None else replace(wanted, keys=1) for view in views)
    plans = observe_plans(program, replace(spec, backend=Backend.CPU if on_cpu else Backend.TRITON), cells)
    steps = []
    for view, plan in zip(views, plans, strict=True):
        deriving = engine.deriving(plan.program, q, k, v, inputs)
        examples = [*inputs, *deriving.examples]
        step: Callable[..., Tensor]
        if on_cpu:
            step = CpuObserve(plan, engine.generators.cpu_observe(plan))
        else:
            step = TritonObserve(plan, engine.generators.triton_observe(plan), q, k, v, examples, aligned)
        steps.append((view, plan.cells, deriving.forward(step)))
    return Observer(program, call_shape(q, k, v), wanted, tuple(steps))


class CpuObserve:
    """A generated function that observes, with what it takes besides the call's tensors."""

    def __init__(self, plan: ObservePlan, source: str) -> None:
        self.plan = plan
        self.function = cpu_function(source, "cpu_observe", FUNCTION)
        self.tables = {f"{t.name}_table": table_tensor(t, torch.device("cpu")) for t in plan.tables}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, _: None,
    ) -> Tensor:  # fmt: skip
        shape = call_shape(q, k, v)
        keys, _values = keys_of(self.plan, k, v, inputs)
        found = lse.new_zeros(_sizes(self.plan, shape, keys.shape[2]))
        grouped = (shape.kv_heads, shape.heads // shape.kv_heads)
        if found.numel():
            self.function(
                q.unflatten(1, grouped), keys, lse.unflatten(1, grouped), found.unflatten(1, grouped),
                default_scale(shape.dim) if scale is None else scale,
                **call_values(self.plan, shape.k_len, inputs, args, None), **self.tables,
            )  # fmt: skip
        return found


class TritonObserve:
    """The kernel for one kind of call."""

    def __init__(
        self, plan: ObservePlan, text: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool
    ) -> None:
        from attndsl.runtime.triton_launch import prepare

        shape = call_shape(q, k, v)
        keys = keys_of(plan, k, v, inputs)[0].shape[2]
        self.plan, self.default_scale = plan, default_scale(shape.dim)
        self.sizes = _sizes(plan, shape, keys)
        grid = shape.batch * shape.heads * -(-keys // plan.tiling.block_k) if shape.rows else 0
        self.launch: Callable[[Sequence[Any]], None] | None = None
        if grid:
            sources = observe_sources(plan, q, k, v, inputs)
            self.launch = prepare(plan, text, FUNCTION, grid, sources, aligned, q.device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, _: None,
    ) -> Tensor:  # fmt: skip
        # Tiles that nothing visits are not written.
        found = lse.new_zeros(self.sizes)
        if self.launch is not None:
            k, v = keys_of(self.plan, k, v, inputs)
            scale = self.default_scale if scale is None else scale
            self.launch((q, k, v, None, lse, scale, *inputs, *args, found))
        return found


def observe_sources(
    plan: ObservePlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]
) -> Mapping[str, Any]:  # fmt: skip
    """What each parameter that the kernel may have is given. Only shapes, strides and dtypes are read."""
    from attndsl.runtime.launcher import Slot
    from attndsl.runtime.triton_launch import INPUTS, parameter_sources

    _, _, row_cells, key_cells = _sizes(plan, call_shape(q, k, v), keys_of(plan, k, v, inputs)[0].shape[2])
    place = INPUTS + len(inputs) + len(plan.program.args)
    found = parameter_sources(plan, q, k, v, inputs)
    return found | {"observed_ptr": Slot(place, "*fp32"), "classes": row_cells, "members": key_cells}


def _sizes(plan: ObservePlan, shape: CallShape, keys: int) -> tuple[int, int, int, int]:
    """[B, Hq, cells of rows, cells of keys] of what a kernel finds."""
    cells = plan.cells
    return (
        shape.batch, shape.heads, classes(cells.rows, shape.rows, shape.q_len(plan.program)), -(-keys // cells.keys)
    )  # fmt: skip
