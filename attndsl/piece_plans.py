"""Kernel plans of programs in pieces: one plan a piece, all of one program."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from attndsl.linear import normalise
from attndsl.pieces import Piece, choose_pieces
from attndsl.plan import (
    Backend,
    BackwardPlan,
    ForwardPlan,
    Loads,
    Spec,
    Tiling,
    backward_plan,
    branch_scalars,
    closed_runs,
    forward_plan,
    shaped,
    slopes,
)  # fmt: skip
from attndsl.program import Program, Scalar
from attndsl.quasi_affine import condition
from attndsl.simplify import fold, specialise
from attndsl.tiles import Side, TileRuns


@functools.lru_cache(maxsize=1024)
def forward_plans(program: Program, spec: Spec, tiling: Tiling) -> tuple[ForwardPlan, ...]:
    """The forward kernels of a program's pieces, in the order in which they run; one where it stays whole."""
    choice = choose_pieces(program, (spec.heads, spec.kv_heads))
    if choice.plain:
        return (forward_plan(program, spec, tiling),)
    branch = branch_scalars(program, spec)
    return tuple(_piece_plan(program, piece, spec, tiling, branch, n) for n, piece in enumerate(choice.pieces))


def _piece_plan(
    program: Program, piece: Piece, spec: Spec, tiling: Tiling, branch: dict[str, Any], number: int
) -> ForwardPlan:
    spec, tiling = _spec_of(piece, spec), _tiling_of(piece, spec, tiling)
    if number:
        # What all pieces share enters with the first.
        branch = branch | {"sink": None}
    runs = closed_runs(piece.relation, program, spec, tiling, Side.QUERY, piece.layout)
    mask = piece_mask(piece, spec) if runs.partial else None
    return ForwardPlan(program, spec, tiling, runs, mask, **branch, layout=piece.layout, follows=number > 0)


def _tiling_of(piece: Piece, spec: Spec, tiling: Tiling) -> Tiling:
    """Addresses of single rows take registers: below Hopper, where operands do too, more warps share them."""
    older = spec.target.startswith("cuda:") and int(spec.target.partition(":")[2]) < 90
    spread = older and not piece.layout.plain and tiling.block_q >= 128 and tiling.warps < 8
    return replace(tiling, warps=8) if spread else tiling


def _spec_of(piece: Piece, spec: Spec) -> Spec:
    """A piece's tokens do not lie in a row, as hardware copies of tiles need."""
    return spec if piece.layout.plain else replace(spec, loads=Loads.POINTER)


@functools.lru_cache(maxsize=1024)
def backward_plans(
    program: Program, spec: Spec, tiling: Tiling, key_tiling: Tiling | None = None, uses_lse: bool = True
) -> tuple[BackwardPlan, ...]:
    """The backward kernels of a program's pieces, in the order in which they run; one plan where it stays whole."""
    choice = choose_pieces(program, (spec.heads, spec.kv_heads))
    if choice.plain:
        return (backward_plan(program, spec, tiling, key_tiling, uses_lse),)
    key_tiling, branch = key_tiling or tiling, branch_scalars(program, spec)
    return tuple(
        _backward_piece(program, piece, spec, (tiling, key_tiling), branch, uses_lse, number)
        for number, piece in enumerate(choice.pieces)
    )


def _backward_piece(
    program: Program, piece: Piece, spec: Spec, tilings: tuple[Tiling, Tiling], branch: dict[str, Any], uses_lse: bool,
    number: int,
) -> BackwardPlan:  # fmt: skip
    spec, (tiling, key_tiling) = _spec_of(piece, spec), tilings
    if number:
        branch = branch | {"sink": None}
    runs = closed_runs(piece.relation, program, spec, tiling, Side.QUERY, piece.layout)
    key_runs = TileRuns((), ())
    if spec.backend is not Backend.CPU:
        key_runs = closed_runs(piece.relation, program, spec, key_tiling, Side.KEY, piece.layout)
    mask = piece_mask(piece, spec) if runs.partial or key_runs.partial else None
    return BackwardPlan(
        program, spec, tiling, runs, mask, **branch, key_tiling=key_tiling, key_runs=key_runs,
        **slopes(program, branch), uses_lse=uses_lse, layout=piece.layout, follows=number > 0,
    )  # fmt: skip


def piece_mask(piece: Piece, spec: Spec) -> Scalar | None:
    """The condition for a pair of a visited tile of a piece, in the indices of its layout; None where it always holds.

    Conditions on data in it read the tokens.
    """
    relation, layout = piece.relation, piece.layout
    found = condition(relation.pairs, relation.context, relation.uniform | relation.atoms, layout)
    return shaped(specialise(fold(normalise(found)), spec.sizes))
