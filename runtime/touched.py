"""Which row blocks and members hold a pair of a set, on a device: the candidates of a selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attndsl.branches import Branch, Part
from attndsl.derive import derive
from attndsl.program import CallShape, Coarse, Coarsen, Program, Scalar, Set
from attndsl.relation import Lowering
from attndsl.runtime.derive import Deriver
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
        given: Sequence[Tensor] = (),
    ) -> Touched:  # fmt: skip
        if rows > 1 or keys > 1:
            pattern = Coarsen(pattern, rows, keys, Coarse.ANY)
        derived = derive(replace(program, branches=(Branch((Part(pattern),)),), output=None))
        heads = (shape.heads, shape.kv_heads)
        condition = fold(Lowering(derived, heads).predicate(derived.branch.pattern))
        return cls(derived, shape, device, rows, keys, condition, Deriver(derived, shape, device, given=given))

    def values(self, inputs: Sequence[Tensor], args: Sequence[int], tables: Mapping[str, Tensor]) -> Values:
        """The scalars of a call, its derived inputs among them."""
        return call_values(self.program, self.shape, self.deriver, inputs, args, tables)

    def at(self, values: Values, q_pos: Tensor, *, narrow: bool = False) -> Tensor:
        """bool [B or 1, H or 1, rows or 1, members], for row blocks of the positions q_pos.

        narrow: one for all members where it is the same for each.
        """
        members = torch.arange(-(-self.shape.k_len // self.keys), device=self.device)
        here = values.at(q=q_pos.view(1, 1, -1, 1), k=(members * self.keys).view(1, 1, 1, -1))
        inside = here.tensor(self.condition) & (q_pos >= 0).view(1, 1, -1, 1)
        return inside if narrow else inside.expand(*inside.shape[:-1], members.numel())


def call_values(
    program: Program, shape: CallShape, deriver: Deriver, inputs: Sequence[Tensor], args: Sequence[int],
    tables: Mapping[str, Tensor],
) -> Values:  # fmt: skip
    """The scalars of a derived program in a call, its derived inputs among them."""
    device, names = deriver.device, [decl.name for decl in program.inputs]
    tensors = dict(zip(names, [*inputs, *deriver(inputs, args)], strict=True))
    h = torch.arange(shape.heads, device=device).view(1, -1, 1, 1)
    variables = {
        "H": shape.heads, "G": shape.kv_heads, "D": shape.dim, "Dv": shape.v_dim, "Nq": shape.q_len(program),
        "Nk": shape.k_len, "b": torch.arange(shape.batch, device=device).view(-1, 1, 1, 1), "h": h,
        "g": h // (shape.heads // shape.kv_heads),
    }  # fmt: skip
    arguments = dict(zip(program.args, args, strict=True))
    return Values(program, shape, device, tensors, tables, arguments, variables)
