"""Conditions that are the same for all pairs of a block, beside what is coarsened."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attndsl import oracle
from attndsl.block_constant import coarsened
from attndsl.branches import Branch, Part
from attndsl.grammar import load
from attndsl.program import CallShape, Coarse, Coarsen, Read, Set, nodes, scalars, walk

INPUTS = "input a : bool[q/8]\n input c : bool[k/4]\n input d : int[k]\n"
# And whether something of it is looked up for pairs all the same.
PATTERNS = {
    "causal & { a[q // 8] or c[k // 4] }": False,
    "{ a[q // 8] } & { c[k // 4] }": False,
    "causal & { c[k // 4] } & window(5)": False,
    "causal & ({ a[q // 8] } | { c[k // 4] and q // 16 > 0 })": False,
    "causal & { d[k] > 2 }": True,
    "causal & { c[k // 4] } & { d[k] > 2 }": True,
    "causal & ({ c[k // 4] } | { d[k] > 2 })": True,
}


@pytest.mark.parametrize(("rows", "keys"), [(8, 4), (1, 4), (4, 2), (1, 1), (8, 1)])
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 21, 32])
def test_blocks_are_those_that_hold_a_pair(text: str, rows: int, keys: int, tokens: int) -> None:
    program = load(f"attention x {{ {INPUTS} attend {text} }}").program
    pattern, draw = program.branch.pattern, np.random.default_rng(tokens)
    arrays: dict[str, np.ndarray] = {name: draw.random(-(-tokens // size)) < 0.4 for name, size in (("a", 8), ("c", 4))}
    arrays["d"] = draw.integers(0, 4, tokens)

    def mask(of: Set) -> np.ndarray:
        whole = replace(program, branches=(Branch((Part(of),)),))
        return oracle.mask(whole, CallShape(1, 1, 1, tokens, tokens, 8, 8), arrays, {})[0, 0, ::rows, ::keys]

    found = coarsened(pattern, rows, keys)
    np.testing.assert_array_equal(mask(found), mask(Coarsen(pattern, rows, keys, Coarse.ANY)))
    if (rows, keys) == (8, 4):
        (inside,) = [x for x in nodes(found) if isinstance(x, Coarsen)]
        looked_up = any(isinstance(x, Read) for x in walk(*scalars(inside.operand)))
        assert looked_up is PATTERNS[text]
