"""The CPU lowering of decode: one sequence at a time, over its pages, by the same plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attndsl.codegen.cpu import TileLoop, attend
from attndsl.decode import DecodePlan


class _SequenceLoop(TileLoop):
    """The tiles of one sequence, number `b` of the batch, as a batch of one."""

    plan: DecodePlan

    def prologue(self) -> None:
        tiling = self.plan.tiling
        self.lines.add(
            f"block_q, block_k = {tiling.block_q}, {tiling.block_k}",
            "_, kv_heads, group, rows, _ = q.shape",
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
        super().spans()
        with self.lines.block("if k_len == 0:"):
            self.lines.add("full_spans, partial_spans = [], []")

    def rows_of(self, x: str) -> str:
        self.helpers.add("gather_pages")
        return f"gather_pages({x}, pages, at_g, spans)"

    def attended(self) -> None:
        lines = self.lines
        lines.add("# Rows before the first token are empty.", "before = (q_pos < 0)[:, 0]", "acc[..., before, :] = 0.0")
        if self.plan.weights is None:
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
    signature = ", ".join(["b", "q", "k", "v", "pages", "k_len", "out", "lse", "scale", *loop.parameters()])
    return loop.file("attention_decode", signature, "decode, blocked PyTorch")
