"""The forward pass on the CPU: blocked PyTorch, the rows of a tile over portions of their keys."""

from __future__ import annotations

import math

from attndsl.codegen.cpu import TileLoop
from attndsl.codegen.cpu_boxes import tile_loop
from attndsl.codegen.cpu_lists import ListLoop, goes_by_lists
from attndsl.plan import ForwardPlan
from attndsl.program import Var


def forward_source(plan: ForwardPlan) -> str:
    """Text of a Python file whose `attention_forward` writes `out` and `lse` (both preset by the caller)."""
    per_pair = (plan.score, plan.weights)
    loop = ListLoop(plan, per_pair) if goes_by_lists(plan) else tile_loop(plan, per_pair)
    loop.lines.add(
        '"""Attend q [batch, kv_heads, group, rows, D] to k, v [batch, kv_heads, keys, D].',
        "",
        "Writes out [batch, kv_heads, group, rows, Dv] and lse [batch, kv_heads, group, rows].",
        '"""',
    )
    attend(loop)
    signature = ", ".join(["q", "k", "v", "out", "lse", "scale", *loop.parameters()])
    return loop.file("attention_forward", signature, "forward, blocked PyTorch")


def attend(loop: TileLoop) -> None:
    """The body of a function that attends: the rows of a tile over portions of their keys."""
    plan, lines = loop.plan, loop.lines
    loop.prologue()
    softmax = plan.softmax
    if softmax:
        loop.helpers.add("exponential")
    with loop.tiles():
        lines.add(f"queries = {loop.rows('q')}.to(compute)")
        if plan.follows:
            lines.add("# What earlier pieces found, as one more key with their output for its value.")
            lines.add(f"acc = {loop.rows('out')}.to(compute).clone()")
            if softmax:
                lines.add(
                    f"found = {loop.rows('lse')}.to(compute)",
                    "row_max = found.clamp(min=-torch.finfo(compute).max)",
                    "row_sum = (found > -math.inf).to(compute)",
                )
            if plan.skip is not None:
                lines.add(
                    "# Tiles are skipped by what those of this part have shown.",
                    "part_max = torch.full(queries.shape[:-1], -torch.finfo(compute).max, dtype=compute)",
                )
        else:
            lines.add("acc = torch.zeros(*queries.shape[:-1], v.shape[-1], dtype=compute)")
        if softmax and not plan.follows:
            lines.add(
                "row_max = torch.full(queries.shape[:-1], -torch.finfo(compute).max, dtype=compute)",
                "row_sum = torch.zeros(queries.shape[:-1], dtype=compute)",
            )
        with loop.chunk() as printer:
            printer.names.known[Var("s")] = "scores"
            if plan.weights is not None:
                loop.helpers.add("spread")
                lines.add(f"weights = spread({printer.text(plan.weights)}, scores)")
                loop.mask("weights", "0.0")
            else:
                if plan.score is not None:
                    loop.helpers.add("spread")
                    lines.add(f"scores = spread({printer.text(plan.score)}, scores)")
                loop.mask("scores", "-math.inf")
                if plan.skip is not None:
                    so_far = "part_max" if plan.follows else "row_max"
                    lines.add(
                        f"# skip below {plan.skip}: no row has a score near its largest so far.",
                        f"quiet = ({loop.absent}(scores.amax(-1) - {so_far} < {math.log(plan.skip)!r})).all(-1)",
                    )
                    with lines.block("if quiet.all():"):
                        lines.add("continue")
                    lines.add("scores.masked_fill_(quiet[..., None, None], -math.inf)")
                    if plan.follows:
                        lines.add("part_max = torch.maximum(part_max, scores.amax(-1))")
                if plan.shares is not None:
                    loop.members()
                    lines.add("weights = inner * share")
            if softmax:
                # Products are nobody else's: in place, they need no further memory, whose pages cost more than the sum.
                below = "scores - new_max" if plan.score is not None else "scores.sub_(new_max"
                lines.add(
                    "new_max = torch.maximum(row_max, scores.amax(-1))",
                    f"weights = exponential({below}[..., None]{')' * (plan.score is None)})",
                    "decay = exponential(row_max - new_max)",
                    "row_sum = row_sum * decay + weights.sum(-1)",
                    "row_max = new_max",
                    "acc *= decay[..., None]",
                )
            loop.keep()
            loop.drop("weights")
            lines.add("acc += (weights.flatten(2, 3) @ values).unflatten(2, queries.shape[2:4])")
        loop.attended()
        if plan.sink is not None:
            lines.add(
                f"sink = ({loop.tensors.text(plan.sink)} + torch.zeros_like(acc[..., :1]))[..., 0]",
                "final_max = torch.maximum(row_max, sink)",
                "decay = exponential(row_max - final_max)",
                "row_sum = row_sum * decay + exponential(sink - final_max)",
                "row_max = final_max",
                "acc *= decay[..., None]",
            )
        if softmax:
            lines.add("acc /= torch.where(row_sum == 0, 1, row_sum)[..., None]")
            loop.put("lse", "torch.where(row_sum == 0, -math.inf, row_max + torch.log(row_sum))")
        loop.put("out", "acc")
