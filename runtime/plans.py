"""Plans: which members are chosen for each row class, and the lists of tiles that kernels read of them.

A plan is int32 or int64 [..., C], members in increasing order and -1 after them, or uint8 [..., M], with an entry for
every member. What a call hands in is never trusted: an entry that is no member, or not above all before it, is skipped.
Nothing here waits for the device. Lists are made by kernels (`lists.py`) where these serve, and otherwise by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.derivation import Gathering, TileList
from attndsl.diagnostics import error
from attndsl.program import Axis, CallShape, Dim, InputDecl, reads
from attndsl.runs import LIST_HEAD, TileKind
from attndsl.runtime import lists
from attndsl.runtime.cuts import document_ends
from attndsl.runtime.values import Values
from attndsl.widths import LARGEST


def listed_members(plan: Tensor, members: int) -> Tensor:
    """bool [..., C]: which entries of a plan that lists members count."""
    if plan.shape[-1] == 0:
        return plan >= 0
    return (plan > _highest_before(plan)) & (plan >= 0) & (plan < members)


def _highest_before(plan: Tensor) -> Tensor:
    """The highest of the entries before each, -1 where there is none.

    By doubling: on a GPU a scan by torch gives each row to a block of threads, and took 2.5 ms for 262,144 rows of 8.
    """
    highest = pad(plan[..., :-1], (1, 0), value=-1)
    reach = 1
    while reach < plan.shape[-1]:
        highest = torch.maximum(highest, pad(highest[..., :-reach], (reach, 0), value=-1))
        reach *= 2
    return highest


def chosen_members(plan: Tensor, members: int, level: int | None = None) -> Tensor:
    """bool [..., members]: which members a plan of either form chooses, or one of factors gives this `level`."""
    if plan.dtype == torch.uint8:
        return (plan != 0 if level is None else plan == level).expand(*plan.shape[:-1], members).contiguous()
    counts = listed_members(plan, members)
    # What does not count goes to a place of its own, which is dropped.
    found = torch.zeros(*plan.shape[:-1], members + 1, dtype=torch.bool, device=plan.device)
    place = torch.where(counts, plan, members).to(torch.int64)
    return found.scatter_(-1, place, True)[..., :members].contiguous()


def chosen_entries(plan: Tensor, members: int, level: int | None = None) -> tuple[Tensor, Tensor]:
    """Members [..., C] that a plan of either form lists, and which of them count."""
    if plan.dtype == torch.uint8:
        every = torch.arange(members, device=plan.device).expand(*plan.shape[:-1], members)
        return every, chosen_members(plan, members, level)
    return plan, listed_members(plan, members)


def call_members(plan: Tensor, ids: Tensor, keys: int, shape: CallShape, first_row: int) -> Tensor:
    """As `derivation.CallMembers` has them, of a plan [B or 1, heads, rows or 1, C] of documents of ids [B or 1?,
    tokens]: int32 [B, heads, rows, 2 * C]. first_row: the position of the call's first row."""
    size = (shape.batch, plan.shape[1], shape.rows, 2 * plan.shape[3])
    if not shape.k_len or 0 in size:
        return torch.full(size, -1, dtype=torch.int32, device=plan.device)
    ids = ids.expand(shape.batch, shape.k_len)
    row = torch.arange(first_row, first_row + shape.rows, device=plan.device)
    first, end = (document_ends(ids, ends)[:, None, row.clamp(min=0), None] for ends in (False, True))
    counts = listed_members(plan, -(-shape.k_len // keys))
    token = first + torch.where(counts, plan, 0).to(torch.int32) * keys
    counts = counts & (token < end)
    each = torch.stack((token // keys, (torch.minimum(token + keys, end) - 1) // keys), -1)
    return torch.where(counts[..., None], each, -1).expand(*size[:3], -1, -1).flatten(3).to(torch.int32).contiguous()


# ------------------------------------------------------------------------------------------ lists


@dataclass(frozen=True, slots=True)
class Listing:
    """A plan [batch or 1, heads or 1, row classes, C] to be listed in tiles, in one call.

    `ends`: int32 [batch or 1, heads or 1, query tiles, runs, 4], the intervals of key tiles that a query tile visits
    where the plan chooses them: first, end, step, and kind (0: it sees them whole). `first`: the position of the
    call's first row.
    """

    d: TileList | Gathering
    shape: CallShape
    plan: Tensor
    ends: Tensor
    first: int

    @property
    def rows(self) -> int | None:
        """Queries of a row class, None where all rows are one."""
        return 1 if isinstance(self.d, Gathering) else self.d.rows

    @property
    def block_k(self) -> int:
        return self.d.keys if isinstance(self.d, Gathering) else self.d.block_k

    @property
    def k_tiles(self) -> int:
        return -(-_keys(self.d, self.shape) // self.block_k)

    @property
    def members(self) -> int:
        return -(-_keys(self.d, self.shape) // self.d.keys)

    @property
    def slots(self) -> int:
        """Members that a row class may list."""
        return self.members if _of_all(self.d, self.plan) else self.plan.shape[-1]

    @property
    def sizes(self) -> dict[str, int]:
        """What the kernels take."""
        # Classes of single queries and tiles of a map are of the call's rows, those of blocks of positions.
        of_rows = self.rows == 1 or (isinstance(self.d, TileList) and self.d.mapped)
        return {
            "q_tiles": self.ends.shape[2], "k_tiles": self.k_tiles, "class_rows": self.rows or (1 << 31) - 1,
            "first_row": 0 if of_rows else self.first, "block_q": _block_q(self.d), "members": self.members,
            "each": _tiles_of_member(self.d, self.shape), "slots": self.slots,
        }  # fmt: skip

    @property
    def by_kernels(self) -> bool:
        """Whether kernels make the list."""
        entries = self.slots * _tiles_of_member(self.d, self.shape)
        if _of_all(self.d, self.plan) or self.ends.shape[0] > 1 or not 0 < entries <= lists.MAX_WIDTH:
            return False
        if isinstance(self.d, TileList) and (self.d.marks or self.d.stride > 1):
            return False
        counts = 2 * self.k_tiles * lists.chunks_of(self.ends.shape[2], entries)[0]
        return self.plan.device.type == "cuda" and self.k_tiles > 0 and counts <= lists.MAX_COUNTS

    @property
    def by_map_kernels(self) -> bool:
        """Whether kernels make the list of a map."""
        marked = isinstance(self.d, TileList) and self.d.marks
        return _of_all(self.d, self.plan) and not marked and self.plan.device.type == "cuda" and self.k_tiles > 0

    @property
    def reading(self) -> dict[str, int]:
        """What the kernels take of how a map's bytes are read."""
        d = self.d
        if isinstance(d, Gathering):
            return {"level": -1, "inverted": 0, "whole": 0}
        return {"level": -1 if d.level is None else d.level, "inverted": int(d.complement), "whole": int(d.mapped)}


def _of_all(d: TileList | Gathering, plan: Tensor) -> bool:
    """Whether any number of members may be listed: a plan is a map, or what it does not choose is."""
    return plan.dtype in (torch.uint8, torch.bool) or (isinstance(d, TileList) and d.complement)


def _keys(d: TileList | Gathering, shape: CallShape) -> int:
    """The keys that tiles are of: tokens, or the entries of a view."""
    return -(-shape.k_len // d.stride) if isinstance(d, TileList) else shape.k_len


def _tiles_of_member(d: TileList | Gathering, shape: CallShape) -> int:
    """How many tiles a list has room for of each member: of one longer than the call, those that there are."""
    block_k = d.keys if isinstance(d, Gathering) else d.block_k
    return min(d.keys // block_k, max(1, -(-_keys(d, shape) // block_k)))


def run_ends(d: TileList | Gathering, values: Values) -> Tensor:
    """`Listing.ends`. values: of scalars in the call."""
    q_tiles = -(-values.shape.rows // _block_q(d))
    values = values.at(q_tile=torch.arange(q_tiles, device=values.device).view(1, 1, -1, 1))
    found = [torch.zeros(1, 1, q_tiles, 0, 4, dtype=torch.int32, device=values.device)]
    for run in d.runs.full + d.runs.partial:
        each = torch.zeros(1, 1, q_tiles, 1, dtype=torch.int64, device=values.device)
        first, count = each + values.tensor(run.first), values.tensor(run.count).clamp(min=0)
        rest = (torch.full_like(first, run.step), torch.full_like(first, int(run.kind is TileKind.PARTIAL)))
        columns = torch.broadcast_tensors(first, first + count * run.step, *rest)
        found.append(torch.stack(columns, -1).to(torch.int32))
    lead = torch.broadcast_shapes(*(x.shape[:2] for x in found))
    return torch.cat([x.expand(*lead, q_tiles, -1, 4) for x in found], 3)


def as_four(plan: Tensor, dims: Sequence[Dim]) -> Tensor:
    """A plan as [batch, heads, row classes, entries], dimensions that it lacks of size 1."""
    axes = [dim.axis for dim in dims]
    if Axis.Q not in axes and axes.count(Axis.LIST) < 2:
        plan = plan.unsqueeze(-2)
    if Axis.H not in axes and Axis.G not in axes:
        plan = plan.unsqueeze(-3)
    return plan if Axis.B in axes else plan[None]


def of_heads(plan: Tensor, dims: Sequence[Dim], decl: InputDecl, shape: CallShape) -> Tensor:
    """A plan as `as_four` has it, of query heads where its list has those."""
    plan, axes = as_four(plan, dims), [dim.axis for dim in dims]
    if any(dim.axis is Axis.H for dim in decl.dims) and Axis.H not in axes and plan.shape[1] > 1:
        plan = plan.repeat_interleave(shape.heads // plan.shape[1], 1)
    return plan


def list_size(
    d: TileList | Gathering, decl: InputDecl, plan: Tensor, dims: Sequence[Dim], shape: CallShape
) -> list[int]:
    """Sizes of a derived list: in batch and heads the plan's own, unless its tiles differ there.

    Raises `PatternError` (A515) where its places, or what stands in it, would pass 32 bits.
    """
    ends = [e for run in d.runs.full + d.runs.partial for e in (run.first, run.count)]
    own = {dim.axis: size for dim, size in zip(dims, plan.shape, strict=True)}
    found = []
    for dim in decl.dims[:-1]:
        names, size = (("b",), shape.batch) if dim.axis is Axis.B else (("h", "g"), shape.heads)
        found.append(size if any(reads(e, *names) for e in ends) else own[dim.axis])
    members = -(-_keys(d, shape) // d.keys)
    slots = members if _of_all(d, plan) else plan.shape[-1]
    if isinstance(d, Gathering):
        room = LIST_HEAD * (members + gathered_tiles(d, shape, slots)) + shape.rows * slots
        largest = max(room, (shape.rows << slot_bits(slots)) - 1)
    else:
        q_tiles, k_tiles = -(-shape.rows // d.block_q), -(-_keys(d, shape) // (d.block_k * max(1, d.marks)))
        entries = q_tiles * slots * _tiles_of_member(d, shape) * (2 if d.marks else 1)
        largest = room = LIST_HEAD * (k_tiles if d.of_keys else q_tiles) + entries
    if largest > LARGEST:
        raise error(
            "A515", f"`{d.plan}` has {slots:,} entries for each of its rows: with {shape.rows:,} rows a call, what "
            "kernels read of it passes 32 bits", decl.span,
            help="hand in fewer entries: those past the members count for nothing",
        )  # fmt: skip
    return [*found, room]


def slot_bits(slots: int) -> int:
    """The bits of an entry of gathered rows that say which of its row's slots it is: what is above them is the row. To
    divide by the slots took a third of a kernel's instructions."""
    return max(0, slots - 1).bit_length()


def gathered_tiles(d: Gathering, shape: CallShape, slots: int) -> int:
    """A bound on the query tiles that are gathered for a head: of each member the last of both kinds may be short."""
    return -(-shape.rows * slots // d.block) + 2 * -(-shape.k_len // d.keys)


def maker(found: Listing, decl: InputDecl) -> lists.Maker:
    """What makes a derived list, of this plan or of another with its sizes and strides."""
    # A call may have no batch entries.
    pairs = zip(found.plan.shape[:2], found.ends.shape[:2], strict=True)
    d, batch, heads = found.d, *(b if a == 1 else a for a, b in pairs)
    axes = [dim.axis for dim in decl.dims]

    # What makes lists outlives the plan that it was made for.
    blank = replace(found, plan=found.plan.new_empty(0, device="meta"))

    def of(plan: Tensor) -> Listing:
        return replace(blank, plan=plan.expand(batch, heads, -1, -1))

    def in_dims(make: lists.Maker) -> lists.Maker:
        def made(plan: Tensor) -> Tensor:
            whole = make(plan)
            whole = whole if Axis.H in axes or Axis.G in axes else whole[:, 0]
            return whole if Axis.B in axes else whole[0]

        return made

    kernels = _kernels(of(found.plan))
    if isinstance(d, Gathering):
        return in_dims(lambda plan: _gathering(of(plan), d, kernels))
    if kernels is not None:
        return in_dims(kernels)
    if d.marks:
        return in_dims(lambda plan: _marked(of(plan), d.marks))
    return in_dims(lambda plan: _of_keys(of(plan)) if d.of_keys else _of_queries(of(plan)))


def listed(found: Listing, decl: InputDecl) -> Tensor:
    """What a derived list holds, in the dimensions that it has."""
    return maker(found, decl)(found.plan)


def _kernels(found: Listing) -> lists.Maker | None:
    """The kernels that make a list, or of gathered rows the entries; None where torch makes them."""
    d, sizes, ends, of_map = found.d, found.sizes, found.ends, found.by_map_kernels
    if not of_map and not found.by_kernels:
        return None
    head, codes = LIST_HEAD * found.k_tiles, 0
    if isinstance(d, Gathering):
        head = LIST_HEAD * (found.members + gathered_tiles(d, found.shape, found.slots))
        codes = 1 << slot_bits(found.slots)
    by_keys = isinstance(d, Gathering) or d.of_keys
    if not of_map:
        plan = found.plan
        return lists.by_keys(plan, ends, sizes, head, codes) if by_keys else lists.by_queries(plan, ends, sizes)

    members = found.members

    def as_map(plan: Tensor) -> Tensor:
        return plan if plan.dtype == torch.uint8 else chosen_members(plan, members).to(torch.uint8)

    example, reading = as_map(found.plan), found.reading
    if by_keys:
        make = lists.map_by_keys(example, ends, sizes, reading, head, codes)
    else:
        make = lists.map_by_queries(example, ends, sizes, reading)
    return lambda plan: make(as_map(plan))


def _block_q(d: TileList | Gathering) -> int:
    return 1 if isinstance(d, Gathering) else d.block_q


def _of_queries(found: Listing) -> Tensor:
    """Lists of query tiles: each has as much room as the others."""
    kind, k_tile = _kinds(found)
    tiles = torch.where(kind < 2, kind * found.k_tiles + k_tile, 2 * found.k_tiles).sort(-1).values
    q_tiles, entries = kind.shape[2:]
    begin = (torch.arange(q_tiles, device=kind.device) * entries + LIST_HEAD * q_tiles).expand(kind.shape[:-1])
    full = begin + (kind == 0).sum(-1)
    head = torch.stack((begin, full, full + (kind == 1).sum(-1)), -1)
    return torch.cat((head.flatten(2), (tiles % max(1, found.k_tiles)).flatten(2)), -1).to(torch.int32)


def _of_keys(found: Listing) -> Tensor:
    """Lists of key tiles, one after another."""
    return _by_keys(found, LIST_HEAD * found.k_tiles, codes=0)


def _gathering(found: Listing, d: Gathering, kernels: lists.Maker | None) -> Tensor:
    """The entries of members, and the query tiles that they make."""
    count = gathered_tiles(d, found.shape, found.slots)
    head = LIST_HEAD * (found.members + count)
    made = _by_keys(found, head, 1 << slot_bits(found.slots)) if kernels is None else kernels(found.plan)
    if not found.members:
        return made
    # A tile is of one member, and of entries of one kind.
    places = made[..., : LIST_HEAD * found.members].unflatten(-1, (-1, LIST_HEAD))
    begin, size = places[..., :2].flatten(2), places.diff(dim=-1).flatten(2)
    last = ((size + d.block - 1) // d.block).cumsum(-1, dtype=torch.int32)
    tile = torch.arange(count, dtype=torch.int32, device=last.device).expand(*last.shape[:2], -1).contiguous()
    group = torch.searchsorted(last, tile, right=True).clamp(max=2 * found.members - 1)

    def of(x: Tensor) -> Tensor:
        return x.gather(-1, group)

    first = of(begin) + (tile - of(pad(last, (1, 0))[..., :-1])) * d.block
    end = torch.minimum(first + d.block, of(begin) + of(size))
    # The same place twice where a tile is not needed.
    tiles = torch.stack((group, first, torch.where(tile < last[..., -1:], end, first)), -1)
    made[..., LIST_HEAD * found.members : head] = tiles.flatten(2)
    return made


def _marked(found: Listing, marks: int) -> Tensor:
    """Lists of key tiles of `marks` listed ones each, and behind the entries their words."""
    kind, k_tile = _kinds(found)
    counts, tile = kind < 2, torch.div(k_tile, marks, rounding_mode="floor")
    # A row's entries increase. Those of one tile are counted at its first: what is after it, less what is after them.
    highest = torch.where(counts, tile, -1).cummax(-1).values
    first = counts & (tile > pad(highest[..., :-1], (1, 0), value=-1))
    after = torch.where(counts, 1 << (k_tile % marks), 0).flip(-1).cumsum(-1).flip(-1)
    next_first = torch.where(first, after, 0).flip(-1).cummax(-1).values.flip(-1)
    words = after - pad(next_first[..., 1:], (0, 1))
    q_tiles, tiles = kind.shape[2], -(-found.k_tiles // marks)
    row = torch.arange(q_tiles, device=kind.device).view(-1, 1)
    place = torch.where(first, tile * max(1, q_tiles) + row, tiles * max(1, q_tiles)).flatten(2)
    place, order = place.sort(dim=-1, stable=True)
    head = LIST_HEAD * tiles
    ends = (torch.arange(tiles + 1, device=kind.device) * max(1, q_tiles)).expand(*place.shape[:2], -1)
    places = torch.searchsorted(place, ends.contiguous()) + head
    begin, end = places[..., :-1], places[..., 1:]
    heads = torch.stack((begin, end, end), -1).flatten(2)
    return torch.cat((heads, place % max(1, q_tiles), words.flatten(2).gather(-1, order)), -1).to(torch.int32)


def _by_keys(found: Listing, head: int, codes: int) -> Tensor:
    """As `lists.by_keys` has it, by torch."""
    kind, k_tile = _kinds(found)
    q_tile = torch.arange(kind.shape[2], device=kind.device).view(-1, 1)
    code = q_tile * codes + torch.arange(kind.shape[3], device=kind.device) if codes else q_tile
    most = max(1, kind.shape[2] * max(1, codes))
    place = torch.where(kind < 2, (2 * k_tile + kind) * most + code, 2 * found.k_tiles * most)
    place = place.flatten(2).sort(-1).values
    ends = torch.arange(2 * found.k_tiles + 1, device=kind.device) * most
    places = torch.searchsorted(place, ends.expand(*place.shape[:2], -1).contiguous()) + head
    made = torch.cat((place.new_zeros(*place.shape[:2], head), place % most), -1).to(torch.int32)
    of_tiles = torch.stack((places[..., :-2:2], places[..., 1::2], places[..., 2::2]), -1)
    made[..., : LIST_HEAD * found.k_tiles] = of_tiles.flatten(2)
    return made


def _kinds(found: Listing) -> tuple[Tensor, Tensor]:
    """int64 [batch, heads, query tiles, n]: for each tile that a plan lists 0 where its query tile sees it whole, 1
    where in part, and 2 where it does not count; and the key tile."""
    device, sizes, rows = found.plan.device, found.sizes, found.rows
    level = found.d.level if isinstance(found.d, TileList) else None
    plan = found.plan
    if isinstance(found.d, TileList) and found.d.complement:
        plan, level = (~chosen_members(plan, found.members, level)).to(torch.uint8), None
    entries, counts = chosen_entries(plan, found.members, level)
    q_tile = torch.arange(sizes["q_tiles"], device=device)
    row_class = torch.zeros_like(q_tile)
    if rows is not None:
        row_class = ((q_tile * sizes["block_q"] + sizes["first_row"]) // rows).clamp(0, found.plan.shape[2] - 1)
    entries, counts = (x.index_select(2, row_class) for x in (entries, counts))
    each = sizes["each"]
    k_tile = (entries[..., None] * each + torch.arange(each, device=device)).flatten(-2).to(torch.int64)
    counts = counts.repeat_interleave(each, -1) & (k_tile < found.k_tiles)
    kind = torch.full_like(k_tile, 2)
    for first, end, step, of_kind in (column.unbind(-1) for column in found.ends[..., None, :].unbind(3)):
        inside = counts & (k_tile >= first) & (k_tile < end) & ((k_tile - first) % step == 0)
        kind = torch.where(inside, of_kind.to(torch.int64), kind)
    if isinstance(found.d, TileList) and found.d.mapped:
        whole = found.plan.index_select(2, row_class) == 2
        kind = torch.where((kind == 1) & whole.repeat_interleave(each, -1), 0, kind)
    return kind, k_tile
