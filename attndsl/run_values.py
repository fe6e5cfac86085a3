"""How many runs a call's inputs have, as numpy arrays, for block graphs. Kernels get theirs from `runtime.runs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.derivation import RunCount
from attndsl.program import CallShape, Program

Array = NDArray[Any]


def run_counts(program: Program, shape: CallShape, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The counts that a program declares and whose inputs are given, by name."""
    found = {}
    for decl in program.inputs:
        if isinstance(decl.derivation, RunCount) and decl.derivation.input in inputs:
            ids = np.asarray(inputs[decl.derivation.input])
            ids = np.broadcast_to(ids, (*ids.shape[:-1], shape.k_len))
            found[decl.name] = (ids[..., 1:] != ids[..., :-1]).sum(-1, keepdims=True) + (shape.k_len > 0)
    return found
