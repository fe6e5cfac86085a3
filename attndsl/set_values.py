"""Values of integer sets: which points they hold, on numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import islpy as isl
import numpy as np
from numpy.typing import NDArray

from attndsl.effort import TooHard
from attndsl.isl_sets import integer

Array = NDArray[Any]

# Cells times constraints that are looked at: about 0.2 s.
MAX_CELLS = 1 << 26


def held(items: isl.Set, variables: Mapping[str, Array]) -> Array:
    """Which of the points at these values of its parameters and dimensions, by name, a set holds.

    Raises TooHard where that would take long, or where a part has quotients that no other number decides.
    """
    cells = np.broadcast_shapes(*(x.shape for x in variables.values()))
    # Only quotients that are functions of the rest are left.
    parts = items.compute_divs().get_basic_sets()
    if sum(part.n_constraint() for part in parts) * int(np.prod(cells)) > MAX_CELLS:
        raise TooHard
    return reduce(np.logical_or, (_holds(part, variables) for part in parts), np.zeros(cells, np.bool_))


def _holds(part: isl.BasicSet, variables: Mapping[str, Array]) -> Array:
    quotients: dict[int, Array] = {}
    found: Array = np.asarray(True)
    for constraint in part.get_constraints():
        bound = constraint.get_aff()
        value = _value(bound, variables, quotients)
        found = found & (value == 0 if constraint.is_equality() else value >= 0)
    return found


def _value(e: isl.Aff, variables: Mapping[str, Array], quotients: dict[int, Array]) -> Array:
    """An affine function, times its denominator. quotients: those that are known already, by their places."""
    scaled = e.scale_val(e.get_denominator_val())
    value: Array = np.asarray(integer(scaled.get_constant_val()))
    for kind in (isl.dim_type.param, isl.dim_type.in_, isl.dim_type.div):
        for i in range(scaled.dim(kind)):
            if not scaled.involves_dims(kind, i, 1):
                continue
            factor = integer(scaled.get_coefficient_val(kind, i))
            if kind != isl.dim_type.div:
                at = variables[scaled.get_dim_name(kind, i)]
            else:
                if i not in quotients:
                    quotient = scaled.get_div(i)
                    divisor = integer(quotient.get_denominator_val())
                    quotients[i] = _value(quotient, variables, quotients) // divisor
                at = quotients[i]
            value = value + factor * at
    return value
