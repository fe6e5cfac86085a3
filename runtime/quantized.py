"""Attention of float8 tensors: on Hopper by products of float8, elsewhere of what the tensors stand for.

Numbers are e4m3, and those of a head stand for so many times as much as its scale says. The lowering for Hopper rounds
the weights of a row to float8 too, each as large as 2**8 at most; the sum that they are divided by is of them as they
were. Elsewhere q, k and v are made bfloat16 (float32 on the CPU), and attended as such. The output is bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.plan import Backend, DType, Plan, Printed, Spec, head_parts
from attndsl.program import CallShape, Program
from attndsl.runtime.counters import counter
from attndsl.runtime.engine import default_scale
from attndsl.runtime.lasting import number_tensor
from attndsl.runtime.outputs import Outputs
from attndsl.targets import layout_refusal

if TYPE_CHECKING:
    from attndsl.runtime.engine import Engine

FP8 = torch.float8_e4m3fn
VALUES = "values_in_order"
_SCALES = ("q_scale", "k_scale", "v_scale")
# What the values' memory is a multiple of, in keys: the order of 16 repeats, and rows of it begin at 16 bytes. And how
# many places a program that lays them out owns.
_PLACES, _BLOCK = 16, 128


@dataclass(frozen=True, slots=True)
class Scales:
    """What the numbers of q, k and v are multiplied by: float tensors of one number or one a head, None for 1."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None

    def each(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v

    @property
    def kind(self) -> tuple[Any, ...]:
        return tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in self.each())

    def checked(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raises `PatternError` (A580) where they do not fit, or tensors are not all of float8."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dtype is not FP8:
                raise error(
                    "A580", f"{name} is {_dtype(x)}, where others are float8_e4m3fn or have a scale",
                    help="quantise q, k and v alike, or leave the scales out",
                )  # fmt: skip
        for name, scale, x in zip(_SCALES, self.each(), (q, k, v), strict=True):
            heads = x.shape[1] if x.dim() == 4 else 0
            if scale is not None and (
                not scale.is_floating_point() or scale.shape not in ((), (1,), (heads,)) or scale.device != x.device
            ):
                raise error(
                    "A580", f"{name} is {_dtype(scale)} {list(scale.shape)} on {scale.device}, for {heads} heads on "
                    f"{x.device}", help="a scale is a float tensor of one number, or of one a head",
                )  # fmt: skip


def prepare_quantized(
    engine: Engine, q: Tensor, k: Tensor, v: Tensor, scales: Scales, inputs: Sequence[Tensor], scale: float | None,
    backend: str, aligned: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """The launch of a kind of call, as a function of q, k, v, scales, inputs, args, scale and None for dropout."""
    scales.checked(q, k, v)
    program = engine.program_of(scale)
    wide = _stand_in(q), _stand_in(k), _stand_in(v)
    spec = replace(engine.spec_of(*wide, inputs, scale), dtype=DType.FLOAT8)
    chosen = engine.choose(backend, spec, max(q.shape[2], k.shape[2]))
    reason = "it is for the GPU" if chosen == "cpu" else _why_not(program, spec, aligned, q, k, v)
    if reason and backend == "gluon":
        raise error("A510", reason, help="leave `backend` out to attend in bfloat16")
    if reason or chosen == "cpu" or backend == "triton":
        return _Widened(engine, backend, torch.float32 if chosen == "cpu" else torch.bfloat16)
    from attndsl.runtime.printing import printed_forward
    from attndsl.runtime.triton_launch import shared_cache

    printers = {Backend.GLUON: engine.generators.gluon_forward}
    (kernel,) = printed_forward(program, spec, (Backend.GLUON,), engine.tiling, printers, shared_cache())
    deriving = engine.deriving(kernel.program, *wide, inputs)
    made = _OnHopper(kernel, engine.generators.triton_values, q, k, v, scales, [*inputs, *deriving.examples])
    return deriving.forward(made)


def _why_not(program: Program, spec: Spec, aligned: bool, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why a call does not get products of float8, empty where it does."""
    from attndsl.runtime.triton_launch import why_not_gluon

    if v.stride(3) != 1:
        return "the channels of a value do not lie side by side"
    return why_not_gluon(program, spec, aligned, q, k) or layout_refusal(program, spec)


@dataclass(frozen=True, slots=True)
class _Widened:
    """Attention of what the tensors stand for, rounded to a wider dtype."""

    engine: Engine
    backend: str
    dtype: torch.dtype

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scales: Scales, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, dropout: None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = (widened(x, by).to(self.dtype) for x, by in zip((q, k, v), scales.each(), strict=True))
        out, lse = self.engine.forward(q, k, v, inputs, args, scale, self.backend)
        return out.to(torch.bfloat16), lse


def widened(x: Tensor, scale: Tensor | None) -> Tensor:
    """What a float8 tensor [B, H, N, D] stands for, in float32."""
    return x.float() if scale is None else x.float() * scale.float().view(-1, 1, 1)


class _OnHopper:
    """The forward kernel of float8 for one kind of call, and the kernel before it that lays out values."""

    def __init__(
        self, kernel: Printed, values: Callable[[int, int], str], q: Tensor, k: Tensor, v: Tensor, scales: Scales,
        inputs: Sequence[Tensor],
    ) -> None:  # fmt: skip
        from attndsl.runtime.triton_launch import FUNCTION, prepare, prepare_small, programs_at_once, together

        shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
        self._made, self._scale = Outputs.of(q, shape), default_scale(shape.dim)
        self._shape = shape_in_order(v)
        self._one, self._counted = number_tensor((1.0,), (), torch.float32, q.device), kernel.tiling.several
        grid = -(-shape.rows // kernel.tiling.block_q) * shape.batch * shape.heads
        self._launches: list[Callable[[Sequence[Any]], None]] = []
        if not grid:
            return
        if kernel.tiling.several:
            grid = min(grid, programs_at_once(q.device))
        text, target = values(shape.v_dim, _BLOCK), kernel.spec.target
        sources, of_values = quantized_parameters(kernel, q, k, v, scales, inputs)
        programs = -(-self._shape[-1] // _BLOCK) * shape.batch * shape.kv_heads
        self._launches = together([
            lambda: prepare_small(text, VALUES, target, 4, programs, of_values, q.device),
            lambda: prepare(kernel, kernel.text, FUNCTION, grid, sources, True, q.device),
        ])  # fmt: skip

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scales: Scales, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, dropout: None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = q.new_empty_strided(self._made.sizes, self._made.strides, dtype=torch.bfloat16), self._made.lse(q)
        ordered = torch.empty(self._shape, dtype=torch.uint8, device=v.device)
        numbers = [self._one if x is None else x.float() for x in scales.each()]
        scale = self._scale if scale is None else scale
        last = (counter(q.device),) if self._counted else ()
        call = (q, k, ordered, out, lse, scale, *inputs, *args, v.view(torch.uint8), *numbers, *last)
        for launch in self._launches:
            launch(call)
        return out, lse


def shape_in_order(v: Tensor) -> tuple[int, int, int, int]:
    """The sizes of v [B, Hkv, Nk, Dv] as the kernel takes it: transposed, and with a few zeros at the end."""
    batch, heads, keys, dim = v.shape
    return batch, heads, dim, -(-keys // _PLACES) * _PLACES


def quantized_parameters(
    plan: Plan | Printed, q: Tensor, k: Tensor, v: Tensor, scales: Scales, inputs: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each parameter of the forward kernel and of the one of values is given. Only shapes, strides and dtypes are
    read, of a call (q, k, values in order, out, lse, scale, *inputs, *args, v, q_scale, k_scale, v_scale, counter)."""
    from attndsl.runtime.launcher import Slot
    from attndsl.runtime.triton_launch import INPUTS, descriptor, parameter_sources

    def wide(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device="meta")

    tiling, last = plan.tiling, INPUTS + len(inputs) + len(plan.program.args)
    as_wide = replace(plan, spec=replace(plan.spec, dtype=DType.BFLOAT16))
    found = parameter_sources(as_wide, wide(q), wide(k), wide(v), inputs)
    for index, name, x, rows in ((0, "q", q, tiling.block_q // 2), (1, "k", k, tiling.block_k)):
        for part in head_parts(q.shape[3]):
            found[f"{name}_desc{part.suffix}"] = descriptor(plan.spec, index, x, rows, part.size)
    in_order = torch.empty(shape_in_order(v), dtype=FP8, device="meta")
    for part in head_parts(v.shape[3]):
        found[f"v_desc{part.suffix}"] = descriptor(plan.spec, 2, in_order, part.size, tiling.block_k)
    for n, (name, scale) in enumerate(zip(_SCALES, scales.each(), strict=True), 1):
        found[f"{name}_ptr"] = Slot(last + n, "*fp32")
        found[f"stride_{name}"] = 0 if scale is None or scale.numel() == 1 else scale.stride(0)
    found["counter_ptr"] = Slot(last + 1 + len(_SCALES), "*i32")
    of_values = {
        "v_ptr": Slot(last, "*u8"), "ordered_ptr": Slot(2, "*u8"), "heads": v.shape[1], "k_len": v.shape[2],
        "places": in_order.shape[3],
    } | {f"stride_v{axis}": v.stride(n) for n, axis in enumerate("bhn")}  # fmt: skip
    return found, of_values


def _stand_in(x: Tensor) -> Tensor:
    """A bfloat16 tensor of x's sizes and device, of one number."""
    return torch.empty((), dtype=torch.bfloat16, device=x.device).expand(x.shape)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
