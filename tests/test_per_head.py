"""Heads that differ: one kernel for all, those with the most tiles first, tables known at call time or before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from attndsl.codegen.triton_forward import forward_source
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import Tiling
from attndsl.program import CallShape
from attndsl.targets import make_spec
from attndsl.tiling import heavy_tiles
from tests.accuracy import check
from tests.tiling import call, check_tiles

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

DUO = """attention duo(sinks = 4, span = 16) { input full : bool[g]
    attend causal & (if full[g] then all else sink(sinks) | window(span)) }"""
SPANS = "attention spans(span : int[h]) { attend causal & (window(span[h]) | sink(2)) }"
MOA = """attention moa(alpha : int[h], beta : int[h]) {
    attend { k <= q and (k < S or q - k < C - S)
             where C = 8 * ((max(16, min(alpha[h] + beta[h] * Nk // 64, Nk)) + 7) // 8), S = min(C, 8) } }"""
S2 = """pattern s2(block = 8, near = 2, v = 3, off = 1, dense = 1) = causal &
    (if h >= H - dense then all else (window(near) | { (k + g * max(1, v // H) + off) % v == 0 }) on blocks(block))"""
LONGLORA = "causal & (if h < H // 2 then same_block(Nk // 4 + 1) else same_block(Nk // 4 + 1, Nk // 8))"


class Pointer:
    """An array as a kernel addresses it."""

    def __init__(self, values: Any, at: Any = 0) -> None:
        self.values, self.at = np.asarray(values).ravel(), at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.values, self.at + offset)


def heads_in_order(text: str, heads: int, kv_heads: int, batch: int, n: int, given: Mapping[str, Any]) -> list[Any]:
    """The batch entry, head and tile of each program of a printed kernel, by its own lines on numpy arrays."""
    params: dict[str, Any] = {k: v for k, v in given.items() if isinstance(v, list)}
    program = attndsl.compile(text, **params).program
    spec = make_spec("sm_80", "triton", heads, kv_heads, 64)
    source = forward_source(forward_plans(program, spec, Tiling(16, 16))[0])
    lines = source.partition("q_tiles = ")[2].partition("q_first = ")[0].splitlines()
    body = "\n".join(line.strip() for line in ("q_tiles = " + lines[0], *lines[1:]))
    body = re.sub(r"\.to\(tl\.int(32|64)\)", "", body)
    pointers = {f"{k}_table" if isinstance(v, list) else f"{k}_ptr": Pointer(v) for k, v in given.items()}
    strides = {f"{k}_stride_0": 1 for k in given} | {f"{k}_size_0": len(v) for k, v in given.items()}
    tiles, found = -(-n // 16), []
    for number in range(batch * heads * tiles):
        tl = SimpleNamespace(
            arange=np.arange, minimum=np.minimum, maximum=np.maximum, where=np.where, int32=np.int32, int64=np.int64,
            sum=lambda x, axis: x.sum(axis), load=lambda p: p.values[p.at], cdiv=lambda a, b: -(-a // b),
            num_programs=lambda _: batch * heads * tiles, program_id=lambda _, number=number: number,
        )  # fmt: skip
        known: dict[str, Any] = {"tl": tl, "rows": n, "k_len": n, "BLOCK_Q": 16, "BLOCK_K": 16, **pointers, **strides}
        exec(body, known)
        found.append((int(known["b"]), int(known["h"]), int(known["q_tile"])))
    return found


GIVEN: list[tuple[str, int, int, dict[str, Any], list[int]]] = [
    (DUO, 6, 3, {"full": np.array([False, True, False])}, [2, 3, 0, 1, 4, 5]),
    (SPANS, 5, 5, {"span": [20, 200, 7, 200, 90]}, [1, 3, 4, 0, 2]),
    (LONGLORA, 4, 2, {}, [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("text", "heads", "kv_heads", "given", "order"), GIVEN, ids=["duo", "spans", "longlora"])
def test_heads_with_more_tiles_come_first(
    text: str, heads: int, kv_heads: int, given: dict[str, Any], order: list[int]
) -> None:
    batch, n = 2, 200
    found = heads_in_order(text, heads, kv_heads, batch, n, given)
    tiles = -(-n // 16)
    assert sorted(found) == [(b, h, t) for b in range(batch) for h in range(heads) for t in range(tiles)]
    of_heads = found[::tiles]
    assert all(t == tiles - 1 for _, _, t in of_heads)
    first = [h for b, h, _ in of_heads if b == 0]
    if text != LONGLORA:
        assert first == order
        assert [b for b, _, _ in of_heads] == [0, 1] * heads


def test_heads_that_do_not_differ_are_not_ranked() -> None:
    assert "every = " not in attndsl.compile("causal & window(100)").source()
    assert (
        "every = " not in attndsl.compile("attention a { input doc : int[b, k] sorted attend document(doc) }").source()
    )
    assert "every = " in attndsl.compile(DUO).source()


CALLS: list[tuple[str, str, int, int, dict[str, Any], dict[str, Any]]] = [
    ("duo", DUO, 6, 3, {}, {"full": torch.tensor([False, True, False])}),
    ("spans", SPANS, 5, 5, {"span": [20, 200, 7, 200, 33]}, {}),
    ("moa", MOA, 3, 1, {"alpha": [-20, 8, 40], "beta": [30, 0, 16]}, {}),
    ("s2", S2, 4, 2, {}, {}),
    ("longlora", LONGLORA, 4, 2, {}, {}),
]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("name", "text", "heads", "kv_heads", "params", "inputs"), CALLS, ids=[c[0] for c in CALLS])
def test_outputs_and_gradients(
    name: str, text: str, heads: int, kv_heads: int, params: dict[str, Any], inputs: dict[str, Any], backend: str
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backend == "cpu" and device.type == "cuda":
        pytest.skip("takes tensors on the CPU")
    attn = attndsl.compile(text, **params)
    for batch, rows, k_len in ((2, 40, 40), (1, 1, 1), (1, 5, 70)):
        generator = torch.Generator().manual_seed(rows)
        q, k, v = (
            torch.randn(batch, h, n, 16, generator=generator).to(device).requires_grad_()
            for h, n in ((heads, rows), (kv_heads, k_len), (kv_heads, k_len))
        )
        given = {key: x.to(device) for key, x in inputs.items()}
        out, lse = attn(q, k, v, backend=backend, return_lse=True, **given)
        on_host = [x.detach().cpu() for x in (q, k, v, out, lse)]
        check(attn.program, on_host[0], on_host[1], on_host[2], inputs, {}, on_host[3], on_host[4])
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        right = torch.autograd.grad(attn.reference(*exact, **given).square().sum(), exact)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


def test_sink_tiles_start_first_whichever_heads_stream() -> None:
    spec, shape = make_spec("sm_80", "triton", 4, 2, 64), CallShape(1, 4, 2, 400, 400, 64, 64)
    (plan,) = backward_plans(attndsl.compile(DUO).program, spec, (Tiling(16, 16), Tiling(16, 16)))
    assert heavy_tiles(plan, shape) == 1
    spans = attndsl.compile(SPANS, span=[20, 200, 7, 200]).program
    (plan,) = backward_plans(spans, spec, (Tiling(16, 16), Tiling(16, 16)))
    assert heavy_tiles(plan, shape) == 0, "no truth to try"


@pytest.mark.parametrize("full", [(True, False), (False, False), (True, True)])
def test_tables_at_call_time_need_no_kernel_of_their_own(full: tuple[bool, ...]) -> None:
    program = attndsl.compile(DUO).program
    check_tiles(program, call(70, 70, heads=4, kv_heads=2), 16, 32, {"full": np.array(full)})
