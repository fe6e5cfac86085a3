"""Rows as flash-attn-4 takes those that are no window: a rule in its own language, and the blocks where it holds.

Imported where flash-attn-4 is installed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass  # type: ignore[import-not-found]
import torch
from cutlass import cute
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # type: ignore[import-not-found]
from flash_attn.cute.utils import scalar_to_ssa  # type: ignore[import-not-found]
from torch import Tensor

from benchmarks.rows import Inputs, Row, Sizes

# Rows and keys of its tiles at D = 128 on Hopper, which blocks have to match.
BLOCK = 128


def sink_window(_sizes: Sizes) -> Any:
    @cute.jit  # type: ignore[untyped-decorator, unused-ignore]
    def rule(b, h, q, k, _lengths, _tensors):  # type: ignore[no-untyped-def]
        sinks, span = scalar_to_ssa(64, cutlass.Int32), scalar_to_ssa(1024, cutlass.Int32)
        return (k <= q) & ((q - k < span) | (k < sinks))

    return rule


def prefix(_sizes: Sizes) -> Any:
    @cute.jit  # type: ignore[untyped-decorator, unused-ignore]
    def rule(b, h, q, k, _lengths, _tensors):  # type: ignore[no-untyped-def]
        return (k <= q) | (k < scalar_to_ssa(4096, cutlass.Int32))

    return rule


def block_diffusion(sizes: Sizes) -> Any:
    half_tokens, half_blocks = sizes.n // 2, sizes.n // 64

    @cute.jit  # type: ignore[untyped-decorator, unused-ignore]
    def rule(b, h, q, k, _lengths, _tensors):  # type: ignore[no-untyped-def]
        size, half = scalar_to_ssa(32, cutlass.Int32), scalar_to_ssa(half_tokens, cutlass.Int32)
        q_block, k_block = q // size, k // size
        before = (k_block < q_block + scalar_to_ssa(half_blocks, cutlass.Int32)) & (q < half) & (k >= half)
        return (q_block == k_block) | before | ((k_block <= q_block) & (k >= half))

    return rule


RULES: dict[str, Callable[[Sizes], Any]] = {
    "sink_window": sink_window,
    "prefix": prefix,
    "block_diffusion": block_diffusion,
}


def blocks(row: Row, sizes: Sizes, inputs: Inputs) -> Any:
    """The blocks of a row in which its rule holds somewhere, and everywhere, as lists [1, 1, rows of blocks, …]."""
    rule, n, device = row.rule(sizes, inputs), sizes.n, sizes.device
    zero, tokens = torch.zeros((), dtype=torch.int64, device=device), torch.arange(n, device=device)
    some, whole = [], []
    for first in range(0, n, BLOCK):
        allowed = rule(zero, zero, tokens[first : first + BLOCK, None], tokens).view(-1, n // BLOCK, BLOCK)
        some.append(allowed.any(-1).any(0))
        whole.append(allowed.all(-1).all(0))
    full = torch.stack(whole)
    partial = torch.stack(some) & ~full
    return BlockSparseTensorsTorch(*_listed(partial), *_listed(full), block_size=(BLOCK, BLOCK))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row [M, N] are chosen, and which: they come first."""
    order = torch.sort(chosen.int(), dim=-1, descending=True, stable=True).indices
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()
