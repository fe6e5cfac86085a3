"""`packed` around `skip below t`: tiles begin where documents do, each document as if it were called alone."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.left_tiles import TILE, tiles_of_documents
from attndsl.runtime.leaving import document_tiles
from tests.test_skip import peaked

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
BODIES = (
    "attend causal", "attend all", "attend causal & dilated(3)",
    "softmax with sink sinks[h]\nattend causal & window(100)",
    "attend causal & random(2, blocks(32), per = rows(64), seed = 3)", "attend { q - k < 5 and Nk - k > 5 or q < 100 }",
    "near = attend causal & window(70)\nfar = attend causal - window(70)\noutput near + far",
    "attend causal over pool(max, 3, 2)", "attend causal & window(90), causal over pool(mean, 2)",
    "attend causal & top(2, blocks(32), by = dot(Q, mean(K)))",
)  # fmt: skip
SIZES = (1, 3, 20, 63, 64, 65, 66, 90, 128, 129, 150)
CLEAR = {"cpu": 1e-9, "triton": 1e-3}
TOLERANCE = {"cpu": 1e-11, "triton": 3e-5}


def compiled(body: str, below: float, lengths: bool = False) -> attndsl.Attention:
    clauses = "input doc : int[b, k]\npacked doc\n" + ("input n : int[b]\nlengths n\n" if lengths else "")
    clauses += "input sinks : float[h] learnable\n" if "sinks" in body else ""
    return attndsl.compile(f"attention a {{\n{clauses}skip below {below}\n{body}\n}}")


def documents(*sizes: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)) % 2, torch.tensor(sizes))


def gradients(attend: Any, qkv: list[Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in qkv]
    own = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in given.items()}
    out = attend(*leaves, **own)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    floats = [*leaves, *(x for x in own.values() if x.is_floating_point())]
    return [out.detach(), *torch.autograd.grad((out.double() * weights).sum(), floats)]


def judge(
    body: str, ids: Tensor, rows: int, backend: str, count: Tensor | None = None, seed: int = 0, matters: bool = False
) -> bool:
    """Compare with the oracle in float64, with gradients and without, unless a decision is near the bound. Whether that
    was done, and where it is asked whether it `matters`, some tile was dropped."""
    below, dtype = 0.3, torch.float64 if backend == "cpu" else torch.float32
    qkv = [x.to(dtype) for x in peaked(ids.shape[0], 2, 1, rows, ids.shape[1], 8, seed)]
    given: dict[str, Any] = {"doc": ids} | ({} if count is None else {"n": count})
    given |= {"sinks": torch.tensor([0.5, -1.0], dtype=dtype)} if "sinks" in body else {}
    exact: dict[str, Any] = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    wide = [x.double() for x in qkv]
    near = [
        compiled(body, below * (1 + CLEAR[backend] * way), count is not None).reference(*wide, **exact)
        for way in (-1, 1)
    ]
    if not torch.equal(*near):
        return False
    attn = compiled(body, below, count is not None)
    expected = gradients(attn.reference, wide, exact)
    with torch.no_grad():
        torch.testing.assert_close(
            attn(*qkv, backend=backend, **given).double(), expected[0], atol=TOLERANCE[backend], rtol=TOLERANCE[backend]
        )
    found = gradients(functools.partial(attn, backend=backend), qkv, given)
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).abs().amax()) <= TOLERANCE[backend] * max(1.0, float(y.abs().amax()))
    undropped = compiled(body, 1e-300, count is not None).reference
    return not (matters and torch.equal(undropped(*wide, **exact), near[0]))


def drawn(draw: random.Random, tokens: int) -> Tensor:
    sizes, rest = list[int](), tokens
    while rest:
        sizes.append(min(rest, draw.choice(SIZES)))
        rest -= sizes[-1]
    return documents(*sizes)


@pytest.mark.parametrize("seed", range(6))
def test_random(seed: int) -> None:
    draw = random.Random(seed)
    tokens = draw.choice((1, 64, 130, 200))
    ids = torch.stack([drawn(draw, tokens) for _ in range(2)])
    count = torch.tensor([draw.randint(0, tokens), tokens]) if draw.random() < 0.3 else None
    judge(draw.choice(BODIES), ids, draw.choice((tokens, max(1, tokens // 2))), "cpu", count, seed)


UNEVEN = torch.stack([documents(200), documents(10, 120, 3, 66, 1)])


SEVERAL = "attend causal & window(90), causal over pool(mean, 2)"


@pytest.mark.parametrize(("body", "rows"), [("attend causal", 200), ("attend causal", 140), (SEVERAL, 200)])
def test_cpu(body: str, rows: int) -> None:
    assert judge(body, UNEVEN, rows, "cpu", matters=True)


@pytest.mark.parametrize("body", ["softmax with sink sinks[h]\nattend causal & window(100)", SEVERAL])
def test_triton(body: str) -> None:
    assert judge(body, UNEVEN, 130, "triton", matters=True)


def test_documents_are_as_called_alone() -> None:
    """To the bit of what each drops: the tiles of a document that begins anywhere are its own."""
    attn, alone = compiled("attend causal", 0.3), attndsl.compile("attention a { attend causal skip below 0.3 }")
    q, k, v = peaked(1, 2, 1, 290, 290, 8)
    ids = documents(10, 150, 130)[None]
    whole = attn(q, k, v, doc=ids)
    exact = attndsl.compile("attention a { input doc : int[b, k] packed doc attend causal }")(q, k, v, doc=ids)
    assert not torch.allclose(whole, exact)
    for low, high in ((0, 10), (10, 160), (160, 290)):
        own = alone(*(x[:, :, low:high] for x in (q, k, v)))
        torch.testing.assert_close(whole[:, :, low:high], own, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_the_table(seed: int) -> None:
    """Every row of a document of more than one tile of keys is in one of its tiles of 64 rows, of which it has room."""
    draw = random.Random(seed)
    tokens = draw.choice((1, 65, 300, 700))
    rows, ids = draw.choice((tokens, draw.randint(1, tokens))), drawn(draw, tokens)
    numbers, table = (x[0] for x in document_tiles(ids[None], None, rows))
    assert len(table) == tiles_of_documents(rows)
    assert int(numbers[-1]) < len(table)
    start = tokens - rows
    begins = [0, *(torch.nonzero(ids.diff())[:, 0] + 1).tolist(), tokens]
    for low, high in itertools.pairwise(begins):
        first = max(low, start)
        for i in range(first, high):
            own = table[numbers[i - start]].tolist()
            if high - low > TILE:
                tile = first + (i - first) // TILE * TILE
                assert own == [tile - start, min(tile + TILE, high) - start, low, high]


def test_what_is_said_and_refused() -> None:
    attn = compiled("attend causal", 0.3)
    assert attn.kernels() == ("forward", "left", "dq", "dkdv")
    assert "k_begin" in attn.source("left")
    assert "tiles_0" in attn.source("forward")
    assert "dropped below 0.3" in str(attn.explain(64, doc=torch.zeros(1, 64, dtype=torch.int32)))
    q = torch.randn(1, 2, 1, 8)
    k, lengths = torch.randn(1, 1, 9, 8), torch.tensor([9], dtype=torch.int32)
    with pytest.raises(attndsl.PatternError, match="A911"):
        attn.decode(q, k, k, lengths, doc=torch.zeros(1, 9, dtype=torch.int32))


def test_no_tokens() -> None:
    attn = compiled("attend causal", 0.3)
    q, ids = torch.zeros(1, 2, 0, 8), torch.zeros(1, 0, dtype=torch.int32)
    assert attn(q, q[:, :1], q[:, :1], doc=ids).shape == q.shape
