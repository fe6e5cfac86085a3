"""Layouts by boxes: products are taken apart exactly, and kernels over boxes mean what the oracle does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray

import attndsl
from attndsl import grid_pieces as module
from attndsl.blockruns import Reader
from attndsl.box_tiles import BoxRun
from attndsl.boxes import Boxes
from attndsl.coordinates import token
from attndsl.evaluate import evaluate
from attndsl.grammar import load
from attndsl.grid import Grid
from attndsl.oracle import mask
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.piece_tiles import piece_tiles
from attndsl.pieces import choose_pieces
from attndsl.plan import DType, Spec, Tiling
from attndsl.program import CallShape, Read, Scalar, Var, walk
from attndsl.runs import TileKind
from attndsl.wiring import engine
from tests.accuracy import check, examples
from tests.gradients import judge
from tests.grid_rules import GRIDS, cells
from tests.gridded import GRIDDED, gridded_programs
from tests.rules import System, shape_of
from tests.strategies import Case, tensors
from tests.test_backward_cpu import runner as cpu_runner
from tests.test_backward_triton import runner as triton_runner

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

SMALL = Tiling(16, 16, warps=4, stages=1)
CACHES = (module.grid_pieces, choose_pieces, forward_plans, backward_plans)


@pytest.fixture(scope="module", autouse=True)
def always_boxes() -> Iterator[None]:
    """Small grids would stay in order: here they are visited by boxes all the same."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "WORTH_IT", float("inf"))
    for cache in CACHES:
        cache.cache_clear()
    yield
    patch.undo()
    for cache in CACHES:
        cache.cache_clear()


def boxes_of(case: Case) -> list[Boxes]:
    choice = choose_pieces(case.load(), (case.shape.heads, case.shape.kv_heads))
    return [piece.layout for piece in choice.pieces if isinstance(piece.layout, Boxes)]


# ------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("tiles", [(1, 1, 1), (2, 2, 3), (1, 4, 1)])
def test_tokens_of_coordinates(tiles: tuple[int, ...]) -> None:
    grid = Grid(("t", "y", "x"), (None, 4, 6), 3, tiles)
    place = cells(123, (4, 6), 3, tiles)
    known = {f"j_{a}": place[3:, a] for a in range(3)}
    assert evaluate(token(grid, [Var(f"j_{a}") for a in range(3)]), known, {}).tolist() == list(range(3, 123))


# --------------------------------------------------------------------------------- the division


