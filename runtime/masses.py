"""Steps of a selection on whole tensors: pool the vectors of members, make masses of scores."""

from __future__ import annotations

from fractions import Fraction
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.program import Axis, InputDecl
from attndsl.selection import Normalise, Pool


def pooled(x: Tensor, here: Tensor, pool: Pool | None) -> Tensor:
    """x [B, H, n, tokens, D] as [B, H, n, D], of the tokens that are there (bool [B or 1, n or 1, tokens])."""
    if pool is None:
        return x[..., 0, :]
    count = here.sum(-1)[:, None, :, None]
    present = here[:, None, :, :, None]
    match pool:
        case Pool.MEAN:
            return torch.where(present, x, 0).sum(3) / count
        case Pool.SUM:
            found = torch.where(present, x, 0).sum(3)
        case Pool.MAX:
            found = torch.where(present, x, -torch.inf).amax(3)
        case Pool.MIN:
            found = torch.where(present, x, torch.inf).amin(3)
        case Pool.FIRST | Pool.LAST:
            place = torch.arange(here.shape[-1], device=here.device)
            at = torch.where(here, place, here.shape[-1] if pool is Pool.FIRST else -1)
            at = at.amin(-1) if pool is Pool.FIRST else at.amax(-1)
            at = at.clamp(0, here.shape[-1] - 1)[:, None, :, None, None]
            found = x.gather(3, at.expand(*x.shape[:3], 1, x.shape[4])).squeeze(3)
        case _:
            assert_never(pool)
    return torch.where(count > 0, found, torch.nan)


def floor_share(share: float, count: Tensor) -> Tensor:
    """floor(share * count), of the decimal as written."""
    exact = Fraction(repr(share))
    if exact.denominator < 1 << 31:
        return count * exact.numerator // exact.denominator
    return torch.floor(count.to(torch.float64) * share).to(torch.int64)


def running_sums(x: Tensor, dim: int) -> Tensor:
    """Sums up to each place along a dimension, in an order that depends on nothing but its length.

    On a GPU torch adds up floats in the order in which blocks of threads end, and refuses to where one order is asked.
    """
    if x.device.type == "cpu" or not x.is_floating_point():
        return x.cumsum(dim)
    return sums_in_blocks(x.movedim(dim, -1)).movedim(-1, dim)


def sums_in_blocks(x: Tensor, size: int = 32) -> Tensor:
    """Running sums [..., n]: of blocks, each by doubling, and of what stands before a block."""
    n = x.shape[-1]
    blocks = pad(x, (0, -n % size)).unflatten(-1, (-1, size))
    reach = 1
    while reach < size:
        blocks = blocks + pad(blocks[..., :-reach], (reach, 0))
        reach *= 2
    if n > size:
        blocks = blocks + pad(sums_in_blocks(blocks[..., -1], size)[..., :-1], (1, 0)).unsqueeze(-1)
    sums: Tensor = blocks.flatten(-2)[..., :n]
    return sums


