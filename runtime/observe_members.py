"""The torch operator of observations of any members and classes of rows, strip by strip, from q, k and a branch's lse.

It has no gradient, as that of blocks has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.observed import as_selection
from attndsl.plans import of_selection
from attndsl.program import CallShape, Program
from attndsl.properties import classes_rows_before
from attndsl.runtime.call import call_shape, check_rows
from attndsl.runtime.engine import MAX_PREPARED
from attndsl.runtime.ops import traced
from attndsl.runtime.registry import engine_of
from attndsl.runtime.select import Selector, classes_of, members_of
from attndsl.runtime.transforms import mapped
from attndsl.selection import Selection

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "observe_members(str program, str name, Tensor q, Tensor k, Tensor[] inputs, SymInt[] args, float? scale, "
    "Tensor[] keys, Tensor lse) -> Tensor"
)
_KEPT: dict[Any, Selector] = {}


def observe_members(
    key: str, name: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    keys: Sequence[Tensor], lse: Tensor,
) -> Tensor:  # fmt: skip
    """What a registered program observes under a name: [B, Hq, row classes, members], float32 (float64 for float64
    tensors). inputs: those of a call, and the plans that the branch reads. keys, lse: as `strips.State` has them."""
    q, k, lse, *inputs = (x.detach() for x in (q, k, lse, *inputs))
    keys = [x.detach() for x in keys]
    make = torch.ops.attndsl.observe_members if traced((q, k, lse, *inputs)) else _observe
    found: Tensor = make(key, name, q, k, inputs, [*args], scale, keys, lse)
    return found


def _wanted(key: str, name: str) -> tuple[Program, Selection]:
    program = engine_of(key).program
    selection = as_selection(next(each for each in program.observations if each.name == name))
    return of_selection(program, selection), selection


def _observe(
    key: str, name: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    keys: Sequence[Tensor], lse: Tensor,
) -> Tensor:  # fmt: skip
    given = tuple((x.shape, x.dtype) for x in inputs)
    kind = key, name, q.shape, k.shape, q.dtype, q.device, given
    selector = _KEPT.get(kind)
    if selector is None:
        program, selection = _wanted(key, name)
        shape = call_shape(q, k, k)
        if selection.rows != 1:
            check_rows(program, shape, classes_rows_before)
        if len(_KEPT) >= MAX_PREPARED:
            _KEPT.clear()
        like = [torch.empty_like(x, device="meta") for x in inputs]
        selector = _KEPT[kind] = Selector(program, selection, shape, q.device, like)
    with torch.no_grad():
        return selector.scores(q, k, inputs, args, scale, (keys, lse))


def _fake(
    key: str, name: str, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    keys: Sequence[Tensor], lse: Tensor,
) -> Tensor:  # fmt: skip
    program, selection = _wanted(key, name)
    shape: CallShape = call_shape(q, k, k)
    rows, members = classes_of(program, selection, shape), members_of(program, selection, shape)
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(shape.batch, shape.heads, rows, members, dtype=real)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("observe_members", _observe, _device)
_LIBRARY.impl("observe_members", _fake, "Meta")
mapped(_LIBRARY, "observe_members")
