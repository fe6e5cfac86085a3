"""Makes the plan of a selection of a packed call in torch operators: row classes and members are each document's own.

A document that is no longer than a member has one, and of longer ones there are few (`document_blocks.Kind`): what is
scored is as many members as a batch of the documents would have, strip by strip of each kind (`document_strips.py`).
Members count from their document's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from attndsl.branch_mass import BranchMass
from attndsl.branches import Pool as ViewPool
from attndsl.branches import PoolFunction
from attndsl.capacity import budgets, capacity
from attndsl.derivation import BlockMap, Draw
from attndsl.members import Lags, Tiles, extent
from attndsl.program import CallShape, Inter, Program, Read, Scalar, Set, Var, walk
from attndsl.runtime.call import present_lengths
from attndsl.runtime.derive import Deriver
from attndsl.runtime.derive_ragged import RaggedDeriver
from attndsl.runtime.document_blocks import BlockSums, Documents, Kind, lengths, room
from attndsl.runtime.document_groups import DocumentGroups, labels
from attndsl.runtime.document_members import InBlocks, InGroups, InLags, Members
from attndsl.runtime.document_strips import OfKind
from attndsl.runtime.document_vectors import picked
from attndsl.runtime.groups import Groups
from attndsl.runtime.lasting import number_tensor, table_tensor
from attndsl.runtime.masses import leading
from attndsl.runtime.ranking import Ranking
from attndsl.runtime.runs import Runs, document_blocks, document_entries, pooled_runs
from attndsl.runtime.select import (
    check_pairs,
    check_together,
    check_tokens,
    checked_masses,
    empty_plan,
    members_of,
)
from attndsl.runtime.strips import State
from attndsl.runtime.touched import Touched, call_values
from attndsl.runtime.values import Values
from attndsl.selection import WHOLE, Antidiagonal, Given, Pool, Probs, Selection, Top, Vectors
from attndsl.unpack import present_tokens, standing

# Members that are no blocks may have a token each: a document of no more tokens has few.
_SHORT = 64


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
    # A decode: sequences have lengths of their own, and the shape's is the most that one may have.
    ragged: bool = False
    ranking: Ranking = field(init=False)
    capacity: int = field(init=False)
    among: Touched = field(init=False)
    always: Touched | None = field(init=False, default=None)
    # The same of whole classes of rows, where that is one condition.
    among_classes: Touched | None = field(init=False, default=None)
    always_classes: Touched | None = field(init=False, default=None)
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
        keys = selection.keys if selection.members is None else 1
        self.among = self._touched(selection.among, keys)
        self.among_classes = self._of_classes(selection.among, keys)
        if selection.members is not None:
            rows = shape.rows if self.among_classes is None else self.classes(_SHORT + 1)
            check_pairs(selection, shape, self.among.condition, rows)
        if selection.always is not None:
            forced = Inter((selection.among, selection.always))
            self.always, self.always_classes = self._touched(forced, keys), self._of_classes(forced, keys)
        if isinstance(score, Antidiagonal):
            self.groups = self._touched(selection.among, score.stride)
        if isinstance(score, Given):
            self.value = self._standing(score.value)
        if selection.scale is not None:
            self.scale = self._standing(selection.scale)
        if isinstance(score, Probs):
            self.mass = checked_masses(program, selection, shape, self.ragged)[0]
            make = RaggedDeriver if self.ragged else Deriver
            self.mass_deriver = make(self.mass.program, shape, self.device, given=self.given)

    @property
    def short(self) -> int:
        """Tokens of a document that has few members."""
        return self.selection.keys if self.selection.members is None else _SHORT

    def _ranked(self) -> int:
        """How many members row classes of a head have, of the kind of documents that have the most."""
        tokens, rows = self.shape.k_len, self.selection.rows
        return max(
            (self.shape.rows if rows == 1 else self.classes(least)) * self.columns(min(most, tokens))
            for least, most in lengths(self.short, tokens)
        )

    def classes(self, least: int) -> int:
        """How many classes of several rows documents of at least so many tokens may have."""
        tokens, of = self.shape.k_len, self.selection.row_tiles
        if of is None:
            assert self.selection.rows is not None
            return room(tokens, self.selection.rows, least)
        size, each = extent(of)
        return min(tokens, (tokens // size + tokens // least + 1) * each)

    def columns(self, tokens: int) -> int:
        """How many members a document of so many tokens may have."""
        return min(tokens, self.numbers(tokens))

    def numbers(self, tokens: int) -> int:
        """How many numbers these may have: where tokens run tile by tile, more than there are tokens."""
        size, each = self.selection.extent
        return -(-tokens // size) * each

    def _of_classes(self, pattern: Set, keys: int) -> Touched | None:
        """What touches classes of rows that the call holds all of, where integer sets say it in closed form."""
        selection, shape = self.selection, self.shape
        rows, whole = selection.rows, not self.ragged and shape.rows == shape.k_len
        if (
            not whole
            or rows in (None, 1, WHOLE)
            or selection.row_tiles is not None
            or isinstance(selection.members, Lags)
        ):
            return None
        assert rows is not None
        found = self._touched(pattern, keys, rows)
        read = (found.program.input(x.input).derivation for x in walk(found.condition) if isinstance(x, Read))
        return None if any(isinstance(d, BlockMap | Draw) for d in read) else found

    def _touched(self, pattern: Set, keys: int, rows: int = 1) -> Touched:
        score = self.selection.score
        more = [e for e in (score.value if isinstance(score, Given) else None, self.selection.scale) if e is not None]
        return Touched.of(self.program, pattern, rows, keys, self.shape, self.device, self.given, self.ragged, more)

    def _standing(self, e: Scalar) -> Scalar:
        """A scalar of a document alone in positions of the call, of which q is one of the document."""
        assert self.program.packed is not None
        return standing(e, self.among.program, self.program.packed, present_tokens(self.program) or Var("Nk"), {})

    def __call__(
        self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None = None,
        state: State | None = None, lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The plan: int32 [B, H', R, C], or uint8 [B, H', R, M] where nothing bounds it, of the members of documents. R
        counts the call's rows, or the classes of all documents, one document after the other. lengths: of a decode,
        int64 [B, 1, 1, 1]."""
        plan = empty_plan(self.program, self.selection, self.shape, self.device)
        plan.fill_(-1 if self.selection.bounded else 0)
        if self.shape.batch * self.shape.rows * self.shape.k_len:
            call = Call(self, q, k, inputs, args, scale, state, lengths)
            for kind in call.documents.kinds(self.short):
                OfKind(call, kind).write(plan)
        return plan


