"""Plans: which members are chosen for each row class, as tensors that a call is given or makes.

A plan is int32 or int64 [..., C], members in increasing order and -1 after them, or uint8 [..., M], with an entry for
every member. What a call hands in is never trusted: an entry that is no member, or not above all before it, is skipped.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.derivation import Gathering, TileList
from attndsl.program import Axis, CallShape, Dim, InputDecl, reads
from attndsl.runtime.values import Values
from attndsl.tiles import LIST_HEAD, Run


def listed_members(plan: Tensor, members: int) -> Tensor:
    """bool [..., C]: which entries of a plan that lists members count."""
    if plan.shape[-1] == 0:
        return plan >= 0
    before = pad(plan.cummax(-1).values[..., :-1], (1, 0), value=-1)
    return (plan > before) & (plan >= 0) & (plan < members)


def chosen_members(plan: Tensor, members: int) -> Tensor:
    """bool [..., members]: which members a plan of either form chooses."""
    if plan.dtype == torch.uint8:
        return (plan != 0).expand(*plan.shape[:-1], members).contiguous()
    counts = listed_members(plan, members)
    # What does not count goes to a place of its own, which is dropped.
    found = torch.zeros(*plan.shape[:-1], members + 1, dtype=torch.bool, device=plan.device)
    place = torch.where(counts, plan, members).to(torch.int64)
    return found.scatter_(-1, place, True)[..., :members].contiguous()


def chosen_entries(plan: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """Members [..., C] that a plan of either form lists, and which of them count."""
    if plan.dtype == torch.uint8:
        return torch.arange(members, device=plan.device).expand(*plan.shape[:-1], members), chosen_members(
            plan, members
        )
    return plan, listed_members(plan, members)


def list_size(
    d: TileList | Gathering, decl: InputDecl, plan: Tensor, dims: Sequence[Dim], shape: CallShape
) -> list[int]:
    """Sizes of a derived list: in batch and heads the plan's own, unless its tiles differ there."""
    ends = [e for run in d.runs.full + d.runs.partial for e in (run.first, run.count)]
    own = {dim.axis: size for dim, size in zip(dims, plan.shape, strict=True)}
    found = []
    for dim in decl.dims[:-1]:
        names, size = (("b",), shape.batch) if dim.axis is Axis.B else (("h", "g"), shape.heads)
        found.append(size if any(reads(e, *names) for e in ends) else own[dim.axis])
    members = -(-shape.k_len // d.keys)
    listed = members if plan.dtype == torch.uint8 else plan.shape[-1]
    if isinstance(d, Gathering):
        return [*found, LIST_HEAD * (members + gathered_tiles(d, shape, listed)) + shape.rows * listed]
    q_tiles, k_tiles = _tiles(d, shape)
    entries = q_tiles * listed * (d.keys // d.block_k)
    return [*found, LIST_HEAD * (k_tiles if d.of_keys else q_tiles) + entries]


def gathered_tiles(d: Gathering, shape: CallShape, slots: int) -> int:
    """A bound on the query tiles that are gathered for a head: of each member the last of both kinds may be short."""
    return -(-shape.rows * slots // d.block) + 2 * -(-shape.k_len // d.keys)


def tile_list(d: TileList, decl: InputDecl, plan: Tensor, dims: Sequence[Dim], values: Values) -> Tensor:
    """The lists of tiles of a plan whose dimensions are `dims`. values: of scalars in the call, without tiles."""
    kind, q_tile, k_tile = _kinds(d, d.rows, d.block_q, d.block_k, d.of_keys, decl, plan, dims, values)
    order = _by_keys if d.of_keys else _by_queries
    head, tiles = order(kind, q_tile, k_tile, *_tiles(d, values.shape))
    return _joined(decl, head.flatten(2) + LIST_HEAD * head.shape[2], tiles)


def gathering(d: Gathering, decl: InputDecl, plan: Tensor, dims: Sequence[Dim], values: Values) -> Tensor:
    """The rows that chose each member. Parameters as in `tile_list`."""
    kind, row, member = _kinds(d, 1, 1, d.keys, False, decl, plan, dims, values)
    slots, members = kind.shape[-1], -(-values.shape.k_len // d.keys)
    entry = row * slots + torch.arange(slots, device=plan.device)
    places, entries = _by_keys(kind, entry, member, values.shape.rows * slots, members)
    # A tile is of one member, and of entries of one kind.
    begin, count = places[..., :2], places.diff(dim=-1)
    needed = -(-count // d.block)
    last = needed.flatten(2).cumsum(-1)
    tile = torch.arange(gathered_tiles(d, values.shape, slots), device=plan.device)
    tile = tile.expand(*last.shape[:2], -1).contiguous()
    group = torch.searchsorted(last, tile, right=True).clamp(max=max(0, 2 * members - 1))

    def of(x: Tensor) -> Tensor:
        return x.flatten(2).gather(-1, group)

    first = of(begin) + (tile - (last.gather(-1, group) - of(needed))) * d.block
    end = torch.minimum(first + d.block, of(begin) + of(count))
    unused = tile >= last[..., -1:]
    head = LIST_HEAD * (members + tile.shape[-1])
    tiles = torch.stack((group, torch.where(unused, 0, first) + head, torch.where(unused, 0, end) + head), -1)
    return _joined(decl, torch.cat((places.flatten(2) + head, tiles.flatten(2)), -1), entries)


def _joined(decl: InputDecl, head: Tensor, entries: Tensor) -> Tensor:
    """What a derived list holds, in the dimensions that it has."""
    found = torch.cat((head, entries), -1).to(torch.int32)
    axes = [dim.axis for dim in decl.dims]
    found = found if Axis.H in axes or Axis.G in axes else found[:, 0]
    return found if Axis.B in axes else found[0]


def _kinds(
    d: TileList | Gathering, rows: int | None, block_q: int, block_k: int, of_keys: bool, decl: InputDecl,
    plan: Tensor, dims: Sequence[Dim], values: Values,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """int64 [batch, heads, query tiles, n]: for each tile that a plan lists 0 where it is full, 1 where it is partial
    and 2 where it does not count; its query tile; its key tile. of_keys: the runs are of query tiles."""
    shape, device = values.shape, plan.device
    q_tiles, k_tiles = -(-shape.rows // block_q), -(-shape.k_len // block_k)
    plan = as_four(plan, dims)
    if any(dim.axis is Axis.H for dim in decl.dims) and not any(dim.axis is Axis.H for dim in dims):
        plan = plan.repeat_interleave(shape.heads // plan.shape[1], 1)
    q_tile = torch.arange(q_tiles, device=device).view(-1, 1)
    entries, counts = chosen_entries(plan, -(-shape.k_len // d.keys))
    if plan.shape[2] > 1:
        # A plan's rows are those of the call, or blocks of positions.
        assert rows is not None
        first = 0 if rows == 1 else values.variables["start"]
        row_class = ((q_tile.flatten() * block_q + first) // rows).clamp(0, plan.shape[2] - 1)
        entries, counts = (x.index_select(2, row_class) for x in (entries, counts))
    each = d.keys // block_k
    k_tile = (entries[..., None] * each + torch.arange(each, device=device)).flatten(-2).to(torch.int64)
    counts = counts.repeat_interleave(each, -1) & (k_tile < k_tiles)
    values = values.at(q_tile=q_tile, k_tile=k_tile)
    full, partial = (
        _inside(runs, q_tile if of_keys else k_tile, values) & counts for runs in (d.runs.full, d.runs.partial)
    )
    size = torch.broadcast_shapes(full.shape, partial.shape, (1, 1, q_tiles, k_tile.shape[-1]))
    kind = torch.where(full, 0, torch.where(partial, 1, 2)).expand(size)
    return kind, q_tile.expand(size), k_tile.expand(size)


def _tiles(d: TileList, shape: CallShape) -> tuple[int, int]:
    """How many tiles of queries and of keys a call has."""
    return -(-shape.rows // d.block_q), -(-shape.k_len // d.block_k)


def as_four(plan: Tensor, dims: Sequence[Dim]) -> Tensor:
    """A plan as [batch, heads, row classes, entries], dimensions that it lacks of size 1."""
    axes = [dim.axis for dim in dims]
    if Axis.Q not in axes:
        plan = plan.unsqueeze(-2)
    if Axis.H not in axes and Axis.G not in axes:
        plan = plan.unsqueeze(-3)
    return plan if Axis.B in axes else plan[None]


def _inside(runs: Sequence[Run], tile: Tensor, values: Values) -> Tensor:
    """Which tiles are in some of the runs."""
    found = torch.zeros((), dtype=torch.bool, device=tile.device)
    for run in runs:
        after = tile - values.tensor(run.first)
        inside = (after >= 0) & (after < values.tensor(run.count) * run.step)
        found = found | (inside if run.step == 1 else inside & (after % run.step == 0))
    return found


def _by_queries(kind: Tensor, q_tile: Tensor, k_tile: Tensor, q_tiles: int, k_tiles: int) -> tuple[Tensor, Tensor]:
    """Places [..., query tiles, 3] and tiles of the lists of query tiles: each has as much room as the others."""
    tiles = torch.where(kind < 2, kind * k_tiles + k_tile, 2 * k_tiles).sort(-1).values % max(1, k_tiles)
    begin = (torch.arange(q_tiles, device=kind.device) * kind.shape[-1]).expand(kind.shape[:-1])
    full = begin + (kind == 0).sum(-1)
    return torch.stack((begin, full, full + (kind == 1).sum(-1)), -1), tiles.flatten(-2)


def _by_keys(kind: Tensor, q_tile: Tensor, k_tile: Tensor, q_tiles: int, k_tiles: int) -> tuple[Tensor, Tensor]:
    """The same of the lists of key tiles, one after another."""
    place = torch.where(kind < 2, (2 * k_tile + kind) * q_tiles + q_tile, 2 * k_tiles * q_tiles)
    if 2 * k_tiles * q_tiles < 1 << 31:
        place = place.to(torch.int32)
    place = place.flatten(-2).sort(-1).values
    ends = torch.arange(0, 2 * k_tiles + 1, dtype=place.dtype, device=kind.device) * q_tiles
    ends = torch.searchsorted(place, ends.expand(*place.shape[:-1], -1).contiguous())
    return torch.stack((ends[..., :-2:2], ends[..., 1::2], ends[..., 2::2]), -1), place % max(1, q_tiles)
