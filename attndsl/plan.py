"""Kernel plans: everything a kernel is generated from, frozen and hashable, and never a length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from attndsl.begins import table_head, with_row_tiles
from attndsl.box_tiles import BoxRuns
from attndsl.boxes import Boxes
from attndsl.branches import Given
from attndsl.cuts import with_cuts, without_cuts
from attndsl.derivation import Alike
from attndsl.derive import derive, with_needed
from attndsl.effort import remembered
from attndsl.layout import PLAIN, Layout, Permutation
from attndsl.learned import Learned, Over
from attndsl.listing import EntryTiles, Gathered, listed
from attndsl.mask import pair_mask, written_condition
from attndsl.program import (
    Arg,
    Const,
    InputDecl,
    Program,
    Read,
    Scalar,
    Table,
    TableDecl,
    Type,
    Unary,
    Var,
    reads,
    walk,
)  # fmt: skip
from attndsl.relation import lowered
from attndsl.runs import Side, TileRuns
from attndsl.shares import Shares, Votes
from attndsl.simplify import specialise
from attndsl.visits import closed_runs, visits_of


class DType(Enum):
    """Element type of q, k, v and the output."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"  # on the CPU only
    FLOAT8 = "float8_e4m3fn"  # on Hopper only: the output is bfloat16


class Loads(Enum):
    """How a kernel reads tiles of k and v."""

    POINTER = "pointer"
    DESCRIPTOR = "descriptor"  # hardware tensor copies (TMA); needs 16-byte aligned strides


@dataclass(frozen=True, slots=True)
class Part:
    """A power-of-two piece of a head dimension; `padded`: it reaches past the dimension's end."""

    offset: int
    size: int
    padded: bool

    @property
    def suffix(self) -> str:
        return f"_{self.offset}" if self.offset else ""


def head_parts(dim: int) -> tuple[Part, ...]:
    """A head dimension as at most two powers of two (tensor cores take no other sizes), each at least 16."""
    whole = 1 << (dim.bit_length() - 1)
    if whole < 16:
        return (Part(0, 16, True),)
    if whole == dim:
        return (Part(0, dim, False),)
    rest = dim - whole
    size = max(16, 1 << (rest - 1).bit_length())
    return (Part(0, whole, False), Part(whole, size, size != rest))


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes in tokens, and how a program runs on the device.

    pack: the heads of a key head that share a tile of queries, at least so many as there are: a power of two.
    unit_k: tokens of a listed tile of keys, of which several, wherever they lie, make a tile of `block_k` (0: a listed
    tile is one). unit_q: rows of a listed tile of queries, likewise.
    several: on Hopper, a program owns several tiles of queries, one after another.
    strip: keys that a product takes at once, where a tile holds more (0: all of them).
    """

    block_q: int
    block_k: int
    warps: int = 4
    stages: int = 2
    pack: int = 1
    unit_k: int = 0
    unit_q: int = 0
    several: bool = False
    strip: int = 0

    @property
    def columns(self) -> int:
        """Keys that a product's tile has room for: a power of two, 16 at least. Those past `block_k` do not exist."""
        return self.strip or max(16, 1 << (self.block_k - 1).bit_length())

    @property
    def collects(self) -> bool:
        """Whether tiles of keys are made of several listed ones."""
        return self.unit_k > 0


class Backend(Enum):
    """Which printer a plan is for."""

    TRITON = "triton"
    GLUON = "gluon"  # Hopper, warp-specialised
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Spec:
    """What a plan is made for: the heads and sizes of a call, its dtype, and the device's kind."""

    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    dtype: DType
    target: str  # "cuda:90", "hip:gfx942", "cpu"
    loads: Loads = Loads.POINTER
    scale_sign: int = 1  # sign of the scale where it is given at call time
    backend: Backend = Backend.TRITON
    dropout: bool = False
    # Only where the program reads a plan (`listing`): the first row's position is a multiple of EVEN; plans are lists.
    even_start: bool = False
    lists: bool = False
    # Only where the program may have pieces in several orders (`mixing`): the rows of a call are all its tokens.
    all_rows: bool = False
    # Only where the program is visited in pieces: rows and keys fill the layers that its pieces see (`layers.py`).
    whole: bool = False
    # Tiles that data rules out are mapped (`mapping`).
    maps: bool = False
    # Only of a program in the order of its data that two kernels attend to, of which the data chooses one (`copying`):
    # that of rows with many keys of equal data, or the other.
    many: bool | None = None

    @property
    def hoists(self) -> bool:
        """Whether what a mask reads of one token alone is computed before its pairs, for each row and each key."""
        return self.backend is Backend.GLUON

    @property
    def gathers(self) -> bool:
        """Whether rows that choose for themselves by lists are gathered."""
        return self.lists and self.backend is Backend.TRITON

    @property
    def sizes(self) -> dict[str, int]:
        return {"H": self.heads, "G": self.kv_heads, "D": self.dim, "Dv": self.v_dim}


