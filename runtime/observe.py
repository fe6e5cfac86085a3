"""The torch operator of observations: sums and maxima of a branch's probabilities, from q, k and its lse.

It has no gradient: what is observed feeds policies, and is a target to train towards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

from attndsl.observation import classes
from attndsl.observing import Cells
from attndsl.runtime.ops import traced
from attndsl.runtime.registry import engine_of
from attndsl.runtime.transforms import mapped

_LIBRARY = Library("attndsl", "FRAGMENT")
# rows: those of a class, 0 for all; keys: those of a member.
_LIBRARY.define(
    "observe(str program, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor[] inputs, SymInt[] args, float? scale, "
    "str backend, int rows, int keys, bool largest) -> Tensor"
)


def observe(
    key: str, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, backend: str, wanted: Cells,
) -> Tensor:  # fmt: skip
    """[B, Hq, row classes, members] of the branch that a key names, which found this lse: float [B, Hq, rows]."""
    q, k, v, lse, *inputs = (x.detach() for x in (q, k, v, lse, *inputs))
    make = torch.ops.attndsl.observe if traced((q, k, v, lse, *inputs)) else _observe
    found: Tensor = make(key, q, k, v, lse, inputs, args, scale, backend, wanted.rows or 0, wanted.keys, wanted.largest)
    return found


def _observe(
    key: str, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, backend: str, rows: int, keys: int, largest: bool,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        wanted = Cells(rows or None, keys, largest)
        return engine_of(key).observe(q, k, v, lse, inputs, args, scale, backend, wanted)


def _observe_fake(
    key: str, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
    scale: float | None, backend: str, rows: int, keys: int, largest: bool,
) -> Tensor:  # fmt: skip
    q_len = q.shape[2] if engine_of(key).program.align_start else k.shape[2]
    # Members of documents lie one document after the other, with room for as many as there are tokens.
    members = k.shape[2] if engine_of(key).program.packed is not None else -(-k.shape[2] // keys)
    row_classes = classes(rows or None, q.shape[2], q_len)
    return lse.new_empty(q.shape[0], q.shape[1], row_classes, members)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("observe", _observe, _device)
_LIBRARY.impl("observe", _observe_fake, "Meta")
mapped(_LIBRARY, "observe")
