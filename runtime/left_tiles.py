"""The torch operator that finds which tiles `skip below` leaves, and the attention to these, which has gradients.

Which are left has none, as a plan has none: what is dropped is held constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

from attndsl.branches import Given
from attndsl.left_tiles import TILE, tiles_of_documents
from attndsl.runtime.call import autocasts
from attndsl.runtime.ops import attend, in_dtype, traced
from attndsl.runtime.registry import engine_of, left_key
from attndsl.runtime.transforms import mapped

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "left_tiles(str program, Tensor q, Tensor k, Tensor v, Tensor[] inputs, SymInt[] args, float? scale, str backend) "
    "-> Tensor[]"
)


def attend_left(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    backend: str, dropout: float = 0, seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse of a program that skips, by a pass that finds the tiles and one that attends to them."""
    if autocasts(q.device):
        q, k, v = in_dtype(torch.get_autocast_dtype(q.device.type), q, k, v)
    given = [*inputs, *left_tiles(key, q, k, v, inputs, args, scale, backend)]
    out, lse = attend(left_key(key), q, k, v, given, list(args), scale, backend, dropout, seed)
    assert lse is not None
    return out, lse


def left_tiles(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    """As `Engine.left_tiles`."""
    q, k, v, *inputs = (x.detach() for x in (q, k, v, *inputs))
    find = torch.ops.attndsl.left_tiles if traced((q, k, v, *inputs)) else _left_tiles
    found: list[Tensor] = find(key, q, k, v, inputs, args, scale, backend)
    return found


def _left_tiles(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    with torch.no_grad():
        return engine_of(key).left_tiles(q, k, v, inputs, args, scale, backend)


def _left_tiles_fake(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    program, rows, row_tiles = engine_of(key).program, [q.shape[2]], -(-q.shape[2] // TILE)
    if program.packed is not None:
        rows, row_tiles = [q.shape[0], *rows], tiles_of_documents(q.shape[2])
    found = [q.new_empty(rows, dtype=torch.int32)]
    for part in program.only.parts:
        keys = k.shape[2]
        if isinstance(part.view, Given) and not program.input(part.view.keys).dims[-2].apart:
            keys = part.view.entries(keys)
        size = (q.shape[0], q.shape[1], row_tiles, -(-keys // TILE))
        found.append(q.new_empty(size, dtype=torch.bool))
    return found


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("left_tiles", _left_tiles, _device)
_LIBRARY.impl("left_tiles", _left_tiles_fake, "Meta")
mapped(_LIBRARY, "left_tiles")
