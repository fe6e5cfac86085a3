"""Observations in portable Triton: a program owns a key tile, and goes over the query tiles that visit it.

Tiles of queries count from position 0, wherever a call's rows begin, so that blocks of rows are whole in a tile. What a
program writes is its own: a number for each cell of the tiles that it visits, or for its keys alone.
"""

from __future__ import annotations

from attndsl.box_tiles import BoxRuns
from attndsl.codegen.kernel import KernelWriter
from attndsl.mask_cost import ROW
from attndsl.observing import ObservePlan
from attndsl.program import Scalar, Var, reads

KERNEL = "attention_observe"


def observe_source(plan: ObservePlan) -> str:
    """Text of a Python file whose `attention_observe` writes `observed`, float32 [heads, rows / cell, keys / cell]."""
    return ObserveKernel(plan).source()


class ObserveKernel(KernelWriter):
    plan: ObservePlan

    def __init__(self, plan: ObservePlan) -> None:
        super().__init__(plan, KERNEL, "q k")
        cells, tiling = plan.cells, plan.tiling
        self.by_rows = cells.rows is not None
        # Cells of a tile along rows and keys, and the rows and keys of one.
        self.rows = (tiling.block_q // (cells.rows or tiling.block_q), cells.rows or tiling.block_q)
        self.keys = (tiling.block_k // cells.keys, cells.keys)
        self.reduce = "tl.max" if cells.largest else "tl.sum"

    def source(self) -> str:
        plan, lines = self.plan, self.lines
        self.constants()
        lines.add(
            "",
            "# Heads one after another; a head's first keys first: most rows see them.",
            f"k_tiles = tl.cdiv({self.k_end}, BLOCK_K)",
            "head = tl.program_id(0) // k_tiles",
            "k_tile = tl.program_id(0) % k_tiles",
        )
        self._heads()
        lines.add(self.start)
        self.offsets()
        lines.add("k_pos = k_tile * BLOCK_K + k_offset[None, :]", self.base("k", "g"), self.base("q", "h"))
        self.load("k", self.q_parts, plan.spec.dim, "k", "g", bounded=True)
        lines.add("row_lse_at = lse_ptr + head.to(tl.int64) * rows")
        self.scale(folded=plan.score is None)
        if not self.by_rows:
            lines.add("found = tl.zeros([BLOCK_K], tl.float32)")
        self.printer.hoist(lines, self._pairs(masked=plan.masks), (*ROW, "s"), "column_")
        lines.add("")
        for masked in self.visit(plan.runs, BoxRuns(), "q_tile"):
            self._tile(masked)
        lines.add("")
        if not self.by_rows:
            count, size = self.keys
            if size > 1:
                lines.add(f"found = {self.reduce}(tl.reshape(found, [{count}, {size}]), 1)")
            lines.add(
                f"member = {self._cells_of('k_tile', count)}",
                "tl.store(observed_ptr + head.to(tl.int64) * members + member, found, mask=member < members)",
            )
        return self.file("observation of probabilities, portable Triton")

    def _candidates(self) -> list[str]:
        return [*super()._candidates(), "observed_ptr", "classes", "members"]

    def _pairs(self, masked: bool) -> list[Scalar]:
        return [e for e in (self.plan.mask if masked else None, self.plan.score) if e is not None]

    def _tile(self, masked: bool) -> None:
        """The probabilities of a tile of pairs, and what they add to."""
        plan, lines = self.plan, self.lines
        printer = self.printer.within(self.printer.names.inner())
        lines.add(
            "q_rows = q_tile * BLOCK_Q + q_offset - start",
            "here = (q_rows >= 0) & (q_rows < rows)",
            "q_ptrs = q_at + q_rows[:, None].to(tl.int64) * stride_qn",
        )
        for part in self.q_parts:
            dims = self.dims(part)
            inside = f" & ({dims}[None, :] < {plan.spec.dim})" if part.padded else ""
            lines.add(
                f"q{part.suffix} = tl.load(q_ptrs + {dims}[None, :], mask=here[:, None]{inside}, other=0.0)"
            )  # fmt: skip
        lines.add(
            "# Rows that see nothing have lse -inf: with +inf in its place their weights are 0.",
            'lse = tl.load(row_lse_at + q_rows, mask=here, other=float("inf"))',
            'lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E',
        )
        if pairs := self._pairs(masked):
            lines.add("q_pos = start + q_rows[:, None]")
            self.row_index_within()
            printer.names.known[Var("s")] = "scores"
        lines.add("scores = " + " + ".join(self.dot(f"q{p.suffix}", f"tl.trans(k{p.suffix})") for p in self.q_parts))
        if plan.score is None:
            logit = "scores * factor"
        else:
            lines.add("scores = scores * scale")
            logit = f"({{}}) * LOG2_E{'' if reads(plan.score, 's') else ' + tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)'}"
        printer.share(lines, pairs, "pair_")
        if plan.score is not None:
            logit = logit.format(printer.text(plan.score))
        allowed = "here[:, None]"
        if masked and plan.mask is not None:
            allowed += f" & ({printer.text(plan.mask)})"
        lines.add(f"weights = tl.where({allowed}, tl.exp2({logit} - lse[:, None]), 0.0)")
        if self.by_rows:
            self._store_cells()
        else:
            step = "tl.maximum(found, tl.max(weights, 0))" if plan.cells.largest else "found + tl.sum(weights, 0)"
            lines.add(f"found = {step}")

    def row_index_within(self) -> None:
        """The rows of a tile, clamped, for inputs that belong to rows."""
        if any(dim.axis.value == "q" and dim.block == 1 for decl in self.plan.inputs for dim in decl.dims):
            self.lines.add("q_index = tl.minimum(tl.maximum(q_rows, 0), rows - 1)[:, None]")

    def _store_cells(self) -> None:
        """Reduce a tile to its cells, along the keys and then along the rows, and write them."""
        lines, (row_cells, row_size), (key_cells, key_size) = self.lines, self.rows, self.keys
        cells = "weights"
        for count, size, axis, shape, new in (
            (key_cells, key_size, 1, f"[BLOCK_Q, {key_cells}, {key_size}]", "[:, None]"),
            (row_cells, row_size, 0, f"[{row_cells}, {row_size}, {key_cells}]", "[None, :]"),
        ):
            if count == 1:
                lines.add(f"cells = {self.reduce}({cells}, {axis}){new}")
            elif size > 1:
                lines.add(f"cells = {self.reduce}(tl.reshape({cells}, {shape}), {axis + 1})")
            cells = "cells" if count == 1 or size > 1 else cells
        exists, row_class = "q_class < classes", self._cells_of("q_tile", row_cells)
        if self.plan.cells.rows == 1:
            # Each row of the call is a class.
            exists, row_class = "here[:, None]", "q_rows"
        lines.add(
            f"q_class = {row_class}[:, None]",
            f"member = {self._cells_of('k_tile', key_cells)}[None, :]",
            "cell_at = observed_ptr + (head.to(tl.int64) * classes + q_class) * members + member",
            f"tl.store(cell_at, {cells}, mask=({exists}) & (member < members))",
        )

    def _cells_of(self, tile: str, count: int) -> str:
        """The cells of a tile, a vector over those that it has."""
        return f"({tile} * {count} + tl.arange(0, {count}))" if count > 1 else f"({tile} + tl.arange(0, 1))"
