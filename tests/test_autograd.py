"""Gradients inside torch: autograd, torch.compile, checkpoints, autocast, functional transforms, layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import attndsl
import attndsl.nn
import attndsl.runtime.ops  # defines the operators

WINDOW = attndsl.compile("causal & (sink(4) | window(20))")
LEARNED = attndsl.compile("""attention learned {
    input bias  : float[h, 9] learnable
    input sinks : float[h] learnable
    score softcap(s, 5.0) + bias[h, clamp(q - k, -4, 4) + 4]
    softmax with sink sinks[h]
    attend causal
}""")
FIXED = attndsl.compile("attention fixed { input bias : float[h]\n score s + bias[h] * k\n attend causal }")
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def qkv(n: int = 40, dtype: torch.dtype = torch.float32, dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    sizes = ((2, 4, n, dim), (2, 2, n, dim), (2, 2, n, dim + 8))
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def learned(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = {"bias": torch.randn(4, 9, generator=generator), "sinks": torch.randn(4, generator=generator)}
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def loss_of(call: Any, *tensors: Tensor, **inputs: Tensor) -> Tensor:
    """A scalar that uses the output and lse."""
    out, lse = call(*tensors, return_lse=True, **inputs)
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    total: Tensor = (out * weights).sum() + lse.square().mean()
    return total


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------- autograd


def test_against_the_oracle() -> None:
    tensors, inputs = qkv(), learned()
    leaves = (*tensors, *inputs.values())
    found = torch.autograd.grad(loss_of(LEARNED, *tensors, **inputs), leaves)
    expected = torch.autograd.grad(loss_of(LEARNED.reference, *tensors, **inputs), leaves)
    for x, gradient, right in zip(leaves, found, expected, strict=True):
        assert gradient.dtype == x.dtype
        torch.testing.assert_close(gradient, right, **TOLERANCE)


def test_gradcheck() -> None:
    tensors, inputs = qkv(7, torch.float64, dim=8), learned(torch.float64)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Any:
        return LEARNED(q, k, v, bias=bias, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(call, (*tensors, *inputs.values()), fast_mode=True)


@pytest.mark.parametrize("which", range(3))
def test_one_of_three(which: int) -> None:
    tensors = [x.detach().requires_grad_(i == which) for i, x in enumerate(qkv())]
    WINDOW(*tensors).sum().backward()
    assert [x.grad is not None for x in tensors] == [i == which for i in range(3)]
    expected = torch.autograd.grad(WINDOW.reference(*tensors).sum(), tensors[which])[0]
    found = tensors[which].grad
    assert found is not None
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_learnable_alone() -> None:
    """Queries and keys need no gradient for an input to get its own."""
    tensors, inputs = [x.detach() for x in qkv()], learned()
    found = torch.autograd.grad(loss_of(LEARNED, *tensors, **inputs), list(inputs.values()))
    expected = torch.autograd.grad(loss_of(LEARNED.reference, *tensors, **inputs), list(inputs.values()))
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, **TOLERANCE)


def test_only_lse() -> None:
    tensors = qkv()
    found = torch.autograd.grad(WINDOW(*tensors, return_lse=True)[1].sum(), tensors, materialize_grads=True)
    expected = torch.autograd.grad(
        WINDOW.reference(*tensors, return_lse=True)[1].sum(), tensors, materialize_grads=True
    )
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, **TOLERANCE)


def test_not_learnable() -> None:
    bias = torch.zeros(4, requires_grad=True)
    with pytest.raises(attndsl.PatternError, match="learnable") as caught:
        FIXED(*qkv(), bias=bias)
    assert caught.value.diagnostics[0].code == "A526"
    assert FIXED(*qkv(), bias=bias.detach()).requires_grad
    with torch.no_grad():
        FIXED(*qkv(), bias=bias)


def test_second_derivative() -> None:
    q, k, v = qkv()
    (first,) = torch.autograd.grad(WINDOW(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(attndsl.PatternError, match="second derivative") as caught:
        torch.autograd.grad(first.sum(), k)
    assert caught.value.diagnostics[0].code == "A921"


def test_two_runs_agree_to_the_bit() -> None:
    runs = []
    for _ in range(2):
        tensors, inputs = qkv(150), learned()
        runs.append(torch.autograd.grad(loss_of(LEARNED, *tensors, **inputs), (*tensors, *inputs.values())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operator_check() -> None:
    tensors, inputs = qkv(), list(learned().values())
    torch.library.opcheck(torch.ops.attndsl.forward.default, (LEARNED._key, *tensors, inputs, [], None, "cpu"))
    with torch.no_grad():
        out, lse = LEARNED(*tensors, bias=inputs[0], sinks=inputs[1], return_lse=True)
        arguments = (out * 2, lse * 3, *tensors, out, lse, inputs, [], None, "cpu")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.attndsl.backward.default, (LEARNED._key, *arguments), test_utils=tests)


# ------------------------------------------------------------------------------- compiled graphs


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    """Forward and backward in one graph each, compiled once for all lengths."""
    counter = CompileCounterWithBackend(backend)

    def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        return loss_of(LEARNED, q * 2, k, v, bias=bias, sinks=sinks)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n in (40, 57):
        leaves = (*qkv(n), *learned().values())
        found = torch.autograd.grad(compiled(*leaves), leaves)
        expected = torch.autograd.grad(step(*leaves), leaves)
        for gradient, right in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, right, **TOLERANCE)
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    tensors = qkv()
    found = torch.autograd.grad(
        checkpoint(lambda *x: WINDOW(*x).square(), *tensors, use_reentrant=reentrant).sum(), tensors
    ) if not reentrant else _gradients_of_a_reentrant_checkpoint(tensors)  # fmt: skip
    expected = torch.autograd.grad(WINDOW(*tensors).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _gradients_of_a_reentrant_checkpoint(tensors: list[Tensor]) -> list[Tensor]:
    """Which works with `backward` alone."""
    checkpoint(lambda *x: WINDOW(*x).square(), *tensors, use_reentrant=True).sum().backward()
    found = [x.grad for x in tensors if x.grad is not None]
    assert len(found) == 3
    return found


# --------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool) -> None:
    """q, k and v in the autocast dtype, whatever they come in; gradients in their own."""
    tensors = qkv()
    mixed = (tensors[0], tensors[1].detach().bfloat16().requires_grad_(), tensors[2])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = WINDOW(q, k, v)
            return out

    out = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(*mixed)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, WINDOW(*(x.bfloat16() for x in mixed)))
    for x, gradient in zip(mixed, torch.autograd.grad(out.float().sum(), mixed), strict=True):
        assert gradient.dtype == x.dtype
    with torch.no_grad():
        assert call(*mixed).dtype == torch.bfloat16


def test_backward_inside_autocast() -> None:
    """Gradients are those of a backward pass outside."""
    tensors = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(WINDOW(*tensors).float().sum(), tensors)
        loss = WINDOW(*tensors).float().sum()
    for gradient, right in zip(found, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(gradient, right)


def test_autocast_leaves_float64() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert WINDOW(*qkv(dtype=torch.float64)).dtype == torch.float64


# --------------------------------------------------------------------------------- torch.func


def test_functional_gradient() -> None:
    q, k, v = (x.detach() for x in qkv())
    found = torch.func.grad(lambda x: WINDOW(x, k, v).square().sum())(q)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(WINDOW(leaf, k, v).square().sum(), leaf)
    torch.testing.assert_close(found, expected)


def test_functional_gradient_under_autocast() -> None:
    q, k, v = (x.detach() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.grad(lambda x: WINDOW(x, k, v).float().sum())(q)
    assert found.dtype == torch.float32
    expected = torch.func.grad(lambda x: WINDOW(x.bfloat16(), k.bfloat16(), v.bfloat16()).float().sum())(q)
    torch.testing.assert_close(found, expected)


def test_functional_second_derivative() -> None:
    q, k, v = (x.detach() for x in qkv(8))
    with pytest.raises(attndsl.PatternError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: WINDOW(y, k, v).sum())(x).sum())(q)


def test_vmap() -> None:
    many = [torch.stack([x.detach(), x.detach() + 1, -x.detach()], dim=1) for x in qkv()]
    found = torch.func.vmap(WINDOW, in_dims=1)(*many)
    expected = torch.stack([WINDOW(*(x[:, i] for x in many)) for i in range(3)])
    assert torch.equal(found, expected)


def test_gradients_of_each_sample() -> None:
    """With one set of learnable inputs for all of them."""
    inputs = {name: x.detach() for name, x in learned().items()}
    many = [torch.stack([x.detach(), -x.detach()]) for x in qkv(12)]

    def loss(bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return loss_of(LEARNED, q, k, v, bias=bias, sinks=inputs["sinks"])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(inputs["bias"], *many)
    expected = torch.stack([torch.func.grad(loss)(inputs["bias"], *(x[i] for x in many)) for i in range(2)])
    torch.testing.assert_close(found, expected)


# ----------------------------------------------------------------------------------------- layers


def test_layer() -> None:
    """It learns: its parameters are the projections' and the pattern's."""
    layer = attndsl.nn.Attention(LEARNED, 32, 4, num_kv_heads=2)
    assert {name for name, _ in layer.named_parameters()} >= {"learned.bias", "learned.sinks", "q_proj.weight"}
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert layer.learned["sinks"].grad is not None and layer.learned["sinks"].grad.any()


def test_layer_is_what_it_says() -> None:
    layer = attndsl.nn.Attention("attention cross { align start\n attend { k <= 2 * q } }", 24, 3, head_dim=16)
    x, context = torch.randn(2, 10, 24), torch.randn(2, 15, 24)

    def heads(projection: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = projection(x).unflatten(-1, (3, 16)).transpose(1, 2)
        return found

    mask = torch.arange(15) <= 2 * torch.arange(10)[:, None]
    out = nn.functional.scaled_dot_product_attention(
        heads(layer.q_proj, x), heads(layer.k_proj, context), heads(layer.v_proj, context), attn_mask=mask
    )
    torch.testing.assert_close(layer(x, context), layer.out_proj(out.transpose(1, 2).flatten(2)), **TOLERANCE)
    assert "head_dim=16" in repr(layer)


def test_layer_passes_inputs() -> None:
    local = attndsl.compile("attention local(span : runtime int) { input bias : float[q] learnable\n"
                            "score s + bias[q]\n attend causal & window(span) }")  # fmt: skip
    layer = attndsl.nn.Attention(local, 16, 2)
    assert not list(layer.learned)
    x = torch.randn(1, 12, 16)
    torch.testing.assert_close(layer(x, span=12, bias=torch.zeros(12)), layer(x, span=99, bias=torch.zeros(12)))


def test_layer_refuses_odd_heads() -> None:
    with pytest.raises(attndsl.PatternError, match="do not divide") as caught:
        attndsl.nn.Attention("causal", 30, 4)
    assert caught.value.diagnostics[0].code == "A527"


def test_layers_are_found_without_an_import_of_their_own() -> None:
    code = "import attndsl, sys; assert 'torch' not in sys.modules; print(attndsl.nn.Attention.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout == "Attention\n"
