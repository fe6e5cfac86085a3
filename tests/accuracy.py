"""How the kernels are judged: their error against the oracle's, and on how many random programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from attndsl.program import Program, Scalar
from attndsl.runtime.reference import reference
from attndsl.simplify import specialise


def examples(count: int) -> settings:
    """So many random programs; the profile `thorough` multiplies them."""
    factor = settings().max_examples / settings.get_profile("default").max_examples
    return settings(max_examples=round(count * factor), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plain(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    args: Mapping[str, int],
    scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    """What a simple implementation computes: scores and softmax in float32, the product with v in the call's dtype.

    The mask and the scores' expression are the oracle's, asked to compute in float32: about the product q . k, with
    one-hot keys and values, it answers with the weights.
    """
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    share = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(share, dim=1) for x in (k, v))
    dots = q.to(high) @ keys.to(high).transpose(-1, -2)
    one_hot = torch.eye(k.shape[2], dtype=high, device=q.device).expand(*k.shape[:2], -1, -1)
    sizes = {"D": q.shape[3], "Dv": v.shape[3]}

    def known(e: Scalar | None) -> Scalar | None:
        return None if e is None else specialise(e, sizes)

    branch = program.branch
    branch = replace(
        branch, scale=known(branch.scale), score=known(branch.score), sink=known(branch.sink),
        weights=known(branch.weights),
    )  # fmt: skip
    if scale is None and branch.scale is None:
        scale = q.shape[3] ** -0.5
    lse: Tensor | None = None
    asked = (replace(program, branches=(branch,)), dots, one_hot, one_hot, inputs, args, scale)
    if branch.weights is None:
        weights, lse = reference(*asked, return_lse=True, dtype=high)
    else:
        weights = reference(*asked, dtype=high)
    return weights.to(q.dtype) @ values, lse


def check(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    args: Mapping[str, int],
    out: Tensor,
    lse: Tensor,
    scale: float | None = None,
) -> None:
    """Assert that a kernel's output is right (FlashAttention's criterion).

    The largest error against the float64 oracle is at most twice that of `plain`, and a slack of a few units in the
    last place, of scores too: what weighs in a row has a score near its lse, and a weight is off by as much as its
    score is. Rows that see nothing are exactly 0 with lse -inf; with a sink, lse is the sink.
    """
    assert out.dtype == q.dtype
    assert out.shape == (*q.shape[:3], v.shape[3])
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    softmax = program.branch.weights is None
    simple, simple_lse = plain(program, q, k, v, inputs, args, scale)
    expected_lse: Tensor | None = None
    if softmax:
        expected, expected_lse = reference(program, q, k, v, inputs, args, scale, return_lse=True)
    else:
        expected = reference(program, q, k, v, inputs, args, scale)
    assert not out.isnan().any()
    # Without normalisation outputs grow with the number of keys.
    size = max(1.0, float(expected.abs().amax()) if expected.numel() else 0.0)
    score = 1.0
    if expected_lse is not None:
        reached = expected_lse[expected_lse != -torch.inf]
        score = max(1.0, float(reached.abs().amax()) if reached.numel() else 0.0)
    slack = 4 * torch.finfo(out.dtype).eps * size + 16 * torch.finfo(high).eps * size * score
    _close(out, expected, simple, slack, "out")
    if expected_lse is None or simple_lse is None:
        return
    assert lse.shape == q.shape[:3]
    assert lse.dtype == high
    empty = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), "rows that see nothing have lse -inf, and only they"
    assert not out[empty].any(), "rows that see nothing are exactly 0"
    slack = 16 * torch.finfo(high).eps * score
    _close(lse[~empty], expected_lse[~empty], simple_lse[~empty], slack, "lse")


def _close(found: Tensor, expected: Tensor, simple: Tensor, slack: float, what: str) -> None:
    if not expected.numel():
        return
    error = float((found.double() - expected).abs().amax())
    bound = 2 * float((simple.double() - expected).abs().amax()) + slack
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"
