"""Memory of routed programs grows with the tokens, without a GPU: no pass of theirs holds rows times keys.

The launches of the Triton kernels are left out; everything around them (choosing, listing, gathering, slots, merges,
gradients) runs as it would and is counted. `python -m benchmarks growth` measures the same on a GPU, to 256 K tokens.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import attndsl
from attndsl.runtime import lists, strips, triton_launch
from attndsl.runtime.triton_launch import INTERPRETED

EXAMPLES = Path(__file__).parent.parent / "examples" / "patterns"
pytestmark = [
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
    pytest.mark.skipif(not INTERPRETED, reason="leaves out interpreted launches"),
]
# As many entries of a strip as keep it far below what a call holds.
STRIP = 1 << 12
LISTS: dict[str, dict[str, Any]] = {"moba": {"block": 32, "n": 3}, "nsa": {"block": 16, "n": 4, "span": 64}}
# Plans without a bound are maps of row classes and members, a byte each; lists of tiles are made of them.
MAPS: dict[str, dict[str, Any]] = {
    "xattention": {"block": 32, "stride": 16}, "pisa": {"block": 32}, "psa": {"block": 32, "stride": 16},
}  # fmt: skip
BYTES_A_MEMBER = 64


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that a call holds at once, beside what was there: nothing older may be freed meanwhile."""
    gc.collect()
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    gc.enable()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def taken(name: str, params: dict[str, Any], tokens: int) -> tuple[int, int]:
    """Bytes of a forward pass, and of one with its gradients, after a first of each."""
    attn = attndsl.compile(EXAMPLES / f"{name}.attn", **params)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 8, generator=generator).requires_grad_() for heads in (2, 1, 1))
    given: dict[str, Any] = {}
    if name == "nsa":
        given["gate"] = torch.randn(1, 2, tokens, 3, generator=generator).requires_grad_()

    def both() -> None:
        out = attn(q, k, v, backend="triton", **given)
        torch.autograd.grad(out, [q, k, v, *given.values()], torch.ones_like(q))

    def forward() -> None:
        with torch.no_grad():
            attn(q, k, v, backend="triton", **given)

    both()
    return peak(forward), peak(both)


def measure() -> dict[str, list[tuple[int, int]]]:
    """Of every program what 512 and 2048 tokens take."""
    triton_launch._Interpreted.__call__ = lambda self, call: None  # type: ignore[method-assign]
    lists._ready = lambda function, width, grid, device, given: lambda **tensors: None
    strips.STRIP["cpu"] = STRIP
    return {name: [taken(name, of, n) for n in (512, 2048)] for name, of in (LISTS | MAPS).items()}


@pytest.fixture(scope="module")
def measured() -> dict[str, list[list[int]]]:
    """In a process of its own: what other tests left could be freed while it counts."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_routed_memory"], cwd=EXAMPLES.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    found: dict[str, list[list[int]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_linear(name: str, measured: dict[str, list[list[int]]]) -> None:
    """Four times the tokens take four times the memory, and no more."""
    for small, large in zip(*measured[name], strict=True):
        assert 0 < large <= 4.1 * small


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_of_blocks(name: str, measured: dict[str, list[list[int]]]) -> None:
    """What is not linear is a few bytes for each pair of a row class and a member."""
    pairs = 2 * (2048 // MAPS[name]["block"]) ** 2
    for small, large in zip(*measured[name], strict=True):
        assert 0 < large <= 4.1 * small + BYTES_A_MEMBER * pairs


if __name__ == "__main__":
    print(json.dumps(measure()))
