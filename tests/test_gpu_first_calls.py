"""Graphs that are captured before a program was ever called: all that outlives the call is made outside. Skipped
without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from tests.gpu import tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOKENS = 700


def place() -> Tensor:
    return torch.arange(TOKENS, device="cuda")


# Parameters, and what a call is given. What is kept of each: nothing but a counter; a table of spans; blocks that are
# drawn; a map of blocks; what tiles a list may name, of tiles and of gathered rows; budgets of heads.
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "window": ("causal & window(300)", {}, dict),
    "table": (
        "attention a(span : int[h]) { attend causal & window(span[h]) }", {"span": [16, 100, 300, 700]}, dict,
    ),
    "drawn": ("causal & (window(40) | random(2, of = blocks(32), per = rows(32), seed = h))", {}, dict),
    "coarse": ("causal & coarsen({ (q * k) % 7 < 2 }, 64, fraction(0.29))", {}, dict),
    "documents": (
        "attention a { input d : int[b, k] sorted  attend causal & document(d) }", {},
        lambda: {"d": place()[None] // 90},
    ),
    "put in order": (
        "attention a { input d : int[b, k]  attend causal & document(d) & window(90) }", {},
        lambda: {"d": place()[None] % 9},
    ),
    "listed": (
        "attention a { input p : blocks(64)[b, g, q/64]  attend causal & p }", {},
        lambda: {"p": torch.stack([place()[:11] // 3, place()[:11]], -1).int().expand(1, 2, -1, -1).contiguous()},
    ),
    "moba": ("examples/patterns/moba.attn", {"block": 64, "n": 3}, dict),
    "budgets": (
        "attention a(n : int[h]) { attend causal & top(n[h], blocks(64), by = dot(mean(Q), mean(K)), per = rows(64)) }",
        {"n": [1, 2, 3, 4]}, dict,
    ),
    "nsa": (
        "examples/patterns/nsa.attn", {"block": 16, "n": 4, "span": 40},
        lambda: {"gate": torch.rand(1, 4, TOKENS, 3, device="cuda", dtype=torch.bfloat16)},
    ),
}  # fmt: skip


def leaves() -> list[Tensor]:
    q, k, v = tensors(1, 4, TOKENS, 64)
    return [x.contiguous().requires_grad_() for x in (q, k[:, :2], v[:, :2])]


def refill(tensors: list[Tensor], seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for x in tensors:
            x.normal_(generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_captured_from_the_first_call(name: str) -> None:
    """What a replay finds is what a call finds, also after calls that make programs forget what they kept."""
    text, params, make = CASES[name]
    attn, given, inputs = attndsl.compile(text, **params), leaves(), make()
    # Torch's own: its first product opens a library, which no capture allows.
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")

    def step() -> tuple[Tensor, ...]:
        out = attn(*given, **inputs)
        return out, *torch.autograd.grad(out.float().square().sum(), given)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(2):
        refill(given, seed)
        graph.replay()
        torch.cuda.synchronize()
        assert captured[0].any() and all(bool(x.isfinite().all()) for x in captured)
        for found, again in zip(captured, step(), strict=True):
            assert torch.equal(found, again)


@pytest.mark.parametrize("name", CASES)
def test_torch_compile_records_a_program_that_was_never_called(name: str) -> None:
    text, params, make = CASES[name]
    attn, given, inputs = attndsl.compile(text, **params), leaves(), make()
    # One function of the tests, of which it compiles so many kinds of call.
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attn(q, k, v, **inputs)
        return out * 2

    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        refill(given, seed)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        out = compiled(*given)
        gradients = torch.autograd.grad(out.float().sum(), given)
        found = [x.clone() for x in (out, *gradients)]
        wanted = call(*given)
        for x, y in zip(found, (wanted, *torch.autograd.grad(wanted.float().sum(), given)), strict=True):
            # Gradients of several branches are added up in an order of the graph's own.
            torch.testing.assert_close(
                x, y, **({"rtol": 2e-2, "atol": 2e-2} if name == "nsa" else {"rtol": 0, "atol": 0})
            )
