"""What questions are asked of: a program's parts, by name.

A part is a pattern over raw tokens or over the entries of a view. A program's only part needs no name; those of several
branches have the branches', and of several parts in one branch each its number: `near`, `far.1`, `far.2`, or `1`, `2`.
"""

from __future__ import annotations

from attndsl.compose import compose, of_one_level
from attndsl.diagnostics import error
from attndsl.program import Program


def parts_of(program: Program) -> dict[str, Program]:
    """Each part as a program of its own, by name. Views and plans are its inputs."""
    if program.plain:
        return {"": program}
    found = {}
    for branch, own in compose(program).branches:
        written = own.only.parts
        for n, part in enumerate(written, 1):
            name = ".".join([branch] * bool(branch) + [str(n)] * (len(written) > 1))
            found[name] = of_one_level(own.with_branch(parts=(part,)))
    return found


def part_of(program: Program, name: str | None) -> Program:
    """The part of this name; None: the only one. Raises `PatternError` (A535) where there is none, or several."""
    found = parts_of(program)
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    names = ", ".join(f"`{x}`" for x in found)
    if name is None:
        raise error("A535", f"this attention has several parts: {names}", program.span, help="say which: part=…")
    if name not in found:
        help = f"one of {names}" if len(found) > 1 else "leave it out: there is one part"
        raise error("A535", f"there is no part {name!r}", program.span, help=help)
    return found[name]
