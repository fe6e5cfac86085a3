"""Dropout by a counter-based generator: which pairs of a call are kept, as the oracle has it.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): its key is the
seed, 64 bits, low word first; its counter (k // 4, q, h, b), of which the key k takes word k % 4. q and k are absolute
positions and h the query head, so what is kept depends neither on tiles, nor on the device, nor on the rows of a call.
Of a view k is the entry, and ~b stands in the place of b: no entry goes with the token of its number.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from attndsl.program import CallShape, Program

WORD = 1 << 32
_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)


def threshold(rate: float) -> int:
    """The pairs whose word is below it are dropped: a share of `rate`, which lies in [0, 1)."""
    return min(math.ceil(rate * WORD), WORD - 1)


def kept(program: Program, shape: CallShape, rate: float, seed: int, entries: int | None = None) -> NDArray[np.bool_]:
    """Which pairs of a call are kept: bool [batch, heads, rows, k_len], or of a view's entries where their number is
    given."""
    keys = shape.k_len if entries is None else entries
    b, h, q, group = np.ix_(
        np.arange(shape.batch), np.arange(shape.heads), shape.first_position(program) + np.arange(shape.rows),
        np.arange(-(-keys // 4)),
    )  # fmt: skip
    words = philox((group, q, h, b if entries is None else ~b), (seed % WORD, (seed >> 32) % WORD))
    return np.stack(words, axis=-1).reshape(*words[0].shape[:3], -1)[..., :keys] >= threshold(rate)


def philox(counter: tuple[NDArray[np.int64], ...], key: tuple[int, int]) -> list[NDArray[np.uint64]]:
    """The four words, each below 2**32, of Philox-4x32-10; the counter's arrays broadcast, taken modulo 2**32."""
    low = np.uint64(WORD - 1)
    a, b, c, d = np.broadcast_arrays(*(np.asarray(x % WORD, np.uint64) for x in counter))
    first, second = key
    for _ in range(_ROUNDS):
        left, right = a * np.uint64(_FACTORS[0]), c * np.uint64(_FACTORS[1])
        a, b = (right >> np.uint64(32)) ^ b ^ np.uint64(first), right & low
        c, d = (left >> np.uint64(32)) ^ d ^ np.uint64(second), left & low
        first, second = (first + _STEPS[0]) % WORD, (second + _STEPS[1]) % WORD
    return [a, b, c, d]
