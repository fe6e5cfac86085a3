"""The backward kernels in portable Triton: dq over query tiles, dk and dv over key tiles.

Two kernels, each owning what it writes, so there are no atomics and two runs agree to the bit:

- `attention_dq` owns query tiles and loops over their key tiles. It also makes delta, the row sums of
  out * dout, which the other kernel reads, and the gradients of learnable inputs.
- `attention_dkdv` owns key tiles and loops over the query tiles that visit them: the transposed runs.

With s = scale q . k, logit x(s), p = exp(x - lse) and dp = dout . v: dx = p (dp - delta), ds = dx x'(s).
"""

from __future__ import annotations

from attndsl.plan import BackwardPlan, Loads
from attndsl.program import Scalar, Var
from attndsl.tiles import TileRuns

from attndsl.codegen.kernel import FULL, PARTIAL, KernelWriter, run_loop
from attndsl.codegen.scalars import Printer

DQ = "attention_dq"
DKDV = "attention_dkdv"


def dq_source(plan: BackwardPlan) -> str:
    """Text of a Python file whose `attention_dq` writes dq, delta and the learnable inputs' row sums."""
    return _Dq(plan).source()


def dkdv_source(plan: BackwardPlan) -> str:
    """Text of a Python file whose `attention_dkdv` writes dk and dv."""
    return _DkDv(plan).source()


class _Backward(KernelWriter):
    """What both kernels compute for a tile of pairs: probabilities, and the gradient of the scores."""

    plan: BackwardPlan

    def __init__(self, plan: BackwardPlan, function: str, tensors: str, along_q: str, along_k: str) -> None:
        super().__init__(plan, function, tensors)
        # How a vector over query rows, or over keys, lies in a tile of pairs.
        self.along_q, self.along_k = along_q, along_k
        self.softmax = plan.weights is None
        self.folded = self.softmax and plan.score is None

    def pairs(self, masked: bool) -> list[Scalar]:
        plan = self.plan
        found = (plan.mask if masked else None, plan.score, plan.weights, plan.d_score)
        return [e for e in found if e is not None]

    def loops(self, runs: TileRuns, tile: str) -> None:
        self.name_ends(runs)
        for found, label, comment in ((runs.full, "full", FULL), (runs.partial, "partial", PARTIAL)):
            if found:
                self.lines.add(f"# {comment}{self.origin}")
                with run_loop(self.lines, self.printer, found, label, tile):
                    self.tile(masked=label == "partial")

    def tile(self, masked: bool) -> None:
        raise NotImplementedError  # each kernel's own

    def probabilities(self, printer: Printer, masked: bool) -> None:
        """`weights` from `scores` = q . k; with a score expression `scores` is scaled, ready for its derivative."""
        plan, lines = self.plan, self.lines
        mask = printer.text(plan.mask) if masked and plan.mask is not None else ""
        if not self.folded:
            lines.add("scores = scores * scale")
            printer.names.known[Var("s")] = "scores"
        printer.share(lines, self.pairs(masked), "pair_")
        if plan.weights is not None:
            text = f"{printer.text(plan.weights)} + tl.zeros_like(scores)"
        elif plan.score is not None:
            text = f"tl.exp2(({printer.text(plan.score)}) * LOG2_E - lse{self.along_q})"
        else:
            text = f"tl.exp2(scores * factor - lse{self.along_q})"
        # Where a pair is not allowed its exponent may be anything.
        lines.add(f"weights = tl.where({mask}, {text}, 0.0)" if mask else f"weights = {text}")

    def score_gradient(self, printer: Printer, masked: bool) -> None:
        """`d_logits` from `weights` and `d_weights`, and `d_scores` from it."""
        plan, lines = self.plan, self.lines
        lines.add(
            f"d_logits = weights * (d_weights - delta{self.along_q})" if self.softmax else "d_logits = d_weights"
        )
        mask = printer.text(plan.mask) if masked and plan.mask is not None else ""
        if plan.d_score is not None:
            text = f"d_logits * ({printer.text(plan.d_score)})"
            # The derivative of a score that is not allowed may be anything too; and 0 times infinity is no number.
            condition = " & ".join(x for x in (f"({mask})" if mask else "", "(d_logits != 0.0)") if x)
            lines.add(f"d_scores = tl.where({condition}, {text}, 0.0)")
        elif mask and not self.softmax:
            lines.add(f"d_scores = tl.where({mask}, d_logits, 0.0)")
        else:
            lines.add("d_scores = d_logits")

    def dots(self, parts: tuple, a: str, b: str) -> str:  # type: ignore[type-arg]
        """A product over the head dimension, summed over its parts."""
        return " + ".join(self.dot(a.format(p.suffix), b.format(p.suffix)) for p in parts)


