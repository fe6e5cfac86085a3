"""Kernel plans of two levels: those of one level over the same pairs, with a member of the keys for each tile.

A member has at least as many keys as the smallest tile and at most as many as the largest: then the softmax inside it
needs one tile and no second pass. What weighs the members of a row is an input of the branch's program.
"""

from __future__ import annotations

from dataclasses import replace

from attndsl.compose import of_one_level
from attndsl.plan import Backend, BackwardPlan, DType, ForwardPlan, Loads, Spec, Tiling, backward_plan, forward_plan
from attndsl.program import Binary, Const, Program, Read, Type, Var

# Pairs of a tile that registers hold, with head dimensions up to 64, 128 and 256.
_PAIRS = {64: 8192, 128: 4096, 256: 2048}
# The same without tensor cores, whose operands lie in registers too.
_PAIRS_32 = {64: 2048, 128: 1024, 256: 512}


def within_forward(program: Program, spec: Spec) -> ForwardPlan:
    """The forward kernel of a derived program of one part, which has two levels."""
    read, inner = _shares(program), of_one_level(program)
    plan = forward_plan(inner, spec, _tiling(program, spec))
    return replace(plan, shares=read)


def within_backward(program: Program, spec: Spec, uses_lse: bool) -> BackwardPlan:
    """The backward kernels of such a program."""
    read, inner = _shares(program), of_one_level(program)
    tiling = _tiling(program, spec, backward=True)
    plan = backward_plan(inner, spec, tiling, tiling, uses_lse)
    return replace(plan, shares=read)


def _shares(program: Program) -> Read:
    within = program.only.within
    assert within is not None and within.weights, "the branch's program names what weighs its members"
    member = Binary("//", Var("k"), Const(within.keys))
    return Read(within.weights, (Var("b"), Var("h"), Var("q"), member), Type.FLOAT)


def _tiling(program: Program, spec: Spec, backward: bool = False) -> Tiling:
    within = program.only.within
    assert within is not None
    if spec.backend is Backend.CPU:
        return Tiling(128, within.keys)
    width = next(size for size in _PAIRS if max(spec.dim, spec.v_dim) <= size)
    room = (_PAIRS_32 if spec.dtype is DType.FLOAT32 else _PAIRS)[width] // (2 if backward else 1)
    rows = max(16, min(128, room // within.keys))
    # Two large tiles of keys and values leave no room for more of them.
    deep = spec.loads is Loads.DESCRIPTOR or spec.dtype is not DType.FLOAT32
    stages = 2 if deep and within.keys * width <= 8192 else 1
    return Tiling(rows, within.keys, warps=8 if rows * within.keys > 4096 or width > 64 else 4, stages=stages)
