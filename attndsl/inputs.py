"""Declarations of what a program reads beside q, k and v: inputs of a call, and compile-time tables."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from attndsl.scalar import Type

if TYPE_CHECKING:
    from attndsl.derivation import Derivation
    from attndsl.diagnostics import Span
    from attndsl.members import Tiles


class Axis(Enum):
    """What a dimension of an input ranges over."""

    B = "b"
    H = "h"
    G = "g"
    Q = "q"  # rows of the call; with block > 1, blocks of absolute query positions
    K = "k"  # absolute tokens; with block > 1, blocks of them
    D = "D"
    DV = "Dv"
    CONST = "const"
    LIST = "list"  # the entries of a list, as many as a tensor has


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of an input: `q/64` is Dim(Axis.Q, block=64), `3` is Dim(Axis.CONST, size=3).

    A `size` beside a block is what each has of it: row classes or members that are tiles. `apart`: of a packed call,
    the blocks of each document, one document after the other, with room for as many as there are tokens. `tiles`: of
    row classes which these are; in a packed call each stands at its first token.
    """

    axis: Axis
    block: int = 1
    size: int = 0
    apart: bool = False
    tiles: Tiles | None = None


# Tensors that kernels have whatever the program, beside q, k and v.
KERNEL_TENSORS = frozenset(
    "out lse dout d_lse dq dk dv delta row_lse seed part part_lse page_table seq_lens q_scale k_scale v_scale".split()
)


# What the others are called: sums of gradients and their places, outputs of branches and their lse, with gradients.
_PREFIXES = ("sum_", "at_", "out_", "lse_", "d_out_", "d_lse_")


@dataclass(frozen=True, slots=True)
class InputDecl:
    """`input name : type[dims] learnable sorted`; `derivation`: how the runtime makes it, where no call gives it.

    members: of a plan, the tokens of a member (`blocks(64)` has 64, `tokens` 1), or of `each` members where these are
    no blocks; its last dimension is a list. A plan is int32, the members chosen for a row class in increasing order and
    -1 after them (an entry that is no member, or not above all before it, is skipped), or uint8, with an entry for
    every member, not 0 where it is chosen. `of_rows`: they are distances, as many as rows' positions have.
    """

    name: str
    type: Type
    dims: tuple[Dim, ...]
    learnable: bool = False
    sorted: bool = False
    derivation: Derivation | None = None
    members: int | None = None
    each: int = 1
    of_rows: bool = False
    span: Span | None = field(default=None, compare=False, repr=False)

    def of_documents(self, packed: bool) -> InputDecl:
        """The same of a packed call, or of a document alone: whose blocks its dimensions have."""
        dims = tuple(
            replace(dim, apart=packed and dim.block > 1) if dim.axis in (Axis.Q, Axis.K) else dim for dim in self.dims
        )
        return self if dims == self.dims else replace(self, dims=dims)

    @property
    def tile(self) -> int:
        """Of a table of tiles, of the rows of a call and of keys, how many of either each has; else 0."""
        lists = [dim.block for dim in self.dims if dim.axis is Axis.LIST]
        return lists[0] if len(lists) == 2 else 0

    @property
    def parameter(self) -> str:
        """What its parameters in a kernel are named after: kernels have tensors of their own."""
        taken = self.name in KERNEL_TENSORS or self.name.startswith(_PREFIXES) or self.name.endswith("_input")
        return f"{self.name}_input" if taken else self.name

    @property
    def holds_integers(self) -> bool:
        """Whether a call gives it integers to compute with, of whatever width their memory has."""
        return self.type is Type.INT and self.derivation is None and self.members is None


@dataclass(frozen=True, slots=True)
class TableDecl:
    """A compile-time table; `values` is flat, row-major; a dimension declared `h` or `g`
    is checked against the heads of a call."""

    name: str
    type: Type
    dims: tuple[Dim, ...]
    shape: tuple[int, ...]
    values: tuple[int | float | bool, ...]
