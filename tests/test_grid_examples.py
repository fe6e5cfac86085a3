"""The example patterns for images and videos: outputs and gradients against numpy masks and scores in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from tests.covered import covers
from tests.grid_rules import GRIDS, cells, rettention
from tests.rules import BATCH, HEADS, KV_HEADS, Array, Pairs, System, shape_of

EXAMPLES = Path(__file__).parent.parent / "examples" / "patterns"
DIM = 16
# From scores, values, the mask, learned inputs, and the coordinates of queries and keys.
Attend = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor], Array, Array], Tensor]


def softmax(s: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    weights = s.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.masked_fill(~seen, 0.0) @ v


def plain(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], at_q: Array, at_k: Array) -> Tensor:
    return softmax(s, v, seen)


def swin(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], at_q: Array, at_k: Array) -> Tensor:
    """The table's entry of the offset; offsets out of the table belong to pairs of different windows."""
    reach = given["bias"].shape[1] // 2
    offset = np.clip(at_q[:, None] - at_k[None], -reach, reach) + reach
    return softmax(s + given["bias"][:, offset[..., 0], offset[..., 1]], v, seen)


def decayed(s: Tensor, given: Mapping[str, Tensor], at_q: Array, at_k: Array) -> Tensor:
    steps = torch.from_numpy(np.abs(at_q[:, None] - at_k[None]).sum(-1)).double()
    return s + steps * given["decay"][:, None, None].log()


def rmt(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], at_q: Array, at_k: Array) -> Tensor:
    return softmax(decayed(s, given, at_q, at_k), v, seen)


def rmt_sigmoid(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], at_q: Array, at_k: Array) -> Tensor:
    return torch.sigmoid(decayed(s, given, at_q, at_k)).masked_fill(~seen, 0.0) @ v


SCORED: dict[str, Attend] = {
    "swin": swin, "swin_shifted": swin, "rmt": rmt, "rmt_sigmoid": rmt_sigmoid,
}  # fmt: skip
SYSTEMS = {system.name: system for system in GRIDS if system.name != "rettention"}


def compare(
    attn: attndsl.Attention, attend: Attend, system: System, n: int, rows: int, inputs: dict[str, Tensor]
) -> None:
    """Output and gradients, those of learned inputs too."""
    p, rng = Pairs(shape_of(n, rows, DIM), {}), np.random.default_rng(n + 1)
    seen = torch.from_numpy(np.broadcast_to(system.rule(p), (BATCH, HEADS, rows, n)).copy())
    place = cells(n, (system.params["width"],)) if system.name in SCORED else np.zeros((n, 2), int)
    sizes = ((HEADS, rows), (KV_HEADS, n), (KV_HEADS, n))
    qkv = [torch.from_numpy(rng.standard_normal((BATCH, heads, size, DIM))) for heads, size in sizes]
    learned = [decl.name for decl in attn.program.inputs if decl.learnable]

    def dense(q: Tensor, k: Tensor, v: Tensor, **given: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        return attend(q @ k.mT / DIM**0.5, v, seen, given, place[n - rows :], place)

    results = []
    for run in (attn, dense):
        leaves = [x.clone().requires_grad_() for x in qkv]
        given: dict[str, Any] = {name: x.clone().requires_grad_(name in learned) for name, x in inputs.items()}
        out = run(*leaves, **given)
        passed = torch.from_numpy(np.random.default_rng(2).standard_normal(out.shape))
        wanted = [*leaves, *(given[name] for name in learned)]
        results.append([out.detach(), *torch.autograd.grad(out, wanted, passed)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torch.nan_to_num(theirs), msg=lambda m: f"{system.name} of {rows} x {n}: {m}")


@covers("neighborhood", "video", "sliding_tile", "swin", "rmt", "rmt_sigmoid", "davit", "radial", "axial")
@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_forward_and_backward(system: System) -> None:
    attn = attndsl.compile(system.text, **system.params)
    for n in system.lengths:
        inputs = {key: torch.from_numpy(x).double() for key, x in system.data(np.random.default_rng(n), n).items()}
        for rows in sorted({n, -(-n // 3)}):
            compare(attn, SCORED.get(system.name, plain), system, n, rows, inputs)


@covers("rettention")
@pytest.mark.parametrize(("n", "rows"), [(1, 1), (4, 4), (61, 61), (61, 20)])
def test_rettention(n: int, rows: int) -> None:
    """A row's output is multiplied by the statistic that is handed in."""
    params: dict[str, Any] = {"w": 4, "text": 5, "tokens": 9}
    system = System("rettention", "", partial(rettention, **params), params)
    rho = torch.from_numpy(np.random.default_rng(n).uniform(0.5, 1.0, (BATCH, HEADS, rows)))

    def attend(s: Tensor, v: Tensor, seen: Tensor, given: Mapping[str, Tensor], at_q: Array, at_k: Array) -> Tensor:
        return given["rho"][..., None] * softmax(s, v, seen)

    attn = attndsl.compile(EXAMPLES / "rettention.attn", **params)
    compare(attn, attend, system, n, rows, {"rho": rho})
