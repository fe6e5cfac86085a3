"""Which prelude functions a generated file needs, as text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# What is no name: texts, comments, and what stands behind a dot.
_NO_NAME = re.compile(r'"""(?:.|\n)*?"""|"[^"\n]*"|#.*|\.\w+')
_FUNCTION = re.compile(r"^def (\w+)", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Helper:
    """A prelude function: its text, and the names it reads."""

    text: str
    names: frozenset[str]


@cache
def _functions(module: str) -> dict[str, Helper]:
    """Each function of a prelude module, in the order of the file.

    Two empty lines stand between them. Python's parser would take ten times as long, and every first call waits; a test
    holds what is read here against it.
    """
    found = {}
    for block in files("attndsl.codegen").joinpath(module).read_text(encoding="utf-8").split("\n\n\n"):
        if block.startswith(("@", "def ")) and (function := _FUNCTION.search(block)) is not None:
            found[function[1]] = Helper(block.rstrip(), frozenset(_NAME.findall(_NO_NAME.sub("", block))))
    return found


def prelude(module: str, needed: Iterable[str]) -> str:
    """The needed functions and those they call, in the order of the prelude's file."""
    functions = _functions(module)
    wanted: set[str] = set()
    pending = [name for name in needed if name in functions]
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            pending += [other for other in functions[name].names if other in functions]
    return "\n\n\n".join(helper.text for name, helper in functions.items() if name in wanted)
