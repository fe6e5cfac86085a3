"""Covers in which the members of several row classes compete: one order of all of them, and the mass before each.

Everything here is as large as all row classes and members, not a strip of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.runtime.masses import between, normalised, running_sums
from attndsl.selection import Compete, Normalise


def pool(x: Tensor, compete: Compete, sharing: int = 1) -> Tensor:
    """[B, Hq, R, M] with all that compete along the last dimension, head by head, row by row.

    sharing: heads that decide together, which count once: the first of each group are in one pool, and so on.
    """
    if compete is Compete.ALL:
        x = x.unflatten(1, (-1, sharing)).transpose(1, 2)
    return x.flatten(2) if compete is not Compete.ROW else x


def _apart(x: Tensor, compete: Compete, shape: Sequence[int], sharing: int = 1) -> Tensor:
    """What `pool` made one of, in its place again."""
    _, heads, rows, members = shape
    if compete is Compete.ALL:
        apart: Tensor = x.unflatten(2, (heads // sharing, rows, members)).transpose(1, 2).flatten(1, 2)
        return apart
    return x.unflatten(2, (rows, members)) if compete is Compete.HEAD else x


def normalised_together(
    score: Tensor, competing: Tensor, how: Normalise, compete: Compete, documents: Tensor | None = None
) -> Tensor:
    """A softmax is that of each row; the least and the largest score are those of all that compete. documents: as in
    `masses_around`."""
    if how is not Normalise.MINMAX:
        return normalised(score, competing, how)
    pooled, of_pool = pool(score, compete), pool(competing, compete)
    if documents is None or compete is Compete.ROW:
        return _apart(normalised(pooled, of_pool, how), compete, score.shape)
    finite, at = of_pool & (pooled > -torch.inf), pool(_of_members(documents, score), compete)
    low, high = (
        torch.where(finite, pooled, empty).scatter_reduce(-1, at, torch.where(finite, pooled, empty), f"a{name}")
        for name, empty in (("min", torch.inf), ("max", -torch.inf))
    )
    return _apart(between(pooled, finite, low.gather(-1, at), high.gather(-1, at)), compete, score.shape)


def masses_around(
    inside: Tensor, place: Tensor, score: Tensor, compete: Compete, sharing: int, documents: Tensor | None = None
) -> list[Tensor]:
    """The mass before each member, that with it, and all of it, among all that compete, in float64.

    inside: masses, 0 of what does not compete. place: int8, what is ranked first is 0, what does not compete 2.
    documents: int64 [B, R], of a packed call the document of each row class: those of one compete.
    """
    ranked = pool(score, compete, sharing)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, pool(place, compete, sharing).gather(-1, order).sort(dim=-1, stable=True).indices)
    # A sum of very many: in float32 the last would weigh nothing.
    mass = pool(inside, compete, sharing).double()
    if documents is None:
        until = running_sums(mass.gather(-1, order), -1)
        total = mass.sum(-1, keepdim=True).expand_as(mass)
    else:
        of = pool(_of_members(documents, score), compete, sharing)
        of, last = of.gather(-1, order).sort(dim=-1, stable=True)
        order = order.gather(-1, last)
        until = _sums_apart(mass.gather(-1, order), of)
        last = torch.searchsorted(of, of, right=True) - 1
        total = torch.empty_like(mass).scatter_(-1, order, until.gather(-1, last))
    after = torch.empty_like(mass).scatter_(-1, order, until)
    return [_apart(x, compete, score.shape, sharing) for x in (after - mass, after, total)]


def _of_members(documents: Tensor, score: Tensor) -> Tensor:
    """The document of each row class [B, R], for its members in each head."""
    return documents[:, None, :, None].expand(score.shape)


def _sums_apart(x: Tensor, of: Tensor) -> Tensor:
    """Running sums [..., n] of what is `of` one document each, which follow one another: by doubling, so that no sum
    holds what is of another."""
    reach = 1
    while reach < x.shape[-1]:
        same = of[..., reach:] == of[..., :-reach]
        x = x + pad(torch.where(same, x[..., :-reach], 0), (reach, 0))
        reach *= 2
    return x
