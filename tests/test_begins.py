"""Query tiles that begin where documents do: the table of them, and what tiles that begin anywhere visit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.begins import most_tiles
from attndsl.blockruns import Reader
from attndsl.codegen.gluon_forward import forward_source
from attndsl.cut_values import cut_values
from attndsl.cuts import with_cuts
from attndsl.derivation import RowTiles
from attndsl.derive import derive
from attndsl.grammar import load
from attndsl.oracle import mask
from attndsl.plan import Backend, DType, ForwardPlan, Tiling, forward_plan
from attndsl.program import Axis, CallShape, Dim, InputDecl, Program, Type
from attndsl.relation import build_relation
from attndsl.runs import Side
from attndsl.runtime.row_tiles import row_tiles
from attndsl.targets import make_spec
from attndsl.tiles import tile_runs
from tests.gpu import interprets
from tests.tiling import call

RNG = np.random.default_rng(11)
FIRST = InputDecl("first", Type.INT, (Dim(Axis.B), Dim(Axis.K)))

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")


def table(first: Tensor, rows: int, made: RowTiles) -> list[list[int]]:
    """The tiles of each batch entry, as the device's table has them."""
    batch, k_len = first.shape
    found = row_tiles(made, FIRST, first, CallShape(batch, 1, 1, rows, k_len, 8, 8))
    assert found.shape == (batch, most_tiles(made, rows) + 2)
    tiles = []
    for entry in found.tolist():
        assert 0 < entry[0] <= most_tiles(made, rows) and all(x == rows for x in entry[1 + entry[0] :])
        tiles.append(entry[1 : 1 + entry[0]])
    return tiles


def expected(first: list[int], rows: int, made: RowTiles) -> list[int]:
    """The same by definition, row by row."""
    start, tiles = len(first) - rows, list[int]()
    for row in range(rows):
        begins = first[row + start] == row + start and row + made.long <= rows
        begins = begins and first[row + start + made.long - 1] == row + start
        if row == 0 or begins or row - tiles[-1] == made.rows:
            tiles.append(row)
    return tiles


