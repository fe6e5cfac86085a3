"""Patterns that scatter, decoded in pieces: a row's program visits tiles of the keys that it allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attndsl
from attndsl.decode import Cache, most_tiles
from attndsl.decode_pieces import decode_pieces, decode_plans
from attndsl.plan import DType, Spec
from tests.accuracy import examples
from tests.cases import case
from tests.test_decode import judge

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
SPEC = Spec(32, 8, 128, 128, DType.BFLOAT16, "cuda:90")
SINKS = {"sinks": np.linspace(-1, 2, 6).astype(np.float32)}
# The pattern or program, rows of a sequence, and how many kernels there are.
CASES = {
    "one remainder": ("causal & dilated(8)", 1, 1),
    "rows of several": ("causal & dilated(8)", 3, 1),
    "more rows than keys": ("causal & dilated(16)", 5, 1),
    "beside a window": ("causal & (window(9) | dilated(8))", 1, 2),
    "in a window": ("causal & window(50) & dilated(8)", 2, 1),
    "not causal": ("dilated(8)", 3, 1),
    "columns": ("causal & { k % 16 == 3 }", 3, 1),
    "wide columns": ("causal & { k % 32 >= 27 or q // 16 == k // 16 }", 2, 2),
    "two remainders": ("causal & { (q - k) % 16 < 2 }", 1, 2),
    "blocks": ("causal & { (q // 4 - k // 4) % 8 == 0 }", 1, 1),
    "sinks": (
        "attention a { input sinks : float[h] softmax with sink sinks[h] score s - 0.1 * h * (q - k)\n"
        "attend causal & (window(9) | dilated(8)) }", 1, 2,
    ),
    "weights": ("attention a { weights sigmoid(s)\n attend causal & (window(9) | dilated(8)) }", 1, 2),
}  # fmt: skip
# What visits nearly all keys, differs from head to head, or asks data, stays whole.
WHOLE = {
    "many rows": ("causal & dilated(8)", 5),
    "in order": ("causal & window(30)", 1),
    "heads": ("attention a { attend causal & { (q - k) % (8 + 8 * (h % 2)) == 0 } }", 1),
    "data": ("attention a { input doc : int[b, k]\n attend causal & dilated(8) & document(doc) }", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str) -> None:
    text, rows, kernels = CASES[name]
    given = SINKS if "sinks" in text else {}
    example = case(text, rows, 112, (6, 2), batch=3, inputs=given)
    program = example.load()
    assert max(1, len(decode_pieces(program, (6, 2), rows))) == kernels
    calls = (((112, 65, 0), None, 3), ((2, 31, 110), 16, 1), ((1, 112, 16), 7, 2))
    for lengths, page, splits in calls[: 3 if rows == 1 else 2]:
        judge(example, lengths, "triton", page, splits)


@given(
    st.integers(2, 24), st.integers(1, 3), st.integers(0, 24), st.integers(1, 2),
    st.sampled_from(("", " & window(40)")), st.integers(1, 3), st.integers(0, 100), st.sampled_from((None, 1, 4, 25)),
    st.sampled_from((1, 3)),
)  # fmt: skip
@examples(8)
def test_random(
    period: int, width: int, shift: int, step: int, more: str, rows: int, length: int, page: int | None, splits: int
) -> None:
    text = f"causal & {{ (q - {step} * k + {shift}) % {period} < {width} or k % {period} == 1 }}{more}"
    judge(case(text, rows, 100, (2, 1), (16, 16), batch=2), (length, 100), "triton", page, splits)


@pytest.mark.parametrize("name", WHOLE)
def test_what_stays_whole(name: str) -> None:
    text, rows = WHOLE[name]
    assert decode_pieces(attndsl.compile(text).program, (6, 2), rows) == ()


def test_cost_follows_the_area() -> None:
    """Of 131072 tokens a row of 64 remainders visits 32 tiles of 64 keys, and not 2048."""
    for text, expected in (("causal & dilated(64)", [32]), ("causal & (window(128) | dilated(128))", [3, 16])):
        plans = decode_plans(attndsl.compile(text).program, SPEC, 1, Cache(), split=True)
        assert [most_tiles(plan, 1, 131072) for plan in plans] == expected


def test_kernels_are_shown() -> None:
    attn = attndsl.compile("causal & (window(128) | dilated(128))")
    assert attn.kernels()[-2:] == ("decode", "decode_2")
    assert "residue = q_first & 127" in attn.source("decode_2", page=16)
    with pytest.raises(attndsl.PatternError, match="A531"):
        attn.source("decode_2", rows=100)
