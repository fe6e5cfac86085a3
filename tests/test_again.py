"""Calls that are recognised as the last one: never where another call, or what watches it, is different."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import attndsl
from attndsl.runtime.again import Again, _guards
from attndsl.runtime.engine import Engine
from attndsl.runtime.registry import engine_of

PATTERN = "attention biased { input bias : float[h] learnable\n score s + bias[h] * k\n attend causal & window(9) }"
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


class Parameter(torch.nn.Parameter):
    """A subclass, of which torch's functions may do anything."""


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does nothing, and would see everything."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each call that was not recognised."""
    calls: list[None] = []
    ready = Engine.ready

    def counting(self: Engine, *given: Any) -> Any:
        calls.append(None)
        return ready(self, *given)

    monkeypatch.setattr(Engine, "ready", counting)
    return calls


def tensors(rows: int = 20, keys: int = 20, gradients: bool = False, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1, 4, rows, 16), (1, 2, keys, 16), (1, 2, keys, 8), (4,))
    return [torch.randn(size, generator=generator).requires_grad_(gradients) for size in sizes]


def fresh() -> tuple[Callable[..., Any], Engine]:
    """An attention that knows no call, and its engine."""
    attn = attndsl.compile(PATTERN)
    engine = engine_of(attn._key)
    engine.again = engine._last = engine.again_backward = engine._last_backward = None
    return lambda q, k, v, bias, **options: attn(q, k, v, bias=bias, **options), engine


def known(*given: Tensor) -> Callable[..., Any]:
    """An attention that knows the kind of a call. Skips a test on a torch whose check is not known."""
    if _guards() is None:
        pytest.skip(f"calls are not recognised on torch {torch.__version__}")
    call, engine = fresh()
    for _ in range(2):
        call(*given)
    assert isinstance(engine.again, Again)
    return call


def oracle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    found: Tensor = attndsl.compile(PATTERN).reference(q, k, v, bias=bias)
    return found.float()


@pytest.mark.parametrize("gradients", [False, True])
def test_the_third_call_is_recognised(looked_up: list[None], gradients: bool) -> None:
    call = known(*tensors(gradients=gradients))
    assert len(looked_up) == 2
    for seed in (2, 3):
        given = tensors(gradients=gradients, seed=seed)
        out, lse = call(*given, return_lse=True)
        torch.testing.assert_close(out, oracle(*given), **TOLERANCE)
        assert out.requires_grad == gradients
        assert lse.shape == (1, 4, 20)
        with torch.no_grad():
            assert not call(*given).requires_grad
    assert len(looked_up) == 2


