"""Plans: how what a selection chooses stands in a program, as an input that a call makes or is given."""

from __future__ import annotations

from attndsl.derivation import Random
from attndsl.pairs import nodes
from attndsl.program import Scalar, reads, scalars
from attndsl.selection import Selection, Share, Top


def plan_heads(selection: Selection) -> Share:
    """Which heads have one plan: those that share, unless what is allowed, or how many are chosen, reads the head."""
    sets = [selection.among] if selection.always is None else [selection.among, selection.always]
    written: list[Scalar] = [e for each in sets for e in scalars(each)]
    if isinstance(selection.rule, Top) and selection.rule.count is not None:
        written.append(selection.rule.count)
    finer = {Share.NONE: (), Share.GROUP: ("h",), Share.HEADS: ("h", "g")}[selection.share]
    drawn = any(isinstance(node, Random) for each in sets for node in nodes(each))
    return Share.NONE if drawn or any(reads(e, *finer) for e in written) else selection.share
