"""What a call gives beside its output: sums or maxima of a branch's probabilities, over blocks of rows and keys.

    observation  o ::= Observation name branch (sum | max) rows keys

Rows and keys are divided as those of a selection are. Its value is a float [B, H, R, M]: for each head, each class of
the call's rows and each member of the keys, the sum or the largest of the branch's probabilities exp(logit - lse) of
their pairs, 0 where there are none. A key that is an entry of a view gives each member the share of its present tokens
inside it. In a packed call members are those of a
row's document; of all rows, those of all documents. These, and blocks of rows, lie one document after the other, with
room for as many as there are tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attndsl.diagnostics import Span
    from attndsl.members import Members, Tiles

# Powers of two and multiples of this have blocks that are not small in common with tiles.
_STEP = 16


@dataclass(frozen=True, slots=True)
class Observation:
    """One `observe` of a program.

    Row q is of class q // rows; with 1 each row of the call is a class of its own, with None all of them are one.
    Token k is of member k // keys. `members`, `row_tiles`: as in a `Selection`, what these are otherwise.
    """

    name: str
    branch: str
    largest: bool
    rows: int | None
    keys: int
    span: Span | None = field(default=None, compare=False, repr=False)
    members: Members | None = field(default=None, kw_only=True)
    row_tiles: Tiles | None = field(default=None, kw_only=True)

    @property
    def in_blocks(self) -> bool:
        """Whether classes and members are blocks in a row, of which tiles of a kernel hold some that are not small."""
        blocks = self.members is None and self.row_tiles is None
        return blocks and (self.rows is None or (_fits(self.rows) and _fits(self.keys)))


def _fits(size: int) -> bool:
    return size & (size - 1) == 0 or size % _STEP == 0


def classes(rows: int | None, call_rows: int, q_len: int) -> int:
    """The row classes of a call, whose rows end at position `q_len`: blocks count from position 0."""
    match rows:
        case None:
            return 1
        case 1:
            return call_rows
        case _:
            return -(-q_len // rows)