def test_its_gradients() -> None:
    call = known(*tensors(gradients=True))
    given = tensors(gradients=True, seed=2)
    weights = torch.linspace(-1, 1, 8)
    found = torch.autograd.grad((call(*given) * weights).sum(), given)
    wanted = torch.autograd.grad((oracle(*given) * weights).sum(), given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    with pytest.raises(attndsl.PatternError, match="A921"):
        torch.autograd.grad(call(*given).sum(), given, create_graph=True)[0].sum().backward()  # type: ignore[no-untyped-call]


@pytest.fixture
def differentiated(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each backward pass that was not recognised."""
    calls: list[None] = []
    backward = Engine.backward

    def counting(self: Engine, *given: Any) -> Any:
        calls.append(None)
        return backward(self, *given)

    monkeypatch.setattr(Engine, "backward", counting)
    return calls


def gradients(call: Callable[..., Any], given: list[Tensor], d_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(*given), given, d_out)


def verify_gradients(call: Callable[..., Any], given: list[Tensor], d_out: Tensor) -> None:
    wanted = gradients(oracle, given, d_out)
    for x, found, exact in zip(given, gradients(call, given, d_out), wanted, strict=True):
        torch.testing.assert_close(found, exact, **TOLERANCE)
        assert found.stride() == torch.empty_like(x).stride()


def learned(*given: Tensor) -> Callable[..., Any]:
    """An attention that knows a kind of call and of its backward pass."""
    call = known(*given)
    for _ in range(2):
        gradients(call, list(given), torch.ones(1, 4, 20, 8))
    return call


def test_the_third_backward_pass_is_recognised(differentiated: list[None]) -> None:
    call = learned(*tensors(gradients=True))
    for seed in (2, 3):
        d_out = torch.randn(1, 4, 20, 8, generator=torch.Generator().manual_seed(seed))
        verify_gradients(call, tensors(gradients=True, seed=seed), d_out)
    assert len(differentiated) == 2


BACKWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": lambda x: spread(x),
    "order": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "alignment": lambda x: shifted(x),
    "expanded": lambda x: x[:, :, :, :1].expand(x.shape),
    "negated": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("change", BACKWARDS)
def test_another_backward_pass_is_not(differentiated: list[None], change: str) -> None:
    given = tensors(gradients=True)
    call = learned(*given)
    verify_gradients(call, given, BACKWARDS[change](torch.linspace(-1, 1, 640).view(1, 4, 20, 8)))
    assert len(differentiated) == 3


def test_gradients_of_lse_and_second_derivatives_are_others(differentiated: list[None]) -> None:
    given = tensors(gradients=True)
    call = learned(*given)
    out, lse = call(*given, return_lse=True)
    found = torch.autograd.grad(out.sum() + lse.sum(), given)
    exact, of_rows = attndsl.compile(PATTERN).reference(*given[:3], bias=given[3], return_lse=True)
    for x, wanted in zip(found, torch.autograd.grad(exact.sum() + of_rows.sum(), given), strict=True):
        torch.testing.assert_close(x, wanted.float(), **TOLERANCE)
    assert len(differentiated) == 3
    with pytest.raises(attndsl.PatternError, match="A921"):
        torch.autograd.grad(call(*given).sum(), given, create_graph=True)[0].sum().backward()  # type: ignore[no-untyped-call]
    call(*given, dropout=0.5, seed=1).sum().backward()
    assert len(differentiated) == 5
    torch.use_deterministic_algorithms(True)
    try:
        verify_gradients(call, given, torch.ones(1, 4, 20, 8))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(differentiated) == 6


def test_saved_tensors_that_come_back_otherwise(differentiated: list[None]) -> None:
    """What a hook makes of saved tensors, such as one that keeps them on the host, is checked anew."""
    given = tensors(gradients=True)
    call = learned(*given)
    for unpack in (torch.Tensor.clone, lambda x: spread(x) if x.dim() == 4 else x):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), unpack):
            verify_gradients(call, given, torch.ones(1, 4, 20, 8))
    assert len(differentiated) > 2


def spread(x: Tensor) -> Tensor:
    """The same numbers, each row as far from the next as two."""
    return torch.stack((x, x), 3)[:, :, :, 0]


def shifted(x: Tensor) -> Tensor:
    """The same numbers, four bytes off what 16 divides."""
    return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


CHANGES: dict[str, Callable[..., list[Tensor]]] = {
    "rows": lambda q, *rest: [q[:, :, :7], *rest],
    "keys": lambda q, k, v, bias: [q[:, :, 3:], k[:, :, :17], v[:, :, :17], bias],
    "strides": lambda q, k, v, bias: [q, spread(k), v, bias],
    "alignment": lambda q, k, v, bias: [q, k, shifted(v), bias],
    "columns": lambda q, k, v, bias: [q, k, v.mT.contiguous().mT, bias],
    "bias": lambda q, k, v, bias: [q, k, v, bias[:1]],
    "subclass": lambda q, k, v, bias: [q, k, v, Parameter(bias)],
    "parameter": lambda q, k, v, bias: [q, k, v, torch.nn.Parameter(bias)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_call_is_not(looked_up: list[None], change: str) -> None:
    call = known(*tensors())
    given = CHANGES[change](*tensors(seed=2))
    torch.testing.assert_close(call(*given), oracle(*given), **TOLERANCE)
    # Columns that are not dense are copied, and looked up again.
    assert len(looked_up) - 2 == 1 + (change == "columns")


def test_options_decide(looked_up: list[None]) -> None:
    given = tensors()
    call = known(*given)
    for scale in (0.3, -0.3):
        found = call(*given, scale=scale)
        wanted = attndsl.compile(PATTERN).reference(*given[:3], bias=given[3], scale=scale)
        torch.testing.assert_close(found, wanted.float(), **TOLERANCE)
    call(*given, backend="cpu")
    assert len(looked_up) == 5
    dropped = call(*given, dropout=0.9, seed=1)
    assert (dropped == 0).sum() > (call(*given) == 0).sum()
    for wrong in ({"backend": "abacus"}, {"dropout": None}, {"dropout": 2.0}):
        with pytest.raises(attndsl.PatternError):
            call(*given, **wrong)


def test_what_is_no_tensor(looked_up: list[None]) -> None:
    given = tensors()
    call = known(*given)
    with pytest.raises(attndsl.PatternError, match="A517"):
        call(*given[:3], None)
    with pytest.raises(attndsl.PatternError, match="A502"):
        call(given[0].double(), *given[1:])
    with pytest.raises(attndsl.PatternError, match="A501"):
        call(3, *given[1:])


@pytest.mark.parametrize(
    "watching", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, Mode, nullcontext]
)
def test_what_watches_a_call(looked_up: list[None], watching: Callable[[], AbstractContextManager[Any]]) -> None:
    given = tensors()
    call = known(*given)
    with watching():
        out = call(*given)
    # Autocast and modes reach the operator, which looks the launch up.
    assert len(looked_up) - 2 == (watching is not nullcontext)
    assert out.dtype == (torch.float32 if isinstance(watching, type) else out.dtype)
    torch.testing.assert_close(out.float(), oracle(*given), rtol=2e-2, atol=2e-2)


def test_autocast_converts() -> None:
    given = tensors()
    call = known(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*given).dtype == torch.bfloat16
        # Known there, it is not known elsewhere.
        for _ in range(3):
            assert call(*given).dtype == torch.bfloat16
    assert call(*given).dtype == torch.float32


def test_transforms() -> None:
    given = tensors()
    call = known(*given)
    wanted = torch.autograd.grad(oracle(*(one := tensors(gradients=True))).sum(), one[0])[0]
    torch.testing.assert_close(torch.func.grad(lambda q: call(q, *given[1:]).sum())(given[0]), wanted, **TOLERANCE)
    # Around a call whose tensors are not those that are transformed, too.
    torch.testing.assert_close(torch.func.grad(lambda x: (x * call(*given)).sum())(torch.ones(())), call(*given).sum())
    batched = torch.vmap(lambda q: call(q, *given[1:]))(torch.stack([given[0], -given[0]]))
    torch.testing.assert_close(batched[1], oracle(-given[0], *given[1:]), **TOLERANCE)
    traced = make_fx(lambda q: call(q, *given[1:]) + 1)(given[0])
    assert "attndsl.forward" in traced.code
    with forward_ad.dual_level(), pytest.raises(attndsl.PatternError, match="forward mode"):
        call(forward_ad.make_dual(given[0], given[0]), *given[1:])  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("which", range(4))
def test_tensors_that_are_negated_when_read(which: int, backend: str) -> None:
    """Their memory holds the opposite, which a kernel would read."""
    given, (attn, _) = tensors(), fresh()
    for _ in range(2):
        torch.testing.assert_close(attn(*given, backend=backend), oracle(*given), **TOLERANCE)
    own = tensors(gradients=True)
    negated = [torch._neg_view(x) if i == which else x for i, x in enumerate(own)]
    assert negated[which].is_neg()
    out, wanted = attn(*negated, backend=backend), oracle(*negated)
    torch.testing.assert_close(out, wanted, **TOLERANCE)
    d_out = torch._neg_view(torch.linspace(-1, 1, out.numel()).view(out.shape))
    for found, exact in zip(torch.autograd.grad(out, own, d_out), torch.autograd.grad(wanted, own, d_out), strict=True):
        torch.testing.assert_close(found, exact, **TOLERANCE)


def test_a_compiled_caller(looked_up: list[None]) -> None:
    given = tensors()
    call = known(*given)
    compiled = torch.compile(lambda *x: call(*x) * 2, fullgraph=True, backend="eager")
    for seed in (1, 2):
        given = tensors(seed=seed)
        torch.testing.assert_close(compiled(*given), 2 * oracle(*given), **TOLERANCE)
    torch._dynamo.reset()


def test_another_torch_recognises_nothing(monkeypatch: pytest.MonkeyPatch, looked_up: list[None]) -> None:
    monkeypatch.setattr("attndsl.runtime.again._guards", lambda: None)
    given, (call, _) = tensors(), fresh()
    for _ in range(4):
        torch.testing.assert_close(call(*given), oracle(*given), **TOLERANCE)
    assert len(looked_up) == 4
