"""Selections of padded calls whose members are no blocks in a row: each sequence's are those of its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attndsl
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from tests.gradients import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

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
    "diagonals": "x = attend causal\n y = attend causal & top(2, diagonals(4), among = causal, per = head, "
    "by = probs(x, sum))\n output y",
}


def judge(body: str, rows: int, n: tuple[int, int], dtype: torch.dtype, backend: str, tokens: int = 40) -> None:
    declared = "input n : int[b]\n" + "input ids : int[b, k]\n" * ("ids" in body)
    head, axes, rest = body.rpartition("axes y, x[4]\n")
    attn = attndsl.compile(f"attention a {{\n{declared}lengths n\n{head}{axes}{rest}\n}}")
    generator, found = torch.Generator().manual_seed(sum(n) + rows), list[Any]()
    drawn = [torch.randn(2, h, m, 16, generator=generator) for h, m in ((4, rows), (2, tokens), (2, tokens))]
    given: dict[str, Any] = {"n": torch.tensor(n)} | ({"ids": IDS[:, :tokens]} if "ids" in body else {})
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


@pytest.mark.parametrize("name", ["segments", "tiles"])
def test_in_triton(name: str) -> None:
    judge(BODIES[name], 23, (40, 26), torch.float32, "triton")


@pytest.mark.parametrize(("clauses", "named"), [
    ("attend top(1, blocks(8) on permuted(ids), among = all, by = dot(Q, mean(K)))", "a selection of placed blocks"),
    ("x = attend causal over pool(mean, 4)\n y = attend top(1, segments(ids), among = all, by = probs(x))\n output y",
     "such a selection"),
])  # fmt: skip
def test_what_is_refused(clauses: str, named: str) -> None:
    with pytest.raises(PatternError, match="A908") as caught:
        load(f"attention a {{ input n : int[b]\n input ids : int[b, k]\n lengths n\n {clauses} }}")
    assert f"around {named} is" in str(caught.value)


def test_what_tiles_leave_out_over_entries() -> None:
    """Past the last token an extent is of no tile: a call would see other entries than its sequence alone."""
    rest = "plan sel = top(2, tiles(2, 3), among = all, by = dot(Q, mean(K)))\n attend all - sel over pool(mean, 4)"
    with pytest.raises(PatternError, match="A908"):
        attndsl.compile(f"attention a {{ input n : int[b]\n axes y, x[4]\n lengths n\n {rest} }}")
