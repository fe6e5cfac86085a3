"""The kernels that calls of a program run, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from attndsl.branches import Attended
from attndsl.chosen_entries import ranked
from attndsl.compose import compose
from attndsl.decode_pieces import decode_pieces
from attndsl.diagnostics import error
from attndsl.effort import remembered
from attndsl.observed import by_members
from attndsl.pieces import choose_pieces
from attndsl.program import Program
from attndsl.select_plan import why_not_fused


def kernel_names(program: Program, heads: int, kv_heads: int) -> tuple[str, ...]:
    """The kernels of a program: those of its views, selections and branches, those that combine and those that observe.

    A branch has `forward`, `dq` and `dkdv`, once more for each further piece of a part and each further part, and a
    `decode` for each part that is not over what data tells, and each piece in which one row is decoded; those of a
    named branch begin with its name. One that skips has a `left` for each part, and its gradients are those of the
    attention to the tiles that are left.
    """
    names = list(_before(program, heads, kv_heads))
    branches = {"": program} if program.plain else dict(compose(program).branches)
    for branch, own in branches.items():
        names += [f"{branch}.{x}" if branch else x for x in _of_branch(own, heads, kv_heads)]
    if combines(program):
        names += ["combine", "combine_gradients"]
    for each in (each for each in program.observations if not by_members(program, each)):
        parts = branches[each.branch if program.output is not None else ""].only.parts
        names += [f"{each.name}.observe{'' if n == 1 else f'_{n}'}" for n in range(1, len(parts) + 1)]
    return tuple(names)


def combines(program: Program) -> bool:
    """Whether a kernel combines its branches."""
    return program.output is not None and not isinstance(program.output, Attended)


def _before(program: Program, heads: int, kv_heads: int) -> Iterator[str]:
    if not program.plain:
        for n, _ in enumerate(compose(program).pooled, 1):
            yield "pool" if n == 1 else f"pool_{n}"
    for selection in program.selections:
        if not why_not_fused(*ranked(program, selection, (heads, kv_heads)), (heads, kv_heads)):
            yield f"{selection.name}.select"


def _of_branch(program: Program, heads: int, kv_heads: int) -> list[str]:
    pieces = _pieces(program, heads, kv_heads)
    of_call = ("forward",) if program.only.skip is None else ("forward", "left")
    counts = {of_call: pieces, ("dq", "dkdv"): pieces, ("decode",): _decoded(program, heads, kv_heads)}
    return [
        f"{name}_{n}" if n > 1 else name
        for names, count in counts.items()
        for n in range(1, count + 1)
        for name in names
    ]


@remembered(256)
def _pieces(program: Program, heads: int, kv_heads: int) -> int:
    """How many kernels one after another attend a branch."""
    parts = [program.with_branch(parts=(part,)) for part in program.only.parts]
    return sum(max(1, len(choose_pieces(part, (heads, kv_heads)).pieces)) if part.plain else 1 for part in parts)


def _decoded(program: Program, heads: int, kv_heads: int) -> int:
    """How many kernels a decode of one row has."""
    parts = program.only.parts
    if program.packed is not None and program.only.skip is not None:
        return 0
    views = [part.view for part in parts if part.view is not None]
    if any(view.runs is not None or view.packed is not None for view in views):
        return 0
    alone = (program.with_branch(parts=(part,)) for part in parts)
    return sum(max(1, len(decode_pieces(part, (heads, kv_heads), 1))) for part in alone)


def find_kernel(kernel: str, program: Program, heads: int, kv_heads: int) -> tuple[str, str, int]:
    """What a kernel is of (a branch, a selection, or nothing), its name there, and which piece it is of, from 0.
    `gradients` makes dq, dk and dv, which some programs have on Hopper.

    Raises `PatternError` (A531) unless the program has such a kernel.
    """
    names = kernel_names(program, heads, kv_heads)
    owner, _, name = kernel.rpartition(".")
    if kernel not in names and not (name == "gradients" and f"{kernel.removesuffix(name)}forward" in names):
        why = _why_not(program, owner, heads, kv_heads) if name == "select" else ""
        raise error("A531", why or f"there is no kernel {kernel!r}", help=f"one of {', '.join(names)}")
    if number := re.fullmatch(r"(forward|left|dq|dkdv|decode|pool|observe)_(\d+)", name):
        return owner, number[1], int(number[2]) - 1
    return owner, name, 0


def _why_not(program: Program, name: str, heads: int, kv_heads: int) -> str:
    for selection in program.selections:
        if selection.name == name:
            reason = why_not_fused(*ranked(program, selection, (heads, kv_heads)), (heads, kv_heads))
            return f"`{name}` is chosen by torch operators, since {reason}"
    return ""
