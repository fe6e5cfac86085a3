"""Plain dense attention, the yardstick of every correctness check, and the criterion it is used with.

A result passes as FlashAttention's own tests have it: its largest error against float64 is at most
twice that of plain PyTorch attention computed in the same dtype, plus a few float32 roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rows import MaskRule

SLACK = 16 * torch.finfo(torch.float32).eps
ROWS_AT_A_TIME = 1024


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    dtype: torch.dtype,
    score: Callable[[Tensor], Tensor] | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [..., R, D] over k [..., N, D], v [..., N, Dv] where `allowed` [..., R, N], all in `dtype`.

    `score` maps the scaled products, `sink` [..., 1, 1] is one more logit of the denominator. Returns
    the output [..., R, Dv] and the lse [..., R]; a row that sees nothing gives 0 and -inf (or the sink).
    """
    s = (q.to(dtype) @ k.to(dtype).mT) * (1 / math.sqrt(q.shape[-1]))
    if score is not None:
        s = score(s)
    s = s.masked_fill(~allowed, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink.to(dtype).expand(*s.shape[:-1], 1)], -1)
    p = torch.softmax(s, -1).nan_to_num(0.0)
    return p[..., : k.shape[-2]] @ v.to(dtype), torch.logsumexp(s.detach(), -1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Largest error of a result and the largest that is allowed."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def judge(result: Tensor, exact: Tensor, plain: Tensor, cancelled: float = 0.0) -> Verdict:
    """Compare a result with the float64 one, allowing twice the error of plain attention in the result's dtype.

    cancelled: how large the terms were whose difference the result is. Of one key, plain attention takes two equal
    numbers from each other, and a kernel that adds them up in another order two that differ in their last bits.
    """
    exact = exact.double()
    error = (result.double() - exact).abs().max() if result.numel() else torch.zeros(())
    plain_error = (plain.double() - exact).abs().max() if result.numel() else torch.zeros(())
    slack = SLACK * (1 + cancelled + (float(exact.abs().max()) if result.numel() else 0.0))
    return Verdict(float(error), 2 * float(plain_error) + slack)


def worst(verdicts: list[Verdict]) -> Verdict:
    """The verdict that is furthest from passing (a NaN error counts as infinitely far)."""
    return max(verdicts, key=lambda v: math.inf if math.isnan(v.error) else v.error / v.allowed)


def sampled_rows(n: int) -> Tensor:
    """Row numbers to check: both ends, around the middle, and a fixed random sample; all of a short sequence."""
    if n <= 2 * ROWS_AT_A_TIME:
        return torch.arange(n)
    middle = n // 2
    scattered = torch.randperm(n, generator=torch.Generator().manual_seed(3))[:320]
    fixed = [torch.arange(64), torch.arange(middle - 64, middle + 64), torch.arange(n - 64, n)]
    sample: Tensor = torch.unique(torch.cat([*fixed, scattered]))
    return sample


def check_forward(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule) -> Verdict:
    """Judge sampled rows of the first and last head of an output [B, H, N, Dv] (as many KV heads as heads)."""
    rows = sampled_rows(q.shape[2]).to(q.device)
    k_pos = torch.arange(k.shape[2], device=q.device)
    verdicts = []
    for head in {0, q.shape[1] - 1}:
        b, h = (torch.tensor(x, device=q.device) for x in (0, head))
        for part in torch.tensor_split(rows, -(-len(rows) // ROWS_AT_A_TIME)):
            allowed = rule(b, h, part[:, None], k_pos)
            args = (q[0, head, part], k[0, head], v[0, head], allowed)
            exact, plain = attend(*args, torch.float64)[0], attend(*args, q.dtype)[0]
            verdicts.append(judge(out[0, head, part], exact, plain))
    return worst(verdicts)


def check_backward(grads: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rule: MaskRule) -> Verdict:
    """Judge dq, dk, dv of the first and last head, whole (a key's gradient needs every row)."""
    verdicts = []
    for head in {0, q.shape[1] - 1}:
        args = (q[0, head], k[0, head], v[0, head], dout[0, head], rule, head)
        exact, plain = dense_gradients(*args, torch.float64), dense_gradients(*args, q.dtype)
        verdicts += [judge(g[0, head], e, p) for g, e, p in zip(grads, exact, plain, strict=True)]
    return worst(verdicts)


def dense_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rule: MaskRule, head: int, dtype: torch.dtype
) -> list[Tensor]:
    """dq, dk, dv of one head, q, k, v, dout [N, D], by autograd over chunks of rows."""
    # Leaves wider than `dtype`, so that adding up the chunks does not round.
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
    b, h = (torch.tensor(x, device=q.device) for x in (0, head))
    k_pos = torch.arange(k.shape[0], device=q.device)
    for part in torch.tensor_split(k_pos, -(-len(k_pos) // ROWS_AT_A_TIME)):
        allowed = rule(b, h, part[:, None], k_pos)
        out, _ = attend(leaves[0][part], leaves[1], leaves[2], allowed, dtype)
        torch.autograd.backward(out, dout[part].to(dtype))
    return [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
