"""Decode plans: the last rows of many sequences, each of its own length, over a cache.

The runs of a plan are closed forms in Nk and in the position of a tile's first row, so what a sequence visits follows
from its own length inside the kernel; no plan, and no grid, depends on one. The heads that share a key head are packed
into one tile of queries, and the tiles that it visits are dealt out in slices, so that few rows keep a device busy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from attndsl.compose import of_one_level
from attndsl.cuts import with_cuts
from attndsl.derive import derive, with_needed
from attndsl.diagnostics import error
from attndsl.effort import remembered
from attndsl.evaluate import evaluate
from attndsl.layout import Layout
from attndsl.listing import listables
from attndsl.mask import pair_mask, written_condition
from attndsl.plan import (
    DType,
    ForwardPlan,
    Plan,
    Spec,
    Tiling,
    branch_scalars,
    forward_plan,
    head_parts,
    run_scalars,
)  # fmt: skip
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    Call,
    Compare,
    Const,
    Dim,
    Logic,
    Program,
    Read,
    Table,
    Var,
    reads,
    scalars,
    substitute,
    walk,
)  # fmt: skip
from attndsl.relation import lowered
from attndsl.runs import Run, TileRuns
from attndsl.simplify import fold
from attndsl.skipping import TILE, ragged_skipping_plan
from attndsl.view_plans import view_forward
from attndsl.within_plans import declaring, derived, shares_of

# Programs a multiprocessor gets where tiles are scarce (as many as it runs at once, so none waits for another), and
# where each still gets a long slice of them (then the last to start leave little idle).
_FEW, _MANY = 3, 16
# Tiles of a slice that is long: its start and the merge are then small beside it.
_LONG_SLICE = 32
# Warps of a tile of few rows.
_FEW_WARPS = 2
# Where programs share rows by columns instead (RESULTS.md): columns of values at least, keys of a tile, and stages.
_LEAST_COLUMNS = 64
_WIDE_TILE, _STAGES = 128, 3
# Devices with as much shared memory as such a program takes.
_ROOMY = ("80", "90", "100", "103")
# Query rows of a tile, the rows of all its heads together: products take 16 at least.
_LEAST_ROWS, _MOST_ROWS = 16, 64
# Keys of the largest member that is scored at once, and pairs of a tile that one larger than others' tiles fills.
_MEMBER = 256
_MEMBER_PAIRS = 4096
# Up to so many rows a tile is masked while the next one is under way: full tiles need no loop of their own.
_ONE_LOOP = 16


@dataclass(frozen=True, slots=True)
class Cache:
    """How keys and values are kept.

    `page`: tokens of a page, None where a sequence's tokens lie together. `fp8`: elements are float8 (e4m3).
    `k_scaled`, `v_scaled`: what elements are multiplied by is given, one number or one a key head.
    """

    page: int | None = None
    fp8: bool = False
    k_scaled: bool = False
    v_scaled: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """Rows attend within members of `keys` tokens each that an input, a plan of this name, lists for them.

    `per_head`: heads that share a key head have lists of their own. `per_row`: the rows of a call do.
    """

    plan: str
    keys: int
    per_head: bool = False
    per_row: bool = False


@dataclass(frozen=True, slots=True)
class DecodePlan(Plan):
    """A decode kernel: `tiling.block_q` rows of `pack` heads each make a tile of queries.

    `pack`: a power of two; heads past those that share a key head are padding. `split`: several programs share a
    tile's keys, and their results are merged. `listing`: the tiles visited are those of a list, the runs are empty, and
    the mask decides pairs of any tile. `joined`: its slices stand among those of the other parts of a softmax.
    `columns`: so many programs share a tile of queries by the columns of the values: each scores all keys, makes a part
    of the output, and nothing is merged.
    """

    cache: Cache
    pack: int
    split: bool
    listing: Listing | None = None
    joined: bool = False
    columns: int = 1

    def __post_init__(self) -> None:
        width = self.spec.v_dim // self.columns
        assert self.columns == 1 or (not self.split and width >= 16 and width * self.columns == self.spec.v_dim)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.spec.heads // self.spec.kv_heads

    @property
    def heads_in_tile(self) -> int:
        """Heads of a tile that exist."""
        return 1 if self.listing is not None and self.listing.per_head else min(self.pack, self.group)

    @property
    def head_tiles(self) -> int:
        """Tiles of queries for the heads of a key head."""
        return -(-self.group // self.heads_in_tile)

    @property
    def scattered(self) -> bool:
        """Whether the keys that a row allows of a partial tile may be few and apart: then these alone are loaded.

        A tile of several rows, or of heads that differ, would need the union of what they allow.
        """
        alone = self.layout.plain and self.view is None and self.listing is None
        if self.mask is None or not alone or self.tiling.block_q > 1:
            return False
        if self.pack > 1 and reads(self.mask, "h"):
            return False
        nodes = [x for x in walk(self.mask) if reads(x, "k")]
        asked = (x for x in walk(self.mask) if isinstance(x, Read))
        if any(dim.axis is Axis.Q and dim.block == 1 for x in asked for dim in self.program.input(x.input).dims):
            return False
        return any(isinstance(x, Read | Table | Call) or (isinstance(x, Binary) and x.op in ("%", "//")) for x in nodes)

    @property
    def ahead(self) -> bool:
        """Whether where the keys of a tile lie in pages is looked up a turn of the loop before they are loaded."""
        listed = any(run.list is not None for run in self.runs.full + self.runs.partial)
        return self.cache.page is not None and self.view is None and not listed and not self.tiling.strip

    def units(self, batch: int, rows: int) -> int:
        """Tiles of queries in a call."""
        return -(-rows // self.tiling.block_q) * self.head_tiles * self.spec.kv_heads * batch


@remembered(1024)
def decode_plan(
    program: Program, spec: Spec, rows: int, cache: Cache, split: bool = True, tiling: Tiling | None = None,
    columns: int = 1,
) -> DecodePlan:  # fmt: skip
    """The decode kernel of a program of one part for calls of so many rows a sequence.

    The plan's program is the derived one. Over a view the cache is its entries, in the order of a contiguous one.

    tiling: its `block_q` counts the rows of all heads in a tile. Where the tiles that a row visits depend on its head,
    a tile is of one head: the union over heads could be all keys. split, columns: as `DecodePlan` has them.
    """
    if columns > 1:
        alone = decode_plan(program, spec, rows, cache, split, tiling)
        alone = decode_plan(program, spec, rows, cache, split, tiling or _wide(alone))
        return replace(alone, columns=columns)
    if program.only.skip is not None and program.packed is not None:
        what = f"decode within `packed {program.packed}` is not yet supported for `skip below`"
        raise error("A911", what, program.span, help="leave the clause out: a sequence of a cache is one document")
    if program.only.within is not None and program.packed is not None:
        what = f"two levels within `packed {program.packed}` have no decode kernel: torch operators make them"
        raise error("A911", what, program.span, help="ask for the kernels of calls")
    within = program.only.within
    program = derive(program, ragged=True) if within is None else derived(program, ragged=True)
    if program.only.skip is not None:
        return _skipping_plan(program, spec, rows, cache)
    if within is None:
        return _plan_of(program, spec, rows, cache, split, tiling)
    plan = _plan_of(of_one_level(program), spec, rows, cache, split, tiling, within.keys)
    return declaring(replace(plan, shares=shares_of(program, (spec.heads, spec.kv_heads), spec.sizes)), program)


def _plan_of(
    program: Program, spec: Spec, rows: int, cache: Cache, split: bool, tiling: Tiling | None, member: int = 0
) -> DecodePlan:
    """Of a derived program. member: keys of a tile, where it must be one of these members."""
    if (plan := _listed_plan(program, spec, rows, cache, split, tiling, member)) is not None:
        return plan
    plan = _plan(program, spec, rows, cache, split, heads_of_tile(spec, rows), tiling, member)
    if plan.pack > 1 and any(reads(x, "h") for x in run_scalars(plan.runs)):
        plan = _plan(program, spec, rows, cache, split, 1, tiling, member)
    return plan


def _skipping_plan(program: Program, spec: Spec, rows: int, cache: Cache) -> DecodePlan:
    """Of a derived program that skips tiles: one program goes over all keys of its rows, since what it drops depends on
    what came before."""
    of_rows = min(TILE, 1 << (max(rows, 1) - 1).bit_length())
    group = 1 << (spec.heads // spec.kv_heads - 1).bit_length()
    for pack in (max(min(group, TILE // of_rows), 1), 1):
        # The CPU has tiles of the language's size, and knows heads apart anyway.
        on_cpu = spec.target == "cpu"
        base = ragged_skipping_plan(program, spec, TILE if on_cpu else max(of_rows, _LEAST_ROWS // pack))
        if not any(reads(x, "h") for x in run_scalars(base.runs)):
            break
    return DecodePlan(
        base.program, spec, base.tiling, base.runs, base.mask, base.scale, base.score, base.sink, base.weights,
        cache=cache, pack=pack, split=False, skip=base.skip, view=base.view,
    )  # fmt: skip


def _of_members(tiling: Tiling, member: int) -> Tiling:
    """A tiling whose tiles of keys are members: a large one leaves no room for the next, or for many rows."""
    if member <= tiling.block_k:
        return replace(tiling, block_k=member) if member else tiling
    if member > _MEMBER:
        return replace(tiling, block_k=member, strip=tiling.block_k)
    large = replace(tiling, block_k=member, warps=8, stages=1)
    return replace(large, block_q=max(_LEAST_ROWS, min(tiling.block_q, _MEMBER_PAIRS // large.columns)))


def _wide(plan: DecodePlan) -> Tiling:
    """The tiling of a program that is alone on its multiprocessor: few large tiles, several of them in flight."""
    return Tiling(plan.tiling.block_q * plan.pack, _WIDE_TILE, warps=4, stages=_STAGES)


def heads_of_tile(spec: Spec, rows: int) -> int:
    """Heads of a tile of so many rows: those that share a key head, and where few rows leave room, padding."""
    group = spec.heads // spec.kv_heads
    if group == 1 and rows > 1:
        return 1
    room = _LEAST_ROWS // (1 << (max(rows, 1) - 1).bit_length())
    return max(1 << (min(group, _MOST_ROWS) - 1).bit_length(), room)


def _plan(
    program: Program, spec: Spec, rows: int, cache: Cache, split: bool, pack: int, tiling: Tiling | None, member: int
) -> DecodePlan:
    chosen = tiling is None and not member
    tiling = _of_members(tiling or decode_tiling(spec, cache, rows, pack), member)
    of_rows = replace(tiling, block_q=max(tiling.block_q // pack, 1))
    base = _of_one_head(program, spec, of_rows)
    runs = in_one_loop(_of_key_heads(base), tiling.block_q)
    plan = DecodePlan(
        base.program, spec, of_rows, runs, base.mask, base.scale, base.score, base.sink, base.weights, cache=cache,
        pack=pack, split=split, view=base.view,
    )  # fmt: skip
    if chosen and plan.scattered and any(isinstance(x, Read) and reads(x, "k") for x in walk(plan.mask or Const(True))):
        # What says of a key whether it is loaded is loaded before it.
        stages = decode_tiling(spec, cache, rows, pack, by_data=True).stages
        plan = replace(plan, tiling=replace(of_rows, stages=stages))
    return plan


def in_one_loop(runs: TileRuns, rows: int) -> TileRuns:
    """The runs of a tile of so many rows. Of few, one loop fills its pipeline once."""
    return TileRuns((), runs.full + runs.partial) if rows <= _ONE_LOOP and runs.partial else runs


def _of_one_head(program: Program, spec: Spec, tiling: Tiling) -> ForwardPlan:
    """The forward kernel's plan, from which that of a decode is made."""
    if program.plain:
        return forward_plan(with_cuts(program, ragged=True), spec, tiling, skip=False)
    # Each sequence has a length of its own: where a plan's choice lies in it is a condition, not a list.
    return view_forward(program, spec, tiling, follows=False, ragged=True)


