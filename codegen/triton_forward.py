"""The forward kernel in portable Triton."""

from __future__ import annotations

import math

from attndsl.codegen.kernel import KernelWriter
from attndsl.codegen.layer_text import tile_at
from attndsl.codegen.two_levels import attend_in_strips, member_softmax
from attndsl.codegen.votes import load_votes_lse
from attndsl.mask_cost import KEY
from attndsl.plan import ForwardPlan, Plan
from attndsl.program import Const, Scalar, Var, reads

KERNEL = "attention_forward"


def forward_source(plan: ForwardPlan) -> str:
    """Text of a Python file whose `attention_forward` is the plan's kernel."""
    if plan.gathered is not None:
        from attndsl.codegen import triton_gathered

        return triton_gathered.forward_source(plan)
    return ForwardWriter(plan, KERNEL, "q k v out").source()


class ForwardWriter(KernelWriter):
    """What kernels that attend have in common: a tile of k and v, the running softmax, and how a row ends."""

    def __init__(self, plan: Plan, function: str, tensors: str, ragged: bool = False) -> None:
        super().__init__(plan, function, tensors, ragged)
        self.softmax = plan.softmax
        # With no score expression the scale goes into the exponent: one multiply-add per pair.
        self.folded = self.softmax and plan.score is None and plan.positive_scale

    def source(self) -> str:
        self._prologue()
        self._loops()
        self._epilogue()
        return self.file("forward kernel, portable Triton")

    # ---------------------------------------------------------------------------------- prologue

    def _prologue(self) -> None:
        lines, spec = self.lines, self.plan.spec
        self.constants()
        self.query_tile()
        lines.add(self.base("q", "h"))
        self.load("q", self.q_parts, spec.dim, "q", "h", bounded=True, pointer=True)
        if not tile_at(self, "k"):
            lines.add(self.base("k", "g"), self.base("v", "g"))
        if self.plan.follows:
            self._take_up()
        else:
            self._nothing_seen()
        self.seed()
        self.scale(folded=self.folded)
        self._hoist()

    def _nothing_seen(self) -> None:
        """The state of rows that have seen nothing."""
        lines = self.lines
        for part in self.v_parts:
            lines.add(f"acc{part.suffix} = tl.zeros([BLOCK_Q, {part.size}], tl.float32)")
        if self.softmax:
            lines.add(
                "# Finite, so that rows that see nothing yet need no care: exp2(-inf - row_max) is 0.",
                "row_max = tl.full([BLOCK_Q], -1.0e38, tl.float32)",
                "row_sum = tl.zeros([BLOCK_Q], tl.float32)",
            )

    def _hoist(self) -> None:
        """Name what depends on the row alone."""
        plan = self.plan
        pairs = [e for e in (plan.mask, plan.score, plan.weights) if e is not None]
        self.printer.hoist(self.lines, pairs, (*KEY, "s"), "row_")
        if plan.votes is not None:
            load_votes_lse(self, plan.votes)
        self.lines.add("")

    def _take_up(self) -> None:
        """Start from what the pieces before this one found, as if it were one more key of each row."""
        plan, lines = self.plan, self.lines
        lines.add(
            "# What earlier pieces found, as one more key with their output for its value.", self.base("out", "h")
        )
        self.load("out", self.v_parts, plan.spec.v_dim, "q", "h", bounded=True, pointer=True)
        # What dropout left is made up for at the end, of all pieces at once.
        whole = " / keep_scale" if plan.spec.dropout else ""
        lines.add(*(f"acc{part.suffix} = out{part.suffix}.to(tl.float32){whole}" for part in self.v_parts))
        if self.softmax:
            found = 'tl.load(lse_ptr + head.to(tl.int64) * rows + q_rows, mask=q_rows < rows, other=float("-inf"))'
            lines.add(
                f"row_max = tl.maximum({found} * LOG2_E, -1.0e38)", "row_sum = tl.where(row_max == -1.0e38, 0.0, 1.0)"
            )
        if plan.skip is not None:
            lines.add(
                "# Tiles are skipped by what those of this part have shown.",
                "part_max = tl.full([BLOCK_Q], -1.0e38, tl.float32)",
            )

    # ------------------------------------------------------------------------------------- loops

    def _loops(self) -> None:
        plan, lines = self.plan, self.lines
        self.name_ends(plan.runs.full + plan.runs.partial)
        for masked in self.visit(plan.runs, plan.box_runs, "k_tile"):
            self._tile(masked)
        lines.add("")

    def _tile(self, masked: bool) -> None:
        """Load a tile of k and v, score it, and add it to the accumulators."""
        plan = self.plan
        if plan.tiling.strip:
            attend_in_strips(self, masked)
            return
        self.logits(masked)
        if plan.weights is None:
            if plan.skip is not None:
                self._skip(plan.skip, masked)
                return
            if plan.shares is None:
                self._softmax_step()
            else:
                member_softmax(self, "scores", 1, "[:, None]")
        self.add_values(masked)

    def logits(self, masked: bool) -> None:
        """`scores` of a tile's pairs as exponents of 2, or where nothing is normalised, their `weights`."""
        plan, lines = self.plan, self.lines
        printer = self.printer.within(self.printer.names.inner())
        self.tokens("k", bounded=masked)
        self.keep()
        self.load("k", self.q_parts, plan.spec.dim, "k", "g", bounded=masked or self.spare)
        lines.add("scores = " + " + ".join(self.dot(f"q{p.suffix}", f"tl.trans(k{p.suffix})") for p in self.q_parts))
        pairs = [e for e in (plan.mask if masked else None, plan.score, plan.weights) if e is not None]
        if pairs:
            self.positions("[None, :]", pairs)
        if not self.folded:
            lines.add("scores = scores * scale")
            printer.names.known[Var("s")] = "scores"
        printer.share(lines, pairs, "pair_")
        if plan.weights is not None:
            self._weigh(
                printer.text(plan.weights), plan.weights, printer.text(plan.mask) if masked and plan.mask else ""
            )
            return
        if plan.score is not None:
            # A score need not read its pair: added to zeros it has the tile's shape all the same.
            whole = "" if reads(plan.score, "s") else f" + tl.zeros([BLOCK_Q, {self.columns}], tl.float32)"
            lines.add(f"scores = ({printer.text(plan.score)}) * LOG2_E{whole}")
        elif not self.folded:
            lines.add("scores = scores * LOG2_E")
        if masked and plan.mask is not None:
            lines.add(f'scores = tl.where({printer.text(plan.mask)}, scores, float("-inf"))')

    def _gain(self, so_far: str) -> None:
        """`most`, the largest scores that rows have in a tile, and `gain`, how much these are above those so far."""
        self.lines.add(
            f"most = tl.max(scores, 1){' * factor' if self.folded else ''}",
            f'gain = tl.where(q_rows < rows, most - {so_far}, float("-inf"))',
        )

    def _skip(self, below: float, masked: bool) -> None:
        """Add the tile unless no row has a score near its largest so far."""
        self._gain("part_max" if self.plan.follows else "row_max")
        with self.lines.block(f"if {self._most('gain')} >= {math.log2(below)!r}:  # skip below {below}"):
            if self.plan.follows:
                self.lines.add("part_max = tl.maximum(part_max, most)")
            self._softmax_step("most")
            self.add_values(masked)

    def _most(self, x: str) -> str:
        """The largest of a vector over rows, which rows' largest scores made."""
        backend, _, arch = self.plan.spec.target.partition(":")
        if backend == "cuda" and int(arch) >= 100:
            # Triton finds no layout for what is reduced twice out of tensor memory: in another order it does.
            x = f"tl.reshape(tl.trans(tl.reshape({x}, [8, BLOCK_Q // 8])), [BLOCK_Q])"
        return f"tl.max({x}, 0)"

    def add_values(self, masked: bool, to: str = "acc") -> None:
        """Load the tile's values, and add them by their weights."""
        plan, lines = self.plan, self.lines
        if plan.spec.dropout:
            # The sum of a row's weights is that without dropout.
            lines.add("weights = tl.where(keep, weights, 0.0)")
        self.load("v", self.v_parts, plan.spec.v_dim, "k", "g", bounded=masked or self.spare)
        for part in self.v_parts:
            value = f"v{part.suffix}"
            acc = f"{to}{part.suffix}"
            lines.add(f"{acc} = " + self.dot(f"weights.to({value}.dtype)", value, acc))

    def _weigh(self, text: str, weights: Scalar, mask: str) -> None:
        if mask:
            text = f"tl.where({mask}, {text}, 0.0)"
        elif isinstance(weights, Const):
            text = f"tl.full([BLOCK_Q, BLOCK_K], {text}, tl.float32)"
        self.lines.add(f"weights = {text} + tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)")

    def _softmax_step(self, most: str = "") -> None:
        """most: the name of rows' largest scores, where they have one."""
        scaled = " * factor" if self.folded else ""
        self.lines.add(
            f"new_max = tl.maximum(row_max, {most or f'tl.max(scores, 1){scaled}'})",
            f"weights = tl.exp2(scores{scaled} - new_max[:, None])",
            "decay = tl.exp2(row_max - new_max)",
            "row_sum = row_sum * decay + tl.sum(weights, 1)",
            "row_max = new_max",
        )
        self._rescale("decay")

    def _rescale(self, factor: str) -> None:
        self.lines.add(*(f"acc{part.suffix} = acc{part.suffix} * {factor}[:, None]" for part in self.v_parts))

    # ---------------------------------------------------------------------------------- epilogue

    def _epilogue(self) -> None:
        plan, lines = self.plan, self.lines
        if plan.sink is not None:
            # Sinks are a value a row: rows are a vector here.
            packed = plan.tiling.pack > 1 and plan.spec.heads > plan.spec.kv_heads
            row = self.q_place
            lines.add(f"q_pos = start + {row}", f"q_index = tl.minimum({row}, rows - 1)", *["h = q_heads"] * packed)
            self._add_sink(plan.sink)
            lines.add(*["h = q_heads[:, None]"] * packed)
        if self.softmax:
            self._normalise()
            lines.add(
                "# Where nobody asks for lse there is no memory for it.",
                "asked = tl.where(lse_ptr.to(tl.int64) != 0, rows, 0)",
                'lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) / LOG2_E)',
                "tl.store(lse_ptr + head.to(tl.int64) * rows + q_rows, lse, mask=q_rows < asked)",
            )
        elif plan.spec.dropout:
            lines.add(*(f"acc{part.suffix} = acc{part.suffix} * keep_scale" for part in self.v_parts))
        if not plan.follows:
            lines.add(self.base("out", "h"))
        self.store("out", self.v_parts, plan.spec.v_dim, "q", "acc")

    def _add_sink(self, sink: Scalar, once: str = "") -> None:
        """`once`: the condition under which a program adds it, where several share a row."""
        self.lines.add(
            "# The sink: one more key in the denominator, with no value.",
            f"sink = ({self.fresh().text(sink)}) * LOG2_E + tl.zeros([BLOCK_Q], tl.float32)",
            *([f'sink = tl.where({once}, sink, float("-inf"))'] if once else []),
            "final_max = tl.maximum(row_max, sink)",
            "decay = tl.exp2(row_max - final_max)",
            "row_sum = row_sum * decay + tl.exp2(sink - final_max)",
            "row_max = final_max",
        )
        self._rescale("decay")

    def _normalise(self) -> None:
        whole = "keep_scale" if self.plan.spec.dropout else "1.0"
        self.lines.add(f"inverse = {whole} / tl.where(row_sum == 0.0, 1.0, row_sum)")
        self._rescale("inverse")
