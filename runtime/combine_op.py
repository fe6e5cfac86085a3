"""Outputs that combine branches: one kernel forward and one backward on GPUs, torch elsewhere.

The operators `attndsl::combine` and `attndsl::combine_backward`. Every branch is read once and the output written once;
the gradients of inputs are summed in one order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.branches import Merged
from attndsl.combining import CombinePlan, Learning, combine_plan, merges
from attndsl.compose import reading
from attndsl.plan import Spec
from attndsl.program import Axis, CallShape, Const, Program
from attndsl.runtime.call import check_inputs, device_target, dtype_of
from attndsl.runtime.engine import MAX_PREPARED
from attndsl.runtime.launcher import Slot
from attndsl.runtime.ops import check_learnable, traced, wants_gradients
from attndsl.runtime.outputs import in_order_of
from attndsl.runtime.registry import engine_of
from attndsl.runtime.sums import Totals
from attndsl.runtime.transforms import transformed
from attndsl.runtime.triton_version import INTERPRETED

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "combine(str program, Tensor[] outs, Tensor[] lses, Tensor[] inputs, SymInt[] args, SymInt[] sizes) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "combine_backward(str program, Tensor d_out, Tensor? d_lse, Tensor[] outs, Tensor[] lses, Tensor[] inputs, "
    "SymInt[] args, SymInt[] sizes) -> (Tensor[], Tensor[], Tensor[])"
)
# What a kind of call needs: its plan and its launch (None: there are no rows).
_Prepared = tuple[CombinePlan, Callable[[Sequence[Any]], None] | None]
_PREPARED: dict[Any, _Prepared] = {}
# Where the values of a call stand: inputs and arguments from `triton_launch.INPUTS` on, then what a kernel has besides.
_OUT, _LSE = 0, 1


def by_kernel(q: Tensor, backend: str) -> bool:
    """Whether a kernel combines: of a call's own tensors. Under torch.func transforms torch does."""
    wanted = q.is_cuda or (backend == "triton" and INTERPRETED)
    return wanted and q.dtype != torch.float64 and not transformed()


