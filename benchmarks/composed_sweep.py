"""Random composed programs by the thousand, on this machine without a GPU, against the language's oracle.

    nice python -m benchmarks.composed_sweep --seeds 0:40 --each 100

Each program of `tests/strategies.py` goes through four ways, judged as the tests judge them: `tiles` (the closed-form
runs of both sides against the dense mask), `cpu` (the blocked PyTorch lowering in float64, output and lse), `gradients`
(its backward), and `triton` (the portable kernel, interpreted, in float32). A seed always draws the same programs, so
what fails is found again by its seed and number. The last line counts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

# Triton decides when it is imported whether it interprets.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.composed_check import drawn
from benchmarks.failures import short_reason

LENGTHS = (1, 7, 16, 33, 64, 65, 100)
DIMS = (8, 8, 16, 24, 80)
# What a program may take of each way before it counts as slow.
SLOW_S = 10.0


def tiles(case: Any) -> None:
    from tests.tiling import check_tiles

    check_tiles(case.load(), case.shape, 16, 32, case.inputs, case.args)


def cpu(case: Any) -> None:
    from tests.test_cpu import judge

    judge(case, torch.float64)


def gradients(case: Any) -> None:
    from tests.gradients import judge
    from tests.test_backward_cpu import runner

    judge(runner(), case, torch.float64)


def triton(case: Any) -> None:
    from attndsl.plan import Loads, Tiling
    from tests.test_forward import judge

    judge(case, Loads.POINTER, tiling=Tiling(32, 32))


WAYS: dict[str, Callable[[Any], None]] = {"tiles": tiles, "cpu": cpu, "gradients": gradients, "triton": triton}


def sweep(seeds: range, each: int, ways: list[str]) -> Iterator[tuple[str, str]]:
    """The way and the outcome (ok, slow, FAILED) of each program; what is not ok is printed as it is found."""
    for seed in seeds:
        for number, case in enumerate(drawn(each, seed, dims=DIMS, lengths=LENGTHS)):
            for way in ways:
                begun = time.perf_counter()
                outcome = "ok"
                try:
                    WAYS[way](case)
                except Exception as problem:  # noqa: BLE001 - every kind of failure counts
                    outcome = "FAILED"
                    where = traceback.extract_tb(problem.__traceback__)[-1]
                    print(f"FAILED {way} seed {seed} number {number}: {short_reason(problem)} ({where.name})")
                    print(f"  {case.shape}\n  {case.text}\n  {dict(case.params)} {dict(case.args)}", flush=True)
                took = time.perf_counter() - begun
                if outcome == "ok" and took > SLOW_S:
                    outcome = "slow"
                    print(f"slow {way} seed {seed} number {number}: {took:.1f} s\n  {case.text}", flush=True)
                yield way, outcome
        print(f"seed {seed} done", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:4", help="first:end")
    parser.add_argument("--each", type=int, default=100, help="programs of a seed")
    parser.add_argument("--ways", default=",".join(WAYS))
    given = parser.parse_args()
    first, _, end = given.seeds.partition(":")
    # The interpreter computes with masked lanes too.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    counts = Counter(sweep(range(int(first), int(end)), given.each, given.ways.split(",")))
    for way in given.ways.split(","):
        print(f"{way}: " + ", ".join(f"{counts[way, x]} {x}" for x in ("ok", "slow", "FAILED")))
    return 1 if any(outcome == "FAILED" for _, outcome in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
