"""Which row blocks and members hold a pair of a set, on a device: the candidates of a selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attndsl.block_constant import coarsened
from attndsl.branches import Branch, Part
from attndsl.derivation import DocumentBlocks, DocumentEnds
from attndsl.derive import derive, with_needed
from attndsl.program import CallShape, Program, Read, Scalar, Set, walk
from attndsl.relation import Lowering
from attndsl.runtime.derive import Deriver
from attndsl.runtime.derive_ragged import RaggedDeriver
from attndsl.runtime.values import Values
from attndsl.simplify import fold


@dataclass(slots=True)
class Touched:
    """Which (row block, member) hold a pair of a set, in closed form where the set has one."""

    program: Program
    shape: CallShape
    device: torch.device
    rows: int
    keys: int
    condition: Scalar
    deriver: Deriver

    @classmethod
    def of(
        cls, program: Program, pattern: Set, rows: int, keys: int, shape: CallShape, device: torch.device,
        given: Sequence[Tensor] = (), ragged: bool = False, more: Sequence[Scalar] = (),
    ) -> Touched:  # fmt: skip
        """ragged: sequences have lengths of their own, and the shape's is the most that one may have. more: scalars
        that are asked for beside the set."""
        parts = (Part(coarsened(pattern, rows, keys)),)
        derived = derive(replace(program, branches=(Branch(parts),), output=None), ragged)
        heads = (shape.heads, shape.kv_heads)
        condition = fold(Lowering(derived, heads).predicate(derived.branch.pattern))
        # Of a set that has a closed form no map of blocks is made: at each step of a decode it would be as large as the
        # cache.
        # Where documents lie is asked for beside it.
        read = {x.input for x in walk(condition, *more) if isinstance(x, Read)}
        ends = {d.name for d in derived.inputs if isinstance(d.derivation, DocumentEnds | DocumentBlocks)}
        derived = with_needed(derived, (decl for decl in derived.inputs if decl.name in read | ends))
        make = RaggedDeriver if ragged else Deriver
        return cls(derived, shape, device, rows, keys, condition, make(derived, shape, device, given=given))

    def values(
        self, inputs: Sequence[Tensor], args: Sequence[int], tables: Mapping[str, Tensor],
        lengths: Tensor | None = None,
    ) -> Values:  # fmt: skip
        """The scalars of a call, its derived inputs among them."""
        return call_values(self.program, self.shape, self.deriver, inputs, args, tables, lengths)

    def at(self, values: Values, q_pos: Tensor, *, narrow: bool = False) -> Tensor:
        """bool [B or 1, H or 1, rows or 1, members], for row blocks of the positions q_pos: see `as_rows`.

        narrow: one for all members where it is the same for each.
        """
        members = torch.arange(-(-self.shape.k_len // self.keys), device=self.device)
        q_pos, first = as_rows(q_pos), (members * self.keys).view(1, 1, 1, -1)
        inside = values.at(q=q_pos, k=first).tensor(self.condition) & (q_pos >= 0)
        if values.lengths is not None:
            inside = inside & (first < values.lengths)
        return inside if narrow else inside.expand(*inside.shape[:-1], members.numel())


def as_rows(positions: Tensor) -> Tensor:
    """Positions [rows], or [B, rows] where sequences differ, as [B or 1, 1, rows, 1]."""
    return positions[None, None, :, None] if positions.dim() == 1 else positions[:, None, :, None]


def call_values(
    program: Program, shape: CallShape, deriver: Deriver, inputs: Sequence[Tensor], args: Sequence[int],
    tables: Mapping[str, Tensor], lengths: Tensor | None = None,
) -> Values:  # fmt: skip
    """The scalars of a derived program in a call, its derived inputs among them. lengths: int64 [B, 1, 1, 1], where
    sequences have their own."""
    device, names = deriver.device, [decl.name for decl in program.inputs]
    if lengths is None:
        derived = deriver(inputs, args)
    else:
        assert isinstance(deriver, RaggedDeriver)
        derived = deriver.of(inputs, args, lengths.view(-1))
    tensors = dict(zip(names, [*inputs, *derived], strict=True))
    h = torch.arange(shape.heads, device=device).view(1, -1, 1, 1)
    variables = {
        "H": shape.heads, "G": shape.kv_heads, "D": shape.dim, "Dv": shape.v_dim,
        "Nq": shape.q_len(program) if lengths is None else lengths,
        "Nk": shape.k_len if lengths is None else lengths,
        "b": torch.arange(shape.batch, device=device).view(-1, 1, 1, 1), "h": h,
        "g": h // (shape.heads // shape.kv_heads),
    }  # fmt: skip
    arguments = dict(zip(program.args, args, strict=True))
    return Values(program, shape, device, tensors, tables, arguments, variables, lengths)
