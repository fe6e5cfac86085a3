"""The segments that a plan lists, as spans of their tokens for tiles of queries, and as marks for tiles of keys.

A plan names a segment by its first token, and how long it is only the device knows: a list of tiles would need room for
the longest. Spans need as much as the plan. The tiles of keys that lie in one segment have one list, and no segment has
more than two others, so lists of keys have room for three entries of each of the plan's. Nothing here waits for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.derivation import SpanList
from attndsl.diagnostics import error
from attndsl.program import Axis, CallShape, InputDecl, Program
from attndsl.runs import LIST_HEAD, SPAN_HEAD
from attndsl.runtime.call import dim_size
from attndsl.runtime.plans import as_four, listed_members
from attndsl.widths import LARGEST


def listed_in_order(plan: Tensor, tokens: int) -> Tensor:
    """What a plan [..., C] lists, as `derivation.Listed` has it."""
    return torch.where(listed_members(plan, tokens), plan, tokens).to(torch.int32).sort(-1).values


def span_room(d: SpanList, decl: InputDecl, slots: int, shape: CallShape) -> int:
    """How many numbers a list has for a head, of a plan with so many entries a row class. Raises `PatternError` (A515)
    where they would pass 32 bits."""
    q_tiles = -(-shape.rows // d.block_q)
    if d.marks:
        room = LIST_HEAD * -(-shape.k_len // d.marks) + 2 * LIST_HEAD * q_tiles * slots
    else:
        room = (SPAN_HEAD + 2 * slots) * q_tiles
    if room > LARGEST:
        raise error(
            "A515", f"`{d.listed}` has {slots:,} entries for each of its rows: with {shape.rows:,} rows a call, what "
            "kernels read of it passes 32 bits", decl.span,
            help="hand in fewer entries: those past the members count for nothing",
        )  # fmt: skip
    return room


def span_list(
    decl: InputDecl, d: SpanList, listed: Tensor, offsets: Tensor, shape: CallShape, program: Program
) -> Tensor:
    """What a `SpanList` holds, in the dimensions that it has. listed, offsets: in those of their declarations."""
    of_plan = _of_heads(as_four(listed, program.input(d.listed).dims), decl, shape)
    dims = program.input(d.offsets).dims
    axes = [dim.axis for dim in dims]
    offsets = offsets if Axis.H in axes or Axis.G in axes else offsets.unsqueeze(-2)
    size = _sizes(_of_heads(offsets if Axis.B in axes else offsets[None], decl, shape))
    known = {dim.axis: dim_size(dim, program, shape) for dim in decl.dims}
    lead = known.get(Axis.B, 1), known.get(Axis.H, known.get(Axis.G, 1))
    of_plan, size = of_plan.expand(*lead, -1, -1), size.expand(*lead, -1)
    # Where a plan lists what begins no segment, nothing is left.
    at = of_plan.to(torch.int64)
    first = torch.where(_of(size, at) > 0, at, shape.k_len).sort(-1).values
    count = _of(size, first)
    q_tiles = -(-shape.rows // d.block_q)
    of_tile = torch.zeros(q_tiles, dtype=torch.int64, device=listed.device)
    if d.rows is not None:
        row = torch.arange(q_tiles, device=listed.device) * d.block_q
        row = row if d.rows == 1 else (row + shape.first_position(program)) // d.rows
        of_tile = row.clamp(0, max(0, first.shape[2] - 1))
    made = _marks(d, first, count, size, of_tile) if d.marks else _spans(first, count, of_tile)
    made = made.to(torch.int32)
    made = made if Axis.H in known or Axis.G in known else made[:, 0]
    return made if Axis.B in known else made[0]


def _of_heads(x: Tensor, decl: InputDecl, shape: CallShape) -> Tensor:
    """[batch, heads, …] of query heads where a list has those."""
    if any(dim.axis is Axis.H for dim in decl.dims) and x.shape[1] not in (1, shape.heads):
        return x.repeat_interleave(shape.heads // x.shape[1], 1)
    return x


def _sizes(offsets: Tensor) -> Tensor:
    """How many tokens the segment has that a token begins, 0 of another token, and of none at the end: int64 [batch,
    heads, tokens + 1]."""
    tokens = offsets.shape[-1]
    every = torch.arange(tokens, device=offsets.device)
    begins = torch.where(offsets == 0, every, tokens)
    # The first that begins a segment, of the tokens from each on.
    next_first = begins.flip(-1).cummin(-1).values.flip(-1) if tokens else begins
    until = pad(next_first[..., 1:], (0, 1), value=tokens)[..., :tokens]
    return pad(torch.where(offsets == 0, until - every, 0), (0, 1))


def _of(size: Tensor, token: Tensor) -> Tensor:
    """Sizes [batch, heads, tokens + 1] at tokens [batch, heads, …]."""
    return size.gather(-1, token.flatten(2)).view(token.shape)


def _spans(first: Tensor, count: Tensor, of_tile: Tensor) -> Tensor:
    """The spans of row classes, [batch, heads, classes, slots], for query tiles of these classes."""
    batch, heads, _, slots = first.shape
    ends, q_tiles = count.cumsum(-1), of_tile.numel()
    at = SPAN_HEAD * q_tiles + torch.arange(q_tiles, device=first.device) * (2 * slots)
    tokens = pad(ends, (1, 0))[..., -1].index_select(2, of_tile)
    head = torch.stack([x.expand(batch, heads, q_tiles) for x in (at, at + slots, tokens)], -1)
    lists = torch.stack((ends, first - (ends - count)), 3).index_select(2, of_tile)
    return torch.cat((head.flatten(2), lists.flatten(2)), -1)


def _marks(d: SpanList, first: Tensor, count: Tensor, size: Tensor, of_tile: Tensor) -> Tensor:
    """The lists of key tiles: of each segment the tile in which it begins, the first that lies in it, and that in which
    it ends, if these are three."""
    marks, tokens, q_tiles = d.marks, size.shape[-1] - 1, of_tile.numel()
    k_tiles = -(-tokens // marks)
    end, every = first + count, torch.full_like(first, -1)
    low, high = first % marks, end % marks
    begins = (count > 0) & (low > 0)
    inside = -(-first // marks)
    whole = inside < end // marks
    ends = (count > 0) & (high > 0) & ((end // marks > first // marks) | (low == 0))
    # Bits from `low` on, and below `high` where that is in the same tile.
    until = torch.where(end // marks > first // marks, marks, high)
    words = torch.stack(((1 << until) - (1 << low), every, (1 << high) - 1), -1)
    tile = torch.stack((first // marks, inside, end // marks), -1)
    counts = torch.stack((begins, whole, ends), -1)
    words, tile, counts = (x.flatten(3).index_select(2, of_tile) for x in (words, tile, counts))
    # A row's tiles do not decrease. Those of one are counted at its first: the bits after it, less those after them.
    highest = torch.where(counts, tile, -1).cummax(-1).values if tile.shape[-1] else tile
    room = tile.shape[-1]
    once = counts & (tile > pad(highest, (1, 0), value=-1)[..., :room])
    after = torch.where(counts, words, 0).flip(-1).cumsum(-1).flip(-1)
    next_once = torch.where(once, torch.arange(room, device=tile.device), room)
    next_once = pad(next_once, (0, 1), value=room).flip(-1).cummin(-1).values.flip(-1)[..., 1:]
    words = after - pad(after, (0, 1)).gather(-1, next_once)
    row = torch.arange(q_tiles, device=tile.device).view(-1, 1)
    most = max(1, q_tiles)
    place = torch.where(once, tile * most + row, k_tiles * most).flatten(2)
    place, order = place.sort(dim=-1, stable=True)
    bounds = (torch.arange(k_tiles + 1, device=tile.device) * most).expand(*place.shape[:2], -1)
    places = torch.searchsorted(place, bounds.contiguous()) + LIST_HEAD * k_tiles
    # A tile that lies in a segment has the list of the first that does.
    at = torch.arange(k_tiles, device=tile.device)
    begun = torch.where(size[..., :tokens] > 0, torch.arange(tokens, device=tile.device), 0)
    begun = begun.cummax(-1).values[..., ::marks] if tokens else begun
    lies = begun + _of(size, begun) >= (at + 1) * marks
    own = torch.where(lies, -(-begun // marks), at)
    begin, stop = (x.gather(-1, own) for x in (places[..., :-1], places[..., 1:]))
    heads = torch.stack((begin, stop, stop), -1).flatten(2)
    return torch.cat((heads, place % most, words.flatten(2).gather(-1, order)), -1)
