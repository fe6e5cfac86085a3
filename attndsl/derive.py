"""Puts reads of derived inputs in the place of sets that no closed form holds.

    P on segment(ids)    P on offset_ids                        where offset_ids holds distances
    coarsen(P, B, mode)  coarsen(P, B, mode), its map a read    read only where P depends on data, or by `fraction`
    random(…)            { drawn(hash, member, …) } & among     where the last hash drawn is a read
    plan                 { chosen[row class, k // keys] }       where `chosen` says of every member whether it is

After it a program holds neither `Segment`, `Random` nor `Selected`, and every `Coarsen` has its map.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import assert_never

from attndsl.branches import Given, Part, View, Visible
from attndsl.derivation import (
    LEAST_ROWS,
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
    Segment,
    Sorted,
    SpanList,
    TileList,
    TileMap,
)
from attndsl.documents import over_documents
from attndsl.entry_maps import decided
from attndsl.extents import extent_dims, of_extents
from attndsl.left_tiles import within_left_tiles
from attndsl.linear import normalise
from attndsl.member_numbers import has_member, number, read, where_told
from attndsl.members import Lags, Placed, Runs, extent
from attndsl.program import (
    Axis,
    Binary,
    Blocks,
    Call,
    Choose,
    Coarsen,
    Compare,
    Complement,
    Const,
    Dim,
    InputDecl,
    Inter,
    Minus,
    On,
    Permuted,
    Program,
    Read,
    Scalar,
    Selected,
    Set,
    Type,
    Union,
    Var,
    Where,
    reads,
    scalars,
    walk,
)  # fmt: skip
from attndsl.simplify import fold
from attndsl.told_entries import over_listed, over_runs
from attndsl.unpack import document_of, present_tokens, unpacked

_ONE = Dim(Axis.CONST, size=1)


@functools.lru_cache(maxsize=1024)
def derive(program: Program, ragged: bool = False) -> Program:
    """The program with its derived inputs declared after its own; the program itself where it needs none.

    ragged: the batch entries of a call have lengths of their own, so what follows from lengths differs among them.
    """
    apart, present = program.packed is not None or program.lengths is not None, present_tokens(program)
    packed, program = program.packed, unpacked(program)
    deriver = _Deriver(program, ragged, present)
    parts = program.only.parts
    if not ragged and not apart:
        # Where sequences have ends of their own, so have their last extents.
        parts = tuple(replace(part, pattern=deriver.over(part)) for part in parts)
    parts = tuple(
        # In positions of a document until it is known which tokens entries are of.
        part if _in_documents(part) else replace(part, pattern=deriver.derived(part.pattern, _past(part)))
        for part in parts
    )
    parts = tuple(deriver.of_told(deriver.mapped(part, not ragged and not apart)) for part in parts)
    told = any(part.view is not None and part.view.told for part in program.only.parts)
    if not deriver.found and not told and not any(part.tiles for part in parts):
        return program
    if any(part.tiles for part in parts):
        begins = [None if packed is None else deriver.first_key(packed, part) for part in program.only.parts]
        parts = tuple(within_left_tiles(*x, program) for x in zip(parts, begins, strict=True))
    inputs = (*program.inputs, *deriver.found.values())
    return replace(program.with_branch(parts=parts), inputs=inputs)


def _in_documents(part: Part) -> bool:
    """Whether it is over entries of documents, whose pattern is written in positions of these."""
    return part.view is not None and part.view.packed is not None


def _past(part: Part) -> bool:
    """Whether its pattern is asked past the last token, in which extents may end."""
    return part.view is not None and not part.view.told


def with_needed(program: Program, used: Iterable[InputDecl]) -> Program:
    """A derived program without the derived inputs that neither a kernel (`used`) nor such an input reads."""
    pending, names = list(used), set[str]()
    while pending:
        decl = pending.pop()
        if decl.name not in names:
            names.add(decl.name)
            pending += [program.input(name) for name in read_by(decl.derivation)]
    return replace(program, inputs=tuple(d for d in program.inputs if d.derivation is None or d.name in names))


def own_inputs(program: Program) -> tuple[InputDecl, ...]:
    """The inputs that a call gives."""
    return tuple(decl for decl in program.inputs if decl.derivation is None)


def read_by(derivation: Derivation | None) -> set[str]:
    """The inputs that a derived one is made of."""
    match derivation:
        case OrderedRuns(ids=ids, place=place, present=count):
            read_of = (ids, place) if count is None else (ids, place, count)
            return {x.input for e in read_of for x in walk(e) if isinstance(x, Read)}
        case None | Offsets() | Extents() | PresentRuns() | DocumentEnds() | DocumentBlocks() | DocumentEntries():
            return set()
        case Chosen() | Listed():
            return set()
        case RunEnds(input=ids) | RunCount(input=ids) | RunExtents(ids=ids):
            return {ids}
        case TileList(plan=plan) | Gathering(plan=plan):
            return {plan}
        case SpanList(listed=listed, offsets=offsets):
            return {listed, offsets}
        case CallMembers(plan=plan, ids=ids):
            return {plan, ids}
        case RowTiles(first=first):
            return {first}
        case Alike(own=own, among=among):
            return {own, among}
        case EntryMap(operand=operand, present=count, ends=told):
            pattern: Set = Inter((operand, *(Where(x) for x in (count, *told) if x is not None)))
        case BlockMap(operand=operand, document=d):
            ends = () if d is None else (Where(d.first), Where(d.end))
            pattern = Inter((operand, *ends))
        case Draw(drawn=drawn):
            pattern = drawn
        case Cut(own=own, other=other):
            return {x.input for e in (own, other) for x in walk(e) if isinstance(x, Read)}
        case TileMap(cond=cond):
            return {x.input for x in walk(cond) if isinstance(x, Read)}
        case Order(key=e, same=same) | Sorted(key=e, same=same) | Place(position=e, same=same):
            found = {x.input for x in walk(e) if isinstance(x, Read)} | ({same} if same else set())
            match derivation:
                case Sorted(order=order):
                    return found | {order}
                case Place(own=name, among=among):
                    return found | {name, among}
                case _:
                    return found
        case _:
            assert_never(derivation)
    found = {x.input for e in scalars(pattern) for x in walk(e) if isinstance(x, Read)}
    return found | {p.input for p in _permutations(pattern)}


def _permutations(pattern: Set) -> list[Permuted]:
    """The inputs by which parts of a set are placed."""
    match pattern:
        case Where() | Selected():
            return []
        case Union(parts=parts) | Inter(parts=parts):
            return [x for part in parts for x in _permutations(part)]
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            return _permutations(a) + _permutations(b)
        case Complement(operand=p) | Coarsen(operand=p) | Random(among=p):
            return _permutations(p)
        case On(operand=p, place=place):
            return ([place] if isinstance(place, Permuted) else []) + _permutations(p)
        case _:
            assert_never(pattern)


@dataclass(frozen=True, slots=True)
class _Context:
    """Where a set stands: coordinates are positions // unit; `everywhere`, it is read at rows beyond the call's, and
    `past`, at keys past the last token."""

    unit: int = 1
    everywhere: bool = False
    past: bool = False


@dataclass(slots=True)
class _Deriver:
    program: Program
    ragged: bool
    # How many tokens are present, where `lengths` says so.
    present: Scalar | None
    found: dict[Derivation, InputDecl] = field(default_factory=dict)

    def over(self, part: Part) -> Set:
        """The pattern of a part, over a view with data of its entries in the place of that of single keys."""
        view = part.view
        if (
            view is None
            or view.size > view.stride
            or view.size == view.stride == 1
            or view.visible is not Visible.EVERY
            or view.told
        ):
            return part.pattern

        def declare(decl: InputDecl, largest: bool) -> str:
            return self._extents(decl, view.size, view.stride, largest)

        return of_extents(part.pattern, self.program, view.size, view.stride, declare)

    def mapped(self, part: Part, alike: bool) -> Part:
        """A part over a view with what only a map tells of its entries. alike: extents are those of all sequences."""
        view, queries = part.view, self.program.only.queries
        if view is None or view.told:
            return part

        def declare(decl: InputDecl, largest: bool) -> str:
            return self._extents(decl, view.size, view.stride, largest)

        def read(operand: Set) -> Read:
            return self.entry_map(operand, view, Dim(Axis.K, view.stride))

        return decided(self.here, part, queries, declare if alike else None, read, self.present is not None)

    def entry_map(self, operand: Set, view: View, entries: Dim, ends: tuple[Scalar, ...] = ()) -> Read:
        """The map of a set, for a view of so many entries, read at a row and an entry k. ends: as in `EntryMap`."""
        every, queries = view.visible is Visible.EVERY, self.program.only.queries
        rows = 1 if queries is None else queries.size
        beside = (Where(x) for x in (self.present, *ends) if x is not None)
        dims, lead = _lead(Inter((operand, *beside)), self.ragged)
        row = Dim(Axis.Q) if queries is None else self._absolute(rows)
        made = EntryMap(operand, view.size, view.stride, every, rows, self.present, ends)
        decl = self.declare(made, "seen", Type.BOOL, (*dims, row, entries))
        return Read(decl.name, (*lead, _quotient(Var("q"), rows), Var("k")), Type.BOOL)

    def _extents(self, decl: InputDecl, size: int, stride: int, largest: bool) -> str:
        """The name of the least, or the largest, of what an input holds of extents."""
        name = f"{'largest' if largest else 'least'}_{decl.name}"
        return self.declare(Extents(decl.name, size, stride, largest), name, decl.type, extent_dims(decl, stride)).name

    def of_told(self, part: Part) -> Part:
        """A part over a view that data tells, as one over entries of which each is a token of its own."""
        view = part.view
        if view is not None and view.packed is not None:
            return over_documents(self, part)
        if isinstance(view, Given) and view.picked is not None:
            return over_listed(self, part, view, view.picked)
        if isinstance(view, Given) and view.runs is not None:
            return over_runs(self, part, view, view.runs)
        return part

    @property
    def here(self) -> Program:
        """The program with the inputs that were found so far."""
        return replace(self.program, inputs=(*self.program.inputs, *self.found.values()))

    def derived(self, pattern: Set, past: bool = False) -> Set:
        """A set of tokens as it is derived. past: it is read at keys past the last token."""
        return self.set(pattern, _Context(everywhere=self.program.only.queries is not None, past=past))

    def first_key(self, doc: str, part: Part) -> Scalar:
        """The first key of a row's document, of a part of a packed call: a token, or of its view's entries."""
        if part.view is None:
            return document_of(self.program, doc, False, "q")
        ids = self.program.input(doc)
        made = DocumentBlocks(doc, part.view.stride)
        known = next((decl for decl in self.program.inputs if decl.derivation == made), None)
        decl = known or self.declare(made, f"entries_before_{ids.name}", Type.INT, ids.dims, sorted=True)
        return Read(decl.name, (*(Var("b") for _ in ids.dims[:-1]), Var("q")), Type.INT)

    def set(self, pattern: Set, at: _Context) -> Set:
        match pattern:
            case Where():
                return pattern
            case Union(parts=parts) | Inter(parts=parts):
                return replace(pattern, parts=tuple(self.set(p, at) for p in parts))
            case Minus(left=left, right=right):
                return replace(pattern, left=self.set(left, at), right=self.set(right, at))
            case Complement(operand=operand):
                return replace(pattern, operand=self.set(operand, at))
            case Choose(then=then, other=other):
                return replace(pattern, then=self.set(then, at), other=self.set(other, at))
            case On(operand=operand, place=Blocks(size=size)):
                return replace(pattern, operand=self.set(operand, replace(at, unit=at.unit * size)))
            case On(operand=operand, place=place):
                if isinstance(place, Segment):
                    place = Permuted(self.offsets(place.input), place.lead)
                return replace(pattern, operand=self.set(operand, replace(at, everywhere=True)), place=place)
            case Coarsen():
                return self._coarsen(pattern, at)
            case Random():
                return self._random(pattern, at)
            case Selected():
                return self._selected(pattern, at)
            case _:
                assert_never(pattern)

    def _selected(self, pattern: Selected, at: _Context) -> Set:
        of = pattern.members
        tokens = Var("Nk") if self.present is None else Call("clamp", (self.present, Const(0), Var("Nk")))
        keys, each = (pattern.keys, 1) if of is None else extent(of)
        plan = self.program.input(pattern.plan).dims
        last = self._absolute(keys) if isinstance(of, Lags) else Dim(Axis.K, keys, 0 if each == 1 else each)
        # Segments, and diagonals of a few rows, are as many as tokens: a map of them may be as large as all pairs.
        few = isinstance(of, Lags) and any(d.axis is Axis.Q and d.block < LEAST_ROWS for d in plan)
        few = few or (isinstance(of, Runs) and (of.order is None or any(d.axis is Axis.Q for d in plan)))
        derivation, dims = (
            Chosen(pattern.plan, keys, pattern.level, few),
            (*plan[:-1], last),
        )
        decl = self.declare(derivation, f"chosen_{pattern.plan}", Type.BOOL, dims)
        match of:
            case None:
                member = _quotient(Var("k"), keys)
            case Runs(order=order) if order is not None:
                member = self._in_order(of, order)
            case Runs():
                member = Binary("-", Var("k"), replace(read(of), input=self.offsets(of.input)))
            case _:
                member = number(of, "k")
        inside = None if of is None else has_member(of, tokens, at.past)
        if isinstance(of, Runs) and of.order is not None:
            inside = Compare(">=", member, Const(0))
        if pattern.member is not None:
            # Of a document, in which it was said already whether there is one.
            member, inside = pattern.member, None
        elif of is not None and at.past:
            member = where_told(of, member, tokens)
            inside = None if inside is None else where_told(of, inside, tokens)
        chosen = Where(Read(decl.name, (*pattern.index, member), Type.BOOL), pattern.span)
        return chosen if inside is None else Inter((Where(inside), chosen), pattern.span)

    def _in_order(self, of: Runs, order: Placed) -> Read:
        """The run of key k among tokens in the order of their places."""
        ids, place = read(of), read(order)
        dims, lead = _lead(
            Inter((Where(ids), Where(place), *(() if self.present is None else (Where(self.present),)))), self.ragged
        )
        made = OrderedRuns(ids, place, self.present)
        decl = self.declare(made, f"ordered_{of.input}", Type.INT, (*dims, Dim(Axis.K)))
        return Read(decl.name, (*lead, Var("k")), Type.INT)

    def offsets(self, name: str) -> str:
        return self.declare(Offsets(name), f"offset_{name}", Type.INT, self.here.input(name).dims).name

    def _coarsen(self, pattern: Coarsen, at: _Context) -> Set:
        if pattern.map is not None:
            return pattern  # Of a program that is derived already.
        operand = self.set(pattern.operand, replace(at, everywhere=True))
        if pattern.document is not None:
            return self._coarsen_apart(pattern, operand, pattern.document, at)
        block_q, block_k = pattern.block_q, pattern.block_k
        derivation = BlockMap(operand, block_q, block_k, pattern.mode, pattern.fraction, at.unit, at.everywhere)
        dims, lead = _lead(operand, self.ragged)
        dims = (*dims, self._absolute(block_q * at.unit), Dim(Axis.K, block_k * at.unit))
        decl = self.declare(derivation, "blocks", Type.BOOL, dims)
        index = (*lead, _quotient(Var("q"), block_q), _quotient(Var("k"), block_k))
        return replace(pattern, operand=operand, map=Read(decl.name, index, Type.BOOL))

    def _coarsen_apart(self, pattern: Coarsen, operand: Set, d: Document, at: _Context) -> Set:
        """Of a sequence of its own: in closed form where its operand has one in the sequence's coordinates."""
        block_q, block_k = pattern.block_q, pattern.block_k
        where = replace(d, alone=None, at=None)
        own = BlockMap(operand, block_q, block_k, pattern.mode, pattern.fraction, at.unit, True, where)
        dims, lead = _lead(Inter((operand, Where(d.first), Where(d.end))), self.ragged)
        size = block_k * d.unit * at.unit
        decl = self.declare(own, "blocks", Type.BOOL, (*dims, self._absolute(at.unit), Dim(Axis.K, size)))
        row, key = _place_of(d)
        block = _quotient(key, block_k)
        if d.first == Const(0):
            # Positions past the last, of extents or that an input gives, are the last one, as an index is clamped.
            last_row, last = (Binary("-", end, Const(1)) for end in (d.rows or d.end, d.end))
            row, block = Call("min", (row, last_row)), Call("min", (block, _quotient(last, d.unit * block_k)))
        found = Read(decl.name, (*lead, row, block), Type.BOOL)
        if d.alone is None:
            return Where(found, pattern.span)
        return replace(pattern, operand=d.alone, map=found)

    def _random(self, pattern: Random, at: _Context) -> Set:
        where = d = pattern.document
        of_rows = pattern.rows == 1 and (d is None or d.at is None)
        among = self.set(pattern.among, at if of_rows else replace(at, everywhere=True))
        row, dim = self._row_class(pattern.rows, at)
        place: Scalar = row
        key: Scalar = Var("k")
        if d is not None:
            own, _ = d.at or coordinates_of(d)
            row = Const(0) if pattern.rows is None else _quotient(own, pattern.rows)
            place, key = _place_of(d)
            where, dim = replace(d, at=None), Dim(Axis.Q if of_rows and d.unit == 1 and not at.everywhere else Axis.K)
        member = _quotient(key, pattern.keys)
        lead = [Var("h")]
        dims = [Dim(Axis.H)]
        ends = () if d is None else (d.first, d.end)
        if self.ragged or any(reads(e, "b") for e in (*scalars(among), pattern.seed, *ends)):
            lead, dims = [Var("b"), *lead], [Dim(Axis.B), *dims]
        derivation = Draw(replace(pattern, among=among, document=where), at.unit, at.everywhere)
        decl = self.declare(derivation, "drawn", Type.INT, (*dims, dim, Dim(Axis.CONST, size=2)))
        last_hash, last = (Read(decl.name, (*lead, place, Const(i)), Type.INT) for i in range(2))
        hashed = Call("mix64", (class_hash(pattern.seed, row), member))
        drawn = Where(Call("drawn", (hashed, member, last_hash, last)), pattern.span)
        return Inter((among, drawn), pattern.span) if pattern.written else drawn

    def _row_class(self, rows: int | None, at: _Context) -> tuple[Scalar, Dim]:
        if rows is None:
            return Const(0), _ONE
        if rows == at.unit == 1 and not at.everywhere:
            return Var("q"), Dim(Axis.Q)
        return _quotient(Var("q"), rows), self._absolute(rows * at.unit)

    def _absolute(self, block: int) -> Dim:
        """Blocks of all query positions: a `q` dimension without blocks holds the rows of the call alone."""
        return Dim(Axis.Q if self.program.align_start else Axis.K, block)

    def declare(
        self, derivation: Derivation, name: str, type: Type, dims: tuple[Dim, ...], sorted: bool = False
    ) -> InputDecl:
        if derivation not in self.found:
            taken = {decl.name for decl in (*self.program.inputs, *self.found.values())}
            numbered = (f"{name}_{i}" for i in range(len(taken) + 1))
            chosen = next(n for n in ([name] if name not in taken else numbered) if n not in taken)
            self.found[derivation] = InputDecl(chosen, type, dims, sorted=sorted, derivation=derivation)
        return self.found[derivation]


