"""Generated source text as a module. The one place where attndsl executes text; it is always its own."""

from __future__ import annotations

import functools
import hashlib
import linecache
import os
from pathlib import Path
from types import ModuleType


@functools.lru_cache(maxsize=256)
def load_source(text: str, name: str) -> ModuleType:
    """A module made from generated text, once. Its lines show in tracebacks; with ATTNDSL_DUMP set to a
    directory, the file is written there."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    filename = f"<attndsl {name} {digest}>"
    if directory := os.environ.get("ATTNDSL_DUMP"):
        path = Path(directory) / f"{name}_{digest}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        filename = str(path)
    # Triton reads a kernel's source through linecache.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    module = ModuleType(f"attndsl_generated_{name}_{digest}")
    module.__file__ = filename
    exec(compile(text, filename, "exec"), module.__dict__)
    return module
