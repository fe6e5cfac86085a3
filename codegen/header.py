"""The comment at the head of a generated file: what it was generated from."""

from __future__ import annotations

from attndsl.plan import Plan
from attndsl.program import Program


def header(plan: Plan, title: str) -> str:
    spec, tiling = plan.spec, plan.tiling
    runs, of = (plan.box_runs, " of boxes") if plan.box_runs.ends else (plan.runs, "")
    found = f"{len(runs.full)} full and {len(runs.partial)} partial"
    lines = [
        f"heads {spec.heads}, key heads {spec.kv_heads}, head dimension {spec.dim} (values {spec.v_dim}), "
        f"{spec.dtype.value}, {spec.target}",
        f"query tiles {tiling.block_q}, key tiles {tiling.block_k}, {tiling.warps} warps, {tiling.stages} stages, "
        + ("the tiles of chosen members" if plan.gathered else f"{found} runs{of}"),
    ]
    if plan.view is not None:
        lines.append(f"keys are the entries of a view: one of {plan.view.size} tokens every {plan.view.stride}")
    if plan.shares is not None:
        lines.append("two levels: a key tile is a member, with a softmax of its own, and rows weigh members")
    if plan.follows or not plan.layout.plain:
        lines.append(f"{plan.layout}{', adding to what earlier pieces found' if plan.follows else ''}")
    return program_lines(plan.program, title, *lines)


def program_lines(program: Program, title: str, *more: str) -> str:
    """The program's text under a title, and further lines."""
    lines = [f"attndsl: {program.name}, {title}", ""]
    if program.source is not None:
        lines += [f"    {line}".rstrip() for line in program.source.text.strip().splitlines()] + [""]
    return "\n".join(f"# {line}".rstrip() for line in [*lines, *more]) + "\n\n"
