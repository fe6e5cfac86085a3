"""Which prelude functions a generated file needs, as text."""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Helper:
    """A prelude function: its text, and the names it reads."""

    text: str
    names: frozenset[str]


_READ: dict[str, dict[str, Helper]] = {}
# Two threads that parse at once disturb each other in CPython 3.11 ("AST constructor recursion depth mismatch").
_READING = threading.Lock()


def _functions(module: str) -> dict[str, Helper]:
    """Each function of a prelude module, in the order of the file."""
    with _READING:
        if module not in _READ:
            text = files("attndsl.codegen").joinpath(module).read_text(encoding="utf-8")
            lines = text.splitlines()
            _READ[module] = {
                node.name: Helper(
                    "\n".join(
                        lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno]
                    ),
                    frozenset(x.id for x in ast.walk(node) if isinstance(x, ast.Name)),
                )
                for node in ast.parse(text).body
                if isinstance(node, ast.FunctionDef)
            }
        return _READ[module]


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
