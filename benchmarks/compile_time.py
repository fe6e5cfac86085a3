"""Time from a pattern to its first result: cold, from the disk cache, and at a new length.

Each measurement is a process of its own with cache folders of its own. `import torch` and the device's start-up are not
counted; everything after them is, `import attndsl` included. The rows "imported" have our imports, and Triton's, before
the clock starts.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

PATTERN = "causal & (sink(4) | window(1024))"
STAGES = ("import", "compile", "first", "second", "new length", "total")
CACHES = ("ATTNDSL_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
PROCESS_LIMIT_S = 240
ROOT = Path(__file__).resolve().parent.parent


def run_compile(pattern: str, device: torch.device, backward: bool, repeats: int = 3) -> list[list[str]]:
    """A table in ms: the stages of a cold process, and of one that finds the first one's caches."""
    table = [["ms", *STAGES]]
    ours = ("attndsl", "attndsl imported")
    for peer in (*ours, "attndsl imported portable", "Flex") if device.type == "cuda" else ours:
        cold, warm = [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="attndsl-bench-") as folder:
                cold.append(in_process(peer, pattern, device, backward, Path(folder)))
                warm.append(in_process(peer, pattern, device, backward, Path(folder)))
        for label, runs in (("cold", cold), ("from disk", warm)):
            table.append([f"{peer}, {label}", *(f"{median(run[s] for run in runs):.1f}" for s in STAGES)])
    return table


def in_process(peer: str, pattern: str, device: torch.device, backward: bool, folder: Path) -> dict[str, float]:
    """Run `stages` in a fresh interpreter whose caches live in `folder`.

    Raises RuntimeError, with the end of its messages, when it fails.
    """
    environment = os.environ | {name: str(folder / name.lower()) for name in CACHES}
    command = [sys.executable, "-m", "benchmarks.compile_time", peer, pattern, str(device), str(int(backward))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROCESS_LIMIT_S, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{peer} failed:\n{done.stderr[-2000:]}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def stages(peer: str, pattern: str, device: torch.device, backward: bool) -> dict[str, float]:
    """Milliseconds of each stage in this process, which must not have imported the peer yet."""
    if device.type == "cuda":
        torch.zeros(1, device=device)
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)

    def tensors(length: int) -> list[Tensor]:
        return [torch.randn(1, 4, length, 128, device=device, dtype=dtype, requires_grad=backward) for _ in range(3)]

    first, longer = tensors(n), tensors(n + 640)
    if "imported" in peer:
        importlib.import_module("triton.experimental.gluon.language")
        importlib.import_module("attndsl.runtime.assembly")
        importlib.import_module("attndsl.runtime.ops")
    clock = Stopwatch(device)
    if peer.startswith("attndsl"):
        import attndsl

        clock.lap("import")
        attn = attndsl.compile(pattern)
        clock.lap("compile")

        backend = "triton" if "portable" in peer else "auto"

        def call(x: list[Tensor]) -> None:
            out = attn(*x, backend=backend)
            if backward:
                torch.autograd.backward(out.sum())
    else:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        clock.lap("import")
        fn = torch.compile(flex_attention)
        clock.lap("compile")

        def call(x: list[Tensor]) -> None:
            length = x[0].shape[2]
            mask = create_block_mask(
                lambda b, h, q, k: (k <= q) & ((q - k < 1024) | (k < 4)), None, None, length, length, device=str(device)
            )
            out = fn(x[0], x[1], x[2], block_mask=mask)
            if backward:
                torch.autograd.backward(out.sum())

    for name, x in (("first", first), ("second", first), ("new length", longer)):
        call(x)
        clock.lap(name)
    clock.laps["total"] = sum(clock.laps[name] for name in ("import", "compile", "first"))
    return clock.laps


class Stopwatch:
    """Milliseconds between laps, each ended by waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name] = 1e3 * (now - self.last)
        self.last = now


if __name__ == "__main__":
    _, peer_name, pattern_text, device_text, with_backward = sys.argv
    print(json.dumps(stages(peer_name, pattern_text, torch.device(device_text), with_backward == "1")))
