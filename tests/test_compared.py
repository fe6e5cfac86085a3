"""What `explain` says the search for pieces compared, of every kind of layout, and that its counts are true."""

from __future__ import annotations

import pytest

import attndsl
from attndsl.blockgraph import block_graph
from attndsl.call_shape import CallShape
from attndsl.compared import WORTH_IT
from attndsl.grammar import load
from attndsl.layout import PLAIN
from attndsl.piece_plans import forward_plans
from attndsl.piece_tiles import piece_tiles
from attndsl.pieces import TOKENS, choose_pieces
from attndsl.plan import DType, Spec, Tiling

GRID = "attention g { axes y[128], x[128] attend neighborhood(%s) on (y, x) }"
COSTS = "costs in tiles of 128 x 64, taken below 75 % of tokens in order:"
AT = f"considered at 16,384 tokens, {COSTS}"
IN_ORDER = "attention p { input doc : int[b, k] attend %s }"
SHOWN = {
    "combs": (
        "causal & (window(128) | dilated(128))",
        AT,
        "  1,726  chosen: tokens in order; then queries and keys 1 of every 128, from residue on  "
        "(766 visited, 960 for programs and merging)",
        "  16,832  tokens in order  (16,512 visited, 320 for programs and merging)",
    ),
    "combs that gain nothing": (
        "causal & (window(8192) | dilated(2))",
        AT,
        "  16,832  chosen: tokens in order  (16,512 visited, 320 for programs and merging)",
        "  21,760  tokens in order; then queries and keys 1 of every 2, from residue on  "
        "(20,800 visited, 960 for programs and merging)",
    ),
    "boxes": (
        GRID % "13",
        "products of sets along the axes: pieces by boxes, 1 of them",
        f"considered on a grid of 128 x 128 cells, {COSTS}",
        "  2,045  chosen: boxes of y, x: queries 8 x 16, keys 8 x 8  (1,725 visited, 320 for programs and merging)",
        "  3,648  tokens in order  (3,328 visited, 320 for programs and merging)",
    ),
    "boxes that gain nothing": (
        GRID % "111",
        f"considered on a grid of 128 x 128 cells, {COSTS}",
        "  27,221  boxes of y, x: queries 8 x 16, keys 8 x 8  (26,901 visited, 320 for programs and merging)",
        "  28,736  tokens in order  (28,416 visited, 320 for programs and merging)",
    ),
    "an order of data": (
        IN_ORDER % "document(doc)",
        "rows in the order of `rows_by_doc`, keys in that of `keys_by_doc`: sorted, the data bounds the keys of a row",
        AT,
        "  320 or more  chosen: rows in the order of `rows_by_doc`, keys in that of `keys_by_doc`  "
        "(at least 0 visited, 320 for programs and merging)",
        "  33,088  tokens in order  (32,768 visited, 320 for programs and merging)",
    ),
    "an order of data beside tokens in order": (
        IN_ORDER % "causal & (window(64) | document(doc))",
        "alternatives in the orders of their data, each a piece beside the rest",
        AT,
        "  1,343 or more  chosen: tokens in order; then rows in the order of `rows_by_doc`, "
        "keys in that of `keys_by_doc`  (at least 383 visited, 960 for programs and merging)",
        "  16,832  tokens in order  (16,512 visited, 320 for programs and merging)",
    ),
    "a draw": (
        "window(64) | random(2, blocks(64), per = rows(64), seed = 3)",
        "what `random` adds to the rest is a piece of its own, its tiles listed",
        AT,
        "  1,599  chosen: tokens in order; then what `random` lists  (639 visited, 960 for programs and merging)",
        "  33,088  tokens in order  (32,768 visited, 320 for programs and merging)",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_was_compared_is_shown(name: str) -> None:
    text, *lines = SHOWN[name]
    found = attndsl.compile(text).explain(256)
    assert found.section("pieces").lines == tuple(lines)


@pytest.mark.parametrize("name", SHOWN)
def test_what_costs_least_is_chosen(name: str) -> None:
    """Where it is so much less than tokens in order, which are kept else."""
    program = load(SHOWN[name][0]).program
    for found in choose_pieces(program, (2, 1)).considered:
        (plain,) = (way for way in found.ways if way.layouts == (PLAIN,))
        best = min(found.ways, key=lambda way: way.cost)
        gains = best.cost < WORTH_IT * plain.cost
        assert found.chosen is best if gains else found.chosen in (None, plain)


@pytest.mark.parametrize("name", ["combs", "combs that gain nothing"])
def test_tiles_are_those_of_plans(name: str) -> None:
    """Of tokens in order as the block graph has them, of the pieces as their kernels visit them."""
    program = load(SHOWN[name][0]).program
    shape = CallShape(1, 1, 1, TOKENS, TOKENS, 64, 64)
    (found,) = choose_pieces(program, (1, 1)).considered
    (plain,) = (way for way in found.ways if way.layouts == (PLAIN,))
    assert plain.tiles == block_graph(program, shape, 128, 64).tiles
    plans = forward_plans(program, Spec(1, 1, 64, 64, DType.FLOAT32, "cpu"), Tiling(128, 64, 4, 1))
    assert found.chosen is not None
    assert found.chosen.tiles == sum(piece_tiles(plan, shape, {}, {}).tiles for plan in plans)
