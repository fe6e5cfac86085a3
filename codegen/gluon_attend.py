"""The consumers of the forward kernel for Hopper: a warpgroup with half of a query tile's rows."""

from __future__ import annotations

from attndsl.codegen.gluon import IN_TILE, TILE_FIRST, by_place
from attndsl.codegen.gluon_tiles import Tiles
from attndsl.codegen.kernel_loops import Visits
from attndsl.codegen.scalars import Printer
from attndsl.plan import ForwardPlan, Part
from attndsl.program import Axis, Var, reads

# Of the exponent, base 2: weights reach 2**8, and their sums of a million keys 2**28.
GROWTH = 8.0


def scale_where_grown(size: int) -> str:
    """Text of a device function that scales a warp's accumulator of so many columns, unless all its factors are 1."""
    numbers = size // 2
    return f"""\
# Of {numbers} numbers a thread the first and the third are of its two rows. A warp of which no row grew skips the rest.
SCALE_{size} = gl.constexpr(
    "{{ .reg .pred grown, other; setp.neu.f32 grown, ${2 * numbers}, 0f3F800000;"
    " setp.neu.f32 other, ${2 * numbers + 2}, 0f3F800000; or.pred grown, grown, other;"
    " vote.sync.any.pred grown, grown, 0xffffffff; @!grown bra done;"
    + "".join(f" mul.f32 ${{i}}, ${{i}}, ${{i + {2 * numbers}}};" for i in range({numbers}))
    + " done: }}"
)
OPERANDS_{size} = gl.constexpr(",".join(["=f"] * {numbers} + [str(i) for i in range({numbers})] + ["f"] * {numbers}))


@gluon.jit
def scale_where_grown_{size}(acc, factors):
    factors = factors + gl.zeros_like(acc)
    return gl.inline_asm_elementwise(SCALE_{size}, OPERANDS_{size}, [acc, factors], gl.float32, True, {numbers})


"""


