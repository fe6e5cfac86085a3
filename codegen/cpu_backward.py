"""The backward pass on the CPU: blocked PyTorch over the forward's loop, cost following the pattern's area.

Query tiles come one after another, so that what they add to the same keys is added in one order: two runs agree to
the bit. With s = scale q . k, logit x(s), p = exp(x - lse) and dp = dout . v: dx = p (dp - delta), where delta sums
out * dout over a row, less the gradient of its lse; ds = dx x'(s), and a learnable input gets dx times its derivative.
`weights w(s)` in place of the softmax has dw = dp and ds = dw w'(s).
"""

from __future__ import annotations

from attndsl.codegen.cpu import TensorLeaves
from attndsl.codegen.cpu_boxes import tile_loop
from attndsl.codegen.cpu_votes import hand_on
from attndsl.codegen.scalars import Level, Printer
from attndsl.plan import BackwardPlan
from attndsl.program import Const, Read, Scalar, Var


def backward_source(plan: BackwardPlan) -> str:
    """Text of a Python file whose `attention_backward` writes dq and adds to dk, dv and the gradients of inputs."""
    return _Backward(plan).source()


class _Backward:
    def __init__(self, plan: BackwardPlan) -> None:
        self.plan = plan
        others = (x for pair in plan.learnable for x in pair)
        self.loop = tile_loop(plan, (plan.score, plan.weights, plan.d_score, *others))
        self.lines = self.loop.lines
        self.softmax = plan.softmax
        # Weights that do not depend on the score: nothing flows to queries and keys.
        self.flows = plan.d_score != Const(0.0)

    def source(self) -> str:
        plan, lines, loop = self.plan, self.lines, self.loop
        lines.add(
            '"""Gradients of q [batch, kv_heads, group, rows, D], k and v [batch, kv_heads, keys, D], and inputs.',
            "",
            "dk, dv and the gradients of inputs are added to in their own dtype, "
            + ("and so is dq." if plan.follows else "dq is written."),
            '"""',
        )
        loop.prologue()
        with loop.tiles():
            lines.add("queries, d_out = q[at].to(compute), dout[at].to(compute)")
            if self.flows:
                lines.add("scaled = queries * scale", "dq_tile = torch.zeros_like(queries)")
            if plan.votes is not None:
                lines.add("dq_votes = torch.zeros_like(queries)")
            if self.softmax:
                self._rows()
            with loop.chunk() as printer:
                self._chunk(printer)
            sums = ["dq_tile * scale"] * self.flows + ["dq_votes"] * (plan.votes is not None)
            if sums:
                added = "+" if plan.follows else ""
                lines.add(f"dq[at] {added}= ({' + '.join(sums)}).to(dq.dtype)")
        names = ["q", "k", "v", "dout"]
        names += ["out", "lse"] * self.softmax + ["d_lse"] * (self.softmax and plan.uses_lse)
        names += ["dq", "dk", "dv", *(f"d_{decl.name}" for decl in plan.learnable_inputs), "scale"]
        return loop.file("attention_backward", ", ".join([*names, *loop.parameters()]), "backward, blocked PyTorch")

    def _rows(self) -> None:
        """`delta` and `row_lse` of a tile's rows, and what the sink passes on."""
        plan, lines = self.plan, self.lines
        lines.add("delta = (out[at].to(compute) * d_out).sum(-1)")
        if plan.uses_lse:
            lines.add("delta -= d_lse[at].to(compute)")
        lines.add(
            "# With +inf in place of -inf the weights of rows that see nothing are 0.",
            "row_lse = torch.where(lse[at] == -math.inf, math.inf, lse[at].to(compute))[..., None]",
        )
        if plan.sink_learnable and plan.sink is not None:
            printer = self.loop.tensors
            lines.add(f"d_sink = -torch.exp({printer.text(plan.sink, Level.SUM)} - row_lse) * delta[..., None]")
            for read, slope in plan.sink_learnable:
                self._learn(read, slope, "d_sink", printer)

    def _chunk(self, printer: Printer) -> None:
        plan, lines, loop = self.plan, self.lines, self.loop
        printer.names.known[Var("s")] = "scores"
        learned = [e for read, slope in plan.learnable for e in (*read.index, slope)]
        shared = [e for e in (plan.score, plan.weights, plan.d_score) if e is not None]
        printer.share(lines, shared + learned, "pair_")
        if plan.score is not None or plan.weights is not None:
            loop.helpers.add("spread")
        if plan.weights is not None:
            lines.add(f"weights = spread({printer.text(plan.weights)}, scores)")
            loop.mask("weights", "0.0")
        else:
            copied = f"spread({printer.text(plan.score)}, scores)" if plan.score is not None else "scores"
            lines.add(f"logits = {copied}")
            loop.mask("logits", "-math.inf")
            if plan.shares is None:
                loop.helpers.add("exponential")
                lines.add("weights = exponential(logits - row_lse)")
            else:
                lines.add("unscored, scores = scores, logits")
                loop.members()
                lines.add("weights, scores = inner * share, unscored")
        left = "weights"
        if plan.spec.dropout:
            left = "left"
            loop.keep()
            lines.add("left = weights")
            loop.drop("left")
        loop.scatter("dv", f"{left}.flatten(2, 3).mT @ d_out.flatten(2, 3)")
        if not self.flows and not plan.learnable and plan.shares is None:
            return
        lines.add("d_weights = (d_out.flatten(2, 3) @ values.mT).unflatten(2, d_out.shape[2:4])")
        loop.drop("d_weights")
        if self.softmax:
            lines.add("d_logits = weights * (d_weights - delta[..., None])")
        elif plan.shares is not None:
            loop.helpers.add("of_members")
            lines.add("d_inner = inner * d_weights", "d_logits = weights * (d_weights - of_members(d_inner, member))")
            if plan.shares.given is not None:
                self._learn(plan.shares.given, Const(1.0), "d_inner", printer)
            elif plan.votes is not None:
                lines.add("d_share = torch.zeros_like(given).index_add_(-1, member, d_inner)")
                self._learn(plan.votes.lse, Const(1.0), "-given * d_share", printer)
                hand_on(loop, plan.votes)
        else:
            lines.add("d_logits = d_weights")
            loop.mask("d_logits", "0.0")
        for read, slope in plan.learnable:
            self._learn(read, slope, "d_logits", printer)
        if self.flows:
            lines.add(
                f"d_scores = {self._times('d_logits', plan.d_score, printer)}",
                "dq_tile += (d_scores.flatten(2, 3) @ keys).unflatten(2, d_out.shape[2:4])",
            )
            loop.scatter("dk", "d_scores.flatten(2, 3).mT @ scaled.flatten(2, 3)")

    def _learn(self, read: Read, slope: Scalar, factor: str, printer: Printer) -> None:
        """Add to the gradient of an input, at the entry that was read."""
        dims = self.plan.program.input(read.input).dims
        at = TensorLeaves(self.plan).indices(read.index, dims, f"d_{read.input}", printer)
        value = self._times(factor, None if slope == Const(1.0) else slope, printer)
        self.lines.add(f"accumulate(d_{read.input}, [{at}], {value})")
        self.loop.helpers.add("accumulate")

    def _times(self, factor: str, slope: Scalar | None, printer: Printer) -> str:
        if slope is None:
            return factor
        self.loop.helpers.add("passed_on")
        return f"passed_on({factor}, {printer.text(slope)})"
