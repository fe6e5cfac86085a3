"""Random composed programs (tests/strategies.py) on a device, against the language's oracle."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attndsl
from benchmarks.check_cases import DTYPES, Shape
from benchmarks.dense import Verdict
from benchmarks.failures import Failure, short_reason

STRATEGIES = Path(__file__).resolve().parent.parent / "tests" / "strategies.py"
DIMS = (64, 80, 128)
LENGTHS = (1, 17, 130, 513)
# Float32 logits of a few hundred, as slopes make them, leave this much of a probability uncertain.
RELATIVE_SLACK = 1e-4


def drawn(count: int, seed: int, **sizes: Any) -> list[Any]:
    """That many cases of `strategies.composed_programs(**sizes)`; the same ones for the same seed."""
    import hypothesis

    strategies: Any = importlib.import_module("tests.strategies")
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategies.composed_programs(**sizes))
    def collect(case: Any) -> None:
        found.append(case)

    collect()
    return found


def check_composed(
    count: int, seed: int, device: torch.device, stop: float, share: tuple[int, int] = (0, 1)
) -> tuple[int, list[Failure]]:
    """Check random programs until `count` are done or the clock passes `stop`; how many were run, and what failed.

    share: which of how many equal parts of them.
    """
    failures: list[Failure] = []
    run = 0
    for number, case in enumerate(drawn(count, seed, dims=DIMS, lengths=LENGTHS)):
        if number % share[1] != share[0]:
            continue
        if time.perf_counter() > stop:
            break
        run += 1
        failures += check_one(case, DTYPES[number % len(DTYPES)], device, seed + number)
    return run, failures


def check_one(case: Any, dtype: torch.dtype, device: torch.device, seed: int) -> list[Failure]:
    """The output of one program against float64; rounding may cost a few units of what the row adds up."""
    strategies: Any = importlib.import_module("tests.strategies")
    q, k, v, inputs = strategies.tensors(case, seed, dtype)
    q, k, v = (x.to(device) for x in (q, k, v))
    call = {name: x.to(device) for name, x in inputs.items()} | dict(case.args)
    s = case.shape
    shape = Shape(s.batch, s.heads, s.kv_heads, s.rows, s.k_len, s.dim, s.v_dim, dtype, strided=False)
    try:
        attn: Any = attndsl.compile(case.text, **case.params)
        exact: Tensor = attn.reference(q, k, v, **call)
        magnitude: Tensor = attn.reference(q, k, v.abs(), **call)
        out: Tensor = attn(q, k, v, **call)
        error = float((out.double() - exact).abs().max())
        allowed = (2 * torch.finfo(dtype).eps + RELATIVE_SLACK) * float(magnitude.abs().max())
        if not Verdict(error, allowed).passed:
            return [Failure(case.text, shape, "out", f"{error:.2e} > {allowed:.2e}")]
    except Exception as error:  # noqa: BLE001 - every kind of failure is a line of the table
        return [Failure(case.text, shape, "raised", short_reason(error))]
    return []