class _Dq(_Backward):
    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan, DQ, "q k v out dout dq", "[:, None]", "[None, :]")

    def source(self) -> str:
        plan, lines, spec = self.plan, self.lines, self.plan.spec
        self.constants()
        self.query_tile()
        for x, parts, dim in (("q", self.q_parts, spec.dim), ("dout", self.v_parts, spec.v_dim)):
            lines.add(self.base(x, "h"))
            self.load(x, parts, dim, "q", "h", bounded=True, pointer=True)
        if spec.loads is Loads.POINTER:
            lines.add(self.base("k", "g"), self.base("v", "g"))
        if self.softmax:
            self._delta()
        lines.add(*(f"acc{part.suffix} = tl.zeros([BLOCK_Q, {part.size}], tl.float32)" for part in self.q_parts))
        self.scale(self.folded)
        if self.folded and plan.scale is not None:
            lines.add(f"scale = {self.printer.text(plan.scale)}")
        self.printer.hoist(lines, self.pairs(masked=True), ("k", "s"), "row_")
        lines.add("")
        self.loops(plan.runs, "k_tile")
        lines.add("", *(f"acc{part.suffix} = acc{part.suffix} * scale" for part in self.q_parts), self.base("dq", "h"))
        self.store("dq", self.q_parts, spec.dim, "q", "acc")
        return self.file("gradient of q, portable Triton")

    def _delta(self) -> None:
        """Row sums of out * dout less the gradient of lse, kept for the other kernel too."""
        lines = self.lines
        lines.add(self.base("out", "h"))
        self.load("out", self.v_parts, self.plan.spec.v_dim, "q", "h", bounded=True, pointer=True)
        sums = (f"tl.sum(out{p.suffix}.to(tl.float32) * dout{p.suffix}.to(tl.float32), 1)" for p in self.v_parts)
        lines.add(
            f"delta = {' + '.join(sums)}",
            "row_at = head.to(tl.int64) * rows + q_rows",
            "delta -= tl.load(d_lse_ptr + row_at, mask=q_rows < rows, other=0.0)" if self.plan.uses_lse else "",
            "tl.store(delta_ptr + row_at, delta, mask=q_rows < rows)",
            "# Rows that see nothing have lse -inf: with +inf in its place their weights are 0.",
            "lse = tl.load(lse_ptr + row_at, mask=q_rows < rows, other=0.0) * LOG2_E",
            'lse = tl.where(lse == float("-inf"), float("inf"), lse)',
        )

    def tile(self, masked: bool) -> None:
        spec, lines = self.plan.spec, self.lines
        printer = self.printer.within(self.printer.names.inner())
        self.load("k", self.q_parts, spec.dim, "k", "g", bounded=masked)
        self.load("v", self.v_parts, spec.v_dim, "k", "g", bounded=masked)
        lines.add("scores = " + self.dots(self.q_parts, "q{}", "tl.trans(k{})"))
        if self.pairs(masked):
            lines.add("k_pos = k_tile * BLOCK_K + k_offset[None, :]")
        self.probabilities(printer, masked)
        lines.add("d_weights = " + self.dots(self.v_parts, "dout{}", "tl.trans(v{})"))
        self.score_gradient(printer, masked)
        for part in self.q_parts:
            key, acc = f"k{part.suffix}", f"acc{part.suffix}"
            lines.add(f"{acc} = " + self.dot(f"d_scores.to({key}.dtype)", key, acc))


