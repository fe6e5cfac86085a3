"""Texts read before: the program of a text, and what it warns of, kept beside the kernels that a GPU ran for it.

Reading a text (the parser's tables, the integer sets that warnings ask) took two thirds of a start from the cache. An
entry is a record of the compiler's own classes (`attndsl/records.py`), under a key of the text, its parameters and the
compiler's sources. Only texts whose kernels are kept are: programs that no GPU runs leave nothing on disk.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import attndsl
from attndsl import records
from attndsl.diagnostics import Diagnostic, Source
from attndsl.program import Program
from attndsl.runtime.cache import cache_key, shared_cache

Read = tuple[Program, tuple[Diagnostic, ...]]
_RECORD = "program.json"


@functools.cache
def compiler_digest() -> str:
    """Digest of the sources that programs, plans and texts of kernels come from: another version makes them anew."""
    package = Path(attndsl.__file__).parent
    digest = hashlib.sha256()
    for folder in (package, package / "codegen", package / "grammar"):
        with os.scandir(folder) as found:
            names = sorted(x.name for x in found if x.name.endswith((".py", ".attn", ".lark", ".json")))
        for name in names:
            with open(f"{folder}/{name}", "rb", buffering=0) as file:
                content = file.read()
            digest.update(f"{folder.name}/{name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def find(source: Source, select: str | None, params: Mapping[str, object]) -> Read | None:
    """What was found of a text before, None unless it was kept. select: which of its programs."""
    if not shared_cache().exists() or (key := _key(source, select, params)) is None:
        return None
    entry = shared_cache().find(key)
    if entry is None or _RECORD not in entry:
        return None
    try:
        found = records.read(entry[_RECORD].decode(), _recorded(), whole=True)
    except ValueError:
        return None
    match found:
        case (Program() as program, tuple() as warnings) if all(isinstance(x, Diagnostic) for x in warnings):
            return program, warnings
        case _:
            return None


def keep(source: Source, select: str | None, params: Mapping[str, object], found: Read) -> None:
    """Keep what was found of a text, unless its parameters are no plain values."""
    if (key := _key(source, select, params)) is not None:
        with suppress(TypeError):
            record = records.write(found, whole=True).encode()
            shared_cache().fetch(key, lambda: {_RECORD: record})


def _key(source: Source, select: str | None, params: Mapping[str, object]) -> str | None:
    with suppress(TypeError):
        return cache_key("text", compiler_digest(), source.name, source.text, select, params)
    return None


@functools.cache
def _recorded() -> Mapping[str, type]:
    """The classes of programs and warnings: those of the core, whichever of its modules they stand in."""
    prefix = f"{attndsl.__name__}."
    core = [name for name in list(sys.modules) if name.startswith(prefix) and "." not in name.removeprefix(prefix)]
    return records.classes_of(sys.modules[name] for name in core)
