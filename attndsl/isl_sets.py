"""Small operations on isl sets that isl spells at length."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeVar

import islpy as isl

_Result = TypeVar("_Result")


def fold(items: list[_Result], combine: Callable[[_Result, _Result], _Result]) -> _Result:
    return reduce(combine, items)


def choose(chosen: isl.Set, then: isl.Set, other: isl.Set) -> isl.Set:
    return chosen.intersect(then).union(chosen.complement().intersect(other))


def project_param(pairs: isl.Set, name: str) -> isl.Set:
    position = pairs.find_dim_by_name(isl.dim_type.param, name)
    return pairs.project_out(isl.dim_type.param, position, 1) if position >= 0 else pairs


def rename_param(pairs: isl.Set, old: str, new: str) -> isl.Set:
    position = pairs.find_dim_by_name(isl.dim_type.param, old)
    return pairs.set_dim_name(isl.dim_type.param, position, new) if position >= 0 else pairs
