"""Integers that would wrap in 32 bits: which calls a pattern fits; others are refused where they used to be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attndsl
from attndsl.diagnostics import PatternError
from attndsl.widths import Widths, widths

ARGUMENT = "attention shifted(n : runtime int) { attend { %s } }"
FIT = {
    # q and k count together: a term of one side may come to stand on the other.
    "causal & window(512)": Widths(1 << 29, 1 << 30),
    "{ q * q * q <= 5 + k }": Widths(1 << 10, 1 << 30),
    "{ k <= q + 2147483647 }": Widths(0, 1 << 30),
    "{ k <= q + 9223372036854775807 }": Widths(0, 1 << 30),
    "{ (q * 1000 + k) % 7 < 3 and (q % 1000) * 1000000 // 2 <= 500000000 }": Widths(1 << 21, 1 << 30),
    ARGUMENT % "k <= q + n": Widths(1 << 28, 1 << 30),
    ARGUMENT % "k <= q + 2 * n": Widths(1 << 29, 1 << 24),
    ARGUMENT % "n * k <= q": Widths(1 << 22, 1 << 8),
    "attention a(t : int[h]) { attend { k <= q + t[h] } }": Widths(1 << 24, 1 << 30),
    "attention a { input i : int[k]  score s + 0.1 * (i[k] * i[k])  attend causal }": Widths(1 << 29, 1 << 30),
}


@pytest.mark.parametrize("text", FIT)
def test_widths(text: str) -> None:
    given: dict[str, Any] = {"t": [3, (1 << 31) - (1 << 26)]} if "int[h]" in text else {}
    assert widths(attndsl.compile(text, **given).program) == FIT[text]


def qkv(rows: int, tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(1, 2, n, 8) for n in (rows, tokens, tokens)]


@pytest.mark.parametrize("text", ["{ k * 1000000 <= q * 999999 + 7 }", "{ (1000 * q * k) % 7 <= 4 + q - k }"])
def test_the_longest_call_is_right(text: str) -> None:
    attn = attndsl.compile(text)
    longest = widths(attn.program).tokens
    assert longest == 1 << 10
    call = qkv(3, longest)
    assert torch.allclose(attn(*call, backend="triton").double(), attn.reference(*call), atol=1e-5, rtol=0)
    with pytest.raises(PatternError, match=f"at most {longest:,} tokens, and this one has {longest + 1:,}"):
        attn(*qkv(1, longest + 1), backend="triton")


@pytest.mark.parametrize("text", ["{ k <= q + 2147483647 }", "{ k <= q - 2147483640 }", "{ k * k * k * k <= 99 * q }"])
def test_the_cpu_has_more(text: str) -> None:
    attn: Any = attndsl.compile(text)
    call = qkv(600, 600)
    assert torch.allclose(attn(*call).double(), attn.reference(*call), atol=1e-5, rtol=0)
    for run in (attn, lambda *given, **options: attn.decode(*given, torch.tensor([600]).int(), **options)):
        with pytest.raises(PatternError, match="A515"):
            run(*call, backend="triton")


def test_tables_of_large_entries() -> None:
    attn, call = attndsl.compile("attention a(t : int[h]) { attend { k <= q + t[h] } }", t=[-3, 1 << 40]), qkv(40, 40)
    assert torch.allclose(attn(*call).double(), attn.reference(*call), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [1 << 31, -(1 << 31), 1 << 63, -(1 << 90)])
def test_large_arguments_are_refused_everywhere(value: int) -> None:
    attn: Any = attndsl.compile(ARGUMENT % "k <= q + n")
    call = qkv(16, 16)
    lengths = torch.tensor([16], dtype=torch.int32)
    asked: list[Any] = [
        lambda: attn(*call, n=value),
        lambda: attn(*call, n=value, backend="triton"),
        lambda: attn.decode(*call, lengths, n=value),
        lambda: attn.reference(*call, n=value),
        lambda: attn.mask(4, 4, n=value),
        lambda: attn.blocks(64, 64, n=value),
    ]
    if abs(value) < 1 << 63:
        # What a compiled graph calls: torch has no larger ones.
        asked.append(lambda: torch.ops.attndsl.forward(attn._key, *call, [], [value], None, "auto"))
    for ask in asked:
        with pytest.raises(PatternError, match="A516"):
            ask()


def test_arguments_of_questions_are_ints() -> None:
    attn = attndsl.compile(ARGUMENT % "k <= q + n")
    with pytest.raises(PatternError, match=r"A516.*not 2\.5"):
        attn.mask(4, 4, n=2.5)
    with pytest.raises(PatternError, match=r"A516.*not True"):
        attn.mask(4, 4, n=True)


EXTREMES = ((1 << 31) - 1, -(1 << 31), (1 << 31) - 30, 30 - (1 << 31), -1, 0, 5, 20)
OF_INPUTS = [
    "input p : int[b, k]  attend { q - p[k] < 10 }",
    "input p : int[b]  attend { k < p + 5 and q >= p - 7 }",
    "input p : int[b]  attend causal & { k * 3 < p + q }",
    "input p : int[b, k]  attend { (p[k] - p[q]) % 7 < 3 or p[k] % 7 == 1 }",
    "input p : int[b, k]  attend { abs(p[k]) > 30 and -p[q] > -30 }",
    "input p : int[b, k]  attend { min(p[k], q) + 2 * p[q] // 3 < k }",
    "input p : int[b, k]  attend causal & { p[k] + 1 <= 2147483647 }",
    "input p : int[b, k]  attend causal & { p[k] - 5 >= -2147483647 }",
    "input p : int[b, k]  score s + 0.000000001 * (p[k] - p[q])  attend causal",
]


@pytest.mark.parametrize("text", OF_INPUTS)
@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_integers_of_inputs_do_not_wrap(text: str, backend: str) -> None:
    """However large they are, and however short the call is."""
    attn, call = attndsl.compile(f"attention a {{ {text} }}"), qkv(37, 37)
    # Two heads in two batches, so that all of them are there.
    q, k, v = (x.expand(2, -1, -1, -1) for x in call)
    size = (2, 37) if "int[b, k]" in text else (2,)
    p = torch.tensor(EXTREMES, dtype=torch.int32)[torch.randint(0, len(EXTREMES), size)]
    found = attn(q, k, v, backend=backend, p=p)
    assert torch.allclose(found.double(), attn.reference(q, k, v, p=p), atol=1e-5, rtol=0)


def test_integers_of_inputs_beside_tables_do_not_wrap() -> None:
    text = "attention a(t : int[h]) { input p : int[b, k]  attend causal & { p[k] + 1 <= t[h] } }"
    attn, (q, k, v) = attndsl.compile(text, t=[(1 << 31) - 1, 20]), qkv(37, 37)
    p = torch.tensor(EXTREMES, dtype=torch.int32)[torch.arange(37) % len(EXTREMES)][None]
    found, exact = attn(q, k, v, backend="triton", p=p), attn.reference(q, k, v, p=p)
    assert torch.allclose(found.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_the_largest_of_sorted_integers_cuts_nothing_off(dtype: torch.dtype) -> None:
    """What bounds tiles is one past an entry, which its own width may not hold."""
    attn, call = (
        attndsl.compile("attention a { input until : int[b, q] sorted  attend { k <= until[q] } }"),
        qkv(5, 300),
    )
    most = torch.iinfo(dtype).max
    until = torch.tensor([[0, 7, 100, most, most]]).to(dtype)
    for backend in ("triton", "cpu"):
        found = attn(*call, backend=backend, until=until)
        assert torch.allclose(found.double(), attn.reference(*call, until=until), atol=1e-5, rtol=0)
