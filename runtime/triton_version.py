"""Which Triton is installed, told without importing it: a kernel from the cache needs nothing of it, and its import
takes longer than all the rest of a first call."""

from __future__ import annotations

import functools
import os
import sys
from importlib import metadata, util
from pathlib import Path

_TRUE = ("1", "true", "yes", "on", "y")


@functools.cache
def version() -> str:
    """Triton's version, such as `3.6.0`."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        import triton

        return str(triton.__version__)


@functools.cache
def installation() -> tuple[str, int, int]:
    """What tells one installation from another: its version, and the size and time of its compiler's library."""
    found = util.find_spec("triton")
    folder = Path(found.origin).parent / "_C" if found is not None and found.origin else Path()
    library = next(iter(sorted(folder.glob("libtriton*.so"))), None)
    if library is None:
        return version(), 0, 0
    status = library.stat()
    return version(), status.st_size, status.st_mtime_ns


def _interpreted() -> bool:
    if (triton := sys.modules.get("triton")) is not None:
        return bool(triton.knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


# Whether Triton interprets kernels in place of compiling them, which it decides once. A constant, since torch.compile
# cannot trace how Triton looks it up.
INTERPRETED = _interpreted()
