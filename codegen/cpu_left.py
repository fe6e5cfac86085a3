"""Which tiles `skip below` leaves, on the CPU: the forward's loop without its values."""

from __future__ import annotations

import math

from attndsl.codegen.cpu import TileLoop
from attndsl.plan import ForwardPlan
from attndsl.program import Var


def left_source(plan: ForwardPlan) -> str:
    """Text of a Python file whose `attention_left` writes `left`, of those tiles that it visits."""
    loop = TileLoop(plan, (plan.score,))
    loop.reads_values = False
    lines, below = loop.lines, plan.skip
    assert below is not None
    lines.add(
        '"""Find which tiles of q [batch, kv_heads, group, rows, D] and k [batch, kv_heads, keys, D] are left.',
        "",
        "left: bool [batch, kv_heads, group, row tiles, key tiles].",
        '"""',
    )
    loop.prologue()
    with loop.tiles():
        lines.add(
            "queries = q[at].to(compute)",
            "row_max = torch.full(queries.shape[:-1], -torch.finfo(compute).max, dtype=compute)",
        )
        with loop.chunk() as printer:
            printer.names.known[Var("s")] = "scores"
            if plan.score is not None:
                loop.helpers.add("spread")
                lines.add(f"scores = spread({printer.text(plan.score)}, scores)")
            loop.mask("scores", "-math.inf")
            lines.add(
                "most = scores.amax(-1)",
                f"# skip below {below}: no row has a score near its largest so far.",
                f"quiet = (most - row_max < {math.log(below)!r}).all(-1)",
                "left[at_b, at_g, at_r, q_tile, spans[0][0] // block_k] = ~quiet",
                "row_max = torch.maximum(row_max, most)",
            )
    signature = ", ".join(["q", "k", "left", "scale", *loop.parameters()])
    return loop.file("attention_left", signature, "tiles that are left, blocked PyTorch")
