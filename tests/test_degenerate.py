"""Calls without batch entries, rows or keys, forward and backward: what is made before a kernel has to bear them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attndsl
from attndsl.diagnostics import PatternError
from attndsl.program import Axis

PROGRAMS = {
    "runs": "causal & (window(5) | sink(2))",
    "pieces": "causal & dilated(3)",
    "cuts": "attention a { input ids : int[b, k] sorted  attend causal & document(ids) }",
    "order": "attention a { input ids : int[b, k]  attend causal & document(ids) }",
    "maps": "attention a { input ids : int[b, k]  attend causal & coarsen(document(ids), 4, any) }",
    "drawn": "causal & random(2, blocks(4), rows(4), 3)",
    "packed": "attention a { input ids : int[b, k]  packed ids  attend causal & window(9) }",
    "skipped": "attention a { input ids : int[b, k]  packed ids  attend causal skip below 0.01 }",
    "grid": "attention a { axes t, y[4], x[4]  attend neighborhood(3) on (y, x) & causal on t & causal }",
    "listed": "causal & top(2, blocks(4), by = bound(Q, min(K), max(K)), share = group, among = causal, "
    "always = same_block(4))",
    "covered": "causal & cover(0.9, blocks(4), by = dot(Q, mean(K)), at_most = 3, always = same_block(4))",
    "pooled": "attention a { attend causal over pool(mean, 4) }",
    "two levels": "attention a { votes = attend causal over pool(mean, 16)\n"
    "far = attend causal within blocks(16) with probs(votes)\n output far }",
    "divided": "attention a { x = attend causal\n output x / Nk + x * log(1.0 * Nq) }",
    "from its start": "attention a { align start  x = attend { k <= q }\n output sigmoid(1.0 / Nk) * x / Nk }",
    "merged": "attention a { x = attend causal & window(3)\n y = attend causal - window(3)\n output merge(x, y) }",
}
# Batch entries, rows, keys.
SIZES = [(0, 8, 8), (2, 0, 8), (2, 0, 0), (2, 3, 0), (2, 9, 5)]


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_calls_of_nothing(name: str, backend: str) -> None:
    attn: Any = attndsl.compile(PROGRAMS[name])
    for batch, rows, keys in SIZES:
        torch.manual_seed(1)
        leaves = [torch.randn(batch, h, n, 8, requires_grad=True) for h, n in ((2, rows), (1, keys), (1, keys))]
        sizes = {Axis.B: batch, Axis.K: keys}
        given = {
            d.name: torch.zeros([sizes[x.axis] for x in d.dims]).int() for d in attn.program.inputs if not d.members
        }
        out = attn(*leaves, backend=backend, **given)
        assert out.shape == (batch, 2, rows, 8)
        exact = attn.reference(*(x.detach() for x in leaves), **given)
        assert torch.allclose(out.double(), exact, atol=1e-5, rtol=1e-5), (batch, rows, keys)
        out.sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_sequences_without_tokens_have_no_output(backend: str) -> None:
    """Whatever it says of their rows, which stand somewhere under `align start`."""
    text = "input n : int[b]\n lengths n\n x = attend { k % 2 == 0 }\n y = attend { k % 2 > 0 }"
    for output in ("merge(x, y) / Nk", "x * log(1.0 * Nk) + y", "x / Nk + 1.0 / Nk"):
        attn = attndsl.compile(f"attention a {{ align start  {text}  output {output} }}")
        leaves = [torch.randn(3, 2, 6, 8, requires_grad=True) for _ in range(3)]
        n = torch.tensor([6, 0, 3])
        out, exact = attn(*leaves, backend=backend, n=n), attn.reference(*leaves, n=n)
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
        assert out[0].any() and not out[1].any()
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        assert all(x.isfinite().all() and not x[1].any() for x in gradients)


@pytest.mark.parametrize("f", ["mean", "min"])
def test_entries_longer_than_a_call(f: str) -> None:
    """They have the call's tokens, and take no more memory than these."""
    found = []
    for size in (13, 2**31 - 1):
        attn = attndsl.compile(f"attention a {{ attend causal over pool({f}, {size}, 3, visible = any) }}")
        leaves = [torch.linspace(-2, 2, 208).sin().view(1, 2, 13, 8).requires_grad_() for _ in range(3)]
        out, (q, k, v) = attn(*leaves), (x.detach() for x in leaves)
        last = attn.decode(q[:, :, -1:], k, v, torch.tensor([13], dtype=torch.int32))
        found.append((out, last, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*found, atol=0, rtol=0)


def test_no_heads() -> None:
    x = torch.randn(1, 0, 4, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    for name in PROGRAMS:
        given: dict[str, Any] = {} if "ids" not in PROGRAMS[name] else {"ids": torch.zeros(1, 4).int()}
        with pytest.raises(PatternError, match="A505"):
            attndsl.compile(PROGRAMS[name])(*x, **given)
