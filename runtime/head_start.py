"""What Triton does once in a process, or once for a kernel, and waits for: begun on a thread beside our own work.

A first compilation hashes Triton's libraries and has the C compiler make its driver module and a launcher, together
half a second in which no lock is held. All of it only fills Triton's caches: what fails here fails again, and is
reported, where it is needed.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import triton
from triton.runtime.cache import triton_key

from attndsl.runtime.launcher import FAST_VERSIONS


@functools.cache
def begin() -> tuple[threading.Thread, threading.Thread]:
    """Begin what happens once in a process: the digest of Triton's libraries, and its driver."""
    return _on_thread(triton_key), _on_thread(lambda: triton.runtime.driver.active.get_current_target())


def _on_thread(step: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with suppress(Exception):
            step()

    thread = threading.Thread(target=run, name="attndsl-head-start", daemon=True)
    thread.start()
    return thread


@contextmanager
def launcher_beside(types: Sequence[tuple[str, str]]) -> Iterator[None]:
    """While a kernel with parameters of these types is compiled, have its launcher made (no types: it has none)."""
    if not types:
        yield
        return
    digest, driver = begin()
    # Only so that the digest is not made twice.
    digest.join()
    launcher = _on_thread(lambda: _make_launcher(dict(types), driver))
    try:
        yield
    finally:
        # Nor should two threads that find no driver make two.
        launcher.join()


def _make_launcher(types: dict[str, str], driver: threading.Thread) -> None:
    driver.join()
    if triton.__version__.startswith(FAST_VERSIONS):
        module = sys.modules[type(triton.runtime.driver.active).__module__]
        # Which map a descriptor gets does not show in the launcher's text, only that it gets one.
        maps: list[dict[str, Any]] = [{} for x in types.values() if x.startswith("tensordesc")]
        module.compile_module_from_src(
            src=module.make_launcher({}, types, maps), name="__triton_launcher",
            library_dirs=module.library_dirs(), include_dirs=module.include_dirs, libraries=module.libraries,
        )  # fmt: skip


__all__ = ["begin", "launcher_beside"]