class _DkDv(_Backward):
    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan, DKDV, "q k v dout dk dv", "[None, :]", "[:, None]")

    def source(self) -> str:
        plan, lines, spec = self.plan, self.lines, self.plan.spec
        group = spec.heads // spec.kv_heads
        self.constants()
        lines.add(
            "",
            "# Heads one after another; a head's first keys first: most rows see them.",
            "k_tiles = tl.cdiv(k_len, BLOCK_K)",
            "head = tl.program_id(0) // k_tiles",
            "k_tile = tl.program_id(0) % k_tiles",
            f"b = head // {spec.kv_heads}",
            f"g = head % {spec.kv_heads}",
            self.start,
            "",
            "q_offset = tl.arange(0, BLOCK_Q)",
            "k_offset = tl.arange(0, BLOCK_K)",
            "k_pos = k_tile * BLOCK_K + k_offset[:, None]",
        )
        for x, parts, dim in (("k", self.q_parts, spec.dim), ("v", self.v_parts, spec.v_dim)):
            lines.add(self.base(x, "g"))
            self.load(x, parts, dim, "k", "g", bounded=True, pointer=True)
        lines.add(*(f"dk{part.suffix} = tl.zeros([BLOCK_K, {part.size}], tl.float32)" for part in self.q_parts))
        lines.add(*(f"dv{part.suffix} = tl.zeros([BLOCK_K, {part.size}], tl.float32)" for part in self.v_parts))
        if group == 1:
            lines.add("h = g")
            self._head()
        else:
            lines.add("", "# The query heads that share these keys, one after another: their sum has one order.")
            with lines.block(f"for member in range({group}):"):
                lines.add(f"h = g * {group} + member")
                self._head()
        lines.add("", self.base("dk", "g"), self.base("dv", "g"))
        self.store("dk", self.q_parts, spec.dim, "k", "dk")
        self.store("dv", self.v_parts, spec.v_dim, "k", "dv")
        return self.file("gradients of k and v, portable Triton")

    def _head(self) -> None:
        plan, lines = self.plan, self.lines
        if plan.spec.loads is Loads.POINTER:
            lines.add(self.base("q", "h"), self.base("dout", "h"))
        lines.add(f"row_base = (b * {plan.spec.heads} + h).to(tl.int64) * rows")
        self.scale(self.folded)
        if self.folded and plan.scale is not None:
            lines.add(f"scale = {self.printer.text(plan.scale)}")
        self.printer.hoist(lines, self.pairs(masked=True), ("q", "s"), "column_")
        self.loops(plan.key_runs, "q_tile")

    def tile(self, masked: bool) -> None:
        spec, lines = self.plan.spec, self.lines
        printer = self.printer.within(self.printer.names.inner())
        # A query tile may reach past the last row whatever its kind: those rows are zero, and add nothing.
        self.load("q", self.q_parts, spec.dim, "q", "h", bounded=True)
        self.load("dout", self.v_parts, spec.v_dim, "q", "h", bounded=True)
        lines.add("q_rows = q_tile * BLOCK_Q + q_offset")
        if self.pairs(masked):
            lines.add("q_pos = start + q_rows[None, :]")
            if self.reads_rows:
                lines.add("q_index = tl.minimum(q_rows, rows - 1)[None, :]")
        if self.softmax:
            lines.add(
                "lse = tl.load(lse_ptr + row_base + q_rows, mask=q_rows < rows, other=0.0) * LOG2_E",
                'lse = tl.where(lse == float("-inf"), float("inf"), lse)',
                "delta = tl.load(delta_ptr + row_base + q_rows, mask=q_rows < rows, other=0.0)",
            )
        lines.add("scores = " + self.dots(self.q_parts, "k{}", "tl.trans(q{})"))
        self.probabilities(printer, masked)
        for part in self.v_parts:
            value, acc = f"dout{part.suffix}", f"dv{part.suffix}"
            lines.add(f"{acc} = " + self.dot(f"weights.to({value}.dtype)", value, acc))
        lines.add("d_weights = " + self.dots(self.v_parts, "v{}", "tl.trans(dout{})"))
        self.score_gradient(printer, masked)
        # dk = scale d_scores . q, the scale put on the small factor.
        lines.add("d_scores = d_scores * scale")
        for part in self.q_parts:
            value, acc = f"q{part.suffix}", f"dk{part.suffix}"
            lines.add(f"{acc} = " + self.dot(f"d_scores.to({value}.dtype)", value, acc))
