"""What a kernel compiles to, for a device that need not be there."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import torch
import triton
from torch import Tensor

from attndsl.combining import CombinePlan
from attndsl.decode import DecodePlan
from attndsl.diagnostics import error
from attndsl.observing import ObservePlan
from attndsl.plan import Backend, BackwardPlan, DType, ForwardPlan, Plan
from attndsl.pooling import PoolPlan
from attndsl.program import CallShape, Program, Type
from attndsl.runtime.build import KernelSource, compile_kernel, parameters
from attndsl.runtime.call import call_shape, dim_size
from attndsl.runtime.combine_op import combine_sources, function_of
from attndsl.runtime.decode import FP8, DecodeTensors
from attndsl.runtime.derived_types import derived_dtype
from attndsl.runtime.gluon_backward import GRADIENTS, gradients_parameters
from attndsl.runtime.leaving import FUNCTION as LEFT
from attndsl.runtime.leaving import left_sources
from attndsl.runtime.observing import FUNCTION as OBSERVE
from attndsl.runtime.observing import observe_sources
from attndsl.runtime.outputs import empty_output
from attndsl.runtime.pool import POOLED, WARPS, pool_sources
from attndsl.runtime.quantized import Scales, quantized_parameters
from attndsl.runtime.triton_backward import DKDV, DQ, backward_parameters
from attndsl.runtime.triton_decode import DECODE, decode_sources
from attndsl.runtime.triton_gathered import forward_sources, gathered_parameters
from attndsl.runtime.triton_launch import (
    FUNCTION,
    INTERPRETED,
    kernel_source,
    parameter_sources,
    shared_cache,
    small_source,
)
from attndsl.runtime.triton_select import FUNCTION as SELECT
from attndsl.runtime.triton_select import select_sources
from attndsl.runtime.triton_version import version
from attndsl.select_plan import SelectPlan
from attndsl.skipping import LeftPlan
from attndsl.targets import GLUON_VERSIONS

# Plans whose kernels are shown.
Shown: TypeAlias = ForwardPlan | BackwardPlan | DecodePlan | PoolPlan | SelectPlan | CombinePlan | ObservePlan
# Formats of each kind of device, in the order in which compilation makes them.
FORMATS = {"cuda": ("ttir", "ttgir", "llir", "ptx", "sass"), "hip": ("ttir", "ttgir", "llir", "amdgcn")}
# Any length will do: it decides no type and no alignment.
_LENGTH = 1024
_TORCH = {
    DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16, DType.FLOAT32: torch.float32,
    DType.FLOAT64: torch.float64, DType.FLOAT8: FP8,
}  # fmt: skip
_INPUTS = {Type.INT: torch.int32, Type.FLOAT: torch.float32, Type.BOOL: torch.bool}


def assembly(plan: Shown, text: str, format: str) -> str:
    """The text of a generated kernel after compilation.

    plan, text: the plan, for a CUDA or ROCm target, and what was generated from it.
    format: one of `FORMATS`; `sass` is the machine code itself, disassembled by the tool that Triton carries.

    Raises `PatternError` (A510, A532 to A534) for a format that the target has not, or that cannot be had here.
    """
    target = plan.target if isinstance(plan, PoolPlan) else plan.spec.target
    backend = target.partition(":")[0]
    if backend not in FORMATS:
        raise error("A532", "the CPU lowering is Python: it is not compiled", help="read it with `source`")
    if format not in FORMATS[backend]:
        known = ", ".join(FORMATS[backend])
        raise error("A532", f"{target} has no format {format!r}", help=f"one of {known}")
    if INTERPRETED:
        raise error("A533", "nothing is compiled while TRITON_INTERPRET is set", help="unset it and start again")
    on_hopper = not isinstance(plan, PoolPlan) and plan.spec.backend is Backend.GLUON
    if on_hopper and not version().startswith(GLUON_VERSIONS):
        tested = ", ".join(f"{x}x" for x in GLUON_VERSIONS)
        raise error(
            "A510", f"the Hopper lowering compiles with Triton {tested}, not with {version()}",
            help="choose backend 'triton'",
        )  # fmt: skip
    disassembler = _disassembler() if format == "sass" else ""
    kernel = compile_kernel(offline_source(plan, text), target, shared_cache())
    if format == "sass":
        return _disassembled(disassembler, kernel.binary)
    return kernel.text(format)


def offline_source(plan: Shown, text: str) -> KernelSource:
    """A kernel as a launch on dense, aligned tensors compiles it (ints as int32, floats of inputs as float32)."""
    if isinstance(plan, DecodePlan):
        return _offline_decode(plan, text)
    if isinstance(plan, PoolPlan):
        x = torch.empty(2, 2, _LENGTH, plan.dim, dtype=_TORCH[plan.dtype], device="meta")
        place = torch.empty(x.shape[:3], dtype=torch.int32, device="meta")
        return small_source(text, POOLED, WARPS, pool_sources(plan, POOLED, x, (x, place, place)))
    q, k, v, inputs = meta_tensors(plan)
    if isinstance(plan, SelectPlan):
        sources = select_sources(plan, call_shape(q, k, v), q, plan.spec.kv_heads, inputs)
        return kernel_source(plan, text, parameters(text, SELECT), sources, aligned=True, function=SELECT)
    if isinstance(plan, ObservePlan):
        observed = dict(observe_sources(plan, q, k, v, inputs))
        return kernel_source(plan, text, parameters(text, OBSERVE), observed, aligned=True, function=OBSERVE)
    if isinstance(plan, CombinePlan):
        function = function_of(plan)
        first = empty_output(q, call_shape(q, k, v))[0]
        sources = combine_sources(plan, call_shape(q, k, v), first, None, inputs)
        return kernel_source(plan, text, parameters(text, function), sources, aligned=True, function=function)
    if plan.spec.dtype is DType.FLOAT8:
        of_float8, _ = quantized_parameters(plan, q, k, v, Scales(None, None, None), inputs)
        return kernel_source(plan, text, parameters(text, FUNCTION), of_float8, aligned=True)
    if isinstance(plan, BackwardPlan) and f"def {GRADIENTS}(" in text:
        given = gradients_parameters(plan, q, k, v, inputs)
        return kernel_source(plan, text, parameters(text, GRADIENTS), given, aligned=True, function=GRADIENTS)
    if isinstance(plan, BackwardPlan):
        function = DQ if f"def {DQ}(" in text else DKDV
        given = (backward_parameters if plan.gathered is None else gathered_parameters)(plan, q, k, v, inputs)
        return kernel_source(plan, text, parameters(text, function), given, aligned=True, function=function)
    if isinstance(plan, LeftPlan):
        left = left_sources(plan, q, k, v, inputs)
        return kernel_source(plan, text, parameters(text, LEFT), left, aligned=True, function=LEFT)
    given = (parameter_sources if plan.gathered is None else forward_sources)(plan, q, k, v, inputs)
    return kernel_source(plan, text, parameters(text, FUNCTION), given, aligned=True)


def _offline_decode(plan: DecodePlan, text: str) -> KernelSource:
    spec, cache = plan.spec, plan.cache
    page = _LENGTH if cache.page is None else cache.page
    dtype = FP8 if cache.fp8 else _TORCH[spec.dtype]
    q = torch.empty(2, spec.heads, plan.tiling.block_q, spec.dim, dtype=_TORCH[spec.dtype], device="meta")
    k, v = (torch.empty(2, spec.kv_heads, page, dim, dtype=dtype, device="meta") for dim in (spec.dim, spec.v_dim))
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    table = None if cache.page is None else torch.empty(2, 2, dtype=torch.int32, device="meta")
    number = torch.empty((), device="meta")
    call = DecodeTensors(
        q, k, v, lengths, table, number if cache.k_scaled else None, number if cache.v_scaled else None
    )  # fmt: skip
    sources = decode_sources(plan, 2, call, list(_meta_inputs(plan.program, call.shape)))
    return kernel_source(plan, text, parameters(text, DECODE), sources, aligned=True, function=DECODE)


def meta_tensors(plan: Plan) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """q, k, v and the inputs of a call that the plan serves, without memory."""
    spec = plan.spec
    shape = CallShape(2, spec.heads, spec.kv_heads, _LENGTH, _LENGTH, spec.dim, spec.v_dim)
    dtype = _TORCH[spec.dtype]
    q = torch.empty(shape.batch, shape.heads, shape.rows, shape.dim, dtype=dtype, device="meta")
    k = torch.empty(shape.batch, shape.kv_heads, shape.k_len, shape.dim, dtype=dtype, device="meta")
    v = torch.empty(shape.batch, shape.kv_heads, shape.k_len, shape.v_dim, dtype=dtype, device="meta")
    inputs = list(_meta_inputs(plan.program, shape))
    if plan.view is not None:
        # Entries have the dtype of keys and values.
        entries = (plan.view.keys, plan.view.values)
        named = zip(plan.program.inputs, inputs, strict=True)
        inputs = [x.to(dtype) if decl.name in entries else x for decl, x in named]
    return q, k, v, inputs


def _meta_inputs(program: Program, shape: CallShape) -> Iterator[Tensor]:
    for decl in program.inputs:
        sizes = [dim_size(dim, program, shape) for dim in decl.dims]
        dtype = _INPUTS[decl.type] if decl.derivation is None else derived_dtype(decl)
        yield torch.empty(sizes, dtype=dtype, device="meta")


def _disassembler() -> str:
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    found = str(carried) if carried.exists() else shutil.which("nvdisasm")
    if found is None:
        raise error("A534", "there is no `nvdisasm` here to disassemble with", help="ask for `ptx`, or install CUDA")
    return found


def _disassembled(tool: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory(prefix="attndsl-") as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "--print-code", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise error("A534", f"`nvdisasm` failed: {reason}", help="ask for `ptx`")
    return done.stdout
