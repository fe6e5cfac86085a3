"""Query tiles of one row of all heads of a key head."""

from __future__ import annotations

from attndsl.codegen.lines import Lines
from attndsl.plan import Plan


def packed_tile(lines: Lines, plan: Plan, start: str) -> None:
    """Which row of which key head a program owns: `head`, `h` and `q_rows` say it of each row of its tile.

    start: the line that says where the call's first row stands.
    """
    spec, group = plan.spec, plan.spec.heads // plan.spec.kv_heads
    assert plan.tiling.block_q == 1
    lines.add(
        "",
        f"# One row of the {group} heads of a key head, which choose together.",
        f"b = tl.program_id(0) // rows // {spec.kv_heads}",
        f"g = tl.program_id(0) // rows % {spec.kv_heads}",
        "q_tile = rows - 1 - tl.program_id(0) % rows",
        start,
        "",
        "q_offset = tl.arange(0, BLOCK_Q)",
        "k_offset = tl.arange(0, BLOCK_K)",
        f"q_heads = g * {group} + tl.minimum(q_offset, {group - 1})",
        "h = q_heads[:, None]",
        f"head = b * {spec.heads} + q_heads",
        f"q_rows = tl.where(q_offset < {group}, q_tile, rows)",
        "q_pos = start + q_rows[:, None]",
    )