def class_hash(seed: Scalar, row: Scalar) -> Scalar:
    """64 bits for a row class of head h; hashed on with a member they say how early that member is drawn."""
    found: Scalar = Const(0)
    for x in (seed, Var("h"), row):
        found = Call("mix64", (found, x))
    return found


def coordinates_of(d: Document) -> tuple[Scalar, Scalar]:
    """Where a query and a key stand in a sequence of their own."""
    row, key = (normalise(_quotient(fold(Binary("-", Var(x), d.first)), d.unit)) for x in "qk")
    return row, key


def _place_of(d: Document) -> tuple[Scalar, Scalar]:
    """The position that stands for a query's coordinate in a sequence of its own, and the coordinate of a key."""
    if d.at is None:
        return Var("q"), coordinates_of(d)[1]
    row, key = d.at
    return normalise(Binary("+", d.first, Binary("*", Const(d.unit), row))), key


def _quotient(x: Scalar, size: int) -> Scalar:
    return x if size == 1 else Binary("//", x, Const(size))


def _lead(operand: Set, ragged: bool) -> tuple[tuple[Dim, ...], tuple[Scalar, ...]]:
    """The dimensions of batch and head that a set depends on, and where they are read. `ragged`: batch always."""
    written = tuple(scalars(operand))
    dims, index = list[Dim](), list[Scalar]()
    for axis, name, heads in ((Axis.B, "b", ("b",)), (Axis.H, "h", ("h", "g"))):
        if (ragged and axis is Axis.B) or any(reads(e, *heads) for e in written):
            dims.append(Dim(axis))
            index.append(Var(name))
    return tuple(dims), tuple(index)