@dataclass(frozen=True, slots=True)
class Plan:
    """What the kernels of a program have in common.

    `runs`: key tiles of a query tile. `mask`: the condition under which a pair of a partial tile is allowed
    (None: all are). `scale`: an expression of the program, or None where it is a kernel argument.
    `score`, `sink`, `weights`: as in `program.Branch`, specialised.
    `layout`: the order in which it counts tokens; the runs are in its indices, which a mask calls i and j.
    `follows`: it is a further piece of the program's pattern, and adds to what the pieces before it have found.
    `gathered`: query tiles are rows that chose the same member of the keys; there are no runs.
    `marked`: the kernel of dk and dv goes over the query tiles that a list names for each of its key tiles, which says
    too which of the tile's keys they chose; there are no `key_runs`.
    `view`: its keys, whose indices runs, mask and score call k, are the entries of a view.
    `skip`: tiles whose scores lie all so far below what their rows have seen are dropped (`skipping.py`).
    `box_runs`: in the place of `runs` where the layout is one by boxes, whose indices a mask calls i_a and j_a.
    `where`: a condition of the whole call under which its kernels do anything.
    `shares`: two levels: each tile of keys is a member, inside which is a softmax, and what its row gives it weighs it.
    `tiles_of`: members are of documents: where a tile lies is data.
    """

    program: Program
    spec: Spec
    tiling: Tiling
    runs: TileRuns
    mask: Scalar | None
    scale: Scalar | None
    score: Scalar | None
    sink: Scalar | None
    weights: Scalar | None
    layout: Layout | Boxes | Permutation = field(default=PLAIN, kw_only=True)
    follows: bool = field(default=False, kw_only=True)
    gathered: Gathered | None = field(default=None, kw_only=True)
    marked: Read | None = field(default=None, kw_only=True)
    view: Given | None = field(default=None, kw_only=True)
    skip: float | None = field(default=None, kw_only=True)
    box_runs: BoxRuns = field(default=BoxRuns(), kw_only=True)
    shares: Shares | None = field(default=None, kw_only=True)
    tiles_of: EntryTiles | None = field(default=None, kw_only=True)
    where: Scalar | None = field(default=None, kw_only=True)

    @property
    def softmax(self) -> bool:
        """Whether rows are normalised."""
        return self.weights is None and self.shares is None

    @property
    def votes(self) -> Votes | None:
        """Of two levels, what weighs members where their entries do."""
        return None if self.shares is None else self.shares.votes

    @property
    def masks(self) -> bool:
        """Whether some of its tiles are masked."""
        listed = self.gathered is not None or self.marked is not None
        return listed or bool(self.runs.partial or self.box_runs.partial)

    @property
    def positive_scale(self) -> bool:
        """Whether the factor of q . k is known to be positive, so that a row's largest product is its largest score."""
        if self.scale is None:
            return self.spec.scale_sign > 0
        return isinstance(self.scale, Const) and self.scale.value > 0

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """Every scalar the kernel computes."""
        body = (self.mask, self.scale, self.score, self.sink, self.weights)
        lists: list[Scalar] = [] if self.gathered is None else [self.gathered.entry]
        lists += [x for x in (self.marked, self.where) if x is not None]
        lists += () if self.shares is None else self.shares.scalars
        lists += () if self.tiles_of is None else self.tiles_of.reads
        runs = (*run_scalars(self.runs), *self.box_runs.ends)
        orders = (self.layout.q, self.layout.k) if isinstance(self.layout, Permutation) else ()
        return (*runs, *(x for x in body if x is not None), *lists, *orders, *self._further())

    def _further(self) -> tuple[Scalar, ...]:
        """Scalars that only some kernels compute."""
        return ()

    @property
    def inputs(self) -> tuple[InputDecl, ...]:
        """The inputs the kernel reads, in the order they were declared."""
        used = {x.input for x in self._naming(self.program.inputs) if isinstance(x, Read)}
        used |= {votes.keys} if (votes := self.votes) is not None else set()
        return tuple(decl for decl in self.program.inputs if decl.name in used)

    @property
    def tables(self) -> tuple[TableDecl, ...]:
        used = {x.name for x in self._naming(self.program.tables) if isinstance(x, Table)}
        return tuple(table for table in self.program.tables if table.name in used)

    @property
    def args(self) -> tuple[str, ...]:
        used = {x.name for x in self._naming(self.program.args) if isinstance(x, Arg)}
        return tuple(name for name in self.program.args if name in used)

    def _naming(self, declared: tuple[object, ...]) -> Iterable[Scalar]:
        return walk(*self.scalars) if declared else ()