def covered(case: Case) -> NDArray[np.int64]:
    """How often the pieces by boxes allow each pair, int [batch, heads, rows, keys]."""
    shape = case.shape
    spec = Spec(shape.heads, shape.kv_heads, shape.dim, shape.v_dim, DType.FLOAT32, "cpu")
    found = np.zeros((shape.batch, shape.heads, shape.rows, shape.k_len), np.int64)
    for plan in forward_plans(case.load(), spec, SMALL):
        if not isinstance(plan.layout, Boxes):
            continue
        reader, boxes = Reader(plan.program, shape, case.inputs, case.args), plan.layout
        start, ends = shape.first_position(plan.program), (shape.q_len(plan.program), shape.k_len)
        b, h = np.indices((shape.batch, shape.heads))
        counts = boxes.tile_counts("q", shape, plan.program)
        for residue in range(boxes.classes):
            known: dict[str, Any] = reader.variables(b, h) | {"residue": np.asarray(residue)}
            known |= {f"residue_{a}": evaluate(boxes.residue(a), known, {}) for a in boxes.axes}
            first = int(evaluate(boxes.first_tile("q"), known, {}))
            sizes = [int(evaluate(boxes.lengths()["Nk"][a], known, {})) for a in boxes.axes]
            for tile in product(*(range(n) for n in counts)):
                at = known | {f"q_tile_{a}": np.asarray(t + (first if a == 0 else 0)) for a, t in enumerate(tile)}
                q = _cells(boxes, "q", [int(at[f"q_tile_{a}"]) for a in boxes.axes], known, (start, ends[0]))
                if not q["q"].size:
                    continue
                seen: set[tuple[Any, ...]] = set()
                for run in plan.box_runs.full + plan.box_runs.partial:
                    for entry in np.ndindex(b.shape):
                        for key_tile in _tiles(run, reader, at, entry, b.shape):
                            assert (*entry, *key_tile) not in seen, "visited twice"
                            seen.add((*entry, *key_tile))
                            k = _cells(boxes, "k", key_tile, known, (0, ends[1]))
                            full = run.kind is TileKind.FULL
                            if full:
                                assert k["k"].size == np.prod(boxes.k_box) and all(
                                    (key_tile[a] + 1) * boxes.k_box[a] <= -(-sizes[a] // boxes.periods[a])
                                    for a in boxes.axes
                                )
                            inside = np.ones((q["q"].size, k["k"].size), bool)
                            if plan.mask is not None and not full:
                                pair = at | {n: x[:, None] for n, x in q.items()}
                                pair |= {n: x[None, :] for n, x in k.items()}
                                pair |= {n: np.asarray(np.broadcast_to(known[n], b.shape)[entry]) for n in "bhg"}
                                reads = [e for e in walk(plan.mask) if isinstance(e, Read)]
                                leaves: dict[Scalar, Any] = {e: reader.value(e, pair) for e in reads}
                                inside &= evaluate(plan.mask, pair, leaves)
                            found[(*entry, (q["q"] - start)[:, None], k["k"][None, :])] += inside
    return found


def _cells(boxes: Boxes, side: str, tile: Any, known: dict[str, Any], bounds: tuple[int, int]) -> dict[str, Any]:
    """Tokens and indices of the cells of a box that have a token."""
    name = "i" if side == "q" else "j"
    box = boxes.q_box if side == "q" else boxes.k_box
    local = np.indices(box).reshape(len(box), -1)
    at = {f"{name}_{a}": tile[a] * box[a] + local[a] for a in boxes.axes}
    tokens = evaluate(boxes.position(side), known | at, {})
    exist = (tokens >= bounds[0]) & (tokens < bounds[1])
    for a in boxes.axes:
        if boxes.grid.sizes[a] is not None:
            exist &= evaluate(boxes.cell(a, Var(f"{name}_{a}")), known | at, {}) < boxes.grid.sizes[a]
    return {side: tokens[exist]} | {n: x[exist] for n, x in at.items()}


def _tiles(run: BoxRun, reader: Reader, at: Any, entry: tuple[int, ...], size: tuple[int, ...]) -> Iterator[Any]:
    along = []
    for runs in run.axes:
        tiles: list[int] = []
        for one in runs:
            first, count = (int(np.broadcast_to(reader.value(e, at), size)[entry]) for e in (one.first, one.count))
            tiles += [first + n * one.step for n in range(count)]
        along.append(tiles)
    yield from product(*along)


def divides(case: Case) -> None:
    expected = mask(case.load(), case.shape, case.inputs, case.args).astype(np.int64)
    grid = case.load().grid
    assert grid is not None
    whole = grid.stride * grid.sizes[0] if grid.sizes[0] is not None else 1 << 30
    shape = case.shape
    inside = [
        (np.arange(low, high) >= grid.first) & (np.arange(low, high) < grid.first + whole)
        for low, high in ((shape.first_position(case.load()), shape.q_len(case.load())), (0, shape.k_len))
    ]
    np.testing.assert_array_equal(covered(case), expected * (inside[0][:, None] & inside[1]))


@pytest.mark.parametrize("name", GRIDDED)
def test_fixed_programs_are_divided(name: str) -> None:
    assert boxes_of(GRIDDED[name])
    divides(GRIDDED[name])


@given(case=gridded_programs())
@examples(12)
def test_random_programs(case: Case) -> None:
    if boxes_of(case):
        divides(case)
    attend(case, torch.float64, "cpu")


# -------------------------------------------------------------------------------------- kernels


def attend(case: Case, dtype: torch.dtype, backend: str) -> None:
    program = case.load()
    q, k, v, inputs = tensors(case, dtype=dtype)
    runner = engine(program)
    runner.tiling = SMALL
    out, lse = runner.forward(q, k, v, [inputs[decl.name] for decl in program.inputs], [], None, backend)
    check(program, q, k, v, inputs, case.args, out, lse)


@pytest.mark.parametrize("name", GRIDDED)
def test_forward(name: str) -> None:
    attend(GRIDDED[name], torch.float32, "cpu")


@pytest.mark.parametrize("name", ["open", "dilated", "heads", "sink", "order"])
def test_forward_triton(name: str) -> None:
    attend(GRIDDED[name], torch.float32, "triton")


@pytest.mark.parametrize("name", GRIDDED)
def test_backward(name: str) -> None:
    judge(cpu_runner(SMALL), GRIDDED[name], torch.float64)


@pytest.mark.parametrize("name", ["open", "windows", "axial", "last_row"])
def test_backward_triton(name: str) -> None:
    judge(triton_runner(SMALL), GRIDDED[name], torch.float32)


@pytest.mark.parametrize("system", GRIDS, ids=lambda system: system.name)
def test_gradients_of_published_systems(system: System) -> None:
    least, *_, most = system.lengths
    for n, rows in ((least, least), (most, -(-most // 3))):
        data = system.data(np.random.default_rng(n), n)
        judge(cpu_runner(SMALL), Case(system.text, system.params, data, {}, shape_of(n, rows)), torch.float64)


# ---------------------------------------------------------------------------------- looking inside


def test_shapes_follow_the_pattern() -> None:
    """Boxes as large as the windows, where windows have a size; long ones along an axis that nothing restricts."""

    def shapes(axes: str, pattern: str) -> list[str]:
        program = load(f"attention a {{ axes {axes}\n attend {pattern} }}").program
        return [str(piece.layout).partition(": ")[2] for piece in choose_pieces(program, (2, 1)).pieces]

    assert shapes("y[56], x[56]", "same_block(7) on (y, x)") == ["queries 7 x 14, keys 7 x 7"]
    assert shapes("y[128], x[128]", "neighborhood(13) on (y, x)") == ["queries 8 x 16, keys 8 x 8"]
    assert shapes("y, x[64]", "{ q.x == k.x }") == ["queries 128 x 1, keys 64 x 1"]


def test_tiles_are_counted() -> None:
    program = load("attention a { axes y[16], x[16]\n attend neighborhood(3) on (y, x) }").program
    (plan,) = forward_plans(program, Spec(2, 1, 16, 16, DType.FLOAT32, "cpu"), SMALL)
    found = piece_tiles(plan, CallShape(1, 2, 1, 256, 256, 16, 16), {}, {})
    assert isinstance(plan.layout, Boxes) and (plan.layout.q_box, plan.layout.k_box) == ((1, 16), (1, 16))
    # Whole rows, of which each sees three.
    assert (found.q_tiles, found.full, found.partial) == (2 * 16, 0, 2 * 16 * 3)


def test_explained() -> None:
    attn = attndsl.compile("attention a { axes y[32], x[32]\n attend neighborhood(5) on (y, x) }")
    found = attn.explain(1024)
    assert found.section("pieces").lines[0] == "products of sets along the axes: pieces by boxes, 1 of them"
    planned = "\n".join(found.section("planned").lines)
    assert "boxes of y, x: queries" in planned
    assert "along y: partial key tiles" in planned and "along x: partial key tiles" in planned
    assert "q_tile_0 = q_tile" in attn.source("forward")
    assert "for q_tile_0, q_tile_1 in itertools.product(" in attn.source("forward", backend="cpu")
