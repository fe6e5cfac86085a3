"""What Triton kernels of pieces by boxes print: which box a program owns, where its cells lie, and loops over boxes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

from attndsl.box_tiles import BoxRun
from attndsl.boxes import Boxes
from attndsl.codegen.kernel_loops import Visits
from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import Level, Printer
from attndsl.program import Const, Scalar, Var, reads


class BoxText:
    """The lines of one kernel. A cell without a token gets the row after the last, as whatever lies past an end."""

    def __init__(self, boxes: Boxes, block: dict[str, int], aligned: bool) -> None:
        """block: cells of a tile of queries and of keys, of which a box may have fewer."""
        self.boxes, self.block, self.aligned = boxes, block, aligned

    def own(self, lines: Lines, printer: Printer, side: str) -> None:
        """Which box of which head a program owns; `start` is known."""
        boxes = self.boxes
        # But of the first axis they are known.
        tiles = [printer.text(boxes.tiles(side, a), Level.UNARY) for a in boxes.axes]
        inner = [prod(map(int, tiles[a + 1 :])) for a in boxes.axes]
        lines.add(
            "",
            f"# Heads one after another, of a head its boxes. {boxes}.".replace(". boxes", ". Boxes"),
            f"{side}_tiles = {tiles[0]}" + (f" * {inner[0]}" if inner[0] > 1 else ""),
        )
        if boxes.classes == 1:
            lines.add(f"head = tl.program_id(0) // {side}_tiles")
        else:
            lines.add(
                f"head = tl.program_id(0) // ({side}_tiles * {boxes.classes})",
                f"residue = tl.program_id(0) // {side}_tiles % {boxes.classes}",
            )
            lines.add(*(f"residue_{a} = {printer.text(boxes.residue(a))}" for a in boxes.axes if boxes.periods[a] > 1))
        lines.add(f"{side}_tile = tl.program_id(0) % {side}_tiles")
        for a in boxes.axes:
            text = f"{side}_tile" + (f" // {inner[a]}" if inner[a] > 1 else "")
            if a:
                text = f"{text} % {tiles[a]}" if int(tiles[a]) > 1 else "0"
            elif (first := boxes.first_tile(side)) != Const(0):
                text = f"{text} + {printer.text(first, Level.TERM)}"
            lines.add(f"{side}_tile_{a} = {text}")

    def leave_missing(self, lines: Lines, printer: Printer, side: str) -> None:
        """Leave a program that has no cell: residues have more and fewer."""
        lengths = self.boxes.lengths()["Nq" if side == "q" else "Nk"]
        missing = []
        for a in self.boxes.axes:
            if self.boxes.periods[a] > 1:
                first = f"{side}_tile_{a} * {self.boxes.periods[a] * self.boxes.box(side)[a]} + residue_{a}"
                missing.append(f"({first} >= {printer.text(lengths[a], Level.SUM)})")
        if missing:
            with lines.block(f"if {' | '.join(missing)}:"):
                lines.add("return")

    def cells(self, lines: Lines, side: str) -> None:
        """Where the cells of a box lie in it, along each axis that it has more than one of."""
        box = self.boxes.box(side)
        for a in (a for a in self.boxes.axes if box[a] > 1):
            after = prod(box[a + 1 :])
            text = f"{side}_offset" + (f" // {after}" if after > 1 else "")
            lines.add(f"{side}_cell_{a} = {text}" + (f" % {box[a]}" if prod(box[:a]) > 1 else ""))

    def tokens(self, lines: Lines, printer: Printer, side: str, bounded: bool) -> None:
        """The indices of a box's cells along each axis, and their rows in the tensors."""
        boxes, name = self.boxes, "i" if side == "q" else "j"
        for a, size in enumerate(boxes.box(side)):
            printer.names.known[Var(f"{name}_{a}")] = f"{name}_{a}"
            lines.add(f"{name}_{a} = {side}_tile_{a}" + (f" * {size} + {side}_cell_{a}" if size > 1 else ""))
        row = printer.text(boxes.position(side)) + (" - start" if side == "q" and not self.aligned else "")
        exist = [
            f"({printer.text(boxes.cell(a, Var(f'{name}_{a}')), Level.SUM)} < {boxes.grid.sizes[a]})"
            for a in boxes.axes
            if boxes.loose(side, a)
        ]
        if prod(boxes.box(side)) < self.block[side]:
            exist.append(f"({side}_offset < {prod(boxes.box(side))})")
        lines.add(f"{side}_rows = {row}")
        if side == "q" and not self.aligned:
            exist.insert(0, "(q_rows >= 0)")
        if bounded and exist:
            lines.add(f"{side}_rows = tl.where({' & '.join(exist)}, {side}_rows, {'rows' if side == 'q' else 'k_len'})")

    def indices(self, lines: Lines, side: str, axis: str, pairs: list[Scalar]) -> None:
        """The indices that conditions read, along an axis of a tile of pairs."""
        name = "i" if side == "q" else "j"
        read = (a for a in self.boxes.axes if any(reads(e, f"{name}_{a}") for e in pairs))
        # Along an axis of one cell the index is a number.
        lines.add(*(f"{name}_pos_{a} = {name}_{a}{axis if self.boxes.box(side)[a] > 1 else ''}" for a in read))


@contextmanager
def box_loop(lines: Lines, printer: Printer, run: BoxRun, label: str, tile: str) -> Iterator[None]:
    """A loop over the boxes of a run: inside, `{tile}_{axis}` are a box's numbers."""
    visits = [Visits(lines, printer, runs, f"{label}_{a}") for a, runs in enumerate(run.axes)]
    for a, along in enumerate(visits):
        lines.add(f"{label}_along_{a} = tl.maximum({along.total}, 0)")
    product = " * ".join(f"{label}_along_{a}" for a in range(len(visits)))
    with lines.block(f"for i in range({product}):"):
        for a in reversed(range(len(visits))):
            inner = [f"{label}_along_{b}" for b in range(a + 1, len(visits))]
            place = f"i // ({' * '.join(inner)})" if len(inner) > 1 else f"i // {inner[0]}" if inner else "i"
            lines.add(f"at_{a} = {place}" + (f" % {label}_along_{a}" if a else ""))
            lines.add(f"{tile}_{a} = {visits[a].tile(f'at_{a}')}")
        yield
