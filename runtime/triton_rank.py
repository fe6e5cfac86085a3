"""Launching the kernels of a selection in a decode: a number for each member, then the choice of the greatest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attndsl.plan import Spec
from attndsl.program import CallShape, Const, Program
from attndsl.runtime.call import device_target, dtype_of
from attndsl.runtime.launcher import Slot
from attndsl.runtime.triton_launch import ELEMENT, INPUTS, POINTER, prepare, program_sources
from attndsl.select_plan import SelectPlan, rank_plan
from attndsl.selection import Probs, Selection

RANK, CHOOSE = "rank_members", "choose_members"
# Rows of a sequence for which each ranks all members on its own; more share products in torch.
MOST_ROWS = 16
# Warps of a program that chooses.
_CHOOSING = 4


class TritonRank:
    """The kernels for one kind of decode: same shapes and dtypes of q and of the cache."""

    def __init__(
        self, plan: SelectPlan, program: Program, shape: CallShape, printer: Callable[[SelectPlan], str]
    ) -> None:
        self.plan, self.shape, self.text = plan, shape, printer(plan)
        self.lists = shape.heads // plan.share
        known = plan.selection.scale
        if isinstance(plan.selection.score, Probs):
            known = program.named(plan.selection.score.branch).scale
        self.scale = float(known.value) if isinstance(known, Const) else shape.dim**-0.5
        self._prepared: dict[Any, tuple[Callable[[Sequence[Any]], None], ...]] = {}

    @classmethod
    def of(
        cls, program: Program, selection: Selection, shape: CallShape, q: torch.dtype, device: torch.device,
        members: int, printer: Callable[[SelectPlan], str], page: int | None = None,
    ) -> TritonRank | None:  # fmt: skip
        """None where a decode's choice has no kernels. page: as in `SelectPlan`."""
        if shape.rows > MOST_ROWS:
            return None
        dtype = dtype_of(torch.empty(0, dtype=q))
        spec = Spec(shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype, device_target(device))
        plan = rank_plan(program, selection, spec, members, page)
        return None if plan is None else cls(plan, program, shape, printer)

    def __call__(
        self, into: Tensor, q: Tensor, vectors: Sequence[Tensor], seq_lens: Tensor, page_table: Tensor | None,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, lse: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes the plan int32 [B, lists, rows, capacity].

        vectors: of the members, [B or 1, heads, members, D] of any dtype, or what bounds them, two of these; for
        `probs` the branch's keys. With a page table the members are keys, in pools of pages. lse: what that branch
        had, float32 [B, Hq, rows].
        """
        members = -(-self.shape.k_len // self.plan.selection.keys)
        if not into.numel() or not members:
            into.fill_(-1)
            return
        vectors = [x if x.stride(-1) == 1 else x.contiguous() for x in vectors]
        keys = torch.empty(*into.shape[:3], members, dtype=torch.int32, device=q.device)
        kind = (
            q.stride(), seq_lens.stride(), None if page_table is None else (page_table.shape, page_table.stride()),
            *((x.shape, x.stride(), x.dtype) for x in vectors),
            *((x.shape, x.stride(), x.dtype) for x in inputs),
        )  # fmt: skip
        if kind not in self._prepared:
            self._prepared[kind] = self._prepare(members, q, vectors, seq_lens, page_table, inputs)
        scale = self.scale if scale is None else scale
        values = (q, vectors[0], vectors[-1], keys, lse, scale, *inputs, *args, seq_lens, into, page_table)
        for launch in self._prepared[kind]:
            launch(values)

    def _prepare(
        self, members: int, q: Tensor, vectors: Sequence[Tensor], seq_lens: Tensor, page_table: Tensor | None,
        inputs: Sequence[Tensor],
    ) -> tuple[Callable[[Sequence[Any]], None], ...]:  # fmt: skip
        plan, shape = self.plan, self.shape
        first = INPUTS + len(inputs) + len(plan.program.args)
        sources: dict[str, Any] = {
            "q_ptr": Slot(0, f"*{ELEMENT[plan.spec.dtype]}"), "keys_ptr": Slot(3, "*i32"), "lse_ptr": Slot(4, "*fp32"),
            "scale": Slot(5, "fp32"), "seq_lens_ptr": Slot(first, "*i32"), "plan_ptr": Slot(first + 1, "*i32"),
            "rows": shape.rows, "members": members, "capacity": shape.k_len, "stride_lens": seq_lens.stride(0),
            "vector_share": shape.heads // vectors[0].shape[1],
            **{f"stride_q{axis}": q.stride(i) for i, axis in enumerate("bhn")},
            **program_sources(plan, shape, inputs, q.device),
        }  # fmt: skip
        if page_table is not None:
            sources |= {
                "page_table_ptr": Slot(first + 2, "*i32"), "stride_table": page_table.stride(0),
                "pages": vectors[0].shape[0],
            }  # fmt: skip
        names = ("low", "high") if len(vectors) > 1 else ("vectors",)
        for i, (name, x) in enumerate(zip(names, vectors, strict=True)):
            sources[f"{name}_ptr"] = Slot(1 + i, POINTER[x.dtype])
            # What all sequences share is broadcast.
            sources |= {
                f"stride_{name}{a}": 0 if n == 1 else s for a, s, n in zip("bhn", x.stride(), x.shape, strict=False)
            }
        lists = shape.batch * self.lists * shape.rows
        choosing = replace(plan, tiling=replace(plan.tiling, warps=_CHOOSING))
        return (
            prepare(
                plan, self.text, RANK, lists // plan.abreast * -(-members // plan.members), sources, False, q.device
            ),
            prepare(choosing, self.text, CHOOSE, lists, sources, False, q.device),
        )
