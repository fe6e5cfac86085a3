"""Pieces whose tiles are copied as boxes of more dimensions: where these lie, and what kernels make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import attndsl
from attndsl import grid_pieces
from attndsl.boxes import Boxes
from attndsl.codegen.triton_backward import backward_sources
from attndsl.codegen.triton_forward import forward_source
from attndsl.evaluate import evaluate
from attndsl.grid import Grid
from attndsl.layers import layers
from attndsl.layout import Comb, Layout
from attndsl.piece_plans import backward_plans, forward_plans, whole
from attndsl.plan import Backend, DType, Loads, Printed, Spec
from attndsl.program import CallShape, Var
from attndsl.properties import is_whole
from attndsl.runtime.engine import Gradients
from attndsl.runtime.pieces import in_turn
from attndsl.runtime.printing import printed_forward
from attndsl.runtime.triton_backward import InTurn, TritonBackward
from attndsl.runtime.triton_launch import TritonForward
from attndsl.targets import make_spec

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GRID = "attention grid {{\n    axes y[{0}], x[{0}]\n    attend {1}\n}}"
# Programs, rows and keys.
CALLS = {
    "dilated": ("causal & window(300) & dilated(4)", 208, 208),
    "dilated, a chunk": ("causal & window(300) & dilated(4)", 128, 384),
    "two pieces": ("causal & (window(20) | dilated(16))", 192, 192),
    "neighbourhood": (GRID.format(16, "neighborhood(5) on (y, x)"), 128, 128),
    "neighbourhood, a chunk": (GRID.format(16, "neighborhood(5) on (y, x)"), 64, 256),
    "past the end of an axis": (GRID.format(12, "neighborhood(5) on (y, x)"), 132, 132),
}


@pytest.fixture(autouse=True)
def small_grids_in_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids so small are visited in order otherwise."""
    monkeypatch.setattr(grid_pieces, "WORTH_IT", 100.0)


def spec_of(program: attndsl.program.Program, rows: int, keys: int, heads: tuple[int, int] = (2, 2)) -> Spec:
    spec = Spec(*heads, 16, 16, DType.FLOAT16, "cuda:90", Loads.DESCRIPTOR)
    shape = CallShape(1, *heads, rows, keys, 16, 16)
    return replace(spec, whole=whole(program, spec, shape))


