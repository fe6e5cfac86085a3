"""Kernel plans: everything a kernel is generated from, frozen and hashable, and never a length."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from attndsl.linear import normalise
from attndsl.program import (
    Arg, Binary, Compare, Const, InputDecl, Logic, Program, Read, Scalar, Table, TableDecl, Var, children, reads, walk,
)  # fmt: skip
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering, Relation, TooHard, bounded
from attndsl.simplify import fold, specialise
from attndsl.tiles import Run, Side, TileRuns, tile_runs


class DType(Enum):
    """Element type of q, k, v and the output."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"  # on the CPU only


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
    """Tile sizes in tokens, and how a program runs on the device."""

    block_q: int
    block_k: int
    warps: int = 4
    stages: int = 2


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

    @property
    def sizes(self) -> dict[str, int]:
        return {"H": self.heads, "G": self.kv_heads, "D": self.dim, "Dv": self.v_dim}


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """A forward kernel.

    `runs`: key tiles of a query tile. `mask`: the condition under which a pair of a partial tile is allowed
    (None: all are). `scale`: an expression of the program, or None where it is a kernel argument.
    `score`, `sink`, `weights`: as in `program.Branch`, specialised.
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

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """Every scalar the kernel computes."""
        runs = [x for run in self.runs.full + self.runs.partial for x in (run.first, run.count)]
        body = (self.mask, self.scale, self.score, self.sink, self.weights)
        return (*runs, *(x for x in body if x is not None))

    @property
    def inputs(self) -> tuple[InputDecl, ...]:
        """The inputs the kernel reads, in the order they were declared."""
        used = {x.input for x in self._nodes() if isinstance(x, Read)}
        return tuple(decl for decl in self.program.inputs if decl.name in used)

    @property
    def tables(self) -> tuple[TableDecl, ...]:
        used = {x.name for x in self._nodes() if isinstance(x, Table)}
        return tuple(table for table in self.program.tables if table.name in used)

    @property
    def args(self) -> tuple[str, ...]:
        used = {x.name for x in self._nodes() if isinstance(x, Arg)}
        return tuple(name for name in self.program.args if name in used)

    def _nodes(self) -> Iterable[Scalar]:
        for e in self.scalars:
            yield from walk(e)


def default_tiling(spec: Spec) -> Tiling:
    """Tile sizes that are good without tuning (measured: benchmarks/RESULTS.md)."""
    backend, _, arch = spec.target.partition(":")
    dim = max(spec.dim, spec.v_dim)
    if backend == "cpu":
        return Tiling(128, 64)
    if backend == "hip":
        return Tiling(128, 64, warps=4, stages=1) if dim <= 128 else Tiling(64, 32, warps=4, stages=1)
    if spec.dtype is DType.FLOAT32:
        return Tiling(64, 32, warps=4, stages=2) if dim <= 128 else Tiling(32, 32, warps=4, stages=1)
    if spec.loads is Loads.DESCRIPTOR:
        # Two programs a multiprocessor hide each other's softmax: ahead of 128 x 128 with one (RESULTS.md).
        return Tiling(64, 64, warps=4, stages=3) if dim <= 128 else Tiling(128, 64, warps=8, stages=2)
    if dim <= 64:
        return Tiling(128, 64, warps=4 if arch != "90" else 8, stages=3)
    if 64 < dim <= 128 and int(arch) < 90:
        return Tiling(128, 32, warps=8, stages=3)  # key tiles of 64 spill registers there
    return Tiling(128, 64, warps=8, stages=2) if dim <= 128 else Tiling(64, 32, warps=4, stages=2)


@functools.lru_cache(maxsize=1024)
def forward_plan(program: Program, spec: Spec, tiling: Tiling) -> ForwardPlan:
    """The forward kernel of a program for one kind of call."""
    lowering = Lowering(program, (spec.heads, spec.kv_heads))
    relation = lowering.relation(program.branch.pattern)
    runs = _specialised(
        tile_runs(relation, tiling.block_q, tiling.block_k, Side.QUERY, program.align_start), spec.sizes
    )
    written = fold(lowering.predicate(program.branch.pattern))
    try:
        written = bounded(lowering.ctx, lambda: lowering.without_redundant(written))
    except TooHard:
        pass  # The condition stays as it was written.
    written = specialise(written, spec.sizes)
    branch = program.branch

    def known(e: Scalar | None) -> Scalar | None:
        return None if e is None else specialise(e, spec.sizes)

    return ForwardPlan(
        program, spec, tiling, runs,
        mask=pair_mask(relation, written) if runs.partial else None,
        scale=known(branch.scale), score=known(branch.score), sink=known(branch.sink), weights=known(branch.weights),
    )  # fmt: skip


def pair_mask(relation: Relation, written: Scalar) -> Scalar | None:
    """The condition for a pair of a visited tile, None where it always holds.

    The cheaper of the pattern as its author wrote it and as the integer sets simplified it.
    """
    in_range = Compare("<", Var("k"), Var("Nk"))
    candidates = [written if relation.keys_bounded else fold(Logic("and", (written, in_range)))]
    if not relation.atoms:
        candidates.append(fold(condition(relation.pairs, relation.context, relation.uniform)))
    best = min(candidates, key=pair_cost)
    return None if best == Const(True) else best


def pair_cost(e: Scalar) -> int:
    """Rough number of operations per pair: what reads neither q nor k is computed once."""
    costs: dict[int, int] = {}

    def cost(x: Scalar) -> int:
        if id(x) not in costs:
            costs[id(x)] = 0 if not reads(x, "q", "k") else _own_cost(x) + sum(cost(y) for y in children(x))
        return costs[id(x)]

    return cost(e)


def _own_cost(e: Scalar) -> int:
    match e:
        case Read() | Table():
            return 8
        case Binary(op="//" | "%"):
            return 4
        case _:
            return 1


def _specialised(runs: TileRuns, sizes: dict[str, int]) -> TileRuns:
    def plain(e: Scalar) -> Scalar:
        return fold(normalise(specialise(e, sizes)))

    def known(found: tuple[Run, ...]) -> tuple[Run, ...]:
        folded = (replace(r, first=plain(r.first), count=plain(r.count)) for r in found)
        return tuple(run for run in folded if run.count != Const(0))

    return TileRuns(known(runs.full), known(runs.partial))
