"""Decode plans of patterns that scatter: a kernel a piece of the pattern, each in an order in which it is dense.

Of a dilated pattern one row allows one key of so many, wherever tiles are. Its pieces (`pieces.py`) count the tokens of
one remainder alone; a row is of one remainder, so its program visits tiles of the keys that it allows, and what a step
costs follows the area of the row. The slices of all pieces are merged like those of parts of a softmax.
"""

from __future__ import annotations

from dataclasses import replace

from attndsl.cuts import with_cuts
from attndsl.decode import Cache, DecodePlan, decode_plan, heads_of_tile, in_one_loop
from attndsl.derive import derive
from attndsl.effort import remembered
from attndsl.piece_plans import piece_mask
from attndsl.pieces import Piece, choose_pieces
from attndsl.plan import Spec, Tiling, branch_scalars
from attndsl.program import Program, Var, reads, substitute
from attndsl.runs import Run, Side, TileRuns
from attndsl.visits import closed_runs


@remembered(256)
def decode_pieces(program: Program, heads: tuple[int, int], rows: int) -> tuple[Piece, ...]:
    """The pieces in which a program of one part is decoded for (H, G) heads, none where it stays whole.

    Rows with remainders of their own have programs of their own: as long as together they load fewer keys than one
    that goes over all. What differs from head to head, and what data decides, stays whole.
    """
    part = program.only
    if not program.plain or part.skip is not None or part.within is not None or program.align_start:
        return ()
    made = with_cuts(derive(program))
    found = choose_pieces(program, heads).pieces
    pieces = tuple(x for x in found if isinstance(x, Piece))
    if len(pieces) < len(found) or any(decl.derivation is not None for decl in made.inputs):
        return ()
    apart = [x.layout for x in pieces if not x.layout.plain]
    if not apart or any(2 * rows * x.k.width > x.k.period for x in apart):
        return ()
    if any(x.q.width > x.q.step or x.q.step * x.classes != x.q.period for x in apart if not x.q.every):
        return ()
    asked = (e for x in pieces for e in (*x.relation.uniform.values(), *x.relation.atoms.values()))
    return () if any(reads(e, "h") for e in asked) else pieces


def decode_plans(program: Program, spec: Spec, rows: int, cache: Cache, split: bool) -> tuple[DecodePlan, ...]:
    """The decode kernels of a program of one part, in order; one where it stays whole, or on the CPU."""
    pieces = decode_pieces(program, (spec.heads, spec.kv_heads), rows) if spec.target != "cpu" else ()
    if not pieces:
        return (decode_plan(program, spec, rows, cache, split),)
    return tuple(replace(piece_plan(program, spec, rows, cache, n), split=split) for n in range(len(pieces)))


@remembered(1024)
def piece_plan(
    program: Program, spec: Spec, rows: int, cache: Cache, number: int, tiling: Tiling | None = None
) -> DecodePlan:
    """The decode kernel of a piece. Parameters as in `decode_plan`; what all pieces share enters with the first."""
    whole = decode_plan(program, spec, rows, cache, tiling=tiling)
    piece = decode_pieces(program, (spec.heads, spec.kv_heads), rows)[number]
    program, layout, of_rows, pack = whole.program, piece.layout, whole.tiling, whole.pack
    alone = not layout.q.every
    if alone:
        # A tile has one row, whichever of the call's it is, and its index among the tokens of its remainder.
        of_rows, pack = replace(of_rows, block_q=1), heads_of_tile(spec, 1)
    runs = closed_runs(piece.relation, program, spec, of_rows, Side.QUERY, layout, absolute=alone)
    mask = piece_mask(piece, spec) if runs.partial else None
    if alone:
        runs = TileRuns(*(tuple(map(_of_index, found)) for found in (runs.full, runs.partial)))
    branch = branch_scalars(program, spec) | ({"sink": None} if number else {})
    return DecodePlan(
        program, spec, of_rows, in_one_loop(runs, of_rows.block_q * pack), mask, **branch, layout=layout, cache=cache,
        pack=pack, split=True,
    )  # fmt: skip


def _of_index(run: Run) -> Run:
    """A run of tiles of one row in terms of the row's index."""
    first, count = (substitute(e, {"q_tile": Var("i_start")}) for e in (run.first, run.count))
    return replace(run, first=first, count=count)
