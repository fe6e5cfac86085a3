"""Pools of segments: entries whose extents data tells, and which rows see them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.branches import Pool, PoolFunction
from attndsl.members import Runs
from attndsl.runtime.runs import of_heads, pooled_runs
from tests.gradients import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

DECLARED = {
    "ids": "int[b, g, k]", "doc": "int[b, k] sorted", "own": "int[k]", "mark": "bool[b, k]",
    "sinks": "float[h] learnable", "until": "int[b, k]", "left": "int[b]",
}  # fmt: skip
TOP = "top(2, segments(ids), per = rows(16), among = all, by = dot(mean(Q), mean(K)))"
BODIES = [
    "attend all over pool(mean, segments(ids), counted)",
    "attend causal over pool(max, segments(ids)) { score softcap(s, 2.0) softmax with sink sinks[h] }",
    "attend causal & window(9), causal - window(9) over pool(mean, segments(ids), counted)",
    "attend causal & document(doc) over pool(sum, segments(ids))",
    "attend { mark[k] and k <= until[q] and until[k] > 3 } over pool(min, segments(own))",
    "attend { not mark[k] and ids[g, k] != ids[g, q] } over pool(mean, segments(ids)) { weights sigmoid(s) }",
    "attend (causal on blocks(4)) & { k >= left[b] or h == 1 } over pool(mean, segments(own))",
    "attend (if h < 2 then causal else { q // 4 >= k // 4 and -k >= -30 }) over pool(max, segments(own), counted)",
    "attend ~(window(5) | sink(3)) & { clamp(k, 2, 20) <= q } over pool(mean, segments(ids))",
    f"plan sel = {TOP}\n attend sel, all - sel over pool(mean, segments(ids), counted)",
    "far = attend { k < q } over pool(mean, segments(ids))\n near = attend causal & window(4)\n"
    "output merge(far, near)",
    "attend causal over pool(mean, segments(own)), causal over pool(mean, 4), causal over pool(mean, segments(ids))",
]  # fmt: skip
# batch, heads, key heads, rows, keys, D, Dv
SHAPES = [(2, 4, 2, 37, 37, 16, 16), (1, 2, 1, 1, 1, 16, 24), (1, 3, 3, 5, 38, 80, 16)]


def compiled(body: str) -> attndsl.Attention:
    written = "".join(f"input {name} : {kind}\n" for name, kind in DECLARED.items() if name in body)
    return attndsl.compile(f"attention a {{\n{written}{body}\n}}")


def inputs_of(attn: attndsl.Attention, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    batch, heads, kv_heads, _, tokens, *_ = shape
    generator = torch.Generator().manual_seed(seed)

    def segments(*lead: int) -> Tensor:
        # Equal ids may come again later: they are another segment.
        changes = torch.rand(*lead, tokens, generator=generator) < 0.3
        return (changes.cumsum(-1) % 3).to(torch.int32)

    made = {
        "ids": segments(batch, kv_heads), "doc": torch.arange(tokens)[None].repeat(batch, 1) // 11, "own": segments(),
        "mark": torch.rand(batch, tokens, generator=generator) < 0.8, "left": torch.arange(batch) + 5,
        "sinks": torch.randn(heads, generator=generator).to(dtype).requires_grad_(),
        "until": torch.randint(0, 40, (batch, tokens), generator=generator),
    }  # fmt: skip
    return {decl.name: made[decl.name] for decl in attn.program.inputs if decl.name in made}


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, heads, kv_heads, rows, tokens, dim, v_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((heads, rows, dim), (kv_heads, tokens, dim), (kv_heads, tokens, v_dim))
    return [torch.randn(batch, *size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def judge(body: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str, dropout: float = 0.0) -> None:
    """Output, lse and gradients are the oracle's."""
    more: dict[str, Any] = {"dropout": dropout, "seed": 3} if dropout else {}
    attn = compiled(body)
    inputs = inputs_of(attn, shape, dtype)
    leaves = tensors(shape, dtype) + [x for x in inputs.values() if x.is_floating_point()]
    plans = attn.plan(*leaves[:2], **inputs) if attn.program.selections else {}
    lse = all(branch.weights is None for branch in attn.program.branches)
    q, k, v = leaves[:3]
    found = attn(q, k, v, return_lse=lse, backend=backend, **inputs, **more)
    right = [x.detach().double().requires_grad_() for x in leaves]
    exact = inputs | dict(zip((n for n, x in inputs.items() if x.is_floating_point()), right[3:], strict=True))
    q, k, v = right[:3]
    expected = attn.reference(q, k, v, return_lse=lse, plans=plans, **exact, **more)
    found, expected = (found, expected) if lse else ((found,), (expected,))
    loss, right_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=10 * TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])
        weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        loss = loss + torch.where(y == -torch.inf, 0.0, x.double() * weight).sum()
        right_loss = right_loss + torch.where(y == -torch.inf, 0.0, y * weight).sum()
    given = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(right_loss, right, allow_unused=True, materialize_grads=True)
    for x, y in zip(given, wanted, strict=True):
        largest = max(float(y.abs().max()) if y.numel() else 0.0, 1.0)
        assert float((x.double() - y).abs().max()) <= 5 * TOLERANCE[dtype] * largest


