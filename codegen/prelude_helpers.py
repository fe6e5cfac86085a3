"""Which prelude functions a generated file needs, as text."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from importlib.resources import files


@functools.cache
def _functions(module: str) -> dict[str, str]:
    """Source text of each function of a prelude module, in the order of the file."""
    text = files("attndsl.codegen").joinpath(module).read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
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
            called = {node.id for node in ast.walk(ast.parse(functions[name])) if isinstance(node, ast.Name)}
            pending += [other for other in called if other in functions]
    return "\n\n\n".join(text for name, text in functions.items() if name in wanted)
