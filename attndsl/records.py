"""Frozen dataclasses as JSON: what is kept of a plan beside its printed kernels, and of a text beside both.

A record is a list of nodes, each after those it refers to, so expressions that share parts still do when they are read
again. Only the classes handed in are ever made; fields that do not count in comparisons (source spans) are left out,
unless a record is to be `whole`.

    node   ::= [class, field*] | ["", entry*]          the second is a tuple
    field, entry ::= null | bool | number | string | [index of a node] | [enum, member]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import ModuleType
from typing import Any


def classes_of(modules: Iterable[ModuleType]) -> dict[str, type]:
    """The dataclasses and enums that these modules define, by the name that a record has for them."""
    return {
        _name(found): found
        for module in modules
        for found in vars(module).values()
        if isinstance(found, type)
        and found.__module__ == module.__name__
        and (is_dataclass(found) or issubclass(found, Enum))
    }


def write(value: Any, left_out: Mapping[str, Iterable[str]] = {}, whole: bool = False) -> str:
    """A value as text. left_out: fields by class, which whoever reads it puts in again.

    Raises TypeError for what is neither a plain value nor a dataclass, an enum member or a tuple of such.
    """
    nodes: list[list[Any]] = []
    places: dict[int, int] = {}

    def written(x: Any) -> Any:
        if x is None or isinstance(x, bool | int | float | str):
            return x
        if isinstance(x, Enum):
            return [_name(type(x)), x.name]
        # The value lives as long as this call, so an identity is its own.
        if id(x) not in places:
            if isinstance(x, tuple):
                node = ["", *map(written, x)]
            elif is_dataclass(x) and not isinstance(x, type):
                node = [_name(type(x)), *(written(getattr(x, field)) for field in _kept(type(x), left_out, whole))]
            else:
                raise TypeError(f"a record cannot hold {type(x).__qualname__}")
            places[id(x)] = len(nodes)
            nodes.append(node)
        return [places[id(x)]]

    root = written(value)
    return json.dumps([nodes, root], separators=(",", ":"))


def read(
    text: str, classes: Mapping[str, type], put_in: Mapping[str, Mapping[str, Any]] = {}, whole: bool = False
) -> Any:
    """The value that `write` wrote. put_in: by class, the fields that were left out, and their values.

    Raises ValueError for any other text, whatever its classes make of what it gives them.
    """
    try:
        return _read(text, classes, put_in, whole)
    except (AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as reason:
        raise ValueError("this text is no record") from reason


def _read(text: str, classes: Mapping[str, type], put_in: Mapping[str, Mapping[str, Any]], whole: bool) -> Any:
    nodes, root = json.loads(text)
    made: list[Any] = []

    def known(x: Any) -> Any:
        if not isinstance(x, list):
            return x
        return made[x[0]] if len(x) == 1 else classes[x[0]][x[1]]  # type: ignore[index]

    for name, *values in nodes:
        if not name:
            made.append(tuple(map(known, values)))
            continue
        cls = classes[name]
        given = put_in.get(cls.__name__, {})
        names = _kept(cls, {cls.__name__: given}, whole)
        made.append(cls(**dict(zip(names, map(known, values), strict=True)), **given))
    return known(root)


def _name(cls: type) -> str:
    """A class's name under its module's: two modules may have a `Pool`."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def _kept(cls: Any, left_out: Mapping[str, Iterable[str]], whole: bool) -> list[str]:
    without = set(left_out.get(cls.__name__, ()))
    return [x.name for x in fields(cls) if (whole or x.compare) and x.init and x.name not in without]
