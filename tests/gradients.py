"""How gradients are judged: against the oracle's, which torch differentiates in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from attndsl.program import Program
from attndsl.runtime.reference import reference
from tests.strategies import Case, tensors

# Largest error, as a share of the largest gradient, that rounding explains.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 4e-2}

Run = Callable[..., tuple[Sequence[Tensor], Sequence[Tensor | None]]]


def upstream(q: Tensor, v: Tensor, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse."""
    generator = torch.Generator().manual_seed(seed)
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(q.dtype)
    return dout, torch.randn(q.shape[:3], generator=generator).to(high)


def expected_gradients(
    program: Program, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    dout: Tensor, dlse: Tensor | None, scale: float | None = None, dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """The oracle's gradients: of q, k, v, and of each input (None where it is not learnable)."""
    q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    given = {
        name: x.detach().to(dtype).requires_grad_(program.input(name).learnable) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    learned = [given[decl.name] for decl in program.inputs if decl.learnable]
    lse: Tensor | None = None
    if program.branch.weights is None:
        out, lse = reference(program, q, k, v, given, args, scale, return_lse=True, dtype=dtype)
    else:
        out = reference(program, q, k, v, given, args, scale, dtype=dtype)
    loss = (out * dout.to(dtype)).sum()
    if dlse is not None and lse is not None:
        loss = loss + torch.where(lse == -torch.inf, 0.0, lse * dlse.to(dtype)).sum()
    found = torch.autograd.grad(loss, (*leaves, *learned), allow_unused=True, materialize_grads=True)
    by_input = iter(found[3:])
    return list(found[:3]), [next(by_input) if decl.learnable else None for decl in program.inputs]


def judge(run: Run, case: Case, dtype: torch.dtype, uses_lse: bool = True, scale: float | None = None) -> None:
    """Assert that the gradients of a case are the oracle's, up to what rounding explains.

    That is a share of the largest gradient, and twice what the oracle itself is off by when it computes in float32
    (large scores make their weights inexact).

    `run(program, dout, dlse, q, k, v, inputs, args, scale)` gives those of q, k, v, and of the inputs.
    """
    program = case.load()
    q, k, v, inputs = tensors(case, dtype=dtype)
    if dtype == torch.float64:
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    dout, dlse = upstream(q, v)
    given = dlse if uses_lse and program.branch.weights is None else None
    found, learned = run(program, dout, given, q, k, v, inputs, case.args, scale)
    asked = (program, q, k, v, inputs, case.args, dout, given, scale)
    expected, expected_learned = expected_gradients(*asked)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    simple, simple_learned = expected_gradients(*asked, high)
    for name, x, gradient, right, rough in zip("qkv", (q, k, v), found, expected, simple, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
        _close(gradient, right, rough, TOLERANCE[dtype], f"d{name}")
    for decl, gradient_or_none, right_or_none, rough_or_none in zip(
        program.inputs, learned, expected_learned, simple_learned, strict=True
    ):
        if right_or_none is None:
            assert gradient_or_none is None, f"`{decl.name}` is not learnable"
        elif gradient_or_none is None:
            assert not right_or_none.any(), f"`{decl.name}` has a gradient"
        else:
            assert rough_or_none is not None
            assert gradient_or_none.shape == inputs[decl.name].shape
            assert gradient_or_none.dtype == inputs[decl.name].dtype
            _close(gradient_or_none, right_or_none, rough_or_none, TOLERANCE[dtype], f"`{decl.name}`")
    if program.branch.weights is None and program.branch.sink is None:
        _, lse = reference(program, q, k, v, inputs, case.args, scale, return_lse=True)
        assert not found[0][lse == -torch.inf].any(), "rows that see nothing have gradients of exactly 0"


def _close(found: Tensor, right: Tensor, rough: Tensor, tolerance: float, what: str) -> None:
    assert not found.isnan().any(), what
    if right.numel():
        size = max(1.0, float(right.abs().amax()))
        error = float((found.double() - right).abs().amax())
        allowed = tolerance * size + 2 * float((rough.double() - right).abs().amax())
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
