"""The oracle of views: how keys that stand for several tokens lie in members, and which query each row has."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def shares_of(first: int, members: int, size: int, stride: int, k_len: int) -> Array:
    """The share of its present tokens that each key, standing for [j * stride, j * stride + size), has among the
    `members` tokens from `first` on: float64 [keys]."""
    tokens = np.arange(k_len)
    extents = (tokens[j : j + size] for j in range(0, k_len, stride))
    return np.asarray([((x >= first) & (x < first + members)).mean() for x in extents], np.float64)
