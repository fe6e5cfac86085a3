"""Computes the derived inputs of a call on its device, strip by strip: never all pairs at once, and without waiting.

How many pairs of a block pair are in a set, or which members of a row class are candidates, is counted over strips of
rows and keys. What follows from lengths alone is kept for the next call of the same lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, prod
from typing import Any, assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.derivation import (
    Alike,
    BlockMap,
    CallMembers,
    Chosen,
    Cut,
    Derivation,
    Document,
    DocumentBlocks,
    DocumentEnds,
    DocumentEntries,
    Draw,
    EntryMap,
    Extents,
    Gathering,
    Listed,
    Offsets,
    Order,
    OrderedRuns,
    Place,
    PresentRuns,
    Random,
    RowTiles,
    RunCount,
    RunEnds,
    RunExtents,
    Sorted,
    SpanList,
    TileList,
    TileMap,
    counted,
    document_of,
    read_beside,
)
from attndsl.derive import class_hash, coordinates_of, own_inputs
from attndsl.diagnostics import error
from attndsl.entry_maps import inside
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    CallShape,
    Coarse,
    Const,
    InputDecl,
    Program,
    Read,
    Scalar,
    Set,
    Var,
    reads,
    scalars,
    walk,
)
from attndsl.relation import Lowering
from attndsl.runtime.apart import counts_apart
from attndsl.runtime.call import dim_size
from attndsl.runtime.cuts import document_ends, make_cut
from attndsl.runtime.derived_types import derived_dtype
from attndsl.runtime.draws import last_drawn, members_drawn
from attndsl.runtime.entry_maps import entry_map
from attndsl.runtime.extents import of_extents
from attndsl.runtime.lasting import capturing, hold, lasting, stream_of, table_tensor
from attndsl.runtime.list_makers import ListMakers
from attndsl.runtime.permute import of_order
from attndsl.runtime.plans import as_four, call_members, chosen_members, list_size
from attndsl.runtime.row_tiles import row_tiles, table_size
from attndsl.runtime.runs import along, document_blocks, entry_input, ordered_runs, present_runs, run_input
from attndsl.runtime.spans import listed_in_order, span_list, span_room
from attndsl.runtime.strip_blocks import block_sums, gathered, pieces
from attndsl.runtime.tile_map import tile_map
from attndsl.runtime.values import Values, readable
from attndsl.simplify import fold

# Pairs that a call may look at for one derived input, and entries that this may have.
MAX_PAIRS = 1 << 32
MAX_ENTRIES = 1 << 28
# Pairs of one strip.
STRIP = {"cpu": 1 << 20, "cuda": 1 << 24}
# Calls of which derived inputs are kept, and the entries of one that is.
MAX_KEPT = 32
MAX_KEPT_ENTRIES = 1 << 26

Kept = dict[Any, dict[str, Tensor]]


@functools.lru_cache(maxsize=256)
def _condition(program: Program, heads: tuple[int, int], derivation: Derivation) -> Scalar:
    """What is counted for a derived input, as one condition on q and k."""
    pattern = counted(derivation)
    assert pattern is not None
    found = fold(Lowering(program, heads).predicate(pattern))
    return inside(found, program, derivation.present) if isinstance(derivation, EntryMap) else found


@dataclass(slots=True)
class Deriver:
    """The derived inputs of one kind of call of a derived program. `kept` is shared by the calls of a program."""

    program: Program
    shape: CallShape
    device: torch.device
    kept: Kept = field(default_factory=dict)
    # The call's own inputs, or tensors of their shapes and dtypes: of plans, sizes follow from these.
    given: Sequence[Tensor] = ()
    _own: tuple[InputDecl, ...] = field(init=False)
    _derived: tuple[InputDecl, ...] = field(init=False)
    _fixed: frozenset[str] = field(init=False)
    _conditions: dict[str, Scalar] = field(init=False)
    _tables: dict[str, Tensor] = field(init=False)
    _lists: ListMakers = field(init=False)

    def __post_init__(self) -> None:
        """Raises `PatternError` (A519) where a derived input would take too much of a call."""
        self._own = own_inputs(self.program)
        self._derived = self.program.inputs[len(self._own) :]
        self._lists = ListMakers(self.program, self.shape, self.device)
        self._tables = {table.name: table_tensor(table, self.device) for table in self.program.tables}
        heads = (self.shape.heads, self.shape.kv_heads)
        self._conditions = {}
        fixed = set[str]()
        for decl in self._derived:
            if (pattern := counted(decl.derivation)) is None or decl.derivation is None:
                continue
            entries = self._check(decl, pattern)
            self._conditions[decl.name] = _condition(self.program, heads, decl.derivation)
            written = [self._conditions[decl.name], *read_beside(decl.derivation)]
            if (document := document_of(decl.derivation)) is not None:
                written += [document.first, document.end, document.rows or document.end]
            nodes = walk(*written)
            follows = not any(isinstance(x, Arg) or (isinstance(x, Read) and x.input not in fixed) for x in nodes)
            if follows and entries <= MAX_KEPT_ENTRIES:
                fixed.add(decl.name)
        self._fixed = frozenset(fixed)

    def _check(self, decl: InputDecl, pattern: Set) -> int:
        """How many entries a derived input has."""
        unit = decl.derivation.unit if isinstance(decl.derivation, BlockMap | Draw) else 1
        q_len, k_len = self._lengths(unit)
        rows = self.shape.rows if isinstance(decl.derivation, EntryMap) else q_len - self._first_row(decl)
        heads = self.shape.heads if any(reads(e, "h", "g") for e in scalars(pattern)) else 1
        batch = self.shape.batch if any(reads(e, "b") for e in scalars(pattern)) else 1
        pairs, entries = batch * heads * rows * k_len, prod(self._size(decl))
        if isinstance(decl.derivation, Draw):
            drawn = decl.derivation.drawn
            classes = 1 if drawn.rows is None else -(-rows // drawn.rows)
            members = -(-k_len // drawn.keys)
            pairs = max(pairs, batch * self.shape.heads * classes * members)
            if drawn.document is not None and not drawn.rows == drawn.document.unit == 1:
                # Of each position its class's candidates.
                entries = max(entries, self._lead(decl) * k_len * members)
        if pairs > MAX_PAIRS or entries > MAX_ENTRIES:
            what = {BlockMap: "`coarsen` of a pattern that depends on data", Draw: "`random`"}.get(
                type(decl.derivation), "a pattern over a view that reads data at single keys"
            )
            raise error(
                "A519",
                f"{what} looks at {pairs:,} pairs of this call, and makes {entries:,} entries",
                self.program.span,
                help=f"at most {MAX_PAIRS:,} pairs and {MAX_ENTRIES:,} entries: take larger blocks or fewer rows",
            )
        return entries

    def examples(self) -> list[Tensor]:
        """Tensors of the shapes, strides and dtypes of the derived inputs, without memory."""
        return self._readable(
            [torch.empty(self._size(d), dtype=derived_dtype(d), device="meta") for d in self._derived]
        )

    def __call__(self, inputs: Sequence[Tensor], args: Sequence[int]) -> list[Tensor]:
        """The derived inputs, in their order, from a call's own inputs and arguments."""
        return self._readable(self.made(inputs, args, self._kept_here() if self._fixed else {}))

    def _readable(self, derived: list[Tensor]) -> list[Tensor]:
        return derived if self.shape.k_len else list(map(readable, derived))

    def made(
        self, inputs: Sequence[Tensor], args: Sequence[int], kept: Mapping[str, Tensor], lengths: Tensor | None = None
    ) -> list[Tensor]:
        """The derived inputs, of which some are kept. lengths: as in `Values`."""
        known = {**dict(zip((decl.name for decl in self._own), inputs, strict=True)), **kept}
        arguments = dict(zip(self.program.args, args, strict=True))
        # Lists of plans may need no values at all.
        values = functools.cache(lambda: self._values(known, arguments, lengths))
        for decl in self._derived:
            if decl.name not in known:
                if isinstance(decl.derivation, TileList | Gathering):
                    plan = known[decl.derivation.plan]
                    found = self._lists.made(decl, decl.derivation, plan, values, self._of_sizes)
                else:
                    found = self._made(decl, values())
                known[decl.name] = found
        return [known[decl.name] for decl in self._derived]

    def _values(self, known: Mapping[str, Tensor], arguments: Mapping[str, int], lengths: Tensor | None) -> Values:
        shape = self.shape
        h = self._range(0, shape.heads).view(1, -1, 1, 1)
        variables: dict[str, Any] = {
            "H": shape.heads, "G": shape.kv_heads, "D": shape.dim, "Dv": shape.v_dim,
            "b": self._range(0, shape.batch).view(-1, 1, 1, 1), "h": h, "g": h // (shape.heads // shape.kv_heads),
        }  # fmt: skip
        return Values(self.program, shape, self.device, known, self._tables, arguments, variables, lengths)

    def _kept_here(self) -> dict[str, Tensor]:
        """What calls of these sizes share on the current stream: what follows from them alone, made once."""
        key = (self.shape, self.device, stream_of(self.device))
        if key not in self.kept and len(self.kept) >= MAX_KEPT:
            self.kept.clear()
        kept = self.kept.setdefault(key, {})
        if not self._fixed <= kept.keys():
            kept |= lasting(self.device, self._fixed_inputs)
        if capturing(self.device):
            hold(tuple(kept.values()))
        return kept

    def _of_sizes(self) -> Values:
        """Of scalars that follow from the call's sizes alone."""
        return self._values({}, {}, None)

    def _fixed_inputs(self) -> dict[str, Tensor]:
        known = dict[str, Tensor]()
        for decl in self._derived:
            if decl.name in self._fixed:
                known[decl.name] = self._made(decl, self._values(known, {}, None))
        return known

    # ----------------------------------------------------------------------------------- derivations

    def _made(self, decl: InputDecl, values: Values) -> Tensor:
        match decl.derivation:
            case Offsets(input=name):
                return self._offsets(decl, values.tensors[name])
            case Extents(input=name):
                return of_extents(values.tensors[name], decl.derivation, self.shape.k_len, self._size(decl))
            case OrderedRuns():
                return ordered_runs(decl.derivation, values, self._size(decl))
            case PresentRuns(input=name, lengths=lengths, documents=documents):
                ids, doc = (
                    None if n is None else along(values.tensors[n], self.program.input(n), decl, self._size(decl))
                    for n in (name, documents)
                )
                count = None if lengths is None else values.tensors[lengths].clamp(0, self.shape.k_len)
                if values.lengths is not None:
                    own = values.lengths.view(-1)
                    count = own if count is None else torch.minimum(count, own)
                assert ids is not None
                return present_runs(ids, None if count is None else count.expand(self.shape.batch), doc)
            case RunEnds(input=name) | RunCount(input=name) | RunExtents(input=name):
                return self._of_runs(decl, decl.derivation, name, values)
            case DocumentEnds(input=name, ends=ends):
                return document_ends(values.tensors[name].expand(self._size(decl)), ends)
            case DocumentBlocks(input=name, size=size):
                return document_blocks(values.tensors[name].expand(self._size(decl)).contiguous(), size)
            case DocumentEntries(input=name):
                return entry_input(decl.derivation, values.tensors[name].expand(self._size(decl)).contiguous())
            case BlockMap():
                return self._map(decl, decl.derivation, values)
            case EntryMap():
                return self._entry_map(decl, decl.derivation, values)
            case Draw():
                return self._draw(decl, decl.derivation, values)
            case Chosen(plan=plan, level=level):
                return chosen_members(values.tensors[plan], self._size(decl)[-1], level)
            case Listed(plan=plan):
                return listed_in_order(values.tensors[plan], max(self._lengths(1)))
            case SpanList(listed=listed, offsets=offsets):
                tensors = values.tensors[listed], values.tensors[offsets]
                return span_list(decl, decl.derivation, *tensors, self.shape, self.program)
            case CallMembers(plan=name, ids=ids):
                own = as_four(values.tensors[name], self.program.input(name).dims)
                first = self.shape.first_position(self.program)
                made = call_members(own, values.tensors[ids], decl.derivation.keys, self.shape, first)
                return made.reshape(self._size(decl))
            case TileList() | Gathering():
                raise AssertionError("a list needs no values of its own")
            case Cut():
                q_len, k_len = self._lengths(1)
                return make_cut(decl, decl.derivation, values.at(Nq=q_len, Nk=k_len))
            case Order() | Sorted() | Place() | Alike():
                q_len, k_len = self._lengths(1)
                return of_order(decl, decl.derivation, values.at(Nq=q_len, Nk=k_len))
            case RowTiles(first=first):
                return row_tiles(decl.derivation, self.program.input(first), values.tensors[first], self.shape)
            case TileMap():
                q_len, k_len = self._lengths(1)
                return tile_map(decl, decl.derivation, values.at(Nq=q_len, Nk=k_len))
            case None:
                raise AssertionError(f"`{decl.name}` is given")
            case _:
                assert_never(decl.derivation)

    def _of_runs(self, decl: InputDecl, d: RunEnds | RunCount | RunExtents, name: str, values: Values) -> Tensor:
        ids = d.ids if isinstance(d, RunExtents) else d.input
        size = [*self._size(decl)[:-1], self.shape.k_len]
        x, of = (along(values.tensors[n], self.program.input(n), decl, size) for n in (name, ids))
        return run_input(decl, d, x, of)

    def _offsets(self, decl: InputDecl, ids: Tensor) -> Tensor:
        """Each token's distance from the first of its run of equal ids."""
        ids = ids.expand(self._size(decl))
        position = torch.arange(self.shape.k_len, dtype=torch.int32, device=self.device)
        if self.shape.k_len == 0:
            return position.expand(ids.shape)
        begins = pad(ids[..., 1:] != ids[..., :-1], (1, 0), value=True)
        return position - torch.where(begins, position, 0).cummax(-1).values

    def _map(self, decl: InputDecl, d: BlockMap, values: Values) -> Tensor:
        found = torch.zeros(self._size(decl), dtype=torch.bool, device=self.device)
        if d.document is not None:
            share = Fraction(repr(d.fraction)) if d.mode is Coarse.FRACTION else Fraction(1)
            for at, count, existing in self._counts_apart(decl, d.document, d.block_q, d.block_k, values):
                needed = (existing * share.numerator + share.denominator - 1) // share.denominator
                chosen = count > 0 if d.mode is Coarse.ANY else (count >= needed) & (existing > 0)
                found[..., at, : chosen.shape[-1]] = leading(chosen, decl)
            return found
        for blocks, count in self._counts(decl, d.block_q, d.block_k, values):
            chosen = count > 0 if d.mode is Coarse.ANY else count >= self._needed(d, blocks, count.shape[-1])
            found[..., blocks, :] = leading(chosen, decl)
        return found

    def _entry_map(self, decl: InputDecl, d: EntryMap, values: Values) -> Tensor:
        q_len, k_len = self._lengths(1)
        values = values.at(Nq=q_len, Nk=k_len)
        return self._entries_seen(decl, d, values, self.shape.first_position(self.program) if d.rows == 1 else 0)

    def _entries_seen(self, decl: InputDecl, d: EntryMap, values: Values, first: Any) -> Tensor:
        """A map of rows from `first` on, or of classes, as `entry_map` has it."""
        found = torch.zeros(self._size(decl), dtype=torch.bool, device=self.device)
        condition, strip = self._conditions[decl.name], STRIP[self.device.type] // self._lead(decl)
        for rows, entries, seen in entry_map(d, condition, values, first, (found.shape[-2], found.shape[-1]), strip):
            found[..., rows, entries] = leading(seen, decl)
        return found

    def _needed(self, d: BlockMap, blocks: slice, columns: int) -> Tensor:
        """How many pairs a block pair must have, int64 [row blocks, key blocks]: the last ones hold fewer."""
        share = Fraction(repr(d.fraction)) if d.mode is Coarse.FRACTION else Fraction(1)
        q_len, k_len = self._lengths(d.unit)
        last_rows = min(d.block_q, q_len - (blocks.stop - 1) * d.block_q)
        last_keys = k_len - (columns - 1) * d.block_k
        needed = torch.empty(blocks.stop - blocks.start, columns, dtype=torch.int64, device=self.device)
        for rows, at in ((d.block_q, slice(-1)), (last_rows, slice(-1, None))):
            needed[at, :-1] = ceil(share * rows * d.block_k)
            needed[at, -1] = ceil(share * rows * last_keys)
        return needed

    def _draw(self, decl: InputDecl, d: Draw, values: Values) -> Tensor:
        """Hash and index of the last member drawn for each row class; past every member where all are drawn. Or the
        members themselves."""
        found = torch.full(self._size(decl), -1, dtype=derived_dtype(decl), device=self.device)
        if (document := d.drawn.document) is not None:
            return self._draw_apart(found, decl, d.drawn, document, values)
        classes_of = found.unsqueeze(-2) if d.members and d.drawn.rows is None else found
        of_class = class_hash(d.drawn.seed, Var("q"))
        rows = decl.dims[-2]
        first = self.shape.first_position(self.program) if (rows.axis, rows.block) == (Axis.Q, 1) else 0
        block_q = max(1, self._lengths(d.unit)[0]) if d.drawn.rows is None else d.drawn.rows
        for classes, count in self._counts(decl, block_q, d.drawn.keys, values):
            at = self._range(classes.start, classes.stop).view(1, 1, -1, 1)
            of_rows = values.at(q=at).tensor(of_class)
            where = slice(classes.start - first, classes.stop - first)
            last = last_drawn(of_rows, count > 0, d.drawn.count)
            if d.members:
                last = members_drawn(of_rows, count > 0, last, d.drawn.count)
            classes_of[..., where, : last.shape[-1]] = leading(last, decl)
        return found

    def _draw_apart(self, found: Tensor, decl: InputDecl, drawn: Random, document: Document, values: Values) -> Tensor:
        """The same of each position, or row of the call, whose sequence it stands in has classes and members of its
        own."""
        place, _ = coordinates_of(document)
        of_class = class_hash(drawn.seed, Const(0) if drawn.rows is None else Binary("//", place, Const(drawn.rows)))
        of_call = decl.dims[-2].axis is Axis.Q
        first = self.shape.first_position(self.program) if of_call else 0
        for at, count, _ in self._counts_apart(decl, document, drawn.rows, drawn.keys, values):
            rows = values.at(q=self._range(at.start, at.stop).view(1, 1, -1, 1)).tensor(of_class)
            last = last_drawn(rows, count > 0, drawn.count)
            begin = max(at.start, first)
            if begin < at.stop:
                found[..., begin - first : at.stop - first, :] = leading(last[..., begin - at.start :, :], decl)
        return found

    # ---------------------------------------------------------------------------------------- strips

    def _counts(self, decl: InputDecl, block_q: int, block_k: int, values: Values) -> Iterator[tuple[slice, Tensor]]:
        """Some blocks of rows after the other, and how many pairs of each of their block pairs are in the counted set.

        The counts are int64 [batch or 1, heads or 1, row blocks, key blocks].
        """
        assert isinstance(decl.derivation, BlockMap | Draw)
        q_len, k_len = self._lengths(decl.derivation.unit)
        begin = self._first_row(decl) // block_q * block_q
        if begin >= q_len or k_len == 0:
            return
        condition = self._conditions[decl.name]
        values = values.at(Nq=q_len, Nk=k_len)
        # What is held for each pair, and for each member of a row class, under its heads and batch entries.
        lead = self._lead(decl)
        sparse = lead if reads(condition, "b", "h", "g") else max(1, lead // (block_q * block_k))
        strip = max(1, STRIP[self.device.type] // sparse)
        columns = list(pieces(0, k_len, block_k, strip))
        rows = pieces(begin, q_len, block_q, max(1, strip // min(k_len, strip)))

        def of_rows(low: int, high: int) -> Tensor:
            q_pos = self._range(low, high).view(-1, 1)

            def of_keys(first: int, end: int) -> Tensor:
                inside = values.at(q=q_pos, k=self._range(first, end)).tensor(condition)
                whole = torch.broadcast_shapes(inside.shape, (1, 1, high - low, end - first))
                return block_sums(inside.expand(whole), block_q, block_k)

            return torch.cat([count for _, count in gathered(columns, block_k, k_len, of_keys)], -1)

        yield from gathered(rows, block_q, q_len, of_rows)

    def _counts_apart(
        self, decl: InputDecl, document: Document, block_q: int | None, block_k: int, values: Values
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """As `counts_apart` has them, of the set that is counted for a derived input."""
        assert isinstance(decl.derivation, BlockMap | Draw)
        sizes = q_len, k_len = self._lengths(decl.derivation.unit)
        values, strip = values.at(Nq=q_len, Nk=k_len), STRIP[self.device.type] // self._lead(decl)
        yield from counts_apart(document, self._conditions[decl.name], (block_q, block_k), values, sizes, strip)

    def _lead(self, decl: InputDecl) -> int:
        """How many heads and batch entries an input tells apart."""
        return max(1, prod(dim_size(d, self.program, self.shape) for d in decl.dims if d.axis in (Axis.B, Axis.H)))

    def _first_row(self, decl: InputDecl) -> int:
        """The first coordinate whose row is read: those of the call are the last ones."""
        d = decl.derivation
        assert isinstance(d, BlockMap | Draw)
        if d.everywhere or (isinstance(d, Draw) and d.drawn.rows is None):
            return 0
        return max(0, self.shape.first_position(self.program)) // d.unit

    def _lengths(self, unit: int) -> tuple[int, int]:
        """Nq and Nk in coordinates."""
        return -(-self.shape.q_len(self.program) // unit), -(-self.shape.k_len // unit)

    def _range(self, low: int, high: int) -> Tensor:
        return torch.arange(low, high, device=self.device)

    def _plan(self, name: str) -> Tensor:
        decl = self.program.input(name)
        if decl.derivation is not None:
            return torch.empty(self._size(decl), dtype=derived_dtype(decl), device="meta")
        return {own.name: x for own, x in zip(self._own, self.given, strict=True)}[name]

    def _size(self, decl: InputDecl) -> list[int]:
        match decl.derivation:
            case Chosen(plan=plan):
                return [*self._plan(plan).shape[:-1], dim_size(decl.dims[-1], self.program, self.shape)]
            case CallMembers(plan=plan):
                own = as_four(self._plan(plan), self.program.input(plan).dims)
                heads = [own.shape[1]] if len(decl.dims) == 4 else []
                return [self.shape.batch, *heads, self.shape.rows, 2 * own.shape[3]]
            case TileList(plan=plan) | Gathering(plan=plan):
                dims = self.program.input(plan).dims
                return list_size(decl.derivation, decl, self._plan(plan), dims, self.shape)
            case Listed(plan=plan):
                return [*self._plan(plan).shape]
            case SpanList(listed=listed):
                slots = self._size(self.program.input(listed))[-1]
                lead = [dim_size(dim, self.program, self.shape) for dim in decl.dims[:-1]]
                return [*lead, span_room(decl.derivation, decl, slots, self.shape)]
            case TileMap(rows=rows, keys=keys):
                lead = [dim_size(dim, self.program, self.shape) for dim in decl.dims[:-2]]
                return [*lead, -(-self.shape.rows // rows), -(-self.shape.k_len // keys)]
            case RowTiles(first=first):
                return table_size(decl.derivation, self.program.input(first), self.shape)
            case _:
                return [dim_size(dim, self.program, self.shape) for dim in decl.dims]


def leading(x: Tensor, decl: InputDecl) -> Tensor:
    """[batch or 1, heads or 1, ...] with those of the two dimensions that the input has."""
    axes = [dim.axis for dim in decl.dims]
    if Axis.H not in axes:
        x = x[:, 0]
    return x if Axis.B in axes else x[0]
