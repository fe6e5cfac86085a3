"""Calls recorded in CUDA graphs and replayed on new contents. Skipped without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attndsl
import attndsl.serving
from attndsl.api import load_attention
from tests.gpu import PATTERN, close, recorded, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_cuda_graph_of_a_routed_step_serves_other_lengths() -> None:
    """What is kept updated, the choice by it and the branches of NSA: recorded once, replayed at other lengths."""
    attn = attndsl.compile("examples/patterns/nsa.attn", block=16, n=4, span=40)
    torch.manual_seed(0)
    k, v = (torch.randn(2, 2, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q, gate = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16), torch.rand(2, 8, 1, 3, device="cuda")
    lengths = torch.tensor([300, 17], device="cuda", dtype=torch.int32)
    views = attn.views(k, v, lengths)

    def step() -> torch.Tensor:
        attndsl.serving.update_views(attn, views, k, v, lengths)
        out: torch.Tensor = attn.decode(q, k, v, lengths, views=views, gate=gate.to(q.dtype))
        return out

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(40):
        lengths += 1
        graph.replay()
    plans = attndsl.serving.plan(attn, q, k, v, lengths, views=views, gate=gate.to(q.dtype))
    for b, length in enumerate((340, 57)):
        alone = (x[b : b + 1, :, :length].float() for x in (k, v))
        exact = attn.reference(
            q[b : b + 1].float(), *alone, gate=gate[b : b + 1], plans={name: x[b : b + 1] for name, x in plans.items()}
        )
        torch.testing.assert_close(out[b : b + 1].double(), exact, rtol=2e-2, atol=2e-2)


def test_a_cuda_graph_of_a_paged_step_appends_evicts_and_attends() -> None:
    """Pages are taken and given back by the device: a hundred replays in a pool of nine pages a sequence."""
    attn = attndsl.compile("causal & (window(64) | sink(16))")
    cache = attndsl.serving.PagedCache(
        attn, 2, 2, 64, pages=18, max_len=4096, dtype=torch.bfloat16, device="cuda", on_device=True
    )
    generator = torch.Generator("cuda").manual_seed(0)
    every = [torch.randn(2, 2, 120, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2)]
    k, v = (x[:, :, :1].clone() for x in every)
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
    cache.append(k, v)
    cache.decode(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(k, v)
        out = cache.decode(q)
    for i in range(1, 120):
        k.copy_(every[0][:, :, i : i + 1])
        v.copy_(every[1][:, :, i : i + 1])
        graph.replay()
    assert cache.lengths == [120, 120] and cache.full is not None and not cache.full.any()
    assert close(attn, out, q, every[0], every[1])


def test_cuda_graph_replays_on_new_contents() -> None:
    attn = attndsl.compile(PATTERN)
    q, k, v = tensors(2, 4, 333, 64)
    attn(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert close(attn, out, q, k, v)


def test_torch_compile_records_graphs() -> None:
    """It runs a call in the graph's pool first: what stays of that, as the counter of its stream, is not there."""
    attn = attndsl.compile("causal & window(300)")
    compiled = torch.compile(lambda q, k, v: attn(q, k, v) * 2, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        q, k, v = tensors(2, 4, 1000, 128)
        assert close(attn, compiled(q, k, v).clone() / 2, q, k, v)


def test_a_graph_observes_probabilities() -> None:
    """Sums of keys and maxima of blocks, captured with the call, at lengths that no tile divides."""
    attn = attndsl.compile(
        f"attention a {{ x = attend {PATTERN}\n observe mass = probs(x, sum, head, tokens)\n"
        "observe map = probs(x, max, rows(64), blocks(64)) }"
    )
    q, k, v = tensors(2, 4, 333, 64)
    attn(q, k, v, return_observed=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, found = attn(q, k, v, return_observed=True)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert close(attn, out, q, k, v)
    wanted = attn.reference(q, k, v, return_observed=True)[1]
    torch.testing.assert_close(found["mass"].double(), wanted["mass"], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found["map"].double(), wanted["map"], atol=2e-2, rtol=2e-2)
    again = attn(q, k, v, return_observed=True)[1]
    assert all(torch.equal(found[name], again[name]) for name in found), "two runs agree to the bit"


DRAWN = "causal & (window(40) | random(2, of = blocks(32), per = rows(16), seed = h))"
GROWN = """attention grown { input d : int[b, k]
    attend causal & (coarsen({ d[q] == d[k] }, 32, all) | sink(2) on segment(d)) }"""


# Rows and keys in the order of ids that the graph is replayed with.
PUT_IN_ORDER = """attention documents { input d : int[b, k]
    attend causal & document(d) & window(90) }"""


@pytest.mark.parametrize("text", [DRAWN, GROWN, PUT_IN_ORDER])
def test_derived_inputs_are_captured(text: str) -> None:
    attn = load_attention(text)
    d = torch.arange(333, device="cuda").div(37, rounding_mode="floor").repeat(2, 1)
    inputs: dict[str, Any] = {"d": d} if attn.program.inputs else {}
    q, k, v = tensors(2, 4, 333, 64)
    attn(q, k, v, **inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v, **inputs)
    # Before a replay what was captured holds nothing: a call must not rest on it.
    between = attn(q, k, v, **inputs)
    assert close(attn, between, q, k, v, **inputs)
    d.copy_(torch.randint(0, 3, d.shape, device="cuda").cumsum(1) // 9)
    graph.replay()
    torch.cuda.synchronize()
    assert close(attn, out, q, k, v, **inputs)


CHOOSING: dict[str, tuple[str, dict[str, Any]]] = {
    "psa": ("examples/patterns/psa.attn", {"block": 128, "stride": 16}),
    "columns and diagonals": ("examples/patterns/vertical_slash.attn", {"columns": 40, "slashes": 60, "near": 8}),
    "tiles": (
        "attention a { axes t, y[8], x[16] attend top(4, tiles(2, 4, 8), per = tiles(2, 4, 8), "
        "by = dot(mean(Q), mean(K))) }", {},
    ),
    "segments": (
        "attention a { input c : int[b, k] attend causal & cover(0.7, segments(c), per = rows(64), "
        "by = dot(mean(Q), mean(K)), always = window(16)) }", {},
    ),
    "permuted": ("examples/patterns/pbs.attn", {"segment": 128, "block": 64}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOOSING)
def test_choices_are_deterministic(name: str) -> None:
    """Running sums have one order: torch, asked for that, refuses nothing, and a second plan is the first."""
    text, params = CHOOSING[name]
    attn = attndsl.compile(text, **params)
    q, k, _ = tensors(1, 4, 1024, 64)
    place = torch.arange(1024, device="cuda")
    inputs: dict[str, Any] = {
        "segments": {"c": (place // 50)[None]},
        "permuted": {"pi": (place // 128 * 128 + place * 37 % 128).expand(1, 4, -1).contiguous()},
    }.get(name, {})
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (attn.plan(q, k, **inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool((plan == second[key]).all()) for key, plan in first.items())


@pytest.mark.parametrize("name", CHOOSING)
def test_choices_are_captured(name: str) -> None:
    """Members that are no blocks and pyramids are chosen without waiting for the host: recorded, and replayed on new
    contents."""
    text, params = CHOOSING[name]
    attn = attndsl.compile(text, **params)
    q, k, v = tensors(1, 4, 1024, 64)
    place = torch.arange(1024, device="cuda")
    inputs: dict[str, Any] = {
        "segments": {"c": (place // 50)[None]},
        "permuted": {"pi": (place // 128 * 128 + place * 37 % 128).expand(1, 4, -1).contiguous()},
    }.get(name, {})
    attn(q, k, v, **inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v, **inputs)
        plans = attn.plan(q, k, **inputs)
    for seed in range(2):
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        # With the plan that was made: scores of bfloat16 may differ from the oracle's by their rounding.
        assert close(attn, out, q, k, v, plans={key: plan.clone() for key, plan in plans.items()}, **inputs)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attn(*leaves, **inputs).sum().backward()
        assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in leaves)


def test_a_decode_graph_serves_all_lengths() -> None:
    attn = attndsl.compile(PATTERN)
    (q, _, _), (_, k, v) = tensors(3, 8, 1, 128), tensors(3, 2, 4096, 128)
    pages = torch.randperm(3 * 256, device="cuda", dtype=torch.int32).view(3, 256)
    pools = [torch.empty(3 * 256, 2, 16, 128, device="cuda", dtype=q.dtype) for _ in (k, v)]
    keys, values = pools
    for pool, x in zip(pools, (k, v), strict=True):
        pool[pages.flatten().long()] = x.view(3, 2, 256, 16, 128).transpose(1, 2).flatten(0, 1)
    lengths = torch.ones(3, device="cuda", dtype=torch.int32)
    attn.decode(q, keys, values, lengths, pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn.decode(q, keys, values, lengths, pages)
    for known in ([4096, 1, 77], [0, 3000, 105]):
        lengths.copy_(torch.tensor(known))
        graph.replay()
        for b, length in enumerate(known):
            if length:
                assert close(attn, out[b : b + 1], q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
            else:
                assert not out[b].any()


@pytest.mark.parametrize(
    "text",
    [
        "causal & top(20, tokens, by = dot(Q, K), among = causal, share = group)",
        "causal & top(20, tokens, by = dot(Q, K), among = causal, share = heads)",
        "causal & cover(0.8, blocks(32), per = rows(32), by = antidiagonal(Q, K, 8), always = same_block(32))",
        "causal & (window(64) | random(3, of = blocks(32), per = rows(32), seed = h))",
    ],
)
def test_a_graph_of_choices_over_pages_serves_all_lengths(text: str) -> None:
    """What is chosen, or drawn, while the graph runs is what a call at those lengths takes."""
    attn = attndsl.compile(text)
    q, k, v = tensors(3, 8, 16, 64)[0], *(torch.randn(64, 2, 16, 64, device="cuda").bfloat16() for _ in "kv")
    table = torch.randperm(64, device="cuda", dtype=torch.int32)[:48].view(3, 16)
    lengths = torch.tensor([256, 40, 99], device="cuda", dtype=torch.int32)
    for _ in range(2):
        attn.decode(q, k, v, lengths, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn.decode(q, k, v, lengths, table)
    for known in ([256, 1, 77], [0, 200, 105]):
        lengths.copy_(torch.tensor(known))
        graph.replay()
        assert torch.equal(out, attn.decode(q, k, v, lengths, table)) and out.isfinite().all()


SEGMENTS, DOCUMENTS = "input c : int[k]\n", "input doc : int[b, k]\n packed doc\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{SEGMENTS} attend causal & window(40), causal - window(40) over pool(mean, segments(c), counted)",
        f"{SEGMENTS} attend causal & top(2, segments(c), among = causal, by = dot(Q, max(K)), share = group)",
        "axes y, x[8]\n attend top(3, tiles(4, 4), per = tiles(4, 4), among = all, by = dot(mean(Q), mean(K)))",
        "x = attend causal\n y = attend causal & top(20, diagonals(1), per = head, among = causal, by = probs(x))\n"
        "output y",
        f"{DOCUMENTS} x = attend causal over pool(mean, 4)\n y = attend causal & top(2, blocks(4), by = probs(x))\n"
        "output x + y",
        f"{DOCUMENTS} x = attend causal over pool(mean, 4)\n y = attend causal within blocks(8) with probs(x)\n"
        "output y",
    ],
)  # fmt: skip
def test_a_graph_of_what_each_step_makes_of_all_keys_serves_all_lengths(text: str) -> None:
    attn = attndsl.compile(f"attention a {{ {text} }}")
    q, k, v = tensors(3, 8, 5, 64)[0], *(torch.randn(64, 2, 16, 64, device="cuda").bfloat16() for _ in "kv")
    table = torch.randperm(64, device="cuda", dtype=torch.int32)[:48].view(3, 16)
    lengths = torch.tensor([256, 40, 99], device="cuda", dtype=torch.int32)
    token = torch.arange(256, device="cuda")
    given: dict[str, Any] = {"c": token // 9, "doc": (token // 37).expand(3, -1)}
    given = {name: x for name, x in given.items() if f"input {name} " in text}
    for _ in range(2):
        attn.decode(q, k, v, lengths, table, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn.decode(q, k, v, lengths, table, **given)
    for known in ([256, 1, 77], [0, 200, 105]):
        lengths.copy_(torch.tensor(known))
        graph.replay()
        assert torch.equal(out, attn.decode(q, k, v, lengths, table, **given)) and out.isfinite().all()


LEARNED = """attention learned { input sinks : float[h] learnable
    input bias : float[h, 65] learnable
    input table : float[h, 8, 8] learnable
    softmax with sink sinks[h]
    score s + bias[h, clamp(q - k, 0, 64)] + table[h, q % 8, k % 8]
    attend causal & window(100) }"""


def test_a_graph_of_training_steps_replays_on_new_contents() -> None:
    """Forward and backward, gradients of learnable inputs included, captured once."""
    attn = attndsl.compile(LEARNED)
    given = [x.requires_grad_() for x in tensors(1, 2, 300, 64)]
    learned = [torch.randn(2, *size, device="cuda", requires_grad=True) for size in ((), (65,), (8, 8))]
    inputs: dict[str, Any] = dict(zip(("sinks", "bias", "table"), learned, strict=True))

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attn(*given, **inputs).float().square().sum(), (*given, *learned))

    graph, captured = recorded(gradients)
    with torch.no_grad():
        for x in (*given, *learned):
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for found, again in zip(captured, gradients(), strict=True):
        assert torch.equal(found, again)


# Parameters, and the sizes of inputs.
ROUTED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "moba": ({"block": 64, "n": 3}, {}),
    "nsa": ({"block": 16, "n": 4, "span": 40}, {"gate": (1, 8, 1000, 3)}),
    "xattention": ({"block": 64, "stride": 16}, {}),
    "hsa": ({}, {"summary": (1, 2, 16, 64)}),
}


@pytest.mark.parametrize("name", ROUTED)
def test_a_graph_of_routed_training_steps_replays_on_new_contents(name: str) -> None:
    """Choice, lists, views, branches and all gradients, in one graph. It is replayed before it is compared: a plan of
    the contents that it was captured with would show."""
    params, sizes = ROUTED[name]
    attn = attndsl.compile(f"examples/patterns/{name}.attn", **params)
    q, k, v = tensors(1, 8, 1000, 64)
    leaves = [q, k[:, :2].contiguous(), v[:, :2].contiguous()]
    inputs: dict[str, Any] = {
        name: torch.randn(size, device="cuda", dtype=torch.bfloat16) for name, size in sizes.items()
    }
    leaves += inputs.values()
    for x in leaves:
        x.requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        out = attn(*leaves[:3], **inputs)
        return torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True, materialize_grads=True)

    graph, captured = recorded(gradients)
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for found, again in zip(captured, gradients(), strict=True):
        assert torch.equal(found, again)
