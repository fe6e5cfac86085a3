"""Patterns over views, and from pooled queries, whose truth differs inside an extent, or a class of rows: a map of rows
and entries, made strip by strip, says what they see."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import attndsl
from attndsl.program import CallShape
from attndsl.runtime.derive import STRIP, Deriver
from tests.routing_rules import HEADS, KV_HEADS
from tests.test_extents import INPUTS, data, judge, program

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
BODIES = [
    "attend causal & document(doc) over pool(mean, 4, 2)",
    "attend { keep[k] and limit[k] <= q } over pool(sum, 3, 1) { softmax with sink 0.5 }",
    "attend causal & document(doc) over pool(mean, 4, visible = any)",
    "attend causal - document(doc) over pool(mean, 4, counted)",
    "attend causal & { ids[k] != ids[q] } over pool(max, 3, 5), causal & window(7)",
    "attend causal & { doc[k] == doc[q] or k < 4 } over pool(mean, 4)",
    "attend causal & { doc[k // 2] <= doc[q] } over pool(mean, 3)",
    "x = attend causal & document(doc) over pool(mean, 4) from pool(mean, 8)\noutput x",
    "x = attend { ids[q] == 1 and ids[k] != 1 } over pool(mean, 4, 2, visible = any) from pool(max, 4)\noutput x",
]
ATOMS = (
    "causal", "window(9)", "{ k % 3 != 1 }", "document(doc)", "{ ids[k] != ids[q] }", "{ keep[k] }", "{ h == 1 }",
    "{ k - q < limit[q] }", "{ not drop[k] or k < 5 }", "{ ids[k // 2] == 0 }", "(causal on segment(doc))",
    "coarsen(document(doc), 2, any)", "coarsen({ ids[k] == 1 }, (1, 3), all)",
    "random(2, blocks(4), per = rows(4), seed = 3, among = causal)",
)  # fmt: skip
SHAPES = ((43, 43), (43, 13), (37, 37), (1, 1))


@pytest.mark.parametrize("body", BODIES)
def test_on_the_cpu(body: str) -> None:
    judge(body, 43, 13, torch.float64, "cpu")


@pytest.mark.parametrize("body", BODIES[1::5])
def test_in_triton(body: str) -> None:
    judge(body, 43, 13, torch.float32, "triton", broadcast=True)


HARD = [
    "attend coarsen({ k // 5 != q // 4 }, 7, any) over pool(mean, 3, 5) from pool(mean, 7)",
    "attend ~coarsen({ abs(Nk - 5 - k - q) < 6 }, (3, 4), all) over pool(mean, 7, 3)",
    "attend causal & coarsen(coarsen({ abs(Nk - 5 - k - q) < 6 }, 8, any), (5, 7), any) "
    "over pool(max, 5, visible = any)",
]


@pytest.mark.parametrize("body", HARD)
@pytest.mark.parametrize("lengths", [False, True])
def test_what_integer_sets_do_not_say_in_time(body: str, lengths: bool) -> None:
    """Blocks that neither classes nor extents divide."""
    clause = "input n : int[b]  lengths n" * lengths
    attn = attndsl.compile(f"attention a {{ align start  {clause}  {body} }}")
    given: dict[str, Any] = {"n": torch.tensor([30, 11])} if lengths else {}
    for rows in (30, 21):
        sizes = ((2, rows), (1, 30), (1, 30))
        drawn = [torch.randn(2, *size, 8, dtype=torch.float64).requires_grad_() for size in sizes]
        found, exact = attn(*drawn, **given), attn.reference(*drawn, **given)
        torch.testing.assert_close(found, exact, atol=1e-9, rtol=1e-9)
        gradients = (torch.autograd.grad(x.square().sum(), drawn) for x in (found, exact))
        torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-8)


def drawn_pattern(draw: random.Random, depth: int) -> str:
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(ATOMS)
    a, b = (drawn_pattern(draw, depth - 1) for _ in range(2))
    op = draw.choice("&&|-~?")
    return f"~({a})" if op == "~" else f"(if h % 2 == 0 then {a} else {b})" if op == "?" else f"({a} {op} {b})"


def drawn_body(draw: random.Random) -> str:
    """A branch over a pool of any size, stride and options, from pooled queries or from each."""
    size = draw.choice((1, 2, 3, 4, 8))
    stride = draw.choice((size, size, -(-size // 2), size + 1))
    words = draw.choice(("", "", ", visible = any")) + (draw.choice(("", ", counted")) if stride == size else "")
    pattern = draw.choice(("", "causal & ", "causal & ")) + drawn_pattern(draw, 3)
    pooled = draw.choice(("", "", f" from pool(mean, {draw.choice((2, 4, 8))})"))
    return f"x = attend {pattern} over pool({draw.choice(('mean', 'max', 'sum'))}, {size}, {stride}{words}){pooled}\n"


@pytest.mark.parametrize("seed", range(14))
@pytest.mark.parametrize("lengths", [False, True])
def test_random_programs(seed: int, lengths: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strip by strip, each of few rows and entries."""
    monkeypatch.setitem(STRIP, "cpu", 200)
    draw = random.Random(f"{seed} {lengths}")
    body = drawn_body(draw) + "output x"
    declared = [f"input {name} : {kind}" for name, kind in INPUTS.items() if name in body]
    declared += ["input n : int[b]", "lengths n"] if lengths else []
    attn = attndsl.compile("\n".join(("attention a {", *declared, body, "}")))
    tokens, rows = draw.choice(SHAPES)
    given: dict[str, Any] = data(attn, tokens, False)
    if lengths:
        given["n"] = torch.tensor([max(1, tokens - 6), tokens // 2])
    generator = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, rows), (KV_HEADS, tokens), (KV_HEADS, tokens))
    q, k, v = (torch.randn(2, *size, 8, generator=generator, dtype=torch.float64) for size in sizes)
    torch.testing.assert_close(attn(q, k, v, **given), attn.reference(q, k, v, **given), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("body", "backend"),
    [(BODIES[4], "triton"), *((x, "cpu") for x in (*BODIES[:6:2], "attend causal & document(doc) over pool(mean, 4)"))],
)
def test_decode(body: str, backend: str) -> None:
    """Each sequence has a length of its own, and its rows a map of what its cache holds."""
    attn, dtype = program(body), torch.float64 if backend == "cpu" else torch.float32
    generator = torch.Generator().manual_seed(1)
    sizes = ((HEADS, 3), (KV_HEADS, 50), (KV_HEADS, 50))
    q, k, v = (torch.randn(2, *size, 16, generator=generator, dtype=dtype) for size in sizes)
    given = {name: x.expand(2, *x.shape[1:]) for name, x in data(attn, 50, True).items()}
    lengths = torch.tensor([37, 50], dtype=torch.int32)
    found = attn.decode(q, k, v, lengths, backend=backend, **given)
    for b, n in enumerate(lengths.tolist()):
        own = {name: x[b : b + 1, :n] for name, x in given.items()}
        exact = attn.reference(*(x[b : b + 1, :, :m].double() for x, m in ((q, 3), (k, n), (v, n))), **own)
        tolerance = 1e-9 if backend == "cpu" else 1e-5
        torch.testing.assert_close(found[b : b + 1].double(), exact, atol=tolerance, rtol=tolerance)


def test_only_what_data_decides_is_mapped() -> None:
    """What integer sets say, and the ends of overlapping extents, stay; `causal` bounds the tiles."""
    told = [str(program(body).explain(64)) for body in (BODIES[0], BODIES[3])]
    assert "least `doc`" in told[0] and "all tokens of each entry" not in told[0]
    assert "at which rows all tokens of each entry are in ~" in told[1] and "causal" not in told[1].split("at which")[1]


def test_a_map_has_a_bound() -> None:
    from attndsl.compose import compose
    from attndsl.derive import derive

    derived = derive(compose(program(BODIES[3]).program).programs[0])
    with pytest.raises(attndsl.PatternError, match="A519"):
        Deriver(derived, CallShape(1, 1, 1, 1 << 17, 1 << 17, 8, 8), torch.device("meta"))
