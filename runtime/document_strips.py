"""Makes the plan of a selection of a packed call in torch operators: row classes and members are each document's own.

A document that is no longer than a member has one, and of longer ones there are few (`document_blocks.Kind`): what is
scored is as many members as a batch of the documents would have. Members count from their document's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.branch_mass import BranchMass
from attndsl.branches import Pool as ViewPool
from attndsl.branches import PoolFunction
from attndsl.capacity import budgets, capacity
from attndsl.program import CallShape, Inter, Program, Scalar, Set, Var
from attndsl.runtime.call import present_lengths
from attndsl.runtime.derive import Deriver
from attndsl.runtime.document_blocks import Blocks, BlockSums, Documents, Kind, lengths, room
from attndsl.runtime.document_vectors import BlockVectors, picked, to_members
from attndsl.runtime.groups import Groups
from attndsl.runtime.lasting import number_tensor, table_tensor
from attndsl.runtime.masses import leading, softmax
from attndsl.runtime.ranking import Ranking
from attndsl.runtime.runs import Runs, document_blocks, document_entries, pooled_runs
from attndsl.runtime.select import check_together, check_tokens, checked_mass, empty_plan, members_of
from attndsl.runtime.strips import LARGEST, STRIP
from attndsl.runtime.touched import Touched, call_values
from attndsl.runtime.values import Values
from attndsl.selection import Antidiagonal, Bound, Dot, Given, Pool, Probs, Selection, Top, Vectors
from attndsl.unpack import present_tokens, standing


@dataclass(slots=True)
class DocumentSelector:
    """The plan of one selection for one kind of call: same shapes and dtypes. key: the registered program, which knows
    how to pool."""

    key: str
    program: Program
    selection: Selection
    shape: CallShape
    device: torch.device
    given: Sequence[Tensor]
    ranking: Ranking = field(init=False)
    capacity: int = field(init=False)
    among: Touched = field(init=False)
    always: Touched | None = field(init=False, default=None)
    groups: Touched | None = field(init=False, default=None)
    mass: BranchMass | None = field(init=False, default=None)
    mass_deriver: Deriver | None = field(init=False, default=None)
    value: Scalar | None = field(init=False, default=None)
    scale: Scalar | None = field(init=False, default=None)
    tables: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Raises `PatternError` for what would be slow in silence (A570), or where no list is long enough (A571)."""
        selection, shape, program = self.selection, self.shape, self.program
        heads, score = (shape.heads, shape.kv_heads), selection.score
        check_tokens(selection, shape)
        check_together(selection, shape.batch * shape.heads * self._ranked())
        self.capacity = capacity(program, selection, heads, members_of(program, selection, shape))
        self.tables = {table.name: table_tensor(table, self.device) for table in program.tables}
        counts: Tensor | None = None
        if isinstance(selection.rule, Top) and selection.rule.count is not None:
            found = budgets(program, selection.rule.count, heads)
            counts = number_tensor(found, (1, len(found), 1, 1), torch.int64, self.device)
        self.ranking = Ranking(selection, heads, counts)
        self.among = self._touched(selection.among, selection.keys)
        if selection.always is not None:
            self.always = self._touched(Inter((selection.among, selection.always)), selection.keys)
        if isinstance(score, Antidiagonal):
            self.groups = self._touched(selection.among, score.stride)
        if isinstance(score, Given):
            self.value = self._standing(score.value)
        if selection.scale is not None:
            self.scale = self._standing(selection.scale)
        if isinstance(score, Probs):
            self.mass = checked_mass(program, selection, shape)
            self.mass_deriver = Deriver(self.mass.program, shape, self.device, given=self.given)

    def _ranked(self) -> int:
        """How many members row classes of a head have, of the kind of documents that have the most."""
        tokens, rows = self.shape.k_len, self.selection.rows or 1
        kinds = lengths(self.selection.keys, tokens)
        of_rows = (self.shape.rows if rows == 1 else room(tokens, rows, least) for least, _ in kinds)
        members = (-(-min(most, tokens) // self.selection.keys) for _, most in kinds)
        return max(classes * count for classes, count in zip(of_rows, members, strict=True))

    def _touched(self, pattern: Set, keys: int) -> Touched:
        score = self.selection.score
        more = [e for e in (score.value if isinstance(score, Given) else None, self.selection.scale) if e is not None]
        return Touched.of(self.program, pattern, 1, keys, self.shape, self.device, self.given, more=more)

    def _standing(self, e: Scalar) -> Scalar:
        """A scalar of a document alone in positions of the call, of which q is one of the document."""
        assert self.program.packed is not None
        return standing(e, self.among.program, self.program.packed, present_tokens(self.program) or Var("Nk"), {})

    def __call__(
        self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None = None,
        state: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The plan: int32 [B, H', R, C], or uint8 [B, H', R, M] where nothing bounds it, of the members of documents. R
        counts the call's rows, or the classes of all documents, one document after the other."""
        plan = empty_plan(self.program, self.selection, self.shape, self.device)
        plan.fill_(-1 if self.selection.bounded else 0)
        if self.shape.batch * self.shape.rows * self.shape.k_len:
            call = _Call(self, q, k, inputs, args, scale, state)
            for kind in call.documents.kinds(self.selection.keys):
                _OfKind(call, kind).write(plan)
        return plan


class _Call:
    """The tensors of one call of a selector."""

    def __init__(
        self, of: DocumentSelector, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, state: tuple[Tensor, Tensor] | None,
    ) -> None:  # fmt: skip
        program, shape = of.program, of.shape
        assert program.packed is not None
        self.of, self.q, self.k, self.state, self.shape, self.device = of, q, k, state, shape, of.device
        self.real = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.inputs = dict(zip((decl.name for decl in program.inputs), inputs, strict=True))
        present = present_lengths(program, shape, inputs)
        self.present = None if present is None else present.view(-1)
        self.ids = self.inputs[program.packed].expand(shape.batch, -1).contiguous()
        self.documents = Documents.of(self.ids, self.present)
        self.among = of.among.values(inputs, args, of.tables)
        self.always = None if of.always is None else of.always.values(inputs, args, of.tables)
        self.groups = None if of.groups is None else of.groups.values(inputs, args, of.tables)
        self.mass: Values | None = None
        if of.mass is not None and of.mass_deriver is not None:
            self.mass = call_values(of.mass.program, shape, of.mass_deriver, inputs, args, of.tables)
        self.given_scale = scale
        # The positions of the call's rows; those before the first token see nothing.
        self.position = torch.arange(shape.rows, device=self.device) + shape.first_position(program)

    def scale(self, token: Tensor) -> float | Tensor:
        """The factor of products, for rows of the documents of these tokens, [B or 1, n]."""
        if self.given_scale is not None or self.of.scale is None:
            return self.shape.dim**-0.5 if self.given_scale is None else self.given_scale
        return self.among.at(q=token[:, None, :, None]).tensor(self.of.scale)

    def vectors(self, v: Vectors) -> Callable[[Tensor], Tensor]:
        """[B, heads, n, D] of the members that begin at tokens [B, n], float32 (float64 for float64 tensors)."""
        size, x = self.of.selection.keys, self.k
        if v.source != "K":
            x = leading(self.of.program.input(v.source), self.inputs[v.source])
        x = x.expand(self.shape.batch, -1, self.shape.k_len, -1).to(self.real)
        entries, _ = document_entries(self.ids, size, size, self.present)
        if v.pool is not None:
            of_heads = Runs(*(each.unsqueeze(1).expand(-1, x.shape[1], -1).contiguous() for each in entries))
            if v.pool in (Pool.FIRST, Pool.LAST):
                at = of_heads.first if v.pool is Pool.FIRST else of_heads.end - 1
                x = x.gather(2, at.clamp(0, self.shape.k_len - 1).to(torch.int64)[..., None].expand(x.shape))
            else:
                pool = ViewPool(PoolFunction(v.pool.value), size, size, packed=self.of.program.packed)
                x = pooled_runs(self.of.key, x, pool, of_heads)
        return self.numbered(x, entries.number)

    def numbered(self, x: Tensor, number: Tensor) -> Callable[[Tensor], Tensor]:
        """Of vectors [B, heads, entries, D] those of the entries of tokens, `number` telling which."""
        return lambda token: picked(x, number.to(torch.int64).gather(-1, token))


class _OfKind:
    """What is chosen in one call for the rows of documents of one kind."""

    def __init__(self, call: _Call, kind: Kind) -> None:
        self.call, self.of, self.kind, self.shape = call, call.of, kind, call.shape
        self.selection, self.keys = call.of.selection, call.of.selection.keys
        self.documents, self.tokens = kind.documents, call.shape.k_len
        # In a document that has one member each row has a key of it, else rows and members are multiplied out.
        self.few = kind.most <= self.keys
        self.members = self._count(self.keys)
        self.holds = kind.holds
        at = call.position.clamp(min=0)
        self.classes: Blocks | None = None
        rows_of = self.documents.every[at].expand(self.shape.batch, -1)
        there = self.holds[:, at] & (call.position >= 0)
        if self.selection.rows == 1:
            # The token that a class begins with, and whether there is one.
            self.begin, self.exist = rows_of, there
            self.number = rows_of
        else:
            assert self.selection.rows is not None
            self.classes = kind.blocks(self.selection.rows)
            self.begin, self.exist = self.classes.place.clamp(max=self.tokens - 1), self.classes.place < self.tokens
            # The class of each of the call's rows.
            self.number = torch.where(there, self.classes.number[:, at], self.classes.room)
        self._products: dict[int, Tensor] = {}

    def _count(self, size: int) -> int:
        """How many blocks of so many tokens a document may have."""
        return -(-min(self.kind.most, self.tokens) // size)

    # ----------------------------------------------------------------------------------------- plans

    def write(self, plan: Tensor) -> None:
        """Write what is chosen."""
        classes, share = self.begin.shape[1], self.shape.heads // plan.shape[1]
        shape = (self.shape.batch, self.shape.heads, 0, self.members)
        step = max(1, STRIP[plan.device.type] // (shape[0] * shape[1] * self._width))
        strips = [slice(low, min(low + step, classes)) for low in range(0, classes, step)]
        if self.selection.together:
            raw, candidates, forced = (torch.cat(x, 2) for x in zip(*map(self._scored, strips), strict=True))
            level = self.of.ranking.decided(raw, candidates, forced, self.documents.first.gather(-1, self.begin))
            self._put(plan, level[:, ::share], slice(0, classes))
            return
        for at in strips:
            self._put(plan, self.of.ranking.decided(*self._scored(at))[:, ::share], at)

    def _put(self, plan: Tensor, level: Tensor, at: slice) -> None:
        """Write what some row classes choose."""
        found = self._listed(level, plan.shape[3]) if self.selection.bounded else level.to(plan.dtype)
        found = pad(found, (0, plan.shape[3] - found.shape[3]), value=-1 if self.selection.bounded else 0)
        if self.classes is None:
            plan[:, :, at] = torch.where(self.exist[:, None, at, None], found, plan[:, :, at])
            return
        token = self.begin[:, at]
        to = document_blocks(self.call.ids, self.classes.size).to(torch.int64).gather(-1, token)
        to = to + (token - self.documents.first.gather(-1, token)) // self.classes.size
        # A class that does not exist goes to a place of its own, which is dropped.
        whole = torch.cat((plan, plan[:, :, :1]), 2)
        to = torch.where(self.exist[:, at], to, plan.shape[2])[:, None, :, None].expand(found.shape)
        plan.copy_(whole.scatter_(2, to, found)[:, :, :-1])

    @property
    def _width(self) -> int:
        """What is held of each row class."""
        width = self.members if self.few else max(self.members, self._blocks.room)
        of_rows = self.classes is None and isinstance(self.selection.score, Probs)
        return max(width, self._mass_width) if of_rows else width

    def _listed(self, level: Tensor, width: int) -> Tensor:
        """Members in increasing order, -1 after them."""
        index = torch.arange(self.members, device=level.device, dtype=torch.int32)
        found = torch.where(level > 0, index, self.members).sort(-1).values[..., : min(self.of.capacity, width)]
        return torch.where(found < self.members, found, -1).to(torch.int32)

    # ------------------------------------------------------------------------------------ candidates

    def _scored(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of some row classes the scores of candidates, which these are, and which are forced."""
        shape = (self.shape.batch, self.shape.heads, at.stop - at.start, self.members)
        candidates = self._inside(at).expand(shape)
        forced = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=candidates.device).expand(shape)
        if self.of.always is not None:
            forced = self._forced(at).expand(shape) & candidates
        raw = self._scores(at).expand(shape)
        return torch.where(candidates & ~raw.isnan(), raw, -torch.inf).clamp(max=LARGEST), candidates, forced

    def _inside(self, at: slice) -> Tensor:
        if self.classes is None:
            return self._of_rows(self.of.among, self.call.among, self.keys, at)
        return self._candidates[:, :, at]

    def _forced(self, at: slice) -> Tensor:
        assert self.of.always is not None and self.call.always is not None
        if self.classes is None:
            return self._of_rows(self.of.always, self.call.always, self.keys, at)
        return self._always[:, :, at]

    def _of_rows(self, touched: Touched, values: Values, size: int, at: slice) -> Tensor:
        """Whether some of the call's rows have a pair with each block of so many keys of their document: bool [B, H or
        1, rows, blocks]."""
        position = self.call.position[at].clamp(min=0)
        first, end = (x[:, position] for x in (self.documents.first, self.documents.end))
        there = self.holds[:, position] & (self.call.position[at] >= 0)
        k = first[..., None] + torch.arange(self._count(size), device=first.device) * size
        exists = (k < end[..., None]) & there[..., None]
        here = values.at(q=position.view(1, 1, -1, 1), k=k.clamp(max=self.tokens - 1)[:, None])
        return here.tensor(touched.condition) & exists[:, None]

    @cached_property
    def _candidates(self) -> Tensor:
        assert self.classes is not None
        return self._of_classes(self.of.among, self.call.among, self.keys, self.number, self.classes)

    @cached_property
    def _always(self) -> Tensor:
        assert self.classes is not None and self.of.always is not None and self.call.always is not None
        return self._of_classes(self.of.always, self.call.always, self.keys, self.number, self.classes)

    def _of_classes(self, touched: Touched, values: Values, size: int, number: Tensor, classes: Blocks) -> Tensor:
        """As `_of_rows` for classes of the call's rows, `number` telling which."""
        found = BlockSums(classes.room, classes.size, largest=True)
        for at in self._row_strips(self._count(size)):
            inside = self._of_rows(touched, values, size, at).to(torch.int32)
            found.add(inside, number[:, at])
        return found.found > 0

    def _row_strips(self, width: int) -> Iterator[slice]:
        rows, strip = self.shape.rows, STRIP[self.call.device.type]
        step = max(1, strip // max(1, self.shape.batch * self.shape.heads * width))
        for low in range(0, rows, step):
            yield slice(low, min(low + step, rows))

    # ---------------------------------------------------------------------------------------- scores

    def _scores(self, at: slice) -> Tensor:
        score, begin = self.selection.score, self.begin[:, at]
        match score:
            case Dot(x=x):
                return self._dots(self._queries(x, at), self._low, begin) * self.call.scale(begin)
            case Bound(x=x):
                rows = self._queries(x, at)
                above = self._dots(rows.clamp(min=0), self._high, begin)
                return (above + self._dots(rows.clamp(max=0), self._low, begin)) * self.call.scale(begin)
            case Probs() | Antidiagonal():
                return self._rows_masses(at) if self.classes is None else self._masses[:, :, at]
            case Given():
                assert self.of.value is not None
                first = self.documents.first.gather(-1, begin)[..., None]
                k = first + torch.arange(self.members, device=first.device) * self.keys
                here = self.call.among.at(q=begin[:, None, :, None], k=k.clamp(max=self.tokens - 1)[:, None])
                return here.tensor(self.of.value).to(self.call.real)
            case _:
                assert_never(score)

    @cached_property
    def _blocks(self) -> Blocks:
        return self.kind.blocks(self.keys)

    @cached_property
    def _low(self) -> BlockVectors:
        score = self.selection.score
        assert isinstance(score, Dot | Bound)
        return BlockVectors(self._blocks, self.call.vectors(score.y if isinstance(score, Dot) else score.low), self.few)

    @cached_property
    def _high(self) -> BlockVectors:
        score = self.selection.score
        assert isinstance(score, Bound)
        return BlockVectors(self._blocks, self.call.vectors(score.high), self.few)

    def _queries(self, v: Vectors, at: slice) -> Tensor:
        """[B, Hq or 1, classes, D]: NaN where a class has no rows."""
        if v.source != "Q":
            decl = self.of.program.input(v.source)
            x = leading(decl, self.call.inputs[v.source]).to(self.call.real)
            if self.classes is None:
                return x.expand(-1, -1, self.shape.rows, -1)[:, :, at]
            x = x.expand(self.shape.batch, -1, self.tokens, -1)
            number, _ = document_entries(self.call.ids, self.classes.size, self.classes.size)
            return picked(x, number.number.to(torch.int64).gather(-1, self.begin[:, at]))
        if self.classes is None:
            return self.call.q[:, :, at].to(self.call.real)
        return self._pooled[:, :, at]

    @cached_property
    def _pooled(self) -> Tensor:
        """The queries of all classes, pooled."""
        assert self.classes is not None
        score = self.selection.score
        assert isinstance(score, Dot | Bound) and score.x.pool is not None
        groups = Groups.labelled(self.number.unsqueeze(1), self.classes.room)
        return groups.pooled(self.call.q.to(self.call.real), score.x.pool, self.of.key)

    def _dots(self, x: Tensor, of: BlockVectors, begin: Tensor) -> Tensor:
        """Rows [B, H or 1, n, D], of the documents of tokens [B, n], times the vectors of these' blocks: [B, H, n,
        blocks]."""
        x = x.expand(self.shape.batch, self.shape.heads, -1, -1)
        return of.dots(x, self.documents.first.gather(-1, begin), self._count(of.blocks.size))

    # ---------------------------------------------------------------------------------------- masses

    @cached_property
    def _masses(self) -> Tensor:
        """Those of all classes."""
        assert self.classes is not None
        score = self.selection.score
        if isinstance(score, Antidiagonal):
            return self._antidiagonal(score.stride)
        assert isinstance(score, Probs)
        found = BlockSums(self.classes.room, self.classes.size, score.largest)
        for at in self._row_strips(max(self._mass_width, self.members)):
            found.add(self._rows_masses(at), self.number[:, at])
        return found.found

    @property
    def _mass_width(self) -> int:
        """What is held of each row to find its masses."""
        _, stride = self._entries
        # Where a document has few, each row is given the vectors of its own.
        return self._count(stride) * self.shape.dim if self.few else self.kind.blocks(stride).room

    @property
    def _entries(self) -> tuple[int, int]:
        """The size and the stride of the branch's entries."""
        assert isinstance(self.selection.score, Probs)
        view = self.of.program.named(self.selection.score.branch).parts[0].view
        return (1, 1) if view is None else (view.size, view.stride)

    @cached_property
    def _branch_keys(self) -> BlockVectors:
        assert self.call.state is not None
        size, stride = self._entries
        entries, _ = document_entries(self.call.ids, size, stride)
        x = self.call.state[0].to(self.call.real)
        return BlockVectors(self.kind.blocks(stride), self.call.numbered(x, entries.number), self.few)

    def _rows_masses(self, at: slice) -> Tensor:
        """exp(logit - lse) of the branch's keys, given to members by their shares of tokens: [B, H, rows, members]."""
        call, mass, values, state = self.call, self.of.mass, self.call.mass, self.call.state
        assert isinstance(self.selection.score, Probs) and mass is not None and values is not None and state is not None
        (size, stride), position = self._entries, call.position[at].clamp(min=0)
        token = position.expand(self.shape.batch, -1)
        logits = self._dots(call.q[:, :, at].to(call.real), self._branch_keys, token)
        first, end = (x[:, position] for x in (self.documents.first, self.documents.end))
        number, _ = document_entries(call.ids, size, stride)
        nth = torch.arange(logits.shape[3], device=logits.device)
        index = number.number.to(torch.int64).gather(-1, first)[..., None] + nth
        q, own = position.view(1, 1, -1, 1), mass.program.only.scale
        scale: float | Tensor = self.shape.dim**-0.5 if call.given_scale is None else call.given_scale
        if call.given_scale is None and own is not None:
            scale = values.at(q=q).tensor(own)
        logits = logits * scale
        here = values.at(q=q, k=index.clamp(max=self.tokens - 1)[:, None], s=logits)
        if mass.logit is not None:
            logits = here.tensor(mass.logit).to(call.real)
        exists = (first[..., None] + nth * stride < end[..., None]) & self.holds[:, position, None]
        seen = here.tensor(mass.seen) & (exists & (call.position[at] >= 0)[:, None])[:, None]
        lse = state[1][:, :, at, None].to(call.real)
        found = torch.where(seen, torch.exp(logits - lse), 0).nan_to_num(0.0, posinf=0.0)
        length, largest = (end - first)[:, None, :, None], self.selection.score.largest
        return to_members(found, self._entries, (self.keys, self.members), length, largest)

    def _antidiagonal(self, stride: int) -> Tensor:
        """Groups of `stride` rows and keys: a softmax over each row group's candidates, summed over classes and
        members."""
        call, groups = self.call, self.kind.blocks(stride)
        assert self.classes is not None and self.of.groups is not None and call.groups is not None
        at = call.position.clamp(min=0)
        there = self.holds[:, at] & (call.position >= 0)
        number = torch.where(there, groups.number[:, at], groups.room)
        inside = self._of_classes(self.of.groups, call.groups, stride, number, groups)
        y = BlockVectors(groups, lambda token: self._concatenated(call.k, token, stride, flip=True), self.few)
        found = BlockSums(self.classes.room, self.classes.size // stride, largest=False)
        width = self._count(stride) * stride * self.shape.dim if self.few else groups.room
        step = max(1, STRIP[call.device.type] // (self.shape.batch * self.shape.heads * width))
        for low in range(0, groups.room, step):
            part = slice(low, min(low + step, groups.room))
            token = groups.place[:, part].clamp(max=self.tokens - 1)
            x = self._concatenated(call.q, token, stride, rows=True)
            logits = self._dots(x, y, token) * (call.scale(token) / stride)
            mass = softmax(logits, inside[:, :, part].expand(logits.shape))
            tall = self.keys // stride
            mass = pad(mass, (0, self.members * tall - mass.shape[3])).unflatten(3, (self.members, tall)).sum(4)
            exists = groups.place[:, part] < self.tokens
            found.add(mass, torch.where(exists, self.classes.number.gather(-1, token), self.classes.room))
        return found.found

    def _concatenated(self, x: Tensor, token: Tensor, size: int, flip: bool = False, rows: bool = False) -> Tensor:
        """[B, H, n, size * D] of the tokens from each of [B, n] on that its document has, one after the other (`flip`:
        the last first), zeros for others. rows: x [B, H, .., D] holds the rows of the call."""
        each = torch.arange(size, device=token.device)
        at = token[..., None] + (each.flip(0) if flip else each)
        there = at < self.documents.end.gather(-1, token)[..., None]
        if rows:
            at = at - self.shape.first_position(self.of.program)
            there = there & (at >= 0) & (at < self.shape.rows)
        at = at.clamp(0, x.shape[2] - 1).flatten(1)
        found = torch.where(there.flatten(1)[:, None, :, None], picked(x, at), 0).to(self.call.real)
        whole: Tensor = found.unflatten(2, (-1, size)).flatten(3)
        return whole


__all__ = ["DocumentSelector"]
