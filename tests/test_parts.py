"""Looking inside programs of several parts: masks, tiles, explanations and kernels of each, by its name."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import attndsl
from attndsl.blockgraph import TileCode
from benchmarks.planning import TABLES

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning", "ignore:::triton.runtime.interpreter")

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "patterns").glob("*.attn"))
NSA = """attention nsa {
    input gate : float[b, h, q, 3] learnable
    summary = attend causal over pool(mean, 8)
    routed = attend causal & top(2, blocks(8), by = probs(summary), share = group, always = same_block(8))
    near = attend causal & window(5)
    output gate[0] * summary + gate[1] * routed + gate[2] * near
}"""
PYRAMID = """attention a {
    attend causal & { q // 4 - k // 4 < 2 }, causal & { q // 4 - k // 4 >= 2 } over pool(mean, 4, 2, visible = any)
}"""


def test_masks_of_parts() -> None:
    attn = attndsl.compile(NSA)
    assert attn.parts == ("summary", "routed", "near")
    q, k = np.arange(21)[:, None], np.arange(21)[None]
    entry = np.arange(3)[None]
    assert np.array_equal(attn.mask(21, 21, part="summary")[0], q >= 8 * entry + 7)
    assert np.array_equal(attn.mask(21, 21, part="near")[0], (k <= q) & (q - k < 5))
    plan = attn.plan(torch.randn(1, 2, 21, 16), torch.randn(1, 1, 21, 16), gate=torch.randn(1, 2, 21, 3))["top"]
    found = attn.mask(21, 21, 2, 1, part="routed", top=plan)
    chosen = (plan[0, 0].numpy()[:, None, :] == (k // 8)[..., None]).any(-1)
    assert np.array_equal(found, np.stack([chosen & (k <= q)] * 2))


def test_masks_of_parts_that_share_a_softmax() -> None:
    attn = attndsl.compile(PYRAMID)
    assert attn.parts == ("1", "2")
    q, k, entry = np.arange(11)[:, None], np.arange(11)[None], np.arange(6)[None]
    near = (k <= q) & (q // 4 - k // 4 < 2)
    far = np.any(
        [(2 * entry + i <= q) & (q // 4 - (2 * entry + i) // 4 >= 2) & (2 * entry + i < 11) for i in range(4)], 0
    )
    assert np.array_equal(attn.mask(11, 11, part="1")[0], near)
    assert np.array_equal(attn.mask(11, 11, part="2")[0], far)


@pytest.mark.parametrize("text", [
    "attend causal over pool(mean, 4)", "attend causal over pool(max, 4, 2)", "attend all over pool(mean, 5, 3)",
    "attend causal & window(9) over pool(sum, 3, visible = any)", "attend { b < 1 and k <= q + h } over pool(mean, 4)",
    "attend causal & { q // 8 - k // 8 >= 1 } over pool(mean, 2, 2)",
])  # fmt: skip
def test_tiles_of_views_are_those_of_the_mask(text: str) -> None:
    """Exhaustively at small sizes: a tile that is not visited has no pair, a full one has all."""
    attn = attndsl.compile(f"attention a {{ {text} }}")
    for rows, tokens in ((1, 1), (21, 21), (3, 22), (37, 37)):
        graph, mask = attn.blocks(rows, tokens, 4, 4, 2, 1), attn.mask(rows, tokens, 2, 1)
        entries = mask.shape[-1]
        assert graph.k_tiles == -(-entries // 4)
        for head in range(2):
            for i, row in enumerate(graph.dense(head)):
                for j, code in enumerate(row):
                    tile = mask[head, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                    assert tile.all() if code == TileCode.FULL else code == TileCode.PARTIAL or not tile.any()


def test_rows_of_padded_views() -> None:
    attn = attndsl.compile("attention a { input n : int[b] lengths n attend causal over pool(mean, 4, visible = any) }")
    found = attn.explain(30, n=torch.tensor([19])).section("rows").lines
    assert found[0] == "row 0: entries 0  [1 of 8]"
    assert found[-1] == "row 29: entries none  [0 of 8]"


def test_what_is_explained() -> None:
    attn = attndsl.compile(NSA)
    found = attn.explain(64, heads=2, kv_heads=1)
    titles = [section.title for section in found.sections]
    for part in attn.parts:
        assert {f"{part}: {title}" for title in ("rows", "simplified", "planned", "cost")} <= set(titles)
    assert found.section("summary: rows").lines[-1] == "row 63: entries 0..7  [8 of 8]"
    assert found.section("near: rows").lines[-1] == "row 63: keys 59..63  [5 of 64]"
    assert found.section("routed: rows").lines == ("give `top` to see the keys of sample rows",)
    assert "pairs: 464 of 1,024 allowed (45.31 %), 238 kFLOP" in found.section("summary: cost").lines
    said = found.section("understood").lines
    assert "summary: pairs (q, entry) in { k <= q } over pool(mean, 8)" in said
    assert said[-1] == "output gate[b, h, q, 0] * summary + gate[b, h, q, 1] * routed + gate[b, h, q, 2] * near"
    assert [line.split(":")[0] for line in found.section("before and after").lines] == [
        "pool(mean, 8)",
        "top",
        "output",
    ]
    assert found.section("kernels").lines == (", ".join(attn.kernels(2, 1)),)
    q, k = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16)
    plan = attn.plan(q, k, gate=torch.randn(1, 2, 64, 3))["top"]
    chosen = attn.explain(64, heads=2, kv_heads=1, top=plan).section("routed: rows").lines[-1]
    assert chosen.startswith("row 63: keys ")
    assert chosen.endswith("[16 of 64]")
    titles = [section.title for section in attn.explain(64, heads=2, kv_heads=1, stages=True).sections]
    assert titles[0] == "syntax"
    assert {f"{part}: {title}" for part in attn.parts for title in ("relation", "runs", "source")} <= set(titles)


@pytest.mark.parametrize(
    "text",
    [
        "top(64, tokens, share = group, by = dot(Q, K))",
        "top(4, blocks(64), per = rows(64), by = dot(mean(Q), mean(K)))",
    ],
)
def test_gradients_of_chosen_keys_can_be_read(text: str) -> None:
    """Of key tiles whose rows a list names, and which no runs tell."""
    attn = attndsl.compile(f"attention a {{ attend causal & {text} }}")
    for heads in ((8, 8), (8, 2)):
        of_keys = attn.source("dkdv", heads=heads[0], kv_heads=heads[1])
        assert "def attention_dkdv(" in of_keys and "def attention_dq(" not in of_keys


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_kernel_can_be_read(path: Path) -> None:
    try:
        attn = attndsl.api.load_attention(path)
    except attndsl.PatternError:
        return  # Its tables have no default.
    if attn.program.plain and not attn.program.observations:
        return
    names = attn.kernels(4, 2)
    assert len({*names}) == len(names)
    for name in names:
        tree = ast.parse(attn.source(name, heads=4, kv_heads=2, dim=64))
        assert any(isinstance(node, ast.FunctionDef) for node in tree.body)
    for name in (x for x in names if x.rpartition(".")[2] in ("forward", "dq")):
        ast.parse(attn.source(name, backend="cpu", heads=4, kv_heads=2, dim=64))
    assert attn.explain(256, heads=4, kv_heads=2, dim=64).sections


def test_kernels_of_every_example_with_a_key_head_each_and_one_for_all() -> None:
    for path in EXAMPLES:
        attn = attndsl.api.load_attention(path, **TABLES.get(path.stem, {}))
        for name in attn.kernels(8, 8):
            assert "def " in attn.source(name, dim=64), f"{path.stem}: {name}"
        for name in attn.kernels(8, 1):
            if "decode" in name:
                text = attn.source(name, heads=8, kv_heads=1, dim=80)
                # A list is made for one length, and sequences have lengths of their own.
                assert "def " in text and "k_tiles_" not in text, f"{path.stem}: {name}"


def test_what_there_is_not() -> None:
    attn = attndsl.compile(NSA)
    for code, question in (
        ("A535", lambda: attn.mask(8, 8)), ("A535", lambda: attn.blocks(8, 8, part="far")),
        ("A535", lambda: attndsl.compile("causal").mask(4, 4, part="near")), ("A531", lambda: attn.source()),
        ("A531", lambda: attn.source("near.backward")), ("A510", lambda: attn.source("combine", backend="cpu")),
        ("A510", lambda: attn.source("pool", backend="gluon")),
        ("A573", lambda: attn.mask(8, 8, part="routed", top=[1])),
    ):  # fmt: skip
        with pytest.raises(attndsl.PatternError, match=code):
            question()
    choice = "top(2, blocks(8), per = rows(8), by = dot(mean(Q), mean(K)), among = causal)"
    text = f"attention a {{ plan rows = {choice}\n attend causal & rows }}"
    with pytest.raises(attndsl.PatternError, match="it chooses for classes of rows"):
        attndsl.compile(text).source("rows.select")