@pytest.mark.parametrize("body", BODIES)
def test_cpu(body: str) -> None:
    for shape in SHAPES:
        if shape[1] > 2 or "h ==" not in body:
            judge(body, shape, torch.float64, "cpu")


@pytest.mark.parametrize("body", BODIES)
def test_triton(body: str) -> None:
    judge(body, SHAPES[len(body) % 3], torch.float32, "triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_several_tiles_and_dropout(backend: str) -> None:
    """More segments than a tile has, and segments longer than what a kernel pools at once."""
    dtype = torch.float64 if backend == "cpu" else torch.float32
    judge(BODIES[9], (1, 2, 1, 150, 290, 16, 16), dtype, backend)
    judge(BODIES[2], (1, 2, 1, 20, 290, 16, 16), dtype, backend, dropout=0.4)


def test_the_rule() -> None:
    """A row sees a segment once it has seen its last token."""
    ids = torch.tensor([[[4, 4, 7, 7, 7, 4, 9, 9]]], dtype=torch.int32)
    attn = compiled(BODIES[0].replace("all", "causal"))
    seen = attn.mask(8, 8, ids=ids.numpy())[0].astype(int)
    wanted = np.zeros((8, 8), int)
    for entry, last in enumerate((1, 4, 5, 7)):
        wanted[last:, entry] = 1
    np.testing.assert_array_equal(seen, wanted)
    q, k, v = (torch.randn(1, 1, 8, 8, dtype=torch.float64) for _ in range(3))
    means = [[x[0, 0, low:high].mean(0) for low, high in ((0, 2), (2, 5), (5, 6), (6, 8))] for x in (k, v)]
    keys, values = (torch.stack(x) for x in means)
    logits = q[0, 0] @ keys.T / 8**0.5 + torch.tensor([2.0, 3.0, 1.0, 2.0]).log()
    logits = logits.masked_fill(torch.from_numpy(wanted[:, :4] == 0), -torch.inf)
    out = logits[1:].softmax(-1) @ values
    torch.testing.assert_close(attn(q, k, v, ids=ids)[0, 0, 1:], out)
    assert not attn(q, k, v, ids=ids)[0, 0, 0].any()


@pytest.mark.parametrize("body", [BODIES[2], BODIES[10]])
def test_a_prefix_is_the_same_rows_of_the_whole(body: str) -> None:
    """Nothing that comes later changes a row that sees only segments which end before it."""
    attn = compiled(body)
    shape = (1, 2, 1, 30, 30, 16, 16)
    q, k, v = (x.detach() for x in tensors(shape, torch.float64))
    inputs = inputs_of(attn, shape, torch.float64)
    whole = attn(q, k, v, **inputs)
    for n in range(1, 31):
        some = {name: x[..., :n] for name, x in inputs.items()}
        torch.testing.assert_close(attn(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], **some), whole[:, :, n - 1 : n])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_no_keys_and_no_rows(backend: str) -> None:
    attn = compiled(BODIES[2])
    for rows, tokens in ((0, 0), (0, 5)):
        q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (rows, tokens, tokens))
        out, lse = attn(q, k, v, ids=torch.zeros(1, 2, tokens, dtype=torch.int32), return_lse=True, backend=backend)
        assert not out.any() and bool((lse == -torch.inf).all())
        out.sum().backward()
        assert k.grad is not None and not k.grad.any()


