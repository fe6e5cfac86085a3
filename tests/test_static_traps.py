"""Where published static patterns differ in a word: each example takes the side that its source takes.

As in `test_routing_traps.py`: the published rule in numpy, the example that has it, and the same text with the word
changed, which no longer has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import attndsl
from tests.routing_rules import EXAMPLES

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
Mask = NDArray[np.bool_]


def mask(name: str, n: int, change: tuple[str, str] = ("", ""), heads: int = 4, **more: Any) -> Mask:
    """The pairs of an example; `change` replaces words of its text, which has them. `more`: parameters and inputs."""
    text = (EXAMPLES / f"{name}.attn").read_text("utf-8")
    assert change[0] in text
    inputs: dict[str, Any] = {key: x for key, x in more.items() if isinstance(x, np.ndarray)}
    params = {key: x for key, x in more.items() if key not in inputs}
    attn = attndsl.compile(text.replace(*change) if change[0] else text, **params)
    found = attn.mask(n, n, heads=heads, kv_heads=2, **inputs)
    return np.broadcast_to(found, (heads, n, n))


def one_way(name: str, n: int, rule: Mask, *changes: tuple[str, str], **more: Any) -> None:
    np.testing.assert_array_equal(mask(name, n, **more), np.broadcast_to(rule, (more.get("heads", 4), n, n)))
    for change in changes:
        assert (mask(name, n, change, **more) != rule).any(), change


def positions(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.arange(n)[:, None], np.arange(n)[None, :]


# ------------------------------------------------------------------------------ windows, off by one


def test_a_window_of_w_keys_counts_the_querys_own() -> None:
    """gpt-oss, Gemma, DuoAttention, StreamingLLM: q - k < W. One more is attention-gym's."""
    q, k = positions(40)
    for name, more in (("sink", {"sinks": np.zeros(4, np.float32)}), ("softcap", {})):
        one_way(name, 40, (k <= q) & (q - k < 7), ("window(span)", "band(span, 0)"), span=7, **more)
    rule = (k <= q) & ((k < 3) | (q - k < 7))
    changes = (("window(span)", "band(span, 0)"), ("sink(sinks)", "{ k <= sinks }"))
    one_way("streaming", 40, rule, *changes, span=7, sinks=3)
    one_way("duo", 40, rule, *changes, span=7, sinks=3, full=np.array([False, False]))
    assert (mask("streaming", 40, span=7, sinks=3).sum(-1)[:, 10:] == 7 + 3).all()


def test_a_band_counts_both_ends() -> None:
    """FlashAttention's (left, right), and Longformer's w to each side: 2 w + 1 keys."""
    q, k = positions(40)
    flag = np.zeros((1, 40), bool)
    more: dict[str, Any] = {"reach": 3, "far": 0}
    change = "band(reach, reach)", "{ abs(q - k) < reach }"
    one_way("longformer", 40, np.abs(q - k) <= 3, change, flag=flag, **more)
    assert (mask("longformer", 40, flag=flag, **more).sum(-1)[:, 3:-3] == 7).all()
    left, right = 5, 2
    found = attndsl.compile(f"band({left}, {right})").mask(40, 40)[0]
    np.testing.assert_array_equal(found, (k >= q - left) & (k <= q + right))


def test_longformer_dilates_w_steps_not_w_tokens() -> None:
    q, k = positions(60)
    rule = (np.abs(q - k) <= 3 * 2) & ((q - k) % 2 == 0)
    change = "band(reach * dilation, reach * dilation)", "band(reach, reach)"
    one_way("longformer", 60, rule, change, reach=3, dilation=2, far=4, flag=np.zeros((1, 60), bool))


# ---------------------------------------------------------------------------------- three coarsenings


