"""The fused kernel of a selection in portable Triton: scores of a tile of members, and a running list of the best."""

from __future__ import annotations

from attndsl.codegen.kernel import KernelWriter
from attndsl.codegen.kernel_loops import run_loop
from attndsl.plan import DType
from attndsl.program import Axis, Scalar, Var
from attndsl.select_plan import SelectPlan
from attndsl.selection import Forced

KERNEL = "attention_select"


def select_source(plan: SelectPlan) -> str:
    """Text of a Python file whose `attention_select` writes the plan of a selection, int32 [B, H', rows, capacity].

    It reads q, and the members' vectors in two parts whose sum is accurate to float32: `high` and `low`, each dense
    [B, heads, members, D] (of float32 vectors there is no `low`). Where the probabilities of a branch rank, the vectors
    are its keys, and `lse`, float32 [B, Hq, rows], is what it had.
    """
    return SelectWriter(plan).source()


class SelectWriter(KernelWriter):
    """Rows of a tile of queries are those of the heads that share a choice, side by side."""

    plan: SelectPlan

    def __init__(self, plan: SelectPlan) -> None:
        super().__init__(plan, KERNEL, "q")
        self.side = 1 << (plan.share - 1).bit_length()
        # The keys of a branch are what they were to it; means of keys need two parts.
        single = plan.spec.dtype is DType.FLOAT32 or plan.seen is not None
        self.parts = ("high",) if single else ("high", "low")

    def source(self) -> str:
        self._prologue()
        self._loops()
        self._epilogue()
        return self.file(f"choice of `{self.plan.selection.name}`, portable Triton")

    def _candidates(self) -> list[str]:
        names = super()._candidates()
        return [names[0], "high_ptr", "low_ptr", "plan_ptr", *names[1:], "members", "vector_share"]

    # ---------------------------------------------------------------------------------- prologue

    def _prologue(self) -> None:
        plan, spec, lines, side = self.plan, self.plan.spec, self.lines, self.side
        lines.add(
            f"BLOCK_Q: tl.constexpr = {plan.tiling.block_q}",
            f"BLOCK_M: tl.constexpr = {plan.members}  # members of {plan.selection.keys} tokens",
            f"WIDTH: tl.constexpr = {plan.width}",
            "LEAST: tl.constexpr = -0x8000000000000000  # what is no candidate",
            "",
            "# Heads that share one after another; the last rows first, which have most candidates.",
            "q_tiles = tl.cdiv(rows, BLOCK_Q)",
            "group = tl.program_id(0) // q_tiles",
            "q_tile = q_tiles - 1 - tl.program_id(0) % q_tiles",
            f"b = group // {spec.heads // plan.share}",
            f"h = group % {spec.heads // plan.share}" + (f" * {plan.share}" if plan.share > 1 else ""),
            f"g = h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "g = h",
            self.start,
            "q_first = start + q_tile * BLOCK_Q",
            "q_rows = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)",
            "q_pos = start + q_rows[:, None]",
        )
        if any(dim.axis is Axis.Q and dim.block == 1 for decl in plan.inputs for dim in decl.dims):
            lines.add("q_index = tl.minimum(q_rows, rows - 1)[:, None]")
        self.know_tile_start()
        if side > 1:
            lines.add(
                "# Rows of the product: the heads of a query side by side.",
                f"packed = tl.arange(0, BLOCK_Q * {side})",
                f"row = q_tile * BLOCK_Q + packed // {side}",
                f"head = h + packed % {side}",
            )
        else:
            lines.add("row = q_rows", "head = h")
        lines.add("q_at = q_ptr + b.to(tl.int64) * stride_qb + row.to(tl.int64) * stride_qn")
        lines.add("q_at += head.to(tl.int64) * stride_qh")
        exists = "(row < rows)[:, None]"
        if side != plan.share:
            exists += f" & (packed % {side} < {plan.share})[:, None]"
        for part in self.q_parts:
            dims = self.dims(part)
            mask = exists + (f" & ({dims} < {spec.dim})[None, :]" if part.padded else "")
            lines.add(f"q{part.suffix} = tl.load(q_at[:, None] + {dims}[None, :], mask={mask}, other=0.0)")
        lines.add(
            *self._branch(exists),
            f"vectors = b * tl.cdiv({spec.heads}, vector_share) + h // vector_share",
            f"vectors = vectors.to(tl.int64) * members * {spec.dim}",
            "# No two are alike, so that one is replaced at a time.",
            "best = tl.zeros([BLOCK_Q, WIDTH], tl.int64) + (LEAST + tl.arange(0, WIDTH).to(tl.int64))[None, :]",
        )
        pairs = [e for e in (plan.mask, plan.forced) if e is not None]
        self.printer.hoist(lines, pairs, ("k", "j", "s"), "row_")
        lines.add("")

    def _branch(self, exists: str) -> list[str]:
        """What the branch had of each row, where its probabilities rank: they are exp2(score * factor - lse)."""
        if self.plan.seen is None:
            return []
        at = f"lse_ptr + (b * {self.plan.spec.heads} + head).to(tl.int64) * rows + row"
        return [
            "row_pos = start + row",
            "factor = scale * 1.4426950408889634",
            f"lse = tl.load({at}, mask={exists.replace('[:, None]', '')}, other=0.0) * 1.4426950408889634",
        ]

    # ------------------------------------------------------------------------------------- loops

    def _loops(self) -> None:
        runs, lines = self.plan.runs, self.lines
        self.name_ends(runs.full + runs.partial)
        for found, label, comment in (
            (runs.full, "full", "Full tiles: every member is a candidate."),
            (runs.partial, "partial", "Partial tiles: candidates are masked."),
        ):
            if found:
                lines.add(f"# {comment}{self.origin}")
                with run_loop(lines, self.printer, found, label, "k_tile"):
                    self._tile(masked=label == "partial")
                lines.add("")

    def _tile(self, masked: bool) -> None:
        """Score a tile of members, and take up the best of them."""
        plan, lines, dim = self.plan, self.lines, self.plan.spec.dim
        printer = self.printer.within(self.printer.names.inner())
        lines.add("member = k_tile * BLOCK_M + tl.arange(0, BLOCK_M)")
        terms = 0
        for name in self.parts:
            for part in self.q_parts:
                dims, vector = self.dims(part), f"{name}{part.suffix}"
                mask = "(member < members)[:, None]" + (f" & ({dims} < {dim})[None, :]" if part.padded else "")
                lines.add(
                    f"{name}_ptrs = {name}_ptr + vectors + member[:, None] * {dim} + {dims}[None, :]",
                    f"{vector} = tl.load({name}_ptrs, mask={mask}, other=0.0)",
                )
                dot = self.dot(f"q{part.suffix}", f"tl.trans({vector})", "scores" if terms else "")
                lines.add(f"scores = {dot}")
                terms += 1
        if plan.seen is None:
            lines.add("scores = scores * scale")
        else:
            of_rows = self.fresh()
            of_rows.names.known.update({Var("q"): "row_pos[:, None]", Var("k"): "member[None, :]"})
            seen = of_rows.text(plan.seen)
            lines.add(f"scores = tl.where({seen}, tl.exp2(scores * factor - lse[:, None]), 0.0)")
        if self.side > 1:
            lines.add(f"scores = tl.sum(tl.reshape(scores, [BLOCK_Q, {self.side}, BLOCK_M]), 1)")
        pairs: list[Scalar] = [e for e in (plan.mask if masked else None, plan.forced) if e is not None]
        if pairs:
            lines.add(f"k_pos = member[None, :] * {plan.selection.keys}")
            printer.share(lines, pairs, "pair_")
        self.printer.helpers.update(("ranked", "take_best"))
        lines.add(
            "# A score of -inf or NaN withdraws a member.",
            'keys = tl.where(scores > -float("inf"), ranked(tl.minimum(scores, 3.0e38), member[None, :]), LEAST)',
        )
        if plan.forced is not None:
            first = 'ranked(tl.full([1, BLOCK_M], float("inf"), tl.float32), member[None, :])'
            lines.add(f"keys = tl.where({printer.text(plan.forced)}, {first}, keys)")
        if masked and plan.mask is not None:
            lines.add(f"keys = tl.where({printer.text(plan.mask)}, keys, LEAST)")
        if masked:
            lines.add("keys = tl.where((member < members)[None, :], keys, LEAST)")
        lines.add("best = take_best(best, keys, WIDTH)")

    # ---------------------------------------------------------------------------------- epilogue

    def _epilogue(self) -> None:
        plan, lines = self.plan, self.lines
        budget = self.fresh().text(plan.budget)
        lines.add(
            "# What is chosen, in increasing order, and -1 after it.",
            "best = tl.sort(best, descending=True)",
            "rank = tl.arange(0, WIDTH)[None, :]",
        )
        if plan.forced is not None:
            lines.add("forced = tl.sum((best >= 0x7F80000000000000).to(tl.int32), 1)[:, None]")
            extra = plan.selection.forced is Forced.EXTRA
            budget = f"forced + {budget}" if extra else f"tl.maximum(forced, {budget})"
        lines.add(
            f"kept = (rank < {budget}) & (best > LEAST + WIDTH)",
            "chosen = tl.sort(tl.where(kept, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), 0x7FFFFFFF))",
            "chosen = tl.where(chosen == 0x7FFFFFFF, -1, chosen)",
            f"plan_at = plan_ptr + (group.to(tl.int64) * rows + q_rows[:, None]) * {plan.capacity}",
            f"tl.store(plan_at + rank, chosen, mask=(q_rows[:, None] < rows) & (rank < {plan.capacity}))",
        )
