"""Makes the plan of a selection of a packed call in a fused kernel, which ranks documents' entries as single keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.branches import Pool as ViewPool
from attndsl.branches import PoolFunction
from attndsl.capacity import capacity
from attndsl.chosen_entries import OfEntries, of_entries
from attndsl.program import CallShape, Program
from attndsl.runtime.masses import leading
from attndsl.runtime.runs import Runs, document_entries, pooled_runs
from attndsl.runtime.select import Selector, check_tokens, empty_plan, members_of
from attndsl.runtime.strips import State
from attndsl.select_plan import SelectPlan
from attndsl.selection import Pool, Selection, Vectors


@dataclass(slots=True)
class EntrySelector:
    """The plan of one selection for one kind of call; parameters as those of `Selector`. key: the registered program,
    which knows how to pool."""

    key: str
    program: Program
    selection: Selection
    shape: CallShape
    device: torch.device
    given: Sequence[Tensor]
    printer: Callable[[SelectPlan], str]
    dtype: torch.dtype
    made: OfEntries = field(init=False)
    capacity: int = field(init=False)
    selector: Selector = field(init=False)

    def __post_init__(self) -> None:
        shape, heads = self.shape, (self.shape.heads, self.shape.kv_heads)
        check_tokens(self.selection, shape)
        self.capacity = capacity(self.program, self.selection, heads, members_of(self.program, self.selection, shape))
        self.made = made = of_entries(self.program, self.selection, heads)
        size, real = (shape.batch, shape.kv_heads, shape.k_len, shape.dim), self._real
        like = [*self.given, *(torch.empty(size, dtype=real, device="meta") for _ in made.vectors)]
        self.selector = Selector(made.program, made.selection, shape, self.device, like, self.printer, of_entries=True)

    @property
    def _real(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __call__(
        self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None = None,
        state: State | None = None,
    ) -> Tensor:  # fmt: skip
        """The plan, int32 [B, H', rows, C], of the blocks of each row's document."""
        if not self.shape.batch * self.shape.rows * self.shape.k_len:
            return empty_plan(self.program, self.selection, self.shape, self.device).fill_(-1)
        entries, document, present = self._entries(inputs)
        vectors = [self._vectors(v, k, inputs, entries, present) for v in self.made.vectors]
        found = self.selector(q, k, [*inputs, *vectors], args, scale, state)
        # The number of the first entry of each row's document.
        first = self.shape.first_position(self.program)
        row = torch.arange(first, first + self.shape.rows, device=self.device).clamp(min=0)
        own = document.gather(-1, entries.number.to(torch.int64)[:, row])
        base = entries.number.gather(-1, own.to(torch.int64)).view(-1, 1, self.shape.rows, 1)
        plan = torch.where(found >= 0, found - base, -1)[..., : self.capacity]
        wanted = empty_plan(self.program, self.selection, self.shape, torch.device("meta")).shape
        plan = pad(plan, (0, wanted[3] - plan.shape[3]), value=-1)
        return plan.repeat_interleave(wanted[1] // plan.shape[1], 1).to(torch.int32)

    def _entries(self, inputs: Sequence[Tensor]) -> tuple[Runs, Tensor, Tensor | None]:
        """The entries of documents [B, keys], the first token of each one's document, and how many tokens there are."""
        names = [decl.name for decl in self.program.inputs]
        present: Tensor | None = None
        if self.program.lengths is not None:
            present = inputs[names.index(self.program.lengths)].clamp(0, self.shape.k_len).expand(self.shape.batch)
        ids = inputs[names.index(self.made.doc)].expand(self.shape.batch, -1).contiguous()
        return *document_entries(ids, self.selection.keys, self.selection.keys, present), present

    def _vectors(
        self, v: Vectors, k: Tensor, inputs: Sequence[Tensor], entries: Runs, present: Tensor | None
    ) -> Tensor:
        """[B, G, keys, D] of what each entry's keys hold, float32 (float64 for float64 tensors)."""
        x = k
        if v.source != "K":
            decl = self.program.input(v.source)
            x = leading(decl, inputs[[each.name for each in self.program.inputs].index(v.source)])
        x = x.expand(*k.shape).to(self._real)
        if v.pool is None:
            return x
        of_heads = Runs(*(each.unsqueeze(1).expand(-1, k.shape[1], -1).contiguous() for each in entries))
        if v.pool in (Pool.FIRST, Pool.LAST):
            at = of_heads.first if v.pool is Pool.FIRST else of_heads.end - 1
            at = at.clamp(0, self.shape.k_len - 1).to(torch.int64)
            return x.gather(2, at[..., None].expand(x.shape))
        size = self.selection.keys
        return pooled_runs(
            self.key, x, ViewPool(PoolFunction(v.pool.value), size, size, packed=self.made.doc), of_heads
        )


__all__ = ["EntrySelector"]