def test_radial_keeps_a_block_for_any_of_its_pairs() -> None:
    frames, tokens, block, n = 4, 6, 4, 24
    width, every = [6, 2, 1, 1], [1, 1, 2, 1]
    kept = np.zeros((n // block, n // block), bool)
    for q, k in np.ndindex(n, n):
        d = abs(q // tokens - k // tokens)
        kept[q // block, k // block] |= k < tokens or (abs(q % tokens - k % tokens) <= width[d] and d % every[d] == 0)
    q, k = positions(n)
    changes = ("block, any)", "block, all)"), ("block, any)", "block, fraction(0.5))")
    more = {"frames": frames, "tokens": tokens, "block": block, "width": width, "every": every}
    one_way("radial", n, kept[q // block, k // block], *changes, **more)


def test_power_attention_is_of_blocks_and_causal_in_tokens() -> None:
    """Blocks decide, but on the diagonal a row sees no token after it."""
    q, k = positions(40)
    d = q // 4 - k // 4
    rule = (k <= q) & ((d < 2) | (k < 4) | np.isin(d, [1, 2, 4, 8]))
    change = "causal\n    & ", "causal on blocks(block)\n    & "
    one_way("power", 40, rule, change, block=4, near=2)


def test_block_diffusion_sees_its_own_block_whole_in_inference() -> None:
    q, k = positions(40)
    one_way("block_causal", 40, k // 8 <= q // 8, ("causal on", "causal & causal on"), size=8)


# ------------------------------------------------------------------------------------ at the borders


def test_a_neighbourhood_shifts_where_a_window_truncates() -> None:
    size, window = 9, 4
    found = mask("neighborhood", size * size, window=window, height=size, width=size)
    assert (found.sum(-1) == window**2).all()
    place = np.stack(np.divmod(np.arange(size * size), size), -1)
    q, k = place[:, None], place[None]
    first = np.clip(q - window // 2, 0, size - window)
    rule = np.asarray(((first <= k) & (k < first + window)).all(-1))
    # An even window has its extra key on the left.
    changes = (
        ("neighborhood(window, dilation, stride)", "band(window // 2, window - 1 - window // 2)"),
        ("neighborhood(window, dilation, stride)", "band(window - 1 - window // 2, window // 2)"),
    )
    one_way("neighborhood", size * size, rule, *changes, window=window, height=size, width=size)
    inside = (first == q - window // 2).all(-1)[:, 0]
    truncated = mask("neighborhood", size * size, changes[0], window=window, height=size, width=size)
    assert (truncated[:, inside] == rule[inside]).all()


def test_a_sliding_window_truncates() -> None:
    rows = mask("streaming", 30, span=8, sinks=0).sum(-1)[0]
    assert rows.tolist() == [min(t + 1, 8) for t in range(30)]


# ------------------------------------------------------------------------------- masked means never


@pytest.mark.parametrize(("name", "shortcut"), [("swin", -100.0), ("longformer", -1e4), ("rettention", -1e5)])
def test_a_masked_pair_weighs_nothing_however_large_its_score(name: str, shortcut: float) -> None:
    """Implementations add a number, and a score that outweighs it comes through; in the language it does not."""
    n = 36
    params: dict[str, Any] = {"swin": {"w": 3, "width": 6}, "longformer": {"reach": 2, "far": 0}}.get(name, {})
    given: dict[str, Any] = {
        "swin": {"bias": torch.zeros(4, 5, 5, dtype=torch.float64)},
        "longformer": {"flag": torch.zeros(1, n, dtype=torch.bool)},
        "rettention": {"rho": torch.ones(1, 4, n, dtype=torch.float64)},
    }[name]
    params = params or {"w": 4, "text": 0, "tokens": 9}
    attn = attndsl.compile(EXAMPLES / f"{name}.attn", **params)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    # Rows like the last key more than any shortcut can take away; most do not see it.
    q[..., 0], k[..., 0] = 1e3, 0.0
    k[:, :, -1, 0] = 1e4
    scores = q @ k.mT / 8**0.5
    arrays = {key: x.numpy() for key, x in given.items()}
    if name == "rettention":
        u, places = np.arange(n) % 9, np.arange(n) % 9
        seen = torch.from_numpy(np.abs(u[:, None] - places[None]) <= 2)
    else:
        seen = torch.from_numpy(np.array(attn.mask(n, n, heads=4, kv_heads=4, **arrays)))
    exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    added = (scores + torch.where(seen, 0.0, shortcut).double()).softmax(-1) @ v
    torch.testing.assert_close(attn(q, k, v, **given), exact)
    assert (exact - added).abs().max() > 0.5


# ----------------------------------------------------------------------------- a cache means the same


@pytest.mark.parametrize("name", ["streaming", "duo"])
def test_a_decoded_row_is_the_row_of_the_whole(name: str) -> None:
    """Caches that keep positions by slots show a decoded row other keys than training did; here it is exact."""
    given: dict[str, Any] = {"full": torch.tensor([False, True])} if name == "duo" else {}
    attn = attndsl.compile(EXAMPLES / f"{name}.attn", span=6, sinks=2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 50, 16, generator=generator) for h in (4, 2, 2))
    whole = attn(q, k, v, **given)
    for length in (1, 7, 8, 9, 50):
        row = q[:, :, length - 1 : length]
        lengths = torch.tensor([length], dtype=torch.int32)
        torch.testing.assert_close(attn.decode(row, k, v, lengths, **given), whole[:, :, length - 1 : length])
