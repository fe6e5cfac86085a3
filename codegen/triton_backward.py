"""The backward kernels in portable Triton: dq over query tiles, dk and dv over key tiles.

Two kernels, each owning what it writes, so there are no atomics and two runs agree to the bit:

- `attention_dq` owns query tiles and loops over their key tiles. It also makes what the other kernel reads of each
  row: delta, the sum of out * dout less the gradient of lse, and lse as exponents of 2 take it.
- `attention_dkdv` owns key tiles and loops over the query tiles that visit them: the transposed runs.

With s = scale q . k, logit x(s), p = exp(x - lse) and dp = dout . v: dx = p (dp - delta), ds = dx x'(s).

A learnable input gets dx times its derivative, summed by the kernel over whatever its index does not follow.
For the n-th read `sum_n` receives the sums and `at_n` the entries they belong to; adding them up is the caller's.
Inputs that q and k read together have kernels of their own: `triton_learned.py`.
"""

from __future__ import annotations

from attndsl.codegen.backward_kernel import BackwardKernel
from attndsl.codegen.box_text import BoxText
from attndsl.codegen.head_order import heavy_first
from attndsl.codegen.layer_text import kept_at, tile_at
from attndsl.codegen.leaves import Leaves
from attndsl.codegen.scalars import Level, Printer
from attndsl.codegen.two_levels import (
    keep_share,
    leave_without_entry,
    load_member,
    name_share,
    strip_softmax,
    sum_strips,
)  # fmt: skip
from attndsl.codegen.votes import (
    add_to_entry,
    add_to_queries,
    begin_entry,
    load_entry,
    load_votes_lse,
    write_entry,
)  # fmt: skip
from attndsl.learned import Learned, Over
from attndsl.mask_cost import KEY, ROW
from attndsl.plan import BackwardPlan
from attndsl.program import reads
from attndsl.view_plans import heads_apart

DQ = "attention_dq"
DKDV = "attention_dkdv"


def backward_sources(plan: BackwardPlan) -> tuple[str, str]:
    """Texts of two Python files: of `attention_dq`, and of `attention_dkdv`."""
    if plan.gathered is None:
        return DqKernel(plan).source(), dkdv_source(plan)
    from attndsl.codegen import triton_gathered

    return triton_gathered.backward_sources(plan)


def dkdv_source(plan: BackwardPlan) -> str:
    """Text of a Python file of `attention_dkdv` where rows are not gathered; the plan may be `of_keys`."""
    if plan.marked is None:
        return DkDvKernel(plan).source()
    from attndsl.codegen.triton_marked import MarkedDkDv

    return MarkedDkDv(plan).source()