def combined_by_kernel(
    key: str, program: Program, shape: CallShape, attended: Mapping[str, tuple[Tensor, Tensor | None]],
    inputs: Mapping[str, Tensor], args: Sequence[int],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Output [B, Hq, rows, Dv] and, where the program merges, lse float32 [B, Hq, rows].

    attended: output and lse of each branch that the output reads, in the order of `branches.combined`.
    """
    assert program.output is not None
    lses = [lse for name, (_, lse) in attended.items() if name in merges(program.output) and lse is not None]
    outs = [out for out, _ in attended.values()]
    given = [inputs[decl.name] for decl in reading(program).inputs]
    sizes = [shape.batch, shape.heads, shape.kv_heads, shape.rows, shape.k_len, shape.dim, shape.v_dim]
    tensors = (*outs, *lses, *given)
    if traced(tensors):
        out, lse = torch.ops.attndsl.combine(key, outs, lses, given, list(args), sizes)
    elif wants_gradients(tensors):
        out, lse = _Combine.apply(key, list(args), sizes, len(outs), len(lses), *tensors)
    else:
        out, lse = _combine(key, outs, lses, given, args, sizes)
    return out, lse if isinstance(program.output, Merged) else None


# ---------------------------------------------------------------------------------------- kernels


def _prepared(
    key: str, backward: bool, first: Tensor, d_out: Tensor | None, inputs: Sequence[Tensor], sizes: Sequence[int],
    aligned: bool,
) -> _Prepared:  # fmt: skip
    kind = (
        key, backward, first.stride(), first.dtype, first.device, None if d_out is None else d_out.stride(),
        tuple((x.shape, x.stride(), x.dtype) for x in inputs), tuple(sizes), aligned,
    )  # fmt: skip
    if kind not in _PREPARED:
        if len(_PREPARED) >= MAX_PREPARED:
            _PREPARED.clear()
        _PREPARED[kind] = _prepare(key, backward, first, d_out, inputs, CallShape(*sizes), aligned)
    return _PREPARED[kind]


def _prepare(
    key: str, backward: bool, first: Tensor, d_out: Tensor | None, inputs: Sequence[Tensor], shape: CallShape,
    aligned: bool,
) -> _Prepared:  # fmt: skip
    from attndsl.runtime.triton_launch import prepare

    engine, device = engine_of(key), first.device
    spec = Spec(shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype_of(first), device_target(device))
    plan = combine_plan(engine.program, spec, backward)
    check_inputs(plan.program, shape, inputs, device)
    grid = -(-shape.rows // plan.tiling.block_q) * shape.batch * shape.heads
    if not grid:
        return plan, None
    sources = combine_sources(plan, shape, first, d_out, inputs)
    text = engine.generators.triton_combine(plan)
    return plan, prepare(plan, text, function_of(plan), grid, sources, aligned, device)


def function_of(plan: CombinePlan) -> str:
    """The name of the plan's kernel."""
    return "combine_gradients" if plan.gradients else "combine_branches"


def combine_sources(
    plan: CombinePlan, shape: CallShape, first: Tensor, d_out: Tensor | None, inputs: Sequence[Tensor]
) -> dict[str, Any]:
    """What the parameters of the plan's kernel are given; of tensors, only shapes, strides and dtypes are read."""
    from attndsl.runtime.triton_launch import ELEMENT, INPUTS, program_sources

    element = f"*{ELEMENT[plan.spec.dtype]}"
    names, merged = plan.parameters(plan.branches), plan.parameters(plan.merges)
    of_branches = [(f"out_{name}", element) for name in names] + [(f"lse_{name}", "*fp32") for name in merged]
    types = dict(of_branches)
    if plan.gradients:
        types |= {"d_out": element, "d_lse": "*fp32", **{f"d_{name}": type for name, type in of_branches}}
        for n in range(len(plan.learned)):
            types |= {f"sum_{n}": "*fp32", f"at_{n}": "*i64"}
    after = INPUTS + len(inputs) + len(plan.program.args)
    found: dict[str, Any] = {f"{name}_ptr": Slot(after + i, type) for i, (name, type) in enumerate(types.items())}
    found |= {"out_ptr": Slot(_OUT, element), "lse_ptr": Slot(_LSE, "*fp32")}
    found |= {"rows": shape.rows, "k_len": shape.k_len, **program_sources(plan, shape, inputs, first.device)}
    for name, x in (("out", first), ("d_out", first if d_out is None else d_out)):
        found |= {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}
    for n, learning in enumerate(plan.learned):
        row, offset = _entry_of(plan, learning, shape)
        found |= {f"sum_{n}_stride": row, f"sum_{n}_offset": offset}
    return found


def _combine(
    key: str, outs: Sequence[Tensor], lses: Sequence[Tensor], inputs: Sequence[Tensor], args: Sequence[int],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outs, lses = _in_one_order(outs), [x.contiguous() for x in lses]
    out, lse = _empty(key, outs[0])
    _, launch = _prepared(key, False, outs[0], None, inputs, sizes, _aligned(out, *outs))
    if launch is not None:
        launch((out, lse, *_NOTHING, *inputs, *args, *outs, *lses))
    return out, lse


# Between out and lse and the inputs, where other kernels have values.
_NOTHING = (None,) * 4


def _in_one_order(outs: Sequence[Tensor]) -> list[Tensor]:
    """The branches' outputs, all in the memory order of the first."""
    first = in_order_of(outs[0], outs[0])
    return [first, *(in_order_of(first, x) for x in outs[1:])]


def _aligned(*tensors: Tensor) -> bool:
    return all(x.data_ptr() % 16 == 0 for x in tensors)


def _empty(key: str, first: Tensor) -> tuple[Tensor, Tensor]:
    merges = isinstance(engine_of(key).program.output, Merged)
    rows = first.shape[:3] if merges else (0,)  # Without an lse an empty one.
    return torch.empty_like(first), first.new_empty(rows, dtype=torch.float32)


def _backward(
    key: str, d_out: Tensor, d_lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor],
    inputs: Sequence[Tensor], args: Sequence[int], sizes: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    outs, lses = _in_one_order(outs), [x.contiguous() for x in lses]
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_outs, d_lses = [torch.empty_like(x) for x in outs], [torch.empty_like(x) for x in lses]
    aligned = _aligned(d_out, *outs, *d_outs)
    plan, launch = _prepared(key, True, outs[0], d_out, inputs, sizes, aligned)
    if plan.has_lse:
        d_lse = outs[0].new_zeros(outs[0].shape[:3], dtype=torch.float32) if d_lse is None else d_lse.contiguous()
    shape = CallShape(*sizes)
    sums = Sums(plan, shape, outs[0].device)
    if launch is not None:
        own = (*outs, *lses, d_out, d_lse, *d_outs, *d_lses, *sums.values)
        launch((None, None, *_NOTHING, *inputs, *args, *own))
    found = sums.gradients(inputs)
    learnable = [
        torch.zeros_like(x) if gradient is None else gradient
        for decl, x, gradient in zip(plan.program.inputs, inputs, found, strict=True)
        if decl.learnable
    ]
    return d_outs, d_lses, learnable


# ------------------------------------------------------------------------------ gradients of gates


class Sums:
    """What the backward kernel writes of learned reads, and the gradients that come of it.

    values: for each read the room for its sums, and for the places that they belong to (None where these are its own).
    """

    def __init__(self, plan: CombinePlan, shape: CallShape, device: torch.device) -> None:
        self.plan, self.shape = plan, shape
        self.own: dict[str, Tensor] = {}
        self.values: list[Tensor | None] = []
        heads = shape.batch * shape.heads
        for x in plan.learned:
            if x.own:
                name = x.read.input
                if name not in self.own:
                    sizes = [heads * _rows_of(plan, x, shape), *_inner(plan, x, shape)]
                    self.own[name] = torch.zeros(sizes, dtype=torch.float32, device=device)
                self.values += (self.own[name], None)
            else:
                rows = [heads, shape.rows, *([shape.v_dim] if x.channels else [])]
                self.values.append(torch.zeros(rows, dtype=torch.float32, device=device))
                self.values.append(torch.zeros(rows, dtype=torch.int64, device=device))

    def gradients(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient of each input, None where it is not learned."""
        totals = Totals(self.plan.program, self.shape, inputs[0].device) if inputs else None
        done: set[str] = set()
        for n, x in enumerate(self.plan.learned):
            assert totals is not None
            name = x.read.input
            if not x.own:
                values, places = self.values[2 * n], self.values[2 * n + 1]
                assert values is not None and places is not None
                totals.add(name, values, places)
            elif name not in done:
                totals.add_whole(name, self._declared(x, self.own[name]))
                done.add(name)
        return [] if totals is None else totals.gradients(inputs, [x.read.input for x in self.plan.learned])

    def _declared(self, x: Learning, found: Tensor) -> Tensor:
        """Sums of rows as entries of the input's declared dimensions: summed over those it does not have."""
        shape, dims = self.shape, self.plan.program.input(x.read.input).dims
        found = found.view(shape.batch, shape.kv_heads, -1, _rows_of(self.plan, x, shape), *found.shape[1:])
        axes = [dim.axis for dim in dims]
        # What stands for a query head is its key head, and its place among those that share this.
        follows = (Axis.B in axes, Axis.G in axes or Axis.H in axes, Axis.H in axes, Axis.Q in axes)
        if over := [place for place, kept in enumerate(follows) if not kept]:
            found = found.sum(over, dtype=torch.float64)
        if Axis.H in axes:
            found = found.flatten(int(follows[0]), int(follows[0]) + 1)
        order = [axis for axis in (Axis.B, Axis.H, Axis.G, Axis.Q) if axis in axes]
        places = [i for axis in order for i, own in enumerate(axes) if own is axis]
        places += [i for kind in (Axis.CONST, Axis.DV) for i, own in enumerate(axes) if own is kind]
        return found.permute([places.index(i) for i in range(len(dims))])


def _rows_of(plan: CombinePlan, x: Learning, shape: CallShape) -> int:
    """Sums of a head: one a row, or a tile of rows where the input does not follow them."""
    follows = any(dim.axis is Axis.Q for dim in plan.program.input(x.read.input).dims)
    return shape.rows if follows else -(-shape.rows // plan.tiling.block_q)


def _inner(plan: CombinePlan, x: Learning, shape: CallShape) -> list[int]:
    """The sizes of an input's constant dimensions, then its channels."""
    dims = plan.program.input(x.read.input).dims
    return [dim.size for dim in dims if dim.axis is Axis.CONST] + [shape.v_dim for dim in dims if dim.axis is Axis.DV]


def _entry_of(plan: CombinePlan, x: Learning, shape: CallShape) -> tuple[int, int]:
    """Elements from one row's sums to the next's, and where in a row the read's are."""
    sizes = _inner(plan, x, shape)
    constants = [int(e.value) for e in x.read.index if isinstance(e, Const)]
    offset = 0
    for i, size in itertools.zip_longest(constants, sizes, fillvalue=0):
        offset = offset * size + i
    return math.prod(sizes), offset


# -------------------------------------------------------------------------------------- operators


def _fake(
    key: str, outs: Sequence[Tensor], lses: Sequence[Tensor], inputs: Sequence[Tensor], args: Sequence[int],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(key, _in_one_order(outs)[0])


def _backward_fake(
    key: str, d_out: Tensor, d_lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor],
    inputs: Sequence[Tensor], args: Sequence[int], sizes: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    first, declared = _in_one_order(outs)[0], reading(engine_of(key).program).inputs
    learnable = [x.new_empty(x.shape) for decl, x in zip(declared, inputs, strict=True) if decl.learnable]
    return [torch.empty_like(first) for _ in outs], [x.new_empty(x.shape) for x in lses], learnable


class _Combine(torch.autograd.Function):
    """out, lse with a gradient: those of the branches' outputs and lse, and of learnable inputs."""

    @staticmethod
    def forward(key: str, args: Sequence[int], sizes: Sequence[int], outs: int, lses: int, *tensors: Tensor) -> Any:
        given = _split(tensors, outs, lses)
        if not traced(tensors):
            return _combine(key, *given, args, sizes)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.attndsl.combine(key, *given, args, sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        key, args, sizes, outs, lses, *tensors = inputs
        check_learnable(reading(engine_of(key).program), ctx.needs_input_grad[5 + outs + lses :])
        ctx.save_for_backward(*tensors)
        ctx.call = (key, args, sizes, outs, lses)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        key, args, sizes, outs, lses = ctx.call
        given = _split(tensors, outs, lses)
        d_out = torch.zeros_like(tensors[0]) if d_out is None else d_out
        # A second derivative is refused where it is asked for: the operator has none.
        by_operator = torch.is_grad_enabled() or traced((d_out, *tensors))
        differentiate: Any = torch.ops.attndsl.combine_backward if by_operator else _backward
        d_outs, d_lses, found = differentiate(key, d_out, d_lse, *given, args, sizes)
        learned = iter(found)
        gradients = [next(learned) if decl.learnable else None for decl in reading(engine_of(key).program).inputs]
        return None, None, None, None, None, *d_outs, *d_lses, *gradients


def _split(tensors: Sequence[Tensor], outs: int, lses: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return list(tensors[:outs]), list(tensors[outs : outs + lses]), list(tensors[outs + lses :])


def _autograd(
    key: str, outs: Sequence[Tensor], lses: Sequence[Tensor], inputs: Sequence[Tensor], args: Sequence[int],
    sizes: Sequence[int],
) -> Any:  # fmt: skip
    return _Combine.apply(key, args, sizes, len(outs), len(lses), *outs, *lses, *inputs)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("combine", _combine, _device)
    _LIBRARY.impl("combine_backward", _backward, _device)
_LIBRARY.impl("combine", _autograd, "Autograd")
_LIBRARY.impl("combine", _fake, "Meta")
_LIBRARY.impl("combine_backward", _backward_fake, "Meta")
