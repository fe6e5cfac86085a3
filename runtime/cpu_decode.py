"""Running the CPU lowering of decode, one sequence after another."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attndsl.decode import DecodePlan, decode_plan
from attndsl.plan import Spec, Tiling
from attndsl.program import Axis, InputDecl, Program
from attndsl.runtime.combine import merged
from attndsl.runtime.cpu import cpu_function
from attndsl.runtime.decode import DecodeTensors, Listed
from attndsl.runtime.derive_ragged import ragged_deriver
from attndsl.runtime.engine import default_scale
from attndsl.runtime.lasting import table_tensor
from attndsl.runtime.outputs import empty_output


def prepare_decode(
    programs: Sequence[Program], spec: Spec, call: DecodeTensors, inputs: Sequence[Tensor],
    generate: Callable[[DecodePlan], str], tiling: Tiling | None = None,
) -> Parts:  # fmt: skip
    """What decodes a kind of call of one softmax, whose parts are `programs`."""
    found = []
    for program in programs:
        cache = call.of_part(program, inputs).cache
        plan = decode_plan(program, spec, call.shape.rows, cache, split=False, tiling=tiling)
        found.append(CpuDecode(plan, generate(plan)))
    return Parts(tuple(found))


@dataclass(frozen=True, slots=True)
class Parts:
    """The decode functions of the parts of one softmax, or of one weighted sum."""

    parts: tuple[CpuDecode, ...]

    def __call__(
        self, call: DecodeTensors, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
    ) -> tuple[Tensor, Tensor]:
        if len(self.parts) == 1:
            return self.parts[0](call, inputs, args, scale)
        states = [part(call, inputs, args, scale, wide=True) for part in self.parts]
        if self.parts[0].plan.softmax:
            out, lse = merged([(out, lse) for out, lse in states])
            assert lse is not None, "each part has one"
            return out.to(call.q.dtype), lse
        return functools.reduce(torch.add, [out for out, _ in states]).to(call.q.dtype), states[0][1]


@dataclass(slots=True)
class CpuDecode:
    """A generated decode function, with what it takes besides the call's tensors."""

    plan: DecodePlan
    source: str
    listed: Listed | None = field(init=False)
    _function: Any = field(init=False)
    _tables: dict[str, Tensor] = field(init=False)
    _read: tuple[tuple[int, InputDecl], ...] = field(init=False)
    _args: tuple[tuple[int, str], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.listed = Listed.of(self.plan)
        self._function = cpu_function(self.source, "cpu_decode", "attention_decode")
        self._tables = {f"{t.name}_table": table_tensor(t, torch.device("cpu")) for t in self.plan.tables}
        read, args = set(self.plan.inputs), set(self.plan.args)
        self._read = tuple((i, decl) for i, decl in enumerate(self.plan.program.inputs) if decl in read)
        self._args = tuple((i, name) for i, name in enumerate(self.plan.program.args) if name in args)

    def __call__(
        self, call: DecodeTensors, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Output and lse; `wide`: the output as it is before it is rounded to q's dtype."""
        shape, call = call.shape, call.of_part(self.plan.program, inputs)
        out, lse = empty_output(call.q, shape)
        lse.fill_(-math.inf)
        high = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        if wide:
            out = out.to(high)
        grouped = (shape.kv_heads, shape.heads // shape.kv_heads)
        q, result, sums = call.q.unflatten(1, grouped), out.unflatten(1, grouped), lse.unflatten(1, grouped)
        if call.k_scale is not None:
            q = q.to(high) * call.k_scale.to(high).view(-1, 1, 1, 1)
        if call.v_scale is not None:
            result = torch.empty_like(result, dtype=high)
        # A contiguous cache is one of a page a sequence.
        table = call.page_table
        if table is None:
            table = torch.arange(shape.batch, device=call.q.device)[:, None]
        lengths = call.seq_lens.clamp(0, call.capacity).tolist()
        if (deriver := ragged_deriver(self.plan.program, shape, call.q.device, inputs)) is not None:
            inputs = [*inputs, *deriver.of(inputs, args, call.seq_lens)]
        plan = None if self.listed is None else self.listed.checked(inputs, call.capacity)
        numbers = {f"arg_{name}": args[i] for i, name in self._args}
        for b, k_len in enumerate(lengths):
            at = slice(b, b + 1)
            given = {f"{decl.name}_input": _of_length(decl, inputs[i], k_len) for i, decl in self._read}
            if self.plan.votes is not None and self.plan.cache.k_scaled:
                given["own_q"] = call.q[at].unflatten(1, grouped)
            if plan is not None:
                given["chosen"] = self._chosen(plan, b, k_len, grouped)
            self._function(
                b, q[at], call.k, call.v, table[b], k_len, result[at], sums[at],
                default_scale(shape.dim) if scale is None else scale,
                **given, **numbers, **self._tables,
            )  # fmt: skip
        if call.v_scale is not None:
            out.copy_((result * call.v_scale.to(high).view(-1, 1, 1, 1)).flatten(1, 2))
        return out, lse

    def _chosen(self, plan: Tensor, b: int, k_len: int, grouped: tuple[int, int]) -> Tensor:
        """Which members of a sequence's plan [B, H', R, C] are chosen: bool [1, kv_heads, group, R, members]."""
        assert self.listed is not None
        plan = plan[min(b, len(plan) - 1)]
        members = -(-k_len // self.listed.listing.keys)
        found = torch.zeros(*plan.shape[:2], members + 1, dtype=torch.bool, device=plan.device)
        # What is no member of this sequence falls beside.
        found.scatter_(-1, torch.where((plan < 0) | (plan >= members), members, plan).long(), True)
        heads = {1: (1, 1), grouped[0]: (grouped[0], 1)}.get(len(plan), grouped)
        chosen: Tensor = found[None, ..., :-1].unflatten(1, heads)
        return chosen


def _of_length(decl: InputDecl, x: Tensor, k_len: int) -> Tensor:
    """The part of an input that a sequence of a length has; what is broadcast stays."""
    for axis, dim in enumerate(decl.dims):
        positions = dim.axis is Axis.K or (dim.axis is Axis.Q and dim.block > 1)
        if positions and x.shape[axis] > 1:
            own = k_len if dim.apart else -(-k_len // dim.block) * max(1, dim.size)
            x = x.narrow(axis, 0, max(own, 1))
    return x
