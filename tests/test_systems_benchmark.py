"""The table of published systems: each call against the oracle at few tokens, and what the table says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import systems
from benchmarks.dense import Verdict
from benchmarks.published import SYSTEMS, Published

CPU = torch.device("cpu")
BY_NAME = {system.name: system for system in SYSTEMS}


def test_each_example_once() -> None:
    assert len(BY_NAME) == len(SYSTEMS)
    assert all((systems.PATTERNS / f"{name}.attn").exists() for name in BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_system_is_the_oracles(name: str) -> None:
    """Every gradient too; and what the table counts as seen is some of the keys and entries there are."""
    # Of a video as many tokens as a grid of tiles has.
    n = 256 if name == "vsa" else 96
    verdict = systems.check(BY_NAME[name], 16, torch.float32, CPU, n)
    assert verdict.passed, verdict
    call = systems.make(BY_NAME[name], n, 16, torch.float32, CPU, group=True)
    assert 0 < BY_NAME[name].seen(n, call.plans()) <= 2.1 * n


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: Any, device: torch.device) -> float:
        call()
        return 1.0

    monkeypatch.setattr(systems, "milliseconds", once)
    monkeypatch.setattr(systems, "CHECKED", 128)
    which = [BY_NAME[name] for name in ("moba", "blasst", "snapkv", "lychee")]
    header, *rows = systems.run_systems(256, 16, torch.float32, CPU, which)
    assert [row[0] for row in rows] == [system.name for system in which]
    assert all(len(row) == len(header) for row in rows)
    assert [row[4] for row in rows] == ["0.00 (0 %)", "-", "-", "1.00 beside it"]
    assert [row[6] for row in rows] == ["1.00", "-", "1.00", "1.00"]


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(system: Published, *_: Any) -> Verdict:
        if system.name == "moba":
            return Verdict(1.0, 0.5)
        raise MemoryError("no room")

    monkeypatch.setattr(systems, "check", broken)
    _, *rows = systems.run_systems(64, 16, torch.float32, CPU, [BY_NAME["moba"], BY_NAME["nsa"]])
    assert rows[0][2:] == ["FAILED: error 1.0e+00, allowed 5.0e-01"]
    assert "no room" in rows[1][2]
