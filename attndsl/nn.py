"""Attention as a layer of a model: `attndsl.nn.Attention`. Importing this module imports torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from attndsl import api, wiring

if TYPE_CHECKING:
    from attndsl.wiring import AttentionModule
else:
    AttentionModule = wiring.attention_module()


class Attention(AttentionModule):
    """Multi-head attention over a pattern, with its projections.

    >>> import torch, attndsl.nn
    >>> layer = attndsl.nn.Attention("causal & window(16)", embed_dim=64, num_heads=4, num_kv_heads=2)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])

    pattern: a compiled attention, or what `attndsl.compile` takes.
    embed_dim: size of the layer's input and output. num_heads: query heads. num_kv_heads: key and value heads
    (default: as many). head_dim: size of a head (default: embed_dim / num_heads).
    bias: whether the projections add one. dropout: of the attention's weights, in training.
    device, dtype: of the parameters.

    Learnable inputs of the pattern whose sizes do not depend on the call (sink logits, bias tables, slopes) are
    parameters of the layer, in `learned`, zero at first; the others are passed to `forward`, by name.
    Raises `PatternError` for mistakes in the pattern, or heads that do not divide `embed_dim`.
    """

    def __init__(
        self,
        pattern: api.Attention | str | os.PathLike[str],
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        attend = pattern if isinstance(pattern, api.Attention) else api.compile(pattern)
        super().__init__(
            attend, embed_dim, num_heads, num_kv_heads,
            head_dim=head_dim, bias=bias, dropout=dropout, device=device, dtype=dtype,
        )  # fmt: skip


__all__ = ["Attention"]
