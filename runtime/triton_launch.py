"""Launching generated Triton kernels.

Everything that depends only on the kind of a call (shapes, strides, dtypes) is settled once: which kernel,
its grid, its integer arguments. A call then allocates its output and passes pointers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attndsl.plan import DType, ForwardPlan, Loads, Spec, head_parts

from attndsl.runtime.build import KernelSource, compile_kernel, parameters
from attndsl.runtime.cache import KernelCache
from attndsl.runtime.call import call_shape, dim_size
from attndsl.runtime.engine import default_scale, empty_output, table_tensor
from attndsl.runtime.load import load_source

INTERPRETED = bool(triton.knobs.runtime.interpret)
FUNCTION = "attention_forward"

_ELEMENT = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16", DType.FLOAT32: "fp32"}
_POINTER = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i1",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
# Pointers and strides that are multiples of these let a kernel load 16 bytes at a time.
POINTER_ALIGNMENT = 16
STRIDE_ALIGNMENT = 8


@functools.cache
def shared_cache() -> KernelCache:
    """The process's kernel cache."""
    return KernelCache()


def loads_for(spec: Spec, k: Tensor, v: Tensor, aligned: bool) -> Loads:
    """Hardware tensor copies where the device has them and the memory allows it: 16-byte strides and pointers."""
    backend, _, arch = spec.target.partition(":")
    if backend != "cuda" or int(arch) < 90 or spec.dtype is DType.FLOAT32 or not aligned:
        return Loads.POINTER
    for x in (k, v):
        strides = [s for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
        if x.stride(3) != 1 or any(s * x.element_size() % 16 for s in strides) or x.numel() == 0:
            return Loads.POINTER
    return Loads.DESCRIPTOR


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter that differs from call to call: where it stands in (q, k, v, out, lse, scale, *inputs, *args)."""

    index: int
    type: str


@dataclass(frozen=True, slots=True)
class _Descriptor:
    """A parameter that is a tensor descriptor of k or v, made anew when the tensor's address changes."""

    index: int
    block: tuple[int, ...]
    type: str


_OUT, _LSE, _SCALE, _INPUTS = 3, 4, 5, 6


class TritonForward:
    """The forward kernel for one kind of call: same shapes, strides, dtypes and alignment."""

    def __init__(self, plan: ForwardPlan, text: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool) -> None:
        shape = call_shape(q, k, v)
        self.plan, self.shape = plan, shape
        self.grid = -(-shape.rows // plan.tiling.block_q) * shape.batch * shape.heads
        self.default_scale = default_scale(shape.dim)
        names = parameters(text, FUNCTION)
        sources = self._sources(q, k, v, inputs)
        self._template: list[Any] = [sources[name] for name in names]
        self._slots = [(i, x.index) for i, x in enumerate(self._template) if isinstance(x, _Slot)]
        self._descriptors = [(i, x) for i, x in enumerate(self._template) if isinstance(x, _Descriptor)]
        if INTERPRETED:
            self._launch = getattr(load_source(text, FUNCTION), FUNCTION)[(self.grid,)]
            return
        types = tuple((name, _type(name, sources[name])) for name in names)
        alignments = tuple(self._alignments(names, sources)) if aligned else ()
        source = KernelSource(text, FUNCTION, types, alignments, plan.tiling.warps, plan.tiling.stages)
        self._kernel = compile_kernel(source, plan.spec.target, shared_cache())

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = empty_output(q, self.shape)
        if self.grid == 0:
            return out, lse
        call = (q, k, v, out, lse, self.default_scale if scale is None else scale, *inputs, *args)
        values = self._template.copy()
        for position, index in self._slots:
            values[position] = call[index]
        for position, descriptor in self._descriptors:
            x = call[descriptor.index]
            values[position] = TensorDescriptor(x, list(x.shape), list(x.stride()), list(descriptor.block))
        if INTERPRETED:
            self._launch(*values)
            return out, lse
        kernel = self._kernel
        with torch.cuda.device(q.device):
            kernel.run(
                self.grid, 1, 1, torch.cuda.current_stream().cuda_stream, kernel.function, kernel.packed_metadata,
                None, None, None, *values,
            )  # fmt: skip
        return out, lse

    # -------------------------------------------------------------------------------- parameters

    def _sources(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """What each parameter that a kernel may have is given."""
        plan, shape = self.plan, self.shape
        element = f"*{_ELEMENT[plan.spec.dtype]}"
        found: dict[str, Any] = {
            "q_ptr": _Slot(0, element), "k_ptr": _Slot(1, element), "v_ptr": _Slot(2, element),
            "out_ptr": _Slot(_OUT, element), "lse_ptr": _Slot(_LSE, "*fp32"), "scale": _Slot(_SCALE, "fp32"),
            "rows": shape.rows, "k_len": shape.k_len,
        }  # fmt: skip
        out, _ = empty_output(q, shape)
        for name, x in (("q", q), ("k", k), ("v", v), ("o", out)):
            found |= {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}
        for index, name, dim in ((1, "k", shape.dim), (2, "v", shape.v_dim)):
            for part in head_parts(dim):
                block = (1, 1, plan.tiling.block_k, part.size)
                type = f"tensordesc<{_ELEMENT[plan.spec.dtype]}{list(block)}>"
                found[f"{name}_desc{part.suffix}"] = _Descriptor(index, block, type)
        for i, (decl, x) in enumerate(zip(plan.program.inputs, inputs, strict=True)):
            found[f"{decl.name}_ptr"] = _Slot(_INPUTS + i, _POINTER[x.dtype])
            for axis, size in enumerate(x.shape):
                # A dimension of size 1 is broadcast.
                found[f"{decl.name}_stride_{axis}"] = 0 if size == 1 else x.stride(axis)
                found[f"{decl.name}_size_{axis}"] = dim_size(decl.dims[axis], plan.program, shape)
        for table in plan.tables:
            found[f"{table.name}_table"] = table_tensor(table, q.device)
        for i, name in enumerate(plan.program.args):
            found[f"arg_{name}"] = _Slot(_INPUTS + len(inputs) + i, "i32")
        return found

    def _alignments(self, names: Sequence[str], sources: dict[str, Any]) -> Iterator[tuple[str, int]]:
        for name in names:
            if name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr"):
                yield name, POINTER_ALIGNMENT
            elif name.startswith("stride_") and sources[name] % STRIDE_ALIGNMENT == 0:
                yield name, STRIDE_ALIGNMENT


def _type(name: str, source: Any) -> str:
    """Triton type of a parameter."""
    match source:
        case _Slot(type=type) | _Descriptor(type=type):
            return type
        case Tensor():
            return _POINTER[source.dtype]
        case _:
            return "i64" if "_stride_" in name or name.startswith("stride_") else "i32"
