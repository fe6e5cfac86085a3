"""`packed` and `lengths` as ordinary sets: where a token's document begins is read, and positions count from there.

    packed doc    { first[q] == first[k] } & P, its q, k, Nq, Nk counted from first[q]     first, end: derived inputs
    … over a view which entries rows see is derived of a document alone, and then put in positions of the call
    lengths n     { q < n[b] and k < n[b] } & P, its Nq and Nk min(n[b], Nk)
    … over a view where n[b] > q, entries that begin before n[b], P asked of their nominal extents as ever

Sets that look at all pairs of a sequence (`coarsen`, `random`) are told which exist, and in documents where theirs
begin (`derivation.Document`). `first` does not decrease,
whatever the ids, so a document's tiles are found as those of sorted ids are (`cuts.py`), and what reads q - k alone
loses `first` again. The oracle does not know these sets: see `alone.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

from attndsl.branches import (
    Given,
    Part,
    Pick,
    Pool,
    Visible,
    rewritten,
)
from attndsl.coordinates import coordinate, length
from attndsl.derivation import Chosen, Document, DocumentBlocks, DocumentEnds, PresentRuns, Random, Segment
from attndsl.grid import Along
from attndsl.linear import normalise
from attndsl.member_numbers import first_token, in_document
from attndsl.members import Runs
from attndsl.present_rows import of_present_rows
from attndsl.program import (
    Axis,
    Binary,
    Blocks,
    Call,
    Choose,
    Coarse,
    Coarsen,
    Compare,
    Complement,
    Const,
    Dim,
    InputDecl,
    Inter,
    Logic,
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
    rebuild,
    substitute,
    walk,
)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def unpacked(program: Program) -> Program:
    """The program, of one branch, without the clauses, its patterns and scores saying what they say."""
    if program.packed is None and program.lengths is None:
        return program
    conditions = list[Scalar]()
    count: Scalar | None = None
    if program.lengths is not None:
        count = _count(program)
        conditions += [Compare("<", Var(x), count) for x in ("k" if program.align_start else "kq")]
    place = _of_rows(program)
    if place.document is not None:
        first, _ = place.document
        conditions.append(Compare("==", first, substitute(first, {"q": Var("k")})))
    branch = program.only
    scores = {
        name: None if e is None else place.scalar(e, place.names())
        for name, e in (
            ("scale", branch.scale),
            ("score", branch.score),
            ("sink", branch.sink),
            ("weights", branch.weights),
        )
    }
    queries = branch.queries
    if queries is not None and not program.align_start:
        # Its class sees what all of it would, a row that is not present nothing.
        queries = replace(queries, present=count, packed=program.packed)
        conditions = conditions[:1]
    parts = tuple(_part(part, place, conditions, count) for part in branch.parts)
    changed = program.with_branch(parts=parts, queries=queries, **scores)
    # Where positions count from a document's first token the call is no grid.
    grid = program.grid if program.packed is None else None
    inputs = (*program.inputs, *place.declared.values())
    return replace(changed, inputs=inputs, packed=None, lengths=None, grid=grid)


def of_output(program: Program) -> Program:
    """A program of branches without the clauses, its output saying what they say of it; its inputs with the ends of
    documents that are read. Rows of no document, and of tokens that are not present, have no output, nor have any of a
    sequence without tokens."""
    assert program.output is not None
    if program.packed is None and program.lengths is None:
        return program
    place = _of_rows(program)
    output = rewritten(program.output, lambda e: place.scalar(e, place.names()))
    there: list[Scalar] = [] if program.align_start else [Compare("<=", Const(0), Var("q"))]
    if program.lengths is not None:
        there.append(Compare("<", Const(0) if program.align_start else Var("q"), _count(program)))
    output = of_present_rows(output, there[0] if len(there) == 1 else Logic("and", tuple(there)))
    inputs = (*program.inputs, *place.declared.values())
    return replace(program, output=output, inputs=inputs, packed=None, lengths=None)


def of_present(e: Scalar, program: Program) -> Scalar:
    """A scalar of a program's selections with its lengths in those of the call."""
    place = _of_lengths(program)
    return place.scalar(e, place.names())


