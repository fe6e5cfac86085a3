"""Decode of programs with selections, views and several branches: the plans, then a kernel a part, then the output.

What a step needs of the whole cache beside the tokens that a row reads are entries of a few tokens each, kept up to
date (`keep.py`), so choosing takes the time of reading these.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attndsl.branches import Attended, Given, Pick, Queries, View, Within, combined
from attndsl.compose import Composition, Pooling
from attndsl.diagnostics import error
from attndsl.keeping import Kept, kept, kept_by
from attndsl.program import CallShape, InputDecl, Program
from attndsl.runtime.call import check_call, check_inputs, names_of, present_in_cache
from attndsl.runtime.combine import Combiner, State
from attndsl.runtime.compose import made_entries, read_by_output
from attndsl.runtime.cuts import document_ends
from attndsl.runtime.decode import FP8, DecodeTensors, check_tensors
from attndsl.runtime.decode_op import decode, in_order
from attndsl.runtime.document_levels import levels_of_documents
from attndsl.runtime.document_picks import documents_of, told_of
from attndsl.runtime.in_order import keys_in_order, numbers_in_order, tokens_of_cache
from attndsl.runtime.keep import Entries, check_cache, check_entries, make_entries, update_entries
from attndsl.runtime.ops import checked_values
from attndsl.runtime.pick import listed_of_heads
from attndsl.runtime.pool import queries_of_decode
from attndsl.runtime.registry import engine_of
from attndsl.runtime.select_op import RaggedPlanner
from attndsl.runtime.shares import ragged_shares
from attndsl.runtime.triton_version import INTERPRETED


class ComposedDecode:
    """One decode of a program: its plans and its branches, each made when first asked for.

    key, keys: the registered program, and those of its branches (none: it is plain). given: the inputs of the call.
    """

    def __init__(
        self, program: Program, key: str, composition: Composition, keys: Sequence[str], call: DecodeTensors,
        given: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str, plans: Mapping[str, Tensor],
        views: Mapping[str, tuple[Tensor, ...]] | None,
    ) -> None:  # fmt: skip
        own = composition.own
        checked_values(key, given, args)
        check_tensors(program, call)
        check_inputs(own, call.shape, given, call.q.device)
        self.program, self.key, self.composition, self.call = program, key, composition, call
        self.args, self.scale, self.backend = list(args), scale, backend
        self.inputs = {decl.name: x for decl, x in zip(own.inputs, given, strict=True)}
        # What is kept is of the tokens that are present.
        self.present = present_in_cache(program, call.seq_lens, self.inputs.get(program.lengths or ""))
        self._kept = {each.name: each for each in kept(program, composition)}
        self._entries = self._given_entries(views)
        self.planner = RaggedPlanner(key, call, given, args, scale, plans)
        self._selections = {selection.name for selection in program.selections}
        # A plain program's output is that of its branch, by no name; selections know its own.
        self._programs = dict.fromkeys(("", program.branches[0].name or ""), (key, program))
        if keys:
            names = [name for name, _ in composition.branches]
            self._programs = dict(zip(names, zip(keys, composition.programs, strict=True), strict=True))
        self._pools = {name: pooling.name for pooling in composition.pools for name in pooling.made}
        self._told = {x.name: x for x in composition.pools if x.told_by}
        self._listed: dict[str, Tensor] = {}
        self._attended: dict[str, State] = {}
        self._pooled: dict[Queries, Tensor] = {}

    def attended(self, name: str) -> State:
        """Output and lse of a branch."""
        if name not in self._attended:
            call, (key, program) = self.call, self._programs[name]
            within = program.only.within
            own = [self._input(decl, within) for decl in program.inputs]
            q = self.queries(name)
            if within is not None and self.program.packed is not None:
                self._attended[name] = self._levels(key, within, q, own), self.attended(within.branch)[1]
                return self._attended[name]
            tensors = (q, call.k, call.v, call.seq_lens, call.page_table, call.k_scale, call.v_scale)
            out, lse = decode(key, *tensors, own, self.args, self.scale, "hnd", self.backend)
            found = out, None if program.branches[0].weights is not None else lse
            # Two levels are normalised by what their members' weights are.
            self._attended[name] = found if within is None else (out, self.attended(within.branch)[1])
        return self._attended[name]

    def _shares(self, within: Within) -> Tensor:
        """What weighs the members of two levels."""
        call, (key, program) = self.call, self._programs[within.branch]
        own = [self._input(decl) for decl in program.inputs]
        keys, lse = self.state(within.branch)
        of, last = (own, self.args, self.scale, within.keys, call.capacity), call.seq_lens
        of_parts = (ragged_shares(key, self.queries(within.branch), x, lse, *of, i, last) for i, x in enumerate(keys))
        return functools.reduce(operator.add, of_parts)

    def _levels(self, key: str, within: Within, q: Tensor, own: Sequence[Tensor]) -> Tensor:
        """The output of two levels of documents."""
        call, names = self.call, [decl.name for decl in engine_of(key).program.inputs]
        shares, (k, v) = own[names.index(within.weights)], numbers_in_order(call)
        return levels_of_documents(key, q, k, v, shares, call.seq_lens, own, self.args, self.scale, within.keys)

    def queries(self, name: str) -> Tensor:
        """The queries of a branch: the call's, or what it pools of them."""
        asked = self._programs[name][1].only.queries
        if asked is None:
            return self.call.q
        if asked not in self._pooled:
            lengths, present = (x.clamp(0, self.call.capacity) for x in (self.call.seq_lens, self.present))
            documents = None
            if self.program.packed is not None:
                ids = self.inputs[self.program.packed]
                documents = document_ends(ids, False), document_ends(ids, True)
            self._pooled[asked] = queries_of_decode(self.call.q, asked, lengths, present, documents)
        return self._pooled[asked]

    def state(self, name: str) -> tuple[list[Tensor], Tensor]:
        """The keys that each part of a branch attended to, and its lse."""
        _, lse = self.attended(name)
        assert lse is not None
        program = self._programs[name][1]
        return [self._keys(program, part.view) for part in program.only.parts], lse

    def _keys(self, program: Program, view: View | None) -> Tensor:
        """The keys of a part of a branch's program."""
        if view is None:
            return keys_in_order(self.call)
        assert isinstance(view, Given)
        at = self._input(program.input(view.keys))
        return at.expand(self.call.shape.batch, self.call.shape.kv_heads, -1, -1)

    def members(self, name: str) -> list[Tensor]:
        """What a selection's members are ranked by of the cache, in the order of its vectors: single keys where they
        lie, unless they are of 8 bits. Of documents all keys in one piece."""
        if self.program.packed is not None:
            return [keys_in_order(self.call)]
        found = []
        for each in kept_by(self.program.selection(name)):
            if each is not None:
                found.append(self._entry(each.name)[0])
            else:
                found.append(keys_in_order(self.call) if self.call.cache.fp8 else self.call.k)
        return found

    def _input(self, decl: InputDecl, within: Within | None = None) -> Tensor:
        if within is not None and decl.name == within.weights:
            return self._shares(within)
        if within is not None and within.votes is not None and decl.name == within.votes.lse:
            return self.state(within.branch)[1]
        if decl.name in self._selections:
            return self.planner.input(decl.name, self)
        if decl.name not in self._pools:
            return self.inputs[decl.name]
        name = self._pools[decl.name]
        if name in self._told and decl.name not in (self._told[name].keys, self._told[name].values):
            self._of_data(self._told[name])
            return self._listed[decl.name]
        keys, values = self._of_data(self._told[name]) if name in self._told else self._entry(name)
        return keys if any(decl.name == pooling.keys for pooling in self.composition.pools) else values

    def _of_data(self, pooling: Pooling) -> tuple[Tensor, ...]:
        """The entries of a view that data tells, made of the cache: of the tokens that an input lists, or of all."""
        if pooling.name not in self._entries:
            call, own = self.call, self.composition.own
            if isinstance(pick := pooling.pool, Pick):
                sizes = (call.shape.batch, call.shape.kv_heads, call.capacity)
                if pick.packed is not None:
                    listed = self._of_documents(pooling, pick, sizes)
                else:
                    listed = listed_of_heads(self.inputs[pick.input], own.input(pick.input), pick, sizes)
                self._entries[pooling.name] = tokens_of_cache(call, listed)
            else:
                lengths = self.present.clamp(0, call.capacity)
                k, v = numbers_in_order(call)
                self._entries[pooling.name] = made_entries(
                    self.key, self.composition, pooling, k, v, self.inputs, self.backend, lengths
                )
        return self._entries[pooling.name]

    def _of_documents(self, pooling: Pooling, pick: Pick, sizes: Sequence[int]) -> Tensor:
        """The tokens that documents list, and beside them what data tells of these."""
        call, present = self.call, self.present.clamp(0, self.call.capacity)
        found = documents_of(self.composition, pick, sizes, self.inputs, present)
        kernel = call.q.is_cuda or (self.backend == "triton" and INTERPRETED)
        self._listed |= told_of(self.key, self.composition, pooling, found, self.inputs, call.q.dtype, kernel)
        return found.token

    def _entry(self, name: str) -> tuple[Tensor, ...]:
        """What is kept under a name, made of the whole cache where it was not handed in."""
        if name not in self._entries:
            call = replace(self.call, seq_lens=self.present)
            self._entries |= make_entries(self.key, [self._kept[name]], call, self.backend)
        return self._entries[name]

    def _given_entries(self, views: Mapping[str, tuple[Tensor, ...]] | None) -> Entries:
        views = {} if views is None else views
        if not isinstance(views, Mapping):
            raise _unknown(tuple(self._kept.values()))
        for name, entries in views.items():
            if name not in self._kept:
                raise _unknown(tuple(self._kept.values()))
            check_entries(self._kept[name], entries, self.call)
        return dict(views)


