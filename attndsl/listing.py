"""Where a pattern lies within what a plan chooses, its tiles are listed: others are not visited.

A plan says for each row class which members of the keys it chooses. With tiles inside one row class and one member the
plan says it of tiles, so kernels read their tiles from lists that the runtime makes of it, and in those the selection
holds: which of them are full, and the mask of the rest, are those of the pattern with the selection for true.

Where each row chooses for itself, rows that chose the same member are gathered into tiles: the keys are then in order,
and the results of a row's members are merged (`Gathered`).

What is chosen of a document is listed as the blocks of the call that hold a part of it (`derivation.CallMembers`), and
each pair is asked all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from attndsl.derivation import (
    CallMembers,
    Chosen,
    DocumentEnds,
    Draw,
    Gathering,
    Listed,
    Offsets,
    SpanList,
    TileList,
    TileMap,
)
from attndsl.derive import derive, read_by
from attndsl.isl_sets import where_param
from attndsl.left_tiles import reads_tiles
from attndsl.program import (
    Axis,
    Binary,
    Call,
    CallShape,
    Const,
    Dim,
    InputDecl,
    Program,
    Read,
    Scalar,
    Type,
    Var,
    reads,
    rebuild,
    walk,
)  # fmt: skip
from attndsl.relation import Relation
from attndsl.runs import PLACE, Side, TileRuns, listed_runs, span_runs
from attndsl.simplify import fold

# The largest tile, and the multiple of positions at which row classes and tiles begin together.
EVEN = 128
# The smallest tile that tensor cores take.
LEAST = 16


@dataclass(frozen=True, slots=True)
class EntryTiles:
    """Tiles of keys that are entries of documents: reads of the first token of tile `k_tile`, of one past its last, and
    of these two of its document."""

    first: Read
    end: Read
    document: Read
    stop: Read

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.first, self.end, self.document, self.stop


@dataclass(frozen=True, slots=True)
class Gathered:
    """Query tiles of rows that chose the same member of the keys, of `keys` tokens, in `plan`.

    `entry`: the read, at PLACE, of the derived input that lists them (`derivation.Gathering`).
    """

    entry: Read
    plan: str
    keys: int


@dataclass(frozen=True, slots=True, eq=False)
class Listable:
    """A selection or draw that a pattern lies in: the atom that stands for it, the condition behind it and the plan's
    units.

    `keys`: those of a member, its entries over a view, which has one every `stride` tokens. `rows` of a table of tiles
    are of the call's, wherever it begins. `complement`: the pattern lies outside of it. `offsets`: of segments the read
    that tells how far a token is from the first of its own; they have any number of tokens, so that no tile lies
    inside. `part`: members are blocks of the call that hold a part of what is chosen.
    """

    atom: str
    read: Scalar
    plan: InputDecl
    rows: int | None
    keys: int
    level: int | None
    stride: int = 1
    complement: bool = False
    offsets: Read | None = None
    part: bool = False

    def fits(self, block_q: int, block_k: int, even_start: bool) -> bool:
        """Whether tiles of these sizes lie in one row class and one member each."""
        return self.fits_rows(block_q, even_start) and self.offsets is None and self.keys % block_k == 0

    def fits_rows(self, block_q: int, even_start: bool) -> bool:
        """Whether query tiles of this size lie in one row class each."""
        single = self.rows == block_q == 1
        even_start = even_start or self.plan.tile > 0
        return self.rows is None or single or (even_start and self.rows % block_q == 0 and EVEN % block_q == 0)

    def gathers(self, *blocks_k: int) -> bool:
        """Whether rows that choose for themselves are gathered, with key tiles of these sizes."""
        lists = self.level is None and not self.complement and self.offsets is None
        return self.rows == self.stride == 1 and lists and all(self.keys % block == 0 for block in blocks_k)

    @property
    def unit(self) -> int:
        """The largest power of two that divides a member: tiles of so many keys lie inside members."""
        return self.keys & -self.keys

    def shared(self, relation: Relation) -> bool:
        """Whether the heads of a key head have one list."""
        by_head = any(d.axis is Axis.H for d in self.plan.dims)
        return not by_head and not any(reads(e, "h") for e in relation.uniform.values())

    def within(self, relation: Relation) -> Relation:
        """The relation where the selection holds, or of a complement does not."""
        if self.part:
            return relation
        atoms = {name: e for name, e in relation.atoms.items() if name != self.atom}
        return replace(relation, pairs=where_param(relation.pairs, self.atom, int(not self.complement)), atoms=atoms)

    def assumed(self, written: Scalar) -> Scalar:
        """A condition where the selection holds, or of a complement does not."""
        if self.part:
            return written
        return fold(rebuild(written, lambda e: Const(not self.complement) if e == self.read else e))

    def listed(
        self, program: Program, runs: TileRuns, block_q: int, block_k: int, side: Side, marks: int = 0
    ) -> tuple[Program, TileRuns]:
        """The runs of the tiles that the plan chooses, of those in `runs`; the program declares their lists."""
        program = self._with_plan(program)
        mapped, of_keys = isinstance(self.plan.derivation, TileMap) or self.plan.tile > 0, side is Side.KEY
        found = TileList(
            self.plan.name,
            self.rows,
            self.keys,
            block_q,
            block_k,
            of_keys,
            runs,
            self.level,
            mapped,
            marks,
            self.stride,
            self.complement,
        )
        decl = self._declared(program, f"{'q' if found.of_keys else 'k'}_tiles_{self.plan.name}", found)
        return replace(program, inputs=(*program.inputs, decl)), listed_runs(decl.name, _lead(decl), Var(side.value))

    def spanned(self, program: Program, block_q: int) -> tuple[Program, TileRuns]:
        """The runs of the tokens that the listed segments have; the program declares what lists them."""
        program, decl = self._spans(program, "spans", block_q, 0)
        return program, span_runs(decl.name, _lead(decl))

    def spanned_keys(self, program: Program, block_q: int, marks: int) -> tuple[Program, Read]:
        """What tells, at PLACE, which query tiles list segments of key tiles of `marks` tokens, and which of these."""
        program, decl = self._spans(program, "q_tiles", block_q, marks)
        return program, Read(decl.name, (*_lead(decl), PLACE), Type.INT)

    def _spans(self, program: Program, name: str, block_q: int, marks: int) -> tuple[Program, InputDecl]:
        assert isinstance(self.read, Read) and self.offsets is not None
        found = SpanList(self.read.input, self.offsets.input, self.rows, block_q, marks)
        of = (*self.plan.dims, *program.input(found.offsets).dims)
        axes = [x for x in (Axis.B, Axis.H, Axis.G) if any(d.axis is x for d in of)]
        dims = [Dim(x) for x in axes if not (x is Axis.G and Axis.H in axes)]
        decl = _new(program, f"{name}_{self.plan.name}", dims, found)
        return replace(program, inputs=(*program.inputs, decl)), decl

    def gathered(self, program: Program, runs: TileRuns, block_q: int) -> tuple[Program, Gathered]:
        """What tells a kernel which rows to gather. runs: which members a row sees whole, or in part, if it chooses."""
        program = self._with_plan(program)
        decl = self._declared(program, f"chose_{self.plan.name}", Gathering(self.plan.name, self.keys, block_q, runs))
        entry = Read(decl.name, (*_lead(decl), PLACE), Type.INT)
        return replace(program, inputs=(*program.inputs, decl)), Gathered(entry, self.plan.name, self.keys)

    def _with_plan(self, program: Program) -> Program:
        return program if self.plan in program.inputs else replace(program, inputs=(*program.inputs, self.plan))

    def _declared(self, program: Program, name: str, found: TileList | Gathering) -> InputDecl:
        """A derived input with the dimensions in which the plan, or the runs of its tiles, differ."""
        ends = [e for run in found.runs.full + found.runs.partial for e in (run.first, run.count)]
        heads = [d for d in self.plan.dims if d.axis in (Axis.H, Axis.G)]
        if any(reads(e, "h", "g") for e in ends):
            heads = [Dim(Axis.H)]
        batch = any(d.axis is Axis.B for d in self.plan.dims) or any(reads(e, "b") for e in ends)
        return _new(program, name, [*([Dim(Axis.B)] if batch else []), *heads], found)


def _new(program: Program, name: str, dims: list[Dim], found: TileList | Gathering | SpanList) -> InputDecl:
    taken = {decl.name for decl in program.inputs}
    while name in taken:
        name += "_"
    return InputDecl(name, Type.INT, (*dims, Dim(Axis.LIST)), derivation=found)


def listed(program: Program, lists: bool) -> Program:
    """A derived program with the lists of segments in the place of maps of them, where plans are lists (`lists`). Of
    segments there may be as many as tokens, so that a map is as large as all row classes and tokens."""
    if not lists:
        return program
    # What is derived of maps is made of them.
    others = (decl.derivation for decl in program.inputs if not isinstance(decl.derivation, SpanList))
    mapped = {name for derivation in others for name in read_by(derivation)}

    def of(decl: InputDecl) -> InputDecl:
        match decl.derivation:
            case Chosen(plan=plan, sought=True, level=None) if decl.name not in mapped:
                dims = (*decl.dims[:-1], Dim(Axis.LIST))
                return replace(decl, type=Type.INT, dims=dims, derivation=Listed(plan))
            case _:
                return decl

    return replace(program, inputs=tuple(dict.fromkeys(map(of, program.inputs))))


def whole_classes(program: Program, scalars: Iterable[Scalar], block_q: int, even_start: bool) -> dict[Scalar, int]:
    """The row classes that members are looked up by in these scalars, and their rows, where tiles of queries lie in one
    class each: what a tile looks up is then one list."""
    found: dict[Scalar, int] = {}
    for x in walk(*scalars):
        if isinstance(x, Read) and isinstance(program.input(x.input).derivation, Listed):
            for e in x.index[:-1]:
                match e:
                    case Binary(op="//", left=Var(name="q"), right=Const(value=int(rows))):
                        if even_start and rows % block_q == 0 and EVEN % block_q == 0:
                            found[e] = rows
                    case _:
                        pass
    return found


def _lead(decl: InputDecl) -> tuple[Scalar, ...]:
    return tuple(Var(d.axis.value) for d in decl.dims[:-1])


def listables(program: Program, relation: Relation, stride: int = 1) -> Iterator[Listable]:
    """The listables that every pair of a derived program's pattern is in, then those that every pair is outside of.

    stride: that of the view it is over. Single queries leave out few tiles in common: they have no complements.
    """
    outside = []
    for name, e in relation.atoms.items():
        found = _of_plan(program, name, e, stride) or (_of_draw(program, name, e) if stride == 1 else None)
        if found is not None and where_param(relation.pairs, name, 0).is_empty():
            yield found
        elif found is not None and found.plan.members and found.rows != 1 and stride == 1 and found.offsets is None:
            outside.append(replace(found, complement=True))
    yield from (found for found in outside if where_param(relation.pairs, found.atom, 1).is_empty())


def draws_of(program: Program, relation: Relation) -> Iterator[Listable]:
    """The draws of blocks that a derived program's pattern asks about, whether it lies in them or not."""
    for name, e in relation.atoms.items():
        if (found := _of_draw(program, name, e)) is not None:
            yield found