def _listed_plan(
    program: Program, spec: Spec, rows: int, cache: Cache, split: bool, tiling: Tiling | None, member: int
) -> DecodePlan | None:
    """The kernel over the list of a plan that the pattern lies in, None where it lies in none: rows with lists of their
    own, and heads with theirs, have tiles of their own. What is listed holds whole members."""
    if not program.plain or not any(decl.members for decl in program.inputs):
        return None
    lowering, relation = lowered(program, (spec.heads, spec.kv_heads))
    of_row = {Dim(Axis.B), Dim(Axis.H), Dim(Axis.G), Dim(Axis.Q)}
    # Of a map of factors one is a condition like any other.
    lists = (x for x in listables(program, relation) if x.level is None and not x.complement and not x.part)
    lists = (x for x in lists if not member or x.keys % member == 0)
    found = next((x for x in lists if {*x.plan.dims[:-1]} <= of_row), None)
    if found is None:
        return None
    axes = [dim.axis for dim in found.plan.dims]
    per_head = Axis.H in axes and spec.heads != spec.kv_heads
    listing = Listing(found.plan.name, found.keys, per_head, Axis.Q in axes and rows > 1)
    tile_rows = 1 if listing.per_row else rows
    pack = max(heads_of_tile(spec, tile_rows), _LEAST_ROWS if listing.per_head or listing.per_row else 1)
    tiling = _of_members(tiling or decode_tiling(spec, cache, tile_rows, pack, listed=True), member)
    of_rows = replace(tiling, block_q=1 if listing.per_row else max(tiling.block_q // pack, 1))
    mask = pair_mask(found.within(relation), found.assumed(written_condition(lowering, spec.sizes)))
    # A place of the list that holds no member gives no key.
    mask = fold(Logic("and", (Compare(">=", Var("k"), Const(0)), Const(True) if mask is None else mask)))
    plan = DecodePlan(
        program, spec, of_rows, TileRuns((), ()), mask, **branch_scalars(program, spec), cache=cache, pack=pack,
        split=split, listing=listing,
    )  # fmt: skip
    return replace(plan, program=with_needed(program, plan.inputs))


def _of_key_heads(base: ForwardPlan) -> TileRuns:
    """The runs, in terms of the key head where the pattern knows no other."""
    program, spec, runs = base.program, base.spec, base.runs
    if any(reads(e, "h", "H") for e in scalars(program.only.pattern)) and spec.heads != spec.kv_heads:
        return runs
    if any(reads(x, "h") for x in run_scalars(runs)):
        # As if a key head had one head.
        runs = _of_one_head(program, replace(spec, heads=spec.kv_heads), base.tiling).runs
    return TileRuns(tuple(map(_said_of_g, runs.full)), tuple(map(_said_of_g, runs.partial)))


def _said_of_g(run: Run) -> Run:
    return replace(run, first=substitute(run.first, {"h": Var("g")}), count=substitute(run.count, {"h": Var("g")}))


def decode_tiling(
    spec: Spec, cache: Cache, rows: int, pack: int, listed: bool = False, by_data: bool = False
) -> Tiling:
    """Tile sizes of a decode kernel; `block_q` counts the rows of all heads in a tile. listed: its keys are those of a
    list. by_data: which keys are loaded depends on data."""
    backend, _, arch = spec.target.partition(":")
    dim = max(spec.dim, spec.v_dim)
    if backend == "cpu":
        return Tiling(128 * pack, 64)
    most = 16 if spec.dtype is DType.FLOAT32 else _MOST_ROWS if dim <= 128 else 32
    block_q = max(_LEAST_ROWS, pack)
    while block_q < min(rows * pack, most):
        block_q *= 2
    block_k, parts = 64 if dim <= 128 else 32, len(head_parts(dim))
    before_hopper = backend == "cuda" and int(arch) < 90
    if spec.dtype is DType.FLOAT32:
        warps = 8 if before_hopper and dim > 64 else 4
        return Tiling(block_q, 32 if dim <= 64 else 16, warps=warps, stages=2 if dim <= 128 else 1)
    if backend == "hip":
        return Tiling(block_q, block_k, warps=4, stages=1)
    # With 100 KB of shared memory one tile in flight leaves room for more programs.
    ahead = (1 if arch in ("86", "89") and parts == 1 else 2) + cache.fp8
    # A list is loaded before the keys that it lists, and what decides of keys by data before these: the pipeline is
    # deeper for as many tiles in flight. Pages are looked up a turn ahead.
    stages = 1 + ahead * (1 + ((listed and cache.page is None) or by_data))
    if before_hopper:
        return Tiling(block_q, block_k, warps=8 if block_q >= 64 or parts > 1 else 4, stages=stages)
    # The products of few rows are small: two warps wait for each other less than four, where registers suffice.
    few = block_q <= _LEAST_ROWS and parts == 1 and not cache.fp8 and not listed
    return Tiling(block_q, block_k, warps=_FEW_WARPS if few else 4, stages=stages)


def split_count(plan: DecodePlan, batch: int, rows: int, capacity: int, multiprocessors: int, listed: int = 0) -> int:
    """Into how many slices the visited tiles are dealt. `listed`: entries of a list, where the plan reads one.

    From the number of heads and rows, what the pattern visits at the cache's capacity, and the device: never from the
    lengths, so that a recorded grid serves all of them.
    """
    units = plan.units(batch, rows)
    if plan.skip is not None or units == 0 or (tiles := _tiles(plan, rows, capacity, listed)) == 0:
        return 1
    few, many = (wanted * multiprocessors // units for wanted in (_FEW, _MANY))
    return max(1, min(max(few, min(many, tiles // _LONG_SLICE)), tiles))


def column_count(plan: DecodePlan, batch: int, rows: int, capacity: int, multiprocessors: int, listed: int = 0) -> int:
    """Among how many programs the columns of the values are dealt, in place of slices of the keys; 1: slices.

    Where few tiles are visited, merging slices takes as long as reading a fifth of them, and programs of the same rows
    find each other's keys in L2. They are as many as the device runs with one on a multiprocessor, if that leaves few
    idle. Parameters as in `split_count`.
    """
    spec, units = plan.spec, plan.units(batch, rows)
    backend, _, arch = spec.target.partition(":")
    large = plan.tiling.block_q * plan.pack > _LEAST_ROWS or spec.dim > _WIDE_TILE or spec.dim.bit_count() > 1
    elsewhere = backend != "cuda" or arch not in _ROOMY or spec.dtype is DType.FLOAT32 or plan.cache.fp8
    # Lists of a contiguous cache, and two levels, were not measured so.
    unknown = (
        plan.scattered
        or not plan.layout.plain
        or plan.shares is not None
        or (plan.listing is not None and plan.cache.page is None)
    )
    if large or elsewhere or unknown or units == 0:
        return 1
    wanted = min(multiprocessors // units, spec.v_dim // _LEAST_COLUMNS)
    columns = 1 << wanted.bit_length() - 1 if wanted > 0 else 0
    if columns < 2 or spec.v_dim.bit_count() > 1 or 4 * columns * units < 3 * multiprocessors:
        return 1
    return columns if _tiles(plan, rows, capacity, listed) <= _LONG_SLICE else 1


def _tiles(plan: DecodePlan, rows: int, capacity: int, listed: int) -> int:
    """Key tiles that a tile of queries visits at most."""
    if plan.listing is not None:
        return -(-listed * plan.listing.keys // plan.tiling.block_k)
    return most_tiles(plan, rows, capacity)


def most_tiles(plan: DecodePlan, rows: int, capacity: int) -> int:
    """Key tiles that a tile of queries visits at most at a length of `capacity`; all of them where that depends on
    data."""
    ends = run_scalars(plan.runs)
    if capacity == 0 or rows == 0:
        return 0
    # Tokens that the keys of a tile stand for.
    tile = plan.tiling.block_k * (1 if plan.view is None else plan.view.stride)
    order = plan.layout
    assert isinstance(order, Layout)
    tile *= order.k.period
    if any(isinstance(x, Read | Table | Arg) for e in ends for x in walk(e)):
        return -(-capacity // tile)
    h = np.arange(plan.spec.heads)[:, None]
    # Every way in which a length can stand to the tiles.
    lengths = np.arange(max(capacity - tile + 1, 1), capacity + 1)[:, None, None]
    q_tile = np.arange(-(-rows // plan.tiling.block_q))
    variables = {
        "Nk": lengths, "Nq": lengths, "start": lengths - rows, "b": np.asarray(0), "h": h, "g": h // plan.group,
        "q_tile": q_tile,
    }  # fmt: skip
    if not order.q.every:
        variables["q"] = np.maximum(lengths - rows + q_tile * plan.tiling.block_q, 0)
        variables["residue"] = evaluate(order.q.residue(Var("q")), variables, {})
        variables["i_start"] = evaluate(order.q.index(Var("q")), variables, {})
    most = np.zeros((1, 1, 1), int)
    for run in plan.runs.full + plan.runs.partial:
        most = most + np.maximum(evaluate(run.count, variables, {}), 0)
    return int(most.max())
