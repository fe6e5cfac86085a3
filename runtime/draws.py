"""What `random` draws: of the hashes of a row class's candidates the least ones, ties to the lower member."""

from __future__ import annotations

import torch
from torch import Tensor

from attndsl.runtime.values import mix64, ordered

_GREATEST = (1 << 63) - 1


def members_drawn(of_class: Tensor, candidate: Tensor, last: Tensor, count: int) -> Tensor:
    """The members drawn up to the `last`, in increasing order and -1 after them: [..., count or fewer]."""
    members = candidate.shape[-1]
    every = torch.arange(members, device=candidate.device)
    hashed = ordered(mix64(of_class, every))
    last_hash, last_member = ordered(last[..., :1]), last[..., 1:]
    drawn = candidate & ((hashed < last_hash) | ((hashed == last_hash) & (every <= last_member)))
    found = torch.where(drawn, every, members).sort(-1).values[..., : min(count, members)]
    return torch.where(found < members, found, -1)


def last_drawn(of_class: Tensor, candidate: Tensor, count: int) -> Tensor:
    """Hash and index [..., 2] of the last of `count` members drawn from bool [..., members], for the hashes of row
    classes [..., 1]."""
    members = candidate.shape[-1]
    hashed = ordered(mix64(of_class, torch.arange(members, device=candidate.device)))
    hashed, candidate = torch.broadcast_tensors(hashed, candidate)
    hashed = torch.where(candidate, hashed, _GREATEST)
    last_hash = hashed.topk(min(count, members), largest=False).values.amax(-1, keepdim=True)
    # Of several members with that hash the first ones, as many as there is room for.
    room = count - (hashed < last_hash).sum(-1, keepdim=True)
    nth = ((hashed == last_hash) & candidate).cumsum(-1)
    enough = (nth >= room).to(torch.int8).argmax(-1, keepdim=True)
    last = torch.where(nth[..., -1:] >= room, enough, members)
    return torch.cat((ordered(last_hash), last), -1)