@dataclass(frozen=True, slots=True)
class ForwardPlan(Plan):
    """A forward kernel. `row_tiles`: the input that tells where its query tiles begin (`begins.py`); None: one after
    another from the first row."""

    row_tiles: InputDecl | None = field(default=None, kw_only=True)

    def _further(self) -> tuple[Scalar, ...]:
        return () if self.row_tiles is None else (table_head(self.row_tiles),)


@dataclass(frozen=True, slots=True)
class Printed:
    """A forward kernel's text and what a launch takes beside it: what is left of a plan once it is printed.

    `layout`, `follows`, `gathered`, `view`, `softmax`, `row_tiles`: as in the plan.
    """

    program: Program
    spec: Spec
    tiling: Tiling
    text: str
    layout: Layout | Boxes | Permutation = PLAIN
    follows: bool = False
    gathered: Gathered | None = None
    view: Given | None = None
    softmax: bool = True
    row_tiles: InputDecl | None = None

    @property
    def tables(self) -> tuple[TableDecl, ...]:
        """Every table that the kernel may read."""
        return self.program.tables


@dataclass(frozen=True, slots=True)
class BackwardPlan(Plan):
    """The backward kernels: `runs`, `tiling` and `mask` are those of dq; `key_runs`, … those of dk and dv.

    With x the logit `score(s)` (or w the weight `weights(s)`) of a pair:
    `d_score`: dx/ds (dw/ds), None where it is 1. `learnable`: each read of a learnable input in it, and the
    derivative by that read. `sink_learnable`: the same for the sink. `uses_lse`: a gradient of lse comes in too.
    On the CPU one function goes over the query tiles: there are no `key_runs`. On Hopper one kernel goes over the key
    tiles: there are no `runs`.
    `rows_apart`: what the kernel of dq keeps of rows lies residue by residue, as no other kernel but that of dk and dv
    reads it.
    """

    key_tiling: Tiling
    key_runs: TileRuns
    key_mask: Scalar | None
    d_score: Scalar | None
    learnable: tuple[tuple[Read, Scalar], ...]
    sink_learnable: tuple[tuple[Read, Scalar], ...]
    uses_lse: bool
    key_box_runs: BoxRuns = field(default=BoxRuns(), kw_only=True)
    rows_apart: bool = field(default=False, kw_only=True)

    def _further(self) -> tuple[Scalar, ...]:
        slopes = () if self.d_score is None else (self.d_score,)
        others = (x for pair in self.learnable + self.sink_learnable for x in pair)
        masks = () if self.key_mask is None else (self.key_mask,)
        return (*run_scalars(self.key_runs), *self.key_box_runs.ends, *masks, *slopes, *others)

    @property
    def learned(self) -> tuple[Learned, ...]:
        """All reads of learnable inputs, those of the sink last."""
        logit = (Learned(read, slope, False) for read, slope in self.learnable)
        return (*logit, *(Learned(read, slope, True) for read, slope in self.sink_learnable))

    def of_keys(self) -> BackwardPlan:
        """The plan as the kernel of dk and dv has it: that kernel's tiling, runs and mask in place of those of dq."""
        return replace(self, tiling=self.key_tiling, runs=self.key_runs, mask=self.key_mask, box_runs=self.key_box_runs)

    @property
    def row_list(self) -> Read | None:
        """The list that the kernel of dk and dv goes over: of the rows that chose a key tile, or some of its keys."""
        return self.marked if self.gathered is None else self.gathered.entry

    @property
    def one_list(self) -> bool:
        """Whether the heads that share a key tile have one such list."""
        return self.row_list is not None and (self.spec.heads == self.spec.kv_heads or not reads(self.row_list, "h"))

    @property
    def cuts_lists(self) -> bool:
        """Whether that kernel cuts long lists into parts: where a program goes over one, and makes no other sums."""
        whole = self.layout.plain and self.view is None and not self.key_tiling.strip
        return self.one_list and not self.learned and self.votes is None and whole

    @property
    def learnable_inputs(self) -> tuple[InputDecl, ...]:
        """The inputs that get gradients other than zero, in the order they were declared."""
        names = {read.input for read, _ in self.learnable + self.sink_learnable}
        names |= set() if self.shares is None else self.shares.learned
        return tuple(decl for decl in self.program.inputs if decl.name in names)


