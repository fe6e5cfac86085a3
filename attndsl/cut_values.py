"""The cuts of a call (`cuts.py`) as numpy arrays, for block graphs. Kernels get theirs from `runtime.cuts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.cuts import domain, known_cuts, reflexive
from attndsl.derivation import Cut
from attndsl.oracle import Evaluator
from attndsl.program import Axis, CallShape, InputDecl, Program, Scalar

Array = NDArray[Any]


def cut_values(
    program: Program, shape: CallShape, inputs: Mapping[str, Array], args: Mapping[str, int]
) -> dict[str, Array]:
    """The cuts that a program declares and whose inputs are given, by name."""
    known = known_cuts(program, inputs).inputs
    cuts = [(decl, decl.derivation) for decl in known if isinstance(decl.derivation, Cut)]
    if not cuts:
        # Without the positions of a call, which may be millions.
        return {}
    call = Evaluator.of_call(program, shape, inputs, args)
    return {decl.name: _cut(decl, cut, call) for decl, cut in cuts}


def _cut(decl: InputDecl, cut: Cut, call: Evaluator) -> Array:
    program, shape = call.program, call.shape
    own_first, own_end = domain(cut.own, cut.owner, program, shape)
    first, end = domain(cut.other, cut.cut, program, shape)
    axes = {dim.axis for dim in decl.dims}
    lead = (shape.batch if Axis.B in axes else 1, shape.heads if Axis.H in axes else 1)
    own, other = _along(cut.own, own_first, own_end, call, lead), _along(cut.other, first, end, call, lead)
    found = np.zeros(own.shape, np.int64)
    for at in np.ndindex(lead):
        found[at] = first + np.searchsorted(other[at], own[at], side="right" if cut.inclusive else "left")
    if reflexive(cut, program):
        position = np.arange(own_first, own_end)
        found = np.maximum(found, position + 1) if cut.inclusive else np.minimum(found, position)
    return found.reshape(
        [n for n, axis in zip(lead, (Axis.B, Axis.H), strict=True) if axis in axes]
        + ([own_end - own_first] if cut.owner else [])
    )


def _along(e: Scalar, first: int, end: int, call: Evaluator, lead: tuple[int, int]) -> Array:
    """Values at the positions of one side, int [batch or 1, heads or 1, positions]."""
    position = np.arange(first, end).reshape(1, 1, -1, 1)
    found = call.at(position, position, call.variables["Nq"], call.variables["Nk"]).scalar(e)
    return np.broadcast_to(found, (*lead, end - first, 1))[..., 0]
