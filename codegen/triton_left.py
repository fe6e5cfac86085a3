"""Which tiles `skip below` leaves, in portable Triton: the forward's loop without its values, a byte for each tile.

A tile that is dropped has no row whose largest score is above those before, so the rows' largest may take up every
tile: there is no branch, and keys are loaded ahead.
"""

from __future__ import annotations

import math

from attndsl.codegen.triton_forward import ForwardWriter
from attndsl.plan import ForwardPlan

KERNEL = "attention_left"


def left_source(plan: ForwardPlan) -> str:
    """Text of a Python file whose `attention_left` writes `left`, uint8 [heads, row tiles, key tiles], of those tiles
    that it visits."""
    return LeftTilesKernel(plan, KERNEL, "q k").source()


class LeftTilesKernel(ForwardWriter):
    def source(self) -> str:
        self.constants()
        self.query_tile()
        lines = self.lines
        lines.add(self.base("q", "h"))
        self.load("q", self.q_parts, self.plan.spec.dim, "q", "h", bounded=True, pointer=True)
        lines.add(
            self.base("k", "g"),
            "left_at = left_ptr + (head * q_tiles + q_tile).to(tl.int64) * key_tiles",
            "# Finite, so that rows that see nothing yet need no care.",
            "row_max = tl.full([BLOCK_Q], -1.0e38, tl.float32)",
        )
        self.scale(folded=self.folded)
        self._hoist()
        self._loops()
        return self.file("tiles that are left, portable Triton")

    def _candidates(self) -> list[str]:
        return [*super()._candidates(), "left_ptr", "key_tiles"]

    def _tile(self, masked: bool) -> None:
        below = self.plan.skip
        assert below is not None
        self.logits(masked)
        scaled = " * factor" if self.folded else ""
        self.lines.add(f"most = tl.max(scores, 1){scaled}")
        self._gain("row_max", "most")
        self.lines.add(
            f"left = {self._most('gain')} >= {math.log2(below)!r}  # skip below {below}",
            "tl.store(left_at + k_tile, left.to(tl.uint8))",
            "row_max = tl.maximum(row_max, most)",
        )
