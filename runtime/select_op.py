"""The torch operator of selections: how making plans takes part in torch.compile, export and CUDA graphs.

A plan has no gradient: that of an attention holds what was chosen constant. To the operators that attend it is an
input like any other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.diagnostics import error
from attndsl.plans import own_program, plan_heads, plan_input, plans_read
from attndsl.program import CallShape, InputDecl, Program
from attndsl.runtime.call import call_shape, check_inputs, check_tables, device_target
from attndsl.runtime.ops import checked_values, traced
from attndsl.runtime.plans import listed_members
from attndsl.runtime.registry import engine_of
from attndsl.runtime.select import Selector, empty_plan
from attndsl.select_plan import fuses_on
from attndsl.selection import Selection, Share

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "select(str program, str selection, Tensor q, Tensor k, Tensor[] inputs, SymInt[] args, float? scale) -> Tensor"
)
# Kinds of calls whose selectors are kept.
MAX_KEPT = 256
_KEPT: dict[Any, Selector] = {}


def plans_of(
    key: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    given: Mapping[str, Tensor], wanted: Sequence[str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The plans of a program's selections by name, [B, H', R, C or M]: those `given`, and those made.

    wanted: which (default: all). Raises `PatternError` where a given plan fits no selection of the program.
    """
    program = engine_of(key).program
    checked_values(key, inputs, args)
    names = [selection.name for selection in program.selections]
    for name in given:
        if name not in names:
            known = f"it has {', '.join(names)}" if names else "it has none"
            raise error("A572", f"`{name}` is not a selection of this attention: {known}", program.span)
    make = torch.ops.attndsl.select if traced((q, k, *inputs)) else _select
    q, k, inputs = q.detach(), k.detach(), [x.detach() for x in inputs]
    found: dict[str, Tensor] = {}
    pending = set(names if wanted is None else wanted)
    for selection in reversed(program.selections):
        if selection.name in pending and selection.name not in given:
            pending |= plans_read(selection, program)
    for selection in program.selections:
        name = selection.name
        if name not in pending:
            continue
        if name in given:
            found[name] = _checked(program, selection, call_shape(q, k, k), given[name], q.device)
        else:
            read = [_as_input(found[x], plan_input(program.selection(x))) for x in _reads(selection, program)]
            found[name] = make(key, name, q, k, [*inputs, *read], args, scale)
    return found


def with_plans(
    key: str, q: Tensor, k: Tensor, inputs: list[Tensor], args: list[int], scale: float | None,
    given: Mapping[str, Tensor],
) -> list[Tensor]:  # fmt: skip
    """The inputs of a program, its plans among them: those of a call, then the plans that it attends to."""
    program = engine_of(key).program
    wanted = program.inputs[len(inputs) :]
    found = plans_of(key, q, k, inputs, args, scale, given, [decl.name for decl in wanted])
    return [*inputs, *(_as_input(found[decl.name], decl) for decl in wanted)]


def with_given_plans(
    program: Program, shape: CallShape, inputs: list[Tensor], given: Mapping[str, Tensor], device: torch.device
) -> list[Tensor]:
    """The inputs of a decode, its plans among them, all of which are `given`. The shape's `k_len` is the capacity.

    Raises `PatternError` where one is missing, or fits no selection of the program.
    """
    names = [selection.name for selection in program.selections]
    for name in given:
        if name not in names:
            known = f"it has {', '.join(names)}" if names else "it has none"
            raise error("A572", f"`{name}` is not a selection of this attention: {known}", program.span)
    found = list(inputs)
    for decl in program.inputs[len(inputs) :]:
        if decl.name not in given:
            raise error(
                "A561", f"decode takes what `{decl.name}` chooses as a plan", decl.span,
                help=f"pass plans={{'{decl.name}': …}}; a `PagedCache` with bounds makes those of Quest",
            )  # fmt: skip
        selection = program.selection(decl.name)
        found.append(_as_input(_checked(program, selection, shape, given[decl.name], device), decl))
    return found


