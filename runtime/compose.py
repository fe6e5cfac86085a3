"""Calls of programs with views and several branches: the entries, then a kernel a branch, then their combination."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attndsl.branches import Attended, Given, Pick, Queries, View, Within, combined
from attndsl.compose import Composition, Pooling
from attndsl.derivation import DocumentBlocks, DocumentEnds
from attndsl.diagnostics import error
from attndsl.observation import Observation
from attndsl.observed import as_selection, by_members
from attndsl.observing import Cells
from attndsl.present_rows import of_present_rows
from attndsl.program import Compare, Const, InputDecl, Program, Var
from attndsl.runtime.call import (
    autocasts,
    call_shape,
    check_backend,
    check_call,
    check_inputs,
    names_of,
    without_values,
)
from attndsl.runtime.combine import Combiner, State
from attndsl.runtime.combine_op import by_kernel, combined_by_kernel
from attndsl.runtime.cuts import document_ends
from attndsl.runtime.document_picks import documents_of, told_of
from attndsl.runtime.dropout import seed_tensor
from attndsl.runtime.observe import observe
from attndsl.runtime.observe_members import observe_members
from attndsl.runtime.ops import attend, checked_values
from attndsl.runtime.pick import listed_of_heads, picked
from attndsl.runtime.pool import pooled, pooled_queries
from attndsl.runtime.row_classes import queries_of_documents
from attndsl.runtime.runs import Runs, document_blocks, entries_of_heads, pooled_runs
from attndsl.runtime.runs import of_heads as runs_of_heads
from attndsl.runtime.select_op import Planner, reads_of
from attndsl.runtime.shares import member_shares, observed_shares
from attndsl.runtime.triton_version import INTERPRETED
from attndsl.widths import LARGEST

Views = Mapping[str, tuple[Tensor, ...]]


def make_views(
    key: str, composition: Composition, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The entries of every pooled view, keys [B, Hkv, entries, D] and values [B, Hkv, entries, Dv], by its name.
    inputs: those whose segments or documents are pooled, or that list tokens."""
    check_call(None, k=k, v=v)
    own = {name: composition.own.input(name) for x in composition.pools for name in x.told_by}
    if set(inputs) != set(own):
        names = ", ".join(f"`{name}`" for name in own) or "nothing"
        what = f"beside keys and values the views of this attention are made of {names}"
        raise error("A565", what, help="pass what it pools the segments or documents of, or picks, by name")
    shape = without_values(composition.own, k, k, [])
    alone = replace(composition.own, inputs=tuple(own.values()))
    check_inputs(alone, shape, [inputs[name] for name in own], k.device)
    return {pooling.name: made_entries(key, composition, pooling, k, v, inputs) for pooling in composition.pools}


