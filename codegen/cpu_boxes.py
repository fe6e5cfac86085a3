"""The CPU lowering of pieces by boxes: the keys of a box are gathered cell by cell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attndsl.box_tiles import BoxRun
from attndsl.boxes import Boxes
from attndsl.codegen.cpu import CHUNK, NumberLeaves, TensorLeaves, TileLoop
from attndsl.codegen.scalars import Names, Printer
from attndsl.plan import Plan
from attndsl.program import Binary, Const, Scalar, Var, reads
from attndsl.runs import Run


def tile_loop(plan: Plan, per_pair: tuple[Scalar | None, ...]) -> TileLoop:
    """The loop over a plan's query tiles, or over its boxes."""
    return BoxLoop(plan, plan.layout, per_pair) if isinstance(plan.layout, Boxes) else TileLoop(plan, per_pair)


class BoxLoop(TileLoop):
    """The loop over boxes of queries, and the scores of one."""

    def __init__(self, plan: Plan, boxes: Boxes, per_pair: tuple[Scalar | None, ...]) -> None:
        super().__init__(plan, per_pair)
        self.boxes = boxes
        self.per_batch = any(reads(x, "b") for x in plan.box_runs.ends)
        self.per_head = any(reads(x, "h", "g") for x in plan.box_runs.ends)
        self.helpers |= {"cells", "visited"}

    @contextmanager
    def _query_tiles(self) -> Iterator[None]:
        lines, boxes = self.lines, self.boxes
        lines.add(f"# Cells: {boxes}.")
        for a in boxes.axes:
            if boxes.periods[a] > 1:
                lines.add(f"residue_{a} = {self._plain(boxes.residue(a))}")
        for side, name in (("q", "Nq"), ("k", "Nk")):
            lines.add(*(f"{side}_end_{a} = {self._plain(self._cells(a, name))}" for a in boxes.axes))
        first = self._plain(boxes.first_tile("q"))
        tiles = [f"range(-(-q_end_{a} // {size}))" for a, size in enumerate(boxes.q_box)]
        tiles[0] = f"range({first}, -(-q_end_0 // {boxes.q_box[0]}))"
        names = ", ".join(f"q_tile_{a}" for a in boxes.axes)
        loop = f"for {names} in itertools.product({', '.join(tiles)}):"
        if len(boxes.axes) == 1:
            loop = f"for {names} in {tiles[0]}:"
        with lines.block(loop):
            spans = (
                f"[({size} * q_tile_{a}, min({size} * (q_tile_{a} + 1), q_end_{a}))]"
                for a, size in enumerate(boxes.q_box)
            )
            lines.add(
                f"{self._each('i')} = cells([{', '.join(spans)}])",
                f"q_tokens = {self._tokens_of('q')}",
                "# Rows of earlier calls, and cells past the last token, are none of these.",
                "exist = (q_tokens >= start) & (q_tokens < start + rows)",
                f"q_pos, {self._each('i')} = (x[exist].view(-1, 1) for x in (q_tokens, {self._each('i')}))",
            )
            with lines.block("if q_pos.shape[0] == 0:"):
                lines.add("continue")
            lines.add("at = (at_b, at_g, at_r, q_pos[:, 0] - start)")
            yield

    def _each(self, name: str) -> str:
        """The variables of all axes, as a tuple without brackets."""
        return ", ".join(f"{name}_{a}" for a in self.boxes.axes) + ("," if len(self.boxes.axes) == 1 else "")

    def _plain(self, e: Scalar) -> str:
        return self.numbers.within(Names(NumberLeaves(self.plan))).text(e)

    def _cells(self, axis: int, name: str) -> Scalar:
        """How many cells of its residue an axis has."""
        length, period = self.boxes.lengths()[name][axis], self.boxes.periods[axis]
        if period == 1:
            return length
        rest = Binary("-", Binary("+", length, Const(period - 1)), Var(f"residue_{axis}"))
        return Binary("//", rest, Const(period))

    def _tokens_of(self, side: str) -> str:
        return self.tensors.within(Names(TensorLeaves(self.plan))).text(self.boxes.position(side))

    def spans(self) -> None:
        plan, lines = self.plan, self.lines
        where = plan.program.branch.span
        lines.add(f"# The keys that these rows visit{f'  [{where}]' if where else ''}")
        self.numbers.names.known.clear()
        self.numbers.share(lines, list(plan.box_runs.ends), "tile_")
        for label, found in (("full", plan.box_runs.full), ("partial", plan.box_runs.partial)):
            lines.add(f"{label}_cells = visited({len(self.boxes.axes)}, [")
            lines.add(*(f"    {self._spans(run)}," for run in found))
            lines.add("])")
        lines.add(
            "# Only the last ones may have cells without a token.",
            f"{self._each('j')} = partial_cells",
            f"partial_cells = [x[{self._tokens_of('k')} < k_len] for x in partial_cells]",
        )
        lines.add(
            f"{self._each('j')} = (torch.cat(x) for x in zip(full_cells, partial_cells, strict=True))",
            f"k_tokens = {self._tokens_of('k')}",
            "full_end, end = full_cells[0].shape[0], k_tokens.shape[0]",
            "full_spans = [(0, full_end)] if full_end else []",
            "partial_spans = [(full_end, end)] if full_end < end else []",
        )

    def _spans(self, run: BoxRun) -> str:
        along = (self._along(a, runs) for a, runs in enumerate(run.axes))
        return f"[{', '.join(along)}]"

    def _along(self, axis: int, runs: tuple[Run, ...]) -> str:
        found = ", ".join(f"({self._number(run.first)}, {self._number(run.count)}, {run.step})" for run in runs)
        return f"key_spans([{found}], {self.boxes.k_box[axis]}, k_end_{axis})"

    @contextmanager
    def chunk(self) -> Iterator[Printer]:
        lines = self.lines
        with lines.block(f"for full, partial in chunks(full_spans, partial_spans, {CHUNK}):"):
            printer = self.tensors.within(self.tensors.names.inner())
            lines.add(
                "k_pos = k_tokens[positions(full + partial)]",
                f"keys = {self.rows_of('k')}.to(compute)",
                f"values = {self.rows_of('v')}.to(compute)",
                "scores = (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4]).mul_(scale)",
            )
            yield printer

    def rows_of(self, x: str) -> str:
        return f"{x}[at_b, at_g].index_select(-2, k_pos)"

    def keep(self) -> None:
        if self.plan.spec.dropout:
            self.keep_apart("q_pos", "k_pos")

    def scatter(self, x: str, values: str) -> None:
        # No two of the tokens are the same: the sum has one order.
        self.lines.add(f"{x}[at_b, at_g].index_add_(-2, k_pos, {values})")

    def mask(self, target: str, value: str) -> None:
        if self.plan.mask is None:
            return
        lines = self.lines
        printer = self.tensors.within(self.tensors.names.inner())
        printer.names.known[Var("k")] = "partial_pos"
        printer.names.known.update((Var(f"j_{a}"), f"partial_{a}") for a in self.boxes.axes)
        with lines.block("if partial:"):
            lines.add("partial_nth = positions(partial)", "partial_pos = k_tokens[partial_nth]")
            read = (a for a in self.boxes.axes if reads(self.plan.mask, f"j_{a}"))
            lines.add(*(f"partial_{a} = j_{a}[partial_nth]" for a in read))
            lines.add(
                f"allowed = torch.as_tensor({printer.text(self.plan.mask)})",
                f"{target}[..., -partial_nth.shape[0] :].masked_fill_(~allowed, {value})",
            )