def run_scalars(runs: TileRuns) -> tuple[Scalar, ...]:
    """The ends of the runs, and the lists that they are places of."""
    found = runs.full + runs.partial
    ends = tuple(x for run in found for x in (run.first, run.count))
    return (*ends, *(run.list for run in found if run.list is not None))


@remembered(1024)
def forward_plan(
    program: Program, spec: Spec, tiling: Tiling, skip: bool = True, layout: Layout | Permutation = PLAIN,
    follows: bool = False,
) -> ForwardPlan:  # fmt: skip
    """The forward kernel of a program for one kind of call; the plan's program is the derived one.

    skip: whether tiles that sorted data rules out are left out. layout: where the tokens lie that are in order here.
    follows: it adds to what another piece has found, with which all that enters once came in.
    """
    spec = _loading(spec, tiling)
    program = listed(derive(program), spec.lists)
    program = with_cuts(program) if skip else program
    handed = tiling.several and layout == PLAIN and not follows and spec.dtype is not DType.FLOAT8
    begun = with_row_tiles(program, spec, tiling) if handed else None
    row_tiles, program = (None, program) if begun is None else (begun.inputs[-1], begun)
    visits = visits_of(program, spec, tiling, Side.QUERY, gathers=spec.gathers, shifted=row_tiles is not None)
    program, runs = visits.program, visits.runs
    # The Hopper kernel visits a tile even where there is none, and masks it.
    mask = visits.mask(folds=spec.hoists) if runs.partial or visits.gathered or spec.backend is Backend.GLUON else None
    branch = branch_scalars(program, spec) | ({"sink": None} if follows else {})
    plan = ForwardPlan(
        program, spec, tiling, runs, mask, **branch, layout=layout, follows=follows, gathered=visits.gathered,
        row_tiles=row_tiles, where=_where(program, spec),
    )  # fmt: skip
    return replace(plan, program=with_needed(program, plan.inputs))


