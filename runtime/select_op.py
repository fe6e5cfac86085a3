"""The torch operator of selections: how making plans takes part in torch.compile, export and CUDA graphs.

A plan has no gradient: that of an attention holds what was chosen constant. To the operators that attend it is an
input like any other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import Library

from attndsl.chosen_entries import ranked
from attndsl.diagnostics import error
from attndsl.keeping import KEYS, kept_by
from attndsl.plans import of_selection, own_program, plan_heads, plan_input, plans_read
from attndsl.program import CallShape, InputDecl, Program
from attndsl.properties import classes_rows_before
from attndsl.runtime.call import (
    broadcasts,
    call_shape,
    check_inputs,
    check_rows,
    check_tables,
    of_values,
    without_values,
)
from attndsl.runtime.decode import DecodeTensors
from attndsl.runtime.document_select import DocumentSelector
from attndsl.runtime.ops import traced
from attndsl.runtime.plans import listed_members
from attndsl.runtime.registry import engine_of
from attndsl.runtime.select import Selector, checked_masses, empty_plan, members_of
from attndsl.runtime.select_entries import EntrySelector
from attndsl.runtime.strips import Ragged, State
from attndsl.runtime.transforms import mapped
from attndsl.select_plan import why_not_fused
from attndsl.selection import Levels, Probs, Selection, Share

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "select(str program, str selection, Tensor q, Tensor k, Tensor[] inputs, SymInt[] args, float? scale, "
    "Tensor[]? keys=None, Tensor? lse=None) -> Tensor"
)
_LIBRARY.define(
    "select_ragged(str program, str selection, Tensor q, Tensor seq_lens, int kv_heads, SymInt capacity, "
    "Tensor[] members, Tensor? page_table, Tensor[] inputs, SymInt[] args, float? scale, Tensor[]? keys=None, "
    "Tensor? lse=None) -> Tensor"
)
# Kinds of calls whose selectors are kept.
MAX_KEPT = 256
_KEPT: dict[Any, Selector | EntrySelector | DocumentSelector] = {}
_KEPT_RAGGED: dict[Any, Selector | DocumentSelector] = {}


class Branches(Protocol):
    """What a call has attended: the keys of each part and the lse of a branch that `probs` reads, and its queries."""

    def state(self, name: str) -> State: ...

    def queries(self, name: str) -> Tensor: ...


class Planner:
    """The plans of a program's selections in one call, each made when first asked for, or given.

    key: the registered program. given: plans by name, [B, H', R, C or M]. The branches are handed in whenever a plan is
    asked for: kept here, they and their planner would keep each other, and with them all that a call made, until Python
    looks for cycles.
    """

    def __init__(
        self, program: Program, key: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, given: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Raises `PatternError` where a given plan belongs to no selection of the program."""
        self.program, self.key = program, key
        self.q, self.k, self.inputs = q.detach(), k.detach(), [x.detach() for x in inputs]
        self.args, self.scale, self.given = args, scale, given
        self._found: dict[str, Tensor] = {}
        check_named(self.program, given)

    def plan(self, name: str, of: Branches) -> Tensor:
        """A plan, [B, H', R, C or M]. Raises `PatternError` where a given one does not fit the call."""
        if name not in self._found:
            selection = self.program.selection(name)
            if name in self.given:
                shape = call_shape(self.q, self.k, self.k)
                self._found[name] = _checked(self.program, selection, shape, self.given[name], self.q.device)
            else:
                self._found[name] = self._made(selection, of)
        return self._found[name]

    def input(self, name: str, of: Branches) -> Tensor:
        """The plan as the input that it is to what attends it."""
        # Where the program declares it, nothing is derived anew: torch.compile would trace that.
        declared = [decl for decl in self.program.inputs if decl.name == name]
        return as_input(self.plan(name, of), declared[0] if declared else plan_input(self.program.selection(name)))

    def _made(self, selection: Selection, of: Branches) -> Tensor:
        read = [self.input(name, of) for name in reads_of(selection, self.program)]
        keys: list[Tensor] | None = None
        lse: Tensor | None = None
        q = self.q
        if isinstance(selection.score, Probs):
            # Raises where the branch has no probabilities, before it is attended; a graph raises when it runs.
            if not torch.compiler.is_compiling():
                checked_masses(of_selection(self.program, selection), selection, call_shape(self.q, self.k, self.k))
            parts, lse = of.state(selection.score.branch)
            keys, lse = [x.detach() for x in parts], lse.detach()
            q = of.queries(selection.score.branch).detach()
        make = torch.ops.attndsl.select if traced((self.q, self.k, *self.inputs)) else _select
        made: Tensor = make(
            self.key, selection.name, q, self.k, [*self.inputs, *read], self.args, self.scale, keys, lse
        )
        return made


class CacheBranches(Protocol):
    """What a decode has: of a cache what is kept for the vectors of a selection's members, and of a branch that `probs`
    reads the keys, the lse and the queries."""

    def members(self, name: str) -> Sequence[Tensor]: ...

    def state(self, name: str) -> State: ...

    def queries(self, name: str) -> Tensor: ...


class RaggedPlanner:
    """The plans of a program's selections in one decode, as `Planner` has them."""

    def __init__(
        self, key: str, call: DecodeTensors, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        given: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Raises `PatternError` where a given plan belongs to no selection of the program."""
        self.key, self.call, self.program = key, call, engine_of(key).program
        self.inputs, self.args, self.scale, self.given = inputs, args, scale, given
        self._found: dict[str, Tensor] = {}
        check_named(self.program, given)

    def plan(self, name: str, of: CacheBranches) -> Tensor:
        """A plan, [B, H', R, C or M]. Raises `PatternError` where a given one does not fit the call."""
        if name not in self._found:
            selection = self.program.selection(name)
            if name in self.given:
                plan = self.given[name]
                self._found[name] = _checked(self.program, selection, self.call.shape, plan, self.call.q.device)
            else:
                self._found[name] = self._made(selection, of)
        return self._found[name]

    def input(self, name: str, of: CacheBranches) -> Tensor:
        """The plan as the input that it is to what attends it."""
        return as_input(self.plan(name, of), plan_input(self.program.selection(name)))

    def _made(self, selection: Selection, of: CacheBranches) -> Tensor:
        call, read = self.call, [self.input(name, of) for name in reads_of(selection, self.program)]
        keys: list[Tensor] | None = None
        lse: Tensor | None = None
        q = call.q
        if isinstance(selection.score, Probs):
            parts, lse = of.state(selection.score.branch)
            keys = [*parts]
            q = of.queries(selection.score.branch)
        inputs = [*self.inputs, *read]
        # Keys are read where they lie, those of 8 bits in a copy.
        in_pages = self.program.packed is None and None in kept_by(selection) and not call.cache.fp8
        make = torch.ops.attndsl.select_ragged if traced((call.q, *inputs)) else _select_ragged
        made: Tensor = make(
            self.key, selection.name, q, call.seq_lens, call.k.shape[1], call.capacity,
            of.members(selection.name), call.page_table if in_pages else None, inputs, self.args, self.scale, keys,
            lse,
        )  # fmt: skip
        return made


def check_named(program: Program, given: Mapping[str, Tensor]) -> None:
    """Raises `PatternError` where a given plan belongs to no selection of the program."""
    names = [selection.name for selection in program.selections]
    if not isinstance(given, Mapping):
        raise error("A572", f"plans are given by name, not {repr(given)[:40]}", help="pass what `attn.plan` returns")
    for name in given:
        if name not in names:
            known = f"it has {', '.join(names)}" if names else "it has none"
            raise error("A572", f"`{name}` is not a selection of this attention: {known}", program.span)


def as_input(plan: Tensor, decl: InputDecl) -> Tensor:
    """A plan [B, H', R, C] as the input that it is: without the dimensions that it has for nothing."""
    axes = [dim.axis.value for dim in decl.dims]
    if "q" not in axes:
        plan = plan.squeeze(2)
    return plan if "h" in axes or "g" in axes else plan.squeeze(1)


def _checked(program: Program, selection: Selection, shape: CallShape, plan: object, device: torch.device) -> Tensor:
    """A plan that a call gives. Raises `PatternError` for a wrong form, and in debug mode for wrong entries."""
    members, of_levels = members_of(program, selection, shape), isinstance(selection.rule, Levels)
    forms = [torch.uint8] if of_levels else [torch.int32, torch.int64, torch.uint8]
    heads = {Share.NONE: shape.heads, Share.GROUP: shape.kv_heads, Share.HEADS: 1}[plan_heads(selection)]
    wanted = [shape.batch, heads, empty_plan(own_program(program), selection, shape, torch.device("meta")).shape[2]]
    fits = False
    if isinstance(plan, Tensor) and plan.dim() == 4 and plan.dtype in forms and plan.device == device:
        last = members if plan.dtype == torch.uint8 else plan.shape[3]
        fits = plan.shape[3] == last and broadcasts(plan.shape, wanted)
    if not isinstance(plan, Tensor) or not fits:
        said = f"{list(plan.shape)} {plan.dtype} on {plan.device}" if isinstance(plan, Tensor) else repr(plan)[:40]
        raise error(
            "A573", f"`{selection.name}` is no plan of this call: {said}", selection.span,
            help=("" if of_levels else f"int32 [{', '.join(map(str, wanted))}, C], or ")
            + f"uint8 with {members} entries last, on {device}",
        )  # fmt: skip
    if os.environ.get("ATTNDSL_DEBUG") and isinstance(selection.rule, Levels):
        known = torch.tensor((0, *selection.rule.factors), dtype=torch.uint8, device=device)
        if not bool(torch.isin(plan, known).all()):
            raise error(
                "A574", f"`{selection.name}` gives factors that it does not have", selection.span,
                help=f"entries are 0 or one of {', '.join(map(str, dict.fromkeys(selection.rule.factors)))}",
            )  # fmt: skip
    if os.environ.get("ATTNDSL_DEBUG") and plan.dtype != torch.uint8:
        empty = (plan == -1).to(torch.int8)
        if not bool((listed_members(plan, members) | (plan == -1)).all()) or bool((empty.diff() < 0).any()):
            raise error(
                "A574", f"`{selection.name}` lists what are no members, or not in increasing order", selection.span,
                help=f"members lie in [0, {members}), each above the one before, and -1 stands after the last",
            )  # fmt: skip
    return plan


def reads_of(selection: Selection, program: Program) -> list[str]:
    """The selections that one chooses among, in the order of the program."""
    found = plans_read(selection, program)
    return [each.name for each in program.selections if each.name in found]


def _select(
    key: str, name: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    keys: Sequence[Tensor] | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
        selection = program.selection(name)
        seen = of_selection(program, selection)
        shape = without_values(seen, q, k, inputs)
        check_tables(seen, shape)
        check_inputs(seen, shape, inputs, q.device)
        if selection.rows != 1:
            check_rows(program, shape, classes_rows_before)
        if len(_KEPT) >= MAX_KEPT:
            _KEPT.clear()
        given = [torch.empty_like(x, device="meta") for x in inputs]
        fuses = q.is_cuda and q.dtype != torch.float64
        printer = engine_of(key).generators.triton_select if fuses else None
        heads = (shape.heads, shape.kv_heads)
        if seen.packed is None:
            selector = Selector(seen, selection, shape, q.device, given, printer, key=key)
        elif printer is not None and not why_not_fused(*ranked(program, selection, heads), heads):
            selector = EntrySelector(key, seen, selection, shape, q.device, given, printer, q.dtype)
        else:
            selector = DocumentSelector(key, seen, selection, shape, q.device, given)
        _KEPT[kind] = selector
    with torch.no_grad():
        return selector(q, k, inputs, args, scale, None if keys is None or lse is None else (keys, lse))


def _select_ragged(
    key: str, name: str, q: Tensor, seq_lens: Tensor, kv_heads: int, capacity: int, members: Sequence[Tensor],
    page_table: Tensor | None, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    keys: Sequence[Tensor] | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    shape = _ragged_shape(q, kv_heads, capacity)
    given = tuple((x.shape, x.dtype) for x in inputs)
    page = None if page_table is None else members[0].shape[2]
    kind = (key, name, shape, page, q.dtype, q.device, *given)
    selector = _KEPT_RAGGED.get(kind)
    if selector is None:
        program = engine_of(key).program
        selection = program.selection(name)
        seen = of_selection(program, selection)
        shape = of_values(seen, shape, inputs)
        check_tables(seen, shape)
        check_inputs(seen, shape, inputs, q.device)
        if len(_KEPT_RAGGED) >= MAX_KEPT:
            _KEPT_RAGGED.clear()
        like = [torch.empty_like(x, device="meta") for x in inputs]
        ranks = q.is_cuda and q.dtype != torch.float64
        printer = engine_of(key).generators.triton_rank if ranks else None
        if seen.packed is None:
            selector = Selector(
                seen, selection, shape, q.device, like, printer, ragged=True, dtype=q.dtype, page=page
            )  # fmt: skip
        else:
            selector = DocumentSelector(key, seen, selection, shape, q.device, like, ragged=True)
        _KEPT_RAGGED[kind] = selector
    state = None if keys is None or lse is None else (keys, lse)
    if isinstance(selector, DocumentSelector):
        lengths = seq_lens.clamp(0, capacity).to(torch.int64).view(-1, 1, 1, 1)
        with torch.no_grad():
            return selector(q, members[0], inputs, args, scale, state, lengths)
    names = [KEYS if each is None else each.name for each in kept_by(selector.selection)]
    ragged = Ragged(seq_lens, capacity, dict(zip(names, members, strict=True)), page_table)
    with torch.no_grad():
        return selector(q, q, inputs, args, scale, state, ragged)


def _ragged_shape(q: Tensor, kv_heads: int, capacity: int) -> CallShape:
    batch, heads, rows, dim = q.shape
    return CallShape(batch, int(heads), int(kv_heads), rows, capacity, int(dim), int(dim))


def _select_ragged_fake(
    key: str, name: str, q: Tensor, seq_lens: Tensor, kv_heads: int, capacity: int, *rest: object
) -> Tensor:
    program = engine_of(key).program
    shape = _ragged_shape(q, kv_heads, capacity)
    return empty_plan(own_program(program), program.selection(name), shape, q.device)


def _select_fake(
    key: str, name: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    keys: Sequence[Tensor] | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    program = engine_of(key).program
    return empty_plan(own_program(program), program.selection(name), call_shape(q, k, k), q.device)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("select", _select, _device)
    _LIBRARY.impl("select_ragged", _select_ragged, _device)
_LIBRARY.impl("select_ragged", _select_ragged_fake, "Meta")
_LIBRARY.impl("select", _select_fake, "Meta")
mapped(_LIBRARY, "select")