@pytest.mark.parametrize("function", PoolFunction)
def test_pooling_kernels(function: PoolFunction) -> None:
    """Against torch, on numbers among which many are equal, tokens outside heads in memory."""
    attn = compiled(BODIES[0])
    pool = Pool(function, 1, 1, runs=Runs("ids", ()))
    decl = attn.program.input("ids")
    for tokens, dim in ((70, 16), (1, 24)):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randint(-3, 3, (1, tokens, 2, dim), generator=generator).float().transpose(1, 2)
        # One of the heads is all one segment.
        ids = (torch.rand(1, 2, tokens, generator=generator) < torch.tensor([0.0, 0.6]).view(1, 2, 1)).cumsum(-1)
        runs = of_heads(ids.int(), decl, 1, 2)
        found = []
        for backend in ("triton", "cpu"):
            leaf = x.clone().requires_grad_()
            y = pooled_runs(attn._key, leaf, pool, runs, backend)
            found += [y, torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), leaf)[0]]
        torch.testing.assert_close(found[0], found[2])
        torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-2)


def test_gradients_are_the_same_to_the_bit() -> None:
    attn = compiled(BODIES[2])
    shape = (1, 2, 1, 40, 40, 16, 16)
    leaves, inputs = tensors(shape, torch.float32), inputs_of(attn, shape, torch.float32)
    runs = [torch.autograd.grad(attn(*leaves, **inputs).sum(), leaves) for _ in range(2)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


def test_views_are_tensors() -> None:
    attn = compiled(BODIES[11])
    shape = (1, 2, 1, 21, 21, 16, 16)
    (q, k, v), inputs = tensors(shape, torch.float32), inputs_of(attn, shape, torch.float32)
    views = attn.views(k, v, **inputs)
    assert set(views) == {"pool(mean, segments(own))", "pool(mean, 4)", "pool(mean, segments(ids))"}
    torch.testing.assert_close(attn(q, k, v, views=views, **inputs), attn(q, k, v, **inputs))
    with pytest.raises(attndsl.PatternError, match="A565"):
        attn.views(k, v)
    with pytest.raises(attndsl.PatternError, match="A513"):
        attn.views(k, v, **inputs | {"own": inputs["own"][:-1]})


def test_torch_compile() -> None:
    attn = compiled(BODIES[2])
    shape = (1, 2, 1, 24, 24, 16, 16)
    leaves, inputs = tensors(shape, torch.float32), inputs_of(attn, shape, torch.float32)
    call = torch.compile(lambda *x, **more: attn(*x, **more), fullgraph=True, backend="aot_eager")
    found, expected = call(*leaves, **inputs), attn(*leaves, **inputs)
    torch.testing.assert_close(found, expected)
    for x, y in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (found, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_what_was_understood() -> None:
    """Tiles are visited up to the last segment, and kernels can be read."""
    attn = compiled(BODIES[0])
    ids = (np.arange(4096) // 50)[None, None].repeat(2, 1).astype(np.int32)
    text = str(attn.explain(4096, heads=2, kv_heads=2, ids=ids))
    assert "runs_ids : int[b, g, 1], how many segments of `ids` there are" in text
    assert "tiles: 256 of 8,192 visited" in text
    assert "decode" not in attn.kernels()
    assert "first_ptr" in attn.source("pool", backend="triton")


def test_a_segment_that_may_go_on() -> None:
    """A causal row sees the segment that it ends, and in a longer call that one may not be over: a warning."""
    for body, warned in (("causal", True), ("{ k < q }", False), ("all", False), ("{ k <= q - 3 }", False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled(f"attend {body} over pool(mean, segments(ids))")
        assert any("W304" in str(w.message) for w in caught) is warned, body


def test_what_is_not_supported() -> None:
    votes = "packed doc\n votes = attend causal over pool(mean, segments(ids))\n"
    with pytest.raises(attndsl.PatternError, match=r"(?s)A907.*such two levels.*data tells"):
        compiled(f"{votes} x = attend causal within blocks(16) with probs(votes)\n output x")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("input c : int[b, h, k]\n attend causal over pool(mean, segments(c))", "A048"),
        ("input c : int[b, k]\n attend causal over pool(mean, segments(c), 4)", "A013"),
        ("input c : int[b, k]\n attend causal over pool(mean, segments(c), visible = any)", "A013"),
        ("input c : int[b, k]\n attend causal over pool(mean, 4) from pool(mean, segments(c))", "A078"),
    ],
)
def test_mistakes(text: str, code: str) -> None:
    with pytest.raises(attndsl.PatternError) as caught:
        attndsl.compile(f"attention a {{\n{text}\n}}")
    assert [d.code for d in caught.value.diagnostics] == [code]