def standing(e: Scalar, program: Program, doc: str, count: Scalar, more: Names) -> Scalar:
    """A scalar of a document alone in positions of a call, whose program has its documents' ends for inputs.

    count: how many tokens are present. more: names beside those of positions and lengths, and which tokens they are.
    """
    place = _in_documents(program, program.input(doc), count)
    assert place.document is not None
    first, _ = place.document
    return place.scalar(e, place.names() | {name: Binary("-", token, first) for name, token in more.items()})


def in_documents(
    pattern: Set, program: Program, doc: str, count: Scalar
) -> tuple[Set, dict[DocumentBlocks | DocumentEnds | PresentRuns, InputDecl]]:
    """A set of a document alone in positions of a call, as `standing`, and the inputs to declare that it reads."""
    place = _in_documents(program, program.input(doc), count)
    return place.inside(pattern), place.declared


def document_of(program: Program, doc: str, ends: bool, position: str) -> Scalar:
    """The first token of a position's document, or one past its last, in a program that has these for inputs."""
    decl = next(x for x in program.inputs if x.derivation == DocumentEnds(doc, ends))
    return Read(decl.name, (*(Var("b") for _ in decl.dims[:-1]), Var(position)), Type.INT)


def _in_documents(program: Program, decl: InputDecl, count: Scalar) -> _Place:
    first, end = (document_of(program, decl.name, ends, "q") for ends in (False, True))
    place = _Place(program, count)
    return replace(place, document=(first, Call("min", (end, place.k_len))), ids=decl.name)


def present_tokens(program: Program) -> Scalar | None:
    """How many tokens `lengths` says are present, None where all are."""
    return None if program.lengths is None else _count(program)


def _count(program: Program) -> Scalar:
    assert program.lengths is not None
    decl = program.input(program.lengths)
    return Read(decl.name, tuple(Var("b") for _ in decl.dims), Type.INT)


def _of_lengths(program: Program) -> _Place:
    """Where sets stand for all that `lengths` says."""
    return _Place(program, present_tokens(program) or Var("Nk"))


def _of_rows(program: Program) -> _Place:
    """Where the sets and scalars of rows stand: within all that `lengths` says, and in each row's document."""
    place = _of_lengths(program)
    if program.packed is None:
        return place
    decl = program.input(program.packed)
    lead = tuple(Var("b") for _ in decl.dims[:-1])
    first, end = (Read(place.run_ends(decl.name, ends), (*lead, Var("q")), Type.INT) for ends in (False, True))
    place = replace(place, document=(first, Call("min", (end, place.k_len))), ids=decl.name)
    for size in sorted({dim.block for x in program.inputs for dim in x.dims if dim.apart and dim.tiles is None}):
        place.blocks_before(size)
    return place


def _part(part: Part, place: _Place, conditions: list[Scalar], count: Scalar | None) -> Part:
    pattern, view = part.pattern, part.view
    if view is not None and place.document is not None:
        assert not isinstance(view, Pick), "listed tokens are handed in"
        return replace(part, view=replace(place.told(view), packed=place.program.packed, present=count))
    pattern = place.inside(pattern)
    if view is not None and count is not None:
        if view.visible is Visible.EVERY:
            # Of an entry's nominal extent all tokens lie before this where the first one lies before n[b].
            last = Compare("<", Var("k"), Binary("+", count, Const(view.size - 1)))
            conditions = [last, *conditions[1:]]
        if isinstance(view, Given):
            view = place.told(view)
        if view.counted and not isinstance(view, Pick):
            view = replace(view, present=place.k_len)
    cond = conditions[0] if len(conditions) == 1 else Logic("and", tuple(conditions))
    return replace(part, pattern=Inter((Where(cond, part.span), pattern), part.span), view=view)