class Call:
    """The tensors of one call of a selector."""

    def __init__(
        self, of: DocumentSelector, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, state: State | None, lengths: Tensor | None,
    ) -> None:  # fmt: skip
        program, shape = of.program, of.shape
        assert program.packed is not None
        self.of, self.q, self.k, self.state, self.shape, self.device = of, q, k, state, shape, of.device
        self.real = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.inputs = dict(zip((decl.name for decl in program.inputs), inputs, strict=True))
        present = present_lengths(program, shape, inputs, lengths)
        self.present = None if present is None else present.view(-1)
        self.ids = self.inputs[program.packed].expand(shape.batch, -1).contiguous()
        self.documents = Documents.of(self.ids, self.present)
        self.among = of.among.values(inputs, args, of.tables, lengths)
        self.always, self.among_classes, self.always_classes, self.groups = (
            None if touched is None else touched.values(inputs, args, of.tables, lengths)
            for touched in (of.always, of.among_classes, of.always_classes, of.groups)
        )
        self.mass: Values | None = None
        if of.mass is not None and of.mass_deriver is not None:
            self.mass = call_values(of.mass.program, shape, of.mass_deriver, inputs, args, of.tables, lengths)
        self.given_scale = scale
        # The position of the call's first row, [B, 1], and of all, [B, rows]; those before the first token see nothing.
        first = torch.full_like(self.documents.first[:, :1], shape.first_position(program))
        self.first_row = first if lengths is None else lengths.view(-1, 1) - shape.rows
        self.position = self.first_row + torch.arange(shape.rows, device=self.device)

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

    def grouped(self, v: Vectors, groups: DocumentGroups) -> Tensor:
        """[B, heads, tokens, D] of groups of keys, as `vectors` has them; NaN of none."""
        assert v.pool is not None, "a member of any number of tokens has no vector of its own"
        x = self.k if v.source == "K" else leading(self.of.program.input(v.source), self.inputs[v.source])
        x = x.expand(self.shape.batch, -1, self.shape.k_len, -1).to(self.real)
        return Groups.labelled(groups.of_token, groups.tokens).pooled(x, v.pool, self.of.key)

    @cached_property
    def _key_groups(self) -> DocumentGroups:
        of = self.of.selection.members
        assert of is not None and not isinstance(of, Lags)
        count = members_of(self.of.program, self.of.selection, self.shape)
        return DocumentGroups.of(self.documents, *labels(of, self.among, self.documents), count)

    def members(self, kind: Kind) -> Members:
        """What documents of a kind choose among."""
        selection = self.of.selection
        match selection.members:
            case None:
                return InBlocks(kind, selection.keys)
            case Lags(size=size):
                return InLags(kind, size)
            case _:
                count = members_of(self.of.program, selection, self.shape)
                most = self.of.columns(min(kind.most, self.shape.k_len))
                return InGroups(kind, self._key_groups, most, count)

    def classes(self, kind: Kind) -> Classes:
        """What documents of a kind choose for, where these are several rows each."""
        selection, tokens, count = self.of.selection, self.shape.k_len, self.of.classes(kind.least)
        if selection.row_tiles is not None:
            return self._tiles(kind, selection.row_tiles, count)
        assert selection.rows is not None
        of = kind.blocks(selection.rows)
        begin = of.place.clamp(max=tokens - 1)
        place = document_blocks(self.ids, of.size).to(torch.int64).gather(-1, begin)
        place = place + (begin - self.documents.first.gather(-1, begin)) // of.size
        return Classes(of.number, begin, of.place < tokens, place, of.size)

    def _tiles(self, kind: Kind, tiles: Tiles, count: int) -> Classes:
        label, valid = labels(tiles, self.among, self.documents)
        size, each = extent(tiles)
        of = DocumentGroups.of(self.documents, label, valid & kind.holds[:, None], -(-self.shape.k_len // size) * each)
        begin, exist = of.token[:, 0, :count], of.place[:, 0, :count] < of.tokens
        most = tiles.most(self.shape.k_len)
        return Classes(of.of_token[:, 0].clamp(max=count), begin, exist, begin, most, in_order=False)


@dataclass(frozen=True, slots=True)
class Classes:
    """Classes of the rows of documents of one kind. of_token: int64 [B, tokens], that of each token, `room` of one of
    none. begin, exist, place: [B, room], the first token of each, whether there is one, and where it stands in a plan.
    rows: at most those of one, which follow one another if `in_order`."""

    of_token: Tensor
    begin: Tensor
    exist: Tensor
    place: Tensor
    rows: int
    in_order: bool = True

    @property
    def room(self) -> int:
        return self.begin.shape[-1]

    def sums(self, largest: bool) -> BlockSums:
        """What adds up numbers of rows for each class, or finds the largest."""
        return BlockSums(self.room, self.rows, largest, self.in_order)


__all__ = ["Call", "Classes", "DocumentSelector"]
