"""What is observed of any classes of rows and members: what a selection by these probabilities would rank them by."""

from __future__ import annotations

from attndsl.observation import Observation
from attndsl.program import Const, Program, Where
from attndsl.selection import Forced, Normalise, Probs, Selection, Share, Top


def as_selection(of: Observation) -> Selection:
    """A selection whose members are ranked by what is observed."""
    return Selection(
        of.name, Top(Const(1)), of.keys, of.rows, Share.NONE, Where(Const(True)), None, Forced.COUNTED,
        Probs(of.branch, of.largest), Normalise.NONE, members=of.members, row_tiles=of.row_tiles, span=of.span,
    )  # fmt: skip


def by_members(program: Program, of: Observation) -> bool:
    """Whether what is observed is found strip by strip of rows, as a selection finds it: no kernel writes a number for
    each of the members, or data tells what the keys stand for."""
    told = any(part.view is not None and part.view.told for part in program.named(of.branch).parts)
    return program.packed is None and (told or not of.in_blocks)
