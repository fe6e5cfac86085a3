"""The torch operator of selections: how making plans takes part in torch.compile, export and CUDA graphs.

A plan has no gradient: that of an attention holds what was chosen constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.program import CallShape
from attndsl.runtime.call import call_shape, check_inputs, check_tables
from attndsl.runtime.engine import Engine
from attndsl.runtime.ops import checked_values, traced
from attndsl.runtime.registry import engine_of
from attndsl.runtime.select import Selector, empty_plan

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define("select(str program, Tensor q, Tensor k, Tensor[] inputs, SymInt[] args, float? scale) -> Tensor[]")
# Kinds of calls whose selectors are kept.
MAX_KEPT = 256
_KEPT: dict[Any, list[Selector]] = {}


def select(
    key: str, q: Tensor, k: Tensor, inputs: list[Tensor], args: list[int], scale: float | None
) -> dict[str, Tensor]:
    """The plan of each of a program's selections, by its name."""
    program = engine_of(key).program
    checked_values(key, inputs, args)
    make = torch.ops.attndsl.select if traced((q, k, *inputs)) else _select
    plans: Sequence[Tensor] = make(key, q.detach(), k.detach(), [x.detach() for x in inputs], args, scale)
    return dict(zip((selection.name for selection in program.selections), plans, strict=True))


def _select(
    key: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
) -> list[Tensor]:
    found = _selectors(key, q, k, inputs)
    with torch.no_grad():
        return [selector(q, k, inputs, args, scale) for selector in found]


def _selectors(key: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor]) -> list[Selector]:
    """The selectors of a kind of call. Raises `PatternError` when it does not fit the program."""
    engine = engine_of(key)
    kind = (key, q.shape, k.shape, q.dtype, k.dtype, q.device, k.device, *((x.shape, x.dtype) for x in inputs))
    found = _KEPT.get(kind)
    if found is None:
        shape = _checked(engine, q, k, inputs)
        found = [Selector(engine.program, each, shape, q.device) for each in engine.program.selections]
        if len(_KEPT) >= MAX_KEPT:
            _KEPT.clear()
        _KEPT[kind] = found
    return found


def _checked(engine: Engine, q: Tensor, k: Tensor, inputs: Sequence[Tensor]) -> CallShape:
    shape = call_shape(q, k, k)
    check_tables(engine.program, shape)
    check_inputs(engine.program, shape, inputs, q.device)
    return shape


def _select_fake(
    key: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
) -> list[Tensor]:
    program, shape = engine_of(key).program, call_shape(q, k, k)
    return [empty_plan(program, each, shape, q.device) for each in program.selections]


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("select", _select, _device)
_LIBRARY.impl("select", _select_fake, "Meta")
