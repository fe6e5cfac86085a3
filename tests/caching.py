"""What the tests of the kernel cache share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

from attndsl.runtime.cache import KernelCache, cache_key

ROOT = Path(__file__).resolve().parent.parent
KEY = cache_key("forward", 128)
MEMBERS = {"kernel.py": b"pass\n", "größe.cubin": bytes(range(256)), "empty": b""}


class Builder:
    """A build function that counts its calls."""

    def __init__(self, members: Mapping[str, bytes] = MEMBERS, seconds: float = 0.0) -> None:
        self.members, self.seconds, self.calls = members, seconds, 0

    def __call__(self) -> Mapping[str, bytes]:
        self.calls += 1
        time.sleep(self.seconds)
        return self.members


def entry(directory: Path, key: str = KEY) -> Path:
    return directory / f"{key}.kernel"


def stored(directory: Path) -> Path:
    """Store MEMBERS under KEY; returns the entry's file."""
    KernelCache(directory).fetch(KEY, Builder())
    return entry(directory)


def fetched_anew(directory: Path) -> int:
    """Calls of `build` that a process with an empty memory needs. The result is right in any case."""
    build = Builder()
    assert KernelCache(directory).fetch(KEY, build) == MEMBERS
    return build.calls


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def start(program: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python program that can import attndsl."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program that can import attndsl, to success."""
    process = start(program, **environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(process.args, 0, out, err)
