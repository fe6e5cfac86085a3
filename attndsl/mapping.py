"""Tiles that data rules out where it is not sorted: the runtime maps which tiles a condition can hold in.

`doc[q] == doc[k]` holds in no pair of two tiles whose ids do not overlap, `q <= until[k]` in none whose rows begin past
the last of the keys' ends. What a condition compares is bounded by its least and greatest value in a tile wherever it
reads one side alone, so a map of tiles takes one pass over each input and no look at pairs. Kernels read their tiles
from lists made of the map, and mask those in which the bounds do not say that every pair is allowed.

A table of truths that is looked up by a number of the query and one of the key, as the map of what a plan chooses is,
holds somewhere in a tile if it does for some number of its rows and some of its keys, which a product of the table and
of the numbers that each tile's keys have counts; one looked up by a number of both, as diagonals are, if it does
between the least and the greatest of these. So are members of documents, which count from the first token of the row's,
beside a number of the row.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from attndsl.cuts import interval
from attndsl.derivation import LEAST_ROWS, BlockMap, Chosen, Listed, TileMap
from attndsl.derive import derive
from attndsl.linear import terms
from attndsl.listing import Listable
from attndsl.program import (
    Axis,
    Binary,
    Blocks,
    CallShape,
    Choose,
    Compare,
    Complement,
    Const,
    Dim,
    InputDecl,
    Inter,
    Minus,
    On,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Union,
    Where,
    reads,
    scalars,
    walk,
)  # fmt: skip
from attndsl.runs import Side, TileRuns

# Tiles of 64 x 64 of a call, over the batch entries and heads that differ, up to which they are mapped.
MAX_TILES = 1 << 24


@functools.lru_cache(maxsize=1024)
def mapped(program: Program) -> bool:
    """Whether a program's tiles are mapped: a part of its condition is data that is bounded in tiles and not sorted."""
    if not program.plain or not _of_tokens(program.branch.pattern):
        return False
    found = (x for e in scalars(program.branch.pattern) for x in walk(e))
    # On a grid what compares coordinates is visited by boxes; members that a plan chooses are not.
    if program.grid is not None:
        found = (x for x in found if isinstance(x, Read) and _reads_both(x))
    return any(_maps(x, program) for x in found)


def maps_call(program: Program, shape: CallShape) -> bool:
    """Whether those of one call are, of its part over raw tokens: a map of it is small. The program has one branch, and
    is as it is before it is derived."""
    raw = [part for part in program.only.parts if part.plain]
    if not raw:
        return False
    derived = derive(program)
    if not mapped(derived := derived.with_branch(parts=tuple(part for part in derived.only.parts if part.plain))):
        return False
    read = tuple(scalars(derived.branch.pattern))
    batch = shape.batch if any(reads(e, "b") for e in read) else 1
    heads = shape.heads if any(reads(e, "h", "g") for e in read) else 1
    return batch * heads * -(-shape.rows // 64) * -(-shape.k_len // 64) <= MAX_TILES


def mapped_runs(
    program: Program, cond: Scalar, runs: TileRuns, block_q: int, block_k: int, side: Side
) -> tuple[Program, TileRuns]:
    """The runs of the tiles in which a condition can hold, of those in `runs`; the program declares map and lists."""
    lead = [Dim(axis) for axis, names in ((Axis.B, ("b",)), (Axis.H, ("h", "g"))) if reads(cond, *names)]
    name, taken = f"map_{block_q}_{block_k}", {decl.name for decl in program.inputs}
    while name in taken:
        name += "_"
    dims = (*lead, Dim(Axis.Q, block_q), Dim(Axis.K, block_k))
    decl = InputDecl(name, Type.INT, dims, derivation=TileMap(cond, block_q, block_k))
    program = replace(program, inputs=(*program.inputs, decl))
    choice = Listable("", Read(name, (Const(0),), Type.INT), decl, block_q, block_k, level=None)
    return choice.listed(program, runs, block_q, block_k, side)


def _of_tokens(pattern: Set) -> bool:
    """Whether a set is made of conditions on the tokens themselves."""
    match pattern:
        case Where():
            return True
        case Union(parts=parts) | Inter(parts=parts):
            return all(map(_of_tokens, parts))
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            return _of_tokens(a) and _of_tokens(b)
        case Complement(operand=operand) | On(operand=operand, place=Blocks()):
            return _of_tokens(operand)
        case _:
            return False


def tabled(e: Read, program: Program) -> bool:
    """Whether a truth of both positions is a table for tiles: looked up by a number of each, or by one of both.

    A list of segments (`Listed`) is looked up otherwise: what it tells of a tile is not asked.
    """
    if isinstance(program.input(e.input).derivation, Listed):
        return False
    mixed = [n for n, i in enumerate(e.index) if _reads_both(i)]
    of_q, of_k = ([n for n, i in enumerate(e.index) if reads(i, name) and n not in mixed] for name in "qk")
    if len(of_q) > 1 or len(of_k) + len(mixed) != 1 or (mixed and not _of_lag(e.index[mixed[0]])):
        return False
    if not of_q:
        return bool(mixed)
    dim = program.input(e.input).dims[of_q[0]]
    return dim.axis is Axis.CONST or dim.block // max(1, dim.size) >= LEAST_ROWS


def _of_lag(e: Scalar) -> bool:
    """Whether a number of both positions is bounded by bounds of what it is made of."""
    match e:
        case _ if not _reads_both(e):
            return True
        case Binary(op="//", left=a, right=Const(value=int(size))):
            return size > 0 and _of_lag(a)
        case Binary(op="+" | "-", left=a, right=b):
            return _of_lag(a) and _of_lag(b)
        case _:
            return False


def _reads_both(e: Scalar) -> bool:
    return reads(e, "q") and reads(e, "k")


def _maps(e: Scalar, program: Program) -> bool:
    if e.type is not Type.BOOL or not any(
        isinstance(x, Read)
        and isinstance(program.input(x.input).derivation, Chosen | BlockMap | None)
        and reads(x, "q", "k")
        for x in walk(e)
    ):
        return False
    match e:
        case Compare(left=left, right=right) if Type.FLOAT not in (left.type, right.type):
            apart = not any(reads(t, "q") and reads(t, "k") for t in terms(Binary("-", left, right))[1])
            return apart and interval(e, program, "q") is None and interval(e, program, "k") is None
        case Read():
            return not _reads_both(e) or tabled(e, program)
        case _:
            return False
