"""What views mean, token by token: rules that list, for a row, pairs of a logit and a value, and their softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Of row q: keys, values, and what is added to each logit.
Rule = Callable[[int, Array, Array], Iterator[tuple[Array, Array, float]]]
POOL: dict[str, Callable[..., Array]] = {"mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min}


def tokens(sees: Callable[[int, int], bool]) -> Rule:
    """The raw tokens that a row sees."""

    def rule(q: int, k: Array, v: Array) -> Iterator[tuple[Array, Array, float]]:
        for j in range(len(k)):
            if sees(q, j):
                yield k[j], v[j], 0.0

    return rule


def pooled(
    sees: Callable[[int, int], bool], function: str, size: int, stride: int | None = None, any: bool = False,
    counted: bool = False,
) -> Rule:  # fmt: skip
    """The entries that a row sees: by every token of the nominal extent, or by any that is present."""
    stride = stride or size

    def rule(q: int, k: Array, v: Array) -> Iterator[tuple[Array, Array, float]]:
        for first in range(0, len(k), stride):
            extent = range(first, first + size)
            present = [j for j in extent if j < len(k)]
            seen = [sees(q, j) for j in (present if any else extent)]
            if max(seen) if any else min(seen):
                keys, values = (POOL[function](x[present], axis=0) for x in (k, v))
                yield keys, values, float(np.log(len(present))) if counted else 0.0

    return rule


def attended(
    rules: list[Rule], q: Array, k: Array, v: Array, sink: float | None = None, score: Callable[[float], float] = float
) -> tuple[Array, Array]:
    """Output [rows, Dv] and lse [rows] of one softmax over what the rules list; the last row stands at the last key."""
    out, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    for i, row in enumerate(q):
        position = i + len(k) - len(q)
        if position < 0:
            continue
        found = [x for rule in rules for x in rule(position, k, v)]
        logits = np.array([score(float(row @ key) / row.size**0.5) + more for key, _, more in found])
        with_sink = logits if sink is None else np.append(logits, sink)
        if with_sink.size:
            lse[i] = np.logaddexp.reduce(with_sink)
            out[i] = sum((np.exp(x - lse[i]) * value for x, (_, value, _) in zip(logits, found, strict=True)), out[i])
    return out, lse
