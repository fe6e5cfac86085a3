"""Two levels in a decode of packed sequences, whose members begin where a row's document does: by torch.

The operator `attndsl::levels_ragged`. A row's logits with all keys of its cache are held at once, strip by strip of
rows, of which a decode has few; those of its document are then put in a row, and members of it are as many apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.branch_mass import BranchMass, mass_of
from attndsl.compose import of_one_level
from attndsl.program import CallShape, Program
from attndsl.runtime.call import present_lengths
from attndsl.runtime.derive_ragged import RaggedDeriver
from attndsl.runtime.document_blocks import Documents
from attndsl.runtime.engine import MAX_PREPARED
from attndsl.runtime.lasting import table_tensor
from attndsl.runtime.ops import traced
from attndsl.runtime.registry import engine_of
from attndsl.runtime.strips import STRIP
from attndsl.runtime.touched import as_rows, call_values

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "levels_ragged(str program, Tensor q, Tensor k, Tensor v, Tensor shares, Tensor seq_lens, Tensor[] inputs, "
    "SymInt[] args, float? scale, int member) -> Tensor"
)
_KEPT: dict[Any, _Kind] = {}


def levels_of_documents(
    key: str, q: Tensor, k: Tensor, v: Tensor, shares: Tensor, seq_lens: Tensor, inputs: Sequence[Tensor],
    args: Sequence[int], scale: float | None, member: int,
) -> Tensor:  # fmt: skip
    """The output [B, Hq, rows, Dv] of a branch of two levels, of the last rows of sequences.

    q: [B, Hq, rows, D]. k, v: [B, Hkv, tokens, D and Dv], of which each sequence has the first, int32 [B]. shares: what
    weighs the members of each row's document, [B, Hq, rows, members], of `member` tokens each. inputs: those of the
    branch.
    """
    call = (key, q, k, v, shares, seq_lens, [*inputs], [*args], scale, member)
    found: Tensor = (torch.ops.attndsl.levels_ragged if traced((q, k, v, *inputs)) else _levels)(*call)
    return found


@dataclass(slots=True)
class _Kind:
    """One kind of call: same shapes, dtypes and device. program: with one softmax in the place of two levels."""

    program: Program
    shape: CallShape
    device: torch.device
    given: Sequence[Tensor]
    mass: BranchMass = field(init=False)
    deriver: RaggedDeriver = field(init=False)
    tables: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        heads = (self.shape.heads, self.shape.kv_heads)
        self.mass = mass_of(self.program, self.program.only, heads, ragged=True)
        self.deriver = RaggedDeriver(self.mass.program, self.shape, self.device, given=self.given)
        self.tables = {table.name: table_tensor(table, self.device) for table in self.program.tables}

    def strips(self) -> Iterator[slice]:
        shape = self.shape
        step = max(1, STRIP[self.device.type] // max(1, shape.batch * shape.heads * shape.k_len))
        return (slice(low, min(low + step, shape.rows)) for low in range(0, shape.rows, step))


def _levels(
    key: str, q: Tensor, k: Tensor, v: Tensor, shares: Tensor, seq_lens: Tensor, inputs: Sequence[Tensor],
    args: Sequence[int], scale: float | None, member: int,
) -> Tensor:  # fmt: skip
    found = _fake(key, q, k, v, shares, seq_lens, inputs, args, scale, member).zero_()
    if not k.shape[2] or not found.numel():
        return found
    kind = _kind(key, q, k, v, inputs)
    shape, mass, tokens = kind.shape, kind.mass, k.shape[2]
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        lengths = seq_lens.clamp(0, tokens).to(torch.int64).view(-1, 1, 1, 1)
        values = call_values(mass.program, shape, kind.deriver, inputs, args, kind.tables, lengths)
        own, factor = mass.program.only.scale, shape.dim**-0.5 if scale is None else scale
        by = values.number(own) if scale is None and own is not None else factor
        index = torch.arange(tokens, device=q.device)
        # What lies past a sequence's end in its cache may be anything.
        there = index.view(-1, 1) < lengths
        keys, held = (torch.where(there, x, 0).to(real) for x in (k, v))
        ids = inputs[[decl.name for decl in kind.program.inputs].index(kind.program.packed or "")]
        present = present_lengths(kind.program, shape, inputs, lengths)
        assert present is not None
        documents = Documents.of(ids.expand(shape.batch, -1).contiguous(), present.view(-1))
        members = -(-tokens // member)
        for rows in kind.strips():
            position = lengths.view(-1, 1) - shape.rows + torch.arange(rows.start, rows.stop, device=q.device)
            grouped = q[:, :, rows].to(real).unflatten(1, (shape.kv_heads, -1)).flatten(2, 3)
            dots = (grouped @ keys.transpose(-1, -2)).unflatten(2, (-1, position.shape[1])).flatten(1, 2)
            logits = dots * by
            at = values.at(q=as_rows(position), k=index.view(1, 1, 1, -1), s=logits)
            if mass.logit is not None:
                logits = at.tensor(mass.logit).to(real).expand_as(dots)
            seen = at.tensor(mass.seen) & as_rows(position >= 0) & (index < lengths)
            logits = torch.where(seen, logits, -torch.inf)
            # The tokens of each row's document in a row, past its last those of others, which are not seen.
            first = documents.first.gather(-1, position.clamp(min=0))
            token = first[..., None] + torch.arange(members * member, device=q.device)
            inside, to = (token < tokens)[:, None], token.clamp(max=tokens)[:, None].expand(*dots.shape[:3], -1)
            logits = torch.where(inside, logits.gather(3, to.clamp(max=tokens - 1)), -torch.inf)
            logits = logits.unflatten(3, (members, member))
            highest = logits.amax(4, keepdim=True)
            mass_of_keys = (logits - torch.where(highest > -torch.inf, highest, 0)).exp()
            sums = mass_of_keys.sum(4, keepdim=True)
            weights = mass_of_keys / torch.where(sums > 0, sums, 1) * shares[:, :, rows, :, None].to(real)
            # Back in their places, those past the last token in one of their own.
            spread = weights.new_zeros(*dots.shape[:3], tokens + 1).scatter_(3, to, weights.flatten(3))
            spread = spread[..., :tokens].unflatten(1, (shape.kv_heads, -1)).flatten(2, 3)
            found[:, :, rows] = (spread @ held).unflatten(2, (-1, position.shape[1])).flatten(1, 2).to(q.dtype)
    return found


def _kind(key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> _Kind:
    kind = (key, q.shape, q.dtype, q.device, k.shape, v.shape, tuple((x.shape, x.dtype) for x in inputs))
    if kind not in _KEPT:
        if len(_KEPT) >= MAX_PREPARED:
            _KEPT.clear()
        batch, heads, rows, dim = q.shape
        shape = CallShape(batch, heads, k.shape[1], rows, k.shape[2], dim, v.shape[3])
        like = [torch.empty_like(x, device="meta") for x in inputs]
        _KEPT[kind] = _Kind(of_one_level(engine_of(key).program), shape, q.device, like)
    return _KEPT[kind]


def _fake(key: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("levels_ragged", _levels, _device)
_LIBRARY.impl("levels_ragged", _fake, "Meta")

__all__ = ["levels_of_documents"]