def made_entries(
    key: str, composition: Composition, pooling: Pooling, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor],
    backend: str = "auto", lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The entries of a view, of tokens [B, Hkv, tokens, D] and Dv. lengths: int [B], how many are present."""
    if isinstance(pooling.pool, Pick):
        name = pooling.pool.input
        if pooling.pool.packed is not None:
            listed = documents_of(composition, pooling.pool, k.shape, inputs, lengths).token
        else:
            listed = listed_of_heads(inputs[name], composition.own.input(name), pooling.pool, k.shape)
        return picked(key, k, listed, backend), picked(key, v, listed, backend)
    batch, kv_heads = k.shape[:2]
    documents = None if pooling.pool.packed is None else inputs[pooling.pool.packed]
    told: Runs | None = None
    if (runs := pooling.pool.runs) is not None:
        told = runs_of_heads(inputs[runs.input], composition.own.input(runs.input), batch, kv_heads, lengths, documents)
    elif documents is not None:
        told = entries_of_heads(documents, pooling.pool, batch, kv_heads, lengths)
    if told is not None:
        return pooled_runs(key, k, pooling.pool, told, backend), pooled_runs(key, v, pooling.pool, told, backend)
    return pooled(key, k, pooling.pool, backend, lengths), pooled(key, v, pooling.pool, backend, lengths)


def present_tokens(program: Program, inputs: Mapping[str, Tensor], batch: int) -> Tensor | None:
    """How many tokens of each batch entry are present, int32 [B] and at least 0; None where all are."""
    if program.lengths is None:
        return None
    return inputs[program.lengths].clamp(0, LARGEST).to(torch.int32).expand(batch)


class Composed:
    """One call of a composed program: its plans and its branches, each made when first asked for.

    key, keys: the registered program, and those of its branches; given: the inputs that a call gives.
    """

    def __init__(
        self, program: Program, key: str, composition: Composition, keys: Sequence[str], q: Tensor, k: Tensor,
        v: Tensor, given: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str,
        plans: Mapping[str, Tensor], views: Views | None = None, dropout: float = 0, seed: Tensor | None = None,
    ) -> None:  # fmt: skip
        own = composition.own
        checked_values(key, given, args)
        check_inputs(own, call_shape(q, k, v), given, q.device)
        self._program, self._dropout, self._seed = program, dropout, seed
        self.q, self.k, self.v, self.args, self.scale, self.backend = q, k, v, list(args), scale, backend
        self.inputs = {decl.name: x for decl, x in zip(own.inputs, given, strict=True)}
        self.planner = Planner(program, key, q, k, given, args, scale, plans)
        self._selections = {selection.name for selection in program.selections}
        self._present = present_tokens(program, self.inputs, k.shape[0])
        _check_views(composition, views)
        self._key, self._composition, self._views = key, composition, views
        self._pools = {name: pooling for pooling in composition.pools for name in pooling.made}
        self._made: dict[str, Tensor] = {}
        programs = composition.programs if keys else (program,)
        names = [name for name, _ in composition.branches]
        self._parts = dict(zip(names, zip(keys or (key,), programs, strict=True), strict=True))
        self._attended: dict[str, State] = {}
        self._pooled: dict[Queries, Tensor] = {}

    def attended(self, name: str) -> State:
        """Output and lse of a branch; the only one of a program without an `output` goes by any name."""
        name = "" if self._program.output is None else name
        if name not in self._attended:
            own_key, part = self._part(name)
            within = part.only.within
            own = [self._input(decl, within) for decl in part.inputs]
            tensors = (self.queries(name), self.k, self.v, own)
            call = (*tensors, self.args, self.scale, self.backend, self._dropout, self._seed)
            out, lse = attend(own_key, *call)
            found = out, None if part.branches[0].weights is not None else lse
            # Two levels are normalised by what their members' weights are.
            self._attended[name] = found if within is None else (out, self.attended(within.branch)[1])
        return self._attended[name]

    def _shares(self, within: Within) -> Tensor:
        """What weighs the members of two levels."""
        key, part = self._part(within.branch)
        own = [self._input(decl) for decl in part.inputs]
        keys, lse = self.state(within.branch)
        call = own, self.args, self.scale, within.keys, self.k.shape[2]
        of_parts = (member_shares(key, self.queries(within.branch), x, lse, *call, i) for i, x in enumerate(keys))
        return functools.reduce(operator.add, of_parts)

    def observed(self) -> dict[str, Tensor]:
        """What the program observes, by name."""
        return {each.name: self._observed(each) for each in self._program.observations}

    def _observed(self, each: Observation) -> Tensor:
        _, lse = self.attended(each.branch)
        assert lse is not None, "what is observed has an lse"
        key, part = self._part(each.branch)
        own = [self._input(decl) for decl in part.inputs]
        if self._program.packed is not None and each.rows is not None:
            found: Tensor | None = None
            for i, of_part in enumerate(part.branches[0].parts):
                call = (self.queries(each.branch), self._keys(of_part.view), lse, own, self.args, self.scale)
                made = observed_shares(key, *call, each.keys, self.k.shape[2], i, each.rows, each.largest)
                found = made if found is None else torch.maximum(found, made) if each.largest else found + made
            assert found is not None
            return found
        if by_members(self._program, each):
            read = [self.planner.input(name, self) for name in reads_of(as_selection(each), self._program)]
            inputs, (keys, lse) = [*self.inputs.values(), *read], self.state(each.branch)
            of_call = self.queries(each.branch), self.k, inputs, self.args, self.scale
            return observe_members(self._key, each.name, *of_call, keys, lse)
        wanted = Cells(each.rows, each.keys, each.largest)
        return observe(
            key, self.queries(each.branch), self.k, self.v, lse, own, self.args, self.scale, self.backend, wanted
        )

    def state(self, name: str) -> tuple[list[Tensor], Tensor]:
        """The keys that each part of a branch attended to, and its lse."""
        _, lse = self.attended(name)
        assert lse is not None
        return [self._keys(part.view) for part in self._part(name)[1].only.parts], lse

    def _keys(self, view: View | None) -> Tensor:
        """The keys of a part."""
        if view is None:
            return self.k
        assert isinstance(view, Given)
        keys = self._entries(view.keys) if view.keys in self._pools else self.inputs[view.keys]
        return keys.expand(*self.k.shape[:2], -1, -1)

    def queries(self, name: str) -> Tensor:
        """The queries of a branch: the call's, or what it pools of them."""
        key, part = self._part(name)
        asked = part.branches[0].queries
        if asked is None:
            return self.q
        if asked not in self._pooled:
            first = call_shape(self.q, self.k, self.v).first_position(part)
            present, doc = None if part.align_start else self._present, self._program.packed
            if doc is not None:
                ids, asked_of = self.inputs[doc], replace(asked, packed=doc)
                found = queries_of_documents(key, self.q, asked_of, first, ids, self.backend, present)
            else:
                found = pooled_queries(key, self.q, asked, first, self.backend, present)
            self._pooled[asked] = found
        return self._pooled[asked]

    def _part(self, name: str) -> tuple[str, Program]:
        """The key and the program of a branch; the only one of a program without an `output` goes by any name."""
        return self._parts["" if self._program.output is None else name]

    def _input(self, decl: InputDecl, within: Within | None = None) -> Tensor:
        if within is not None and decl.name == within.weights:
            return self._shares(within)
        if within is not None and within.votes is not None and decl.name == within.votes.lse:
            return self.state(within.branch)[1]
        if decl.name in self._selections:
            return self.planner.input(decl.name, self)
        return self._entries(decl.name) if decl.name in self._pools else self.inputs[decl.name]

    def _entries(self, name: str) -> Tensor:
        """Keys or values of a pooled view, by the input that holds them: handed in, or made when first asked for, since
        a plan may need neither."""
        if name not in self._made:
            pooling, call = self._pools[name], (self.k, self.v, self.inputs, self.backend, self._present)
            made = self._views[pooling.name] if self._views is not None else None
            if isinstance(pooling.pool, Pick) and name not in (pooling.keys, pooling.values):
                listed = documents_of(self._composition, pooling.pool, self.k.shape, self.inputs, self._present)
                kernel = self.k.is_cuda or (self.backend == "triton" and INTERPRETED)
                told = self._key, self._composition, pooling, listed, self.inputs
                self._made |= told_of(*told, self.k.dtype, kernel)
            else:
                keys, values = made or made_entries(self._key, self._composition, pooling, *call)
                self._made[pooling.keys], self._made[pooling.values] = keys, values
        return self._made[name]