class DqKernel(BackwardKernel):
    """The kernel of dq, which makes what others read of rows too."""

    takes_turns = True

    def __init__(self, plan: BackwardPlan, function: str = DQ) -> None:
        super().__init__(plan, function, "q k v out dout dq", "[:, None]", (Over.TILE, Over.KEYS))
        self.visits = self.flows or bool(self.from_pairs) or plan.shares is not None
        # Where votes are scaled otherwise, what is added to the gradient is scaled before.
        self.scaled = plan.votes is not None and plan.votes.scale != plan.scale

    def source(self) -> str:
        plan, lines, spec = self.plan, self.lines, self.plan.spec
        self.constants()
        self.query_tile()
        for x, parts, dim in (("q", self.q_parts, spec.dim), ("dout", self.v_parts, spec.v_dim)):
            lines.add(self.base(x, "h"))
            self.load(x, parts, dim, "q", "h", bounded=True, pointer=True)
        if self.softmax:
            self.delta()
        lines.add(*(f"dq{part.suffix} = tl.zeros([BLOCK_Q, {part.size}], tl.float32)" for part in self.q_parts))
        if self.learned:
            lines.add("row_at = head.to(tl.int64) * rows + q_rows")
        lines.add(*(f"sum_{n} = tl.zeros([BLOCK_Q], tl.float32)" for n, _ in self.learned))
        if self.visits:
            if not tile_at(self, "k"):
                lines.add(self.base("k", "g"), self.base("v", "g"))
            self.seed()
            self.scale(folded=False)
            if self.folded:
                lines.add("factor = scale * LOG2_E")
            self.printer.hoist(lines, self.pairs(masked=plan.masks), (*KEY, "s"), "row_")
            if plan.votes is not None:
                load_votes_lse(self, plan.votes)
            lines.add("")
            self.loops("k_tile")
            lines.add("")
        for n, learned in self.learned:
            self._write_sum(n, learned)
        if (self.flows or plan.votes is not None) and not self.scaled:
            lines.add(*(f"dq{part.suffix} = dq{part.suffix} * scale" for part in self.q_parts))
        self.write()
        return self.file("gradient of q, portable Triton", *self.beside)

    def write(self) -> None:
        """Write the gradient of the tile's queries."""
        self.put("dq", self.q_parts, self.plan.spec.dim, "q", "h")

    def delta(self) -> None:
        """Row sums of out * dout less the gradient of lse, kept for the other kernel and further pieces too."""
        lines = self.lines
        if self.plan.follows or (self.plan.gathered and self.plan.tiling.pack == 1):
            lines.add(
                "kept_at = head.to(tl.int64) * row_stride + q_rows",
                "delta = tl.load(delta_ptr + kept_at, mask=q_rows < rows, other=0.0)",
                'lse = tl.load(row_lse_ptr + kept_at, mask=q_rows < rows, other=float("inf"))',
            )
            return
        lines.add(self.base("out", "h"))
        self.load("out", self.v_parts, self.plan.spec.v_dim, "q", "h", bounded=True, pointer=True)
        sums = (f"tl.sum(out{p.suffix}.to(tl.float32) * dout{p.suffix}.to(tl.float32), 1)" for p in self.v_parts)
        lines.add(f"delta = {' + '.join(sums)}", "row_at = head.to(tl.int64) * rows + q_rows")
        if self.plan.uses_lse:
            lines.add("delta -= tl.load(d_lse_ptr + row_at, mask=q_rows < rows, other=0.0)")
        lines.add(
            "# Rows that see nothing have lse -inf: with +inf in its place their weights are 0.",
            'lse = tl.load(lse_ptr + row_at, mask=q_rows < rows, other=float("inf")) * LOG2_E',
            'lse = tl.where(lse == float("-inf"), float("inf"), lse)',
            f"kept_at = head.to(tl.int64) * row_stride + {kept_at(self.plan)}",
            "tl.store(delta_ptr + kept_at, delta, mask=q_rows < rows)",
            "tl.store(row_lse_ptr + kept_at, lse, mask=q_rows < rows)",
        )

    def tile(self, masked: bool) -> None:
        if not self.plan.tiling.strip:
            self._gradients(self.score_pairs(masked), masked)
            return
        sum_strips(self, masked)
        name_share(self)
        if self.plan.votes is not None:
            add_to_queries(self, self.plan.votes)
        with self.strips():
            printer = self.score_pairs(masked)
            strip_softmax(self)
            self._gradients(printer, masked)

    def score_pairs(self, masked: bool) -> Printer:
        """What a tile's pairs weigh, and the gradients of these weights; of a strip, of the member's softmax the
        logits. Returns what names are known there."""
        spec, lines = self.plan.spec, self.lines
        printer = self.printer.within(self.printer.names.inner())
        self.tokens("k", bounded=masked)
        self.keep()
        self.load("k", self.q_parts, spec.dim, "k", "g", bounded=masked or self.spare)
        self.load("v", self.v_parts, spec.v_dim, "k", "g", bounded=masked or self.spare)
        if pairs := self.pairs(masked):
            self.positions("[None, :]", pairs)
        self.scores("q{}", "tl.trans(k{})")
        # Rows that do not exist are not written; only sums over rows must leave them out.
        self.probabilities(printer, masked, f"[BLOCK_Q, {self.columns}]", existing=bool(self.from_pairs))
        lines.add("d_weights = " + self.dots(self.v_parts, "dout{}", "tl.trans(v{})"))
        self.drop()
        return printer

    def _gradients(self, printer: Printer, masked: bool) -> None:
        """Add what a tile's pairs hand on to their rows."""
        lines = self.lines
        self.logit_gradient(printer, masked, existing=bool(self.from_pairs))
        self.learn(printer)
        if self.plan.shares is not None and not self.plan.tiling.strip:
            keep_share(self)
            if self.plan.votes is not None:
                add_to_queries(self, self.plan.votes)
        if self.flows:
            scaled = " * scale" if self.scaled else ""
            lines.add(f"d_scores = {self.passed_on(self.plan.d_score, printer)}{scaled}")
            for part in self.q_parts:
                key, acc = f"k{part.suffix}", f"dq{part.suffix}"
                lines.add(f"{acc} = " + self.dot(f"d_scores.to({key}.dtype)", key, acc))

    @property
    def _program(self) -> str:
        """The number of the program: heads one after another."""
        return "head * q_tiles + q_tile" if self.plan.layout.classes == 1 else "tl.program_id(0)"

    def _write_sum(self, n: int, x: Learned) -> None:
        plan, lines = self.plan, self.lines
        if x.of_sink and plan.sink is not None:
            printer = self.printer
            lines.add(
                "# The sink has the weight exp(sink - lse), and no value.",
                f"d_logits = -tl.exp2({printer.text(plan.sink, Level.TERM)} * LOG2_E - lse[:, None]) * delta[:, None]",
                f"sum_{n} += tl.sum({self.passed_on(x.slope, printer)}, 1)",
            )
        if x.over is Over.TILE:
            lines.add(
                f"tl.store(sum_{n}_ptr + {self._program}, tl.sum(sum_{n}, 0))",
                f"tl.store(at_{n}_ptr + head, {Leaves(plan).flat(x.read, self.printer)})",
            )
        else:
            lines.add(
                f"tl.store(sum_{n}_ptr + row_at, sum_{n}, mask=q_rows < rows)",
                f"tl.store(at_{n}_ptr + row_at[:, None], {self.place(x, 'BLOCK_Q')}, mask=q_rows[:, None] < rows)",
            )


