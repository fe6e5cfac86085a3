"""The CPU lowering of decode: one sequence at a time, over its pages, by the same plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attndsl.codegen.cpu import TileLoop
from attndsl.codegen.cpu_forward import attend
from attndsl.decode import DecodePlan
from attndsl.program import Axis


class _SequenceLoop(TileLoop):
    """The tiles of one sequence, number `b` of the batch, as a batch of one."""

    plan: DecodePlan
    absent = "(q_pos < 0)[:, 0] | "

    def parameters(self) -> list[str]:
        # How many tokens a sequence has is its length.
        return [name for name in super().parameters() if name != "tokens"]

    def prologue(self) -> None:
        tiling, room = self.plan.tiling, None if self.plan.view is None else self.plan.view.space
        entries = None if room is None else room.size if room.axis is Axis.CONST else f"-(-k_len // {room.block})"
        self.lines.add(
            f"block_q, block_k = {tiling.block_q}, {tiling.block_k}",
            "_, kv_heads, group, rows, _ = q.shape",
            *([] if entries is None else [f"entries = {entries}"]),
            "start = k_len - rows",
            "compute = torch.float64 if q.dtype == torch.float64 else torch.float32",
            "all_b = torch.full((1, 1, 1, 1, 1), b)",
            "all_h = torch.arange(kv_heads * group).view(1, kv_heads, group, 1, 1)",
            "at_b = slice(None)",
        )

    @contextmanager
    def batches(self) -> Iterator[None]:
        yield

    def spans(self) -> None:
        if self.plan.listing is not None:
            self._listed_spans(self.plan.listing.keys)
            return
        super().spans()
        with self.lines.block("if k_len == 0:"):
            self.lines.add("full_spans, partial_spans = [], []")

    def _listed_spans(self, keys: int) -> None:
        """The members that any row of any head lists; the mask decides whose they are."""
        self.helpers |= {"key_spans", "positions"}
        rows = "..., low:high, :" if self.plan.listing is not None and self.plan.listing.per_row else "..."
        self.lines.add(
            f"listed = chosen[{rows}]",
            "members = listed.flatten(0, 3).any(0).nonzero()[:, 0].tolist()",
            f"full_spans, partial_spans = [], key_spans([(m, 1, 1) for m in members], {keys}, k_len)",
        )

    def mask(self, target: str, value: str) -> None:
        super().mask(target, value)
        if self.plan.listing is not None:
            with self.lines.block("if partial:"):
                self.lines.add(
                    f"{target}[..., -partial_pos.shape[0] :].masked_fill_("
                    f"~listed[..., partial_pos // {self.plan.listing.keys}], {value})"
                )

    def rows_of(self, x: str) -> str:
        self.helpers.add("gather_pages")
        return f"gather_pages({x}, pages, at_g, spans)"

    def entries_of(self, x: str) -> str:
        return f"{x}[min(b, {x}.shape[0] - 1)].expand(kv_heads, -1, -1)[None, at_g]"

    def voters(self) -> str:
        # The scale of the cache's keys is multiplied into the rows.
        return "own_q[at].to(compute)" if self.plan.cache.k_scaled else "queries"

    def attended(self) -> None:
        lines = self.lines
        lines.add("# Rows before the first token are empty.", "before = (q_pos < 0)[:, 0]", "acc[..., before, :] = 0.0")
        if self.plan.softmax:
            lines.add("row_max[..., before], row_sum[..., before] = -torch.finfo(compute).max, 0.0")


def decode_source(plan: DecodePlan) -> str:
    """Text of a Python file whose `attention_decode` writes `out` and `lse` of one sequence."""
    loop = _SequenceLoop(plan, (plan.score, plan.weights))
    loop.lines.add(
        '"""Attend q [1, kv_heads, group, rows, D], the last rows of sequence b, to its first k_len keys.',
        "",
        "k, v [slots, kv_heads, page, D]: the cache; pages [P]: those of the sequence.",
        "Writes out [1, kv_heads, group, rows, Dv] and lse [1, kv_heads, group, rows].",
        '"""',
    )
    attend(loop)
    more = [] if plan.listing is None else ["chosen"]
    more += ["own_q"] * (plan.votes is not None and plan.cache.k_scaled)
    signature = ", ".join(["b", "q", "k", "v", "pages", "k_len", "out", "lse", "scale", *more, *loop.parameters()])
    return loop.file("attention_decode", signature, "decode, blocked PyTorch")