class Attend(Tiles):
    """The text of a consumer: in turn n the scores of tile n are multiplied, and beside them the values of tile n - 1;
    the softmax of the former runs beside the products of the latter."""

    warps = 4

    def __init__(self, plan: ForwardPlan, helpers: set[str]) -> None:
        super().__init__(plan, helpers)
        # With no score expression the scale goes into the exponent: one multiply-add per pair.
        self.folded = plan.softmax and plan.score is None and plan.positive_scale
        self.scaled = " * factor" if self.folded else ""
        # The largest weight of a row is 2**8 in float8: smaller ones are not rounded to nothing so soon.
        self.raised = " - 8.0" if self.fp8 else ""
        # What keys are counted by.
        self.count = "k" if self.combs["k"].every else "j"
        self.mask = None if plan.mask is None else by_place(plan.mask, self.count)

    def text(self) -> str:
        lines = self.lines
        self.constants()
        if self.plan.softmax:
            lines.add("LOG2_E: gl.constexpr = 1.4426950408889634")
        # Of 32 bytes a product takes so many numbers, of four bytes a register holds as many side by side.
        deep, wide = (32, 4) if self.fp8 else (16, 2)
        lines.add(
            "ROWS: gl.constexpr = BLOCK_Q // 2",
            f"SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, {deep}])",
        )
        for x in self.v_parts:
            lines.add(
                f"OUT{x.suffix}: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {x.size}, {deep}])",
                f"WEIGHTS{x.suffix}: gl.constexpr = gl.DotOperandLayout(0, OUT{x.suffix}, {wide})",
            )
        lines.add("dtype: gl.constexpr = q_desc.dtype")
        with self.query_tiles():
            self._attend()
        lines.add("tma.store_wait(0)")
        return lines.text()

    def _attend(self) -> None:
        """One query tile's rows."""
        lines, printer = self.lines, self.printer()
        partial, full = self.visits(printer)
        self._rows(printer)
        lines.add("visits = partial + full", "")
        self._first_tile(printer, partial, full)
        lines.add("")
        if span := self.plan.program.span:
            lines.add(f"# [{span}]")
        with lines.block("for n in range(1, visits):"):
            self._tile(printer, partial, full)
        last = self.stage(self.turn("visits - 1"))
        lines.add(
            "",
            "# The last tile's values. To the compiler its scores are not those that a turn begins with: else it",
            "# rounds the weights of both in one place, before either, where no products run beside.",
            'scores = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [scores], gl.float32, is_pure=True, pack=1)',
        )
        self._round_weights()
        self._add_values(last, "acc")
        lines.add(f"{self._accumulators} = warpgroup_mma_wait(0, deps=[{self._accumulators}])")
        if self.several:
            lines.add(f"mbarrier.arrive(v_free.index({last}), count=1)")
        self._finish()

    def _rows(self, printer: Printer) -> None:
        """Where the rows stand, and what depends on the row alone."""
        plan, lines = self.plan, self.lines
        own = "part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))"
        if self.combs["q"].every:
            lines.add(f"q_rows = {self.row} + {own}")
        else:
            lines.add(f"q_nth = i_first + {own}", f"q_rows = {self.token('q', 'q_nth')} - start")
            lines.add("i_pos = gl.expand_dims(q_nth, 1)")
        lines.add(
            "k_offset = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, SCORES)), 0)",
            "q_pos = gl.expand_dims(start + q_rows, 1)",
        )
        if any(d.axis is Axis.Q and d.block == 1 for decl in plan.inputs for d in decl.dims):
            lines.add("q_index = gl.expand_dims(gl.minimum(q_rows, rows - 1), 1)")
        scale = "scale" if plan.scale is None else printer.text(plan.scale)
        if self.fp8:
            of_q, of_k = "q_scale_ptr + h * stride_q_scale", "k_scale_ptr + g * stride_k_scale"
            lines.add(f"scales = gl.load({of_q}) * gl.load({of_k})")
            scale = f"({scale}) * scales"
        if self.folded:
            lines.add(f"factor = {scale} * LOG2_E")
            if self.fp8:
                # The largest product is the largest score, and a masked one stays -inf: 0 is as good as very little.
                lines.add('factor = gl.where(factor >= 0.0, gl.maximum(factor, 1.0e-30), float("nan"))')
        elif self.fp8:
            lines.add(f"logits_scale = {scale}")
        elif plan.scale is not None:
            lines.add(f"scale = {scale}")
        pairs = [e for e in (self.mask, plan.score, plan.weights) if e is not None]
        printer.hoist(lines, pairs, ("k", "j", "s", "in_tile", "tile_first"), "row_")

    # --------------------------------------------------------------------------------- the tiles

    @property
    def _accumulators(self) -> str:
        return ", ".join(f"acc{x.suffix}" for x in self.v_parts)

    def _multiply_keys(self, stage: str) -> None:
        """Begin the products of the rows with the keys of a stage."""
        for n, x in enumerate(self.q_parts):
            so_far = "scores, is_async=True" if n else "zeros, use_acc=False, is_async=True"
            self.lines.add(
                f"keys = k_smem{x.suffix}.index({stage}).reshape([BLOCK_K, {x.size}]).permute((1, 0))",
                f"scores = warpgroup_mma(q{x.suffix}, keys, {so_far})",
            )

    def _add_values(self, stage: str, name: str) -> None:
        """Begin to add the values of a stage by the weights of its tile, which gives the accumulators a new name."""
        for x in self.v_parts:
            # Products of float8 take both operands with what is summed over side by side: values come transposed.
            tile = f"[{x.size}, BLOCK_K]).permute((1, 0))" if self.fp8 else f"[BLOCK_K, {x.size}])"
            self.lines.add(
                f"values = v_smem{x.suffix}.index({stage}).reshape({tile}",
                f"{name}{x.suffix} = warpgroup_mma(weights{x.suffix}, values, acc{x.suffix}, is_async=True)",
            )

    def _round_weights(self) -> None:
        rounded = "in_order_of_values(scores.to(dtype))" if self.fp8 else "scores.to(dtype)"
        for x in self.v_parts:
            self.lines.add(f"weights{x.suffix} = gl.convert_layout({rounded}, WEIGHTS{x.suffix})")

    def _first_tile(self, printer: Printer, partial: Visits | None, full: Visits | None) -> None:
        lines, first, second = self.lines, self.turn("0"), self.turn("1")
        lines.add("# The first tile: scores alone. From then on a tile's scores go with the values of the tile before.")
        for x in self.q_parts:
            lines.add(f"q{x.suffix} = q_smem{x.suffix}.index({self.half('part')}).reshape([ROWS, {x.size}])")
        ready = "q_ready.index(nth % 2), (nth // 2) & 1" if self.several else "q_ready, 0"
        lines.add(
            "zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)",
            f"mbarrier.wait({ready})",
            f"mbarrier.wait(k_ready.index({self.stage(first)}), {self.phase(first)})",
        )
        self._multiply_keys(self.stage(first))
        if self.several:
            lines.add(
                "# What left of the query tile before is written by now: others' rows may take its place.",
                "tma.store_wait(0)",
                "mbarrier.arrive(q_free.index((nth + 1) % 2), count=1, pred=nth > 0)",
            )
        lines.add(
            "scores = warpgroup_mma_wait(0, deps=[scores])",
            f"mbarrier.arrive(k_free.index({self.stage(first)}), count=1)",
        )
        self._score(printer, partial, full, "0")
        if self.plan.softmax:
            self._first_softmax()
        elif not self.plan.follows:
            self._nothing_added()
        if self.plan.follows:
            self._take_up()
        lines.add(
            f"mbarrier.wait(v_ready.index({self.stage(first)}), {self.phase(first)})",
            f"mbarrier.wait(k_ready.index({self.stage(second)}), {self.phase(second)}, pred=visits > 1)",
        )

    def _first_softmax(self) -> None:
        lines = self.lines
        lines.add("# Finite, so that rows that see nothing yet need no care: exp2(-inf - row_max) is 0.")
        if not self.plan.follows:
            lines.add(
                f"row_max = gl.maximum(gl.max(scores, 1){self.scaled}{self.raised}, -1.0e38)",
                f"scores = gl.exp2(scores{self.scaled} - gl.expand_dims(row_max, 1))",
                "row_sum = gl.sum(scores, 1)",
            )
            self._nothing_added()
            return
        lines.add(
            "at = lse_ptr + head.to(gl.int64) * rows + q_rows",
            'found = gl.load(at, mask=q_rows < rows, other=float("-inf"))',
            "earlier_max = gl.maximum(found * LOG2_E, -1.0e38)",
            f"row_max = gl.maximum(earlier_max, gl.max(scores, 1){self.scaled}{self.raised})",
            f"scores = gl.exp2(scores{self.scaled} - gl.expand_dims(row_max, 1))",
            "decay = gl.exp2(earlier_max - row_max)",
            "row_sum = gl.where(earlier_max == -1.0e38, 0.0, decay) + gl.sum(scores, 1)",
        )

    def _nothing_added(self) -> None:
        for x in self.v_parts:
            self.lines.add(f"acc{x.suffix} = gl.zeros([ROWS, {x.size}], gl.float32, OUT{x.suffix})")

    def _take_up(self) -> None:
        """Start from what the pieces before this one found, as if it were one more key of each row."""
        lines = self.lines
        lines.add("# What earlier pieces found, as one more key with their output for its value.")
        for x in self.v_parts:
            inside = self._out_places(x, "rows")
            lines.add(f"acc{x.suffix} = gl.load(at, mask={inside}, other=0.0).to(gl.float32)")
        if self.plan.softmax:
            self._rescale("decay")

    def _out_places(self, x: Part, end: str) -> str:
        """The lines that say at which places of memory a part of the output lies, and the text of the condition for
        those of rows before an end."""
        out, every = f"OUT{x.suffix}", self.combs["q"].every
        channels = f"gl.arange(0, {x.size}, gl.SliceLayout(0, {out}))" + (f" + {x.offset}" if x.offset else "")
        own = f"part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, {out}))"
        rows = f"{self.row} + {own}" if every else f"{self.token('q', f'i_first + {own}')} - start"
        self.lines.add(
            f"out_rows = gl.expand_dims({rows}, 1)",
            f"channels = gl.expand_dims({channels}, 0)",
            "at = out_ptr + b.to(gl.int64) * stride_outb + h.to(gl.int64) * stride_outh",
            "at = at + out_rows.to(gl.int64) * stride_outn + channels",
        )
        return f"(out_rows < {end})" + (f" & (channels < {self.plan.spec.v_dim})" if x.padded else "")

    def _store_rows(self) -> None:
        """Write a query tile's rows one by one."""
        for x in self.v_parts:
            inside = self._out_places(x, "q_end")
            self.lines.add(f"gl.store(at, acc{x.suffix}.to(dtype), mask={inside})")

    def _tile(self, printer: Printer, partial: Visits | None, full: Visits | None) -> None:
        """A tile from the second on: its scores, and the values of the one before."""
        lines, softmax = self.lines, self.plan.softmax
        turn, after = self.turn("n"), self.turn("n + 1")
        lines.add(f"stage = {self.stage(turn)}", f"before = {self.stage(self.turn('n - 1'))}")
        self._round_weights()
        self._multiply_keys("stage")
        self._add_values("before", "next_acc")
        lines.add(f"scores = warpgroup_mma_wait({len(self.v_parts)}, deps=[scores])")
        self._score(printer, partial, full, "n")
        if softmax:
            lines.add(
                f"tile_max = gl.max(scores, 1){self.scaled}{self.raised}",
                f"new_max = {self._new_max}",
                f"scores = gl.exp2(scores{self.scaled} - gl.expand_dims(new_max, 1))",
                "decay = gl.exp2(row_max - new_max)",
                "row_sum = row_sum * decay + gl.sum(scores, 1)",
                "row_max = new_max",
            )
        lines.add(
            "# What the next turn multiplies is waited for here: nothing is moved across such a wait, so that",
            "# the softmax stays beside the products of values.",
            f"mbarrier.wait(v_ready.index(stage), {self.phase(turn)})",
            f"mbarrier.wait(k_ready.index({self.stage(after)}), {self.phase(after)}, pred=n + 1 < visits)",
            f"{self._accumulators} = warpgroup_mma_wait(0, deps=["
            + ", ".join(f"next_acc{x.suffix}" for x in self.v_parts)
            + "])",
            "mbarrier.arrive(v_free.index(before), count=1)",
            "mbarrier.arrive(k_free.index(stage), count=1)",
        )
        if softmax:
            for x in self.v_parts:
                acc = f"acc{x.suffix}"
                self.lines.add(f"{acc} = scale_where_grown_{x.size}({acc}, {self._of_rows('decay', x)})")

    @property
    def _new_max(self) -> str:
        """What a row's weights are relative to from a tile on: not its maximum before that has grown so far that they
        need it, so that accumulators are scaled in few tiles. Weights of float8 reach the largest that there is."""
        if self.fp8:
            return "gl.maximum(row_max, tile_max)"
        return f"gl.where(tile_max > row_max + {GROWTH}, tile_max, row_max)"

    def _of_rows(self, values: str, part: Part) -> str:
        """What rows have, one beside each of their output's columns."""
        return f"gl.expand_dims(gl.convert_layout({values}, gl.SliceLayout(1, OUT{part.suffix})), 1)"

    def _rescale(self, factor: str) -> None:
        for x in self.v_parts:
            acc = f"acc{x.suffix}"
            self.lines.add(f"{acc} = {acc} * {self._of_rows(factor, x)}")

    def _score(self, printer: Printer, partial: Visits | None, full: Visits | None, n: str) -> None:
        """`scores` = q . k of visited tile n made logits (times log2 e unless folded), masked in a partial tile; or
        made weights, where rows are not normalised."""
        plan, lines, printer = self.plan, self.lines, printer.within(printer.names.inner())
        if not self.folded:
            lines.add(f"scores = scores * {'logits_scale' if self.fp8 else 'scale'}")
            printer.names.known[Var("s")] = "scores"
        said = plan.score if plan.weights is None else plan.weights
        whole_tile = said is not None and reads(said, "k")
        if whole_tile:
            lines.add(f"k_first = {self.first_key(self.visited(partial, full, n))}", self._keys())
        if said is not None:
            printer.share(lines, [said], "pair_")
            whole = "" if reads(said, "s") else " + zeros"
            text = printer.text(said)
            lines.add(f"scores = ({text}) * LOG2_E{whole}" if plan.softmax else f"scores = {text}{whole}")
        elif not self.folded:
            lines.add("scores = scores * LOG2_E")
        hidden = 'float("-inf")' if plan.softmax else "0.0"
        if n == "0" and self.listed:
            lines.add(f"scores = gl.where(nothing, {hidden}, scores)")
        if self.mask is None:
            return
        with lines.block("if partial > 0:" if n == "0" else f"if {n} < partial:"):
            if not whole_tile:
                lines.add(f"k_first = {self.first_key(self.tile(partial, n))}")
                if reads(self.mask, "k"):
                    lines.add(self._keys())
            if reads(self.mask, "j"):
                lines.add("j_pos = k_first + k_offset")
            printer.names.known |= {IN_TILE: "k_offset", TILE_FIRST: "k_first"}
            printer.share(lines, [self.mask], "pair_")
            lines.add(f"scores = gl.where({printer.text(self.mask)}, scores, {hidden})")

    def _keys(self) -> str:
        """The line that says where the tile's keys stand."""
        return f"k_pos = {self.token('k', 'k_first + k_offset')}"

    # ----------------------------------------------------------------------------------- the end

    def _finish(self) -> None:
        """Normalise the rows, and send them and their lse."""
        plan, lines = self.plan, self.lines
        if plan.sink is not None:
            lines.add(
                "# The sink: one more key in the denominator, with no value.",
                "q_pos = start + q_rows",
                "q_index = gl.minimum(q_rows, rows - 1)",
                f"sink = ({self.printer().text(plan.sink)}) * LOG2_E + row_sum * 0.0",
                "final_max = gl.maximum(row_max, sink)",
                "decay = gl.exp2(row_max - final_max)",
                "row_sum = row_sum * decay + gl.exp2(sink - final_max)",
                "row_max = final_max",
            )
            self._rescale("decay")
        if plan.softmax:
            whole = "gl.load(v_scale_ptr + g * stride_v_scale)" if self.fp8 else "1.0"
            lines.add(f"inverse = {whole} / gl.where(row_sum == 0.0, 1.0, row_sum)")
            self._rescale("inverse")
        places = [f"{self.out_memory(n, x)}.index({self.half('part')})" for n, x in enumerate(self.v_parts)]
        if all(place.startswith("q") for place in places):
            lines.add("# The rows' own part of q's shared memory is free now: the output leaves through it.")
        dtype = f"out_desc{self.v_parts[0].suffix}.dtype" if self.fp8 else "dtype"
        for x, place in zip(self.v_parts, places, strict=True):
            lines.add(f"{place}.reshape([ROWS, {x.size}]).store(acc{x.suffix}.to({dtype}))")
        lines.add("fence_async_shared()", f"row = {self.row} + part * ROWS")
        at, end = self.at("q", "h", "row"), "q_end" if self.begun else "rows"
        copies = [
            f"tma.async_copy_shared_to_global(out_desc{x.suffix}, [{at}, {x.offset}], {place})"
            for x, place in zip(self.v_parts, places, strict=True)
        ]
        if self.begun:
            with lines.block("if (row + ROWS <= q_end) | (q_end == rows):"):
                lines.add(*copies)
            with lines.block("else:"):
                lines.add("# Rows after the last one are another tile's.")
                self._store_rows()
        else:
            lines.add(*copies)
        if plan.softmax:
            lines.add(
                "# Where nobody asks for lse there is no memory for it.",
                f"asked = (q_rows < {end}) & (lse_ptr.to(gl.int64) != 0)",
                'lse = gl.where(row_sum == 0.0, float("-inf"), (row_max + gl.log2(row_sum)) / LOG2_E)',
                "gl.store(lse_ptr + head.to(gl.int64) * rows + q_rows, lse, mask=asked)",
            )
