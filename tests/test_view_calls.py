"""Calls of programs with views, parts and branches, and their gradients, against the oracle's in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.branches import Pool, PoolFunction
from attndsl.runtime.pool import pooled
from tests.gradients import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

# What is attended; inputs are declared where their names occur.
TOP = "top(2, blocks(8), by = dot(Q, mean(K)), always = same_block(8))"
PARTS = [
    "causal over pool(mean, 4)",
    "causal over pool(max, 4, 2)",
    "causal over pool(min, 2, 3)",
    "causal over pool(sum, 3, visible = any) { softmax with sink sinks[h] }",
    "all over pool(mean, 5, counted)",
    "all over pool(mean, 5, counted, visible = any) { score softcap(s, 2.0) * (1 + sinks[h]) }",
    "{ b < 1 and k <= q + h } over pool(mean, 4)",
    "causal & window(4), causal over pool(mean, 4)",
    "causal & { q // 4 - k // 4 < 2 }, { q // 4 - k // 4 >= 2 } over pool(mean, 4, counted) { softmax with sink 0.25 }",
    "causal over pool(mean, 2), causal over pool(mean, 4), causal over pool(mean, 8)",
    "causal & dilated(4), causal over pool(mean, 4), causal over pool(mean, 4) { weights sigmoid(s) }",
    "causal & coarsen(window(5), 4, any), causal over pool(mean, 4)",
    "causal & document(doc), causal & { q >= doc[q] } over pool(mean, 4)",
    "causal & { q // 4 - k // 4 < 2 }, causal & { q // 4 - k // 4 >= 2 } over given(kc, vc, 4)",
    "causal, causal & { keep[k // 8] } over pool(mean, 4)",
    f"causal & {TOP}, causal over pool(mean, 8)",
]
OUTPUTS = [
    "far = attend causal over pool(mean, 4)\n near = attend causal & window(4)\n output merge(far, near)",
    "far = attend causal over pool(mean, 4)\n near = attend causal & window(4) { weights sigmoid(s) }\n"
    "both = attend causal, causal over pool(max, 4)\n"
    "output sigmoid(gates[0]) * far + channels * near - both / (2 + gates[1] * gates[1]) + heads[g]",
    "near = attend causal & window(4)\n output merge(near, given(channels, gates[2]))",
    f"plan sel = {TOP.replace('by', 'among = causal, by')}\n"
    "attend causal & sel, causal - sel over pool(mean, 8, counted)",
    f"far = attend causal over pool(mean, 8)\n routed = attend causal & {TOP}\n output merge(far, routed)",
    "align start\n cross = attend all over pool(mean, 4), band(2, 2) over pool(max, 3, visible = any)\n output -cross",
]
INPUTS: dict[str, tuple[str, Callable[..., tuple[int, ...]]]] = {
    "sinks": ("float[h] learnable", lambda b, h, g, n, m, d, e: (h,)),
    "gates": ("float[b, h, q, 3] learnable", lambda b, h, g, n, m, d, e: (b, h, n, 3)),
    "channels": ("float[b, h, q, Dv] learnable", lambda b, h, g, n, m, d, e: (b, h, n, e)),
    "heads": ("float[g] learnable", lambda b, h, g, n, m, d, e: (g,)),
    "kc": ("float[b, g, k/4, D] learnable", lambda b, h, g, n, m, d, e: (b, g, -(-m // 4), d)),
    "vc": ("float[b, g, k/4, Dv] learnable", lambda b, h, g, n, m, d, e: (b, g, -(-m // 4), e)),
    "keep": ("bool[b, k/8]", lambda b, h, g, n, m, d, e: (b, -(-m // 8))),
    "doc": ("int[b, k] sorted", lambda b, h, g, n, m, d, e: (b, m)),
}
# batch, heads, key heads, rows, keys, D, Dv
SHAPES = [(2, 4, 2, 37, 37, 16, 16), (1, 2, 1, 1, 1, 16, 24), (1, 3, 3, 3, 38, 40, 16)]


def text_of(body: str) -> str:
    body = body if "attend" in body else f"attend {body}"
    declared = "".join(f"input {name} : {kind}\n" for name, (kind, _) in INPUTS.items() if name in body)
    return f"attention a {{\n{declared}{body}\n}}"


def leaves(attn: attndsl.Attention, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    batch, heads, kv_heads, rows, k_len, dim, v_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    qkv = [draw(batch, heads, rows, dim), draw(batch, kv_heads, k_len, dim), draw(batch, kv_heads, k_len, v_dim)]
    names = [decl.name for decl in attn.program.inputs if decl.name in INPUTS]
    inputs: dict[str, Any] = {name: draw(*INPUTS[name][1](*shape)) for name in names}
    if "keep" in inputs:
        inputs["keep"] = inputs["keep"].detach() > 0
    if "doc" in inputs:
        inputs["doc"] = torch.arange(k_len)[None].repeat(batch, 1) // 5
    declared = {decl.name for decl in attn.program.inputs}
    if "runs" in declared:
        inputs["runs"] = (torch.rand(batch, kv_heads, k_len, generator=generator) < 0.2).cumsum(2).to(torch.int32)
    if "picked" in declared:
        # Some are no tokens, and some come twice.
        inputs["picked"] = torch.randint(-1, k_len + 1, (batch, kv_heads, 9), generator=generator).to(torch.int32)
    return qkv, inputs


def judge(
    attn: attndsl.Attention, shape: tuple[int, ...], dtype: torch.dtype, backend: str, dropout: float = 0.0
) -> None:
    """Assert that output, lse and gradients are the oracle's."""
    (q, k, v), inputs = leaves(attn, shape, dtype)
    given = (q, k, v, *(x for x in inputs.values() if x.is_floating_point()))
    right = [x.detach().double().requires_grad_() for x in given]
    with_lse = all(branch.weights is None for branch in attn.program.branches) and attndsl.compose.has_lse(attn.program)
    drops: dict[str, Any] = {"dropout": dropout, "seed": 11} if dropout else {}
    found = attn(q, k, v, return_lse=with_lse, backend=backend, **inputs, **drops)
    exact = dict(zip((name for name, x in inputs.items() if x.is_floating_point()), right[3:], strict=True))
    expected = attn.reference(*right[:3], return_lse=with_lse, **{**inputs, **exact, **drops})
    found, expected = (found, expected) if with_lse else ((found,), (expected,))
    tolerance = TOLERANCE[dtype]
    loss, right_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x.double(), y, atol=tolerance * 10, rtol=tolerance * 10)
        weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        loss = loss + torch.where(y == -torch.inf, 0.0, x.double() * weight).sum()
        right_loss = right_loss + torch.where(y == -torch.inf, 0.0, y * weight).sum()
    gradients = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
    right_gradients = torch.autograd.grad(right_loss, right, allow_unused=True, materialize_grads=True)
    for x, y in zip(gradients, right_gradients, strict=True):
        largest = max(float(y.abs().max()) if y.numel() else 0.0, 1.0)
        assert float((x.double() - y).abs().max()) <= 5 * tolerance * largest