@interprets
@pytest.mark.parametrize("n", range(8))
def test_tables_of_tiles(n: int) -> None:
    made = RowTiles("first", *((16, 32), (8, 64), (128, 256), (32, 32))[n % 4])
    k_len = (1, 33, 700, 257, 2500, 128, 90, 1000)[n]
    rows = k_len if n % 2 else int(RNG.integers(1, k_len + 1))
    begins = np.zeros((2, k_len), np.int64)
    for b in range(2):
        begins[b, RNG.integers(0, k_len, size=int(RNG.integers(0, 3 + k_len // made.long)))] = 1
    ids = torch.as_tensor(begins.cumsum(-1))
    first = torch.searchsorted(ids, ids, out_int32=True)
    assert table(first, rows, made) == [expected(x, rows, made) for x in first.tolist()]


@interprets
def test_tiles_follow_one_another_whatever_a_table_is_made_of() -> None:
    made = RowTiles("first", 16, 32)
    for low, high in ((0, 300), (-(2**31), 2**31), (299, 300)):
        first = torch.as_tensor(RNG.integers(low, high, (2, 300))).to(torch.int32)
        for tiles in table(first, 290, made):
            sizes = np.diff([*tiles, 290])
            assert tiles[0] == 0 and sizes.min() > 0 and sizes.max() <= 16


# ---------------------------------------------------------------------------------------- tiles

TEXTS = {
    "causal": "causal & document(doc)",
    "both ways": "document(doc)",
    "sink": "causal & (document(doc) | sink(4))",
    "window": "causal & window(40) & document(doc)",
    "other documents": "window(40) - document(doc)",
    "near": "causal & { doc[q] - doc[k] < 2 }",
}


def program_of(pattern: str) -> Program:
    return load(f"attention a {{ input doc : int[b, k] sorted  attend {pattern} }}").program


@pytest.mark.parametrize("block_k", [8, 16])
@pytest.mark.parametrize("name", TEXTS)
def test_tiles_that_begin_anywhere_visit_what_their_rows_see(name: str, block_k: int) -> None:
    block_q, program = 16, program_of(TEXTS[name])
    cut = with_cuts(derive(program))
    runs = tile_runs(build_relation(program, (1, 1)), block_q, block_k, Side.QUERY, program=cut, shifted=True)
    anything_full = False
    for rows, k_len, doc in (
        (57, 57, np.repeat([3, 5, 7], [9, 43, 5])[None]), (40, 61, np.sort(RNG.integers(0, 6, (1, 61)), axis=-1))
    ):  # fmt: skip
        shape = call(rows, k_len)
        allowed = mask(program, shape, {"doc": doc}, {})[0, 0]
        reader = Reader(cut, shape, {"doc": doc, **cut_values(cut, shape, {"doc": doc}, {})}, {})
        start = k_len - rows
        first = np.arange(start, k_len)[:, None] + np.zeros((1, block_q), np.int64)
        last = np.minimum(first + np.arange(block_q), k_len - 1)
        tile = -(-first // block_q)
        shift = first - tile * block_q
        zero = np.zeros(1, np.int64)
        variables = reader.variables(zero, zero) | {"q_tile": tile, "shift": shift, "q_last": last}
        tiles = -(-(k_len + block_q) // block_k)
        visited, full = np.zeros((2, *first.shape, tiles), np.int64)
        for found, marked in ((runs.full, (visited, full)), (runs.partial, (visited,))):
            for run in found:
                a, n = (np.broadcast_to(reader.value(e, variables), first.shape) for e in (run.first, run.count))
                for place in zip(*np.nonzero(n > 0), strict=True):
                    assert a[place] >= 0
                    for counts in marked:
                        counts[place][a[place] : a[place] + run.step * n[place] : run.step] += 1
        # Keys from a tile before the first one on, where no pair is.
        padded = np.pad(allowed, ((0, 0), (block_q, tiles * block_k)))
        anything_full |= bool(full.any())
        for place in np.ndindex(*first.shape):
            own = slice(first[place] - start, last[place] - start + 1)
            at = block_q + shift[place]
            seen = padded[own, at : at + tiles * block_k].reshape(-1, tiles, block_k)
            assert not np.any(seen.any((0, 2)) & (visited[place] == 0)) and visited[place].max() <= 1
            assert not np.any(~seen.all((0, 2)) & (full[place] > 0))
    assert anything_full


def hopper_plan(pattern: str, inputs: str = "doc : int[b, k] sorted", **changes: Any) -> ForwardPlan:
    text = f"attention a {{ input {inputs}  attend {pattern} }}"
    spec = replace(make_spec("sm_90", "triton", 8, 8, 128), backend=Backend.GLUON, **changes)
    return forward_plan(attndsl.compile(text).program, spec, Tiling(128, 128, 4, 2, several=True))


def test_which_kernels_have_a_table() -> None:
    plan = hopper_plan("causal & document(doc)")
    assert plan.row_tiles is not None and plan.row_tiles in plan.inputs
    assert isinstance(plan.row_tiles.derivation, RowTiles)
    text = forward_source(plan)
    assert "k_tile * BLOCK_K + shift" in text and "if q_row < rows:" in text
    # Keys before the first one are told apart by the document's first token; a sink has to compare them.
    assert "k_offset >= 0 - k_first" not in text
    assert "k_offset >= 0 - k_first" in forward_source(hopper_plan("causal & (document(doc) | sink(4))"))
    for other in (
        hopper_plan("causal & document(doc)", dtype=DType.FLOAT8),
        hopper_plan("causal & { doc[q] == doc[k] }", "doc : int[b, h, k] sorted"),
        hopper_plan("causal & { k >= doc[q] }", "doc : int[b, q] sorted"),
        hopper_plan("causal & window(64)"),
    ):
        assert other.row_tiles is None and "shift" not in forward_source(other)
