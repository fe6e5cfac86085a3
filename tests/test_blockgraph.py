"""The block graph: counts and analyses against dense ones, its size and time, and its pictures."""

from __future__ import annotations

import gc
import io
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from PIL import Image
from rich.console import Console

from attndsl.blockgraph import BlockGraph, TileCode, block_graph
from attndsl.grammar import load
from attndsl.oracle import mask
from attndsl.program import CallShape
from attndsl.runs import TileKind
from tests.accuracy import examples
from tests.strategies import Case, composed_programs
from tests.tiling import Array, call

PATTERNS = [
    "all", "none", "causal", "causal & (window(40) | sink(3))", "causal & (same_block(64) | strided(64))",
    "strided(32, 31)", "neighborhood(33)", "same_block(48) | sink(1)",
]  # fmt: skip


def graph_of(text: str, n: int = 256, block: int = 16, **inputs: Array) -> BlockGraph:
    return block_graph(load(text).program, call(n, n), block, block, inputs)


def dense_of(text: str, shape: CallShape, block: int, **inputs: Array) -> tuple[Array, Array]:
    """Tiles that have a pair, and tiles all of whose pairs are allowed; sizes are multiples of the block."""
    allowed = mask(load(text).program, shape, inputs)[0, 0]
    grid = allowed.reshape(shape.rows // block, block, shape.k_len // block, block)
    return grid.any(axis=(1, 3)), grid.all(axis=(1, 3))


# ------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("text", PATTERNS)
def test_tiles_equal_the_dense_ones(text: str) -> None:
    graph = graph_of(text)
    some, every = dense_of(text, call(256, 256), 16)
    dense = graph.dense()
    np.testing.assert_array_equal(dense != TileCode.NONE, some)
    np.testing.assert_array_equal(dense == TileCode.FULL, every)
    assert graph.full == every.sum()
    assert graph.partial == (some & ~every).sum()
    assert graph.tiles == some.sum()
    assert graph.density == some.mean()
    np.testing.assert_array_equal(graph.work, some.sum(axis=1))


@given(case=composed_programs(max_depth=2, lengths=(7, 16, 33), scores=False))
@examples(24)
def test_composed_programs(case: Case) -> None:
    program, shape = case.load(), case.shape
    graph = block_graph(program, shape, 4, 8, case.inputs, case.args)
    allowed = mask(program, shape, case.inputs, case.args)
    seen = 0
    for b, h in np.ndindex(shape.batch, shape.heads):
        dense = graph.dense(h, b)
        seen += int(np.count_nonzero(dense))
        for row, key in np.argwhere(allowed[b, h]):
            assert dense[row // 4, key // 8] != TileCode.NONE
        for i, j in np.argwhere(dense == TileCode.FULL):
            assert allowed[b, h, 4 * i : 4 * i + 4, 8 * j : 8 * j + 8].all()
            assert 8 * j + 8 <= shape.k_len
    assert graph.tiles == seen == graph.work.sum()


def test_runs_of_a_tile() -> None:
    graph = graph_of("causal & (window(40) | sink(3))")
    runs = graph.runs(10)
    assert [(run.first, run.count, run.step, run.kind) for run in runs] == [
        (0, 1, 1, TileKind.PARTIAL),
        (7, 2, 1, TileKind.PARTIAL),
        (9, 1, 1, TileKind.FULL),
        (10, 1, 1, TileKind.PARTIAL),
    ]
    dense = graph.dense()
    for q_tile in range(graph.q_tiles):
        listed = [j for run in graph.runs(q_tile) for j in run.tiles]
        assert listed == np.flatnonzero(dense[q_tile]).tolist()


def test_chunks_and_odd_lengths() -> None:
    program = load("causal & window(20)").program
    graph = block_graph(program, call(50, 101), 16, 8)
    allowed = mask(program, call(50, 101))[0, 0]
    assert (graph.q_tiles, graph.k_tiles, graph.start) == (4, 13, 51)
    padded = np.pad(allowed, ((0, 14), (0, 3))).reshape(4, 16, 13, 8).any(axis=(1, 3))
    np.testing.assert_array_equal(graph.dense() > 0, padded)


def test_a_call_without_rows_or_keys() -> None:
    program = load("causal").program
    for rows, k_len in ((0, 5), (0, 0)):
        graph = block_graph(program, call(rows, k_len), 4, 4)
        assert (graph.tiles, graph.density, graph.work.size) == (0, 0.0, 0)
        assert "causal" in str(graph) or "pattern" in str(graph)


def test_places_that_do_not_exist() -> None:
    graph = graph_of("causal")
    for wrong in (
        lambda: graph.runs(16),
        lambda: graph.runs(-1),
        lambda: graph.dense(head=1),
        lambda: graph.dense(batch=1),
    ):
        with pytest.raises(ValueError, match="no "):
            wrong()
    with pytest.raises(ValueError, match="tiles of 0 x 4"):
        block_graph(load("causal").program, call(4, 4), 0, 4)


# ------------------------------------------------------------------------------- heads and inputs

HEADS = """attention heads(n : runtime int, span : int[h]) {
    input width : int[h]
    input doc : int[b, k]
    attend %s
}"""


def test_heads_share_a_graph() -> None:
    program = load(HEADS % "causal & window(span[h])", params={"span": [16, 64, 16, 200]}).program
    graph = block_graph(program, call(256, 256, heads=4, kv_heads=2, batch=3), 16, 16)
    assert graph.head_groups == ((0, 2), (1,), (3,))
    assert len(graph.offsets) == 3
    one = [block_graph(load(f"causal & window({n})").program, call(256, 256), 16, 16) for n in (16, 64, 16, 200)]
    for h, single in enumerate(one):
        np.testing.assert_array_equal(graph.dense(h, 1), single.dense())
    assert graph.tiles == 3 * sum(single.tiles for single in one)
    np.testing.assert_array_equal(graph.work, 3 * sum(single.work for single in one))


def test_values_that_give_the_same_tiles_share_a_graph() -> None:
    program = load(HEADS % "causal & window(width[h])", params={"span": [1, 1]}).program
    inputs = {"width": np.array([18, 20])}
    assert block_graph(program, call(64, 64, heads=2), 16, 16, inputs).head_groups == ((0, 1),)
    inputs = {"width": np.array([16, 18])}
    assert block_graph(program, call(64, 64, heads=2), 16, 16, inputs).head_groups == ((0,), (1,))


def test_missing_inputs_are_named() -> None:
    program = load(HEADS % "causal & window(width[h])", params={"span": [1]}).program
    with pytest.raises(ValueError, match="input `width` is missing"):
        block_graph(program, call(64, 64))
    with pytest.raises(ValueError, match="`width` has shape"):
        block_graph(program, call(64, 64), inputs={"width": np.zeros(3, np.int64)})
    program = load(HEADS % "causal & window(n)", params={"span": [1]}).program
    with pytest.raises(ValueError, match="argument `n` is missing"):
        block_graph(program, call(64, 64))
    # What only masks pairs is not needed.
    program = load(HEADS % "causal & document(doc)", params={"span": [1]}).program
    graph = block_graph(program, call(64, 64), 16, 16)
    assert (graph.full, graph.partial) == (0, 10)


# ---------------------------------------------------------------------------------- size and time


def test_a_million_tokens_are_small_and_quick() -> None:
    shape = call(1 << 20, 1 << 20)
    block_graph(load("causal").program, call(256, 256))
    for text, tiles in (("causal & window(512)", 40_950), ("causal & (window(4096) | sink(4))", 277_967)):
        program = load(text).program
        gc.disable()  # a collection of what all tests before this one keep takes as long as they please
        start = time.process_time()
        graph = block_graph(program, shape)
        taken = time.process_time() - start
        gc.enable()
        # 5 to 10 ms the first time, on a busy core too, most of it spent on the closed forms.
        assert taken < 0.25
        assert graph.tiles == tiles
        assert graph.nbytes < 1_000_000
    tracemalloc.start()
    try:
        graph = block_graph(program, shape)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert graph.nbytes <= kept < 1_000_000


def test_a_million_tokens_of_causal_have_the_right_count() -> None:
    graph = block_graph(load("causal").program, call(1 << 20, 1 << 20))
    assert (graph.full, graph.partial) == (8192 * 8191 // 2, 8192)
    assert graph.work[-1] == 8192
    with pytest.raises(ValueError, match=r"33,558,528 edges, more than 2,000,000"):
        _ = graph.graph


# ------------------------------------------------------------------------------------------ analyses


def test_networkx_graph() -> None:
    block = graph_of("causal & window(40)")
    graph = block.graph
    assert graph.number_of_nodes() == 32
    dense = block.dense()
    edges = {(q, k): data["kind"] for (_, q), (_, k), data in graph.edges(data=True)}
    names = {TileCode.FULL: "full", TileCode.PARTIAL: "partial"}
    assert edges == {(int(q), int(k)): names[TileCode(dense[q, k])] for q, k in np.argwhere(dense)}
    assert {data["bipartite"] for (side, _), data in graph.nodes(data=True) if side == "q"} == {0}


def reach_of(step: Array, layers: int) -> Array:
    """By boolean matrix products."""
    once = (step | np.eye(len(step), dtype=bool)).astype(np.int64)
    seen = np.eye(len(step), dtype=np.int64)
    for _ in range(layers):
        seen = np.minimum(seen @ once, 1)
    return seen.astype(bool)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("layers", [0, 1, 2, 5])
def test_receptive_field(text: str, layers: int) -> None:
    graph = graph_of(text)
    expected = reach_of(graph.dense() > 0, layers)
    reach = graph.receptive_field(layers)
    np.testing.assert_array_equal(reach.count, expected.sum(axis=1))
    np.testing.assert_array_equal(reach.first, expected.argmax(axis=1))
    np.testing.assert_array_equal(reach.last, 15 - expected[:, ::-1].argmax(axis=1))
    assert graph.unreachable(layers) == tuple(np.flatnonzero(~expected[-1]).tolist())


def test_windows_reach_further_with_every_layer() -> None:
    graph = graph_of("causal & window(33)")
    assert [graph.receptive_field(n).first[-1] for n in range(5)] == [15, 13, 11, 9, 7]
    assert len(graph.unreachable(8)) == 0
    assert graph.unreachable(7) == (0,)
    assert graph_of("same_block(64)").unreachable(1000) == tuple(range(12))


def test_heads_mix_between_layers() -> None:
    program = load("if h == 0 then causal & window(1) else sink(16)").program
    graph = block_graph(program, call(64, 64, heads=2), 16, 16)
    assert graph.unreachable(1) == (1, 2)


def test_layers_need_the_same_tiles_on_both_sides() -> None:
    program = load("causal").program
    for shape, block_q, block_k in ((call(32, 64), 16, 16), (call(64, 64), 16, 32)):
        with pytest.raises(ValueError, match="same tokens in the same tiles"):
            block_graph(program, shape, block_q, block_k).receptive_field(2)
    with pytest.raises(ValueError, match="-1 layers"):
        graph_of("causal").unreachable(-1)


# ------------------------------------------------------------------------------------------ pictures


def test_text_tells_kinds_apart_without_colour() -> None:
    lines = str(graph_of("causal & window(40)", n=64)).splitlines()
    assert lines[-6:-2] == ["▒▒······", "██▒▒····", "▒▒██▒▒··", "▒▒▒▒██▒▒"]
    assert "█ full" in lines[-1]
    assert any("visited" in line and "full" in line for line in lines)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("cells", [(16, 16), (5, 7), (3, 16), (1, 1), (100, 100)])
def test_scaled_pictures_keep_their_shares(text: str, cells: tuple[int, int]) -> None:
    graph = graph_of(text)
    picture = graph.picture(*cells)
    rows, columns = (min(16, n) for n in cells)
    assert picture.visited.shape == (rows, columns)
    dense = graph.dense()
    row, column = np.arange(16) * rows // 16, np.arange(16) * columns // 16
    for y, x in np.ndindex(rows, columns):
        cell = dense[np.ix_(row == y, column == x)]
        assert picture.visited[y, x] == pytest.approx((cell > 0).mean())
        assert picture.full[y, x] == pytest.approx((cell == TileCode.FULL).mean())


def test_rich_output_fits_the_console() -> None:
    for width in (40, 100):
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, color_system="truecolor", legacy_windows=False)
        console.print(graph_of("causal", n=4096))
        plain = Console(file=io.StringIO(), width=width, color_system=None)
        with plain.capture() as capture:
            plain.print(graph_of("causal", n=4096))
        assert "\x1b[" in out.getvalue()
        assert max(len(line) for line in capture.get().splitlines()) <= width
        assert "█" in capture.get()
        assert "▒" in capture.get()


class Page(HTMLParser):
    """Tags in order, and that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, Any]] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_html_is_self_contained_and_escaped(tmp_path: Path) -> None:
    text = "pattern p = { q - k < 40 and k <= q } # <script>alert(1)</script> & more"
    graph = block_graph(load(text).program, call(256, 256), 16, 16)
    html = graph.html()
    page = Page(html)
    assert "script" not in page.seen
    assert "&lt;script&gt;" in html
    assert not [value for name, value in page.attributes if name in {"src", "href", "onload", "onclick"}]
    assert "http" not in html
    assert page.seen.count("rect") > 16
    assert "query tile 10: positions 160 to 175\nkey tiles 7 to 8: positions 112 to 143\npartial" in html
    assert "full: no mask" in html
    graph.save(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == html
    notebook = graph._repr_html_()
    assert notebook.startswith("<div")
    Page(notebook)


def test_png_shows_the_tiles(tmp_path: Path) -> None:
    graph = graph_of("causal & window(40)")
    graph.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 512
    dense = graph.dense()
    scale = 512 // 16
    full, partial = ((0x14, 0x53, 0x2D), (0xE3, 0x9B, 0x3B))
    # The picture is the only place with large areas of these colours: count them, the legend's squares aside.
    for colour, code in ((full, TileCode.FULL), (partial, TileCode.PARTIAL)):
        area = np.all(pixels == colour, axis=-1).sum()
        assert abs(area - scale**2 * np.count_nonzero(dense == code)) < 200


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png or \.html"):
        graph_of("causal").save(tmp_path / "x.svg")
    assert list(tmp_path.iterdir()) == []
