"""Selections of padded calls whose members are no blocks in a row: each sequence's are those of its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attndsl
from tests.gradients import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

PLACES = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(x)) for x in (1, 2)])
IDS = torch.tensor([[0] * 5 + [1] * 3 + [0] * 4 + [2] * 12 + [3] * 6 + [4] * 10, [3] * 11 + [1] * 16 + [2] * 13])
GRID = "axes y, x[4]\n attend"
BODIES = {
    "segments": "attend causal & top(2, segments(ids), among = causal, by = dot(Q, mean(K)))",
    "shared": "attend causal & top(1, segments(ids), share = group, among = causal, by = dot(Q, max(K)))",
    "of heads": "attend cover(0.6, segments(ids), among = all, per = head, by = dot(mean(Q), mean(K)))",
    "of rows": "attend causal & top(2, segments(ids), among = causal, per = rows(8), by = dot(max(Q), first(K)))",
    "a share": "attend top(fraction(0.4), segments(ids), among = all, by = bound(Q, min(K), max(K)))",
    "voted": "x = attend causal\n y = attend top(2, segments(ids), among = all, by = probs(x))\n output y",
    "tiles": f"{GRID} top(2, tiles(2, 2), among = all, by = dot(Q, max(K)))",
    "tiles for tiles": f"{GRID} top(2, tiles(2, 2), among = all, per = tiles(2, 2), by = dot(mean(Q), mean(K)))",
    "tiles of heads": f"{GRID} above(0.2, tiles(2, 2), among = all, per = head, by = dot(mean(Q), last(K)))",
    "placed": "attend causal & top(2, blocks(4) on permuted(places), among = causal, by = dot(Q, mean(K)))",
    "placed for rows": "attend top(1, blocks(5) on permuted(places), among = all, per = rows(8), "
    "by = dot(mean(Q), max(K)))",
    "placed of heads": "attend cover(0.6, blocks(3) on permuted(places), among = all, per = head, share = group, "
    "by = dot(max(Q), last(K)))",
    "left out": "plan sel = top(3, blocks(4) on permuted(places), among = all, by = dot(Q, mean(K)))\n"
    "attend causal - sel, sel over pool(mean, 3)",
    "masses of placed": "x = attend causal over pool(mean, 5, 3)\n"
    "y = attend top(2, blocks(4) on permuted(places), among = all, per = rows(8), by = probs(x))\n output x + y",
    "masses of segments": "x = attend all over pool(max, 4, 2)\n"
    "y = attend causal & cover(0.7, segments(ids), among = causal, per = head, by = probs(x, max))\n output y",
    "masses of tiles": "axes y, x[4]\n p = attend causal over pool(mean, 6, visible = any)\n"
    "z = attend top(2, tiles(2, 3), among = all, per = tiles(3, 2), by = probs(p))\n output p + z",
    # Past the last token an extent has the tiles that tokens begin, and a segment goes on.
    "tiles over entries": "axes y, x[4]\n plan sel = top(2, tiles(2, 3), among = all, by = dot(Q, mean(K)))\n"
    "attend all - sel over pool(mean, 3)",
    "segments over entries": "plan sel = top(2, segments(ids), among = all, by = dot(Q, mean(K)))\n"
    "attend sel over pool(mean, 6, 4)",
    "blocks over entries": "plan sel = top(1, blocks(3), among = all, by = dot(Q, max(K)))\n"
    "attend sel | window(3) over pool(mean, 6, 4)",
    "rows over entries": "plan sel = top(2, blocks(2), per = rows(8), among = all, by = dot(mean(Q), mean(K)))\n"
    "attend causal & sel over pool(mean, 4, visible = any) from pool(mean, 3)",
    "diagonals": "x = attend causal\n y = attend causal & top(2, diagonals(4), among = causal, per = head, "
    "by = probs(x, sum))\n output y",
}


GIVEN = {"ids": IDS, "places": PLACES}


def judge(body: str, rows: int, n: tuple[int, int] | None, dtype: torch.dtype, backend: str, tokens: int = 40) -> None:
    """Output and gradients. n: how many tokens of each are present; None: all, and no clause says so."""
    read = [name for name in GIVEN if name in body]
    declared = "".join(f"input {name} : int[b, k]\n" for name in read) + ("input n : int[b]\nlengths n\n" if n else "")
    attn = attndsl.compile(f"attention a {{\n{declared}{body}\n}}")
    generator, found = torch.Generator().manual_seed(sum(n or (0,)) + rows), list[Any]()
    drawn = [torch.randn(2, h, m, 16, generator=generator) for h, m in ((4, rows), (2, tokens), (2, tokens))]
    given: dict[str, Any] = {name: GIVEN[name][:, :tokens] for name in read} | ({"n": torch.tensor(n)} if n else {})
    for run, kind in ((attn, dtype), (attn.reference, torch.float64)):
        # What is chosen is asked of the same numbers.
        leaves = [x.to(kind).requires_grad_() for x in drawn]
        call: Any = run
        out = call(*leaves, **given, **({"backend": backend} if run is attn else {}))
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for x, y in zip(*found, strict=True):
        bound = 5 * TOLERANCE[dtype] * max(1.0, float(y.detach().abs().max()))
        torch.testing.assert_close(x.double(), y, atol=bound, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", BODIES)
def test_on_the_cpu(name: str) -> None:
    for rows, n in ((40, (40, 26)), (17, (0, 33)), (31, (7, 40))):
        judge(BODIES[name], rows, n, torch.float64, "cpu")
    judge(BODIES[name], 1, (1, 0), torch.float64, "cpu", tokens=1)


@pytest.mark.parametrize("name", [name for name in BODIES if name.endswith("over entries")])
def test_without_padding(name: str) -> None:
    """What lies past the last token is what a padded sequence has there."""
    for tokens in (7, 25, 40):
        judge(BODIES[name], tokens, None, torch.float64, "cpu", tokens)


def test_a_padded_sequence_is_one_alone() -> None:
    """Members are those of the call cut to it, by the oracle and by a call."""
    text = "plan sel = top(1, blocks(3), among = all, by = dot(Q, max(K)))\n attend sel over pool(mean, 6, 4)"
    attn = attndsl.compile(f"attention a {{ input n : int[b]\n lengths n\n {text} }}")
    alone = attndsl.compile(f"attention a {{ {text} }}")
    q, k, v = (
        torch.randn(1, 2, 29, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for _ in "qkv"
    )
    expected = alone.reference(*(x[:, :, :6] for x in (q, k, v)))
    for run in (attn, attn.reference):
        found = run(q, k, v, n=torch.tensor([6]))
        torch.testing.assert_close(found[:, :, :6], expected)
        assert not found[:, :, 6:].any()


@pytest.mark.parametrize("name", ["segments", "tiles", "placed", "masses of segments", "left out"])
def test_in_triton(name: str) -> None:
    judge(BODIES[name], 23, (40, 26), torch.float32, "triton")
