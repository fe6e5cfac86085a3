"""The kernel of dk and dv where rows choose keys one by one, or members too small to own a tile.

A key tile has a list of the query tiles that chose some of its keys; a word beside each entry says which. Entries are
gathered into tiles of rows, so a program reads the rows that chose one of its keys, and no others.
"""

from __future__ import annotations

from attndsl.codegen.row_lists import RowLists
from attndsl.codegen.scalars import Printer
from attndsl.plan import BackwardPlan
from attndsl.runs import LIST_HEAD, PLACE


class MarkedDkDv(RowLists):
    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan)
        assert plan.marked is not None
        self.list = plan.marked

    def listed(self, place: str) -> str:
        """What the list holds at a place, or at each of several."""
        printer = self.fresh()
        printer.names.known[PLACE] = place
        return printer.text(self.list)

    def ends(self) -> None:
        decl = self.plan.program.input(self.list.input)
        self.lines.add(
            "# The list: three places a key tile, the entries, and a word for each of these.",
            f"words_at = ({decl.parameter}_size_{len(decl.dims) - 1} - {LIST_HEAD} * k_tiles) // 2",
            f"begin = {self.listed(f'{LIST_HEAD} * k_tile')}",
            f"end = {self.listed(f'{LIST_HEAD} * k_tile + 2')}",
        )

    @property
    def several(self) -> str:
        return str(self.plan.tiling.block_q // self.plan.tiling.unit_q)

    def read(self, place: str) -> None:
        entries = f"{place} + {self._entry}"
        self.lines.add(f"chosen = {self.listed(entries)}", f"marks = {self.listed(f'{entries} + words_at')}")

    def take(self, place: str) -> None:
        rows = self.plan.tiling.unit_q
        chosen = f"chosen * {rows} + q_offset % {rows}" if rows > 1 else "chosen"
        self.lines.add(f"q_rows = tl.where({place} + {self._entry} < end, {chosen}, rows)", "words = marks")

    @property
    def _entry(self) -> str:
        """Which of a tile's entries each of its rows is of."""
        rows = self.plan.tiling.unit_q
        return f"q_offset // {rows}" if rows > 1 else "q_offset"

    def _allowed(self, printer: Printer, masked: bool, existing: bool) -> str:
        unit = self.plan.tiling.unit_k
        bit = f"k_offset[:, None]{f' // {unit}' if unit > 1 else ''}"
        chosen = f"((words[None, :] >> {bit if unit == 1 else f'({bit})'}) & 1 != 0)"
        # A place past the end has another's word: its rows do not exist, and have no gradient.
        found = super()._allowed(printer, masked, existing=existing)
        return f"({found}) & {chosen}" if found else chosen
