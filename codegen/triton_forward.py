"""The forward kernel in portable Triton."""

from __future__ import annotations

from attndsl.plan import DType, ForwardPlan, Loads, Part, head_parts
from attndsl.program import Binary, Const, Scalar, Var

from attndsl.codegen.header import header
from attndsl.codegen.kernel import Leaves, run_loop, scalar_parameters, used_parameters
from attndsl.codegen.lines import Lines
from attndsl.codegen.prelude_helpers import prelude
from attndsl.codegen.scalars import TRITON, Names, Printer

KERNEL = "attention_forward"


def forward_source(plan: ForwardPlan) -> str:
    """Text of a Python file whose `attention_forward` is the plan's kernel."""
    return _Forward(plan).source()


class _Forward:
    def __init__(self, plan: ForwardPlan) -> None:
        self.plan = plan
        self.lines = Lines(indent=1)
        self.printer = Printer(TRITON, Names(Leaves(plan)))
        self.q_parts = head_parts(plan.spec.dim)
        self.v_parts = head_parts(plan.spec.v_dim)
        self.softmax = plan.weights is None
        # With no score expression the scale goes into the exponent: one multiply-add per pair.
        self.folded = self.softmax and plan.score is None and plan.spec.scale_sign > 0

    def source(self) -> str:
        self._prologue()
        self._loops()
        self._epilogue()
        body = self.lines.text()
        out = Lines()
        with out.block(f"def {KERNEL}("):
            for name in used_parameters(self._candidates(), body):
                out.add(f"{name},")
        helpers = prelude("prelude.py", self.printer.helpers)
        return "".join(
            (
                header(self.plan, "forward kernel, portable Triton"),
                "import triton\nimport triton.language as tl\n\n\n",
                helpers + "\n\n\n" if helpers else "",
                "@triton.jit\n",
                out.text(),
                "):\n",
                body,
            )
        )

    def _candidates(self) -> list[str]:
        names = ["q_ptr", "k_ptr", "v_ptr"]
        names += [f"{x}_desc{part.suffix}" for x, parts in (("k", self.q_parts), ("v", self.v_parts)) for part in parts]
        names += ["out_ptr", "lse_ptr"]
        names += [f"stride_{x}{axis}" for x in "qkvo" for axis in "bhn"]
        return [*names, "scale", "rows", "k_len", *scalar_parameters(self.plan)]

    # ---------------------------------------------------------------------------------- prologue

    def _prologue(self) -> None:
        plan, lines = self.plan, self.lines
        spec, tiling = plan.spec, plan.tiling
        lines.add(
            f"BLOCK_Q: tl.constexpr = {tiling.block_q}",
            f"BLOCK_K: tl.constexpr = {tiling.block_k}",
            "LOG2_E: tl.constexpr = 1.4426950408889634",
            "",
            "# Heads one after another, so that programs in flight share keys; a head's last rows first: they are longest.",
            "q_tiles = tl.cdiv(rows, BLOCK_Q)",
            "head = tl.program_id(0) // q_tiles",
            "q_tile = q_tiles - 1 - tl.program_id(0) % q_tiles",
            f"b = head // {spec.heads}",
            f"h = head % {spec.heads}",
            f"g = h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "g = h",
            "start = 0" if plan.program.align_start else "start = k_len - rows",
            "q_first = start + q_tile * BLOCK_Q",
            "",
            "q_offset = tl.arange(0, BLOCK_Q)",
            "k_offset = tl.arange(0, BLOCK_K)",
            "q_rows = q_tile * BLOCK_Q + q_offset",
            "q_pos = start + q_rows[:, None]",
        )
        first = Binary("*", Const(tiling.block_q), Var("q_tile"))
        self.printer.names.known[first if plan.program.align_start else Binary("+", Var("start"), first)] = "q_first"
        lines.add("q_at = q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh")
        lines.add("q_at += (q_tile * BLOCK_Q).to(tl.int64) * stride_qn + q_offset[:, None] * stride_qn")
        for part in self.q_parts:
            dims = self._dims("d", part)
            mask = "(q_rows[:, None] < rows)" + self._inside(part, dims, spec.dim, " & ")
            lines.add(f"q{part.suffix} = tl.load(q_at + {dims}[None, :], mask={mask}, other=0.0)")
        if spec.loads is Loads.POINTER:
            for x in "kv":
                lines.add(f"{x}_at = {x}_ptr + b.to(tl.int64) * stride_{x}b + g.to(tl.int64) * stride_{x}h")
        for part in self.v_parts:
            lines.add(f"acc{part.suffix} = tl.zeros([BLOCK_Q, {part.size}], tl.float32)")
        if self.softmax:
            lines.add(
                "# Finite, so that rows that see nothing yet need no care: exp2(-inf - row_max) is 0.",
                "row_max = tl.full([BLOCK_Q], -1.0e38, tl.float32)",
                "row_sum = tl.zeros([BLOCK_Q], tl.float32)",
            )
        scale = "scale" if plan.scale is None else self.printer.text(plan.scale)
        if self.folded:
            lines.add(f"factor = {scale} * LOG2_E")
        elif plan.scale is not None:
            lines.add(f"scale = {scale}")
        self.printer.hoist(lines, self._per_pair(), ("k", "s"), "row_")
        lines.add("")

    def _per_pair(self) -> list[Scalar]:
        return [e for e in (self.plan.mask, self.plan.score, self.plan.weights) if e is not None]

    def _dims(self, name: str, part: Part) -> str:
        return f"({part.offset} + tl.arange(0, {part.size}))" if part.offset else f"tl.arange(0, {part.size})"

    def _inside(self, part: Part, dims: str, dim: int, joint: str) -> str:
        return f"{joint}({dims}[None, :] < {dim})" if part.padded else ""

    # ------------------------------------------------------------------------------------- loops

    def _loops(self) -> None:
        runs = self.plan.runs
        ends = [x for run in runs.full + runs.partial for x in (run.first, run.count)]
        if ends:
            self.printer.share(self.lines, ends, "tile_")
        where = self.plan.program.branch.span
        origin = f"  [{where}]" if where else ""
        if runs.full:
            self.lines.add(f"# Full tiles: every pair is allowed.{origin}")
            with run_loop(self.lines, self.printer, runs.full, "full", "k_tile"):
                self._tile(masked=False)
            self.lines.add("")
        if runs.partial:
            self.lines.add(f"# Partial tiles: pairs are masked.{origin}")
            with run_loop(self.lines, self.printer, runs.partial, "partial", "k_tile"):
                self._tile(masked=True)
            self.lines.add("")

    def _tile(self, masked: bool) -> None:
        """Load a tile of k and v, score it, and add it to the accumulators."""
        plan, lines = self.plan, self.lines
        printer = self.printer.within(self.printer.names.inner())
        self._load("k", self.q_parts, plan.spec.dim, masked)
        lines.add("scores = " + " + ".join(self._dot(f"q{p.suffix}", f"tl.trans(k{p.suffix})") for p in self.q_parts))
        pairs = [e for e in (plan.mask if masked else None, plan.score, plan.weights) if e is not None]
        if pairs:
            lines.add("k_pos = k_tile * BLOCK_K + k_offset[None, :]")
        if not self.folded:
            lines.add("scores = scores * scale")
            printer.names.known[Var("s")] = "scores"
        printer.share(lines, pairs, "pair_")
        if plan.weights is not None:
            self._weigh(printer, plan.weights, masked)
        else:
            if plan.score is not None:
                lines.add(f"scores = ({printer.text(plan.score)}) * LOG2_E")
            elif not self.folded:
                lines.add("scores = scores * LOG2_E")
            if masked and plan.mask is not None:
                printer.names.known.pop(Var("s"), None)
                lines.add(f'scores = tl.where({printer.text(plan.mask)}, scores, float("-inf"))')
            self._softmax_step()
        self._load("v", self.v_parts, plan.spec.v_dim, masked)
        for part in self.v_parts:
            value = f"v{part.suffix}"
            lines.add(f"acc{part.suffix} = " + self._dot(f"weights.to({value}.dtype)", value, f"acc{part.suffix}"))

    def _weigh(self, printer: Printer, weights: Scalar, masked: bool) -> None:
        text = printer.text(weights)
        mask = self.plan.mask if masked else None
        if mask is not None:
            text = f"tl.where({printer.text(mask)}, {text}, 0.0)"
        elif isinstance(weights, Const):
            text = f"tl.full([BLOCK_Q, BLOCK_K], {text}, tl.float32)"
        self.lines.add(f"weights = {text} + tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)")

    def _softmax_step(self) -> None:
        if self.folded:
            self.lines.add(
                "new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)",
                "weights = tl.exp2(scores * factor - new_max[:, None])",
            )
        else:
            self.lines.add(
                "new_max = tl.maximum(row_max, tl.max(scores, 1))",
                "weights = tl.exp2(scores - new_max[:, None])",
            )
        self.lines.add(
            "decay = tl.exp2(row_max - new_max)",
            "row_sum = row_sum * decay + tl.sum(weights, 1)",
            "row_max = new_max",
        )
        for part in self.v_parts:
            self.lines.add(f"acc{part.suffix} = acc{part.suffix} * decay[:, None]")

    def _load(self, x: str, parts: tuple[Part, ...], dim: int, masked: bool) -> None:
        if self.plan.spec.loads is Loads.DESCRIPTOR:
            for part in parts:
                at = f"[b, g, k_tile * BLOCK_K, {part.offset}]"
                self.lines.add(f"{x}{part.suffix} = {x}_desc{part.suffix}.load({at}).reshape(BLOCK_K, {part.size})")
            return
        rows = f"(k_tile * BLOCK_K).to(tl.int64) * stride_{x}n + k_offset[:, None] * stride_{x}n"
        self.lines.add(f"{x}_rows = {x}_at + {rows}")
        for part in parts:
            dims = self._dims("d", part)
            conds = []
            if masked:
                conds.append("(k_tile * BLOCK_K + k_offset[:, None] < k_len)")
            if part.padded:
                conds.append(f"({dims}[None, :] < {dim})")
            mask = f", mask={' & '.join(conds)}, other=0.0" if conds else ""
            self.lines.add(f"{x}{part.suffix} = tl.load({x}_rows + {dims}[None, :]{mask})")

    def _dot(self, a: str, b: str, acc: str = "") -> str:
        precision = ', input_precision="ieee"' if self.plan.spec.dtype is DType.FLOAT32 else ""
        return f"tl.dot({a}, {b}{', ' + acc if acc else ''}{precision})"

    # ---------------------------------------------------------------------------------- epilogue

    def _epilogue(self) -> None:
        plan, lines = self.plan, self.lines
        if plan.sink is not None:
            lines.add(
                "# The sink: one more key in the denominator, with no value.",
                f"sink = ({self.printer.text(plan.sink)}) * LOG2_E + tl.zeros([BLOCK_Q], tl.float32)",
                "final_max = tl.maximum(row_max, sink)",
                "decay = tl.exp2(row_max - final_max)",
                "row_sum = row_sum * decay + tl.exp2(sink - final_max)",
                "row_max = final_max",
            )
            lines.add(*(f"acc{part.suffix} = acc{part.suffix} * decay[:, None]" for part in self.v_parts))
        if self.softmax:
            lines.add("inverse = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)")
            lines.add(*(f"acc{part.suffix} = acc{part.suffix} * inverse[:, None]" for part in self.v_parts))
            lines.add(
                'lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) / LOG2_E)',
                "tl.store(lse_ptr + head.to(tl.int64) * rows + q_rows, lse, mask=q_rows < rows)",
            )
        lines.add("out_at = out_ptr + b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh")
        lines.add("out_at += (q_tile * BLOCK_Q).to(tl.int64) * stride_on + q_offset[:, None] * stride_on")
        for part in self.v_parts:
            dims = self._dims("d", part)
            mask = "(q_rows[:, None] < rows)" + self._inside(part, dims, plan.spec.v_dim, " & ")
            value = f"acc{part.suffix}.to(out_ptr.dtype.element_ty)"
            lines.add(f"tl.store(out_at + {dims}[None, :], {value}, mask={mask})")