def _as_input(plan: Tensor, decl: InputDecl) -> Tensor:
    """A plan [B, H', R, C] as the input that it is: without the dimensions that it has for nothing."""
    axes = [dim.axis.value for dim in decl.dims]
    if "q" not in axes:
        plan = plan.squeeze(2)
    return plan if "h" in axes or "g" in axes else plan.squeeze(1)


def _checked(program: Program, selection: Selection, shape: CallShape, plan: object, device: torch.device) -> Tensor:
    """A plan that a call gives. Raises `PatternError` for a wrong form, and in debug mode for wrong entries."""
    members, forms = -(-shape.k_len // selection.keys), (torch.int32, torch.int64, torch.uint8)
    heads = {Share.NONE: shape.heads, Share.GROUP: shape.kv_heads, Share.HEADS: 1}[plan_heads(selection)]
    wanted = [shape.batch, heads, empty_plan(own_program(program), selection, shape, torch.device("meta")).shape[2]]
    fits = False
    if isinstance(plan, Tensor) and plan.dim() == 4 and plan.dtype in forms and plan.device == device:
        last = members if plan.dtype == torch.uint8 else plan.shape[3]
        fits = plan.shape[3] == last and all(n in (1, m) for n, m in zip(plan.shape, wanted, strict=False))
    if not isinstance(plan, Tensor) or not fits:
        said = f"{list(plan.shape)} {plan.dtype} on {plan.device}" if isinstance(plan, Tensor) else repr(plan)[:40]
        raise error(
            "A573", f"`{selection.name}` is no plan of this call: {said}", selection.span,
            help=f"int32 [{', '.join(map(str, wanted))}, C], or uint8 with {members} entries last, on {device}",
        )  # fmt: skip
    if os.environ.get("ATTNDSL_DEBUG") and plan.dtype != torch.uint8:
        empty = (plan == -1).to(torch.int8)
        if not bool((listed_members(plan, members) | (plan == -1)).all()) or bool((empty.diff() < 0).any()):
            raise error(
                "A574", f"`{selection.name}` lists what are no members, or not in increasing order", selection.span,
                help=f"members lie in [0, {members}), each above the one before, and -1 stands after the last",
            )  # fmt: skip
    return plan


def _reads(selection: Selection, program: Program) -> list[str]:
    """The selections that one chooses among, in the order of the program."""
    found = plans_read(selection, program)
    return [each.name for each in program.selections if each.name in found]


def _of_selection(program: Program, selection: Selection) -> Program:
    """The program as a selection sees it: with the inputs of a call, and the plans that it chooses among."""
    own = own_program(program)
    read = tuple(plan_input(program.selection(name)) for name in _reads(selection, program))
    return replace(own, inputs=(*own.inputs, *read))


def _select(
    key: str, name: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
) -> Tensor:
    if q.dim() and q.stride(-1) != 1:
        q = q.contiguous()
    kind = (
        key,
        name,
        q.shape,
        q.stride(),
        k.shape,
        q.dtype,
        k.dtype,
        q.device,
        k.device,
        *((x.shape, x.dtype) for x in inputs),
    )
    selector = _KEPT.get(kind)
    if selector is None:
        program = engine_of(key).program
        selection, shape = program.selection(name), call_shape(q, k, k)
        seen = _of_selection(program, selection)
        check_tables(seen, shape)
        check_inputs(seen, shape, inputs, q.device)
        if len(_KEPT) >= MAX_KEPT:
            _KEPT.clear()
        given = [torch.empty_like(x, device="meta") for x in inputs]
        fuses = q.is_cuda and q.dtype != torch.float64 and fuses_on(device_target(q.device))
        printer = engine_of(key).generators.triton_select if fuses else None
        selector = _KEPT[kind] = Selector(seen, selection, shape, q.device, given, printer)
    with torch.no_grad():
        return selector(q, k, inputs, args, scale)


def _select_fake(
    key: str, name: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
) -> Tensor:
    program = engine_of(key).program
    return empty_plan(own_program(program), program.selection(name), call_shape(q, k, k), q.device)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("select", _select, _device)
_LIBRARY.impl("select", _select_fake, "Meta")
