"""Whole calls of attention that chooses its blocks, choice and gradients included, beside dense causal attention.

MoBA as published, and the whole of NSA: pooled branch, choice by its probabilities, chosen blocks, window and gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.dense import Verdict
from benchmarks.timing import milliseconds

# Rows of a call that are checked: its last ones, against float64, with what they chose.
_CHECKED = 8


@dataclass(frozen=True, slots=True)
class System:
    """A program, and the heads with which it was published.

    gates: of how many branches. count: members of a plan that is given.
    """

    name: str
    text: str
    heads: int
    kv_heads: int
    gates: int = 0
    count: int = 0


def systems(block: int = 512, count: int = 3, small: int = 64, chosen: int = 16, span: int = 512) -> tuple[System, ...]:
    """MoBA (block, count), NSA (small, chosen, span), and NSA's second branch with a plan that is given."""
    moba = f"causal & top({count}, blocks({block}), by = dot(Q, mean(K)), always = same_block({block}))"
    top = f"top({chosen}, blocks({small}), by = probs(summary), share = group, always = same_block({small}))"
    nsa = f"""attention nsa {{
        input gate : float[b, h, q, 3] learnable
        summary = attend causal over pool(mean, {small})
        routed = attend causal & {top}
        near = attend causal & window({span})
        output gate[0] * summary + gate[1] * routed + gate[2] * near
    }}"""
    branch = f"attention chosen {{ input p : blocks({small})[b, g, q]\n attend causal & p }}"
    return (
        System(f"MoBA ({block}, {count})", f"attention moba {{ attend {moba} }}", 16, 16),
        System(f"NSA ({small}, {chosen}, {span})", nsa, 64, 4, gates=3),
        System(f"chosen blocks ({small}, {chosen})", branch, 64, 4, count=chosen),
    )


