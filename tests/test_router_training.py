"""A router learns where to look: the pooled branch, which sees every block a little, teaches it.

A sequence has one planted token, in a block of its own choice, whose value the last row is asked for. Keys are a
learned map that begins the wrong way round: the planted block is ranked last, so the routed branch never reads it.
Gradients through the chosen blocks cannot mend that; those through the pooled entries do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attndsl

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
TOKENS, BLOCK, DIM = 48, 8, 16
# From q, k, v and the gates.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ROUTER = """attention router(block = 8, n = 2) {
    input gate : float[h, 2] learnable
    summary = attend causal over pool(mean, block)
    routed = attend causal & top(n, blocks(block), by = probs(summary), always = same_block(block))
    output sigmoid(gate[h, 0]) * summary + sigmoid(gate[h, 1]) * routed
}"""
# The same, with the summary handed in: nothing learns through it.
CUT = """attention cut(block = 8, n = 2) {
    input gate : float[h, 2] learnable
    input far : float[b, h, q, Dv]
    summary = attend causal over pool(mean, block)
    routed = attend causal & top(n, blocks(block), by = probs(summary), always = same_block(block))
    output sigmoid(gate[h, 0]) * far + sigmoid(gate[h, 1]) * routed
}"""
SUMMARY = "attention summary(block = 8) { attend causal over pool(mean, block) }"


class Router(nn.Module):
    """One head: queries are the tokens, keys a map of them, and two gates."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.of_key = nn.Linear(DIM, DIM, bias=False)
        with torch.no_grad():
            # What marks the planted token, feature 1, points away from what asks for it, feature 0.
            self.of_key.weight.copy_(torch.eye(DIM))
            self.of_key.weight[:, :2] = 0.0
            self.of_key.weight[0, 1] = -0.5
        self.gate = nn.Parameter(torch.zeros(1, 2))

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return self.attend(x[:, None], self.of_key(x)[:, None], v[:, None], self.gate)[:, 0, -1]


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and values [size, TOKENS, DIM], the value asked for [size, DIM], and the planted token's block."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(size, TOKENS, DIM, generator=generator)
    v = 0.3 * torch.randn(size, TOKENS, DIM, generator=generator)
    place = torch.randint(0, TOKENS - BLOCK, (size,), generator=generator)
    wanted, rows = torch.randn(size, DIM, generator=generator), torch.arange(size)
    x[..., :2] = 0.0
    x[rows, place, 1] = 6.0
    x[:, -1, 0] = 6.0
    v[rows, place] = wanted
    return x, v, wanted, place // BLOCK


def found(model: Router) -> float:
    """How often the block is planned for the last row, over sequences that no step has seen."""
    x, _, _, block = batch(10_000, size=64)
    q, k = x[:, None], model.of_key(x)[:, None]
    plan = attndsl.compile(ROUTER).plan(q, k, gate=model.gate)["top"]
    return float((plan[:, 0, -1] == block[:, None]).any(-1).float().mean())


def trained(attend: Attend, steps: int = 40) -> tuple[Router, float, float]:
    """A router, and its loss before and after."""
    model = Router(attend)
    assert found(model) == 0.0
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), list[float]()
    for step in range(steps):
        x, v, wanted, _ = batch(step)
        loss = (model(x, v) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses[0], sum(losses[-10:]) / 10


def test_a_router_learns_through_its_pooled_branch() -> None:
    attn = attndsl.compile(ROUTER)
    model, first, last = trained(lambda q, k, v, gate: attn(q, k, v, gate=gate))
    assert found(model) > 0.95
    assert last < 0.2 * first


def test_without_it_it_does_not() -> None:
    """The same outputs, step by step, were it not for the gradient that is cut."""
    attn, summary = attndsl.compile(CUT), attndsl.compile(SUMMARY)

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        out: Tensor = attn(q, k, v, gate=gate, far=summary(q, k, v).detach())
        return out

    x, v, _, _ = batch(0)
    q, k, v, gate = x[:, None], x[:, None], v[:, None], torch.zeros(1, 2)
    torch.testing.assert_close(attend(q, k, v, gate), attndsl.compile(ROUTER)(q, k, v, gate=gate))
    model, first, last = trained(attend)
    assert found(model) == 0.0
    assert last > 0.8 * first
    # Nothing was learned about what marks the token: no row that is asked about ever read one.
    assert model.of_key.weight[:, 1].tolist() == [-0.5, *[0.0] * (DIM - 1)]
