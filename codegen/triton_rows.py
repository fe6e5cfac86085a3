"""What goes before and after the one kernel of all gradients on Hopper: portable kernels that pass over the rows.

Before it, what it reads of each row, and zeros for the sums of dq. After it, these rounded into dq.
"""

from __future__ import annotations

from attndsl.codegen.triton_backward import DqKernel
from attndsl.plan import BackwardPlan

ROWS = "attention_rows"
ROUND = "attention_round"


def rows_source(plan: BackwardPlan) -> str:
    """Text of a Python file: `attention_rows` makes delta, and lse as exponents of 2 take it; `attention_round` dq."""
    return _Rows(plan, ROWS).source()


class _OverRows(DqKernel):
    """A kernel whose programs own a tile of rows each."""

    def own(self) -> None:
        """Which tile of rows of which head a program owns, and where its sums of dq lie."""
        spec = self.plan.spec
        self.lines.add(
            f"BLOCK_Q: tl.constexpr = {self.plan.tiling.block_q}",
            f"DIM: tl.constexpr = {spec.dim}",
            "",
            "# The last heads first: the kernel of gradients begins with the first and ends with the last, whose",
            "# sums are in the cache then.",
            "q_tiles = tl.cdiv(rows, BLOCK_Q)",
            "program = tl.num_programs(0) - 1 - tl.program_id(0)",
            "head = program // q_tiles",
            "q_tile = program % q_tiles",
            f"b = head // {spec.heads}",
            f"h = head % {spec.heads}",
            "q_offset = tl.arange(0, BLOCK_Q)",
            "q_rows = q_tile * BLOCK_Q + q_offset",
            "sums_at = (head.to(tl.int64) * rows + q_rows[:, None]) * DIM + tl.arange(0, DIM)[None, :]",
        )

    def _candidates(self) -> list[str]:
        return [*super()._candidates(), "sums_ptr"]


class _Rows(_OverRows):
    def source(self) -> str:
        lines = self.lines
        lines.add("LOG2_E: tl.constexpr = 1.4426950408889634")
        self.own()
        lines.add(self.base("dout", "h"))
        self.load("dout", self.v_parts, self.plan.spec.v_dim, "q", "h", bounded=True, pointer=True)
        self.delta()
        lines.add(
            "zeros = tl.zeros([BLOCK_Q, DIM], tl.float32)",
            "tl.store(sums_ptr + sums_at, zeros, mask=q_rows[:, None] < rows)",
        )
        rounding = _Round(self.plan, ROUND)
        rounding.write()
        return self.file("what goes before and after the gradients, portable Triton", rounding)


class _Round(_OverRows):
    """Rounds the sums of dq, and puts their columns in the order from which `gluon_backward` took them."""

    def write(self) -> None:
        self.own()
        self.lines.add(
            "sums = tl.load(sums_ptr + sums_at, mask=q_rows[:, None] < rows, other=0.0)",
            "dq = tl.permute(tl.reshape(sums, [BLOCK_Q, DIM // 32, 4, 4, 2]), (0, 1, 3, 2, 4))",
            "dq = tl.reshape(dq, [BLOCK_Q, DIM])",
        )
        self.put("dq", self.q_parts, self.plan.spec.dim, "q", "h")
