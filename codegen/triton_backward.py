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

from abc import ABC, abstractmethod

from attndsl.codegen.box_text import BoxText
from attndsl.codegen.head_order import heavy_first
from attndsl.codegen.kernel import KernelWriter
from attndsl.codegen.layer_text import copies_rows, kept_at, tile_at
from attndsl.codegen.leaves import Leaves
from attndsl.codegen.scalars import Level, Printer
from attndsl.codegen.two_levels import keep_share, leave_without_entry, member_softmax
from attndsl.learned import Learned, Over
from attndsl.mask_cost import KEY, ROW
from attndsl.plan import BackwardPlan, Part
from attndsl.program import Axis, Const, Scalar, Var, reads
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


class BackwardKernel(KernelWriter, ABC):
    """What backward kernels compute for a tile of pairs: probabilities, and the gradient of the scores."""

    plan: BackwardPlan
    # Other kernels of the same file.
    beside: tuple[KernelWriter, ...] = ()

    def __init__(self, plan: BackwardPlan, function: str, tensors: str, along_q: str, over: tuple[Over, ...]) -> None:
        """`along_q`: how a vector over query rows lies in a tile of pairs. `over`: the learned sums made here."""
        super().__init__(plan, function, tensors)
        self.along_q = along_q
        self.keys_axis = 1 if along_q == "[:, None]" else 0
        self.softmax = plan.softmax
        self.folded = self.softmax and plan.score is None
        # A logit that does not depend on the score: nothing flows to queries and keys.
        self.flows = plan.d_score != Const(0.0)
        self.learned = [(n, x) for n, x in enumerate(plan.learned) if x.over in over]
        self.from_pairs = [(n, x) for n, x in self.learned if not x.of_sink]
        self.reads_rows = any(dim.axis is Axis.Q and dim.block == 1 for decl in plan.inputs for dim in decl.dims)

    def _candidates(self) -> list[str]:
        kept = ("row_lse_ptr", "row_lse_desc", "delta_desc", "row_stride", "heavy", "d_shares_ptr")
        return [*super()._candidates(), *kept, *(f"{x}_{n}_ptr" for n, _ in self.learned for x in ("sum", "at"))]

    def pairs(self, masked: bool) -> list[Scalar]:
        """What is computed for every pair of a tile."""
        plan = self.plan
        found = (plan.mask if masked else None, plan.score, plan.weights, plan.d_score)
        return [e for e in (*found, *(x.slope for _, x in self.from_pairs)) if e is not None]

    def loops(self, tile: str) -> None:
        for masked in self.visit(self.plan.runs, self.plan.box_runs, tile):
            self.tile(masked)

    @abstractmethod
    def tile(self, masked: bool) -> None:
        """One tile of pairs: what it adds to the accumulators."""

    def load_row(self, name: str, kept: str, other: str) -> None:
        """A vector over the tile's rows, of what the kernel of dq kept. Rows that do not exist have a dout of zero, and
        with it no gradient, whatever their weight."""
        if copies_rows(self):
            self.lines.add(f"{name} = {kept}_desc.load([row_head, {tile_at(self, 'q')}]).reshape(BLOCK_Q)")
            return
        at = f"{kept}_ptr + row_head.to(tl.int64) * row_stride + q_rows"
        self.lines.add(f"{name} = tl.load({at}, mask=q_rows < rows, other={other})")

    def scores(self, a: str, b: str) -> None:
        """`scores`: the product q . k, scaled where an expression reads it."""
        lines = self.lines
        unscored = self.plan.shares is not None and self.plan.score is None
        if self.folded or unscored or any(reads(e, "s") for e in self.pairs(masked=False)):
            lines.add("scores = " + self.dots(self.q_parts, a, b))
            if not self.folded:
                lines.add("scores = scores * scale")

    def probabilities(self, printer: Printer, masked: bool, shape: str, existing: bool) -> None:
        """`weights`, 0 for pairs that are not allowed; with `existing`, for rows that do not exist either."""
        plan, lines = self.plan, self.lines
        printer.names.known[Var("s")] = "scores"
        printer.share(lines, self.pairs(masked), "pair_")
        allowed = self._allowed(printer, masked, existing and not self.folded)
        logit = plan.score if plan.weights is None else plan.weights
        whole = "" if logit is None or reads(logit, "s") else f" + tl.zeros({shape}, tl.float32)"
        if plan.shares is not None:
            text = "scores * LOG2_E" if plan.score is None else f"({printer.text(plan.score)}) * LOG2_E{whole}"
            lines.add(f'logits = tl.where({allowed}, {text}, float("-inf"))' if allowed else f"logits = {text}")
            member_softmax(self, "logits", self.keys_axis, self.along_q)
            return
        if plan.weights is not None:
            text = f"{printer.text(plan.weights, Level.SUM)}{whole}"
        elif plan.score is not None:
            text = f"tl.exp2({printer.text(plan.score, Level.TERM)} * LOG2_E - {self._along('lse')}{whole})"
        else:
            text = f"tl.exp2(scores * factor - {self._along('lse')})"
        # Where a pair is not allowed its exponent may be anything.
        lines.add(f"weights = tl.where({allowed}, {text}, 0.0)" if allowed else f"weights = {text}")

    def _allowed(self, printer: Printer, masked: bool, existing: bool) -> str:
        """The condition for a pair to count, empty where all do."""
        exists = f"{self._along('q_rows')} < rows" if existing else ""
        if not masked or self.plan.mask is None:
            return exists
        return f"{printer.text(self.plan.mask, Level.BIT_AND)} & ({exists})" if exists else printer.text(self.plan.mask)

    def _along(self, vector: str) -> str:
        return f"{vector}{self.along_q}"

    def logit_gradient(self, printer: Printer, masked: bool, existing: bool) -> None:
        """`d_logits` from `weights` and `d_weights`."""
        lines = self.lines
        if self.softmax:
            lines.add(f"d_logits = weights * (d_weights - {self._along('delta')})")
            return
        if self.plan.shares is not None:
            lines.add(
                f"d_share = tl.sum(inner * d_weights, {self.keys_axis})",
                f"d_logits = weights * (d_weights - {self._along('d_share')})",
            )
            return
        allowed = self._allowed(printer, masked, existing)
        lines.add(f"d_logits = tl.where({allowed}, d_weights, 0.0)" if allowed else "d_logits = d_weights")

    def drop(self) -> None:
        """What reaches a weight, of the gradient of what was left of it after dropout."""
        if self.plan.spec.dropout:
            self.lines.add("d_weights = tl.where(keep, d_weights * keep_scale, 0.0)")

    def passed_on(self, slope: Scalar | None, printer: Printer) -> str:
        """d_logits times a derivative, 0 where d_logits is, even where the derivative is infinite or not a number."""
        if slope is None or slope == Const(1.0):
            return "d_logits"
        return f"tl.where(d_logits != 0.0, d_logits * {printer.text(slope, Level.UNARY)}, 0.0)"

    def learn(self, printer: Printer) -> None:
        """Add a tile's share to the sums; keys or rows, whichever the tile has in its second dimension, go together."""
        for n, x in self.from_pairs:
            self.lines.add(f"sum_{n} += tl.sum({self.passed_on(x.slope, printer)}, 1)")

    def put(self, x: str, parts: tuple[Part, ...], dim: int, side: str, head: str) -> None:
        """Store a gradient from the accumulators of its name, or where the plan follows others, add it to theirs."""
        self.lines.add(self.base(x, head))
        if self.plan.follows and (side == "q" or self.plan.view is None):
            self.lines.add("# Earlier pieces have written theirs.")
            self.lines.add(*(f"found{part.suffix} = {x}{part.suffix}" for part in parts))
            self.load(x, parts, dim, side, head, bounded=True, pointer=True)
            for part in parts:
                self.lines.add(f"{x}{part.suffix} = found{part.suffix} + {x}{part.suffix}.to(tl.float32)")
        self.store(x, parts, dim, side, x)

    def place(self, x: Learned, block: str) -> str:
        """The entry that a read takes, as a column."""
        return f"{Leaves(self.plan).flat(x.read, self.printer)} + tl.zeros([{block}, 1], tl.int64)"

    def dots(self, parts: tuple[Part, ...], a: str, b: str) -> str:
        """A product over a head dimension, summed over its parts."""
        return " + ".join(self.dot(a.format(part.suffix), b.format(part.suffix)) for part in parts)


