"""The benchmark of whole routed calls, at sizes that a CPU computes, and its rule against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attndsl
from benchmarks import routed
from benchmarks.dense import Verdict

CPU = torch.device("cpu")


def test_the_rule_is_the_oracles() -> None:
    attn = attndsl.compile("attention c { input p : blocks(16)[b, g, q]\n attend causal & p }")
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, heads, 70, 16, generator=generator) for heads in (4, 2, 2, 4))
    plan = routed.random_blocks(2, 70, 16, 3, CPU)
    assert (plan.max(-1).values == torch.arange(70) // 16).all()
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out = attn.reference(*exact, p=plan)
    right = (out, *torch.autograd.grad(out, exact, dout.double()))
    for found, want in zip(routed.blocks_rule(q, k, v, plan, 16, dout, rows=32), right, strict=True):
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-4)


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(call: Any, device: torch.device) -> float:
        call()
        return 1.0

    monkeypatch.setattr(routed, "milliseconds", run)


def test_every_system_is_timed(once: None) -> None:
    header, *rows = routed.run_routed(70, 16, torch.float32, CPU, dense=True, which=routed.systems(16, 3, 8, 4, 16))
    assert [row[0] for row in rows] == ["MoBA (16, 3)", "NSA (8, 4, 16)", "chosen blocks (8, 4)"]
    assert all(len(row) == len(header) for row in rows)
    assert [row[3:] for row in rows] == [
        [choice, "1.00", "1.00", "1.00 (1.00x)", "1.00 (1.00x)"] for choice in ("1.00", "1.00", "given")
    ]


def test_what_is_wrong_is_not_timed(once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "check", lambda *_: Verdict(1.0, 0.5))
    _, row, *_ = routed.run_routed(20, 16, torch.float32, CPU, dense=False, which=routed.systems(16, 3, 8, 4, 16))
    assert row[3:] == ["FAILED: error 1.0e+00, allowed 5.0e-01", "-", "-", "-", "-"]
