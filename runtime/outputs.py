"""Room for what a call returns: outputs, lse and gradients, in the memory order of the tensors that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attndsl.program import CallShape


def in_order_of(q: Tensor, x: Tensor) -> Tensor:
    """x [B, H, N, D] dense, in the memory order of q: heads inside tokens where q has them so. No copy if it is."""
    if q.stride(1) < q.stride(2):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


def empty_gradient(x: Tensor) -> Tensor:
    """Uninitialised gradient of x [B, H, N, D], dense, in the memory order of x."""
    return x.new_empty_strided(x.shape, _dense(x.shape, x.stride(1) < x.stride(2)))


def _dense(sizes: Sequence[int], inside: bool) -> tuple[int, ...]:
    """Strides of [B, H, N, D] without gaps, with heads inside tokens or tokens inside heads."""
    _, heads, tokens, dim = sizes
    steps = (dim, heads * dim) if inside else (tokens * dim, dim)
    return (heads * tokens * dim, *steps, 1)


def empty_output(q: Tensor, shape: CallShape) -> tuple[Tensor, Tensor]:
    """Uninitialised output in the memory order of q (heads inside tokens where q has them so), and lse."""
    made = Outputs.of(q, shape)
    return made.out(q), made.lse(q)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What calls of one kind return, as `empty_output` makes it of their q."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    rows: tuple[int, ...]
    row_strides: tuple[int, ...]
    lse_dtype: torch.dtype

    @staticmethod
    def of(q: Tensor, shape: CallShape) -> Outputs:
        """What a call of these sizes returns."""
        batch, heads, rows, _ = sizes = (shape.batch, shape.heads, shape.rows, shape.v_dim)
        strides = _dense(sizes, q.stride(1) < q.stride(2))
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return Outputs(sizes, strides, (batch, heads, rows), (heads * rows, rows, 1), dtype)

    def out(self, q: Tensor) -> Tensor:
        """The output [B, Hq, Nq, Dv]."""
        # With strides: `empty` takes three times as long to read its arguments.
        return q.new_empty_strided(self.sizes, self.strides)

    def lse(self, q: Tensor) -> Tensor:
        """lse [B, Hq, Nq]."""
        return torch.empty_strided(self.rows, self.row_strides, dtype=self.lse_dtype, device=q.device)


__all__ = ["Outputs", "empty_gradient", "empty_output", "in_order_of"]
