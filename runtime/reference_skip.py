"""The oracle of `skip below t`: which pairs are left, tile after tile."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE = 64


def left_by_skipping(logits: Tensor, present: Tensor, below: float) -> Tensor:
    """The pairs of tiles that are not dropped, bool [B, Hq, rows, keys] as `present` and `logits` are.

    Of each head, TILE rows of the call go over tiles of TILE keys in order. A tile is dropped iff for every row its
    largest logit, less the largest of the tiles before it, is below ln(below); a row that sees nothing in it agrees.
    """
    logits = torch.where(present, logits.detach(), -torch.inf)
    left = torch.ones_like(present)
    for low in range(0, logits.shape[2], TILE):
        rows = slice(low, low + TILE)
        most = logits.new_full(logits[:, :, rows].shape[:3], -torch.inf)
        for first in range(0, logits.shape[3], TILE):
            keys = slice(first, first + TILE)
            found = logits[:, :, rows, keys].amax(-1)
            quiet = (found == -torch.inf) | (found < most + math.log(below))
            left[:, :, rows, keys] = ~quiet.all(-1)[..., None, None]
            most = torch.maximum(most, found)
    return left