def _of_plan(program: Program, name: str, e: Scalar, stride: int) -> Listable | None:
    if not isinstance(e, Read):
        return None
    if (size := (tiles := program.input(e.input)).tile) and e.index[-1] == _quotient("k", size):
        return Listable(name, e, tiles, size, size, None, stride)
    if not isinstance(found := program.input(e.input).derivation, Chosen | Listed):
        return None
    plan = program.input(found.plan)
    rows = [d.block for d in plan.dims if d.axis is Axis.Q]
    if isinstance(found, Listed):
        return _of_segments(program, name, e, plan, rows[0] if rows else None) if stride == 1 else None
    if stride == 1 and (part := _of_documents(program, name, e, found, plan)) is not None:
        return part
    keys, rest = divmod(found.keys, stride)
    if rest or e.index[-1] != _quotient("k", keys):
        return None
    return Listable(name, e, plan, rows[0] if rows else None, keys, found.level, stride)


def _of_segments(program: Program, name: str, e: Read, plan: InputDecl, rows: int | None) -> Listable | None:
    """Segments that a plan lists for rows in a row."""
    match e.index[-1]:
        case Binary(op="-", left=Var(name="k"), right=Read() as offsets):
            decl = program.input(offsets.input)
        case _:
            return None
    if not isinstance(decl.derivation, Offsets) or offsets.index != (*_lead(decl), Var("k")):
        return None
    if rows is not None and _quotient("q", rows) not in e.index:
        return None
    return Listable(name, e, plan, rows, 1, None, offsets=offsets)


