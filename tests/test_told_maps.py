"""Patterns over segments, and listed tokens, whose truth the ends of an entry's tokens do not decide, or that is not
one for a class of pooled queries: a running count of the tokens outside says what rows see."""

from __future__ import annotations

import random

import pytest
import torch

import attndsl
from attndsl.runtime.derive import STRIP
from tests.test_entry_maps import SHAPES, drawn_pattern
from tests.test_extents import INPUTS, data
from tests.test_packed_views import SHAPES as PACKED
from tests.test_packed_views import judge as judge_packed
from tests.test_segment_views import compiled, inputs_of, judge, tensors

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
BODIES = [
    "attend causal - document(doc) over pool(mean, segments(ids), counted)",
    "attend causal & (window(4) | document(doc)) over pool(max, segments(own)) { softmax with sink sinks[h] }",
    "far = attend causal over pool(mean, segments(ids)) from pool(mean, 4)\n output far",
    "attend causal & top(1, blocks(4), among = causal, by = dot(Q, mean(K))) over pool(mean, segments(ids))",
]
DOCUMENTS = [
    "lengths n attend causal & { mark[k] or k % 3 == 0 } over pool(mean, segments(part), counted)",
    "attend causal & { not mark[k] or k > q - 4 and k % 2 == 0 } over pool(max, segments(word))",
]


@pytest.mark.parametrize("body", BODIES[:3])
def test_gradients(body: str) -> None:
    for dtype, backend in ((torch.float64, "cpu"), (torch.float32, "triton")):
        judge(body, (1, 3, 3, 5, 38, 80, 16), dtype, backend)
    for shape in ((2, 4, 2, 21, 21, 16, 16), (1, 2, 1, 1, 1, 16, 24)):
        judge(body, shape, torch.float64, "cpu")


def test_a_selection() -> None:
    judge(BODIES[3], (2, 4, 2, 21, 21, 16, 16), torch.float64, "cpu")


@pytest.mark.parametrize("body", DOCUMENTS)
def test_in_documents(body: str) -> None:
    for shape in PACKED:
        judge_packed(body, shape, torch.float64, "cpu")
    judge_packed(body, PACKED[1], torch.float32, "triton")


def drawn_body(draw: random.Random) -> str:
    view = draw.choice(("pool(mean, segments(of))", "pool(max, segments(of), counted)", "pick(some)"))
    pooled = draw.choice(("", "", f" from pool(mean, {draw.choice((2, 4, 8))})"))
    return f"x = attend {draw.choice(('', 'causal & '))}{drawn_pattern(draw, 3)} over {view}{pooled}\noutput x"


def judge_drawn(seed: int, lengths: bool) -> None:
    draw = random.Random(f"told {seed} {lengths}")
    body = drawn_body(draw)
    kinds = {**INPUTS, "of": "int[b, k]", "some": "int[b, 9]"}
    declared = [f"input {name} : {kind}" for name, kind in kinds.items() if f"{name}[" in body or f"({name})" in body]
    declared += ["input n : int[b]", "lengths n"] if lengths else []
    attn = attndsl.compile("\n".join(("attention a {", *declared, body, "}")))
    tokens, rows = draw.choice(SHAPES)
    generator = torch.Generator().manual_seed(seed)
    more = {
        "of": (torch.rand(2, tokens, generator=generator) < 0.3).cumsum(-1) % 3,
        "some": torch.randint(-2, tokens + 2, (2, 9), generator=generator),
        "n": torch.tensor([max(1, tokens - 6), tokens // 2]),
    }
    own = attndsl.compile("\n".join(("attention a {", *(x for x in declared if x.split()[1] not in more),
                                     "attend causal }")).replace("lengths n\n", ""))  # fmt: skip
    given = data(own, tokens, False)
    given |= {decl.name: more[decl.name] for decl in attn.program.inputs if decl.name in more}
    sizes = ((4, rows), (2, tokens), (2, tokens))
    q, k, v = (torch.randn(2, *size, 8, generator=generator, dtype=torch.float64) for size in sizes)
    found, exact = attn(q, k, v, **given), attn.reference(q, k, v, **given)
    torch.testing.assert_close(found, exact, atol=1e-9, rtol=1e-9, msg=lambda x: f"{body}\n{tokens} {rows}\n{x}")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lengths", [False, True])
def test_random_programs(seed: int, lengths: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strip by strip, each of few rows."""
    monkeypatch.setitem(STRIP, "cpu", 200)
    judge_drawn(seed, lengths)


def test_decode() -> None:
    """Each sequence has a length of its own, with which its last segment ends."""
    for body in BODIES[:2]:
        attn, shape = compiled(body), (2, 4, 2, 3, 40, 16, 16)
        leaves, given = tensors(shape, torch.float64), inputs_of(attn, shape, torch.float64)
        q, k, v = (x.detach() for x in leaves)
        given = {name: x.detach() for name, x in given.items()}
        lengths = torch.tensor([27, 40], dtype=torch.int32)
        found = attn.decode(q, k, v, lengths, **given)
        for b, n in enumerate(lengths.tolist()):
            own = {
                x: y if x == "sinks" else y[..., :n] if x == "own" else y[b : b + 1, ..., :n] for x, y in given.items()
            }
            exact = attn.reference(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], **own)
            torch.testing.assert_close(found[b : b + 1], exact, atol=1e-9, rtol=1e-9)
