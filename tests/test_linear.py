"""Sums in normal form have the values of what they were made of."""

from __future__ import annotations

import random

import numpy as np
import pytest

from attndsl.evaluate import evaluate
from attndsl.linear import normalise, plainly
from attndsl.program import Binary, Call, Compare, Const, If, Logic, Scalar, Unary, Var

SIZES = {"H": 8, "G": 2}
NAMES = ("q", "k", "Nk", "start", *SIZES)


def integer(rng: random.Random, depth: int) -> Scalar:
    if depth == 0:
        return rng.choice((Const(rng.randint(-70, 70)), Var(rng.choice(NAMES))))
    operands = [integer(rng, depth - 1) for _ in range(2)]
    if rng.random() < 0.3:
        # What is shared is looked at once.
        operands[1] = operands[0]
    divisor = rng.choice((Const(rng.choice((1, 2, 7, 64))), Var("G"), Binary("//", Var("H"), Var("G"))))
    match rng.randrange(8):
        case 0 | 1:
            return Binary(rng.choice("+-"), *operands)
        case 2:
            return Binary("*", operands[0], Const(rng.randint(-3, 64)))
        case 3 | 4:
            return Binary(rng.choice(("//", "%")), operands[0], divisor)
        case 5:
            return Call(rng.choice(("min", "max")), tuple(operands[: rng.randint(1, 2)]))
        case 6:
            return Unary("-", operands[0])
        case _:
            return If(boolean(rng, depth - 1), *operands)


def boolean(rng: random.Random, depth: int) -> Scalar:
    if depth == 0:
        return Const(rng.random() < 0.5)
    match rng.randrange(4):
        case 0:
            return Logic(rng.choice(("and", "or")), tuple(boolean(rng, depth - 1) for _ in range(2)))
        case 1:
            return Unary("not", boolean(rng, depth - 1))
        case 2:
            return If(*(boolean(rng, depth - 1) for _ in range(3)))
        case _:
            return Compare(rng.choice(("<", "<=", ">", ">=", "==", "!=")), *(integer(rng, depth - 1) for _ in range(2)))


@pytest.mark.parametrize("seed", range(3))
def test_plain_scalars_keep_their_values(seed: int) -> None:
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    values = {name: numbers.integers(-300, 300, 50) for name in NAMES} | {n: np.asarray(x) for n, x in SIZES.items()}
    for _ in range(200):
        written = [integer(rng, rng.randint(1, 5)), boolean(rng, rng.randint(1, 4))]
        for e, plain in zip(written, plainly(written, SIZES), strict=True):
            expected = evaluate(e, values, {})
            for same in (plain, normalise(e)):
                np.testing.assert_array_equal(np.broadcast_to(evaluate(same, values, {}), (50,)), expected)
