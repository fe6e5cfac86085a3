"""Facts about a program that hold for every length."""

from __future__ import annotations

import functools

from attndsl.compose import compose
from attndsl.derive import derive
from attndsl.effort import TooHard, bounded
from attndsl.left_tiles import without_tiles
from attndsl.listing import EVEN
from attndsl.program import Binary, CallShape, Inter, Minus, Program, Set, Union, reads, scalars, walk
from attndsl.relation import Lowering


@functools.lru_cache(maxsize=256)
def reads_positions(program: Program) -> bool:
    """Whether the meaning of a pair depends on where its query stands."""
    branch = derive(without_tiles(program)).only
    if branch.queries is not None or any(part.within is not None for part in branch.parts):
        return True  # Queries are pooled by their positions, members weighed as those of positions are.
    said = (branch.scale, branch.score, branch.sink, branch.weights)
    sets = (x for part in branch.parts for x in (part.pattern, part.entries) if x is not None)
    written = (e for x in sets for e in scalars(x))
    return any(reads(e, "q", "Nq") for e in (*written, *(e for e in said if e is not None)))


@functools.lru_cache(maxsize=256)
def reads_remainders(program: Program) -> bool:
    """Whether the pattern asks for remainders: it may then have pieces that hold every so-many-th token."""
    if not program.plain:
        return False
    written = (e for e in scalars(program.branch.pattern))
    return any(isinstance(x, Binary) and x.op == "%" for e in written for x in walk(e))


def is_whole(program: Program, shape: CallShape) -> bool:
    """Whether the tokens of a call fill the layers that pieces of the program may see: its rows are all its tokens, as
    many of each remainder that the program may ask for; on a grid, rows and keys are whole layers of its first axis."""
    grid, remainders = program.grid, reads_remainders(program)
    even = shape.rows == shape.k_len and shape.k_len % EVEN == 0
    filled = grid is None or all(tokens % grid.stride == 0 for tokens in (shape.rows, shape.k_len))
    return program.plain and (remainders or grid is not None) and filled and (even or not remainders)


@functools.lru_cache(maxsize=256)
def within_causal(program: Program) -> bool:
    """Whether no row sees a later token, whatever the data; False if that is not decided within the effort bound."""
    program = derive(program)
    lowering = Lowering(program)

    def within(pattern: Set) -> bool:
        match pattern:
            case Inter(parts=parts) if any(map(within, parts)):
                return True
            case Union(parts=parts) if all(map(within, parts)):
                return True
            case Minus(left=left) if within(left):
                return True
            case _:
                try:
                    pairs = lowering.relation(pattern).pairs
                    return bounded(lowering.ctx, lambda: bool(pairs.is_subset(lowering.set("{ [q, k] : k <= q }"))))
                except TooHard:
                    return False

    return all(within(part.pattern) for part in program.only.parts)


def takes_more_rows_than_keys(program: Program) -> bool:
    """Whether a call may have more rows than keys: their positions do not matter, or see nothing below 0."""
    return program.align_start or not reads_positions(program) or within_causal(program)


@functools.lru_cache(maxsize=256)
def classes_rows_before(program: Program) -> bool:
    """Whether a call in which rows are chosen for or observed by their classes may have more rows than keys. Classes
    are of positions: every branch has to see nothing below 0."""
    return program.align_start or all(within_causal(part) for part in compose(program).programs)
