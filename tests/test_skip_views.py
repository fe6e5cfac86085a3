"""`skip below t` over views and of several parts in one softmax: each part drops by what its own tiles have shown."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.runtime.reference_skip import left_by_skipping
from tests.test_skip import peaked

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
RAW = ("causal & window(40)", "causal", "causal & { k % 96 < 70 }", "causal & document(doc)")
OVER = ("causal", "all", "causal - window(30)", "causal & document(doc)", "causal - same_block(64)")
VIEWS = (
    "pool(mean, 2)", "pool(max, 3, 2)", "pool(mean, 2, counted)", "pool(mean, 4, visible = any)",
    "pool(mean, segments(doc))", "pick(idx)",
)  # fmt: skip
# How near to the bound a decision may be that rounding could turn, and what outputs may differ by.
CLEAR = {"cpu": 1e-9, "triton": 1e-3}
TOLERANCE = {"cpu": 1e-10, "triton": 2e-5}


def compiled(body: str, below: float) -> attndsl.Attention:
    declared = "input doc : int[b, k] sorted\n" if "doc" in body else ""
    declared += "input idx : int[b, g, k/2]\n" if "idx" in body else ""
    return attndsl.compile(f"attention a {{\n{declared}skip below {below}\n{body}\n}}")


def data(attn: attndsl.Attention, batch: int, tokens: int) -> dict[str, Any]:
    found = {
        "doc": (torch.arange(tokens) // 7)[None].repeat(batch, 1),
        "idx": torch.arange(0, tokens, 2)[None, None].repeat(batch, 1, 1),
    }
    return {name: x for name, x in found.items() if any(decl.name == name for decl in attn.program.inputs)}


def reference(body: str, below: float, qkv: list[Tensor], given: dict[str, Any], backend: str) -> Any:
    """Output by the oracle, and where there is one its lse; None where a decision lies near the bound."""
    asked: Any = {"return_lse": "output" not in body, **given}
    near = (below * (1 - CLEAR[backend]), below, below * (1 + CLEAR[backend]))
    found = [compiled(body, t).reference(*(x.double() for x in qkv), **asked) for t in near]
    outs = [x[0] if asked["return_lse"] else x for x in found]
    same = all(torch.equal(x, outs[1]) for x in outs)
    return (found[1] if asked["return_lse"] else (outs[1],)) if same else None


def judge(body: str, below: float, rows: int, tokens: int, backend: str, seed: int = 0) -> bool:
    """Whether the comparison was made, and some tile dropped."""
    attn, dtype = compiled(body, below), torch.float64 if backend == "cpu" else torch.float32
    qkv = [x.to(dtype) for x in peaked(2, 4, 1, rows, tokens, 16, seed)]
    given = data(attn, 2, tokens)
    if (expected := reference(body, below, qkv, given, backend)) is None:
        return False
    out = attn(*qkv, return_lse=len(expected) > 1, backend=backend, **given)
    for x, y in zip(out if len(expected) > 1 else (out,), expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=TOLERANCE[backend], rtol=TOLERANCE[backend])
    exact = compiled(body, 1e-300).reference(*(x.double() for x in qkv), **given)
    return not torch.equal(exact, expected[0])


def drawn(draw: random.Random) -> str:
    """One or more parts, or a branch of pooled queries beside one of several parts."""
    parts = [f"{draw.choice(OVER)} over {draw.choice(VIEWS)}" for _ in range(draw.choice((1, 1, 2)))]
    parts[0:0] = [draw.choice(RAW)] * draw.choice((0, 1))
    draw.shuffle(parts)
    sink = draw.choice(("", " { softmax with sink 0.5 }", " { score softcap(s, 20.0) }"))
    if draw.random() < 0.7:
        return f"attend {', '.join(parts)}{sink}"
    return f"x = attend causal over pool(mean, 2) from pool(mean, 4)\ny = attend {', '.join(parts)}{sink}\noutput x + y"


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int) -> None:
    draw = random.Random(seed)
    rows, tokens = draw.choice(((200, 333), (65, 257), (130, 130), (1, 1)))
    judge(drawn(draw), draw.choice((0.3, 0.05, 0.001)), rows, tokens, "cpu", seed)


SEVERAL = "attend causal & window(90), causal over pool(mean, 2)"


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_several_parts(backend: str) -> None:
    assert judge(SEVERAL, 0.05, 130, 200, backend)


@pytest.mark.parametrize("rows", [2, 40])
def test_the_oracle_by_a_rule(rows: int) -> None:
    """Part by part: of each the pairs that are left, then one softmax over all."""
    q, k, v = peaked(1, 1, 1, rows, 300, 8, 3)
    pooled = [x.view(1, 1, 150, 2, 8).mean(3) for x in (k, v)]
    at = torch.arange(300 - rows, 300)[:, None]
    raw, entries = torch.arange(300), torch.arange(150)
    parts = ((k, v, (raw <= at) & (raw > at - 90)), (*pooled, 2 * entries + 1 <= at))
    logits, values, dropped = [], [], 0
    for keys, of, seen in parts:
        s, seen = q @ keys.mT / 8**0.5, seen[None, None]
        left = left_by_skipping(s, seen, 0.2)
        dropped += int((seen & ~left).sum())
        logits.append(s.masked_fill(~(seen & left), -torch.inf))
        values.append(of)
    expected = torch.cat(logits, -1).softmax(-1) @ torch.cat(values, 2)
    torch.testing.assert_close(compiled(SEVERAL, 0.2).reference(q, k, v), expected)
    assert dropped, "the rule was put to use"


@pytest.mark.parametrize(
    ("body", "backend"), [(SEVERAL, "cpu"), (SEVERAL, "triton"), ("attend causal over pool(max, 3, 2)", "cpu")]
)
def test_decode(body: str, backend: str) -> None:
    """Each part is attended alone, and drops what it would in a call of the same rows."""
    attn, dtype = compiled(body, 0.05), torch.float64 if backend == "cpu" else torch.float32
    q, k, v = (x.to(dtype) for x in peaked(3, 4, 2, 3, 200, 16))
    lengths = torch.tensor([200, 131, 40], dtype=torch.int32)
    found = attn.decode(q, k, v, lengths, return_lse=True, backend=backend)
    compared = 0
    for b, n in enumerate(lengths.tolist()):
        own = [q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]]
        if (expected := reference(body, 0.05, own, {}, backend)) is not None:
            compared += 1
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x[b : b + 1].double(), y, atol=TOLERANCE[backend], rtol=TOLERANCE[backend])
    assert compared
