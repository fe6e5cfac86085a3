"""Gradients of `skip below t`: those of the output with the dropped tiles left out, which are held constant."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attndsl
from attndsl.runtime.left_tiles import left_tiles
from attndsl.runtime.reference_skip import left_by_skipping
from tests.test_skip import peaked
from tests.test_skip_views import OVER, VIEWS

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
RAW = (
    "causal", "all", "causal & (window(150) | sink(3))", "causal & dilated(3)", "causal & { k % 96 < 70 }",
    "causal & document(doc)", "causal & { k // 64 != 1 or h == 0 }",
    "causal & random(2, blocks(32), per = rows(64), seed = 3)",
)  # fmt: skip
OVER_VIEWS = tuple(view.replace("doc", "seg") for view in VIEWS)
CLAUSES = (
    "", "", "softmax with sink sinks[h]", "score softcap(s, 20.0) - slope[h] * (q - k)",
    "score s + bias[h, (q - k) % 7]",
)  # fmt: skip
DECLARED = {
    "doc": "int[b, k] sorted", "seg": "int[b, k] sorted", "idx": "int[b, g, k/2]", "n": "int[b]",
    "sinks": "float[h] learnable", "slope": "float[h] learnable", "bias": "float[h, 7] learnable",
}  # fmt: skip
# How near to the bound a decision may be that rounding could turn.
CLEAR = {"cpu": 1e-9, "triton": 1e-3}


def compiled(body: str, below: float) -> attndsl.Attention:
    declared = "".join(f"input {x} : {said}\n" for x, said in DECLARED.items() if re.search(rf"\b{x}\b", body))
    return attndsl.compile(f"attention a {{\n{declared}skip below {below}\n{body}\n}}")


def data(attn: attndsl.Attention, batch: int, heads: int, tokens: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    found = {
        "doc": (torch.arange(tokens) // 90)[None].repeat(batch, 1),
        "seg": (torch.arange(tokens) // 2)[None].repeat(batch, 1),
        "idx": torch.arange(0, tokens, 2)[None, None].repeat(batch, 1, 1),
        "sinks": torch.linspace(-1, 1, heads, dtype=torch.float64),
        "slope": torch.linspace(0, 0.02, heads, dtype=torch.float64),
        "bias": torch.randn(heads, 7, generator=draw, dtype=torch.float64),
        "n": torch.tensor([tokens, tokens // 2, 0, 1])[:batch],
    }
    return {name: x for name, x in found.items() if any(decl.name == name for decl in attn.program.inputs)}


def gradients(attend: Callable[..., Any], leaves: dict[str, Tensor], lse: bool) -> dict[str, Tensor]:
    """Output, and lse where it is asked for, and the gradients by all floats of a weighted sum of both."""
    leaves = {name: x.detach().clone() for name, x in leaves.items()}
    floats = {name: x.requires_grad_() for name, x in leaves.items() if x.is_floating_point()}
    outs = attend(**leaves, return_lse=True) if lse else (attend(**leaves),)
    total = torch.zeros((), dtype=torch.float64)
    for n, x in enumerate(outs):
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        total = total + (torch.where(x == -torch.inf, 0.0, x.double()) * weights).sum()
    found = torch.autograd.grad(total, [*floats.values()])
    named = {f"out {n}": x.detach() for n, x in enumerate(outs)}
    return named | dict(zip(floats, found, strict=True))


def judge(
    body: str, below: float, shape: tuple[int, ...], backend: str, seed: int = 0, matters: bool = False, drop: float = 0
) -> bool:
    """Compare with the oracle in float64, unless a decision is near the bound. Whether that was done, and where it is
    asked whether it `matters` some tile was dropped."""
    batch, heads, kv_heads, rows, tokens, dim = shape
    attn, dtype = compiled(body, below), torch.float64 if backend == "cpu" else torch.float32
    given = dict(zip("qkv", peaked(batch, heads, kv_heads, rows, tokens, dim, seed), strict=True))
    given |= data(attn, batch, heads, tokens)
    leaves = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    exact: dict[str, Any] = {name: x.double() if x.is_floating_point() else x for name, x in leaves.items()}
    more: dict[str, Any] = {"dropout": drop, "seed": 5} if drop else {}
    near = [compiled(body, below * (1 + CLEAR[backend] * way)).reference(**exact) for way in (-1, 1)]
    if not torch.equal(*near):
        return False
    lse = "output" not in body
    expected = gradients(lambda **x: attn.reference(**x, **more), exact, lse)
    found = gradients(lambda **x: attn(**x, backend=backend, **more), leaves, lse)
    for name, x in expected.items():
        size = float(torch.where(x == -torch.inf, 0.0, x).abs().amax())
        tolerance = (1e-11 if backend == "cpu" else 2e-5) * max(1.0, size)
        assert float((found[name].double() - x).nan_to_num(0.0).abs().amax()) <= tolerance, name
        assert torch.equal(found[name] == -torch.inf, x == -torch.inf), name
    return not (matters and torch.equal(compiled(body, 1e-300).reference(**exact), near[0]))


def drawn(draw: random.Random) -> str:
    """One or more parts, with what a branch says of scores; or a branch of pooled queries beside another."""
    parts = [f"{draw.choice(OVER)} over {draw.choice(OVER_VIEWS)}" for _ in range(draw.choice((0, 0, 1, 2)))]
    parts[0:0] = [draw.choice(RAW)] * (1 if not parts else draw.choice((0, 1)))
    draw.shuffle(parts)
    several = draw.random() < 0.2
    views = several or any(" over " in part for part in parts)
    clause = draw.choice([x for x in CLAUSES if not (views and "q - k" in x)])
    padded = "" if views or draw.random() < 0.7 else "lengths n\n"
    if not several:
        return f"{padded}{clause}\nattend {', '.join(parts)}"
    pooled = "x = attend causal over pool(mean, 2) from pool(mean, 4)"
    return f"{clause}\n{pooled}\ny = attend {', '.join(parts)}\noutput x + y"


SHAPES = ((2, 2, 1, 80, 140, 8), (1, 2, 1, 65, 150, 8), (1, 2, 2, 70, 70, 80), (1, 1, 1, 1, 1, 8), (1, 2, 1, 1, 100, 8))


@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed: int) -> None:
    draw = random.Random(seed)
    judge(drawn(draw), draw.choice((0.3, 0.05, 0.001)), draw.choice(SHAPES), "cpu", seed)


FIXED = (
    "attend causal",
    "softmax with sink sinks[h]\nattend causal & { k % 96 < 70 }",
    "attend causal & window(90), causal over pool(mean, 2)",
    "attend causal over pool(max, 3, 2)",
    "attend causal over pool(mean, segments(seg))",
)


@pytest.mark.parametrize("body", FIXED)
def test_cpu(body: str) -> None:
    """Bodies of which tiles are dropped that matter."""
    assert judge(body, 0.3, (2, 2, 1, 100, 300, 8), "cpu", matters=True)


@pytest.mark.parametrize("body", [*FIXED[:3], "score softcap(s, 20.0) - slope[h] * (q - k)\nattend causal"])
def test_triton(body: str) -> None:
    assert judge(body, 0.3, (1, 2, 1, 70, 140, 16), "triton", matters=True)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_dropout(backend: str) -> None:
    assert judge("attend causal", 0.3, (1, 2, 1, 70, 140, 16), backend, matters=True, drop=0.4)


def test_what_is_kept() -> None:
    """A truth for each tile of 64 rows of the call and 64 keys, with those that the oracle leaves; of no other size."""
    attn = compiled("attend causal", 0.3)
    q, k, v = peaked(1, 2, 1, 130, 333, 16)
    rows, tiles = left_tiles(attn._key, q, k, v, [], [], None, "cpu")
    assert rows.tolist() == [i // 64 for i in range(130)]
    assert tiles.shape == (1, 2, 3, 6)
    assert tiles.dtype == torch.bool
    seen = torch.from_numpy(attn.mask(130, 333, 2, 1)).expand(1, -1, -1, -1)
    left = left_by_skipping(q @ k.mT / 4, seen, 0.3)
    for i in range(3):
        for j in range(6):
            own = (..., slice(64 * i, 64 * i + 64), slice(64 * j, 64 * j + 64))
            visited = seen[own].flatten(2).any(-1)
            assert torch.equal(tiles[..., i, j], left[own].flatten(2).any(-1) & visited)
    assert not tiles.all()


ATTN = compiled("softmax with sink sinks[h]\nattend causal", 0.3)
SINKS = torch.tensor([0.5, -0.5], dtype=torch.float64)


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = ATTN(q, k, v, sinks=SINKS)
    return (out * torch.arange(out.numel()).view_as(out).sin()).sum()


def test_transforms() -> None:
    """Checkpoints, torch.func and a graph that was exported where no gradient was asked for find the same gradients."""
    q, k, v = leaves = [x.requires_grad_() for x in peaked(2, 2, 1, 70, 200, 8)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(loss, q, k, v, use_reentrant=False), leaves)
    by_func = torch.func.grad(loss, argnums=(0, 1, 2))(*(x.detach() for x in leaves))
    for found in (again, by_func):
        assert all(map(torch.equal, found, expected))
    each = torch.func.vmap(torch.func.grad(lambda *x: loss(*(t[None] for t in x))))(*(x.detach() for x in leaves))
    one = torch.autograd.grad(loss(*(x[1:] for x in leaves)), q)[0]
    torch.testing.assert_close(each[1], one[1])
    out, _ = torch.ops.attndsl.forward(ATTN._key, q, k, v, [SINKS], [], None, "cpu")
    named = torch.autograd.grad((out * torch.arange(out.numel()).view_as(out).sin()).sum(), leaves)
    assert all(map(torch.equal, named, expected))


def test_compiled_callers() -> None:
    leaves = [x.float().requires_grad_() for x in peaked(1, 2, 1, 70, 200, 8)]
    attn = compiled("attend causal", 0.3)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attn(q, k, v)
        return out.square().sum()

    expected = torch.autograd.grad(step(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_after_calls_without_gradients() -> None:
    """Calls that are recognised as alike, of tensors that require gradients, keep no way to these."""
    leaves = [x.requires_grad_() for x in peaked(1, 2, 1, 70, 200, 8)]
    attn = compiled("attend causal", 0.3)
    with torch.no_grad():
        for _ in range(3):
            attn(*leaves)
    expected = torch.autograd.grad(attn.reference(*leaves).square().sum(), leaves)
    for _ in range(3):
        found = torch.autograd.grad(attn(*leaves).square().sum(), leaves)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


def test_without_gradients_nothing_is_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference keeps its one kernel."""
    attn = compiled("attend causal", 0.3)
    q, k, v = peaked(1, 2, 1, 70, 200, 8)
    monkeypatch.setattr("attndsl.runtime.engine.Engine.left_tiles", None)
    with torch.no_grad():
        attn(q.requires_grad_(), k, v)
    with pytest.raises(TypeError):
        attn(q, k, v)
