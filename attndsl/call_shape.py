"""The sizes of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attndsl.program import InputDecl, Program


@dataclass(frozen=True, slots=True)
class CallShape:
    """Sizes of one call: q [batch, heads, rows, dim], k [batch, kv_heads, k_len, dim], v [..., v_dim]."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    k_len: int
    dim: int
    v_dim: int

    def first_position(self, program: Program) -> int:
        """Query position of row 0."""
        return 0 if program.align_start else self.k_len - self.rows

    def q_len(self, program: Program) -> int:
        """Nq: one past the last query position."""
        return self.rows if program.align_start else self.k_len

    def members(self, decl: InputDecl, program: Program) -> int:
        """The members that a plan tells of."""
        assert decl.members is not None
        return -(-(self.q_len(program) if decl.of_rows else self.k_len) // decl.members) * decl.each
