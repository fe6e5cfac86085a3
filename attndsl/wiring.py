"""Joins the spokes: the printers that the runtime is given, and the text of any one kernel."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attndsl.decode import Cache, DecodePlan, decode_plan
from attndsl.diagnostics import error
from attndsl.listing import lists_tiles, reads_plans
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import Backend, BackwardPlan, ForwardPlan
from attndsl.program import Program
from attndsl.runtime.cache import cache_key
from attndsl.runtime.registry import register
from attndsl.targets import check_kernel, gradients_refusal, hopper_refusal, layout_refusal, make_spec

if TYPE_CHECKING:
    from attndsl.explain import Question
    from attndsl.runtime.decode import DecodeGenerators
    from attndsl.runtime.engine import Engine
    from attndsl.runtime.module import AttentionModule as AttentionModule
    from attndsl.runtime.page_choice import PageKernels
    from attndsl.runtime.paged_cache import PagePool as PagePool


def registered(program: Program) -> str:
    """The key under which a program, or that of a branch, is known to operators and graphs."""
    key = cache_key("program", program)
    register(key, lambda: engine(program), decode_generators)
    return key


def engine(program: Program) -> Engine:
    """A program's kernels at run time."""
    from attndsl.runtime.engine import Engine, Generators

    printers = Generators(
        triton_forward=_printer("triton_forward", "forward_source"),
        cpu_forward=_printer("cpu_forward", "forward_source"),
        triton_backward=_printer("triton_backward", "backward_sources"),
        cpu_backward=_printer("cpu_backward", "backward_source"),
        gluon_forward=_printer("gluon_forward", "forward_source"),
        gluon_backward=_printer("gluon_backward", "backward_sources"),
        triton_select=_printer("triton_select", "select_source"),
        triton_diagonals=_printer("triton_learned", "diagonals_source"),
        triton_pairs=_printer("triton_learned", "pairs_sources"),
        triton_pool=_printer("triton_pool", "pool_source"),
        triton_observe=_printer("triton_observe", "observe_source"),
        cpu_observe=_printer("cpu_observe", "observe_source"),
        triton_combine=_printer("triton_combine", "combine_source"),
        triton_keep=_printer("triton_keep", "keep_source"),
    )
    return Engine(program, printers)


def decode_generators() -> DecodeGenerators:
    """The printers of decode kernels."""
    from attndsl.runtime.decode import DecodeGenerators

    return DecodeGenerators(_printer("triton_decode", "decode_source"), _printer("cpu_decode", "decode_source"))


@functools.cache
def _printer(module: str, function: str) -> Callable[[Any], Any]:
    """A printer, imported when it first prints: where a kernel was printed before, none is."""

    def printer(plan: Any) -> Any:
        return getattr(importlib.import_module(f"attndsl.codegen.{module}"), function)(plan)

    return printer


@functools.cache
def page_kernels() -> PageKernels:
    """The kernels of pages' bounds, one for the process."""
    from attndsl.runtime.page_choice import PageKernels

    return PageKernels(_printer("triton_pages", "pages_source"))


def decode_kept() -> Any:
    """The module that makes, updates and reads what decode keeps of caches."""
    from attndsl.runtime import compose_decode

    return compose_decode


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

    def plan(self, program: Program) -> ForwardPlan | BackwardPlan | DecodePlan:
        """The plan behind it, for dense tensors. Raises `PatternError` for what there is not."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        spec = make_spec(self.target, self.backend, self.heads, kv_heads, self.dim, self.v_dim, self.dtype)
        # Of calls that read plans, one whose plans are lists and whose first row stands where tiles begin.
        spec = replace(spec, even_start=lists_tiles(program), lists=reads_plans(program))
        if self.backend == "cpu":
            spec = replace(spec, backend=Backend.CPU)
        name, piece = check_kernel(self.kernel, program, self.heads, kv_heads)
        if self.backend == "gluon":
            refusals = {"forward": hopper_refusal, "gradients": gradients_refusal}
            reason = f"the kernel {self.kernel!r} has no Hopper lowering"
            if name in refusals:
                reason = refusals[name](program, spec) or layout_refusal(program, spec)
            if reason:
                raise error("A510", reason, help="choose backend 'triton'")
            spec = replace(spec, backend=Backend.GLUON)
        elif name == "gradients":
            raise error("A510", "the kernel 'gradients' is for Hopper alone", help="choose backend 'gluon', or 'dq'")
        match name:
            case "gradients":
                return backward_plans(program, spec)[piece].of_keys()
            case "decode":
                return decode_plan(program, spec, self.rows, Cache(self.page), split=self.backend != "cpu")
            case "dq" | "dkdv":
                plan = backward_plans(program, spec)[piece]
                return plan.of_keys() if name == "dkdv" and spec.backend is not Backend.CPU else plan
            case _:
                return forward_plans(program, spec)[piece]

    def text(self, plan: ForwardPlan | BackwardPlan | DecodePlan) -> str:
        """What is generated from the plan."""
        if isinstance(plan, BackwardPlan):
            from attndsl.codegen import cpu_backward, gluon_backward, triton_backward

            if self.backend == "gluon":
                return gluon_backward.gradients_source(plan)
            if self.backend == "cpu":
                return cpu_backward.backward_source(plan)
            return triton_backward.backward_sources(plan)[0 if self.kernel.startswith("dq") else 1]
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


def ends(question: Question) -> tuple[str, str]:
    """The first and the last stage of what `explain` shows: the syntax tree, and the generated source."""
    from rich.pretty import pretty_repr

    from attndsl.grammar import parse

    source = question.program.source
    syntax = "" if source is None else pretty_repr(parse(source.text, name=source.name), max_width=100)
    return syntax, "\n".join(map(generated, forward_plans(question.program, question.spec)))


def page_pool() -> type[PagePool]:
    """The class behind `attndsl.serving.PagedCache`. Imports torch."""
    from attndsl.runtime.paged_cache import PagePool

    return PagePool


def attention_module() -> type[AttentionModule]:
    """The class behind `attndsl.nn.Attention`. Imports torch."""
    from attndsl.runtime.module import AttentionModule

    return AttentionModule