class DqKernel(BackwardKernel):
    """The kernel of dq, which makes what others read of rows too."""

    takes_turns = True

    def __init__(self, plan: BackwardPlan, function: str = DQ) -> None:
        super().__init__(plan, function, "q k v out dout dq", "[:, None]", (Over.TILE, Over.KEYS))
        self.visits = self.flows or bool(self.from_pairs) or plan.shares is not None

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
            lines.add("")
            self.loops("k_tile")
            lines.add("")
        for n, learned in self.learned:
            self._write_sum(n, learned)
        if self.flows:
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
        spec, lines = self.plan.spec, self.lines
        printer = self.printer.within(self.printer.names.inner())
        self.tokens("k", bounded=masked)
        self.keep()
        # Rows that do not exist are not written; only sums over rows must leave them out.
        existing = bool(self.from_pairs)
        self.load("k", self.q_parts, spec.dim, "k", "g", bounded=masked or self.spare)
        self.load("v", self.v_parts, spec.v_dim, "k", "g", bounded=masked or self.spare)
        if pairs := self.pairs(masked):
            self.positions("[None, :]", pairs)
        self.scores("q{}", "tl.trans(k{})")
        self.probabilities(printer, masked, f"[BLOCK_Q, {self.columns}]", existing)
        lines.add("d_weights = " + self.dots(self.v_parts, "dout{}", "tl.trans(v{})"))
        self.drop()
        self.logit_gradient(printer, masked, existing)
        self.learn(printer)
        if self.plan.shares is not None:
            keep_share(self)
        if self.flows:
            lines.add(f"d_scores = {self.passed_on(self.plan.d_score, printer)}")
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
        # Otherwise dk is scaled once, at the end.
        self.scale_per_head = self.group > 1 and not self.apart and plan.scale is not None and reads(plan.scale, "h")

    def source(self) -> str:
        lines, spec = self.lines, self.plan.spec
        self.constants()
        self.key_tile()
        if self.group == 1:
            lines.add("h = g")
        self.begin()
        for x, parts, dim in (("k", self.q_parts, spec.dim), ("v", self.v_parts, spec.v_dim)):
            lines.add(self.base(x, "g"))
            self.load(x, parts, dim, "k", "g", bounded=True, pointer=True)
        lines.add(*(f"dk{part.suffix} = tl.zeros([{self.columns}, {part.size}], tl.float32)" for part in self.q_parts))
        lines.add(*(f"dv{part.suffix} = tl.zeros([{self.columns}, {part.size}], tl.float32)" for part in self.v_parts))
        self.seed()
        if not self.scale_per_head:
            self.scale(folded=False)
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
        self.scores("k{}", "tl.trans(q{})")
        self.probabilities(printer, masked, f"[{self.columns}, BLOCK_Q]", existing=True)
        left = "weights"
        if self.plan.spec.dropout:
            left = "left"
            lines.add("left = tl.where(keep, weights, 0.0)")
        for part in self.v_parts:
            value, acc = f"dout{part.suffix}", f"dv{part.suffix}"
            lines.add(f"{acc} = " + self.dot(f"{left}.to({value}.dtype)", value, acc))
        if not self.flows and not self.from_pairs:
            return
        if self.softmax:
            self.load_row("delta", "delta", "0.0")
        lines.add("d_weights = " + self.dots(self.v_parts, "v{}", "tl.trans(dout{})"))
        self.drop()
        self.logit_gradient(printer, masked, existing=True)
        self.learn(printer)
        if self.flows:
            scaled = " * scale" if self.scale_per_head else ""
            lines.add(f"d_scores = {self.passed_on(self.plan.d_score, printer)}{scaled}")
            for part in self.q_parts:
                value, acc = f"q{part.suffix}", f"dk{part.suffix}"
                lines.add(f"{acc} = " + self.dot(f"d_scores.to({value}.dtype)", value, acc))
