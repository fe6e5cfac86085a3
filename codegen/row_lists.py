"""The kernel of dk and dv where the rows of a key tile stand in a list: those that chose it, or some of its keys.

A key tile that far more rows chose than others, as a first block that every row is made to choose, would be one program
that the others wait for. Its list is cut: programs of their own go over its parts, and `sum_parts` adds up what they
find, in order, so that two runs agree to the bit. Which lists are long the device alone knows: before the kernel runs,
another one writes a table of the parts (`list_kernels.cut_lists`), of which there are at most so many.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from attndsl.codegen.head_order import last_beside
from attndsl.codegen.triton_backward import DkDvKernel
from attndsl.mask_cost import ROW
from attndsl.plan import BackwardPlan

SUM_PARTS = "sum_parts"
# Numbers that the table holds of each part: the list, where its entries begin and end, and of the first part of a list
# how many it has.
PART = 4


class _Parts(DkDvKernel, ABC):
    """A kernel that reads the table of parts. A program of one has a key tile of those that share the list, and a slot
    for the gradients that it finds, [BLOCK_K, D + Dv] numbers."""

    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan)
        self.each = 1 if plan.gathered is None else plan.gathered.keys // plan.key_tiling.block_k

    def times(self, parts: str) -> str:
        """How many programs so many parts have."""
        return f"{parts} * {self.each}" if self.each > 1 else parts

    def program_of(self, part: str, nth: str) -> str:
        """A number for each tile of a part, the tile being that of the program `nth`."""
        return f"{self.times(part)} + {nth} % {self.each}" if self.each > 1 else part

    def part_of(self, nth: str) -> str:
        return f"{nth} // {self.each}" if self.each > 1 else nth

    def entry(self, part: str, number: int) -> str:
        """What the table holds of a part."""
        return f"tl.load(parts_ptr + {PART} * {part}{f' + {number}' if number else ''})"

    def slot(self, number: str = "") -> Iterator[tuple[str, str, str]]:
        """Of a slot's gradients the names, the places, and the end of a call that masks columns which do not exist.
        number: that of the slot, where `slot` is not known."""
        spec, first = self.plan.spec, 0
        self.lines.add(
            *([f"slot = {number}"] if number else []),
            f"slot_at = slot.to(tl.int64) * {self.columns} + tl.arange(0, {self.columns})",
            f"slot_ptrs = part_sums_ptr + slot_at[:, None] * {spec.dim + spec.v_dim}",
        )
        for x, parts, dim in (("dk", self.q_parts, spec.dim), ("dv", self.v_parts, spec.v_dim)):
            for part in parts:
                dims = self.dims(part)
                place = f"slot_ptrs + {f'({first} + {dims})' if first else dims}[None, :]"
                yield f"{x}{part.suffix}", place, f", mask={dims}[None, :] < {dim}" if part.padded else ""
            first += dim

    def _candidates(self) -> list[str]:
        return [*super()._candidates(), "parts_ptr", "part_sums_ptr", "parts", "longest"]


class RowLists(_Parts, ABC):
    """A program owns a key tile, and goes over the rows that its list names, for each head.

    Entries are read a turn ahead. Where a turn read its own, the loads of its rows had to wait for them: no pipeline
    begins a load before it knows the address.
    """

    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan)
        if plan.cuts_lists:
            summing = _SumParts(plan)
            summing.body()
            self.beside = (summing,)

    @property
    @abstractmethod
    def several(self) -> str:
        """How many entries make a tile of rows."""

    @abstractmethod
    def ends(self) -> None:
        """Say where the tile's list begins and ends."""

    @abstractmethod
    def read(self, place: str) -> None:
        """Read the entries from a place on."""

    @abstractmethod
    def take(self, place: str) -> None:
        """Of the entries that were read from a place on, the rows: `q_rows`."""

    def plain_tile(self, tiles: str) -> None:
        if not self.plan.cuts_lists:
            super().plain_tile(tiles)
            return
        lines = self.lines
        lines.add(
            "",
            "# Programs of parts of long lists first, room for `parts` in each head. Then heads one after another, the",
            "# last few side by side; the first keys first: most rows see them.",
            tiles,
            f"heads = tl.num_programs(0) // (k_tiles + {self.times('parts')})",
            "program = tl.program_id(0)",
            f"rest = program - heads * {self.times('parts')}",
        )
        head, place = last_beside(lines, "tl", "rest", "k_tiles")
        lines.add(
            f"head = tl.where(rest < 0, program % heads, {head})",
            f"part = head * parts + {self.part_of('program // heads')}",
            f"k_tile = {place}",
            "slot = -1",
        )
        with lines.block("if rest < 0:"):
            lines.add(
                f"k_tile = {self.program_of(self.entry('part', 0), '(program // heads)')}",
                f"slot = {self.program_of('part', '(program // heads)')}",
            )

    def begin(self) -> None:
        if self.plan.one_list:
            self.ends()
        if self.plan.cuts_lists:
            lines = self.lines
            lines.add("left_out = end - begin > longest  # Programs of its parts go over it.")
            with lines.block("if rest < 0:"):
                lines.add(
                    f"begin = {self.entry('part', 1)}",
                    f"end = {self.entry('part', 2)}",
                    "left_out = (begin >= end) | (k_tile >= k_tiles)",
                )
            with lines.block("if left_out:"):
                lines.add("return")

    def heads(self) -> None:
        """One loop over the rows of all heads: in a loop over heads, addresses of single rows would be kept between
        its turns, and spill. Where heads have lists of their own, or something is summed head by head, there is one
        all the same."""
        lines = self.lines
        if self.group == 1 or self.learned or not self.plan.one_list:
            super().heads()
            return
        lines.add(f"tiles = tl.cdiv(end - begin, {self.several})")
        self.printer.hoist(lines, self.pairs(masked=True), (*ROW, "s", "h"), "column_")
        self.read("begin")
        lines.add(
            f"# Rows that chose these keys, of one head after the other: their sum has one order. Pairs are "
            f"masked.{self.origin}"
        )
        with lines.block(f"for n in range({self.group} * tiles):"):
            lines.add(f"h = g * {self.group} + n // tiles")
            self.of_head()
            self._rows("n % tiles", "(n + 1) % tiles")

    def loops(self, tile: str) -> None:
        if not self.plan.one_list:
            self.ends()
        self.read("begin")
        self.lines.add(f"# Rows that chose these keys: pairs are masked.{self.origin}")
        with self.lines.block(f"for i in range(tl.cdiv(end - begin, {self.several})):"):
            self._rows("i", "(i + 1)")

    def write(self) -> None:
        if not self.plan.cuts_lists:
            super().write()
            return
        with self.lines.block("if slot >= 0:"):
            for x, place, mask in self.slot():
                self.lines.add(f"tl.store({place}, {x}{mask})")
        with self.lines.block("else:"):
            super().write()

    def _rows(self, turn: str, following: str) -> None:
        self.take(f"begin + {turn} * {self.several}")
        self.tile(masked=True)
        # Last: read before the tile, the next entries take registers that spill.
        self.read(f"begin + {following} * {self.several}")


