"""What the parts of the forward kernel for Hopper have in common: which tiles a program visits, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from attndsl.begins import table_entry, table_head
from attndsl.codegen.gluon import count_of
from attndsl.codegen.kernel_loops import Visits
from attndsl.codegen.leaves import Leaves
from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import GLUON, Names, Printer
from attndsl.layout import Layout
from attndsl.plan import DType, ForwardPlan, Part, head_parts
from attndsl.program import Binary, Const, Scalar, Var
from attndsl.runs import PLACE
from attndsl.tile_sizes import leaves_by_q

# The rows of a query tile that begins anywhere: its first, and one past its last.
_BEGUN = ("q_row", "q_end")


class Tiles:
    """The lines of one of a kernel's parts, which go over the same query tiles and key tiles.

    A program owns one query tile, or several (`Tiling.several`), one after another: as it comes to an end of one it is
    given the next, whichever no program has. Then `done` counts the tiles of keys of those before, and `nth` the query
    tiles; which one it is, and where its runs of tiles end, the other parts are handed by a warp that is ahead of them.

    A table may tell where query tiles begin (`plan.row_tiles`): at row `q_row`, with the rows before `q_end`. Tiles of
    keys count from `shift` then, so that one of them begins where the query tile does.
    """

    # The warps of a part that query tiles are handed to; none: it is the one that hands them over.
    warps = 0

    def __init__(self, plan: ForwardPlan, helpers: set[str]) -> None:
        self.plan = plan
        self.several, self.begun = plan.tiling.several, plan.row_tiles is not None
        self.q_parts, self.v_parts = head_parts(plan.spec.dim), head_parts(plan.spec.v_dim)
        self.fp8 = plan.spec.dtype is DType.FLOAT8
        assert isinstance(plan.layout, Layout)
        self.layout, self.combs = plan.layout, {"q": plan.layout.q, "k": plan.layout.k}
        self.helpers = helpers
        self.lines = Lines(indent=1)

    def constants(self) -> None:
        tiling = self.plan.tiling
        self.lines.add(
            f"BLOCK_Q: gl.constexpr = {tiling.block_q}",
            f"BLOCK_K: gl.constexpr = {tiling.block_k}",
            f"STAGES: gl.constexpr = {tiling.stages}",
        )

    def printer(self) -> Printer:
        return Printer(GLUON, Names(Leaves(self.plan)), self.helpers)

    @property
    def listed(self) -> bool:
        """Whether a list names the tiles: the mask then takes for granted that a visited one is chosen."""
        return any(run.list is not None for run in (*self.plan.runs.full, *self.plan.runs.partial))

    @contextmanager
    def query_tiles(self) -> Iterator[None]:
        """What is done for each of a program's query tiles."""
        if not self.several:
            yield
            return
        self.tiles()
        self.lines.add("nth = 0", "done = 0")
        self.take_place()
        with self.lines.block("while place < places:"):
            self.place("place")
            yield
            self.lines.add("nth += 1", "done += partial + full")
            self.take_place()

    def take_place(self) -> None:
        """The lines that wait for the number of a program's next query tile; there is none past the last one."""
        self.lines.add(
            "mbarrier.wait(told.index(nth % 2), (nth // 2) & 1)", f"place = handed({self.handed_at(0)}, {self.warps})"
        )

    def tiles(self) -> None:
        """How many query tiles a head has, or each of its residues."""
        if (table := self.plan.row_tiles) is not None:
            # Of the entries of a batch the most; a head that has fewer has none at the others' places.
            heads = self.plan.spec.heads
            self.lines.add("q_tiles = 0")
            with self.lines.block(f"for b in range({f'heads // {heads}' if len(table.dims) == 2 else '1'}):"):
                self.lines.add(f"q_tiles = gl.maximum(q_tiles, {self.printer().text(table_head(table))})")
            self.lines.add("places = heads * q_tiles")
            return
        period = self.combs["q"].period
        self.lines.add(f"q_tiles = gl.cdiv({'rows' if period == 1 else f'rows // {period}'}, BLOCK_Q)")

    def place(self, number: str) -> None:
        """Which query tile of which head has this number."""
        spec, lines = self.plan.spec, self.lines
        ratio, classes = spec.heads // spec.kv_heads, self.layout.classes
        if classes == 1:
            lines.add(f"head = {number} // q_tiles")
        else:
            lines.add(f"head = {number} // (q_tiles * {classes})", f"residue = {number} // q_tiles % {classes}")
        lines.add(
            *([] if self.begun else [f"q_tile = q_tiles - 1 - {number} % q_tiles"]),
            f"b = head // {spec.heads}",
            f"h = head % {spec.heads}",
            f"g = h // {ratio}" if ratio > 1 else "g = h",
        )

    def visits(self, printer: Printer) -> tuple[Visits | None, Visits | None]:
        """The query tile's position, and the tiles it visits: partial ones first."""
        plan, lines = self.plan, self.lines
        lines.add("start = 0" if plan.program.align_start else "start = k_len - rows")
        if self.begun:
            return self._begun(printer)
        first: Scalar = Binary("*", Const(plan.tiling.block_q), Var("q_tile"))
        if self.combs["q"].every:
            lines.add("q_first = start + q_tile * BLOCK_Q")
            printer.names.known[first if plan.program.align_start else Binary("+", Var("start"), first)] = "q_first"
        else:
            lines.add(
                f"# The program's tokens: {self.layout}. `nth` counts them.",
                f"i_start = {printer.text(self.combs['q'].index(Var('start')))}",
                "i_first = i_start + q_tile * BLOCK_Q",
            )
            printer.names.known[Binary("+", Var("i_start"), first)] = "i_first"
        return self._visits(printer)

    def _begun(self, printer: Printer) -> tuple[Visits | None, Visits | None]:
        """The same of a tile that begins anywhere: number `q_tile` of those that count from `shift`, which lies less
        than a tile before position 0."""
        if self.warps:
            self.lines.add(*(f"{x} = handed({self.handed_at(n)}, {self.warps})" for n, x in enumerate(_BEGUN, 1)))
        self.lines.add(
            "q_first = start + q_row",
            "q_last = start + q_end - 1",
            "q_tile = gl.cdiv(q_first, BLOCK_Q)",
            "shift = q_first - q_tile * BLOCK_Q",
        )
        first = Binary("*", Const(self.plan.tiling.block_q), Var("q_tile"))
        printer.names.known[Binary("+", Var("shift"), first)] = "q_first"
        return self._visits(printer)

    def entries(self, place: str) -> None:
        """The lines that look up in the table the rows of the query tile of a place."""
        table = self.plan.row_tiles
        assert table is not None
        self.lines.add(f"place_of_tile = q_tiles - {place} % q_tiles")
        for n, name in enumerate(_BEGUN):
            printer = self.printer()
            printer.names.known[PLACE] = f"place_of_tile + {n}" if n else "place_of_tile"
            self.lines.add(f"{name} = {printer.text(table_entry(table, PLACE))}")

    def _visits(self, printer: Printer) -> tuple[Visits | None, Visits | None]:
        lines = self.lines
        partial, full = self.runs(printer)
        lines.add(f"partial = {count_of(partial)}", f"full = {count_of(full)}")
        if self.listed:
            lines.add("nothing = partial + full == 0")
        lines.add(
            "# A row block that visits nothing visits one tile all the same, and masks it.",
            "partial = gl.where(partial + full == 0, 1, partial)",
        )
        return partial, full

    def runs(self, printer: Printer) -> tuple[Visits | None, Visits | None]:
        """The runs of tiles that the query tile visits; where they end is computed, or was handed over."""
        lines, runs, given = self.lines, self.plan.runs, None
        if self.several and self.warps:
            numbers = itertools.count(self.handed_first)

            def given() -> str:
                return f"handed({self.handed_at(next(numbers))}, {self.warps})"

        else:
            printer.share(lines, [x for run in runs.full + runs.partial for x in (run.first, run.count)], "tile_")
        partial = Visits(lines, printer, runs.partial, "partial", given) if runs.partial else None
        full = Visits(lines, printer, runs.full, "full", given) if runs.full else None
        return partial, full

    @property
    def handed_first(self) -> int:
        """How many numbers are handed over before the ends of runs: which query tile it is, and where it begins and
        ends."""
        return 1 + len(_BEGUN) * self.begun

    @property
    def handed(self) -> int:
        """How many numbers are handed over with a query tile, with two ends a run."""
        return self.handed_first + 2 * len(self.plan.runs.full + self.plan.runs.partial)

    def handed_at(self, number: int) -> str:
        """Where the n-th of them lies in shared memory."""
        return f"handed_smem.index(nth % 2 * {self.handed} + {number})"

    def visited(self, partial: Visits | None, full: Visits | None, n: str) -> str:
        """The tile visited in turn n: partial ones first."""
        return f"gl.where({n} < partial, {self.tile(partial, n)}, {self.tile(full, f'({n} - partial)')})"

    def tile(self, visits: Visits | None, i: str) -> str:
        """The tile of iteration i. Where a row block visits nothing the ends of runs may lie before the first tile, and
        what stands in a list is none."""
        if visits is None:
            return "0"
        return f"gl.where(nothing, 0, {visits.tile(i)})" if self.listed else f"gl.maximum({visits.tile(i)}, 0)"

    @property
    def row(self) -> str:
        """The first row of the query tile."""
        return "q_row" if self.begun else "q_tile * BLOCK_Q"

    def first_key(self, tile: str) -> str:
        """The first key of a tile, as a sum."""
        return f"{tile} * BLOCK_K + shift" if self.begun else f"{tile} * BLOCK_K"

    def turn(self, n: str) -> str:
        """How many tiles of keys a program visited before tile n of this query tile, as an operand."""
        if not self.several:
            return n if n.isidentifier() or n.isdecimal() else f"({n})"
        return f"(done + {n})" if n != "0" else "done"

    def stage(self, turn: str) -> str:
        """The stage of shared memory in which a turn's tile lies. Turns are not negative, which spares a division."""
        stages = self.plan.tiling.stages
        return f"{turn} % STAGES" if stages & (stages - 1) else f"{turn} & (STAGES - 1)"

    def phase(self, turn: str) -> str:
        """Whether a stage was used an odd number of times before a turn, as 0 or 1."""
        stages = self.plan.tiling.stages
        rounds = f"{turn} // STAGES" if stages & (stages - 1) else f"{turn} >> {stages.bit_length() - 1}"
        return f"({rounds}) & 1"

    def at(self, side: str, head: str, first: str) -> str:
        """Where a tile of one side lies, from the row `first` on, or in a layout from that of a residue's tokens."""
        return f"b, {head}, {'' if self.combs[side].every else 'residue, '}{first}"

    def token(self, side: str, index: str) -> str:
        """The token of an index of a residue's, as text."""
        printer = self.printer()
        printer.names.known[Var("i")] = index if index.isidentifier() else f"({index})"
        return printer.text(self.combs[side].position(Var("i")))

    def rows(self, side: str, count: str) -> str:
        """The sizes of a tile of so many rows, as it is copied."""
        return f"1, 1, {'' if self.combs[side].every else '1, '}{count}"

    def half(self, half: str) -> str:
        """The place in shared memory of one half of the query tile's rows."""
        return f"nth % 2 * 2 + {half}" if self.several else half

    def out_memory(self, n: int, part: Part) -> str:
        """The shared memory through which a part of the output leaves: where it can, that of the rows' own queries."""
        if leaves_by_q(self.plan.spec, n):
            return f"q_smem{self.q_parts[n].suffix}"
        return f"out_smem{part.suffix}"
