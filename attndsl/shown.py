"""Kernels to look at: the plan of any one, and its text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from attndsl.chosen_entries import ranked
from attndsl.combining import CombinePlan, combine_plan
from attndsl.compose import compose, raw_first
from attndsl.copying import copied, in_order
from attndsl.decode import Cache, DecodePlan
from attndsl.decode_pieces import decode_plans
from attndsl.diagnostics import error
from attndsl.kernel_names import find_kernel
from attndsl.left_tiles import of_left_tiles
from attndsl.listing import lists_tiles, reads_plans
from attndsl.mixing import mixes
from attndsl.observing import Cells, ObservePlan, cells_of, observe_plans
from attndsl.piece_plans import backward_plans, forward_plans, whole
from attndsl.plan import Backend, BackwardPlan, ForwardPlan, Loads, Spec
from attndsl.pooling import PoolPlan, told_covers
from attndsl.program import CallShape, Program
from attndsl.properties import reads_remainders
from attndsl.select_plan import SelectPlan, select_plan
from attndsl.skipping import LeftPlan, left_plans
from attndsl.targets import (
    gradients_refusal,
    hopper_refusal,
    layout_refusal,
    make_spec,
    part_refusal,
    pieces_refusal,
)

# Plans of kernels to look at, and the names of those that attend to nothing.
ShownPlan: TypeAlias = ForwardPlan | BackwardPlan | DecodePlan | PoolPlan | SelectPlan | CombinePlan | ObservePlan
_AROUND = ("pool", "select", "combine", "combine_gradients", "observe")


@dataclass(frozen=True, slots=True)
class Shown:
    """A kernel to look at. Parameters as in `Attention.source`."""

    kernel: str
    target: str
    backend: str
    heads: int
    kv_heads: int | None
    dim: int
    v_dim: int | None
    dtype: str
    rows: int
    page: int | None

    def plan(self, program: Program) -> ShownPlan:
        """The plan behind it, for dense tensors. Raises `PatternError` for what there is not."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        spec = make_spec(self.target, self.backend, self.heads, kv_heads, self.dim, self.v_dim, self.dtype)
        owner, name, piece = find_kernel(self.kernel, program, self.heads, kv_heads)
        if name in _AROUND:
            return self._around(program, owner, name, piece, replace(spec, loads=Loads.POINTER))
        program = program if program.plain else dict(compose(program).branches)[owner]
        if name != "decode":
            # Of calls that read plans, one whose plans are lists and whose first row stands where tiles begin.
            spec = replace(spec, even_start=lists_tiles(program), lists=reads_plans(program), all_rows=mixes(program))
        if self.backend == "cpu":
            spec = replace(spec, backend=Backend.CPU)
        if self.backend == "gluon" and (moved := copied(program, spec)) is not None:
            # As calls of many tokens have it.
            program, spec = moved.program, in_order(spec)
        if self.backend == "gluon":
            refusals = {"forward": hopper_refusal, "gradients": gradients_refusal}
            spec = replace(spec, whole=name == "forward" and reads_remainders(program))
            reason = f"the kernel {self.kernel!r} has no Hopper lowering"
            if name in refusals:
                of_order = pieces_refusal if name == "forward" else layout_refusal
                reason = refusals[name](program, spec) or of_order(program, spec)
            if reason:
                raise error("A510", reason, help="choose backend 'triton'")
            spec = replace(spec, backend=Backend.GLUON)
        elif name == "gradients":
            raise error("A510", "the kernel 'gradients' is for Hopper alone", help="choose backend 'gluon', or 'dq'")
        if name in ("dq", "dkdv") and program.only.skip is not None:
            program = of_left_tiles(program)
        match name:
            case "left":
                return left_plans(program, spec)[piece]
            case "gradients":
                return backward_plans(program, spec)[piece].of_keys()
            case "decode":
                return self._decode(program, spec, piece)
            case "dq" | "dkdv":
                # Of programs in pieces, a call whose tokens fill the layers that these see.
                full = CallShape(1, spec.heads, spec.kv_heads, 0, 0, spec.dim, spec.v_dim)
                spec = replace(spec, whole=whole(program, spec, full))
                plan = backward_plans(program, spec)[piece]
                return plan.of_keys() if name == "dkdv" and spec.backend is not Backend.CPU else plan
            case _:
                forward = forward_plans(program, spec)[piece]
                if self.backend == "gluon" and forward.spec.backend is not Backend.GLUON:
                    parts = (program.with_branch(parts=(part,)) for part in program.only.parts)
                    reasons = filter(None, (part_refusal(part, spec) for part in parts))
                    out_of_order = "it visits tokens out of order, which the Hopper lowering does not"
                    raise error("A510", next(reasons, out_of_order), help="choose backend 'triton'")
                return forward

    def _decode(self, program: Program, spec: Spec, n: int) -> DecodePlan:
        """The plan of a decode kernel: of a part, or of a piece of one."""
        parts = [program.with_branch(parts=(part,)) for part in raw_first(program)]
        split = self.backend != "cpu"
        plans = [plan for part in parts for plan in decode_plans(part, spec, self.rows, Cache(self.page), split)]
        if n >= len(plans):
            reason = f"calls of {self.rows} rows, or this backend, have no kernel {self.kernel!r}"
            raise error("A531", reason, help="a pattern that scatters has several in calls of one row")
        return plans[n]

    def _around(self, program: Program, owner: str, name: str, n: int, spec: Spec) -> ShownPlan:
        """The plan of what goes before and after the kernels that attend."""
        if self.backend != "triton":
            where = "on the CPU torch operators do it" if self.backend == "cpu" else "it has no Hopper lowering"
            raise error("A510", f"there is no kernel {self.kernel!r} here: {where}", help="choose backend 'triton'")
        match name:
            case "pool":
                pool = compose(program).pooled[n]
                size, stride = (told_covers(pool), 1) if pool.told else (pool.size, pool.stride)
                return PoolPlan(pool.function, size, stride, spec.dim, spec.dtype, spec.target, told=pool.told)
            case "select":
                selection = program.selection(owner)
                return select_plan(*ranked(program, selection, (spec.heads, spec.kv_heads)), spec)
            case "observe":
                each = next(each for each in program.observations if each.name == owner)
                own = dict(compose(program).branches)[each.branch if program.output is not None else ""]
                wanted = Cells(each.rows, each.keys, each.largest)
                cells = tuple(cells_of(part.view, wanted) for part in own.only.parts)
                return observe_plans(own, spec, cells)[n]
            case _:
                return combine_plan(program, spec, name == "combine_gradients")

    def text(self, plan: ShownPlan) -> str:
        """What is generated from the plan."""
        match plan:
            case PoolPlan():
                from attndsl.codegen.triton_pool import pool_source

                return pool_source(plan)
            case SelectPlan():
                from attndsl.codegen.triton_select import select_source

                return select_source(plan)
            case ObservePlan():
                from attndsl.codegen.triton_observe import observe_source

                return observe_source(plan)
            case CombinePlan():
                from attndsl.codegen.triton_combine import combine_source

                return combine_source(plan)
        if isinstance(plan, BackwardPlan):
            from attndsl.codegen import cpu_backward, gluon_backward, triton_backward

            if self.backend == "gluon":
                return gluon_backward.gradients_source(plan)
            if self.backend == "cpu":
                return cpu_backward.backward_source(plan)
            of_keys = self.kernel.rpartition(".")[2].startswith("dkdv")
            if of_keys and plan.gathered is None:
                return triton_backward.dkdv_source(plan)
            return triton_backward.backward_sources(plan)[of_keys]
        if isinstance(plan, LeftPlan):
            from attndsl.codegen import cpu_left, triton_left

            return cpu_left.left_source(plan) if self.backend == "cpu" else triton_left.left_source(plan)
        return generated(plan)


def generated(plan: ForwardPlan | DecodePlan) -> str:
    """The text of a kernel that attends."""
    from attndsl.codegen import cpu_decode, cpu_forward, gluon_forward, triton_decode, triton_forward

    on_cpu = plan.spec.target == "cpu"
    if isinstance(plan, DecodePlan):
        return cpu_decode.decode_source(plan) if on_cpu else triton_decode.decode_source(plan)
    if on_cpu:
        return cpu_forward.forward_source(plan)
    if plan.spec.backend is Backend.GLUON:
        return gluon_forward.forward_source(plan)
    return triton_forward.forward_source(plan)


def syntax_text(program: Program) -> str:
    """The first stage of what `explain` shows: the syntax tree."""
    from rich.pretty import pretty_repr

    from attndsl.grammar import parse

    source = program.source
    return "" if source is None else pretty_repr(parse(source.text, name=source.name), max_width=100)
