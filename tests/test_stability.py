"""The stability warning: which selections let a row depend on what follows it, checked against what they choose."""

from __future__ import annotations

import pytest
import torch

from attndsl.api import load_attention

OWN = "always = same_block(4)"
STABLE = [
    f"causal & top(2, blocks(4), by = dot(Q, mean(K)), {OWN})",
    f"causal & top(2, blocks(4), by = dot(Q, mean(K)), {OWN}, forced = extra)",
    f"causal & cover(0.6, blocks(4), by = dot(Q, mean(K)), {OWN}, forced = extra, at_most = 3)",
    f"causal & top(2, blocks(4), by = dot(Q, mean(K)), share = heads, {OWN})",
    "causal & top(2, blocks(4), by = dot(Q, mean(K)), always = window(4))",
    "causal & top(2, blocks(4), by = dot(Q, first(K)))",
    "causal & (same_block(4) | top(2, blocks(4), among = causal - same_block(4), by = dot(Q, mean(K))))",
    "causal & top(3, tokens, by = dot(Q, K), share = heads)",
]
UNSTABLE = [
    "causal & top(2, blocks(4), by = dot(Q, mean(K)))",
    "causal & top(2, blocks(4), by = bound(Q, min(K), max(K)), always = sink(4))",
    f"causal & top(2, blocks(4), by = dot(Q, mean(K)), {OWN}, forced = overlay)",
    f"causal & cover(0.6, blocks(4), by = dot(Q, mean(K)), {OWN}, at_most = 3)",
    f"causal & top(2, blocks(4), by = dot(Q, mean(K)), share = heads, normalise = softmax, {OWN})",
]


def leaks(text: str) -> bool:
    """Whether some row's plan changes with keys that lie after it, over a few random calls."""
    attn = load_attention(text)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        q, k = 3 * torch.randn(1, 4, 24, 8, generator=generator), torch.randn(1, 1, 24, 8, generator=generator)
        other = k.clone()
        other[:, :, 14:] = 3 * torch.randn(1, 1, 10, 8, generator=generator)
        before, after = (next(iter(attn.plan(q, x).values()))[:, :, :14] for x in (k, other))
        if (before != after).any():
            return True
    return False


@pytest.mark.parametrize("text", STABLE)
def test_stable(text: str) -> None:
    assert not [w for w in load_attention(text).warnings if w.code == "W305"]
    assert not leaks(text)


@pytest.mark.parametrize("text", UNSTABLE)
def test_unstable(text: str) -> None:
    (warning,) = [w for w in load_attention(text).warnings if w.code == "W305"]
    assert "row 0 ranks tokens 0 to 3" in warning.render() or "row 4 ranks tokens 4 to 7" in warning.render()
    assert leaks(text)


@pytest.mark.parametrize("around", ["input doc : int[b, k] sorted\n packed doc", "input n : int[b]\n lengths n"])
def test_documents_are_judged_as_if_alone(around: str) -> None:
    for text, leak in ((STABLE[0], False), (STABLE[6], False), (UNSTABLE[0], True), (UNSTABLE[3], True)):
        found = load_attention(f"attention a {{\n {around}\n attend {text}\n}}").warnings
        assert [w.code for w in found if w.code == "W305"] == ["W305"] * leak, text


def test_what_is_not_causal_or_not_for_queries_is_not_judged() -> None:
    for text in (
        "top(2, blocks(4), by = dot(Q, mean(K)))",
        "causal & top(2, blocks(4), per = rows(4), by = dot(mean(Q), mean(K)))",
        "attention a { input s_ : float[b, h, q, k/4]  attend causal & top(2, blocks(4), by = s_) }",
    ):
        assert not [w for w in load_attention(text).warnings if w.code == "W305"]
