"""The oracle of views: how keys that stand for several tokens lie in members, and which of them rows see."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from attndsl.diagnostics import error

Array: TypeAlias = npt.NDArray[Any]
# Pairs that are asked at once whether they are in a pattern, and past the last token at most.
_AT_ONCE, _AT_MOST = 1 << 22, 1 << 30


def shares_of(first: int, members: int, size: int, stride: int, k_len: int) -> Array:
    """The share of its present tokens that each key, standing for [j * stride, j * stride + size), has among the
    `members` tokens from `first` on: float64 [keys]."""
    tokens = np.arange(k_len)
    extents = (tokens[j : j + size] for j in range(0, k_len, stride))
    return np.asarray([((x >= first) & (x < first + members)).mean() for x in extents], np.float64)


def seen_extents(
    inside: Callable[[int, int], Array], full: tuple[int, ...], size: int, stride: int, k_len: int, every: bool
) -> npt.NDArray[np.bool_]:
    """Which extents [j * stride, j * stride + size) each row sees, of k_len tokens: bool of the sizes `full`, the last
    of them extents. inside: whether the pairs of rows and the tokens from one to before another are in the pattern.

    every: for all tokens of the extent, present or not; else for some that is present. Tokens are asked some after the
    others, until no extent is left that a row may see.

    Raises `PatternError` (A536) where that would go on for too long.
    """
    reach = (full[-1] - 1) * stride + size
    reach = reach if every else min(reach, k_len)
    pairs, low, found = prod(full[:-1]), 0, np.full(full, every)
    seen: Array
    while low < reach and (low < k_len or found.any()):
        if (low - k_len) * pairs > _AT_MOST:
            what = f"which rows see entries of {size:,} tokens is asked of each token, past the last ones too"
            raise error("A536", what, help="ask it of smaller entries, or of fewer rows")
        high = min(low + max(1, _AT_ONCE // pairs), reach)
        at = inside(low, high)
        if at.ndim == 0 or at.shape[-1] == 1:
            # It asks of no token: so the rest of an extent is as this.
            at, high = at[..., None] if at.ndim == 0 else at, reach
        whole: Array = np.broadcast_to(np.asarray(at.all(-1) if every else at.any(-1)), full[:-1])
        for j in range(max(0, (low - size) // stride + 1), min(full[-1], (high - 1) // stride + 1)):
            first, end = max(0, j * stride - low), j * stride + size - low
            seen = whole
            if at.shape[-1] > 1 and (first > 0 or end < high - low):
                some = at[..., first:end]
                seen = np.asarray(some.all(-1) if every else some.any(-1))
            found[..., j] = found[..., j] & seen if every else found[..., j] | seen
        low = high
    return found