class _SumParts(_Parts):
    """A program owns a key tile of a list that was cut, and adds up what its parts found."""

    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan)
        self.function = SUM_PARTS

    def body(self) -> None:
        spec, lines = self.plan.spec, self.lines
        lines.add(
            f"BLOCK_K: tl.constexpr = {self.plan.tiling.block_k}",
            *([f"COLUMNS: tl.constexpr = {self.plan.tiling.columns}"] if self.columns == "COLUMNS" else []),
            "program = tl.program_id(0)",
            f"part = {self.part_of('program')}",
            f"k_tile = {self.program_of(self.entry('part', 0), 'program')}",
            f"count = {self.entry('part', 3)}",
        )
        with lines.block("if (count == 0) | (k_tile * BLOCK_K >= k_len):"):
            lines.add("return")
        lines.add(
            "head = part // parts",
            f"b = head // {spec.kv_heads}",
            f"g = head % {spec.kv_heads}",
            *(["h = g"] if self.group == 1 else []),
            *self.key_offsets(),
        )
        for x, parts in (("dk", self.q_parts), ("dv", self.v_parts)):
            lines.add(*(f"{x}{part.suffix} = tl.zeros([{self.columns}, {part.size}], tl.float32)" for part in parts))
        with lines.block("for n in range(count):"):
            for x, place, mask in self.slot(self.program_of("(part + n)", "program")):
                lines.add(f"{x} = {x} + tl.load({place}{mask + ', other=0.0' if mask else ''})")
        if not self.scale_per_head:
            self.scale(folded=False)
        self.write()
