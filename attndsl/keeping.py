"""What decode keeps of a cache beside its tokens: the entries of pooled views, and vectors of members that selections
go by. Both are functions of a few tokens each, so a new token changes only the entries that it belongs to.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from attndsl.branches import Pool as PooledView
from attndsl.compose import Composition
from attndsl.diagnostics import error
from attndsl.plan import DType
from attndsl.pooling import loaded, power_of_two
from attndsl.program import Program
from attndsl.selection import Antidiagonal, Bound, Dot, Pool, Selection, Vectors

# The name of the keys themselves, of which nothing is kept, among what selections go by.
KEYS = "K"


@dataclass(frozen=True, slots=True)
class Kept:
    """Entries over the tokens [j * stride, j * stride + size), by name: of keys, and where `values` of these too.

    `exact`: they are ranked by, and kept in float32 (float64 of float64): in the cache's dtype means flip choices.
    """

    name: str
    function: Pool
    size: int
    stride: int
    values: bool
    exact: bool

    def entries(self, tokens: int) -> int:
        """How many entries so many tokens have."""
        return -(-tokens // self.stride)


def check_pool(program: Program, keeps: bool) -> None:
    """Raises `PatternError` (A911) where what a pool of pages keeps beside its tokens would be of such as `lengths`
    says are not present: it knows how many it holds alone."""
    if program.lengths is not None and keeps:
        what = f"what a paged cache keeps beside its tokens is of all of them, not of those within `{program.lengths}`"
        raise error(
            "A911", what, program.span, help="leave the clause out: sequences of a cache have their own lengths"
        )


def kept(program: Program, composition: Composition) -> tuple[Kept, ...]:
    """All that decode keeps for a program. Raises `PatternError` (A911) as `kept_beside` does."""
    return kept_beside(program, composition, frozenset())


def kept_beside(program: Program, composition: Composition, chosen: Container[str]) -> tuple[Kept, ...]:
    """What decode keeps for a program where the plans of the selections named are handed in.

    Of listed tokens nothing is kept, since each step gathers them, and of views whose extents data tells neither: where
    an entry lies among the others follows from all tokens before it. So it is with members of documents.
    """
    pools = [(each.name, each.pool) for each in composition.pools if not each.told_by]
    views = [
        Kept(name, Pool(pool.function.value), pool.size, pool.stride, True, False)
        for name, pool in pools
        if isinstance(pool, PooledView)
    ]
    ranked = () if program.packed is not None else program.selections
    members = (of_members(x, v) for x in ranked if x.name not in chosen for v in vectors_of(x))
    return tuple(dict.fromkeys((*views, *(x for x in members if x is not None))))


def made_anew(program: Program, composition: Composition) -> bool:
    """Whether each step makes something of all tokens of a cache: entries of views that data tells, or vectors of
    members of documents, or that are no blocks in a row."""
    views = any(each.told_by and isinstance(each.pool, PooledView) for each in composition.pools)
    apart = program.packed is not None
    return views or any((apart or x.members is not None) and kept_by(x) for x in program.selections)


def kept_by(selection: Selection) -> tuple[Kept | None, ...]:
    """What is kept for the vectors of a selection's members that keys make; None where these are the keys, or are made
    of them anew."""
    if isinstance(selection.score, Antidiagonal):
        return (None,)
    return tuple(of_members(selection, v) for v in vectors_of(selection) if v.source == KEYS)


def of_members(selection: Selection, vectors: Vectors) -> Kept | None:
    """What is kept of keys for the vectors of a selection's members; None where these are tokens, or an input's, or
    lie apart."""
    if vectors.source != KEYS or vectors.pool is None or selection.keys == 1 or selection.members is not None:
        return None
    name = f"{vectors.pool.value}(K) over blocks({selection.keys})"
    return Kept(name, vectors.pool, selection.keys, selection.keys, False, True)


def vectors_of(selection: Selection) -> Iterator[Vectors]:
    """The vectors of members that a selection scores."""
    match selection.score:
        case Dot(y=y):
            yield y
        case Bound(low=low, high=high):
            yield from (low, high)
        case _:
            return


@dataclass(frozen=True, slots=True)
class KeepPlan:
    """The kernel that makes entries of a cache anew. `page`: tokens of a page, None where a sequence's lie together.

    `fp8`: tokens are float8 (e4m3), and `dtype` that of entries. `scaled`: what heads are multiplied by is given.
    """

    function: Pool
    size: int
    stride: int
    dim: int
    dtype: DType
    target: str
    page: int | None
    fp8: bool = False
    scaled: bool = False

    @property
    def width(self) -> int:
        """The head dimension, padded to a power of two."""
        return power_of_two(self.dim)

    @property
    def tokens(self) -> int:
        """Tokens of an entry that are loaded at once."""
        return loaded(self.size)