def random_blocks(heads: int, n: int, block: int, count: int, device: torch.device, seed: int = 0) -> Tensor:
    """int32 [1, heads, n, count]: for each row its own block and random ones before it, -1 where there are none."""
    generator = torch.Generator(device).manual_seed(seed)
    blocks = -(-n // block)
    own = torch.arange(n, device=device) // block
    found = []
    for rows in torch.split(own, 4096):
        scores = torch.rand(heads, len(rows), blocks, generator=generator, device=device)
        scores = scores.masked_fill(torch.arange(blocks, device=device) > rows[:, None], -1.0)
        scores.scatter_(-1, rows.view(1, -1, 1).expand(heads, -1, 1), 2.0)
        best = scores.topk(min(count, blocks), -1)
        members = torch.where(best.values < 0, blocks, best.indices).sort(-1).values
        found.append(torch.where(members < blocks, members, -1))
    return torch.cat(found, 1)[None].to(torch.int32)


def blocks_rule(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, block: int, dout: Tensor, rows: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of each row to the keys, up to its own, of the blocks that it chose: output and gradients, float32.

    q, dout [1, H, N, D]; k, v [1, G, N, D]; plan [1, G, N, C]. A few rows at a time, so N may be large.
    """
    n, dim, group = q.shape[2], q.shape[3], q.shape[1] // k.shape[1]
    keys, values = (x[0].float().requires_grad_() for x in (k, v))
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    outs, dqs = [], []
    for first in range(0, n, rows):
        at = slice(first, min(first + rows, n))
        chosen = plan[0, :, at].long()
        places = (chosen.clamp(min=0)[..., None] * block + torch.arange(block, device=q.device)).flatten(-2)
        seen = (places <= torch.arange(at.start, at.stop, device=q.device)[:, None]) & (places < n)
        seen &= (chosen >= 0).repeat_interleave(block, -1)
        mine = torch.unflatten(q[0, :, at].float(), 0, (-1, group)).requires_grad_()
        heads = torch.arange(len(keys), device=q.device)[:, None, None]
        near = places.clamp(max=n - 1)
        scores = torch.einsum("ghrd,grkd->ghrk", mine, keys[heads, near]) * dim**-0.5
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        out = torch.einsum("ghrk,grkd->ghrd", weights, values[heads, near])
        upper = torch.unflatten(dout[0, :, at].float(), 0, (-1, group))
        d_mine, d_keys, d_values = torch.autograd.grad(out, (mine, keys, values), upper)
        dk += d_keys
        dv += d_values
        outs.append(out.detach().flatten(0, 1))
        dqs.append(d_mine.flatten(0, 1))
    return torch.cat(outs, 1)[None], torch.cat(dqs, 1)[None], dk[None], dv[None]


def run_routed(
    n: int, dim: int, dtype: torch.dtype, device: torch.device, dense: bool, which: Sequence[System]
) -> Iterator[list[str]]:
    """A header, and a row for each system: its times in ms, and how many times faster than dense attention it is.

    dense: whether dense attention is timed at all.
    """
    yield ["system", "Hq/Hkv", "N", "choice", "forward", "with gradients", "dense forward", "dense with gradients"]
    for system in which:
        yield [system.name, f"{system.heads}/{system.kv_heads}", str(n), *_cells(system, n, dim, dtype, device, dense)]


def _cells(system: System, n: int, dim: int, dtype: torch.dtype, device: torch.device, dense: bool) -> list[str]:
    import attndsl

    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, size: int = dim) -> Tensor:
        return torch.randn(1, heads, n, size, generator=generator, dtype=dtype, device=device)

    attn, given = attndsl.compile(system.text), dict[str, Any]()
    if system.gates:
        given["gate"] = random(system.heads, system.gates).sigmoid()
    leaves = [random(system.heads), random(system.kv_heads), random(system.kv_heads), *given.values()]
    q, k, v, *_ = (x.requires_grad_() for x in leaves)
    for decl in attn.program.inputs:
        if system.count and decl.members:
            given[decl.name] = random_blocks(system.kv_heads, n, decl.members, system.count, device)
    verdict = check(attn, q, k, v, given)
    if not verdict.passed:
        return [f"FAILED: error {verdict.error:.1e}, allowed {verdict.allowed:.1e}", *["-"] * 4]
    choice = "given" if system.count else f"{milliseconds(lambda: attn.plan(q, k, **given), device):.2f}"
    dout = random(system.heads)
    ours = timed(lambda: attn(q, k, v, **given), leaves, dout, device)
    cells = [choice, *(f"{x:.2f}" for x in ours)]
    if not dense:
        return [*cells, "-", "-"]
    others = dense_times(q, k, v, dout, device)
    return [*cells, *(f"{x:.2f} ({x / y:.2f}x)" for x, y in zip(others, ours, strict=True))]


def timed(call: Any, leaves: list[Tensor], dout: Tensor, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a call, and of a call and its gradients."""

    def both() -> object:
        return torch.autograd.grad(call(), leaves, dout)

    with torch.no_grad():
        forward = milliseconds(call, device)
    return forward, milliseconds(both, device)


def dense_times(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, device: torch.device) -> tuple[float, float]:
    """Causal attention by flash on a GPU, every query head with keys of its own."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    group = q.shape[1] // k.shape[1]
    keys, values = (x.detach().repeat_interleave(group, 1).requires_grad_() for x in (k, v))
    flash: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    with flash:
        return timed(
            lambda: scaled_dot_product_attention(q, keys, values, is_causal=True), [q, keys, values], dout, device
        )


def check(attn: Any, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> Verdict:
    """The call's last rows against float64 with what they chose; the error allowed is that of rounding to the dtype."""
    rows = slice(max(0, q.shape[2] - _CHECKED), None)
    with torch.no_grad():
        plans = attn.plan(q, k, **given) if attn.program.selections else {}
        out = attn(q, k, v, plans=plans, **given)[:, :, rows].double()
        own, last = ({name: x[:, :, rows] for name, x in found.items()} for found in (plans, given))
        exact = attn.reference(q[:, :, rows], k, v, plans=own, **last)
    error = float((out - exact).abs().max())
    return Verdict(error, 16 * torch.finfo(q.dtype).eps * max(1.0, float(exact.abs().max())))