Names = dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where sets and scalars stand. `count`: how many tokens, or blocks or cells of them, are present, which Nk bounds.
    `document`: its first token and one past its last, of the input `ids`. `unit`: coordinates are so many of its tokens
    each; 0 where they do not count these in order. `placed`: they are those that data gives tokens, as many as there
    are in order. `declared`: the ends of runs that are read, and how many blocks lie before them, the call's documents
    first."""

    program: Program
    count: Scalar
    document: tuple[Scalar, Scalar] | None = None
    ids: str = ""
    unit: int = 1
    placed: bool = False
    declared: dict[DocumentBlocks | DocumentEnds | PresentRuns, InputDecl] = field(default_factory=dict, compare=False)

    @property
    def k_len(self) -> Scalar:
        if self.document is not None:
            return Binary("-", self.document[1], self.document[0])
        return Call("clamp", (self.count, Const(0), Var("Nk"))) if self.count != Var("Nk") else self.count

    def names(self) -> Names:
        """What the positions and lengths are, written in those of the call."""
        lengths: Names = {"Nk": self.k_len, "Nq": Var("Nq") if self.program.align_start else self.k_len}
        if self.document is None:
            return lengths
        first, _ = self.document
        return lengths | {x: Binary("-", Var(x), first) for x in "qk"}

    def inside(self, pattern: Set) -> Set:
        """A set that stands here."""
        return self.set(pattern, self.names())

    def set(self, pattern: Set, names: Names) -> Set:
        match pattern:
            case Where(cond=cond):
                return replace(pattern, cond=self.scalar(cond, names))
            case Union(parts=parts) | Inter(parts=parts):
                return replace(pattern, parts=tuple(self.set(x, names) for x in parts))
            case Minus(left=left, right=right):
                return replace(pattern, left=self.set(left, names), right=self.set(right, names))
            case Complement(operand=operand):
                return replace(pattern, operand=self.set(operand, names))
            case Choose(cond=cond, then=then, other=other):
                return replace(
                    pattern, cond=self.scalar(cond, names), then=self.set(then, names), other=self.set(other, names)
                )
            case On(operand=operand, place=Blocks(size=size)) if self.document is None:
                # Under a place Nk is what it counts already.
                known = self.count == Var("Nk")
                count = self.count if known else _block(self.count, size, True)
                return replace(pattern, operand=self._counting(count).inside(operand))
            case On(operand=operand, place=Blocks(size=size)):
                blocks = {x: _block(e, size, x in ("Nq", "Nk")) for x, e in _whole(names).items()}
                return replace(self, unit=self.unit * size).set(operand, blocks)
            case On(operand=operand, place=Along(grid=grid, axis=axis)) if self.document is not None:
                moved = {x: coordinate(grid, axis, names[x]) for x in "qk"}
                moved |= {x: length(grid, axis, names[x]) for x in ("Nq", "Nk")}
                return replace(self, unit=0).set(operand, moved)
            case On(operand=operand, place=Along(grid=grid, axis=axis)):
                # The size of an axis that is known stays.
                count = length(grid, axis, Call("max", (self.count, Const(0))))
                own = Var("Nk") if grid.sizes[axis] is not None else count
                return replace(pattern, operand=self._counting(own).inside(operand))
            case On(operand=operand, place=Permuted() | Segment()) if self.document is None:
                return replace(pattern, operand=self.inside(operand))
            case On(operand=operand, place=Permuted() | Segment() as at):
                moved = {x: self._placed(at, names, x) for x in "qk"}
                return replace(self, placed=True).set(operand, names | moved)
            # Which block is a sequence's last one a `Document` knows: positions past the end are taken for it.
            case Coarsen(operand=operand, mode=mode) if (
                self.document is not None or mode is Coarse.FRACTION or self.program.past_the_ends
            ):
                alone = operand if mode is not Coarse.FRACTION and _alike(operand) else None
                return replace(pattern, operand=self._in_order(operand, names), document=self._document(names, alone))
            case Coarsen(operand=operand, mode=mode):
                found, there = self.set(operand, names), self._exist(names)
                if mode is Coarse.ANY:
                    return replace(pattern, operand=Inter((there, found)))
                return replace(pattern, operand=Union((Complement(there), found)))
            case Random(among=among, seed=seed) if self.document is None:
                # Only candidates have to exist: what rows see of extents and classes that end later is not asked that.
                among = self.set(among, names)
                drawn = replace(
                    pattern, among=Inter((self._exist(names), among)), seed=self.scalar(seed, names), written=False
                )
                return Inter((among, drawn), pattern.span) if pattern.written else drawn
            case Random(among=among, seed=seed):
                of, seed = self._in_order(among, names), self.scalar(seed, names)
                drawn = replace(pattern, among=of, seed=seed, document=self._document(names))
                if not self.placed:
                    return drawn
                # What may be drawn is asked of coordinates, what is drawn then of the tokens placed there.
                return Inter((self.set(among, names), replace(drawn, written=False)), pattern.span)
            case Selected() if self.document is None:
                return pattern
            case Selected(plan=plan):
                assert self.document is not None
                index = tuple(self.scalar(e, names) if reads(e, "q") else e for e in pattern.index)
                row = self._read(Read(plan, (*index, Const(0)), Type.BOOL), *self.document)
                first, end = (substitute(e, {"q": Var("k")}) for e in self.document)
                member, inside = in_document(pattern, first, end, lambda name: self.run_ends(name, False))
                found = replace(pattern, index=row.index[:-1], member=member)
                return found if inside is None else Inter((Where(inside, pattern.span), found), pattern.span)
            case _:
                raise AssertionError(f"the front end lets no {type(pattern).__name__} stand here")

    def _document(self, names: Names, alone: Set | None = None) -> Document:
        """Where what looks at all pairs stands; of padded sequences, whose blocks begin where those of a call do, all
        of a sequence is one document."""
        assert self.unit, "what looks at all pairs stands on coordinates in order"
        first, end = self.document or (Const(0), self.k_len)
        if not self.placed:
            return Document(first, end, self.unit, alone, rows=Var("Nq") if self.program.align_start else None)
        last = Binary("-", _block(self.k_len, self.unit, True), Const(1))
        row, key = (Call("clamp", (names[x], Const(0), last)) for x in "qk")
        return Document(first, end, self.unit, alone, (row, key))

    def _in_order(self, pattern: Set, names: Names) -> Set:
        """What is asked of all coordinates, each as the first of the tokens that it stands for in order."""
        if not self.placed:
            return self.set(pattern, names)
        own = {x: _block(e, self.unit, x in ("Nq", "Nk")) for x, e in _whole(self.names()).items()}
        return replace(self, placed=False).set(pattern, own)

    def _placed(self, place: Permuted | Segment, names: Names, x: str) -> Scalar:
        """A coordinate that an int input gives the token of `names[x]`, or its distance in its segment."""
        assert self.document is not None
        first, end = self.document
        lead = tuple(self.scalar(e, names) for e in place.lead)
        if isinstance(place, Permuted):
            return self._read(Read(place.input, (*lead, names[x]), Type.INT), first, end)
        token = self._within(names[x], first, end)
        # A segment begins with its document at the earliest.
        begin = Call("max", (Read(self.run_ends(place.input, False), (*lead, token), Type.INT), first))
        return normalise(Binary("-", token, begin))

    def told(self, view: Given | Pool) -> Given | Pool:
        """A view that data tells, of the tokens that are present, and of each document apart."""
        if isinstance(view, Given) and view.picked is not None:
            picked = view.listed or view.picked
            weight = None if picked.weight is None else self.scalar(picked.weight, self.names())
            return replace(view, picked=replace(picked, weight=weight), listed=None, present=self.k_len)
        if view.runs is None:
            return view
        ids = self.program.input(view.runs.input)
        d = PresentRuns(ids.name, self.program.lengths, self.ids or None)
        lead, dims = view.runs.lead, ids.dims
        of_batch = d.lengths is not None or d.documents is not None
        if of_batch and Dim(Axis.B) not in dims:
            lead, dims = (Var("b"), *lead), (Dim(Axis.B), *dims)
        return replace(view, runs=Runs(self._input(d, f"present_{d.input}", dims).name, lead))

    def run_ends(self, name: str, ends: bool) -> str:
        """The input that holds the first token of each token's run of equal entries of an input, or one past its
        last."""
        own = f"{'end' if ends else 'first'}_{name}"
        return self._input(DocumentEnds(name, ends), own, self.program.input(name).dims, sorted=True).name

    def blocks_before(self, size: int) -> InputDecl:
        """The input that holds how many blocks documents before each token's have."""
        d, dims = DocumentBlocks(self.ids, size), self.program.input(self.ids).dims
        return self._input(d, f"blocks_{self.ids}_{size}", dims, sorted=True)

    def _input(
        self, d: DocumentBlocks | DocumentEnds | PresentRuns, name: str, dims: tuple[Dim, ...], sorted: bool = False
    ) -> InputDecl:
        known = next((x for x in self.program.inputs if x.derivation == d), None)
        if known is not None:
            return known
        if d not in self.declared:
            taken = {decl.name for decl in (*self.program.inputs, *self.declared.values())}
            while name in taken:
                name += "_"
            self.declared[d] = InputDecl(name, Type.INT, dims, sorted=sorted, derivation=d)
        return self.declared[d]

    def _exist(self, names: Names) -> Where:
        """The pairs of tokens, or what stands for them here, that exist."""
        return Where(Logic("and", tuple(Compare("<", Var(x), names[n]) for x, n in (("q", "Nq"), ("k", "Nk")))))

    def _counting(self, count: Scalar) -> _Place:
        return replace(self, count=count)

    def scalar(self, e: Scalar, names: Names) -> Scalar:
        """A scalar in the positions of the call."""

        def step(x: Scalar) -> Scalar:
            match x:
                case Var(name=name) if name in names:
                    return names[name]
                case Read() if self.document is not None:
                    return self._read(x, *self.document)
                case Read() if self.count != Var("Nk"):
                    return self._read_present(x)
                case _:
                    return x

        found = rebuild(e, step)
        return rebuild(found, _settled) if self.document is not None else found

    def _read(self, read: Read, first: Scalar, end: Scalar) -> Read:
        """An entry of an input over tokens: the document's own, its index held within the document."""
        dims = self.program.input(read.input).dims
        index = list(read.index)
        of_members = isinstance(self.program.input(read.input).derivation, Chosen)
        for i, (dim, x) in enumerate(zip(dims, read.index, strict=True)):
            if dim.tiles is not None:
                index[i] = self._within(first_token(dim.tiles, x), first, end)
            elif dim.apart:
                index[i] = self._numbered(x, dim.block, first, end)
            elif dim.axis in (Axis.Q, Axis.K) and not (of_members and dim.axis is Axis.K):
                index[i] = self._within(x, first, end)
        return replace(read, index=tuple(index))

    def _read_present(self, read: Read) -> Read:
        """An entry of an input over tokens, its index held within those that are present."""
        index = list(read.index)
        for i, (dim, x) in enumerate(zip(self.program.input(read.input).dims, read.index, strict=True)):
            own = Var("q"), Var("k"), *(_block(Var(name), dim.block, False) for name in "qk")
            if (dim.axis is Axis.K or dim == Dim(Axis.Q)) and x not in own:
                last = Binary("-", _block(self.count, dim.block, True), Const(1))
                index[i] = Call("clamp", (x, Const(0), last))
        return replace(read, index=tuple(index))

    def _numbered(self, x: Scalar, size: int, first: Scalar, end: Scalar) -> Scalar:
        """The number among those of the call of a document's block x, held within the document."""
        made = self.blocks_before(size)
        before = Read(made.name, (*(Var("b") for _ in made.dims[:-1]), Var("q")), Type.INT)
        if x not in [_block(Binary("-", Var(token), first), size, False) for token in "qk"]:
            last = _block(Binary("-", Binary("-", end, first), Const(1)), size, False)
            x = Call("clamp", (x, Const(0), last))
        return Binary("+", before, x)

    def _within(self, x: Scalar, first: Scalar, end: Scalar) -> Scalar:
        """The token of the call at a document's position x, held within the document."""
        at = normalise(Binary("+", x, first))
        inside = isinstance(at, Var) and at.name in ("q", "k")
        return at if inside else Call("clamp", (at, first, Binary("-", end, Const(1))))


