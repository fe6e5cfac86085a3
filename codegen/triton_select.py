"""The fused kernel of a selection in portable Triton: scores of a tile of members, and running lists of the best.

A tile of scores has members for its rows and queries for its columns, the heads that share a choice one after another.
On tensor cores a thread then holds all heads of its queries: their sum, and all that follows, moves no data between
threads. The members of a query go by turns to 32 lists of its best, each of all the places that a plan has; what is
offered to a list is compared with every place, without a branch. At the end the best of the lists are taken one by one.
"""

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
    """Columns of a tile of scores are the rows of a query tile, for each head that shares a choice."""

    plan: SelectPlan

    def __init__(self, plan: SelectPlan) -> None:
        super().__init__(plan, KERNEL, "q")
        # The keys of a branch are what they were to it; means of keys need two parts.
        single = plan.spec.dtype is DType.FLOAT32 or plan.seen is not None
        self.parts = ("high",) if single else ("high", "low")

    def source(self) -> str:
        self._prologue()
        self._loop()
        self._epilogue()
        return self.file(f"choice of `{self.plan.selection.name}`, portable Triton")

    def _candidates(self) -> list[str]:
        names = super()._candidates()
        return [names[0], "high_ptr", "low_ptr", "plan_ptr", *names[1:], "members", "vector_share"]

    # ---------------------------------------------------------------------------------- prologue

    def _prologue(self) -> None:
        plan, spec, lines, side = self.plan, self.plan.spec, self.lines, self.plan.side
        lines.add(
            f"BLOCK_Q: tl.constexpr = {plan.tiling.block_q}",
            f"BLOCK_M: tl.constexpr = {plan.members}  # members of {plan.selection.keys} tokens",
            f"LISTED: tl.constexpr = {plan.capacity}",
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
            "q_pos = start + q_rows[None, :]",
        )
        if any(dim.axis is Axis.Q and dim.block == 1 for decl in plan.inputs for dim in decl.dims):
            lines.add("q_index = tl.minimum(q_rows, rows - 1)[None, :]")
        self.know_tile_start()
        if side > 1:
            lines.add(
                "# Columns of the product: the queries of one head after those of another.",
                f"columns = tl.arange(0, BLOCK_Q * {side})",
                "row = q_tile * BLOCK_Q + columns % BLOCK_Q",
                "head = h + columns // BLOCK_Q",
            )
        else:
            lines.add("row = q_rows", "head = h")
        lines.add("q_at = q_ptr + b.to(tl.int64) * stride_qb + row.to(tl.int64) * stride_qn")
        lines.add("q_at += head.to(tl.int64) * stride_qh")
        exists = "row < rows"
        if side != plan.share:
            lines.add(f"of_head = columns // BLOCK_Q < {plan.share}")
            exists = "(row < rows) & of_head"
        lines.add(f"exists = {exists}")
        for part in self.q_parts:
            dims = self.dims(part)
            mask = "exists[:, None]" + (f" & ({dims} < {spec.dim})[None, :]" if part.padded else "")
            lines.add(f"q{part.suffix} = tl.load(q_at[:, None] + {dims}[None, :], mask={mask}, other=0.0)")
        if plan.seen is not None:
            at = f"lse_ptr + (b * {spec.heads} + head).to(tl.int64) * rows + row"
            lines.add(
                "# What the branch had of each row: its probabilities are exp2(score * factor - lse).",
                "factor = scale * 1.4426950408889634",
                f"lse = tl.load({at}, mask=exists, other=0.0) * 1.4426950408889634",
            )
        lines.add(
            f"vectors = b * tl.cdiv({spec.heads}, vector_share) + h // vector_share",
            f"vectors = vectors.to(tl.int64) * members * {spec.dim}",
            "best = lists_of(tl.full([BLOCK_M // 16, 8, BLOCK_Q], LEAST, tl.int64), LISTED)",
        )
        self.printer.helpers.add("lists_of")
        pairs = [e for e in (plan.mask, plan.forced, plan.seen) if e is not None]
        self.printer.hoist(lines, pairs, ("k", "j", "s"), "row_")
        lines.add("")

    # -------------------------------------------------------------------------------------- loop

    def _loop(self) -> None:
        """One loop for full and partial tiles: a mask costs little beside the lists."""
        runs, lines = self.plan.runs.full + self.plan.runs.partial, self.lines
        self.name_ends(runs)
        if runs:
            lines.add(f"# Tiles that hold candidates.{self.origin}")
            with run_loop(lines, self.printer, runs, "visited", "k_tile"):
                self._tile()
            lines.add("")

    def _tile(self) -> None:
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
                dot = self.dot(vector, f"tl.trans(q{part.suffix})", "scores" if terms else "")
                lines.add(f"scores = {dot}")
                terms += 1
        lines.add("scores = " + ("scores * scale" if plan.seen is None else "tl.exp2(scores * factor - lse[None, :])"))
        if plan.side != plan.share:
            lines.add("scores = tl.where(of_head[None, :], scores, 0.0)")
        if plan.side > 1:
            lines.add(f"scores = tl.sum(tl.reshape(scores, [BLOCK_M, {plan.side}, BLOCK_Q]), 1)")
        pairs: list[Scalar] = [e for e in (plan.mask, plan.forced) if e is not None]
        if pairs or plan.seen is not None:
            lines.add(f"k_pos = member[:, None] * {plan.selection.keys}")
        if plan.seen is not None:
            of_entries = self.printer.within(self.printer.names.inner())
            of_entries.names.known[Var("k")] = "member[:, None]"
            lines.add(f"scores = tl.where({of_entries.text(plan.seen)}, scores, 0.0)")
        if pairs:
            printer.share(lines, pairs, "pair_")
        self.printer.helpers.update(("ranked", "take_up"))
        lines.add(
            "# A score of -inf or NaN withdraws a member.",
            'keys = tl.where(scores > -float("inf"), ranked(tl.minimum(scores, 3.0e38), member[:, None]), LEAST)',
        )
        if plan.forced is not None:
            first = 'ranked(tl.full([BLOCK_M, 1], float("inf"), tl.float32), member[:, None])'
            lines.add(f"keys = tl.where({printer.text(plan.forced)}, {first}, keys)")
        if plan.mask is not None:
            lines.add(f"keys = tl.where({printer.text(plan.mask)}, keys, LEAST)")
        lines.add(
            "keys = tl.where((member < members)[:, None], keys, LEAST)",
            "# Every second eight members are held by the threads that hold the eight before.",
            "keys = tl.permute(tl.reshape(keys, [BLOCK_M // 16, 2, 8, BLOCK_Q]), [0, 2, 3, 1])",
            "even, odd = tl.split(keys)",
            "best = take_up(take_up(best, even), odd)",
        )

    # ---------------------------------------------------------------------------------- epilogue

    def _epilogue(self) -> None:
        plan, lines = self.plan, self.lines
        budget = self.fresh().text(plan.budget)
        lines.add(
            f"WIDTH: tl.constexpr = {plan.width}",
            "rank = tl.arange(0, WIDTH)[None, :]",
            "found = tl.full([BLOCK_Q, WIDTH], LEAST, tl.int64)",
        )
        with lines.block("for i in range(LISTED):"):
            self.printer.helpers.add("without_first")
            lines.add(
                "first = tl.max(tl.max(best[0], 0), 0)",
                "found = tl.where(rank == i, first[:, None], found)",
                "best = without_first(best, best[0] == first[None, None, :], LEAST)",
            )
        lines.add("# What is chosen, in increasing order, and -1 after it.")
        if plan.forced is not None:
            lines.add("forced = tl.sum((found >= 0x7F80000000000000).to(tl.int32), 1)[:, None]")
            extra = plan.selection.forced is Forced.EXTRA
            budget = f"forced + {budget}" if extra else f"tl.maximum(forced, {budget})"
        lines.add(
            f"kept = (rank < {budget}) & (found > LEAST)",
            "chosen = tl.sort(tl.where(kept, 0x7FFFFFFF - (found & 0x7FFFFFFF).to(tl.int32), 0x7FFFFFFF))",
            "chosen = tl.where(chosen == 0x7FFFFFFF, -1, chosen)",
            f"plan_at = plan_ptr + (group.to(tl.int64) * rows + q_rows[:, None]) * {plan.capacity}",
            f"tl.store(plan_at + rank, chosen, mask=(q_rows[:, None] < rows) & (rank < {plan.capacity}))",
        )