def _unknown(known: Sequence[Kept]) -> Exception:
    names = ", ".join(f"`{each.name}`" for each in known) or "none"
    return error("A565", f"the views of this attention are {names}", help="pass what `attn.views(…)` returns")


def decode_composed(
    program: Program, key: str, composition: Composition, keys: Sequence[str], call: DecodeTensors,
    given: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str, plans: Mapping[str, Tensor],
    views: Mapping[str, tuple[Tensor, ...]] | None,
) -> State:  # fmt: skip
    """Output and, where there is one, lse of a decode; parameters as in `ComposedDecode`."""
    of = ComposedDecode(program, key, composition, keys, call, given, args, scale, backend, plans, views)
    if isinstance(composition.output, Attended):
        return of.attended(composition.output.branch)
    attended = {name: of.attended(name) for name in combined(composition.output)}
    assert composition.reading is not None
    gates = read_by_output(composition.reading, of.inputs)
    shape, numbers = call.shape, dict(zip(program.args, args, strict=True))
    lengths = call.seq_lens.clamp(0, call.capacity).to(torch.int64).view(-1, 1, 1, 1)
    out, lse = Combiner(composition.reading, shape, call.q.device, gates, numbers, attended, lengths).result()
    # Rows before the first token are empty, whatever an output makes of them.
    empty = torch.arange(shape.rows, device=call.q.device).view(1, 1, -1, 1) < shape.rows - lengths
    out = torch.where(empty, 0, out).to(call.q.dtype)
    out = out.expand(shape.batch, shape.heads, shape.rows, shape.v_dim)
    return out, None if lse is None else torch.where(empty[..., 0], -torch.inf, lse)


