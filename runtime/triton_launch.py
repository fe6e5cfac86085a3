"""Launching generated Triton kernels.

Everything that depends only on the kind of a call (shapes, strides, dtypes) is settled once: which kernel,
its grid, its integer arguments. A call then allocates its output and passes pointers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from attndsl.begins import most_tiles
from attndsl.derivation import RowTiles
from attndsl.layers import Layers, in_a_row, layers
from attndsl.plan import Backend, DType, Loads, Plan, Printed, Spec, head_parts
from attndsl.program import Axis, CallShape, Program
from attndsl.runtime.build import KernelSource, compile_kernel, parameters
from attndsl.runtime.cache import shared_cache as shared_cache
from attndsl.runtime.call import call_shape, dim_size
from attndsl.runtime.counters import counter
from attndsl.runtime.dropout import PARAMETERS, Dropout
from attndsl.runtime.engine import default_scale
from attndsl.runtime.entries import keys_of
from attndsl.runtime.lasting import table_tensor
from attndsl.runtime.launcher import Descriptor, Slot, launcher
from attndsl.runtime.load import load_source
from attndsl.runtime.outputs import Outputs, empty_output
from attndsl.runtime.triton_version import INTERPRETED as INTERPRETED
from attndsl.runtime.triton_version import version
from attndsl.targets import GLUON_VERSIONS, has_tensor_copies, hopper_refusal

FUNCTION = "attention_forward"

ELEMENT = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16", DType.FLOAT32: "fp32", DType.FLOAT8: "fp8e4nv"}
POINTER = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i1",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
# Pointers and strides that are multiples of these let a kernel load 16 bytes at a time.
POINTER_ALIGNMENT = 16
STRIDE_ALIGNMENT = 8


def why_not_gluon(program: Program, spec: Spec, aligned: bool, *tensors: Tensor) -> str:
    """Why a call does not get the Hopper lowering, empty where it does. tensors: those that it copies, with 16-byte
    pointers or not (`aligned`)."""
    if reason := hopper_refusal(program, spec):
        return reason
    if not version().startswith(GLUON_VERSIONS):
        return f"the Hopper lowering was not tested on triton {version()}"
    if INTERPRETED:
        return "the interpreter does not run Gluon"
    if not aligned or not all(map(lies_for_copies, tensors)):
        return "q, k and v do not lie in memory as hardware tensor copies need"
    return ""


def lies_for_copies(x: Tensor) -> bool:
    """Whether the strides of x are those of a tensor that hardware copies. A stride of 0 is that of an expanded one."""
    strides = [s for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.stride(3) == 1 and x.numel() > 0 and not any(not s or s * x.element_size() % 16 for s in strides)


def loads_for(spec: Spec, aligned: bool, *tensors: Tensor) -> Loads:
    """Hardware tensor copies where the device has them and the memory of what a kernel's loop reads allows it: 16-byte
    strides and pointers (`aligned`)."""
    copied = aligned and has_tensor_copies(spec) and all(map(lies_for_copies, tensors))
    return Loads.DESCRIPTOR if copied else Loads.POINTER


# What a launch reads the sizes, tiling and inputs of a kernel from.
Planned: TypeAlias = Plan | Printed
# Where the values of a call stand in (q, k, v, out, lse, scale, *inputs, *args, and dropout's three or a counter).
_OUT, _LSE, _SCALE, INPUTS = 3, 4, 5, 6


@functools.cache
def programs_at_once(device: torch.device) -> int:
    """How many programs run side by side where each takes a whole multiprocessor."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class TritonForward:
    """The forward kernel for one kind of call: same shapes, strides, dtypes and alignment."""

    def __init__(
        self, kernel: Printed, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool
    ) -> None:
        shape = call_shape(q, k, v)
        self.kernel, self.shape = kernel, shape
        layout = kernel.layout
        tiles = layout.programs("q", kernel.tiling.block_q, shape, kernel.program)
        if kernel.row_tiles is not None:
            assert isinstance(kernel.row_tiles.derivation, RowTiles)
            tiles = most_tiles(kernel.row_tiles.derivation, shape.rows)
        self.grid = tiles * shape.batch * (shape.heads if kernel.tiling.pack == 1 else shape.kv_heads)
        if kernel.tiling.several:
            self.grid = min(self.grid, programs_at_once(q.device))
        self.everywhere = layout.all_rows(shape, kernel.program)
        self.default_scale = default_scale(shape.dim)
        self._made = Outputs.of(q, shape)
        self._counted, self._device = kernel.tiling.several, q.device
        if self.grid:
            sources = parameter_sources(kernel, q, k, v, inputs)
            self._launch = prepare(kernel, kernel.text, FUNCTION, self.grid, sources, aligned, q.device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = self._made.out(q), self._made.lse(q)
        if not self.everywhere:
            out.zero_()
            lse.fill_(-math.inf)
        self.into(out, lse, q, k, v, inputs, args, scale, dropout)
        return out, lse

    def output(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
    ) -> Tensor:
        """The output of a call without dropout, alone: an lse that nobody asks for has no memory."""
        out = self._made.out(q)
        if not self.everywhere:
            out.zero_()
        if self.grid:
            # As `into` does it: a call more would take as long as a launch's tenth.
            if self.kernel.view is not None:
                k, v = keys_of(self.kernel, k, v, inputs)
            scale = self.default_scale if scale is None else scale
            last = (counter(self._device),) if self._counted else ()
            self._launch((q, k, v, out, None, scale, *inputs, *args, *last))
        return out

    def into(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, dropout: Dropout | None,
    ) -> None:  # fmt: skip
        """Write out and lse, or where the plan follows others, add to them."""
        if self.grid:
            if self.kernel.view is not None:
                k, v = keys_of(self.kernel, k, v, inputs)
            scale = self.default_scale if scale is None else scale
            last = (counter(self._device),) if self._counted else dropout.values() if dropout else ()
            self._launch((q, k, v, out, lse, scale, *inputs, *args, *last))


def prepare(
    plan: Planned,
    text: str,
    function: str,
    grid: int,
    sources: Mapping[str, Any],
    aligned: bool,
    device: torch.device,
) -> Callable[[Sequence[Any]], None]:
    """A generated kernel, compiled for its target or interpreted, as a function of a call's values.

    sources: what each parameter is given, a constant, a `Slot` or a `Descriptor`.
    """
    names = parameters(text, function)
    template = [sources[name] for name in names]
    if INTERPRETED:
        return _Interpreted(getattr(load_source(text, function), function)[(grid,)], template)
    source = kernel_source(plan, text, names, sources, aligned, function)
    kernel = compile_kernel(source, plan.spec.target, shared_cache(), whole=False)
    return launcher(kernel, grid, device.index, template)


_Made = TypeVar("_Made")


def together(steps: Sequence[Callable[[], _Made]]) -> list[_Made]:
    """What these steps make, each on a thread of its own: most of a compilation holds no lock of the interpreter."""
    if len(steps) < 2 or INTERPRETED:
        return [step() for step in steps]
    with ThreadPoolExecutor(len(steps)) as threads:
        return [step.result() for step in [threads.submit(step) for step in steps]]


def prepare_small(
    text: str, function: str, target: str, warps: int, grid: int, sources: Mapping[str, Any], device: torch.device
) -> Callable[[Sequence[Any]], None]:
    """A kernel that no plan of an attention describes, as a function of a call's values."""
    names = parameters(text, function)
    template = [sources[name] for name in names]
    if INTERPRETED:
        return _Interpreted(getattr(load_source(text, function), function)[(grid,)], template)
    source = small_source(text, function, warps, sources)
    return launcher(compile_kernel(source, target, shared_cache(), whole=False), grid, device.index, template)


def small_source(text: str, function: str, warps: int, sources: Mapping[str, Any]) -> KernelSource:
    """How to compile such a kernel."""
    names = parameters(text, function)
    types = tuple((name, _type(name, sources[name])) for name in names)
    return KernelSource(text, function, types, tuple(_alignments(names, sources)), warps, 1)


@dataclass(frozen=True, slots=True)
class _Interpreted:
    """A kernel under Triton's interpreter."""

    launch: Any
    template: list[Any]

    def __call__(self, call: Sequence[Any]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        def value(x: Any) -> Any:
            if isinstance(x, Descriptor):
                return TensorDescriptor(call[x.index], list(x.shape), list(x.strides), list(x.block))
            found = call[x.index] if isinstance(x, Slot) else x
            # What is not there has address 0.
            return torch.empty(0) if found is None else found

        self.launch(*map(value, self.template))


# ------------------------------------------------------------------------------------ parameters


def parameter_sources(plan: Planned, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """What each parameter that a kernel may have is given, from shapes, strides and dtypes alone: meta tensors do."""
    shape = call_shape(q, k, v)
    k, v = keys_of(plan, k, v, inputs)
    element = f"*{ELEMENT[plan.spec.dtype]}"
    found: dict[str, Any] = {
        "q_ptr": Slot(0, element), "k_ptr": Slot(1, element), "v_ptr": Slot(2, element),
        "out_ptr": Slot(_OUT, element), "lse_ptr": Slot(_LSE, "*fp32"), "scale": Slot(_SCALE, "fp32"),
        "rows": shape.rows, "k_len": shape.k_len, "entries": k.shape[2],
    }  # fmt: skip
    out, _ = empty_output(without_memory(q), shape)
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        found |= {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}
    for index, name, x in ((1, "k", k), (2, "v", v)):
        found |= descriptors(plan, "k", name, index, x, plan.tiling.block_k)
    if plan.spec.backend is Backend.GLUON:
        half, block_k = plan.tiling.block_q // 2, plan.tiling.block_k
        tiles = ((0, "q", q, half), (1, "k", k, block_k), (2, "v", v, block_k), (_OUT, "out", out, half))
        for index, name, x, rows in tiles:
            found |= descriptors(plan, "k" if name in "kv" else "q", name, index, x, rows)
        places = plan.layout.programs("q", plan.tiling.block_q, shape, plan.program)
        found |= {"places": places * shape.batch * shape.heads, "heads": shape.batch * shape.heads}
        found["counter_ptr"] = Slot(INPUTS + len(inputs) + len(plan.program.args), "*i32")
    return found | program_sources(plan, shape, inputs, q.device)


def program_sources(plan: Planned, shape: CallShape, inputs: Sequence[Tensor], device: torch.device) -> dict[str, Any]:
    """What the parameters of the program's inputs, tables and arguments are given."""
    found: dict[str, Any] = {}
    for i, (decl, x) in enumerate(zip(plan.program.inputs, inputs, strict=True)):
        found[f"{decl.parameter}_ptr"] = Slot(INPUTS + i, POINTER[x.dtype])
        for axis, size in enumerate(x.shape):
            # A dimension of size 1 is broadcast.
            found[f"{decl.parameter}_stride_{axis}"] = 0 if size == 1 else x.stride(axis)
            dim = decl.dims[axis]
            found[f"{decl.parameter}_size_{axis}"] = (
                size if dim.axis is Axis.LIST else dim_size(dim, plan.program, shape)
            )
    for table in plan.tables:
        found[f"{table.name}_table"] = table_tensor(table, device)
    for i, name in enumerate(plan.program.args):
        found[f"arg_{name}"] = Slot(INPUTS + len(inputs) + i, "i32")
    if plan.spec.dropout:
        first = INPUTS + len(inputs) + len(plan.program.args)
        types = zip(PARAMETERS, ("*i64", "u32", "fp32"), strict=True)
        found |= {name: Slot(first + i, type) for i, (name, type) in enumerate(types)}
    return found


def descriptors(plan: Planned, side: str, name: str, index: int, x: Tensor, rows: int) -> dict[str, Descriptor]:
    """Descriptors of tiles of `rows` rows of the call's value `index`, one for each part of the head dimension.

    side: q or k, in whose order of tokens its tiles are.
    """
    seen = dimensions(plan, side, rows)
    parts = head_parts(x.shape[3])
    return {f"{name}_desc{part.suffix}": descriptor(plan.spec, index, x, rows, part.size, seen) for part in parts}


def dimensions(plan: Planned, side: str, rows: int) -> Layers:
    """The dimensions that tensor copies of tiles of `rows` rows see in the tokens of a side, q or k."""
    return (layers(plan.layout, side, rows) if plan.spec.whole else None) or in_a_row(rows)


def descriptor(spec: Spec, index: int, x: Tensor, rows: int, columns: int, seen: Layers | None = None) -> Descriptor:
    """A descriptor of tiles of the call's value `index`, of the plan's dtype or in float32.

    seen: the dimensions that its tokens have, default one.
    """
    (batch, heads, tokens, dim), strides = x.shape, x.stride()
    seen = seen or in_a_row(rows)
    sizes, steps, tile = seen.shape(tokens), seen.steps, seen.tile
    block = (1, 1, *tile, columns)
    element = "fp32" if x.dtype is torch.float32 else ELEMENT[spec.dtype]
    places = (*strides[:2], *(step * strides[2] for step in steps), strides[3])
    return Descriptor(index, (batch, heads, *sizes, dim), places, block, f"tensordesc<{element}{list(block)}>")


def without_memory(x: Tensor) -> Tensor:
    """A tensor like x, strides included, that takes no room."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def kernel_source(
    plan: Planned,
    text: str,
    names: Sequence[str],
    sources: Mapping[str, Any],
    aligned: bool,
    function: str = FUNCTION,
) -> KernelSource:
    """How to compile a kernel whose parameters are `names`."""
    types = tuple((name, _type(name, sources[name])) for name in names)
    alignments = tuple(_alignments(names, sources)) if aligned else ()
    gluon = plan.spec.backend is Backend.GLUON
    # Timed both ways: the portable kernels, and that of gradients, are slower without LLVM's optimisations.
    plain = gluon and function == FUNCTION
    return KernelSource(text, function, types, alignments, plan.tiling.warps, plan.tiling.stages, gluon, plain)


_ALIGNED = (
    "q_ptr", "k_ptr", "v_ptr", "out_ptr", "part_ptr", "high_ptr", "low_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr",
    "sums_ptr", "given_ptr", "moved_ptr",
)  # fmt: skip


def _alignments(names: Sequence[str], sources: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name in names:
        if name in _ALIGNED:
            yield name, POINTER_ALIGNMENT
        elif name.startswith(("out_", "d_out_")) and name.endswith("_ptr") and not name.endswith("_input_ptr"):
            # Those of branches.
            yield name, POINTER_ALIGNMENT
        elif name.startswith("stride_"):
            multiple = POINTER_ALIGNMENT if _is_bytes(sources, name) else STRIDE_ALIGNMENT
            if sources[name] % multiple == 0:
                yield name, multiple


def _is_bytes(sources: Mapping[str, Any], stride: str) -> bool:
    """Whether the stride is one of a cache of 8-bit elements."""
    match sources.get(f"{stride.removeprefix('stride_')[:-1]}_ptr"):
        case Slot(type="*u8"):
            return True
        case _:
            return False


def _type(name: str, source: Any) -> str:
    """Triton type of a parameter."""
    match source:
        case Slot(type=type) | Descriptor(type=type):
            return type
        case Tensor():
            return POINTER[source.dtype]
        case _:
            return "i64" if "_stride_" in name or name.startswith("stride_") else "i32"