@pytest.mark.parametrize("body", PARTS + OUTPUTS)
def test_cpu(body: str) -> None:
    attn = attndsl.compile(text_of(body))
    for shape in (SHAPES[1], SHAPES[len(body) % 2 * 2]):
        judge(attn, shape, torch.float64, "cpu")


@pytest.mark.parametrize("body", PARTS + OUTPUTS)
def test_triton(body: str) -> None:
    shape = SHAPES[(len(body) // 2) % len(SHAPES)]
    judge(attndsl.compile(text_of(body)), shape, torch.float32, "triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_dropout(backend: str) -> None:
    """Of entries too, parts and weights: the pairs that the oracle drops."""
    dtype = torch.float64 if backend == "cpu" else torch.float32
    for i, body in enumerate((PARTS[1], PARTS[8], PARTS[10], OUTPUTS[1], OUTPUTS[3])):
        if backend == "cpu" or i % 2 == 0:
            judge(attndsl.compile(text_of(body)), (2, 4, 2, 19, 21, 16, 16), dtype, backend, dropout=0.4)


def test_entries_do_not_go_with_tokens() -> None:
    """An entry is dropped by its own draw, not by that of the token of its number, and rows of a chunk are the same."""
    attn = attndsl.compile("attention a { attend all over pool(mean, 1) { weights 1 } }")
    raw = attndsl.compile("attention a { weights 1\n attend all }")
    q, k = torch.zeros(2, 1, 3, 64, 64)
    kept, of_tokens = (x(q, k, torch.eye(64).expand_as(k), dropout=0.5, seed=5) > 0 for x in (attn, raw))
    assert 0.45 < float(kept.double().mean()) < 0.55
    assert 0.45 < float((kept == of_tokens).double().mean()) < 0.55
    some = attn(q[:, :, -5:], k, torch.eye(64).expand_as(k), dropout=0.5, seed=5) > 0
    assert torch.equal(some, kept[:, :, -5:])


def test_several_tiles_of_entries() -> None:
    """Runs of full and of partial tiles."""
    attn = attndsl.compile("attention a { attend causal & window(8), causal over pool(mean, 2) }")
    judge(attn, (1, 2, 1, 300, 300, 16, 16), torch.float64, "cpu")
    judge(attn, (1, 1, 1, 260, 260, 16, 16), torch.float32, "triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_no_keys_and_no_rows(backend: str) -> None:
    attn = attndsl.compile("attention a { attend causal & window(4), causal over pool(mean, 4) }")
    for rows, k_len in ((0, 0), (0, 5), (3, 0)):
        q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (rows, k_len, k_len))
        out, lse = attn(q, k, v, return_lse=True, backend=backend)
        assert out.shape == (1, 2, rows, 16)
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        out.sum().backward()
        assert k.grad is not None
        assert not k.grad.any()


def test_a_chunk_is_the_same_rows_of_the_whole() -> None:
    attn = attndsl.compile("attention a { attend causal & window(4), causal over pool(mean, 4, 2) }")
    q, k, v = (torch.randn(1, 2, 21, 16, dtype=torch.float64) for _ in range(3))
    whole = attn(q, k, v)
    for n in (1, 2, 7, 8, 20):
        torch.testing.assert_close(attn(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n]), whole[:, :, n - 1 : n])


@pytest.mark.parametrize("function", PoolFunction)
@pytest.mark.parametrize(("size", "stride"), [(4, 4), (7, 3), (3, 5), (100, 50)])
def test_pooling_kernels(function: PoolFunction, size: int, stride: int) -> None:
    """Against torch, on numbers among which many are equal, tokens outside heads in memory."""
    attn, pool = attndsl.compile("attention a { attend causal over pool(mean, 4) }"), Pool(function, size, stride)
    for tokens, dim in ((37, 24), (1, 16), (130, 80)):
        x = torch.randint(-3, 3, (2, tokens, 3, dim)).float().transpose(1, 2)
        found = []
        for backend in ("triton", "cpu"):
            leaf = x.clone().requires_grad_()
            y = pooled(attn._key, leaf, pool, backend)
            found += [y, torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), leaf)[0]]
        torch.testing.assert_close(found[0], found[2])
        torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-2)


