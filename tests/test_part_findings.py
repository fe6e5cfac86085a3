"""Warnings about parts and branches: the documented ones, and that standard programs have none."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from attndsl.api import load_attention

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("code", ["W306", "W307", "W308"])
def test_documented(code: str) -> None:
    section = (ROOT / "docs" / "diagnostics.md").read_text("utf-8").split(f"### {code} ")[1].split("\n### ")[0]
    text, message = re.findall(r"^```(?:attn|text)\n(.*?)\n```", section, re.DOTALL | re.MULTILINE)
    found = [x.render() for x in load_attention(text).warnings if x.code == code]
    assert found == [message]


def test_witnesses_hold() -> None:
    """The rows and tokens that the messages name, by hand."""
    text = "attention a { attend causal & window(W), causal - window(W) over pool(mean, S) }"
    for window, size in ((10, 4), (7, 3), (9, 2)):
        (found,) = load_attention(text.replace("W", str(window)).replace("S", str(size))).warnings
        q, n, k = map(int, re.findall(r"= (\d+)", found.notes[0]))
        tokens = np.arange(n)
        entry = k // size * size + np.arange(size)
        assert k <= q < n and q - k >= window, "the second part allows the token"
        assert not all(q - x >= window and x <= q for x in entry), "and its entry not as a whole"
        assert found.code == "W307"
        shorter = [
            (row, x) for row in range(n - 1) for x in tokens if row - x >= window
            and not all(row - y >= window for y in x // size * size + np.arange(size))
        ]  # fmt: skip
        assert not shorter, "no shorter sequence has one"


@pytest.mark.parametrize(
    "body",
    [
        "attend causal over pool(mean, 64)",
        "attend causal & { q // 16 - k // 16 < 4 }, { q // 16 - k // 16 >= 4 } over pool(mean, 16, counted)",
        "attend causal & same_block(8), causal & ~same_block(8) over pool(mean, 8)",
        "a = attend causal\n c = attend causal over pool(mean, 8, 4)\n output a + c",
        "a = attend all\n c = attend all over pool(mean, 8)\n output a + c",
        "align start\n a = attend all\n c = attend all over pool(mean, 8)\n output a + c",
        "input doc : int[b, k]\n a = attend causal & document(doc)\n c = attend document(doc)\n output a + c",
    ],
)
def test_nothing_to_say(body: str) -> None:
    assert not load_attention(f"attention a {{ {body} }}").warnings
