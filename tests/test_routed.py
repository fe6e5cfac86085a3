"""Attending what selections choose: outputs, lse and gradients against the oracle's, in two steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attndsl
from attndsl.grammar import load
from attndsl.program import Compare, Inter, Selected, Where
from tests.test_select import selections

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")


def tensors(rows: int, k_len: int, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, rows), (kv_heads, k_len), (kv_heads, k_len))
    return [torch.randn(2, *size, dim, generator=generator, dtype=torch.float64) for size in sizes]


def check(text: str, q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> None:
    """Output, lse and gradients against the oracle's, which chooses for itself; float64, so it chooses the same."""
    attn = attndsl.compile(text)
    here, there = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    found = attn(*here, return_lse=True, **inputs)
    wanted = attn.reference(*there, return_lse=True, **inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, atol=1e-10, rtol=1e-10)
    weight = torch.linspace(-1, 1, found[0].numel(), dtype=torch.float64).view(found[0].shape)
    for out, leaves in ((found[0], here), (wanted[0], there)):
        (out * weight).sum().backward()
        assert all(x.grad is not None for x in leaves)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-9)


PATTERNS = (
    "causal & {}",
    "{} | causal & window(3)",
    "causal - {}",
    "causal & ({} | sink(2)) & window(20)",
    "if h % 2 == 0 then {} else causal",
)


# `levels` makes views.
PATTERN_SELECTIONS = selections().filter(lambda text: not text.startswith("levels"))
# Choices that one kernel makes.
FUSED = (
    "top(3, blocks(8), among = causal, by = dot(Q, mean(K)), always = same_block(8), share = group)",
    "top(2, blocks(4), among = all, by = dot(Q, max(K)), always = { k >= Nk - 3 }, forced = extra)",
    "top(5, tokens, share = group, among = causal & { k < Nk - 2 }, by = dot(Q, K))",
)


@settings(max_examples=25, deadline=None)
@given(
    PATTERN_SELECTIONS,
    st.sampled_from(PATTERNS),
    st.integers(1, 26),
    st.integers(0, 99),
)
def test_random_programs(selection: str, pattern: str, k_len: int, seed: int) -> None:
    rows = seed % k_len + 1 if seed % 3 else k_len
    check(pattern.format(selection), *tensors(rows, k_len, seed=seed))


@pytest.mark.parametrize(
    "text",
    [
        "causal & top(2, blocks(8), by = dot(Q, mean(K)), always = same_block(8))",
        "causal & top(2, blocks(8), by = dot(Q, mean(K)), share = group, always = same_block(8), forced = extra)",
        "causal & cover(0.8, blocks(8), per = rows(8), by = antidiagonal(Q, K, 4), always = sink(1) | same_block(8))",
        "causal & (window(4) | top(4, tokens, among = causal - window(4), by = dot(Q, K), share = heads))",
        "causal & top(2, blocks(8), per = head, by = dot(mean(Q), mean(K)))",
        "attention a { plan p = top(2, blocks(8), among = causal, by = dot(Q, mean(K)))"
        "  plan r = top(1, blocks(8), among = causal - p, by = bound(Q, min(K), max(K))) attend causal & (p | r) }",
    ],
)
def test_with_gradients(text: str) -> None:
    check(text, *tensors(40, 40))
    check(text, *tensors(5, 37))
    check(text, *tensors(1, 1))


def test_a_plan_is_injected_and_reused() -> None:
    attn = attndsl.compile("causal & (sink(1) | top(2, blocks(8), among = causal - sink(1), by = dot(Q, mean(K))))")
    q, k, v = tensors(40, 40)
    other, *_ = tensors(40, 40, seed=7)
    plans = attn.plan(other, k)
    reused = attn(q, k, v, plans=plans)
    assert (reused != attn(q, k, v)).any()
    torch.testing.assert_close(reused, attn.reference(q, k, v, plans=plans), atol=1e-10, rtol=1e-10)
    assert (attn(other, k, v, plans=plans) == attn(other, k, v)).all()
    # `among` holds of what is injected: a plan of everything is `causal - sink(1)`.
    everything = torch.ones(2, 1, 1, 5, dtype=torch.uint8)
    causal = attndsl.compile("causal").reference(q, k, v)
    torch.testing.assert_close(attn(q, k, v, plans={"top": everything}), causal, atol=1e-10, rtol=1e-10)


def test_wild_entries_of_a_plan_are_skipped_and_debug_mode_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    attn = attndsl.compile("causal & top(2, blocks(8), by = dot(Q, mean(K)))")
    q, k, v = tensors(40, 40)
    wild = torch.tensor([3, 1, 1 << 30, -7, 4, 4], dtype=torch.int32).expand(2, 4, 40, 6)
    tame = torch.tensor([3, 4], dtype=torch.int32).expand(2, 4, 40, 2)
    # 4 stands after 2**30, which it is not above: it is skipped as well.
    only = attn(q, k, v, plans={"top": tame[..., :1]})
    assert (attn(q, k, v, plans={"top": wild}) == only).all()
    monkeypatch.setenv("ATTNDSL_DEBUG", "1")
    with pytest.raises(attndsl.PatternError, match="A574"):
        attn(q, k, v, plans={"top": wild})
    attn(q, k, v, plans={"top": torch.nn.functional.pad(tame, (0, 2), value=-1)})
    with pytest.raises(attndsl.PatternError, match="A574"):
        attn(q, k, v, plans={"top": torch.nn.functional.pad(tame, (2, 0), value=-1)})


def test_what_is_left_out_is_what_stands_around() -> None:
    """`among`, left out, is fixed before any rewriting: the operands of every `&` on the path, without selections."""

    def among(text: str) -> list[Any]:
        program = load(text).program
        return [selection.among for selection in program.selections]

    causal, window, local = (load(t).program.branch.pattern for t in ("causal", "window(9)", "causal & window(9)"))
    sel = "top(2, blocks(8), by = dot(Q, mean(K)))"
    assert among(f"causal & {sel}") == [causal]
    assert among(f"(({sel}) | sink(4)) & causal & window(9)") == [Inter((causal, window))]
    assert among(f"causal & (sink(1) | window(9) & {sel})") == [Inter((causal, window))]
    assert among(f"causal & {sel} & {sel}") == [causal, causal]
    assert among(f"(causal - sink(1)) & window(9) & {sel} - sink(2)")[0] != [local]
    everything = among(sel)[0]
    assert isinstance(everything, Where) and not isinstance(everything.cond, Compare)


def test_a_branch_that_a_constant_rules_out_selects_nothing() -> None:
    program = load(
        "attention a(dense = 1) { attend causal & (if dense == 1 then all else top(2, blocks(8), among = causal, "
        "by = dot(Q, mean(K)))) }"
    ).program
    assert not program.selections and not program.inputs
    assert not isinstance(program.branch.pattern, Selected)