class DkDvKernel(BackwardKernel):
    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan.of_keys(), DKDV, "q k v dout dk dv", "[None, :]", (Over.ROWS,))
        self.group = plan.spec.heads // plan.spec.kv_heads
        self.apart = heads_apart(plan)
        self.learns_entries = plan.votes is not None and plan.votes.learns
        # Otherwise dk is scaled once, at the end.
        self.scale_per_head = self.group > 1 and not self.apart and plan.scale is not None and reads(plan.scale, "h")

    def source(self) -> str:
        plan, lines, spec, sums = self.plan, self.lines, self.plan.spec, list[str]()
        self.constants()
        self.key_tile()
        if self.group == 1:
            lines.add("h = g")
        self.begin()
        with self.strips():
            if self.plan.tiling.strip:
                self._key_rows()
            for x, parts, dim in (("k", self.q_parts, spec.dim), ("v", self.v_parts, spec.v_dim)):
                lines.add(self.base(x, "g"))
                self.load(x, parts, dim, "k", "g", bounded=True, pointer=True)
                sums += [f"d{x}{part.suffix} = tl.zeros([{self.columns}, {part.size}], tl.float32)" for part in parts]
            lines.add(*sums, *(begin_entry(self) if self.learns_entries else []))
            self.seed()
            if not self.scale_per_head:
                self.scale(folded=False)
            if plan.votes is not None:
                load_entry(self, plan.votes, "k")
            self.heads()
            lines.add("")
            self.write()
        return self.file("gradients of k and v, portable Triton", *self.beside)

    def begin(self) -> None:
        """What a program does before it loads its keys."""

    def write(self) -> None:
        """Write the gradients of the tile's keys and values."""
        lines, spec = self.lines, self.plan.spec
        if self.flows and not self.scale_per_head:
            lines.add(*(f"dk{part.suffix} = dk{part.suffix} * scale" for part in self.q_parts))
        if spec.dropout:
            lines.add(*(f"dv{part.suffix} = dv{part.suffix} * keep_scale" for part in self.v_parts))
        self.put("dk", self.q_parts, spec.dim, "k", "h" if self.apart else "g")
        self.put("dv", self.v_parts, spec.v_dim, "k", "h" if self.apart else "g")
        if self.learns_entries:
            write_entry(self)

    def key_tile(self) -> None:
        """Which key tile of which key head a program owns."""
        lines, spec, layout = self.lines, self.plan.spec, self.plan.layout
        if self.boxes is not None:
            self._key_box(self.boxes)
            return
        count = "k_len" if self.plan.tiles_of is not None else f"tl.cdiv({self.most('k', self.k_end)}, BLOCK_K)"
        tiles = f"k_tiles = {count}"
        if layout.plain:
            self.plain_tile(tiles)
        elif layout.classes == 1:
            lines.add(
                "",
                "# Heads one after another; a head's first keys first: most rows see them.",
                tiles,
                "head = tl.program_id(0) // k_tiles",
                "k_tile = tl.program_id(0) % k_tiles",
            )
        else:
            lines.add(
                "",
                "# Heads one after another, of a head one residue after another, of a residue the first keys first.",
                tiles,
                f"head = tl.program_id(0) // (k_tiles * {layout.classes})",
                f"residue = tl.program_id(0) // k_tiles % {layout.classes}",
                "k_tile = tl.program_id(0) % k_tiles",
            )
        if self.apart:
            lines.add(f"b = head // {spec.heads}", f"h = head % {spec.heads}", f"g = h // {self.group}", self.start)
        else:
            lines.add(f"b = head // {spec.kv_heads}", f"g = head % {spec.kv_heads}", self.start)
        if self.plan.tiles_of is not None:
            leave_without_entry(self, self.plan.tiles_of)
        elif not self.in_order("k") and self.permutation is None:
            self.skip_missing("k", "k_tile * BLOCK_K")
        if not self.combs["q"].every:
            self.first_row()
        lines.add("", "q_offset = tl.arange(0, BLOCK_Q)", *self.key_offsets())
        if not self.plan.tiling.strip:
            self._key_rows()

    def _key_rows(self) -> None:
        """Where the keys of the tile, or of its strip, lie."""
        lines = self.lines
        self.tokens("k")
        if self.in_order("k"):
            lines.add("k_pos = k_tile * BLOCK_K + k_offset[:, None]")
        elif self.permutation is not None or self.plan.tiles_of is not None:
            lines.add(f"k_pos = {'k_rows' if self.permutation is None else 'k_nth'}[:, None]")
        else:
            lines.add("k_pos, j_pos = k_rows[:, None], k_nth[:, None]")

    def plain_tile(self, tiles: str) -> None:
        """The same where tiles lie in order. tiles: the line that says how many a head has."""
        heavy_first(self.lines, "tl", tiles)

    def _key_box(self, boxes: BoxText) -> None:
        """Which box of keys of which key head a program owns."""
        lines, spec = self.lines, self.plan.spec
        lines.add(self.start)
        boxes.own(lines, self.fresh(), "k")
        lines.add(f"b = head // {spec.kv_heads}", f"g = head % {spec.kv_heads}")
        boxes.leave_missing(lines, self.fresh(), "k")
        self.offsets()
        self.tokens("k")
        lines.add("k_pos = k_rows[:, None]")
        boxes.indices(lines, "k", "[:, None]", list(self.plan.scalars))

    def heads(self) -> None:
        """What the rows of all heads that attend to the keys add to the accumulators."""
        if self.group == 1 or self.apart:
            self._head()
            return
        self.lines.add("", "# The query heads that share these keys, one after another: their sum has one order.")
        with self.lines.block(f"for member in range({self.group}):"):
            self.lines.add(f"h = g * {self.group} + member")
            self._head()

    def of_head(self) -> None:
        """What a head's rows need that does not differ among them."""
        plan, lines = self.plan, self.lines
        if not tile_at(self, "q"):
            lines.add(self.base("q", "h"), self.base("dout", "h"))
        if self.softmax:
            lines.add(f"row_head = b * {plan.spec.heads} + h")
        if self.scale_per_head:
            self.scale(folded=False)
        if self.folded:
            lines.add("factor = scale * LOG2_E")

    def _head(self) -> None:
        plan, lines = self.plan, self.lines
        self.of_head()
        lines.add(*(f"sum_{n} = tl.zeros([{self.columns}], tl.float32)" for n, _ in self.learned))
        self.printer.hoist(lines, self.pairs(masked=plan.masks), (*ROW, "s"), "column_")
        self.loops("q_tile")
        if self.learned:
            lines.add(
                f"column_at = (b * {plan.spec.heads} + h).to(tl.int64) * k_len + k_pos",
                "column_exists = k_pos < k_len",
            )
        for n, x in self.learned:
            lines.add(
                f"tl.store(sum_{n}_ptr + column_at, sum_{n}[:, None], mask=column_exists)",
                f"tl.store(at_{n}_ptr + column_at, {self.place(x, self.columns)}, mask=column_exists)",
            )

    def tile(self, masked: bool) -> None:
        spec, lines = self.plan.spec, self.lines
        printer = self.printer.within(self.printer.names.inner())
        if self.in_order("q") or self.permutation is not None:
            self.tokens_in_order("q")
        else:
            self.tokens("q", "i_start + q_tile * BLOCK_Q")
        self.keep(transposed=True)
        # A query tile may reach past the last row whatever its kind: such rows are zero, and must weigh nothing.
        self.load("q", self.q_parts, spec.dim, "q", "h", bounded=True)
        self.load("dout", self.v_parts, spec.v_dim, "q", "h", bounded=True)
        if (pairs := self.pairs(masked)) or self.plan.shares is not None:
            self.know_classes(printer)
            lines.add(f"q_pos = start + {self.q_place}[None, :]")
            if any(reads(e, "i") for e in pairs):
                lines.add("i_pos = q_nth[None, :]")
            if self.boxes is not None:
                self.boxes.indices(lines, "q", "[None, :]", pairs)
            if self.reads_rows:
                lines.add(f"q_index = tl.minimum({self.q_place}, rows - 1)[None, :]")
        if self.softmax:
            self.load_row("lse", "row_lse", 'float("inf")')
        if self.plan.votes is not None:
            load_votes_lse(self, self.plan.votes)
        self.scores("k{}", "tl.trans(q{})")
        self.probabilities(printer, masked, f"[{self.columns}, BLOCK_Q]", existing=True)
        if self.plan.tiling.strip:
            load_member(self)
            name_share(self)
            strip_softmax(self)
        left = "weights"
        if self.plan.spec.dropout:
            left = "left"
            lines.add("left = tl.where(keep, weights, 0.0)")
        for part in self.v_parts:
            value, acc = f"dout{part.suffix}", f"dv{part.suffix}"
            lines.add(f"{acc} = " + self.dot(f"{left}.to({value}.dtype)", value, acc))
        if not self.flows and not self.from_pairs and not self.learns_entries:
            return
        if self.softmax:
            self.load_row("delta", "delta", "0.0")
        lines.add("d_weights = " + self.dots(self.v_parts, "v{}", "tl.trans(dout{})"))
        self.drop()
        self.logit_gradient(printer, masked, existing=True)
        self.learn(printer)
        if self.plan.votes is not None and self.learns_entries:
            add_to_entry(self, self.plan.votes)
        if self.flows:
            scaled = " * scale" if self.scale_per_head else ""
            lines.add(f"d_scores = {self.passed_on(self.plan.d_score, printer)}{scaled}")
            for part in self.q_parts:
                value, acc = f"q{part.suffix}", f"dk{part.suffix}"
                lines.add(f"{acc} = " + self.dot(f"d_scores.to({value}.dtype)", value, acc))
