"""`attn.plan`: plans as tensors, in compiled graphs, with the call's scale, and refused calls."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import attndsl
from attndsl.api import load_attention

TEXT = """
attention a {
    input gate : float[b, h, q/8, k/8]
    scale 0.5
    plan near  = top(2, blocks(8), among = causal, by = dot(Q, mean(K)), share = group, always = same_block(8))
    plan broad = cover(0.6, blocks(8), per = rows(8), among = causal, by = gate)
    attend causal
}
"""


def call(rows: int = 40, k_len: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, rows, 16, generator=generator), torch.randn(2, 2, k_len, 16, generator=generator)
    return q, k, torch.randn(2, 4, -(-k_len // 8), -(-k_len // 8), generator=generator)


def test_plans_by_name() -> None:
    attn = attndsl.compile(TEXT)
    q, k, gate = call()
    plans = attn.plan(q.requires_grad_(), k, gate=gate)
    assert list(plans) == ["near", "broad"]
    assert plans["near"].shape == (2, 2, 40, 2) and plans["near"].dtype == torch.int32
    assert plans["broad"].shape == (2, 4, 5, 5) and plans["broad"].dtype == torch.uint8
    assert not plans["near"].requires_grad
    assert (plans["near"].max(-1).values == torch.arange(40) // 8).all()


def test_a_chunk_chooses_what_the_whole_does() -> None:
    attn = attndsl.compile(TEXT)
    q, k, gate = call()
    whole, chunk = attn.plan(q, k, gate=gate)["near"], attn.plan(q[:, :, -7:], k, gate=gate)["near"]
    assert (chunk == whole[:, :, -7:]).all()


def test_a_negative_scale_turns_the_choice_around() -> None:
    attn = attndsl.compile("attention a { plan sel = top(1, blocks(8), among = all, by = dot(Q, mean(K))) attend all }")
    q, k, _ = call()
    dots = q[:, 0] @ k[:, 0].reshape(2, 5, 8, 16).mean(2).transpose(1, 2)
    assert (attn.plan(q, k)["sel"][:, 0, :, 0] == dots.argmax(-1)).all()
    assert (attn.plan(q, k, scale=-1.0)["sel"][:, 0, :, 0] == dots.argmin(-1)).all()


def test_in_a_compiled_graph_with_new_lengths() -> None:
    attn = attndsl.compile(TEXT)
    compiled = torch.compile(attn.plan, fullgraph=True, backend="aot_eager")
    for rows in (40, 56):
        q, k, gate = call(rows, rows)
        for name, plan in attn.plan(q, k, gate=gate).items():
            assert (compiled(q, k, gate=gate)[name] == plan).all()


def test_a_call_that_does_not_fit_is_refused() -> None:
    attn = attndsl.compile(TEXT)
    q, k, gate = call()
    with pytest.raises(attndsl.PatternError, match="A513"):
        attn.plan(q, k, gate=gate[:, :, :3])
    with pytest.raises(attndsl.PatternError, match="A504"):
        attn.plan(q, k[:1], gate=gate)


def test_explain_says_what_a_selection_chooses_among() -> None:
    attn = load_attention("causal & (sink(1) | top(2, blocks(8), by = dot(Q, mean(K)), always = same_block(8)))")
    text = str(attn.explain(64))
    assert "top = top(2, blocks(8), per = query, by = dot(Q, mean(K)), among = { k <= q }, always = " in text
    assert "give `top` to see the keys of sample rows" in text
    rows = load_attention("causal & cover(0.5, blocks(8), per = rows(8), by = antidiagonal(Q, K, 4), exclusive)")
    said = "cover(0.5, blocks(8), per = rows(8), by = antidiagonal(Q, K, 4), among = { k <= q }, exclusive = true)"
    assert f"{said}, made in each call; what a row chooses may depend on tokens after it" in str(rows.explain(64))


ROUTED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "moba": ({"block": 32, "n": 3}, {}),
    "nsa": ({"block": 16, "n": 4, "span": 40}, {"gate": (1, 4, 100, 3)}),
    "hsa": ({}, {"summary": (1, 2, 2, 16)}),
}


@pytest.mark.parametrize("name", ROUTED)
def test_nothing_of_a_step_waits_for_the_collector(name: str) -> None:
    """What a call made is freed with its output: Python looks for cycles when it likes, with a device full by then."""
    params, sizes = ROUTED[name]
    attn = attndsl.compile(Path(__file__).parent.parent / "examples" / "patterns" / f"{name}.attn", **params)
    leaves = [torch.randn(1, heads, 100, 16, requires_grad=True) for heads in (4, 2, 2)]
    inputs: dict[str, Any] = {each: torch.randn(size, requires_grad=True) for each, size in sizes.items()}

    def step() -> None:
        out = attn(*leaves, **inputs)
        torch.autograd.grad(out, [*leaves, *inputs.values()], torch.ones_like(out))

    def tensors() -> int:
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        step()
        assert tensors() == before
    finally:
        gc.enable()
