"""Strips of coordinates in whole blocks, or parts of one, and sums over the blocks of what is found in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

Piece = tuple[int, int]


def pieces(low: int, high: int, block: int, size: int) -> Iterator[Piece]:
    """The coordinates from `low`, a block's first, to `high` in pieces: several whole blocks, or part of one."""
    step = size // block * block
    while low < high:
        end = low + step if step else min(low + size, (low // block + 1) * block)
        yield low, min(end, high)
        low = end


def gathered(
    pieces: Iterator[Piece] | list[Piece], block: int, length: int, count: Callable[[int, int], Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks, and the sum of what is counted in their pieces."""
    total: Tensor | None = None
    for low, high in pieces:
        found = count(low, high)
        total = found if total is None else total + found
        if high % block == 0 or high == length:
            yield slice(low // block, -(-high // block)), total
            total = None


def block_sums(inside: Tensor, block_q: int, block_k: int) -> Tensor:
    """How many pairs of each block pair are true, int64; a piece smaller than a block counts as one block."""
    rows, keys = inside.shape[-2:]
    if block_q == block_k == 1:
        return inside.to(torch.int64)
    block_q, block_k = min(block_q, rows), min(block_k, keys)
    inside = pad(inside, (0, -keys % block_k, 0, -rows % block_q))
    # Along the dense dimension first, in the narrowest type that holds a block.
    of_rows: Tensor = inside.unflatten(2, (-1, block_q)).sum(3, dtype=torch.int32)
    of_blocks: Tensor = of_rows.unflatten(3, (-1, block_k)).sum(4)
    return of_blocks
