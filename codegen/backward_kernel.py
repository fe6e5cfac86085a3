"""What the backward kernels in portable Triton have in common: the probabilities of a tile of pairs, and the gradient
of their scores."""

from __future__ import annotations

from abc import ABC, abstractmethod

from attndsl.codegen.kernel import KernelWriter
from attndsl.codegen.layer_text import copies_rows, tile_at
from attndsl.codegen.leaves import Leaves
from attndsl.codegen.scalars import Level, Printer
from attndsl.codegen.two_levels import member_softmax
from attndsl.learned import Learned, Over
from attndsl.plan import BackwardPlan, Part
from attndsl.program import Axis, Const, Scalar, Var, reads


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
        kept = ["row_lse_ptr", "row_lse_desc", "delta_desc", "row_stride", "heavy"]
        kept += ["d_shares_ptr", "member_lse_ptr", "d_entries_ptr"]
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
        """`weights`, 0 for pairs that are not allowed; with `existing`, for rows that do not exist either. Of a strip,
        `logits`."""
        plan, lines = self.plan, self.lines
        printer.names.known[Var("s")] = "scores"
        printer.share(lines, self.pairs(masked), "pair_")
        allowed = self._allowed(printer, masked, existing and not self.folded)
        logit = plan.score if plan.weights is None else plan.weights
        whole = "" if logit is None or reads(logit, "s") else f" + tl.zeros({shape}, tl.float32)"
        if plan.shares is not None:
            text = "scores * LOG2_E" if plan.score is None else f"({printer.text(plan.score)}) * LOG2_E{whole}"
            lines.add(f'logits = tl.where({allowed}, {text}, float("-inf"))' if allowed else f"logits = {text}")
            if not plan.tiling.strip:
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
                *([] if self.plan.tiling.strip else [f"d_share = tl.sum(inner * d_weights, {self.keys_axis})"]),
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
