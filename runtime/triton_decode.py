"""Launching generated decode kernels: what depends only on the kind of a call is settled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from attndsl.decode import DecodePlan, column_count, decode_plan, split_count
from attndsl.decode_pieces import decode_pieces, piece_plan
from attndsl.plan import Spec, Tiling
from attndsl.program import CallShape, Program
from attndsl.runtime.decode import FP8, DecodeTensors, Listed, dense_strides
from attndsl.runtime.derive_ragged import ragged_deriver
from attndsl.runtime.engine import default_scale
from attndsl.runtime.launcher import Slot
from attndsl.runtime.outputs import empty_output
from attndsl.runtime.plans import as_four
from attndsl.runtime.triton_launch import ELEMENT, INPUTS, POINTER, prepare, program_sources

DECODE = "attention_decode"
MERGE = "merge_slices"
CHECK = "check_members"
# A row's slices lie in the registers of one warp, whose threads need not wait for each other.
_MERGE_WARPS = 1
# Where no device is asked: the interpreter.
_MULTIPROCESSORS = 4


def prepare_decode(
    programs: Sequence[Program],
    spec: Spec,
    call: DecodeTensors,
    inputs: Sequence[Tensor],
    generate: Callable[[DecodePlan], str],
    tiling: Tiling | None = None,
    splits: int | None = None,
    columns: int = 1,
) -> TritonDecode:
    """The launch of a kind of call of one softmax, whose parts are `programs`. tiling, splits, columns: in place of
    those that are chosen."""
    shape, plans, slices, heads = call.shape, list[DecodePlan](), list[int](), (spec.heads, spec.kv_heads)
    pieces = [() if columns > 1 else decode_pieces(program, heads, shape.rows) for program in programs]
    joined = sum(max(1, len(of_program)) for of_program in pieces) > 1

    def add(plan: DecodePlan, whole: Program | None = None) -> None:
        """A kernel whose slices are merged. whole: of this program, which programs may share by columns."""
        number, shared = splits, columns
        if number is None:
            entries = 0 if (listed := Listed.of(plan)) is None else inputs[listed.input].shape[-1]
            sizes = (shape.batch, shape.rows, shape.k_len, _multiprocessors(call.q.device), entries)
            number = split_count(plan, *sizes)
            shared = 1 if joined or number == 1 else column_count(plan, *sizes)
        if not joined and (number == 1 or shared > 1):
            number, plan = 1, replace(plan, split=False)
            if whole is not None:
                plan = decode_plan(whole, spec, shape.rows, plan.cache, False, tiling, shared)
        # What is merged is a slice, one that goes over all keys too.
        plans.append(replace(plan, joined=joined, split=plan.split or joined))
        slices.append(number)

    for program, of_program in zip(programs, pieces, strict=True):
        cache = call.of_part(program, inputs).cache
        for n in range(len(of_program)):
            add(piece_plan(program, spec, shape.rows, cache, n, tiling))
        if not of_program:
            add(decode_plan(program, spec, shape.rows, cache, True, tiling), program)
    return TritonDecode(plans, [generate(plan) for plan in plans], slices, call, inputs)


class TritonDecode:
    """The decode kernels of the parts of one softmax for one kind of call, and where they are split the launch that
    merges the slices of all."""

    def __init__(
        self, plans: Sequence[DecodePlan], texts: Sequence[str], slices: Sequence[int], call: DecodeTensors,
        inputs: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.shape, self.slices = call.shape, sum(slices)
        self._parts: list[tuple[int, _Part]] = []
        self._merge = None
        rows = self.shape.batch * self.shape.heads * self.shape.rows
        if not rows:
            return
        for i, (plan, text, splits) in enumerate(zip(plans, texts, slices, strict=True)):
            self._parts.append((sum(slices[:i]), _Part(plan, text, splits, self.slices, call, inputs)))
        if plans[0].split:
            alone = replace(plans[0], tiling=replace(plans[0].tiling, warps=_MERGE_WARPS))
            self._merge = prepare(alone, texts[0], MERGE, rows, self._merged(alone, call), True, call.q.device)

    def _merged(self, plan: DecodePlan, call: DecodeTensors) -> dict[str, Any]:
        """What each parameter of the merge is given."""
        out, _ = empty_output(call.q, self.shape)
        found: dict[str, Any] = {f"stride_out{axis}": out.stride(i) for i, axis in enumerate("bhn")}
        return found | {
            "part_ptr": Slot(0, "*fp32"), "part_lse_ptr": Slot(1, "*fp32"),
            "out_ptr": Slot(2, f"*{ELEMENT[plan.spec.dtype]}"), "lse_ptr": Slot(3, "*fp32"), "rows": self.shape.rows,
            "splits": self.slices,
        }  # fmt: skip

    def __call__(
        self, call: DecodeTensors, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = empty_output(call.q, self.shape)
        part = part_lse = None
        if self._merge is not None:
            part = torch.empty((lse.numel(), self.slices, self.shape.v_dim), dtype=torch.float32, device=lse.device)
            part_lse = torch.empty((lse.numel(), self.slices), dtype=torch.float32, device=lse.device)
        for first, kernel in self._parts:
            # A part's slices lie after those of the parts before it.
            own = (part, part_lse) if part is None or part_lse is None else (part[:, first:], part_lse[:, first:])
            kernel(call, inputs, args, scale, out, lse, *own)
        if self._merge is not None:
            self._merge((part, part_lse, out, lse))
        return out, lse


class _Part:
    """The kernel of a pattern over tokens, or over the entries of a view, for one kind of call."""

    def __init__(
        self, plan: DecodePlan, text: str, splits: int, slices: int, call: DecodeTensors, inputs: Sequence[Tensor]
    ) -> None:
        shape, device = call.shape, call.q.device
        self.plan, self.listed = plan, Listed.of(plan)
        self.deriver = ragged_deriver(plan.program, shape, device, inputs)
        call = call.of_part(plan.program, inputs)
        inputs = [*inputs, *(self.deriver.examples() if self.deriver else ())]
        self.default_scale = default_scale(shape.dim)
        self.fp8 = plan.cache.fp8
        self._check = None
        self._lists: Sequence[int] = ()
        aligned = (call.q.data_ptr() | call.k.data_ptr() | call.v.data_ptr()) % 16 == 0
        sources = {**decode_sources(plan, splits, call, inputs), "slices": slices}
        grid = plan.units(shape.batch, shape.rows) * plan.columns * splits
        if self.listed is not None and inputs[self.listed.input].dtype != torch.uint8:
            self._lists = as_four(inputs[self.listed.input], self.listed.dims).shape
            self._check = prepare(plan, text, CHECK, prod(self._lists[:3]), sources, False, device)
        self._decode = prepare(plan, text, DECODE, grid, sources, aligned, device)

    def __call__(
        self, call: DecodeTensors, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, out: Tensor,
        lse: Tensor, part: Tensor | None, part_lse: Tensor | None,
    ) -> None:  # fmt: skip
        call = call.of_part(self.plan.program, inputs)
        if self.deriver is not None:
            inputs = [*inputs, *self.deriver.of(inputs, args, call.seq_lens)]
        listed = None
        if self._check is not None:
            listed = torch.empty(self._lists, dtype=torch.int32, device=lse.device)
        elif self.listed is not None:
            listed = self.listed.checked(inputs, call.capacity)
        k, v = (call.k.view(torch.uint8), call.v.view(torch.uint8)) if self.fp8 else (call.k, call.v)
        values = (
            call.q, k, v, out, lse, self.default_scale if scale is None else scale, *inputs, *args, call.seq_lens,
            call.page_table, call.k_scale, call.v_scale, part, part_lse, listed,
        )  # fmt: skip
        if self._check is not None:
            self._check(values)
        self._decode(values)


def decode_sources(plan: DecodePlan, splits: int, call: DecodeTensors, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
    """What each parameter that the kernels may have is given. Only shapes, strides and dtypes are read."""
    shape: CallShape = call.shape
    element = f"*{ELEMENT[plan.spec.dtype]}"
    kept = "*u8" if call.k.dtype == FP8 else element
    first = INPUTS + len(inputs) + len(plan.program.args)
    found: dict[str, Any] = {
        "q_ptr": Slot(0, element), "k_ptr": Slot(1, kept), "v_ptr": Slot(2, kept), "out_ptr": Slot(3, element),
        "lse_ptr": Slot(4, "*fp32"), "scale": Slot(5, "fp32"), "seq_lens_ptr": Slot(first, "*i32"),
        "page_table_ptr": Slot(first + 1, "*i32"), "part_ptr": Slot(first + 4, "*fp32"),
        "part_lse_ptr": Slot(first + 5, "*fp32"), "rows": shape.rows, "capacity": call.capacity,
        "pages": call.k.shape[0], "splits": splits, "stride_lens": call.seq_lens.stride(0),
        "stride_table": 0 if call.page_table is None else call.page_table.stride(0),
    }  # fmt: skip
    for i, (name, x) in enumerate((("k_scale", call.k_scale), ("v_scale", call.v_scale))):
        if x is not None:
            found[f"{name}_ptr"] = Slot(first + 2 + i, POINTER[x.dtype])
            found[f"stride_{name}"] = x.stride(0) if x.numel() > 1 else 0
    if (listed := Listed.of(plan)) is not None:
        given = as_four(inputs[listed.input], listed.dims)
        _, heads, rows, entries = given.shape
        found |= {
            "plan_ptr": Slot(INPUTS + listed.input, POINTER[given.dtype]), "list_ptr": Slot(first + 6, "*i32"),
            "list_size": entries, "plan_heads": heads, "plan_rows": rows,
            "members": -(-call.capacity // listed.listing.keys),
        }  # fmt: skip
        found |= {f"stride_plan{axis}": stride for axis, stride in zip("bhrc", given.stride(), strict=True)}
        found |= {f"stride_list{axis}": x for axis, x in zip("bhr", dense_strides(given.shape), strict=True)}
    out, _ = empty_output(call.q, shape)
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v), ("out", out)):
        found |= {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}
    return found | program_sources(plan, shape, inputs, call.q.device)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


__all__ = ["DECODE", "MERGE", "TritonDecode", "decode_sources", "prepare_decode"]
