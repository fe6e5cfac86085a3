"""Which tiles `skip below` leaves, in portable Triton: the forward's loop without its values, a byte for each tile.

A tile that is dropped has no row whose largest score is above those before, so the rows' largest may take up every
tile: there is no branch, and keys are loaded ahead. Of a packed call a table says which rows and keys a program's tiles
are of, and it goes over all keys of its document, or all up to its last row where none sees a later one.
"""

from __future__ import annotations

import math

from attndsl.codegen.layer_text import tile_at
from attndsl.codegen.triton_forward import ForwardWriter
from attndsl.program import Scalar
from attndsl.skipping import LeftPlan

KERNEL = "attention_left"


def left_source(plan: LeftPlan) -> str:
    """Text of a Python file whose `attention_left` writes `left`, uint8 [heads, row tiles, key tiles], of those tiles
    that it visits."""
    return (DocumentTilesKernel if plan.apart else LeftTilesKernel)(plan, KERNEL, "q k").source()


class LeftTilesKernel(ForwardWriter):
    tile = "q_tile"
    tiles = "q_tiles"

    def source(self) -> str:
        self.constants()
        self.query_tile()
        lines = self.lines
        lines.add(self.base("q", "h"))
        self.load("q", self.q_parts, self.plan.spec.dim, "q", "h", bounded=True, pointer=True)
        if not tile_at(self, "k"):
            lines.add(self.base("k", "g"))
        lines.add(
            f"left_at = left_ptr + (head * {self.tiles} + {self.tile}).to(tl.int64) * key_tiles",
            "# Finite, so that rows that see nothing yet need no care.",
            "row_max = tl.full([BLOCK_Q], -1.0e38, tl.float32)",
        )
        self.scale(folded=self.folded)
        self._hoist()
        self._loops()
        return self.file("tiles that are left, portable Triton")

    def _candidates(self) -> list[str]:
        return [*super()._candidates(), "left_ptr", "tiles_ptr", "row_tiles", "key_tiles"]

    def _tile(self, masked: bool) -> None:
        below = self.plan.skip
        assert below is not None
        self.logits(masked)
        self._gain("row_max")
        self.lines.add(
            f"left = {self._most('gain')} >= {math.log2(below)!r}  # skip below {below}",
            "tl.store(left_at + k_tile, left.to(tl.uint8))",
            "row_max = tl.maximum(row_max, most)",
        )


class DocumentTilesKernel(LeftTilesKernel):
    """Of a packed call: a program's rows are those of a document."""

    tile = "tile"
    tiles = "row_tiles"

    @property
    def k_end(self) -> str:
        return "k_stop"

    def query_tile(self) -> None:
        plan, lines = self.plan, self.lines
        assert isinstance(plan, LeftPlan)
        lines.add(
            "",
            "head = tl.program_id(0) // row_tiles",
            "tile = tl.program_id(0) % row_tiles",
        )
        self._heads()
        lines.add(
            self.start,
            "# Its rows, and the keys of their document.",
            "tile_at = tiles_ptr + (b * row_tiles + tile).to(tl.int64) * 4",
            "q_begin, q_stop = tl.load(tile_at), tl.load(tile_at + 1)",
            "k_begin, k_stop = tl.load(tile_at + 2), tl.load(tile_at + 3)",
        )
        if plan.causal:
            lines.add("k_stop = tl.minimum(k_stop, start + q_stop)")
        with lines.block("if q_begin >= q_stop:"):
            lines.add("return  # There are fewer tiles.")
        self.offsets()
        lines.add(
            "q_rows = q_begin + q_offset",
            "# What stands behind them is another's.",
            "q_rows = tl.where(q_rows < q_stop, q_rows, rows)",
            "q_pos = start + q_rows[:, None]",
        )
        self.row_index("[:, None]")

    def in_order(self, side: str) -> bool:
        return False

    def tokens(self, side: str, first: str = "k_tile * BLOCK_K", bounded: bool = True) -> None:
        self.lines.add("k_rows = k_begin + k_tile * BLOCK_K + k_offset")

    def positions(self, axis: str, pairs: list[Scalar]) -> None:
        self.lines.add(f"k_pos = k_rows{axis}")

    def _loops(self) -> None:
        with self.lines.block("for k_tile in range(tl.cdiv(k_stop - k_begin, BLOCK_K)):"):
            self._tile(masked=True)

    def logits(self, masked: bool) -> None:
        super().logits(masked)
        self.lines.add('scores = tl.where(k_rows[None, :] < k_stop, scores, float("-inf"))')
