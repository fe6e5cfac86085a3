"""The decode kernels in portable Triton: a slice of the keys of a sequence's last rows."""

from __future__ import annotations

import math

from attndsl.codegen.kernel import FULL, PARTIAL
from attndsl.codegen.kernel_loops import Visits
from attndsl.codegen.scalars import Printer
from attndsl.codegen.triton_forward import ForwardWriter
from attndsl.codegen.triton_merge import check_members, merge_slices
from attndsl.decode import DecodePlan, Listing
from attndsl.mask_cost import KEY
from attndsl.plan import Part, head_parts
from attndsl.program import Axis, Binary, Scalar, Var, reads

KERNEL = "attention_decode"


def decode_source(plan: DecodePlan) -> str:
    """Text of a Python file with the plan's kernel, `attention_decode`, and where it is split `merge_slices` too."""
    return _Decode(plan).source()


class _Decode(ForwardWriter):
    """`plan.tiling.block_q` rows of `plan.pack` heads make the BLOCK_Q rows of a tile: heads inside rows."""

    plan: DecodePlan

    def __init__(self, plan: DecodePlan) -> None:
        super().__init__(plan, KERNEL, "q k v out", ragged=True)
        self.cache = plan.cache
        self.v_parts = head_parts(plan.spec.v_dim // plan.columns)
        self.paged = plan.cache.page is not None
        # The sign of what comes in a tensor is not known.
        self.folded = self.folded and not plan.cache.k_scaled

    def source(self) -> str:
        self._prologue()
        self._loops()
        self._epilogue()
        where = "a contiguous cache" if self.cache.page is None else f"a cache in pages of {self.cache.page}"
        where = where if self.plan.view is None else "the entries of a view"
        text = self.file(f"decode kernel over {where}, portable Triton")
        if self.plan.listing is not None:
            text += "\n\n" + check_members()
        return text + "\n\n" + merge_slices(self.plan) if self.plan.split else text

    def _candidates(self) -> list[str]:
        given = ["part_ptr", "part_lse_ptr", "seq_lens_ptr", "page_table_ptr", "k_scale_ptr", "v_scale_ptr", "list_ptr"]
        sizes = ["stride_listb", "stride_listh", "stride_listr", "list_size"]
        sizes += ["stride_lens", "stride_table", "stride_k_scale", "stride_v_scale", "capacity", "pages", "splits"]
        sizes += ["slices"]
        # A sequence's length is read in the kernel.
        return [name for name in (*given, *super()._candidates(), *sizes) if name not in ("k_len", "entries")]

    def constants(self) -> None:
        plan, tiling = self.plan, self.plan.tiling
        rows = f"{tiling.block_q} row{'s' * (tiling.block_q > 1)}"
        heads = "" if plan.pack == 1 else f"  # {rows} of {plan.pack} heads, {plan.heads_in_tile} of which exist"
        self.lines.add(
            f"BLOCK_Q: tl.constexpr = {tiling.block_q * plan.pack}{heads}",
            f"BLOCK_K: tl.constexpr = {tiling.block_k}",
            *([f"COLUMNS: tl.constexpr = {tiling.columns}"] if self.columns == "COLUMNS" else []),
            *([f"PAGE: tl.constexpr = {self.cache.page}"] if self.paged else []),
            "LOG2_E: tl.constexpr = 1.4426950408889634",
        )

    # ---------------------------------------------------------------------------------- prologue

    def _prologue(self) -> None:
        self.constants()
        self._unit()
        self._rows()
        self._load_q()
        self._find_cache()
        self._nothing_seen()
        self.scale(folded=self.folded)
        if self.cache.k_scaled and self.plan.votes is not None:
            self.lines.add("votes_scale = scale")
            self.votes_scale = "votes_scale"
        if self.cache.k_scaled:
            self.lines.add("scale = scale * tl.load(k_scale_ptr + g * stride_k_scale).to(tl.float32)")
        self._hoist()

    def _unit(self) -> None:
        """Which tile of queries a program owns, and which slice of its keys."""
        plan, lines = self.plan, self.lines
        rows, kv_heads = plan.tiling.block_q, plan.spec.kv_heads
        slice_of = ", and a slice of the key tiles that they visit" if plan.split else ""
        if plan.columns > 1:
            slice_of = ", and some columns of their output"
        lines.add("", f"# A program owns rows of the heads of one key head{slice_of}.")
        unit = "tl.program_id(0)"
        if plan.split:
            lines.add("split = tl.program_id(0) % splits", "unit = tl.program_id(0) // splits")
            unit = "unit"
        if plan.columns > 1:
            width = plan.spec.v_dim // plan.columns
            lines.add(f"first_column = tl.program_id(0) % {plan.columns} * {width}")
            lines.add(f"unit = tl.program_id(0) // {plan.columns}")
            unit = "unit"
        lines.add(
            f"q_tiles = {'rows' if rows == 1 else f'tl.cdiv(rows, {rows})'}",
            f"q_tile = {unit} % q_tiles",
            f"head = {unit} // q_tiles",
        )
        if plan.pack == 1:
            lines.add(f"b = head // {plan.spec.heads}", f"h = head % {plan.spec.heads}")
            lines.add(f"g = h // {plan.group}" if plan.group > 1 else "g = h")
        elif plan.head_tiles == 1:
            lines.add(f"b = head // {kv_heads}", f"g = head % {kv_heads}")
        else:
            lines.add(
                f"b = head // {plan.head_tiles * kv_heads}",
                f"g = head // {plan.head_tiles} % {kv_heads}",
                f"first_head = head % {plan.head_tiles} * {plan.heads_in_tile}",
            )
        self.printer.helpers.add("clamp")
        lines.add(
            "k_len = clamp(tl.load(seq_lens_ptr + b * stride_lens), 0, capacity)",
            "start = k_len - rows",
            "q_first = start" + (f" + q_tile * {rows}" if rows > 1 else " + q_tile"),
        )
        if plan.view is not None:
            room = plan.view.space
            lines.add(f"entries = {room.size if room.axis is Axis.CONST else f'tl.cdiv(k_len, {room.block})'}")
        if any(dim.axis is Axis.K or (dim.axis is Axis.Q and dim.block > 1) for x in plan.inputs for dim in x.dims):
            lines.add("last_key = tl.maximum(k_len - 1, 0)")
        if not self.combs["q"].every:
            self._residue()
            return
        self.know_tile_start()
        if rows == 1:
            self.printer.names.known[Binary("+", Var("start"), Var("q_tile"))] = "q_first"

    def _residue(self) -> None:
        """In a layout: the residue that a program's row is of, and its index among the tokens of that."""
        comb, printer = self.combs["q"], self.fresh()
        printer.names.known[Var("q")] = "q_first"
        self.lines.add(
            f"# The row is one of some tokens, and so are its keys: {self.plan.layout}. `nth` counts them.",
            f"residue = {printer.text(comb.residue(Var('q')))}",
            f"i_start = {printer.text(comb.index(Var('q')))}",
        )
        self.printer.names.known[Var("i")] = "i_start"

    def _rows(self) -> None:
        """The rows and heads of a tile, and where they stand."""
        plan, lines = self.plan, self.lines
        rows, pack, group, present = plan.tiling.block_q, plan.pack, plan.group, plan.heads_in_tile
        tile = "q_tile" if rows == 1 else f"q_tile * {rows}"
        lines.add("", "q_offset = tl.arange(0, BLOCK_Q)", *self.key_offsets())
        exists = ["(q_rows < rows)"]
        if pack == 1:
            lines.add(f"q_rows = {tile} + q_offset")
        else:
            lines.add(f"q_rows = {tile} + q_offset // {pack}")
            within = f"q_offset % {pack}"
            if present < pack:
                # Padding stands for the last head that exists.
                lines.add(f"own_head = {within}")
                exists.append(f"(own_head < {present})")
                within = f"tl.minimum(own_head, {present - 1})"
            place = within if plan.head_tiles == 1 else f"first_head + {within}"
            if plan.head_tiles * present > group:
                lines.add(f"own_place = {place}")
                exists.append(f"(own_place < {group})")
                place = f"tl.minimum(own_place, {group - 1})"
            lines.add(f"q_heads = g * {group} + {place}", "h = q_heads[:, None]")
        lines.add(f"exists = {' & '.join(exists)}", "q_pos = start + q_rows[:, None]")
        if any(dim.axis is Axis.Q and dim.block == 1 for decl in plan.inputs for dim in decl.dims):
            lines.add("q_index = tl.minimum(q_rows, rows - 1)[:, None]")

    def _load_q(self) -> None:
        lines = self.lines
        lines.add(self.base("q", "h"), self._row_pointers("q"))
        for part in self.q_parts:
            dims, mask = self._columns(part, self.plan.spec.dim)
            lines.add(f"q{part.suffix} = tl.load(q_ptrs + {dims}, mask={mask}, other=0.0)")

    def _row_pointers(self, x: str) -> str:
        return f"{x}_ptrs = {x}_at + q_rows[:, None].to(tl.int64) * stride_{x}n"

    def _columns(self, part: Part, dim: int) -> tuple[str, str]:
        """The elements of a row that a part holds, and which of the tile's exist."""
        dims = f"{self.dims(part)}[None, :]"
        return dims, "exists[:, None]" + (f" & ({dims} < {dim})" if part.padded else "")

    def _find_cache(self) -> None:
        if self.paged:
            self.lines.add(
                "k_at = k_ptr + g.to(tl.int64) * stride_kh",
                "v_at = v_ptr + g.to(tl.int64) * stride_vh",
                "table_at = page_table_ptr + b.to(tl.int64) * stride_table",
            )
        else:
            self.lines.add(self.base("k", "g"), self.base("v", "g"))
        if self.plan.columns > 1:
            self.lines.add("v_at = v_at + first_column")

    def _hoist(self) -> None:
        super()._hoist()
        plan = self.plan
        self.wanted: Printer | None = None
        if plan.scattered and plan.mask is not None:
            # What the row allows of keys in a column, to load these alone.
            self.wanted = self.fresh()
            self.wanted.names.known[Var("q")] = "q_first"
            self.wanted.hoist(self.lines, [plan.mask], KEY, "own_")

    # ------------------------------------------------------------------------------------- loops

    def _loops(self) -> None:
        if self.plan.listing is not None:
            self._list_loop(self.plan.listing)
            return
        runs, lines = self.plan.runs, self.lines
        kinds = [("full", runs.full, FULL), ("partial", runs.partial, PARTIAL)]
        kinds = [kind for kind in kinds if kind[1]]
        if not kinds:
            return
        self.name_ends(runs.full + runs.partial)
        visits = {label: Visits(lines, self.printer, found, label) for label, found, _ in kinds}
        total = " + ".join(visits[label].total for label, _, _ in kinds)
        exists = "k_len > 0" if self.combs["q"].every else "q_first >= 0"
        lines.add(f"visited = tl.where({exists}, {total}, 0)")
        first, last = self._slice()
        lines.add("")
        before = ""
        for label, _, comment in kinds:
            begin, end = first, last
            if before:
                begin = f"tl.maximum({first} - {before}, 0)" if self.plan.split else "0"
                end = f"{last} - {before}"
            elif len(kinds) > 1:
                end = f"tl.minimum({last}, {visits[label].total})"
            lines.add(f"# {comment}{self.origin}")
            if self.plan.ahead:
                self._look_up(visits[label].tile(begin))
            with lines.block(f"for i in range({end if begin == '0' else f'{begin}, {end}'}):"):
                if self.plan.ahead:
                    lines.add("k_tile, entry = next_tile, next_page")
                    self._look_up(visits[label].tile("(i + 1)"))
                else:
                    lines.add(f"k_tile = {visits[label].tile('i')}")
                self._tile(masked=label == "partial")
            lines.add("")
            before = visits[label].total

    def _slice(self) -> tuple[str, str]:
        """Which of the visited tiles the program takes."""
        if not self.plan.split:
            return "0", "visited"
        self.lines.add(
            "share = tl.cdiv(visited, splits)", "first = split * share", "last = tl.minimum(first + share, visited)"
        )
        return "first", "last"

    def _list_loop(self, listing: Listing) -> None:
        """One loop over the tiles that a list fills: several small members, or a part of a large one."""
        lines, plan = self.lines, self.plan
        self.printer.helpers.update(("listed_keys", "larger"))
        head = f"(g * {plan.group} + first_head)" if listing.per_head and plan.group > 1 else "g"
        row = " + q_tile.to(tl.int64) * stride_listr" if listing.per_row else ""
        lines.add(
            f"MEMBER: tl.constexpr = {listing.keys}",
            f"list_at = list_ptr + b.to(tl.int64) * stride_listb + {head}.to(tl.int64) * stride_listh{row}",
            "visited = tl.where(k_len > 0, tl.cdiv(list_size * MEMBER, BLOCK_K), 0)",
        )
        first, last = self._slice()
        lines.add("", f"# Tiles of the list: pairs are masked.{self.origin}")
        if plan.ahead:
            self._look_up(first)
        with lines.block(f"for k_tile in range({last if first == '0' else f'{first}, {last}'}):"):
            if plan.ahead:
                lines.add("keys, entry = next_keys, next_page")
                self._look_up("(k_tile + 1)")
            self._tile(masked=True)
        lines.add("")

    def _look_up(self, tile: str) -> None:
        """Where the keys of the next tile lie: known by then, so that they are loaded without waiting for it."""
        if self.plan.listing is not None:
            self.lines.add(f"next_keys = {self._listed('[:, None]', tile)}")
        else:
            self.lines.add(f"next_tile = {tile}", f"next_keys = {self._keys('next_tile')}")
        where = "mask=(next_keys >= 0) & (next_keys < k_len), other=-1"
        self.lines.add(f"next_page = tl.load(table_at + next_keys // PAGE, {where})")

    def positions(self, axis: str, pairs: list[Scalar]) -> None:
        if self.plan.listing is None:
            super().positions(axis, pairs)
        elif any(reads(e, "k") for e in pairs):
            self.lines.add(f"k_pos = {self._listed(axis)}")

    def tile_keys(self) -> str:
        return super().tile_keys() if self.plan.listing is None else "BLOCK_K"

    def tile_number(self) -> str:
        listing = self.plan.listing
        if listing is None:
            return super().tile_number()
        if listing.keys == self.plan.tiling.block_k:
            self.lines.add("number = tl.load(list_at + k_tile)")
        else:
            self.lines.add("number = listed_keys(list_at, k_tile * BLOCK_K, list_size, MEMBER) // BLOCK_K")
        return "number"

    def _listed(self, axis: str, tile: str = "k_tile") -> str:
        return f"listed_keys(list_at, {tile} * BLOCK_K + k_offset{axis}, list_size, MEMBER)"

    def load(
        self, x: str, parts: tuple[Part, ...], dim: int, side: str, head: str, bounded: bool, pointer: bool = False
    ) -> None:
        if x == "k":
            self._find_keys(bounded)
        if self.paged:
            place = f"page * stride_{x}b + in_page * stride_{x}n"
        elif self.plan.listing is not None or not self.combs["k"].every:
            place = f"keys.to(tl.int64) * stride_{x}n"
        else:
            # What a row adds to its tile's place is the same in every turn.
            within = f"k_offset[:, None].to(tl.int64) * stride_{x}n"
            place = f"(k_tile * BLOCK_K).to(tl.int64) * stride_{x}n + {within}"
        self.lines.add(f"{x}_ptrs = {x}_at + {place}")
        for part in parts:
            dims = f"{self.dims(part)}[None, :]"
            conds = [*(["present"] if bounded else []), *([f"({dims} < {dim})"] if part.padded else [])]
            mask = f", mask={' & '.join(conds)}, other=0" if conds else ""
            loaded = f"tl.load({x}_ptrs + {dims}{mask})"
            if self.cache.fp8:
                self.printer.helpers.add("from_e4m3")
                loaded = f"from_e4m3({loaded}).to(q.dtype)"
            self.lines.add(f"{x}{part.suffix} = {loaded}")

    def _find_keys(self, bounded: bool) -> None:
        """Where the keys of a tile lie. A page that does not exist is never read: it counts as zeros."""
        lines = self.lines
        if self.plan.listing is not None:
            if not self.plan.ahead:
                lines.add(f"keys = {self._listed('[:, None]')}")
            if self.cache.page is None:
                lines.add("present = (keys >= 0) & (keys < k_len)")
                return
            entry = "entry"
            if not self.plan.ahead:
                lines.add("listed = (keys >= 0) & (keys < k_len)")
                entry = "tl.load(table_at + keys // PAGE, mask=listed, other=-1)"
            lines.add("in_page = keys % PAGE", f"page = {entry}.to(tl.int64)", "present = (page >= 0) & (page < pages)")
            return
        wanted = self._wanted() if bounded else ""
        if self.cache.page is None:
            apart = not self.combs["k"].every
            lines.add(*(["keys = k_rows[:, None]"] if apart else []))
            # Rows before the first token have indices below 0.
            exists = wanted or ("(keys >= 0) & (keys < k_len)" if apart else f"{self._keys('k_tile')} < {self.k_end}")
            lines.add(*([f"present = {exists}"] if bounded else []))
            return
        exists, entry = "(page >= 0) & (page < pages)", "entry"
        keys = self._keys("k_tile") if self.combs["k"].every else "k_rows[:, None]"
        lines.add(f"keys = {keys}", "in_page = keys % PAGE")
        if self.plan.ahead and wanted:
            exists = f"{wanted} & {exists}"
        elif not self.plan.ahead:
            which = f", mask={wanted or 'keys < k_len'}, other=-1" if bounded else ""
            entry = f"tl.load(table_at + keys // PAGE{which})"
        if bounded:
            lines.add(f"page = {entry}.to(tl.int64)", f"present = {exists}")
        else:
            lines.add(f"page = clamp({entry}, 0, pages - 1).to(tl.int64)")

    def _keys(self, tile: str) -> str:
        """The keys of a tile, as a column."""
        index = f"{tile} * BLOCK_K + k_offset[:, None]"
        return index if self.combs["k"].every else self._token("k", index)

    def _wanted(self) -> str:
        """The name of what says of the keys of a tile, a column, which the row allows, where only these are loaded."""
        if self.wanted is None or self.plan.mask is None:
            return ""
        printer = self.wanted.within(self.wanted.names.inner())
        self.lines.add("k_pos = k_tile * BLOCK_K + k_offset[:, None]")
        printer.share(self.lines, [self.plan.mask], "own_")
        self.lines.add(f"wanted = (k_pos < k_len) & ({printer.text(self.plan.mask)})")
        return "wanted"

    def _skip(self, below: float, masked: bool) -> None:
        """Drop the tile for each head none of whose rows has a score near its largest so far."""
        rows, pack, lines = self.plan.tiling.block_q, self.plan.pack, self.lines
        scaled = " * factor" if self.folded else ""
        lines.add(
            "seeing = exists & (start + q_rows >= 0)",
            f'gain = tl.where(seeing, tl.max(scores, 1){scaled} - row_max, float("-inf"))',
        )
        if pack > 1:
            # A head's rows stand pack rows apart.
            near = "gain[None, :]" if rows == 1 else f"tl.max(tl.reshape(gain, [{rows}, {pack}]), 0)[None, :]"
            lines.add(f"gain = tl.reshape(tl.broadcast_to({near}, [{rows}, {pack}]), [BLOCK_Q])")
            lines.add(f'scores = tl.where(gain[:, None] >= {math.log2(below)!r}, scores, float("-inf"))')
        with lines.block(f"if {self._most('gain')} >= {math.log2(below)!r}:  # skip below {below}"):
            self._softmax_step()
            self.add_values(masked)

    # ---------------------------------------------------------------------------------- epilogue

    def _epilogue(self) -> None:
        plan, lines = self.plan, self.lines
        heads = "h" if plan.pack == 1 else "q_heads"
        lines.add("# Rows before the first token are empty.", "q_pos = start + q_rows")
        for part in self.v_parts:
            lines.add(f"acc{part.suffix} = tl.where(q_pos[:, None] < 0, 0.0, acc{part.suffix})")
        if self.softmax:
            lines.add("row_max = tl.where(q_pos < 0, -1.0e38, row_max)", "row_sum = tl.where(q_pos < 0, 0.0, row_sum)")
        if plan.sink is not None:
            # Sinks are a value a row: rows are a vector here.
            lines.add("q_index = tl.minimum(q_rows, rows - 1)", *([] if plan.pack == 1 else ["h = q_heads"]))
            self._add_sink(plan.sink, once="split == 0" if plan.split else "")
        if self.softmax:
            self._normalise()
        if self.cache.v_scaled:
            lines.add("v_scale = tl.load(v_scale_ptr + g * stride_v_scale).to(tl.float32)")
            lines.add(*(f"acc{part.suffix} = acc{part.suffix} * v_scale" for part in self.v_parts))
        if self.softmax or plan.split:
            lines.add(f"row_at = (b.to(tl.int64) * {plan.spec.heads} + {heads}) * rows + q_rows")
        if plan.split:
            lines.add(f"slice_at = row_at * {'slices' if plan.joined else 'splits'} + split")
        if self.softmax:
            lines.add('lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))')
            if plan.split:
                lines.add("tl.store(part_lse_ptr + slice_at, lse, mask=exists)")
            else:
                once = " & (first_column == 0)" if plan.columns > 1 else ""
                lines.add(f"tl.store(lse_ptr + row_at, lse / LOG2_E, mask=exists{once})")
        if plan.split:
            lines.add(f"out_ptrs = part_ptr + slice_at[:, None] * {plan.spec.v_dim}")
        else:
            lines.add(self.base("out", f"{heads}[:, None]" if plan.pack > 1 else heads), self._row_pointers("out"))
            if plan.columns > 1:
                lines.add("out_ptrs = out_ptrs + first_column")
        for part in self.v_parts:
            dims, mask = self._columns(part, plan.spec.v_dim)
            value = f"acc{part.suffix}" if plan.split else f"acc{part.suffix}.to(out_ptr.dtype.element_ty)"
            lines.add(f"tl.store(out_ptrs + {dims}, {value}, mask={mask})")
