"""Programs of several branches, views and selections under torch.func and torch.compile; what neither has is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
TOKENS = 21
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "moba": ("examples/patterns/moba.attn", {"block": 8, "n": 2}, {}),
    "nsa": ("examples/patterns/nsa.attn", {"block": 8, "n": 2, "span": 6}, {"gate": torch.rand(3, 1, 4, TOKENS, 3)}),
    "segments": (
        "attention a { input runs : int[b, g, k]  attend causal over pool(max, segments(runs)), window(3) }", {},
        {"runs": (torch.arange(TOKENS) // 5).expand(3, 1, 2, TOKENS).contiguous()},
    ),
    "votes": (
        "attention a { x = attend causal over pool(mean, 4)\n y = attend causal within blocks(4) with probs(x)\n"
        "output y }", {}, {},
    ),
    "listed": (
        "attention a { input p : int[b, g, 3]  attend causal over pick(p) }", {},
        {"p": torch.tensor([0, 4, 9], dtype=torch.int32).expand(3, 1, 2, 3).contiguous()},
    ),
}  # fmt: skip


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 1, heads, TOKENS, 8, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_sample(name: str) -> None:
    """Mapped, with gradients of keys, which entries of views are made of."""
    text, params, inputs = CASES[name]
    attn = attndsl.compile(text, **params)
    q, k, v = tensors()

    def loss(k: Tensor, q: Tensor, v: Tensor, given: dict[str, Any]) -> Tensor:
        out: Tensor = attn(q, k, v, **given)
        return out.square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(k, q, v, inputs)
    for i in range(3):
        leaf = k[i].clone().requires_grad_()
        given: Any = {key: x[i] for key, x in inputs.items()}
        loss(leaf, q[i], v[i], given).backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(found[i], leaf.grad)


def test_one_choice_for_each_of_what_is_mapped() -> None:
    attn = attndsl.compile("examples/patterns/moba.attn", block=8, n=2)
    q, k, _ = tensors()
    found = torch.func.vmap(lambda q: attn.plan(q, k[0])["top"])(q)
    assert torch.equal(found, torch.stack([attn.plan(x, k[0])["top"] for x in q]))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("text", ["causal & window(9)", "attention a { attend causal over pool(mean, 4) }"])
def test_there_is_no_forward_mode(text: str) -> None:
    q, k, v = (x[0] for x in tensors())
    attn = attndsl.compile(text)
    with pytest.raises(attndsl.PatternError, match="forward mode"):
        torch.func.jvp(lambda k: attn(q, k, v), (k,), (k,))


def test_shares_of_two_levels_are_not_transformed() -> None:
    attn = attndsl.compile(
        "attention a { x = attend causal over pool(mean, 16)  y = attend causal within blocks(32) with probs(x)  "
        "output x + y }".replace("  ", "\n")
    )
    q, k, v = (x[0] for x in tensors())
    with pytest.raises(attndsl.PatternError, match="members of two levels"):
        torch.func.grad(lambda k: attn(q, k, v).sum())(k)


@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_one_graph_of_choices_serves_all_lengths(name: str) -> None:
    """Compiled before any size is known: heads and dimensions are settled, tokens stay open."""
    torch._dynamo.reset()
    text, params, _ = CASES[name]
    attn, graphs = attndsl.compile(text, **params), []

    def counting(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def call(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> Tensor:
        out: Tensor = attn(q, k, v, **given) * 2
        return out

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counting)
    for tokens in (40, 57, 33):
        q, k, v = (torch.randn(2, heads, tokens, 16) for heads in (4, 2, 2))
        given = {"gate": torch.rand(2, 4, tokens, 3)} if name == "nsa" else {}
        assert torch.equal(compiled(q, k, v, given), call(q, k, v, given))
    assert len(graphs) == 1


def test_a_map_over_nothing() -> None:
    attn, q = attndsl.compile("causal & window(4)"), torch.randn(0, 1, 2, 9, 8, requires_grad=True)
    out = torch.vmap(lambda x: attn(x, x, x))(q)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == gradient.shape == q.shape
