"""Joins the spokes: the reader of texts, and the printers that the runtime is given.

What a start from the cache does without (the front end, integer sets, printers) is imported where it is first used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attndsl.diagnostics import Diagnostic, Source
from attndsl.left_tiles import of_left_tiles
from attndsl.program import Program
from attndsl.runtime import texts
from attndsl.runtime.cache import cache_key
from attndsl.runtime.registry import register, register_left

if TYPE_CHECKING:
    from attndsl.runtime.cache import KernelCache
    from attndsl.runtime.decode import DecodeGenerators
    from attndsl.runtime.engine import Engine
    from attndsl.runtime.module import AttentionModule as AttentionModule
    from attndsl.runtime.page_choice import PageKernels
    from attndsl.runtime.paged_cache import PagePool as PagePool
    from attndsl.runtime.trial import Trial


def read_program(
    source: Source, select: str | None, params: Mapping[str, object]
) -> tuple[Program, tuple[Diagnostic, ...], Callable[[], None] | None]:
    """The program of a text, what it warns of, and where both were not found in the cache what keeps them there."""
    if (found := texts.find(source, select, params)) is not None:
        return *found, None
    from attndsl.grammar import load

    program = (loaded := load(source.text, name=source.name, select=select, params=params)).program
    warnings = (*loaded.warnings, *asked_warnings(program))
    return program, warnings, lambda: texts.keep(source, select, params, (program, warnings))


def asked_warnings(program: Program) -> Iterator[Diagnostic]:
    """What integer sets tell of a program."""
    if program.plain:
        from attndsl.findings import findings

        yield from findings(program)
    else:
        from attndsl.part_findings import part_findings

        yield from part_findings(program)
    if program.selections:
        from attndsl.stability import unstable

        yield from unstable(program)


def registered(program: Program, keep_text: Callable[[], None] | None = None) -> str:
    """The key under which a program, or that of a branch, is known to operators and graphs."""
    key = cache_key("program", program)
    register(key, lambda: engine(program, keep_text), decode_generators)
    if program.output is None and program.only.skip is not None:
        register(f"{key}:left", lambda: engine(of_left_tiles(program)), decode_generators)
        register_left(key, f"{key}:left", program.packed is not None)
    return key


def engine(program: Program, keep_text: Callable[[], None] | None = None) -> Engine:
    """A program's kernels at run time. keep_text: see there."""
    from attndsl.runtime.engine import Engine, Generators

    printers = Generators(
        triton_forward=_printer("triton_forward", "forward_source"),
        cpu_forward=_printer("cpu_forward", "forward_source"),
        triton_backward=_printer("triton_backward", "backward_sources"),
        cpu_backward=_printer("cpu_backward", "backward_source"),
        gluon_forward=_printer("gluon_forward", "forward_source"),
        gluon_backward=_printer("gluon_backward", "backward_sources"),
        triton_select=_printer("triton_select", "select_source"),
        triton_rank=_printer("triton_rank", "rank_source"),
        triton_diagonals=_printer("triton_learned", "diagonals_source"),
        triton_pairs=_printer("triton_learned", "pairs_sources"),
        triton_pool=_printer("triton_pool", "pool_source"),
        triton_left=_printer("triton_left", "left_source"),
        cpu_left=_printer("cpu_left", "left_source"),
        triton_observe=_printer("triton_observe", "observe_source"),
        cpu_observe=_printer("cpu_observe", "observe_source"),
        triton_combine=_printer("triton_combine", "combine_source"),
        triton_keep=_printer("triton_keep", "keep_source"),
        triton_values=_printer("triton_values", "values_source"),
        triton_move=_printer("triton_move", "move_source"),
    )
    return Engine(program, printers, keep_text=keep_text)


def decode_generators() -> DecodeGenerators:
    """The printers of decode kernels."""
    from attndsl.runtime.decode import DecodeGenerators

    return DecodeGenerators(_printer("triton_decode", "decode_source"), _printer("cpu_decode", "decode_source"))


@functools.cache
def _printer(module: str, function: str) -> Callable[..., Any]:
    """A printer, imported when it first prints: where a kernel was printed before, none is."""

    def printer(*asked: Any) -> Any:
        return getattr(importlib.import_module(f"attndsl.codegen.{module}"), function)(*asked)

    return printer


@functools.cache
def page_kernels() -> PageKernels:
    """The kernels of pages' bounds, one for the process."""
    from attndsl.runtime.page_choice import PageKernels

    return PageKernels(_printer("triton_pages", "pages_source"))


def token_inputs(*given: Any) -> Any:
    """What inputs hold at the tokens of a cache."""
    from attndsl.runtime.token_inputs import TokenInputs

    return TokenInputs(*given)


def decode_kept() -> Any:
    """The module that makes, updates and reads what decode keeps of caches."""
    from attndsl.runtime import compose_decode

    return compose_decode


def page_pool() -> type[PagePool]:
    """The class behind `attndsl.serving.PagedCache`. Imports torch."""
    from attndsl.runtime.paged_cache import PagePool

    return PagePool


def attention_module() -> type[AttentionModule]:
    """The class behind `attndsl.nn.Attention`. Imports torch."""
    from attndsl.runtime.module import AttentionModule

    return AttentionModule


# ------------------------------------------------------------------------------- for the command line


def format_source(text: str, name: str) -> str:
    """A text in canonical layout."""
    from attndsl import grammar

    return grammar.format_source(text, name)


def measure(attn: Any, **options: Any) -> Trial:
    """Runs an attention on random tensors of this machine: see `attndsl.runtime.trial.Options`."""
    from attndsl.runtime.trial import Options, trial

    return trial(attn, attn.program, Options(**options))


def kernel_cache() -> KernelCache:
    """The cache of compiled kernels that calls use."""
    from attndsl.runtime.cache import KernelCache

    return KernelCache()