def _alike(pattern: Set) -> bool:
    """Whether a set is the same in every sequence of a length: it reads nothing at tokens, and draws nothing."""
    match pattern:
        case Where(cond=cond):
            return not any(isinstance(x, Read) and reads(x, "q", "k") for x in walk(cond))
        case Union(parts=parts) | Inter(parts=parts):
            return all(map(_alike, parts))
        case Minus(left=a, right=b):
            return _alike(a) and _alike(b)
        case Choose(cond=cond, then=a, other=b):
            return all(map(_alike, (Where(cond), a, b)))
        case Complement(operand=operand) | On(operand=operand, place=Blocks()):
            return _alike(operand)
        case _:
            return False


def _whole(names: Names) -> Names:
    return {x: names.get(x, Var(x)) for x in ("q", "k", "Nq", "Nk")}


def _block(e: Scalar, size: int, length: bool) -> Scalar:
    """A position's block; of a length, how many blocks it comes to."""
    whole = Binary("+", e, Const(size - 1)) if length else e
    return Binary("//", whole, Const(size))


def _settled(e: Scalar) -> Scalar:
    """An integer expression in its normal form: what a document's first token adds and takes away is gone."""
    match e:
        case Binary(type=Type.INT):
            return normalise(e)
        case Compare(left=a, right=b) if a.type is b.type is Type.INT:
            return normalise(e)
        case _:
            return e
