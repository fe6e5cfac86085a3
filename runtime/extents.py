"""The least and the largest of what an input holds of the tokens of a view's extents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attndsl.derivation import Extents


def of_extents(x: Tensor, wanted: Extents, k_len: int, size: Sequence[int]) -> Tensor:
    """x [..., tokens], or of dimensions that broadcast, as [..., entries] of this size. A token that is not present has
    the data of the last."""
    x = x.expand(*size[:-1], k_len)
    first = torch.arange(0, k_len, wanted.stride, device=x.device)
    at = (first[:, None] + torch.arange(wanted.size, device=x.device)).clamp(max=max(k_len - 1, 0))
    of_tokens = x[..., at] if k_len else x.new_zeros(*x.shape[:-1], 0, wanted.size)
    if x.dtype == torch.bool:
        return of_tokens.any(-1) if wanted.largest else of_tokens.all(-1)
    found = of_tokens.amax(-1) if wanted.largest else of_tokens.amin(-1)
    return found.to(torch.int64)
