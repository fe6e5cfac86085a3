"""What every generated Triton kernel has: its parameters, and loops over runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from attndsl.box_tiles import BoxRuns
from attndsl.boxes import Boxes
from attndsl.codegen.box_text import BoxText, box_loop
from attndsl.codegen.dropping import kept_pairs
from attndsl.codegen.head_order import head_counts, head_of_rank, last_beside
from attndsl.codegen.header import header
from attndsl.codegen.kernel_loops import run_loop
from attndsl.codegen.layer_text import tile_at
from attndsl.codegen.leaves import Leaves
from attndsl.codegen.lines import Lines
from attndsl.codegen.packed import collected_loop, packed_tile, spanned_loop
from attndsl.codegen.permuted import permuted_tokens
from attndsl.codegen.prelude_helpers import prelude
from attndsl.codegen.scalars import TRITON, Names, Printer
from attndsl.codegen.two_levels import entry_place, entry_tokens
from attndsl.layout import PLAIN, Layout, Permutation
from attndsl.listing import whole_classes
from attndsl.plan import DType, Part, Plan, head_parts
from attndsl.program import Axis, Binary, Const, Scalar, Unary, Var, reads
from attndsl.runs import Run, TileRuns
from attndsl.simplify import fold

FULL = "Full tiles: every pair is allowed."
PARTIAL = "Partial tiles: pairs are masked."
COLLECTED = "Tiles of listed keys: pairs are masked."


class KernelWriter:
    """A generated kernel's file: its body's lines, and the pieces that every kernel has.

    Tiles of q, k, v, dout are named after their tensors, one variable for each part of the head dimension.
    """

    # Whether the tiles of a few heads take turns.
    takes_turns = False
    # What votes are scaled by that say nothing else.
    votes_scale = "scale"

    def __init__(self, plan: Plan, function: str, tensors: str, ragged: bool = False) -> None:
        self.plan, self.function = plan, function
        self.tensors = tensors.split()
        self.lines = Lines(indent=1)
        self.leaves = Leaves(plan, ragged)
        self.printer = Printer(TRITON, Names(self.leaves))
        self.q_parts = head_parts(plan.spec.dim)
        self.v_parts = head_parts(plan.spec.v_dim)
        order = plan.layout if isinstance(plan.layout, Layout) else PLAIN
        self.combs = {"q": order.q, "k": order.k}
        self.permutation = plan.layout if isinstance(plan.layout, Permutation) else None
        # What rows are called where they are counted in the order of the program's positions.
        self.q_place = "q_rows" if self.permutation is None else "q_nth"
        # Members of two levels that are no power of two are tiles with columns to spare, or the last strip has them.
        self.spare = plan.shares is not None and plan.tiling.block_k % plan.tiling.columns != 0
        self.columns = "COLUMNS" if self.spare or plan.tiling.strip else "BLOCK_K"
        self.boxes: BoxText | None = None
        if isinstance(plan.layout, Boxes):
            self.boxes = BoxText(plan.layout, {"q": plan.tiling.block_q, "k": plan.tiling.block_k}, self.aligned)

    def file(self, title: str, *others: KernelWriter) -> str:
        """The text of the file, once the bodies are written: of this kernel, and of others that go with it."""
        kernels = (self, *others)
        helpers = prelude("prelude.py", set().union(*(kernel.printer.helpers for kernel in kernels)))
        return "".join(
            (
                self.comment(title),
                "import triton\nimport triton.language as tl\n\n\n",
                helpers + "\n\n\n" if helpers else "",
                "\n\n".join(kernel.kernel() for kernel in kernels),
            )
        )

    def comment(self, title: str) -> str:
        """The comment at the head of the file."""
        return header(self.plan, title)

    def kernel(self) -> str:
        """The text of the kernel alone."""
        guard = Lines(indent=1)
        leave_to_another(guard, self.fresh(), self.plan)
        body = guard.followed_by(self.lines).text()
        signature = Lines()
        with signature.block(f"def {self.function}("):
            signature.add(*(f"{name}," for name in used_parameters(self._candidates(), body)))
        return "".join(("@triton.jit\n", signature.text(), "):\n", body))

    def _candidates(self) -> list[str]:
        """Every parameter that a kernel may have, in order."""
        names = [f"{x}_ptr" for x in (*self.tensors, "lse", "d_lse", "delta")]
        for x in self.tensors:
            names += [f"{x}_desc{part.suffix}" for part in (*self.q_parts, *self.v_parts)]
        names += [f"stride_{x}{axis}" for x in self.tensors for axis in "bhn"]
        names += ["seed_ptr", "drop_below", "keep_scale"] if self.plan.spec.dropout else []
        return list(dict.fromkeys([*names, "scale", "rows", "k_len", "entries", *scalar_parameters(self.plan)]))

    def fresh(self) -> Printer:
        """A printer that knows no names: what was named inside the tile's loops has the shape of a tile."""
        return self.printer.within(Names(self.leaves))

    def constants(self) -> None:
        tiling = self.plan.tiling
        self.lines.add(
            f"BLOCK_Q: tl.constexpr = {tiling.block_q * tiling.pack}",
            f"BLOCK_K: tl.constexpr = {tiling.block_k}",
            *([f"COLUMNS: tl.constexpr = {tiling.columns}"] if self.columns == "COLUMNS" else []),
            "LOG2_E: tl.constexpr = 1.4426950408889634",
        )

    def query_tile(self) -> None:
        """Which query tile of which head a program owns, and where its rows stand."""
        if self.boxes is not None:
            self._query_box(self.boxes)
            return
        if self.plan.tiling.pack > 1:
            packed_tile(self.lines, self.plan, self.start)
            self.row_index("[:, None]")
            return
        spec, lines, classes = self.plan.spec, self.lines, self.plan.layout.classes
        tiles = f"q_tiles = tl.cdiv({self.most('q', 'rows')}, BLOCK_Q)"
        tile = "q_tile = q_tiles - 1 - tl.program_id(0) % q_tiles"
        of_head = f"g = h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "g = h"
        if counts := head_counts(self.plan):
            lines.add("", tiles, self.start)
            head_of_rank(lines, self.fresh(), counts, spec.heads, of_head)
            lines.add(of_head, tile)
        else:
            which, turns = "Heads one after another", self.takes_turns and self.plan.layout.plain
            if classes > 1:
                which += ", of a head one residue after another, of a residue the last rows first."
            else:
                which += ", the last few side by side" if turns else ""
                which += ": programs in flight share keys. A head's last rows first: they are longest."
            lines.add("", f"# {which}", tiles)
            if classes > 1:
                lines.add(f"head = tl.program_id(0) // (q_tiles * {classes})")
                lines.add(f"residue = tl.program_id(0) // q_tiles % {classes}")
            elif turns:
                lines.add("heads = tl.num_programs(0) // q_tiles")
                head, place = last_beside(lines, "tl", "tl.program_id(0)", "q_tiles")
                lines.add(f"head = {head}")
                tile = f"q_tile = q_tiles - 1 - {place}"
            else:
                lines.add("head = tl.program_id(0) // q_tiles")
            lines.add(tile, f"b = head // {spec.heads}", f"h = head % {spec.heads}", of_head, self.start)
        offsets = ("", "q_offset = tl.arange(0, BLOCK_Q)", *self.key_offsets())
        if self.combs["q"].every:
            lines.add("q_first = start + q_tile * BLOCK_Q", *offsets)
            self.tokens_in_order("q")
        else:
            self.first_row()
            lines.add("i_first = i_start + q_tile * BLOCK_Q")
            self.skip_missing("q", "i_first")
            lines.add(*offsets)
            self.tokens("q", "i_first")
        lines.add(f"q_pos = start + {self.q_place}[:, None]")
        if not self.combs["q"].every:
            lines.add("i_pos = q_nth[:, None]")
        self.row_index("[:, None]")
        self.know_tile_start()
        self.know_classes(self.printer)

    def _heads(self) -> None:
        """The batch entry, the query head and its key head."""
        spec = self.plan.spec
        self.lines.add(
            f"b = head // {spec.heads}",
            f"h = head % {spec.heads}",
            f"g = h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "g = h",
        )

    def _query_box(self, boxes: BoxText) -> None:
        """Which box of which head a program owns, and where its rows stand."""
        lines = self.lines
        lines.add(self.start)
        boxes.own(lines, self.fresh(), "q")
        self._heads()
        boxes.leave_missing(lines, self.fresh(), "q")
        self.offsets()
        self.tokens("q", bounded=True)
        lines.add("q_pos = start + q_rows[:, None]")
        boxes.indices(lines, "q", "[:, None]", list(self.plan.scalars))
        self.row_index("[:, None]")

    def offsets(self) -> None:
        """The places in a tile of its queries and keys."""
        self.lines.add("", "q_offset = tl.arange(0, BLOCK_Q)", *self.key_offsets())
        if self.boxes is not None:
            for side in "qk":
                self.boxes.cells(self.lines, side)

    def key_offsets(self) -> list[str]:
        """The lines that name the places of keys in a tile, where it is no loop over strips that does."""
        return [] if self.plan.tiling.strip else self.offsets_from("")

    def offsets_from(self, first: str) -> list[str]:
        """The same of a tile's keys from a place on. Columns to spare lie past any length."""
        places = f"k_offset = {first}tl.arange(0, {self.columns})"
        if not self.spare:
            return [places]
        return [places, "in_member = k_offset < BLOCK_K", "k_offset = tl.where(in_member, k_offset, 1 << 30)"]

    @contextmanager
    def strips(self) -> Iterator[None]:
        """A loop over the strips of a tile; where it is whole in one, none."""
        if not self.plan.tiling.strip:
            yield
            return
        if self.plan.tiles_of is not None:
            entry_place(self, self.plan.tiles_of)
        with self.lines.block(f"for strip in range(tl.cdiv({self.tile_keys()}, COLUMNS)):"):
            self.lines.add(*self.offsets_from("strip * COLUMNS + "))
            yield

    def tile_keys(self) -> str:
        """How many keys a tile has, at least those that exist."""
        last = "k_len - k_tile * BLOCK_K" if self.plan.tiles_of is None else "k_end - k_first"
        return f"tl.minimum(BLOCK_K, {last})"

    def row_index(self, axis: str) -> None:
        """The rows of a tile, clamped, for inputs that belong to rows."""
        if any(dim.axis is Axis.Q and dim.block == 1 for decl in self.plan.inputs for dim in decl.dims):
            self.lines.add(f"q_index = tl.minimum({self.q_place}, rows - 1){axis}")

    def first_row(self) -> None:
        """`i_start`, the index of the first row of the call that belongs to the residue."""
        comb = self.combs["q"]
        self.lines.add(f"# The program's tokens: {self.plan.layout}. `nth` counts them.")
        self.lines.add(f"i_start = {self.fresh().text(comb.index(Var('start')))}")

    def skip_missing(self, side: str, first: str) -> None:
        """Leave a program whose tile, of tokens from the index `first` on, lies past the end."""
        length = "rows" if side == "q" and self.aligned else "k_len"
        with self.lines.block(f"if {self._token(side, first)} >= {length}:"):
            self.lines.add("return  # Not every residue has as many tokens.")

    def tokens_in_order(self, side: str) -> None:
        """The rows of a tile of tokens in order, or of places in a permutation."""
        if self.permutation is None:
            self.lines.add(f"{side}_rows = {side}_tile * BLOCK_{side.upper()} + {side}_offset")
        else:
            self.tokens(side, f"{side}_tile * BLOCK_{side.upper()}")

    def tokens(self, side: str, first: str = "k_tile * BLOCK_K", bounded: bool = True) -> None:
        """In a layout: the indices of a tile's tokens, from `first` on, and their rows in the tensors.

        bounded: the tile may have fewer tokens.
        """
        if self.boxes is not None:
            self.boxes.tokens(self.lines, self.fresh(), side, bounded)
            return
        if side == "k" and self.plan.tiles_of is not None:
            if not self.plan.tiling.strip:
                entry_place(self, self.plan.tiles_of)
            entry_tokens(self)
            return
        if self.permutation is not None:
            permuted_tokens(self.lines, self.plan, self.permutation, side, first, bounded)
            return
        if self.combs[side].every:
            return
        index = f"{side}_nth"
        rows = self._token(side, index)
        self.lines.add(f"{index} = {first} + {side}_offset", f"{side}_rows = {rows}{' - start' if side == 'q' else ''}")

    def positions(self, axis: str, pairs: list[Scalar]) -> None:
        """The keys of a tile, in a layout their indices too, along an axis of a tile of pairs."""
        plain = self.in_order("k")
        if plain or any(reads(e, "k") for e in pairs):
            token = "k_rows" if self.permutation is None else "k_nth"
            self.lines.add(f"k_pos = {'k_tile * BLOCK_K + k_offset' if plain else token}{axis}")
        if not plain and any(reads(e, "j") for e in pairs):
            self.lines.add(f"j_pos = k_nth{axis}")
        if self.boxes is not None:
            self.boxes.indices(self.lines, "k", axis, pairs)

    def tile_number(self) -> str:
        """The name of the number of a tile of keys among all of them, or of those of its document."""
        return "k_tile" if self.plan.tiles_of is None else "k_member"

    def in_order(self, side: str) -> bool:
        """Whether a tile of queries or keys is of tokens in a row."""
        plan, tiling = self.plan, self.plan.tiling
        rows = plan.gathered is not None or tiling.pack > 1 or tiling.unit_q > 0
        apart = rows if side == "q" else tiling.collects and not tiling.unit_q
        apart = apart or (side == "k" and self.plan.tiles_of is not None)
        return self.boxes is None and self.permutation is None and self.combs[side].every and not apart

    def _token(self, side: str, index: str) -> str:
        """The token of an index, as text."""
        printer = self.fresh()
        printer.names.known[Var("i")] = index if index.isidentifier() else f"({index})"
        return printer.text(self.combs[side].position(Var("i")))

    def most(self, side: str, length: str) -> str:
        """How many tokens of a residue so many tokens in a row hold at most, as text."""
        comb = self.combs[side]
        if comb.width == 1:
            return length if comb.every else f"tl.cdiv({length}, {comb.period})"
        period, width = comb.period, comb.width
        return f"{length} // {period} * {width} + tl.minimum({length} % {period}, {width})"

    def scale(self, folded: bool) -> None:
        """The factor of q . k, or where nothing needs the score itself, that factor for exponents of 2."""
        plan = self.plan
        scale = "scale" if plan.scale is None else self.printer.text(plan.scale)
        if folded:
            self.lines.add(f"factor = {scale} * LOG2_E")
        elif plan.scale is not None:
            self.lines.add(f"scale = {scale}")

    def seed(self) -> None:
        """Load the seed of dropout, where a call has it."""
        if self.plan.spec.dropout:
            self.lines.add("seed = tl.load(seed_ptr)")

    def keep(self, transposed: bool = False) -> None:
        """`keep`: which pairs of a tile dropout keeps. First in a tile, where fewest registers are in use."""
        if self.plan.spec.dropout:
            in_row, of_entries = self.in_order("k") and self.columns == "BLOCK_K", self.plan.view is not None
            if self.columns == "COLUMNS" and self.plan.tiles_of is None:
                self.lines.add("k_rows = k_tile * BLOCK_K + k_offset")
            kept = kept_pairs(self.printer.helpers, in_row, self.permutation, transposed, of_entries)
            self.lines.add(f"keep = {kept}")

    def visit(self, runs: TileRuns, box_runs: BoxRuns, tile: str) -> Iterator[bool]:
        """Loops over full tiles, then over partial ones, the tile of an iteration called `tile`. Yields inside each
        loop whether pairs are masked."""
        if self.plan.tiling.collects:
            self.name_ends(runs.partial)
            self.lines.add(f"# {COLLECTED}{self.origin}")
            (listed,), tiling = runs.partial, self.plan.tiling
            if listed.spans:
                yield from spanned_loop(self.lines, self.printer, listed)
            else:
                yield from collected_loop(self.lines, self.printer, listed, tiling.block_k, tiling.unit_k)
            return
        kinds = ((runs.full, box_runs.full, FULL, "full"), (runs.partial, box_runs.partial, PARTIAL, "partial"))
        for found, boxes, comment, label in kinds:
            if found or boxes:
                self.name_ends(found)
                self.printer.share(self.lines, [x for run in boxes for x in run.ends], "tile_")
                self.lines.add(f"# {comment}{self.origin}")
            if found:
                with run_loop(self.lines, self.printer, found, label, tile):
                    yield label == "partial"
            for n, run in enumerate(boxes):
                with box_loop(self.lines, self.printer, run, f"{label}{n or ''}", tile):
                    yield label == "partial"

    def name_ends(self, runs: tuple[Run, ...]) -> None:
        """Name what the ends of runs share."""
        self.printer.share(self.lines, [x for run in runs for x in (run.first, run.count)], "tile_")

    def know_tile_start(self) -> None:
        """Give the position of the query tile's first row, or its index, its name in expressions."""
        first = Binary("*", Const(self.plan.tiling.block_q), Var("q_tile"))
        plain = self.combs["q"].every
        if not self.aligned:
            first = Binary("+", Var("start" if plain else "i_start"), first)
        self.printer.names.known[first] = "q_first" if plain else "i_first"

    def know_classes(self, printer: Printer) -> None:
        """Give the row class of a tile's queries, by which members are looked up, one number for all of them."""
        plan = self.plan
        if plan.layout.plain and self.in_order("q"):
            classes = whole_classes(plan.program, plan.scalars, plan.tiling.block_q, plan.spec.even_start)
            for e, rows in classes.items():
                self.lines.add(f"class_{rows} = (start + q_tile * BLOCK_Q) // {rows}")
                printer.names.known[e] = f"class_{rows}"

    @property
    def aligned(self) -> bool:
        """Whether row i stands at position i."""
        return self.plan.program.align_start

    @property
    def k_end(self) -> str:
        """The number of keys: tokens, or entries of a view."""
        return "k_len" if self.plan.view is None else "entries"

    @property
    def start(self) -> str:
        return "start = 0" if self.aligned else "start = k_len - rows"

    @property
    def origin(self) -> str:
        """Where the pattern stands in its file, for the comment on a loop."""
        span = self.plan.program.span
        return f"  [{span}]" if span else ""

    def dims(self, part: Part) -> str:
        return f"({part.offset} + tl.arange(0, {part.size}))" if part.offset else f"tl.arange(0, {part.size})"

    def base(self, x: str, head: str) -> str:
        """The line that points at a head of a tensor."""
        return f"{x}_at = {x}_ptr + b.to(tl.int64) * stride_{x}b + {head}.to(tl.int64) * stride_{x}h"

    def load(
        self, x: str, parts: tuple[Part, ...], dim: int, side: str, head: str, bounded: bool, pointer: bool = False
    ) -> None:
        """Load a tile of tensor `x`: `side` is q or k, whose tile index, block and length it follows.

        `bounded`: the tile may reach past the end. `pointer`: not by descriptor (a tile that is loaded once).
        """
        block, length = f"BLOCK_{side.upper()}", "rows" if side == "q" else self.k_end
        if not pointer and (tile := tile_at(self, side)):
            for part in parts:
                at = f"[b, {head}, {tile}, {part.offset}]"
                self.lines.add(f"{x}{part.suffix} = {x}_desc{part.suffix}.load({at}).reshape({block}, {part.size})")
            return
        self.rows_of(x, side)
        for part in parts:
            dims = self.dims(part)
            conds = [f"({self._row(side)} < {length})"] if bounded else []
            if part.padded:
                conds.append(f"({dims}[None, :] < {dim})")
            mask = f", mask={' & '.join(conds)}, other=0.0" if conds else ""
            self.lines.add(f"{x}{part.suffix} = tl.load({x}_ptrs + {dims}[None, :]{mask})")

    def rows_of(self, x: str, side: str) -> None:
        """The line that points at the rows of a tile."""
        if not self.in_order(side):
            self.lines.add(f"{x}_ptrs = {x}_at + {self._row(side)}.to(tl.int64) * stride_{x}n")
            return
        tile = f"({side}_tile * BLOCK_{side.upper()}).to(tl.int64) * stride_{x}n"
        self.lines.add(f"{x}_ptrs = {x}_at + {tile} + {side}_offset[:, None] * stride_{x}n")

    def _row(self, side: str) -> str:
        """The rows of a tile's tokens, as a column."""
        if not self.in_order(side):
            return f"{side}_rows[:, None]"
        return f"{side}_tile * BLOCK_{side.upper()} + {side}_offset[:, None]"

    def store(self, x: str, parts: tuple[Part, ...], dim: int, side: str, value: str) -> None:
        """Store the accumulators `value` as a tile of tensor `x`."""
        self.rows_of(x, side)
        length = "rows" if side == "q" else self.k_end
        for part in parts:
            dims = self.dims(part)
            mask = f"({self._row(side)} < {length})"
            mask += f" & ({dims}[None, :] < {dim})" if part.padded else ""
            text = f"{value}{part.suffix}.to({x}_ptr.dtype.element_ty)"
            self.lines.add(f"tl.store({x}_ptrs + {dims}[None, :], {text}, mask={mask})")

    def dot(self, a: str, b: str, acc: str = "") -> str:
        precision = ', input_precision="ieee"' if self.plan.spec.dtype is DType.FLOAT32 else ""
        return f"tl.dot({a}, {b}{', ' + acc if acc else ''}{precision})"


def leave_to_another(lines: Lines, printer: Printer, plan: Plan) -> None:
    """Leave a call that the data gives to another kernel."""
    if plan.where is not None:
        with lines.block(f"if {printer.text(fold(Unary('not', plan.where)))}:"):
            lines.add("return  # Another kernel attends to this call.")


def scalar_parameters(plan: Plan) -> list[str]:
    """Parameters of the program's inputs, tables and arguments; sizes and strides only where the text reads them."""
    found: list[str] = []
    for decl in plan.inputs:
        found.append(f"{decl.parameter}_ptr")
        found += [f"{decl.parameter}_stride_{i}" for i in range(len(decl.dims))]
        found += [f"{decl.parameter}_size_{i}" for i in range(len(decl.dims))]
    found += [f"{table.name}_table" for table in plan.tables]
    return found + [f"arg_{name}" for name in plan.args]


def used_parameters(candidates: list[str], body: str) -> list[str]:
    """Those of the candidates that the body reads, in order: a kernel has no dead parameters."""
    words = set(re.findall(r"\w+", re.sub(r"#.*", "", body)))  # What comments say reads nothing.
    return [name for name in candidates if name in words]
