"""What a backward pass reads of each row, where no kernel of dq makes it: one pass over the output, portable."""

from __future__ import annotations

from attndsl.codegen.triton_backward import DqKernel
from attndsl.plan import BackwardPlan

ROWS = "attention_rows"


def rows_source(plan: BackwardPlan) -> str:
    """Text of a Python file whose `attention_rows` makes delta, and lse as exponents of 2 take it."""
    return _Rows(plan, ROWS).source()


class _Rows(DqKernel):
    def source(self) -> str:
        lines = self.lines
        self.constants()
        self.query_tile()
        lines.add(self.base("dout", "h"))
        self.load("dout", self.v_parts, self.plan.spec.v_dim, "q", "h", bounded=True, pointer=True)
        self.delta()
        return self.file("what the gradients read of rows, portable Triton")
