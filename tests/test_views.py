"""Views, parts of one softmax, several branches and their output: the oracle against rules written out in numpy.

A rule lists, for a row, pairs of a logit and a value: what the language says of entries, token by token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attndsl
from tests.view_rules import Array, Rule, attended, pooled, tokens


def causal(q: int, k: int) -> bool:
    return k <= q


def window(q: int, k: int) -> bool:
    return 0 <= q - k < 4


def every(q: int, k: int) -> bool:
    return True


def far(q: int, k: int) -> bool:
    return q // 4 - k // 4 >= 2


def near(q: int, k: int) -> bool:
    return k <= q and q // 4 - k // 4 < 2


# text of what is attended -> the rules of its parts
SOFTMAXES: dict[str, list[Rule]] = {
    "causal over pool(mean, 4)": [pooled(causal, "mean", 4)],
    "causal over pool(max, 4, 2)": [pooled(causal, "max", 4, 2)],
    "causal over pool(min, 2, 3)": [pooled(causal, "min", 2, 3)],
    "causal over pool(sum, 3, visible = any)": [pooled(causal, "sum", 3, any=True)],
    "all over pool(mean, 5, counted)": [],
    "all over pool(mean, 5, counted, visible = any)": [pooled(every, "mean", 5, any=True, counted=True)],
    "causal & window(4), causal over pool(mean, 4)": [
        tokens(lambda q, k: causal(q, k) and window(q, k)), pooled(causal, "mean", 4),
    ],
    "causal & { q // 4 - k // 4 < 2 }, { q // 4 - k // 4 >= 2 } over pool(mean, 4, counted)": [
        tokens(near), pooled(far, "mean", 4, counted=True),
    ],
    "causal over pool(mean, 2), causal over pool(mean, 4), causal over pool(mean, 8)": [
        pooled(causal, "mean", 2), pooled(causal, "mean", 4), pooled(causal, "mean", 8),
    ],
}  # fmt: skip
SOFTMAXES["all over pool(mean, 5, counted)"] = [pooled(every, "mean", 5, counted=True)]


def tensors(rows: int, k_len: int, dim: int = 8, v_dim: int = 16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows * 100 + k_len)
    sizes = ((1, 2, rows, dim), (1, 1, k_len, dim), (1, 1, k_len, v_dim))
    return tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)


def by_rule(
    rules: list[Rule], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: float | None = None
) -> tuple[Array, Array]:
    """Output [1, Hq, rows, Dv] and lse of a call with one key head."""
    heads = [
        attended(rules, x, k.detach()[0, 0].numpy(), v.detach()[0, 0].numpy(), sink) for x in q.detach()[0].numpy()
    ]
    return np.stack([out for out, _ in heads])[None], np.stack([lse for _, lse in heads])[None]


@pytest.mark.parametrize("shape", [(13, 13), (1, 1), (3, 14), (1, 9)])
@pytest.mark.parametrize("text", SOFTMAXES)
def test_oracle_of_parts(text: str, shape: tuple[int, int]) -> None:
    q, k, v = tensors(*shape)
    attn = attndsl.compile(f"attention a {{ attend {text} }}")
    out, lse = attn.reference(q, k, v, return_lse=True)
    expected, expected_lse = by_rule(SOFTMAXES[text], q, k, v)
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(lse.detach().numpy(), expected_lse, atol=1e-12)


def test_a_chunk_is_the_same_rows_of_the_whole() -> None:
    """Under a causal pattern a row's output does not depend on tokens that follow it."""
    q, k, v = tensors(13, 13)
    attn = attndsl.compile("attention a { attend causal & window(4), causal over pool(mean, 4, 2) }")
    whole = attn.reference(q, k, v)
    for n in range(1, 14):
        torch.testing.assert_close(attn.reference(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n]), whole[:, :, n - 1 : n])


def test_oracle_of_an_output() -> None:
    q, k, v = tensors(11, 11)
    gate, channels = torch.randn(1, 2, 11, 2, dtype=torch.float64), torch.randn(1, 2, 11, 16, dtype=torch.float64)
    attn = attndsl.compile(
        "attention a { input gate : float[b, h, q, 2] learnable\n input channels : float[b, h, q, Dv] learnable\n"
        "far = attend causal over pool(mean, 4)\n near = attend causal & window(4) { softmax with sink 0.5 }\n"
        "output sigmoid(gate[0]) * far - channels * near / 2 + gate[1] }"
    )
    out = attn.reference(q, k, v, gate=gate, channels=channels)
    far = by_rule([pooled(causal, "mean", 4)], q, k, v)[0]
    near = by_rule([tokens(window)], q, k, v, sink=0.5)[0]
    weight = 1 / (1 + np.exp(-gate[..., :1].numpy()))
    expected = weight * far - channels.numpy() * near / 2 + gate[..., 1:].numpy()
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-12)
    with pytest.raises(ValueError, match="lse is undefined"):
        attn.reference(q, k, v, gate=gate, channels=channels, return_lse=True)


def test_merged_branches_are_one_softmax() -> None:
    """Also with what a call hands in as `given(o, lse)`."""
    q, k, v = tensors(9, 9)
    whole = attndsl.compile("causal").reference(q, k, v, return_lse=True)
    text = "near = attend causal & window(4)\n far = attend causal - window(4)\n"
    merged = attndsl.compile(f"attention a {{ {text} output merge(near, far) }}")
    for found, expected in zip(merged.reference(q, k, v, return_lse=True), whole, strict=True):
        torch.testing.assert_close(found, expected)
    out, lse = attndsl.compile("causal - window(4)").reference(q, k, v, return_lse=True)
    handed = attndsl.compile(
        "attention a { input o : float[b, h, q, Dv]\n input l : float[b, h, q]\n near = attend causal & window(4)\n"
        "output merge(near, given(o, l)) }"
    )
    for found, expected in zip(handed.reference(q, k, v, o=out, l=lse, return_lse=True), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_gradient_of_a_maximum_goes_to_the_first() -> None:
    q, k, v = tensors(4, 4)
    v = torch.tensor([1.0, 3.0, 3.0, 2.0], dtype=torch.float64).reshape(1, 1, 4, 1).repeat(1, 1, 1, 16).requires_grad_()
    attndsl.compile("attention a { attend all over pool(max, 4) }").reference(q, k, v).sum().backward()
    assert v.grad is not None
    np.testing.assert_allclose(v.grad[0, 0, :, 0].numpy(), [0, 8, 0, 0], atol=1e-12)
