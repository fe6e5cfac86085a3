"""Time a call: on the GPU by device events, on the CPU by the clock; host overhead by itself."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Call = Callable[[], object]


def milliseconds(call: Call, device: torch.device, warmup_ms: int = 15, measure_ms: int = 60) -> float:
    """Median duration of a call in ms; on the GPU with a cold L2 cache (`triton.testing.do_bench`)."""
    if device.type == "cuda":
        testing: Any = importlib.import_module("triton.testing")  # imported late: the CPU table needs no triton
        return float(testing.do_bench(call, warmup=warmup_ms, rep=measure_ms, return_mode="median"))
    return wall_milliseconds(call)


def wall_milliseconds(call: Call, at_least: int = 3, seconds: float = 1.0) -> float:
    """Median wall-clock duration in ms of a call that returns when it is done."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def host_microseconds(call: Call, device: torch.device, batches: int = 15, repeats: int = 4) -> float:
    """Host time of one call in µs: the smallest of several medians over batches of calls.

    On the GPU the calls only enqueue work and each batch starts with an idle device, so a batch must be
    short enough not to fill the launch queue. On the CPU this is the whole duration of a call.
    """

    def batch(calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    call()
    calls = min(100, max(1, int(0.02 / batch(3))))
    return 1e6 * min(median(batch(calls) for _ in range(batches)) for _ in range(repeats))
