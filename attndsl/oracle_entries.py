"""The oracle of views that data tells: which tokens each of their entries stands for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attndsl.branches import Pick, View
from attndsl.oracle import Evaluator


def tokens_of(at: Evaluator, view: View | None, entries: int) -> npt.NDArray[np.bool_] | None:
    """bool [B, Hq, entries, Nk]; None where the entries of a view are blocks of tokens in a row, or there is none."""
    shape = at.shape
    found = np.zeros((shape.batch, shape.heads, entries, shape.k_len), np.bool_)
    for b, h in np.ndindex(*found.shape[:2]):
        match view:
            case Pick():
                found[b, h] = np.asarray(at.listed(view, b, h))[:, None] == np.arange(shape.k_len)
            case _ if view is not None and view.runs is not None:
                for j, (begin, end) in enumerate(at.extents(view.runs, b, h)):
                    found[b, h, j, begin:end] = True
            case _:
                return None
    return found
