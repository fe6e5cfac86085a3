"""How the gradient of a learnable input is summed: over what the index of its read does not follow."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum

from attndsl.linear import normalise
from attndsl.program import Axis, Binary, Const, InputDecl, Read, Scalar, Table, Type, Var, reads, rebuild, substitute


class Over(Enum):
    """What a kernel sums the gradient of a read over."""

    TILE = "tile"  # the index reads neither q nor k: all pairs of a query tile
    KEYS = "keys"  # it reads q: the keys of a row
    ROWS = "rows"  # it reads k: the rows that see a key
    DIAGONALS = "diagonals"  # it reads both, through q - k alone: the pairs of a diagonal
    PAIRS = "pairs"  # it reads both in another way: the batch entries and heads that it does not follow


@dataclass(frozen=True, slots=True)
class Learned:
    """A read of a learnable input, in the logit (or weight) or in the sink, and the derivative by it."""

    read: Read
    slope: Scalar
    of_sink: bool

    @property
    def over(self) -> Over:
        by_q, by_k = reads(self.read, "q"), reads(self.read, "k")
        if by_q and by_k:
            return Over.PAIRS if on_diagonal(self.read) is None else Over.DIAGONALS
        if by_q:
            return Over.KEYS
        return Over.ROWS if by_k else Over.TILE


@functools.lru_cache(maxsize=1024)
def on_diagonal(read: Read) -> Read | None:
    """The read with q - k in place of q, and 0 of k; None where its index depends on q and k otherwise.

    >>> on_diagonal(Read("bias", (Binary("-", Binary("+", Var("q"), Const(4)), Var("k")),), Type.FLOAT)).index
    (Binary(op='+', left=Var(name='q'), right=Const(value=4)),)
    """
    # What stays the same when both positions move by one depends on their difference.
    moved = {name: Binary("+", Var(name), Const(1)) for name in "qk"}
    index = tuple(map(_normal, read.index))
    if tuple(_normal(substitute(e, moved)) for e in read.index) != index:
        return None
    at_zero = tuple(_normal(substitute(e, {"k": Const(0)})) for e in index)
    return Read(read.input, at_zero, read.type)


def _normal(e: Scalar) -> Scalar:
    """The integer in normal form, the indices inside it too."""

    def step(x: Scalar) -> Scalar:
        match x:
            case Read(input=name, index=index, type=type):
                return Read(name, tuple(map(_plain, index)), type)
            case Table(name=name, index=index, type=type):
                return Table(name, tuple(map(_plain, index)), type)
            case _:
                return x

    return _plain(rebuild(e, step))


def _plain(e: Scalar) -> Scalar:
    return normalise(e) if e.type is Type.INT else e


@dataclass(frozen=True, slots=True)
class Owned:
    """The batch entries and heads that have sums of their own, where a read is summed over the others.

    `batch`: each batch entry has. `head`: each "h", each "g", or "" (all heads go together).
    """

    batch: bool
    head: str

    @classmethod
    def of(cls, read: Read, runs: tuple[Scalar, ...]) -> Owned:
        """What the index or the tiles to visit (the ends of `runs`) follow."""
        followed = (read, *runs)
        by_h, by_g = (any(reads(x, name) for x in followed) for name in ("h", "g"))
        return cls(any(reads(x, "b") for x in followed), "h" if by_h else "g" if by_g else "")

    def takes_each_entry_once(self, read: Read, decl: InputDecl) -> bool:
        """Whether no two pairs take the same entry: `bias[h, q, k]` within a head.

        Then the sum over what is not owned is the gradient itself.
        """
        pairs = zip(read.index, decl.dims, strict=True)
        own = {e.name for e, dim in pairs if isinstance(e, Var) and e.name == dim.axis.value}
        plain = all(dim.block == 1 for dim in decl.dims if dim.axis in (Axis.Q, Axis.K))
        return plain and {"q", "k", *("b" * self.batch), *self.head} <= own
