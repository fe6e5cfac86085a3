"""Grids: what axes mean, and the published systems for images and videos, pairs and results."""

from __future__ import annotations

import numpy as np
import pytest

from attndsl import oracle
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.program import CallShape
from tests.grid_rules import GRIDS, cells
from tests.rules import BATCH, HEADS, Pairs, System, shape_of


@pytest.mark.parametrize("system", GRIDS, ids=lambda system: system.name)
def test_published_system(system: System) -> None:
    program = load(system.text, params=system.params).program
    declared = [decl.name for decl in program.inputs]
    for n in system.lengths:
        data = system.data(np.random.default_rng(n), n)
        inputs = {name: data[name] for name in declared}
        for rows in {n, -(-n // 3)}:
            found = oracle.mask(program, shape_of(n, rows), inputs)
            rule = system.rule(Pairs(shape_of(n, rows), data))
            np.testing.assert_array_equal(found, np.broadcast_to(rule, (BATCH, HEADS, rows, n)))
        assert n < 10 or 0 < np.broadcast_to(rule, found.shape).mean() < 1


ORDERS = [
    ("y, x[6]", (6,), 0, None),
    ("y, x[6] from 4", (6,), 4, None),
    ("t, y[4], x[6] from 3 in tiles(2, 2, 3)", (4, 6), 3, (2, 2, 3)),
    ("t, y[4], x[6] in tiles(1, 4, 2)", (4, 6), 0, (1, 4, 2)),
    ("x from 5", (), 5, None),
]


@pytest.mark.parametrize(("axes", "sizes", "first", "tiles"), ORDERS)
def test_coordinates(axes: str, sizes: tuple[int, ...], first: int, tiles: tuple[int, ...] | None) -> None:
    """A set that asks for one cell holds its token alone, and `Nk` is one past the last coordinate."""
    for n in (1, 7, 30, 53):
        place = cells(n, sizes, first, tiles)
        shape, on = CallShape(1, 1, 1, n, n, 8, 8), place[:, 0] >= 0
        both = on[:, None] & on
        names = [axis.strip(" ")[0] for axis in axes.split(" from")[0].split(" in ")[0].split(",")]
        for a, name in enumerate(names):
            same = load(f"attention a {{ axes {axes}\n attend {{ q.{name} == k.{name} + 1 }} }}").program
            expected = both & (place[:, a][:, None] == place[:, a] + 1)
            np.testing.assert_array_equal(oracle.mask(same, shape)[0, 0], expected)
            last = load(f"attention a {{ axes {axes}\n attend {{ k == Nk - 1 and q < Nq - 1 }} on {name} }}").program
            size = place[:, 0].max() + 1 if a == 0 else sizes[a - 1]
            expected = both & (place[:, a] == size - 1) & (place[:, a][:, None] < size - 1)
            np.testing.assert_array_equal(oracle.mask(last, shape)[0, 0], expected)
        off = load(f"attention a {{ axes {axes}\n attend off_grid }}").program
        np.testing.assert_array_equal(oracle.mask(off, shape)[0, 0], ~both)


def test_a_grid_of_known_size_ends() -> None:
    text = "attention a {{ axes y[2], x[3] from 1\n attend {} }}"
    shape = CallShape(1, 1, 1, 9, 9, 8, 8)
    inside = np.zeros(9, bool)
    inside[1:7] = True
    both = inside[:, None] & inside
    for pattern, expected in (("all on y", both), ("off_grid", ~both), ("~({ q.y == 0 })", None)):
        found = oracle.mask(load(text.format(pattern)).program, shape)[0, 0]
        if expected is None:
            # The complement of a set that reads an axis holds the pairs off the grid.
            expected = ~(both & np.isin(np.arange(9), (1, 2, 3))[:, None])
        np.testing.assert_array_equal(found, expected)


MISTAKES = [
    ("axes y[10], x[8] in tiles(4, 4)\n attend causal on y", "A045", "do not divide"),
    ("axes a, b[2], c[2], d[2], e[2]\n attend causal on a", "A045", "at most 4"),
    ("axes y, x[8] in tiles(4)\n attend causal on y", "A013", "one size for each"),
    ("axes y, x[2000000000], z[9]\n attend causal on y", "A045", "more cells"),
    ("axes y, x[8]\n attend { q.y == k.y } on blocks(4)", "A031", "belongs to a token"),
    ("axes y, x[8]\n attend causal on y on blocks(2)", "A031", "places tokens"),
    ("axes y, x[8]\n attend (off_grid) on x", "A031", "tells tokens apart"),
    ("axes y, x[8]\n attend coarsen(causal, 2, any) on x", "A031", "chooses among tokens"),
    ("axes y, x[8]\n attend random(1, tokens, query, 3, among = all) on x", "A031", "chooses among tokens"),
    ("attend off_grid", "A045", "needs axes"),
]


@pytest.mark.parametrize(("clauses", "code", "words"), MISTAKES)
def test_mistakes(clauses: str, code: str, words: str) -> None:
    with pytest.raises(PatternError, match=words) as caught:
        load(f"attention a {{ {clauses} }}")
    assert code in [d.code for d in caught.value.diagnostics]
