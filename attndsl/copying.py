"""Calls whose tokens are copied into the order of unsorted data (`permuting.py`), attended to there, and put back.

In that order the tokens of mixed documents lie in rows, which hardware copies, and the Hopper lowering with it, take:
a kernel that loads single rows from where they lie takes twice as long there (benchmarks/RESULTS.md). The copies are
worth some hundred keys a row. How many a row has the data says, on the device: kernels of both kinds are launched, and
those that the data does not choose (`Spec.many`) end at once.
"""

from __future__ import annotations

from dataclasses import replace

from attndsl.derive import derive
from attndsl.effort import remembered
from attndsl.permuting import PermutedPiece, eligible, permuted
from attndsl.plan import Loads, Spec
from attndsl.program import Program
from attndsl.targets import hopper_refusal

# Rows and keys of a call from which on this is so where the backend is left open: the launches of both kinds take the
# host 0.2 ms more. Those who ask for the Hopper lowering get it at any size.
LEAST_COPIED = 16384


@remembered(256)
def copied(program: Program, spec: Spec) -> PermutedPiece | None:
    """The program in the order of its data, where calls of a kind, if they have the tokens, are copied into that order:
    the Hopper lowering takes it. None for others."""
    if spec.target != "cuda:90" or spec.dropout or not program.plain:
        return None
    derived = derive(program)
    piece = permuted(derived, (spec.heads, spec.kv_heads)) if eligible(derived) else None
    if piece is None or piece.alike is None:
        return None
    return None if hopper_refusal(piece.program, in_order(spec)) else piece


def is_long(tokens: int) -> bool:
    """Whether calls of so many tokens that leave the backend open are attended to so."""
    return tokens >= LEAST_COPIED


def in_order(spec: Spec) -> Spec:
    """What plans of copied tokens are made for: positions count from 0, and no tiles are mapped."""
    spec = replace(spec, loads=Loads.DESCRIPTOR, even_start=False, maps=False, whole=False, all_rows=False)
    return replace(spec, many=True)


def in_place(spec: Spec) -> Spec:
    """What plans of the same calls are made for where tokens stay where they lie."""
    return replace(spec, many=False)