def softmax(logits: Tensor, present: Tensor) -> Tensor:
    """Masses of what is present, 0 elsewhere, along the last dimension."""
    logits = torch.where(present, logits, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    mass = torch.exp(logits - torch.where(top == -torch.inf, 0, top))
    total = mass.sum(-1, keepdim=True)
    masses: Tensor = mass / torch.where(total == 0, 1, total)
    return masses


def normalised(score: Tensor, competing: Tensor, how: Normalise) -> Tensor:
    match how:
        case Normalise.NONE:
            return score
        case Normalise.SOFTMAX:
            return softmax(score, competing)
        case Normalise.MINMAX:
            finite = competing & (score > -torch.inf)
            low = torch.where(finite, score, torch.inf).amin(-1, keepdim=True)
            high = torch.where(finite, score, -torch.inf).amax(-1, keepdim=True)
            return between(score, finite, low, high)
        case _:
            assert_never(how)


def between(score: Tensor, finite: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where finite scores lie between the least and the largest, from 0 to 1, or 1 where these are equal; else 0."""
    apart = high > low
    at = (score - low) / torch.where(apart, high - low, 1)
    return torch.where(finite, torch.where(apart, at, 1), 0)


def leading(decl: InputDecl, x: Tensor) -> Tensor:
    """An input of vectors as [B or 1, H or G or 1, tokens, D]."""
    axes = [dim.axis for dim in decl.dims]
    if Axis.H not in axes and Axis.G not in axes:
        x = x.unsqueeze(-3)
    return x if Axis.B in axes else x.unsqueeze(0)


def pooled_members(x: Tensor, size: int, pool: Pool, real: torch.dtype, present: Tensor | None = None) -> Tensor:
    """Vectors [B, H, tokens, D] pooled over members of `size` tokens, the last of what there is: [B, H, members, D].

    present: int64 [B, 1, 1, 1], how many tokens of a batch entry are, where not all are; NaN for members without.
    """
    if present is not None:
        whole = pad(x.to(real), (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
        here = torch.arange(whole.shape[2] * size, device=x.device).view(1, -1, size) < present.view(-1, 1, 1)
        return pooled(whole.expand(len(here), -1, -1, -1, -1), here, pool)
    whole = x.shape[2] // size * size
    found = [_pooled(x[:, :, :whole].unflatten(2, (-1, size)), pool, real)]
    if whole < x.shape[2]:
        found.append(_pooled(x[:, :, None, whole:], pool, real))
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _pooled(x: Tensor, pool: Pool, real: torch.dtype) -> Tensor:
    """x [B, H, members, tokens, D] over its tokens. Sums are of numbers widened one by one, not of a widened copy."""
    match pool:
        case Pool.MEAN:
            return x.mean(3, dtype=real)
        case Pool.SUM:
            return x.sum(3, dtype=real)
        case Pool.MAX:
            return x.amax(3).to(real) if x.shape[2] else x[..., 0, :].to(real)
        case Pool.MIN:
            return x.amin(3).to(real) if x.shape[2] else x[..., 0, :].to(real)
        case Pool.FIRST:
            return x[..., 0, :].to(real)
        case Pool.LAST:
            return x[..., -1, :].to(real)
        case _:
            assert_never(pool)


def shares_of_documents(
    x: Tensor, begins: Tensor, tokens: Tensor, start: Tensor, size: int, stride: int, keys: int, largest: bool
) -> Tensor:
    """As `shares`, of entries that begin anew with each document and of blocks that its first token begins. Of a block
    int64, where it begins in its document, how many tokens this has and its first entry; these broadcast together."""
    begins, tokens, start = torch.broadcast_tensors(begins, tokens, start)
    found = x.new_zeros(*x.shape[:2], *start.shape[2:])
    if not x.shape[3]:
        return found
    # Entries that lie in a member are few and in a row: the i-th of each, one after another.
    order = torch.div(start - size, stride, rounding_mode="floor").add(1).clamp(min=0)
    for i in range(-(-(keys + size - 1) // stride)):
        first = (order + i) * stride
        end = torch.minimum(first + size, tokens)
        inside = (torch.minimum(end, start + keys) - torch.maximum(first, start)).clamp(min=0)
        share = inside.to(x.dtype) / (end - first).clamp(min=1)
        at = (begins + order + i).clamp(max=x.shape[3] - 1).expand(found.shape)
        given = x.gather(3, at) * share
        found = torch.maximum(found, given) if largest else found + given
    return found


def shares(
    x: Tensor, size: int, stride: int, keys: int, k_len: int, largest: bool, lengths: Tensor | None = None
) -> Tensor:
    """Masses [B, H, rows, n] of the entries [stride j, stride j + size) as those [B, H, rows, members] of blocks of
    `keys` tokens: an entry gives each the share of its present tokens inside it. `largest`: the most, not the sum.

    lengths: int64 [B, 1, 1, 1] where sequences have their own, of which k_len is the most that one may have."""
    members = -(-k_len // keys)
    first = torch.arange(x.shape[3], device=x.device)[:, None] * stride
    end = (first + size).clamp(max=k_len) if lengths is None else torch.minimum(first + size, lengths)
    start = torch.arange(members, device=x.device) * keys
    inside = (torch.minimum(end, start + keys) - torch.maximum(first, start)).clamp(min=0)
    # Entries past a sequence's own have no tokens.
    share = inside.to(x.dtype) / (end - first).clamp(min=1)
    if not largest:
        given: Tensor = x @ share
        return given
    found = x.new_zeros(*x.shape[:3], members)
    if not x.shape[3]:
        return found
    # Entries that lie in a member are few and in a row: the i-th of each, one after another.
    order = (inside > 0).to(torch.int8).argmax(-2, keepdim=True)
    for i in range(-(-keys // stride) + -(-size // stride)):
        nth = (order + i).clamp(max=x.shape[3] - 1)
        found = torch.maximum(found, x.gather(3, nth.expand(found.shape)) * share.gather(-2, nth))
    return found
