"""Members that are no blocks in a row, on a device: which keys each has, what is summed, pooled or sought over them.

Keys are put in order by their member, once a call; a member's keys then lie in a row, and sums are differences of
running sums. Nothing is added atomically, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.branches import Pool as ViewPool
from attndsl.branches import PoolFunction
from attndsl.member_numbers import has_member, number, read
from attndsl.members import Members, Runs, Tiles
from attndsl.runtime.masses import running_sums
from attndsl.runtime.runs import Runs as TokenRuns
from attndsl.runtime.runs import by_kernel, pooled_runs, runs_in_order
from attndsl.runtime.values import Values
from attndsl.selection import Antidiagonal, Pool, Selection

# Masses are counted in parts of this size, of which a row's are fewer than an int64 holds.
_UNIT = 2.0**52


@dataclass(frozen=True, slots=True)
class Groups:
    """Which keys each member has, in each batch entry and head (or in all of them alike).

    label: int64 [B or 1, H or 1, Nk], the member of each key, one past the last for a key of none. order: the keys by
    their members, in each by their positions. ends: int64 [..., members + 1], where a member's keys begin in the order.
    """

    label: Tensor
    order: Tensor
    ends: Tensor

    @classmethod
    def of(cls, members: Members, count: int, values: Values, present: Tensor | None = None) -> Groups:
        """values: the scalars of a call, which holds `count` members. present: int64 [B, 1, 1, 1], how many tokens are,
        where not all are: others are of no member."""
        keys = torch.arange(values.shape.k_len, device=values.device)
        tokens = values.shape.k_len if present is None else present
        here = values.at(q=0, k=keys.view(1, 1, 1, -1), Nk=tokens)
        if isinstance(members, Runs) and members.order is not None:
            # Values are kept by the identity of their scalars, which therefore live as long.
            ids_read, place_read = read(members), read(members.order)
            label = runs_in_order(here.tensor(ids_read), here.tensor(place_read), tokens)
            label = torch.where(label >= 0, label, count)
        elif isinstance(members, Runs):
            ids = here.tensor(read(members))
            begins = pad(ids[..., 1:] != ids[..., :-1], (1, 0), value=True)
            label = torch.where(begins[..., : keys.numel()], keys, 0)
            label = label.cummax(-1).values if keys.numel() else label
        else:
            # Values are kept by the identity of their scalars, which therefore live as long.
            of_key, inside = number(members, "k"), has_member(members)
            label = here.tensor(of_key)
            exists = (label >= 0) & (label < count)
            label = torch.where(exists if inside is None else exists & here.tensor(inside), label, count)
        if present is not None:
            label = torch.where(keys < present, label, count)
        return cls.labelled(label.expand(*label.shape[:-1], keys.numel()).squeeze(2), count)

    @classmethod
    def labelled(cls, label: Tensor, count: int) -> Groups:
        ordered, order = label.to(torch.int64).sort(dim=-1, stable=True)
        every = torch.arange(count + 1, device=label.device).expand(*label.shape[:-1], -1)
        return cls(label, order, torch.searchsorted(ordered.contiguous(), every.contiguous()))

    @property
    def first(self) -> Tensor:
        """The first key of each member, 0 where it has none: [B or 1, H or 1, members]."""
        if not self.order.shape[-1]:
            return torch.zeros_like(self.ends[..., :-1])
        place = self.ends[..., :-1].clamp(max=self.order.shape[-1] - 1)
        return torch.where(self.sizes > 0, self.order.gather(-1, place), 0)

    @property
    def sizes(self) -> Tensor:
        """How many keys each member has."""
        return self.ends.diff(dim=-1)

    def any(self, inside: Tensor) -> Tensor:
        """Whether some key of each member is inside: bool [..., rows, Nk or 1] as bool [..., rows, members]."""
        if inside.shape[-1] == 1 != self.label.shape[-1]:
            return inside & (self.sizes > 0).unsqueeze(2)
        return self._summed(inside.to(torch.int32)) > 0

    def sum(self, x: Tensor) -> Tensor:
        """Masses [B, H, rows, Nk], which lie in [0, 1], summed over each member's keys: [B, H, rows, members]."""
        # As whole numbers: of floats the differences of running sums are no longer equal where sums are.
        whole = self._summed((x.to(torch.float64) * _UNIT).round().to(torch.int64))
        return (whole.to(torch.float64) / _UNIT).to(x.dtype)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of each member's keys of what is at least 0, 0 where it has none."""
        label = self.label.unsqueeze(2).expand(*x.shape)
        found = x.new_zeros(*x.shape[:-1], self.ends.shape[-1])
        return found.scatter_reduce(-1, label, x, "amax")[..., :-1]

    def pooled(self, x: Tensor, pool: Pool, key: str = "", backend: str = "auto") -> Tensor:
        """Vectors [B, G, Nk, D] pooled over each member's keys: [B, G or H, members, D], NaN where it has none.

        key: a registered program, which has the kernel that pools on a GPU; backend: as in `runs.pooled_runs`.
        """
        label, order, ends = (_of_heads(y, x.shape[1]) for y in (self.label, self.order, self.ends))
        if label.shape[1] > x.shape[1]:
            x = x.repeat_interleave(label.shape[1] // x.shape[1], 1)
        shape, count = (*x.shape[:2], -1), ends.diff(dim=-1)
        label, order, ends = (y.expand(shape).unsqueeze(-1) for y in (label, order, ends))
        wide = (-1, -1, -1, x.shape[3])
        if pool in (Pool.FIRST, Pool.LAST):
            place = ends[:, :, :-1] if pool is Pool.FIRST else ends[:, :, 1:] - 1
            token = order.gather(2, place.clamp(0, max(0, order.shape[2] - 1))) if order.shape[2] else place
            found = x.gather(2, token.expand(wide)) if order.shape[2] else x.new_zeros(*token.shape[:3], x.shape[3])
        elif key and by_kernel(x, backend) and x.dtype != torch.float64 and count.shape[2] <= x.shape[2]:
            found = _pooled_runs(key, x.gather(2, order.expand(wide)), pool, ends.squeeze(-1), backend)
        elif pool in (Pool.MAX, Pool.MIN):
            least = x.new_full((*x.shape[:2], ends.shape[2], x.shape[3]), -torch.inf)
            signed = x if pool is Pool.MAX else -x
            found = least.scatter_reduce(2, label.expand(wide), signed, "amax")[:, :, :-1]
            found = found if pool is Pool.MAX else -found
        else:
            # In float64: a difference of long sums is then accurate to float32.
            until = pad(running_sums(x.gather(2, order.expand(wide)).to(torch.float64), 2), (0, 0, 1, 0))
            found = until.gather(2, ends.expand(wide)).diff(dim=2)
            found = found / count.unsqueeze(-1) if pool is Pool.MEAN else found
        return torch.where(count.unsqueeze(-1) > 0, found, torch.nan).to(x.dtype)

    def within(self, first: Tensor, end: Tensor) -> Tensor:
        """How many of the keys from `first` to before `end`, [B or 1, H or 1, 1, Nk], are of each key's own member."""
        keys = self.label.shape[-1]
        # Keys by member and then by position, as one number that grows along the order.
        place = self.label.gather(-1, self.order) * (keys + 1) + self.order
        lead = torch.broadcast_shapes(place.shape[:2], first.shape[:2], end.shape[:2])
        place, label = (x.expand(*lead, keys).contiguous() for x in (place, self.label))
        of_own = [label * (keys + 1) + x.squeeze(2) for x in (first, end)]
        low, high = (torch.searchsorted(place, x.expand(*lead, keys).contiguous()) for x in of_own)
        return (high - low).unsqueeze(2)

    def _summed(self, x: Tensor) -> Tensor:
        """Whole numbers [B, H, rows, Nk] summed over each member's keys."""
        lead = torch.broadcast_shapes(x.shape[:2], self.order.shape[:2])
        x = x.expand(*lead, x.shape[2], self.order.shape[-1])
        order, ends = (y.unsqueeze(2).expand(*lead, x.shape[2], -1) for y in (self.order, self.ends))
        until = pad(x.gather(-1, order).cumsum(-1, dtype=x.dtype), (1, 0))
        return until.gather(-1, ends).diff(dim=-1)


def _pooled_runs(key: str, x: Tensor, pool: Pool, ends: Tensor, backend: str) -> Tensor:
    """Of vectors [B, H, Nk, D] in the order of their members those between a member's ends, [B, H, members + 1]."""
    tokens, members = x.shape[2], ends.shape[2] - 1
    # There is room for as many as there are tokens.
    first, end = (
        pad(y, (0, tokens - members), value=tokens).to(torch.int32).contiguous()
        for y in (ends[..., :-1], ends[..., 1:])
    )
    runs = TokenRuns(first, first, end)  # which of them a token is of, gradients alone ask
    return pooled_runs(key, x, ViewPool(PoolFunction(pool.value), 1, 1), runs, backend)[:, :, :members]


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """[B or 1, H or 1, n] with a head for each of so many, or its own."""
    return x if x.shape[1] > 1 else x.expand(-1, heads, -1)


def tiled_rows(tiles: Tiles, count: int, q_len: int, device: torch.device, values: Values) -> Tensor:
    """The positions of each tile's rows, int64 [count, rows that a tile of this call may have], in order and -1 after
    them."""
    label = tile_of_rows(tiles, count, torch.arange(q_len, device=device), values)
    groups = Groups.labelled(label.expand(q_len).view(1, 1, -1), count)
    place = groups.ends[0, 0, :-1, None] + torch.arange(tiles.most(q_len), device=device)
    if not q_len:
        return torch.full_like(place, -1)
    found = groups.order[0, 0, place.clamp(max=q_len - 1)]
    return torch.where(place < groups.ends[0, 0, 1:, None], found, -1)


def tile_of_rows(tiles: Tiles, count: int, position: Tensor, values: Values) -> Tensor:
    """The tile of a row at each position, of so many; `count` where it is of none."""
    here = values.at(q=position, k=position)
    # Values are kept by the identity of their scalars, which therefore live as long.
    of_row, inside = number(tiles, "q"), has_member(tiles)
    label = here.tensor(of_row)
    exists = (label >= 0) & (label < count)
    exists = exists if inside is None else exists & here.tensor(inside)
    return torch.where(exists, label, count)


def class_rows(selection: Selection, q_len: int, tiles: Tensor | None) -> int | None:
    """How many rows a class of a call with so many positions may have, tiles as `tiled_rows` has them; None: all."""
    if tiles is not None:
        return tiles.shape[1]
    # The steps of an antidiagonal are counted in rows, whether there are such or not.
    rows, counts = selection.rows, isinstance(selection.score, Antidiagonal)
    return rows if rows is None or counts else min(rows, max(1, q_len))


def along_lags(x: Tensor, position: Tensor, size: int, count: int) -> Tensor:
    """[B, H, rows, Nk] of rows at these positions, [rows] or [B, rows], by how far back their keys lie:
    [B, H, rows, count, size], 0 where there is no key."""
    keys = x.shape[3]
    if not keys:
        return x.new_zeros(*x.shape[:3], count, size)
    at = position.unsqueeze(-1) - torch.arange(count * size, device=x.device)
    if position.dim() == 2:
        at, x = at.unsqueeze(1), x.expand(len(at), -1, -1, -1)
    found = x.gather(3, at.clamp(0, keys - 1).expand(*x.shape[:3], -1))
    back: Tensor = torch.where((at >= 0) & (at < keys), found, 0).unflatten(3, (count, size))
    return back


def lag_sums(x: Tensor, first: int, size: int, count: int, largest: bool) -> Tensor:
    """[B, H, rows, Nk] of rows from position `first` on, summed (or the largest of what is at least 0) along diagonals
    of `size` lags each: [B, H, count]. Keys after their row are of none."""
    rows, keys = x.shape[2:]
    if not rows or not keys:
        return x.new_zeros(*x.shape[:2], count)
    # Each row a place further to the right, so that equal lags stand in one column.
    skewed = pad(x.flip(-1), (0, rows)).flatten(2)[..., :-rows].unflatten(-1, (rows, keys + rows - 1))
    lags = skewed.amax(2) if largest else skewed.to(torch.float64).sum(2)
    # Column c has the lag first - (keys - 1) + c; those below 0 fall off.
    begin = first - (keys - 1)
    lags = lags[..., -begin:] if begin < 0 else pad(lags, (begin, 0))
    lags = pad(lags, (0, count * size - lags.shape[-1])).unflatten(-1, (count, size))
    found: Tensor = lags.amax(-1) if largest else lags.sum(-1)
    return found.to(x.dtype)
