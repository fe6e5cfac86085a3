"""Which tiles `skip below` leaves, on the CPU: the forward's loop without its values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from attndsl.codegen.cpu import TileLoop
from attndsl.program import Scalar, Var
from attndsl.skipping import LeftPlan


def left_source(plan: LeftPlan) -> str:
    """Text of a Python file whose `attention_left` writes `left`, of those tiles that it visits."""
    loop = _DocumentTiles(plan, (plan.score,)) if plan.apart else TileLoop(plan, (plan.score,))
    loop.reads_values = False
    lines, below = loop.lines, plan.skip
    assert below is not None
    lines.add(
        '"""Find which tiles of q [batch, kv_heads, group, rows, D] and k [batch, kv_heads, keys, D] are left.',
        "",
        "left: bool [batch, kv_heads, group, row tiles, key tiles].",
        *(["of_tiles: int [batch, row tiles, 4], the rows of each, and the keys of their document."] * plan.apart),
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
            first = "(spans[0][0] - k_begin)" if plan.apart else "spans[0][0]"
            lines.add(
                "most = scores.amax(-1)",
                f"# skip below {below}: no row has a score near its largest so far.",
                f"quiet = (most - row_max < {math.log(below)!r}).all(-1)",
                f"left[at_b, at_g, at_r, q_tile, {first} // block_k] = ~quiet",
                "row_max = torch.maximum(row_max, most)",
            )
    signature = ", ".join(["q", "k", "left", "scale", *["of_tiles"] * plan.apart, *loop.parameters()])
    return loop.file("attention_left", signature, "tiles that are left, blocked PyTorch")


class _DocumentTiles(TileLoop):
    """Over the tiles of a packed call, each of the rows and the keys of one document."""

    def __init__(self, plan: LeftPlan, per_pair: tuple[Scalar | None, ...]) -> None:
        super().__init__(plan, per_pair)
        self.per_batch = True
        self.causal = plan.causal

    @contextmanager
    def _query_tiles(self) -> Iterator[None]:
        with self.lines.block("for q_tile, (low, high, k_begin, k_stop) in enumerate(of_tiles[b].tolist()):"):
            self.lines.add(
                "at = (at_b, at_g, at_r, slice(low, max(low, high)))",
                "q_pos = torch.arange(start + low, start + max(low, high)).view(-1, 1)",
            )
            yield

    def spans(self) -> None:
        stop = "min(k_stop, start + high)" if self.causal else "k_stop"
        self.lines.add(
            "# The keys of their document, where there are rows.",
            "full_spans = []",
            f"partial_spans = [(k_begin, {stop})] if low < high else []",
        )
