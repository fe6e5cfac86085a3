"""Attention as a layer: projections around a compiled pattern."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attndsl.diagnostics import error
from attndsl.program import Axis, InputDecl, Program
from attndsl.runtime.dropout import check_rate


class Attend(Protocol):
    """A compiled attention."""

    program: Program

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any: ...


class AttentionModule(nn.Module):
    """Multi-head attention of a compiled pattern. `attndsl.nn.Attention` is the public class; see there."""

    def __init__(
        self,
        attend: Attend,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        key_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or key_heads < 1 or num_heads % key_heads:
            raise error(
                "A527", f"{num_heads} heads are no multiple of {key_heads} key heads", help="at least one of each"
            )
        if head_dim is None and embed_dim % num_heads:
            raise error(
                "A527", f"{embed_dim} dimensions do not divide into {num_heads} heads", help="pass `head_dim` as well"
            )
        self.attend = attend
        # Not 0.0: for torch.compile that would be a value that changes.
        self.dropout: float = check_rate(dropout) or 0
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, self.num_heads * self.head_dim, **made)
        self.k_proj = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, **made)
        self.v_proj = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, **made)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, embed_dim, **made)
        sizes = {decl.name: self._size(decl) for decl in attend.program.inputs if decl.learnable}
        # Small next to everything else, and read in float32 anyway.
        self.learned = nn.ParameterDict(
            {name: torch.zeros(size, device=device) for name, size in sizes.items() if size is not None}
        )

    def _size(self, decl: InputDecl) -> list[int] | None:
        """Sizes of a learnable input, None where they depend on the call."""
        known = {
            Axis.H: self.num_heads, Axis.G: self.num_kv_heads, Axis.D: self.head_dim, Axis.DV: self.head_dim
        }  # fmt: skip
        sizes = [dim.size if dim.axis is Axis.CONST else known.get(dim.axis) for dim in decl.dims]
        return [size for size in sizes if size is not None] if None not in sizes else None

    def forward(self, x: Tensor, context: Tensor | None = None, **inputs: Any) -> Tensor:
        """Attend from x [batch, rows, embed_dim] to context [batch, keys, embed_dim] (default: x itself).

        inputs: the pattern's inputs and runtime arguments, by name; those in `learned` may be left out. Options of the
        call, such as `seed`, may be among them.
        Returns [batch, rows, embed_dim].
        """
        context = x if context is None else context
        for name, tokens in (("x", x), ("context", context)):
            if tokens.dim() != 3:
                what = f"{name} must have 3 dimensions [batch, tokens, embed_dim], not {list(tokens.shape)}"
                raise error("A501", what, help="a batch of one is x[None]")
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(context).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(context).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        given = {**dict(self.learned.items()), **inputs}
        if self.training and self.dropout:
            given.setdefault("dropout", self.dropout)
        out: Tensor = self.out_proj(self.attend(q, k, v, **given).transpose(1, 2).flatten(2))
        return out

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{self.attend.program.name}, {heads}"
