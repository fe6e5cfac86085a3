"""Covers in which the members of several row classes compete: one order of all of them, and the mass before each.

Everything here is as large as all row classes and members, not a strip of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attndsl.runtime.masses import normalised, running_sums
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


def normalised_together(score: Tensor, competing: Tensor, how: Normalise, compete: Compete) -> Tensor:
    """A softmax is that of each row; the least and the largest score are those of all that compete."""
    if how is not Normalise.MINMAX:
        return normalised(score, competing, how)
    return _apart(normalised(pool(score, compete), pool(competing, compete), how), compete, score.shape)


def masses_around(inside: Tensor, place: Tensor, score: Tensor, compete: Compete, sharing: int) -> list[Tensor]:
    """The mass before each member, that with it, and all of it, among all that compete, in float64.

    inside: masses, 0 of what does not compete. place: int8, what is ranked first is 0, what does not compete 2.
    """
    ranked = pool(score, compete, sharing)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, pool(place, compete, sharing).gather(-1, order).sort(dim=-1, stable=True).indices)
    # A sum of very many: in float32 the last would weigh nothing.
    mass = pool(inside, compete, sharing).double()
    after = torch.empty_like(mass).scatter_(-1, order, running_sums(mass.gather(-1, order), -1))
    total = mass.sum(-1, keepdim=True).expand_as(mass)
    return [_apart(x, compete, score.shape, sharing) for x in (after - mass, after, total)]