@pytest.mark.parametrize(
    ("layout", "side", "block", "tokens"),
    [
        (Layout(Comb(16, step=1), Comb(16, step=1), 16), "q", 8, 320),
        (Layout(Comb(), Comb(5, step=1), 5), "k", 4, 35),
        (Boxes(Grid(("y", "x"), (None, 24), 0, (1, 1)), (1, 1), (4, 8), (8, 4)), "q", 32, 240),
        (Boxes(Grid(("y", "x"), (None, 24), 0, (1, 1)), (1, 1), (4, 8), (8, 4)), "k", 32, 240),
        (Boxes(Grid(("y", "x"), (10, 20), 0, (1, 1)), (1, 1), (8, 8), (8, 8)), "k", 64, 200),
    ],
)
def test_a_copied_tile_holds_the_tokens_of_the_layout(
    layout: Layout | Boxes, side: str, block: int, tokens: int
) -> None:
    """Every tile, by the strides of its dimensions and by the layout's own arithmetic."""
    seen = layers(layout, side, block)
    assert seen is not None and tokens % seen.unit == 0
    cells = np.lib.stride_tricks.as_strided(
        np.arange(tokens), seen.shape(tokens), [step * np.arange(1).itemsize for step in seen.steps]
    )
    assert sorted(cells.ravel()) == list(range(tokens))
    counts = [-(-size // tile) for size, tile in zip(cells.shape, seen.tile, strict=True)]
    for place in np.ndindex(*counts):
        begins = [number * tile for number, tile in zip(place, seen.tile, strict=True)]
        indices = np.meshgrid(*(b + np.arange(t) for b, t in zip(begins, seen.tile, strict=True)), indexing="ij")
        exists = np.all([index < size for index, size in zip(indices, cells.shape, strict=True)], axis=0)
        found = cells[tuple(np.where(exists, index, 0) for index in indices)]
        if isinstance(layout, Boxes):
            letter = "i" if side == "q" else "j"
            named = {f"{letter}_{axis}": index for axis, index in enumerate(indices)}
            expected = evaluate(layout.position(side), named, {})
        else:
            comb = layout.q if side == "q" else layout.k
            expected = evaluate(comb.position(Var("i")), {"i": indices[1], "residue": indices[0]}, {})
        assert np.array_equal(found[exists], np.broadcast_to(expected, exists.shape)[exists])


@pytest.mark.parametrize("name", CALLS)
def test_copied_tiles_give_what_pointers_give(name: str) -> None:
    """To the bit: the same products of the same tiles. That those are right the tests of pieces show."""
    text, rows, keys = CALLS[name]
    program = attndsl.compile(text).program
    spec = spec_of(program, rows, keys)
    assert spec.whole
    torch.manual_seed(0)
    q, dout = (torch.randn(1, 2, rows, 16, dtype=torch.float16, device=DEVICE) for _ in range(2))
    k, v = (torch.randn(1, 2, keys, 16, dtype=torch.float16, device=DEVICE) for _ in range(2))
    found = []
    for each in (spec, replace(spec, loads=Loads.POINTER, whole=False)):
        plans = forward_plans(program, each)
        assert ("_desc" in "".join(map(forward_source, plans))) == each.whole
        steps = [
            TritonForward(
                Printed(x.program, x.spec, x.tiling, forward_source(x), x.layout, n > 0), q, k, v, [], aligned=True
            )
            for n, x in enumerate(plans)
        ]
        out, lse = in_turn(*steps)(q, k, v, [], [], None, None)
        found.append((out, lse, *backward(program, each, dout, q, k, v, out, lse)[:3]))
    for copied, pointed in zip(*found, strict=True):
        assert copied.isfinite().all() and torch.equal(copied, pointed)


def backward(
    program: attndsl.program.Program, spec: Spec, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
) -> Gradients:  # fmt: skip
    pieces = []
    for plan in backward_plans(program, spec, uses_lse=False):
        texts = backward_sources(plan)
        assert all(("_desc.load" in text) == spec.whole for text in texts)
        pieces.append(TritonBackward(plan, *texts, dout, q, k, v, [], aligned=True))
    return InTurn(tuple(pieces))(dout, None, q, k, v, out, lse, [], [], None, None)


def test_rows_lie_residue_by_residue_where_one_kernel_reads_them() -> None:
    """Other pieces, and kernels for inputs that q and k read together, find rows at their own places."""

    def apart(text: str) -> bool:
        program = attndsl.compile(text).program
        return backward_plans(program, spec_of(program, 256, 256))[0].rows_apart

    learned = "input bias : float[h, 33] learnable\n score s + bias[h, clamp(q - k, 0, 32)]\n"
    assert apart("causal & window(300) & dilated(4)")
    assert not apart(f"attention a {{ {learned} attend causal & window(300) & dilated(4) }}")
    assert not apart("causal & (window(20) | dilated(16))")
    assert not apart(GRID.format(16, "neighborhood(5) on (y, x)")) and not apart("causal & window(64)")


def test_what_does_not_fill_its_layers_is_read_through_pointers() -> None:
    """The rest of a layer would be another head's tokens, or nobody's."""

    def filled(text: str, rows: int, keys: int) -> bool:
        return spec_of(attndsl.compile(text).program, rows, keys).whole

    dilated, grid = CALLS["dilated"][0], CALLS["neighbourhood"][0]
    assert filled(dilated, 320, 320) and not filled(dilated, 321, 321) and not filled(dilated, 126, 384)
    assert filled(grid, 128, 128) and not filled(grid, 120, 128) and not filled(grid, 128, 130)
    assert not filled("causal", 320, 320) and not filled("causal & window(64)", 320, 320)
    # Three axes with heads and channels are one dimension more than copies have.
    video = "attention video {\n axes t[8], y[16], x[16]\n attend neighborhood(3) on t & neighborhood(5) on (y, x)\n}"
    assert not filled(video, 2048, 2048)


@pytest.mark.parametrize(("name", "tokens", "copied"), [
    ("neighbourhood", 128, True), ("neighbourhood", 130, False), ("dilated", 256, True), ("dilated", 257, False),
])  # fmt: skip
def test_calls_that_fill_their_layers_are_copied(name: str, tokens: int, copied: bool) -> None:
    program = attndsl.compile(CALLS[name][0]).program
    shape = CallShape(1, 2, 2, tokens, tokens, 128, 128)
    spec = replace(make_spec("sm_90", "triton", 2, 2, 128), whole=is_whole(program, shape))
    (kernel,) = printed_forward(program, spec, (Backend.TRITON,), None, {Backend.TRITON: forward_source}, None)
    assert ("_desc" in kernel.text) == kernel.spec.whole == copied
