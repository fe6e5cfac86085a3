"""Reads pattern files, with a diagnostic for everything that can be wrong with a file."""

from __future__ import annotations

import os
from pathlib import Path

from attndsl.diagnostics import PatternError, Source, error

MAX_BYTES = 1_000_000


def read_source(path: str | os.PathLike[str]) -> Source:
    """The text of a pattern file.

    Parameters: path, of a UTF-8 file of at most 1 MB.
    Raises: `PatternError` (A001) if it cannot be read.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise error("A001", f"`{path}` is a directory", help="name a file ending in .attn")
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as missing:
        raise error(
            "A001", f"there is no file `{path}`", help="check the path, relative to the current directory"
        ) from missing
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error("A001", f"cannot read `{path}`: {reason}", help="check the file's permissions") from problem
    if len(data) > MAX_BYTES:
        raise too_long(str(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise error("A001", f"`{path}` is not UTF-8 text (line {line})", help="save the file as UTF-8") from problem
    return Source(str(path), text)


def too_long(name: str) -> PatternError:
    return error(
        "A003",
        f"`{name}` is larger than {MAX_BYTES // 1_000_000} MB",
        help="a pattern is a page at most: split the file",
    )