def test_views_are_tensors() -> None:
    """Made once and handed in; those of other views are refused."""
    attn = attndsl.compile("attention a { attend causal over pool(mean, 4), causal over pool(max, 4, 2) }")
    q, k, v = (torch.randn(1, 2, 21, 16) for _ in range(3))
    views = attn.views(k, v)
    assert {name: x.shape[2] for name, (x, _) in views.items()} == {"pool(mean, 4)": 6, "pool(max, 4, 2)": 11}
    torch.testing.assert_close(attn(q, k, v, views=views), attn(q, k, v))
    views["pool(mean, 4)"] = (views["pool(mean, 4)"][0] * 2, views["pool(mean, 4)"][1])
    assert not torch.allclose(attn(q, k, v, views=views), attn(q, k, v))
    with pytest.raises(attndsl.PatternError, match="A565"):
        attn(q, k, v, views={"pool(mean, 4)": views["pool(mean, 4)"]})


def test_torch_compile() -> None:
    body = OUTPUTS[1].replace("both / (2 + gates[1] * gates[1])", "both")
    attn = attndsl.compile(text_of(body))
    (q, k, v), inputs = leaves(attn, (1, 2, 1, 21, 21, 16, 16), torch.float32)
    compiled = torch.compile(lambda q, k, v, **more: attn(q, k, v, **more), fullgraph=True, backend="aot_eager")
    expected = attn(q, k, v, **inputs)
    found = compiled(q, k, v, **inputs)
    torch.testing.assert_close(found, expected)
    given = (q, k, v, *inputs.values())
    for x, y in zip(torch.autograd.grad(found.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True):
        torch.testing.assert_close(x, y)


def test_torch_compile_of_interpreted_kernels() -> None:
    """What asks whether kernels are interpreted can be traced: pooling and combining do."""
    attn = attndsl.compile("attention a { far = attend causal over pool(mean, 4)\n output 2 * far }")
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    compiled = torch.compile(lambda q, k, v: attn(q, k, v, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attn.reference(q, k, v).float(), rtol=1e-4, atol=1e-5)


def test_torch_compile_of_another_attention_and_length() -> None:
    """The second one that a process compiles has sizes that are symbols, its gate's among them."""
    routed = attndsl.compile("attention a { attend causal & top(2, blocks(4), by = dot(Q, mean(K))) }")
    gated = attndsl.compile(
        text_of("""far = attend causal over pool(mean, 4)
        near = attend causal & top(2, blocks(4), by = probs(far), share = group)
        output gates[0] * far + gates[1] * near""")
    )
    torch._dynamo.reset()
    compiled = torch.compile(lambda attn, *x, **more: attn(*x, **more), fullgraph=True, backend="aot_eager")
    for attn, rows in ((routed, 21), (gated, 24), (gated, 37)):
        (q, k, v), inputs = leaves(attn, (1, 2, 1, rows, rows, 16, 16), torch.float32)
        torch.testing.assert_close(compiled(attn, q, k, v, **inputs), attn(q, k, v, **inputs))


def test_gradients_are_the_same_to_the_bit() -> None:
    attn = attndsl.compile("attention a { attend causal & window(4), causal over pool(max, 5, 2) }")
    (q, k, v), _ = leaves(attn, (1, 2, 1, 40, 40, 16, 16), torch.float32)
    runs = [torch.autograd.grad(attn(q, k, v).sum(), (q, k, v)) for _ in range(2)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


def test_refusals() -> None:
    """What is not compiled yet says so, and entries of another dtype are a mistake."""
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    attn = attndsl.compile("attention a { attend causal over pool(mean, 4) }")
    with pytest.raises(attndsl.PatternError, match="A911"):
        attndsl.compare(attn, "causal")
    attn = attndsl.compile(text_of("causal over given(kc, vc, 4)"))
    with pytest.raises(attndsl.PatternError, match="A511"):
        attn(q, k, v, kc=torch.randn(1, 2, 2, 16).double(), vc=torch.randn(1, 2, 2, 16))