@remembered(1024)
def backward_plan(
    program: Program, spec: Spec, tiling: Tiling, key_tiling: Tiling | None = None, uses_lse: bool = True,
    layout: Layout | Permutation = PLAIN, follows: bool = False,
) -> BackwardPlan:  # fmt: skip
    """The backward kernels of a program for one kind of call; `key_tiling` (default: `tiling`) is that of dk and dv.

    layout, follows: as in `forward_plan`.
    """
    key_tiling, spec = key_tiling or tiling, _loading(spec, tiling)
    program = with_cuts(listed(derive(program), spec.lists))
    branch = branch_scalars(program, spec) | ({"sink": None} if follows else {})
    derivatives = slopes(program, branch)
    # Sums of learnable inputs are made tile by tile, in order.
    learns = bool(derivatives["learnable"] or derivatives["sink_learnable"])
    visits = visits_of(program, spec, tiling, Side.QUERY, key_tiling, gathers=spec.gathers and not learns)
    program, runs = visits.program, visits.runs
    mask = visits.mask() if runs.partial or visits.gathered else None
    of_keys, key_runs, key_mask = visits, TileRuns((), ()), mask
    if spec.backend is not Backend.CPU and visits.gathered is None:
        # Rows that follow their own lists are gathered, for a key tile, by what they chose.
        of_keys = visits_of(program, spec, key_tiling, Side.KEY, tiling, gathers=tiling.collects)
        program, key_runs = of_keys.program, of_keys.runs
        # The Hopper kernel masks keys that do not exist in any tile.
        masks = key_runs.partial or of_keys.gathered or of_keys.marked or spec.backend is Backend.GLUON
        key_mask = of_keys.mask() if masks else None
    if spec.backend is Backend.GLUON:
        runs, mask = TileRuns((), ()), None
    plan = BackwardPlan(
        program, spec, tiling, runs, mask, **branch, key_tiling=key_tiling, key_runs=key_runs, key_mask=key_mask,
        **derivatives, uses_lse=uses_lse, layout=layout, follows=follows, gathered=of_keys.gathered,
        marked=of_keys.marked, where=_where(program, spec),
    )  # fmt: skip
    # Kernels that go over the whole pattern once more read what these need not.
    whole = any(x.over in (Over.DIAGONALS, Over.PAIRS) for x in plan.learned)
    return plan if whole else replace(plan, program=with_needed(program, plan.inputs))


def _where(program: Program, spec: Spec) -> Scalar | None:
    """The condition under which the data chooses a kernel of two."""
    if spec.many is None:
        return None
    (alike,) = (decl.name for decl in program.inputs if isinstance(decl.derivation, Alike))
    read = Read(alike, (Const(0),), Type.BOOL)
    return read if spec.many else Unary("not", read)


def _loading(spec: Spec, tiling: Tiling) -> Spec:
    """Tiles that are collected are read key by key."""
    return replace(spec, loads=Loads.POINTER) if tiling.collects else spec


@remembered(1024)
def learning_plan(plan: BackwardPlan, tiling: Tiling, side: Side) -> BackwardPlan:
    """The plan as the kernels for inputs that q and k read together have it: with runs and a mask of their own.

    They go over the whole pattern, its tokens in order, of whichever piece the plan is.
    """
    program, spec = plan.program, replace(plan.spec, loads=Loads.POINTER)
    lowering, relation = lowered(without_cuts(program), (spec.heads, spec.kv_heads))
    runs = closed_runs(relation, program, spec, tiling, side)
    mask = pair_mask(relation, written_condition(lowering, spec.sizes)) if runs.partial else None
    return replace(
        plan,
        spec=spec,
        tiling=tiling,
        runs=runs,
        key_runs=TileRuns((), ()),
        key_mask=None,
        mask=mask,
        layout=PLAIN,
        follows=False,
        marked=None,
        box_runs=BoxRuns(),
        key_box_runs=BoxRuns(),
    )


def slopes(program: Program, branch: dict[str, Any]) -> dict[str, Any]:
    """The derivatives that a backward plan holds."""
    logit = branch["score"] if branch["weights"] is None else branch["weights"]
    if logit is None and not any(decl.learnable for decl in program.inputs):
        return {"d_score": None, "learnable": (), "sink_learnable": ()}
    # Here, since sympy takes half a second to import, and the scores of most programs are the dot products themselves.
    from attndsl.score import derivative, derivatives

    slope = Const(1.0) if logit is None else derivative(logit, Var("s"))
    return {
        "d_score": None if slope == Const(1.0) else slope,
        "learnable": derivatives(logit, program),
        "sink_learnable": derivatives(branch["sink"], program),
    }


def branch_scalars(program: Program, spec: Spec) -> dict[str, Any]:
    """What the program's branch says of scores, with the sizes of a call put in."""
    branch = program.only
    said = {"scale": branch.scale, "score": branch.score, "sink": branch.sink, "weights": branch.weights}
    return {name: None if e is None else specialise(e, spec.sizes) for name, e in said.items()}
