"""Observations on the CPU: blocked PyTorch, the forward's loop once more, with the lse that it found."""

from __future__ import annotations

from attndsl.codegen.cpu import TileLoop
from attndsl.observing import ObservePlan
from attndsl.program import Var


def observe_source(plan: ObservePlan) -> str:
    """Text of a Python file whose `attention_observe` adds to `observed`, or keeps the largest (it begins as 0)."""
    loop, cells = TileLoop(plan, (plan.score,)), plan.cells
    loop.reads_values = False
    lines, largest = loop.lines, cells.largest
    what = "the largest probability" if largest else "the sum of the probabilities"
    lines.add(
        f'"""Find {what} of row classes and members, of q [batch, kv_heads, group, rows, D] and',
        "k [batch, kv_heads, keys, D] with lse [batch, kv_heads, group, rows].",
        "",
        "observed: [batch, kv_heads, group, row classes, members].",
        '"""',
    )
    loop.helpers |= {"cut", "observe"}
    loop.prologue()
    with loop.tiles():
        lines.add(
            "queries = q[at].to(compute)",
            "# With +inf in place of -inf the weights of rows that see nothing are 0.",
            "row_lse = torch.where(lse[at] == -math.inf, math.inf, lse[at].to(compute))[..., None]",
            "# Rows before the first token see nothing.",
            "existing = max(low, -start)",
        )
        with loop.chunk() as printer:
            printer.names.known[Var("s")] = "scores"
            if plan.score is not None:
                loop.helpers.add("spread")
                lines.add(f"scores = spread({printer.text(plan.score)}, scores)")
            loop.mask("scores", "-math.inf")
            loop.helpers.add("exponential")
            lines.add("weights = exponential(scores - row_lse)")
            match cells.rows:
                case None:
                    rows = "low, [(0, 1, existing, high)] if existing < high else []"
                case 1:
                    rows = "low, cut(existing, high, 1)"
                case size:
                    rows = f"start + low, cut(start + existing, start + high, {size})"
            lines.add(f"observe(observed[at_b, at_g, at_r], weights, {rows}, spans, {cells.keys}, {largest})")
    signature = ", ".join(["q", "k", "lse", "observed", "scale", *loop.parameters()])
    return loop.file("attention_observe", signature, "observation, blocked PyTorch")
