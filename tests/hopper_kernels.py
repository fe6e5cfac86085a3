"""The kernels that the parts of a program have for Hopper in a call of 16,384 tokens, and which parts have none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import attndsl
from attndsl.codegen.gluon_backward import gradients_source
from attndsl.codegen.gluon_forward import forward_source
from attndsl.listing import lists_tiles, reads_plans
from attndsl.lowerings import forward_lowering, gradients_lowering
from attndsl.mapping import maps_call
from attndsl.parts import parts_of
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import Backend, BackwardPlan, ForwardPlan, Spec
from attndsl.program import CallShape, Program
from attndsl.properties import is_whole
from attndsl.runtime.assembly import offline_source
from attndsl.runtime.build import KernelSource
from attndsl.targets import gradients_refusal, hopper_refusal, layout_refusal, make_spec, pieces_refusal

HEADS, KV_HEADS, TOKENS = 8, 2, 16384


@dataclass(frozen=True)
class Lowered:
    """A kernel for Hopper: which one of which part, and how it is compiled."""

    name: str
    source: KernelSource


@dataclass(frozen=True)
class Portable:
    """A part, or a piece of one, that has none; `reason` as `explain` says it."""

    name: str
    reason: str


def hopper_kernels(text: str, dim: int = 128, v_dim: int | None = None, **params: Any) -> Iterator[Lowered | Portable]:
    """The forward kernels and those of gradients of a program's parts."""
    for part, program in parts_of(attndsl.compile(text, **params).program).items():
        shape = CallShape(1, HEADS, KV_HEADS, TOKENS, TOKENS, dim, v_dim or dim)
        spec = replace(
            make_spec("sm_90", "triton", HEADS, KV_HEADS, dim, v_dim), even_start=lists_tiles(program),
            lists=reads_plans(program), whole=is_whole(program, shape), maps=maps_call(program, shape),
        )  # fmt: skip
        yield from _forward(part, program, spec, shape)
        yield from _gradients(part, program, spec, shape)


def _forward(part: str, program: Program, spec: Spec, shape: CallShape) -> Iterator[Lowered | Portable]:
    name = f"{part}.forward".lstrip(".")
    if hopper_refusal(program, spec) or pieces_refusal(program, spec):
        yield Portable(name, forward_lowering(program, spec, shape))
        return
    for n, plan in enumerate(forward_plans(program, replace(spec, backend=Backend.GLUON)), 1):
        own = name if n == 1 else f"{name}_{n}"
        if plan.spec.backend is Backend.GLUON:
            yield _lowered(own, plan, forward_source(plan))
        else:
            yield Portable(own, f"portable Triton: {plan.layout}")


def _gradients(part: str, program: Program, spec: Spec, shape: CallShape) -> Iterator[Lowered | Portable]:
    name = f"{part}.gradients".lstrip(".")
    if gradients_refusal(program, spec) or layout_refusal(program, spec):
        yield Portable(name, gradients_lowering(program, spec, shape))
        return
    for plan in backward_plans(program, replace(spec, backend=Backend.GLUON)):
        yield _lowered(name, plan.of_keys(), gradients_source(plan.of_keys()))


def _lowered(name: str, plan: ForwardPlan | BackwardPlan, text: str) -> Lowered:
    """Without its comments, which quote the program: kernels of several programs are one."""
    lines = (line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#"))
    return Lowered(name, offline_source(plan, "".join(lines)))