def _of_documents(program: Program, name: str, e: Read, found: Chosen, plan: InputDecl) -> Listable | None:
    """What single queries choose of their documents."""
    match e.index[-1]:
        case Binary(op="//", left=Binary(op="-", left=Var(name="k"), right=Read(input=first)), right=Const(value=size)):
            ends = program.input(first).derivation
        case _:
            return None
    if (
        not isinstance(ends, DocumentEnds)
        or size != found.keys
        or found.level is not None
        or Dim(Axis.Q) not in plan.dims
    ):
        return None
    heads = (dim for dim in plan.dims if dim.axis in (Axis.H, Axis.G))
    listed = InputDecl(
        f"blocks_{plan.name}", Type.INT, (Dim(Axis.B), *heads, Dim(Axis.Q), Dim(Axis.LIST)),
        derivation=CallMembers(plan.name, ends.input, found.keys),
    )  # fmt: skip
    return Listable(name, e, listed, 1, found.keys, None, part=True)


def _of_draw(program: Program, name: str, e: Scalar) -> Listable | None:
    """The members that `random` draws, where they and its row classes are made of whole tiles."""
    match e:
        case Call(function="drawn", args=(_, member, Read(input=last, index=(*_, row, Const())), _)):
            decl = program.input(last)
        case _:
            return None
    draw = decl.derivation
    assert isinstance(draw, Draw)
    count, keys, rows = draw.drawn.count, draw.drawn.keys, draw.drawn.rows
    if draw.unit > 1 or draw.everywhere or keys % LEAST or (rows or LEAST) % LEAST:
        return None
    if member != _quotient("k", keys) or row != (Const(0) if rows is None else _quotient("q", rows)):
        return None
    lead = [dim for dim in decl.dims if dim.axis in (Axis.B, Axis.H)]
    classes = [] if rows is None else [Dim(Axis.Q, rows)]
    dims = (*lead, *classes, Dim(Axis.LIST, size=count))
    plan = InputDecl(f"members_{last}", Type.INT, dims, derivation=replace(draw, members=True))
    return Listable(name, e, plan, rows, keys, None)


def _quotient(position: str, size: int) -> Scalar:
    return Var(position) if size == 1 else Binary("//", Var(position), Const(size))


def even_start(program: Program, shape: CallShape) -> bool:
    """Whether a call's first row stands where tiles and row classes begin, for programs whose tiles may be listed."""
    return lists_tiles(program) and shape.first_position(program) % EVEN == 0


def lists_tiles(program: Program) -> bool:
    """Whether a plan or a draw may list a program's tiles."""
    return (
        reads_plans(program)
        or reads_tiles(program)
        or (program.plain and any(isinstance(decl.derivation, Draw) for decl in derive(program).inputs))
    )


def reads_plans(program: Program) -> bool:
    """Whether a program reads plans: of a call's kind it then asks more."""
    return any(decl.members for decl in program.inputs)


def fitting(block: int, unit: int | None) -> int:
    """The largest size of tiles up to `block` that divides a unit."""
    while unit is not None and unit % block and block > LEAST:
        block //= 2
    return block
