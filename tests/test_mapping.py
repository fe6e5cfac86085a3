"""Tiles that unsorted data rules out: the map of them, the lists made of it, and what kernels then compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from attndsl.derive import derive, own_inputs
from attndsl.grammar import load
from attndsl.mapping import mapped, maps_call
from attndsl.oracle import mask
from attndsl.plan import Tiling, backward_plan, forward_plan
from attndsl.program import CallShape
from attndsl.runtime.derive import Deriver
from attndsl.targets import make_spec
from tests.gradients import judge
from tests.strategies import Case
from tests.test_backward_cpu import runner as cpu
from tests.test_backward_triton import runner as triton

RNG = np.random.default_rng(11)
N = 192


def ids(*size: int) -> np.ndarray[Any, Any]:
    return RNG.integers(0, 4, (*size[:-1], -(-size[-1] // 16))).repeat(16, -1)[..., : size[-1]].astype(np.int32)


def intervals(*size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Two intervals of hidden rows a key, of 16 keys alike."""
    ends = np.sort(RNG.integers(0, size[-1] + 1, (*size[:-1], size[-1] // 16, 2, 2)), axis=-1).astype(np.int32)
    ends = ends.repeat(16, axis=-3)
    return {"lo": ends[..., 0], "hi": ends[..., 1]}


MAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "documents": ("attention a { input doc : int[b, k]\n attend causal & document(doc) }", {"doc": ids(2, N)}),
    "last rows": (
        "attention a { input until : int[b, h, k]\n attend causal & { q <= until[k] } }",
        {"until": (np.arange(N) + RNG.integers(30, 60, (2, 2, N))).astype(np.int32)},
    ),
    "hidden rows": (
        """attention a { input lo : int[b, h, k, 2]
        input hi : int[b, h, k, 2]
        attend { not (lo[k, 0] <= q < hi[k, 0]) and not (lo[k, 1] <= q < hi[k, 1]) } }""",
        intervals(2, 2, N),
    ),
    "global tokens": (
        "attention a { input flag : bool[b, k]\n attend causal & (window(9) | global_tokens(flag)) }",
        {"flag": np.arange(N)[None] % 61 == np.array([[7], [50]])},
    ),
    "near in another order": (
        "attention a { input at : int[k]\n attend { -20 < at[q] - at[k] < 30 and min(k, at[q]) < 150 } | {q == k} }",
        {"at": (np.arange(N)[::-1] + RNG.integers(-3, 4, N)).astype(np.int32)},
    ),
    "tables": (
        """attention a { input ok : bool[b, h, q/16, k/16]
        attend causal & ({ ok[b, h, q // 16, k // 16] } | window(9)) }""",
        {"ok": RNG.random((2, 2, N // 16, N // 16)) < 0.3},
    ),
    "kinds": (
        "attention a { input kind : int[b, k] input ok : bool[4, 4]\n attend causal & { ok[kind[q], kind[k]] } }",
        {"kind": ids(2, N), "ok": np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], bool)},
    ),
    "diagonals": (
        "attention a { input near : bool[b, k]\n attend causal & { near[b, (q - k) // 2] } }",
        {"near": np.arange(N)[None] % 48 < np.array([[20], [24]])},
    ),
    "choices of documents": (
        """attention a { input doc : int[b, k] input chosen : blocks(16)[b, h, q/16]
        packed doc attend causal & chosen }""",
        {
            "doc": np.searchsorted([80, 101, 150], np.arange(N), "right")[None].repeat(2, 0).astype(np.int32),
            "chosen": (RNG.random((2, 2, N, N // 16)) < 0.5).astype(np.uint8),
        },
    ),
}  # fmt: skip


def case(name: str, rows: int = N) -> Case:
    text, inputs = MAPPED[name]
    return Case(text, {}, inputs, {}, CallShape(2, 2, 1, rows, N, 16, 16))


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize(("rows", "block_k"), [(N, 16), (100, 16), (33, 128)])
def test_a_map_holds_every_tile_and_few_others(name: str, rows: int, block_k: int) -> None:
    """Wherever the rows of a call begin, and where the last tile has keys that do not exist."""
    program = load(MAPPED[name][0]).program
    assert mapped(derive(program))
    spec = make_spec("sm_90", "triton", 2, 1, 64)
    plan = forward_plan(program, replace(spec, maps=True), Tiling(16, block_k))
    decl = next(d for d in plan.program.inputs if d.name.startswith("map_"))
    shape = CallShape(2, 2, 1, rows, N, 64, 64)
    given = [torch.from_numpy(np.asarray(MAPPED[name][1][d.name])) for d in own_inputs(program)]
    deriver = Deriver(plan.program, shape, torch.device("cpu"), given=given)
    names = [d.name for d in plan.program.inputs if d.derivation]
    at = names.index(decl.name)
    found = deriver(given, [])[at]
    assert (found.shape, found.dtype) == (deriver.examples()[at].shape, torch.uint8)
    q_tiles, k_tiles = -(-rows // 16), -(-N // block_k)
    tiles = np.broadcast_to(found.numpy().reshape(*_lead(found), q_tiles, k_tiles), (2, 2, q_tiles, k_tiles))
    allowed = mask(program, shape, MAPPED[name][1])
    ragged = ((0, 0), (0, 0), (0, q_tiles * 16 - rows), (0, k_tiles * block_k - N))
    split = (2, 2, q_tiles, 16, k_tiles, block_k)
    # Rows that do not exist may see anything; keys that do not exist may not be seen.
    every = np.pad(np.pad(allowed, (*ragged[:3], (0, 0)), constant_values=True), (*ragged[:2], (0, 0), ragged[3]))
    assert (tiles[np.pad(allowed, ragged).reshape(split).any(axis=(3, 5))] >= 1).all()
    assert np.all(every.reshape(split).all(axis=(3, 5)) | (tiles != 2))
    if block_k == 16:
        # Bounds are not exact, but they spare something, and know some tiles to be full.
        assert (tiles > 0).sum() < 0.9 * tiles.size
        if name != "choices of documents" or rows == N:
            assert (tiles == 2).any() == (name != "global tokens")


def _lead(found: torch.Tensor) -> tuple[int, int]:
    return {2: (1, 1), 3: (2, 1), 4: (2, 2)}[found.dim()]


@pytest.mark.parametrize("name", MAPPED)
def test_gradients_on_the_cpu(name: str) -> None:
    judge(cpu(), case(name), torch.float64)


@pytest.mark.parametrize("name", ["documents", "hidden rows", "global tokens", "tables", "kinds", "diagonals"])
def test_gradients_in_triton(name: str) -> None:
    judge(triton(), case(name), torch.float32)


def test_choices_of_long_documents_visit_little() -> None:
    """Four tiles of 64 for each of two members: members begin in the middle of tiles, and so do row classes."""
    program = load("""attention a { input doc : int[b, k] input chosen : blocks(64)[b, q/64]
        packed doc attend chosen }""").program
    doc = torch.searchsorted(torch.tensor([1000, 2056]), torch.arange(4096), right=True)[None]
    chosen = torch.tensor([[[3, 9]]]).expand(1, 4096, 2)
    plan = forward_plan(program, replace(make_spec("sm_90", "triton", 1, 1, 64), maps=True), Tiling(64, 64))
    shape, own = CallShape(1, 1, 1, 4096, 4096, 64, 64), [doc, chosen]
    made = Deriver(plan.program, shape, torch.device("cpu"), given=own)(own, [])
    names = [d.name for d in plan.program.inputs if d.derivation]
    tiles = made[next(i for i, name in enumerate(names) if name.startswith("map_"))] > 0
    visited = tiles.sum(-1).flatten()
    # Of rows of two documents the tiles are those between their members.
    assert int(visited[:15].max()) <= 4 and int(visited[33:].max()) <= 4 and int(visited.max()) <= 40


@pytest.mark.parametrize("rows", [128, 64, 50, 1])
def test_chunks(rows: int) -> None:
    """Lists are read wherever the rows of a call begin."""
    chosen = case("last rows", rows)
    assert maps_call(chosen.load(), chosen.shape)
    judge(cpu(), chosen, torch.float64)


def test_calls_of_many_tiles_are_not_mapped() -> None:
    program = MAPPED["last rows"][0]
    assert not maps_call(load(program).program, CallShape(1, 64, 64, 1 << 16, 1 << 16, 64, 64))


def test_lists_are_read_by_both_kernels() -> None:
    program = load(MAPPED["documents"][0]).program
    spec = replace(make_spec("sm_90", "triton", 2, 1, 64), maps=True)
    plan = backward_plan(program, spec, Tiling(64, 64))
    assert all(run.list is not None for runs in (plan.runs, plan.key_runs) for run in runs.full + runs.partial)
    odd = backward_plan(program, replace(spec, maps=False), Tiling(64, 64))
    assert all(run.list is None for runs in (odd.runs, odd.key_runs) for run in runs.full + runs.partial)


def test_what_is_not_mapped() -> None:
    for text in (
        "causal & window(9)",
        "attention a { input doc : int[b, k] sorted\n attend causal & document(doc) }",
        "attention a { input pi : int[k]\n attend causal & window(9) on pi }",
        "attention a { input bias : int[k]\n attend { bias[q + k] > 0 } }",
        "attention a { input span : int[h]\n attend causal & window(span[h]) }",
    ):
        assert not mapped(load(text).program), text


@pytest.mark.parametrize("rows", [192, 100])
def test_full_tiles_are_not_masked(rows: int) -> None:
    """A list has the tiles of which the map says that they are whole before the others."""
    chosen = case("last rows", rows)
    program = chosen.load()
    plan = forward_plan(program, replace(make_spec("sm_90", "triton", 2, 1, 64), maps=True), Tiling(16, 16))
    given = [torch.from_numpy(chosen.inputs[d.name]) for d in own_inputs(program)]
    values = Deriver(plan.program, chosen.shape, torch.device("cpu"))(given, [])
    made = dict(zip((d.name for d in plan.program.inputs if d.derivation), values, strict=True))
    tiles, lists = (next(x for name, x in made.items() if name.startswith(start)) for start in ("map_", "k_tiles"))
    q_tiles, k_tiles = tiles.shape[-2:]
    for b, h, tile in np.ndindex(2, 2, q_tiles):
        row, own = lists[b, h], tiles[b, h, tile]
        begin, middle, end = row[3 * tile : 3 * tile + 3].tolist()
        assert row[begin:middle].tolist() == [i for i in range(k_tiles) if own[i] == 2]
        assert row[middle:end].tolist() == [i for i in range(k_tiles) if own[i] == 1]


def test_work_follows_the_map() -> None:
    """Tiles that the map rules out are not looked at: keys there may hold anything."""
    attn = attndsl.compile(MAPPED["documents"][0])
    doc = torch.arange(1024)[None] // 256 % 2  # documents 0, 1, 0, 1
    q, k, v = torch.randn(1, 1, 1024, 16), torch.randn(1, 1, 1024, 16), torch.randn(1, 1, 1024, 16)
    k[:, :, 256:512] = torch.nan
    out = attn(q, k, v, doc=doc)
    # Rows of document 0 skip the whole of document 1; a masked tile would have spread its NaN to nothing else either,
    # but rows of document 1 read it.
    assert out[:, :, :256].isfinite().all()
    assert out[:, :, 512:768].isfinite().all()
    assert out[:, :, 256:512].isnan().any()