def plan_decode(
    program: Program, key: str, composition: Composition, keys: Sequence[str], q: Tensor, k_cache: Tensor,
    v_cache: Tensor, seq_lens: Tensor, page_table: Tensor | None, layout: str, given: Sequence[Tensor],
    args: Sequence[int], scale: float | None, plans: Mapping[str, Tensor] | None,
    views: Mapping[str, tuple[Tensor, ...]] | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The plan of each selection of a program in a decode, by its name."""
    call = in_order(q, k_cache, v_cache, seq_lens, page_table, layout, scale=scale)
    with torch.no_grad():
        of = ComposedDecode(program, key, composition, keys, call, given, args, scale, "auto", plans or {}, views)
        return {selection.name: of.planner.plan(selection.name, of) for selection in program.selections}


def cache_views(
    program: Program, key: str, composition: Composition, k: Tensor, v: Tensor, seq_lens: Tensor,
    page_table: Tensor | None, layout: str, k_scale: Tensor | None, v_scale: Tensor | None,
    dtype: torch.dtype | None, count: Tensor | None,
) -> Entries:  # fmt: skip
    """All that decode keeps of a cache beside its tokens, by name. dtype: that of the queries, where k is of 8 bits.
    count: what `lengths` reads."""
    check_call(None, k_cache=k)
    q = k.new_empty(0, dtype=(dtype or torch.bfloat16) if k.dtype == FP8 else k.dtype)
    call = in_order(q, k, v, seq_lens, page_table, layout, k_scale, v_scale)
    return make_entries(key, kept(program, composition), _of_present(program, call, count))


def update_views(
    program: Program, key: str, composition: Composition, views: Mapping[str, tuple[Tensor, ...]], k: Tensor, v: Tensor,
    seq_lens: Tensor, page_table: Tensor | None, new: int, layout: str, k_scale: Tensor | None,
    v_scale: Tensor | None, count: Tensor | None,
) -> None:  # fmt: skip
    """Make what the last `new` tokens of each sequence change of it anew, in place. count: as in `cache_views`."""
    known = kept(program, composition)
    if names_of(views) != {each.name for each in known}:
        raise _unknown(known)
    check_call(None, k_cache=k)
    # Entries that are attended have the queries' dtype.
    attended = [views[each.name][0] for each in known if not each.exact]
    q = k.new_empty(0, dtype=k.dtype if k.dtype != FP8 else attended[0].dtype if attended else torch.float32)
    call = in_order(q, k, v, seq_lens, page_table, layout, k_scale, v_scale)
    update_entries(key, known, views, _of_present(program, call, count), new)


def _of_present(program: Program, call: DecodeTensors, count: Tensor | None) -> DecodeTensors:
    """A cache with the tokens that are present alone. Raises `PatternError` where what `lengths` reads does not fit."""
    if program.lengths is None or count is None:
        return call
    check_cache(call)
    check_call(None, **{program.lengths: count})
    own = replace(program, inputs=(program.input(program.lengths),))
    check_inputs(own, CallShape(len(call.seq_lens), 1, 1, 0, call.capacity, 1, 1), [count], call.k.device)
    return replace(call, seq_lens=present_in_cache(program, call.seq_lens, count))
