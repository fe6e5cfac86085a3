"""Kernel plans of two levels: those of one level over the same pairs, with a member of the keys for each tile.

A member has at most as many keys as the largest tile: then the softmax inside it needs one tile and no second pass.
Where they are no power of two, a tile has columns to spare. What weighs the members of a row is an input of the
branch's program. Those of decode are made in `decode.py`, of the same read and tiles.
"""

from __future__ import annotations

from dataclasses import replace

from attndsl.compose import of_one_level
from attndsl.plan import (
    Backend,
    BackwardPlan,
    ForwardPlan,
    Loads,
    Spec,
    Tiling,
    backward_plan,
    forward_plan,
)  # fmt: skip
from attndsl.program import Binary, Const, Program, Read, Type, Var
from attndsl.tile_sizes import backward_tilings, default_tiling

# Rows that a tile has at least.
_ROWS = 16


def within_forward(program: Program, spec: Spec) -> ForwardPlan:
    """The forward kernel of a derived program of one part, which has two levels."""
    read, inner, spec = shares_read(program), of_one_level(program), _loading(program, spec)
    plan = forward_plan(inner, spec, _fitted(default_tiling(spec), program, spec))
    return replace(plan, shares=read)


def within_backward(program: Program, spec: Spec, uses_lse: bool) -> BackwardPlan:
    """The backward kernels of such a program."""
    read, inner, spec = shares_read(program), of_one_level(program), _loading(program, spec)
    of_q, of_keys = (_fitted(tiling, program, spec) for tiling in backward_tilings(spec))
    # Beside its accumulators it holds a tile's probabilities twice: of as many rows they spill.
    of_keys = replace(of_keys, block_q=max(_ROWS, of_keys.block_q // 2))
    plan = backward_plan(inner, spec, of_q, of_keys, uses_lse)
    return replace(plan, shares=read)


def shares_read(program: Program) -> Read:
    """What a pair's member weighs in a program of two levels."""
    within = program.only.within
    assert within is not None and within.weights, "the branch's program names what weighs its members"
    member = Binary("//", Var("k"), Const(within.keys))
    return Read(within.weights, (Var("b"), Var("h"), Var("q"), member), Type.FLOAT)


def _fitted(tiling: Tiling, program: Program, spec: Spec) -> Tiling:
    """A tiling with a member's keys a tile, and as many rows as leave it about as many pairs."""
    within = program.only.within
    assert within is not None
    if spec.backend is Backend.CPU:
        return Tiling(128, within.keys)
    member = replace(tiling, block_k=within.keys)
    rows = max(_ROWS, min(128, tiling.block_q * tiling.block_k // member.columns))
    if within.keys <= tiling.block_k:
        return replace(member, block_q=rows)
    # A large tile of keys leaves no room for the next.
    return Tiling(rows, within.keys, warps=8, stages=1)


def _loading(program: Program, spec: Spec) -> Spec:
    """Hardware copies tiles of a power of two."""
    within = program.only.within
    assert within is not None
    whole = Tiling(_ROWS, within.keys).columns == within.keys
    return spec if whole else replace(spec, loads=Loads.POINTER)