def attend_composed(
    program: Program, key: str, composition: Composition, keys: Sequence[str], q: Tensor, k: Tensor, v: Tensor,
    given: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str, dropout: float,
    seed: int | Tensor | None, plans: Mapping[str, Tensor], views: Views | None, observes: bool = False,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:  # fmt: skip
    """Output and, where there is one, lse of a call, and if asked for what it observes; parameters as in `Composed`.

    One seed for all branches: what is dropped depends on the pair, not on the branch that reaches it.
    """
    check_call(scale, q=q, k=k, v=v)
    check_backend(backend)
    drawn = seed_tensor(seed, q.device) if dropout else None
    if autocasts(q.device):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    call = Composed(program, key, composition, keys, q, k, v, given, args, scale, backend, plans, views, dropout, drawn)
    observed = call.observed() if observes else {}
    if isinstance(composition.output, Attended):
        return *call.attended(composition.output.branch), observed
    attended = {name: call.attended(name) for name in combined(composition.output)}
    assert composition.reading is not None
    reading, shape = composition.reading, call_shape(q, k, v)
    gates = read_by_output(reading, call.inputs)
    # A kernel holds an index within a dimension, and would read beside one without entries.
    if attended and shape.k_len and by_kernel(q, backend) and all(x.numel() for x in gates.values()):
        return *combined_by_kernel(key, reading, shape, attended, gates, args), observed
    numbers = dict(zip(program.args, args, strict=True))
    if not shape.k_len:
        # Where there are no tokens there is no output.
        assert reading.output is not None
        reading = replace(reading, output=of_present_rows(reading.output, Compare("<", Const(0), Var("Nk"))))
    found = Combiner(reading, shape, q.device, gates, numbers, attended).result()
    return found[0].to(q.dtype).expand(shape.batch, shape.heads, shape.rows, shape.v_dim), found[1], observed


def read_by_output(reading: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an output reads, by name: inputs of a call, and where its documents and their blocks lie."""
    found: dict[str, Tensor] = {}
    for decl in reading.inputs:
        match decl.derivation:
            case DocumentEnds(input=ids, ends=ends):
                found[decl.name] = document_ends(inputs[ids], ends)
            case DocumentBlocks(input=ids, size=size):
                found[decl.name] = document_blocks(inputs[ids].contiguous(), size)
            case _:
                found[decl.name] = inputs[decl.name]
    return found


def make_plans(
    program: Program, key: str, composition: Composition, keys: Sequence[str], q: Tensor, k: Tensor,
    given: Sequence[Tensor], args: Sequence[int], scale: float | None, plans: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The plan of each selection of a program, by its name. What `probs` reads of a branch needs no values."""
    check_call(scale, q=q, k=k)
    with torch.no_grad():
        # Of the values only their dimension is asked for.
        v_dim = without_values(composition.own, q, k, given).v_dim
        v = k if v_dim == k.shape[3] else k.new_zeros(*k.shape[:3], v_dim)
        call = Composed(program, key, composition, keys, q, k, v, given, args, scale, "auto", plans)
        return {selection.name: call.planner.plan(selection.name, call) for selection in program.selections}


def with_plans(
    program: Program, key: str, composition: Composition, q: Tensor, k: Tensor, given: Sequence[Tensor],
    args: Sequence[int], scale: float | None, plans: Mapping[str, Tensor],
) -> list[Tensor]:  # fmt: skip
    """The inputs of a plain program: those of a call, then the plans that it attends to."""
    check_call(scale, q=q, k=k)
    call = Composed(program, key, composition, (), q, k, k, given, args, scale, "auto", plans)
    return [*given, *(call.planner.input(decl.name, call) for decl in program.inputs[len(given) :])]


def _check_views(composition: Composition, views: Views | None) -> None:
    """Raises `PatternError` (A565) where what is handed in is not the program's views."""
    if views is not None and names_of(views) != set(composition.names):
        names = ", ".join(f"`{name}`" for name in composition.names) or "none"
        raise error("A565", f"the views of this attention are {names}", help="pass what `attn.views(k, v)` returns")
