"""Maps of tiles (`attndsl.mapping`): in which of them a condition can hold, from the bounds of what it compares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.derivation import TileMap
from attndsl.mapping import tabled
from attndsl.oracle import index_origin
from attndsl.program import Axis, Binary, Call, Compare, Const, If, InputDecl, Logic, Read, Scalar, Type, Unary, reads
from attndsl.runtime.values import Values

Bounds = tuple[Tensor, Tensor]
# Entries of tables that are looked at together.
STRIP = 1 << 26


def tile_map(decl: InputDecl, d: TileMap, values: Values) -> Tensor:
    """uint8 of the input's dimensions: for tiles [rows, keys] 2 where all pairs are known to be in the condition, which
    then are of existing keys, 1 where some may be, else 0.

    values: of a call, with its lengths. Nothing here waits for the device, or looks at pairs.
    """
    shape, device = values.shape, values.device
    first = shape.first_position(values.program)
    q_tiles, k_tiles = -(-shape.rows // d.rows), -(-shape.k_len // d.keys)
    axes = [dim.axis for dim in decl.dims]
    lead = [shape.batch if Axis.B in axes else 1, shape.heads if Axis.H in axes else 1]
    sizes = [n for n, axis in zip(lead, (Axis.B, Axis.H), strict=True) if axis in axes]
    if not q_tiles or not k_tiles:
        return torch.zeros(*sizes, q_tiles, k_tiles, dtype=torch.uint8, device=device)
    # Past the end the last token again: it changes no bound.
    q = first + torch.arange(q_tiles * d.rows, device=device).clamp(max=shape.rows - 1)
    k = torch.arange(k_tiles * d.keys, device=device).clamp(max=shape.k_len - 1)
    tiles = _Tiles(values.at(q=q.view(1, 1, -1, 1), k=k.view(1, 1, 1, -1)), d.rows, d.keys)
    may, must = tiles.truth(d.cond)
    exist = torch.arange(k_tiles, device=device) < shape.k_len // d.keys
    found = may.to(torch.uint8) + (must & exist)
    return found.expand(*lead, q_tiles, k_tiles).reshape(*sizes, q_tiles, k_tiles)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Bounds of scalars in the tiles of a call, [batch or 1, heads or 1, query tiles or 1, key tiles or 1]."""

    values: Values
    rows: int
    keys: int

    def truth(self, e: Scalar) -> Bounds:
        """Whether a boolean may hold for a pair of a tile, and whether it must for all."""
        if not _mixed(e):
            each = self._tiled(self.values.tensor(e))
            return each.any(4).any(-1), each.all(4).all(-1)
        match e:
            case Unary(op="not", operand=x):
                may, must = self.truth(x)
                return ~must, ~may
            case Logic(op=op, operands=xs):
                join = torch.logical_and if op == "and" else torch.logical_or
                both = [self.truth(x) for x in xs]
                return reduce(join, [m for m, _ in both]), reduce(join, [m for _, m in both])
            case If(cond=c, then=a, other=b) if e.type is Type.BOOL:
                return self.truth(Logic("or", (Logic("and", (c, a)), Logic("and", (Unary("not", c), b)))))
            case Compare(op=op, left=a, right=b) if Type.FLOAT not in (a.type, b.type):
                left, right = self.number(a), self.number(b)
                if left is not None and right is not None:
                    return _compared(op, left, right)
            case Read() if tabled(e, self.values.program):
                mixed = [n for n, i in enumerate(e.index) if _mixed(i)]
                if not mixed:
                    return self._by_both(e)
                if (bounds := self.number(e.index[mixed[0]])) is not None:
                    of_q = [n for n, i in enumerate(e.index) if reads(i, "q") and n not in mixed]
                    return self._by_row(e, of_q[0], mixed[0], bounds) if of_q else self._by_lag(e, mixed[0], bounds)
            case _:
                pass
        unknown = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.values.device)
        return unknown, ~unknown

    def _by_both(self, e: Read) -> Bounds:
        """Of a table that a number of the query and one of the key look up: over a tile's keys, then over its rows.

        A product counts what of a tile's keys holds, so that no class meets a key: its entries are 0 and 1, and its
        sums at most the keys of a tile, which either type holds exactly.
        """
        places, table = self._places(e), self.values.tensors[e.input]
        of_q, of_k = (next(n for n, i in enumerate(e.index) if reads(i, name)) for name in "qk")
        of_row, of_key = places[of_q][..., 0], places[of_k].squeeze(2).unflatten(2, (-1, self.keys))
        lead = torch.broadcast_shapes(*(place.shape[:2] for place in places))
        members, tiles, real = table.shape[of_k], of_key.shape[2], torch.float16 if table.is_cuda else torch.float32
        has = torch.zeros(*of_key.shape[:3], members, dtype=real, device=table.device).scatter_(3, of_key, 1)
        most = has.sum(3, dtype=real).unsqueeze(2)
        places[of_k] = torch.arange(members, device=table.device).view(1, 1, 1, -1)
        found: list[Bounds] = []
        step = max(1, STRIP // max(1, lead.numel() * (members + tiles)))
        for classes in torch.arange(table.shape[of_q], device=table.device).split(step):
            places[of_q] = classes.view(1, 1, -1, 1)
            count = table[tuple(places)].to(real) @ has.mT
            found.append((count > 0, count == most))
        of_classes = [torch.cat(x, 2) for x in zip(*found, strict=True)]
        b, h = _leading(of_classes[0], 3)
        of_tiles: list[Bounds] = []
        step = self.rows * max(1, STRIP // max(1, lead.numel() * tiles * self.rows))
        for rows in of_row.split(step, 2):
            some, every = (x[b, h, rows].unflatten(2, (-1, self.rows)) for x in of_classes)
            of_tiles.append((some.any(3), every.all(3)))
        some, every = (torch.cat(x, 2) for x in zip(*of_tiles, strict=True))
        return some, every

    def _by_lag(self, e: Read, which: int, bounds: Bounds) -> Bounds:
        """Of a table whose index `which` is a number of both, between bounds: by how many hold up to each entry."""
        places, table = self._places(e), self.values.tensors[e.input]
        last = table.shape[which] - 1
        places[which] = torch.arange(last + 1, device=table.device).view(1, 1, 1, -1)
        until = pad(table[tuple(places)].cumsum(3, dtype=torch.int32), (1, 0)).squeeze(2)
        b, h = _leading(until, 4)
        low, high = (x.clamp(0, last) for x in bounds)
        count = until[b, h, high + 1] - until[b, h, low]
        return count > 0, count == high - low + 1

    def _by_row(self, e: Read, of_q: int, which: int, bounds: Bounds) -> Bounds:
        """Of a table that a number of the query looks up, and one of both, between bounds: by how many hold up to each
        entry, for some row of a tile and for all."""
        places, table = self._places(e), self.values.tensors[e.input]
        last = table.shape[which] - 1
        places[which] = torch.arange(last + 1, device=table.device).view(1, 1, 1, -1)
        lead = torch.broadcast_shapes(*(place.shape[:2] for place in places))
        step = self.rows * max(1, STRIP // max(1, lead.numel() * self.rows * (last + 1)))
        found: list[Bounds] = []
        for rows in places[of_q].split(step, 2):
            places[of_q] = rows
            each = table[tuple(places)].unflatten(2, (-1, self.rows))
            found.append((each.any(3), each.all(3)))
        some, every = (pad(torch.cat(x, 2).cumsum(3, dtype=torch.int32), (1, 0)) for x in zip(*found, strict=True))
        low, high = (x.clamp(0, last) for x in bounds)
        size = torch.broadcast_shapes(low.shape, (*some.shape[:3], 1))
        low, high, some, every = (x.expand(*size[:3], -1) for x in (low, high, some, every))
        may, must = (x.gather(3, (high + 1).to(torch.int64)) - x.gather(3, low.to(torch.int64)) for x in (some, every))
        return may > 0, must == high - low + 1

    def _places(self, e: Read) -> list[Tensor]:
        """The places that the indices of a read stand for, of all but those that read both positions."""
        decl, values = self.values.program.input(e.input), self.values
        found = []
        for dim, size, index in zip(decl.dims, values.tensors[e.input].shape, e.index, strict=True):
            place = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=values.device)
            if not _mixed(index):
                place = place + values.tensor(index) - index_origin(dim, values.program, values.shape)
            found.append(place.clamp(0, max(0, size - 1)))
        return found

    def number(self, e: Scalar) -> Bounds | None:
        """The least and the greatest value of an integer in a tile; None where they are not known."""
        if e.type is not Type.INT:
            return None
        if not _mixed(e):
            each = self._tiled(self.values.tensor(e))
            return each.amin(-1).amin(-1), each.amax(-1).amax(-1)
        match e:
            case Unary(op="-", operand=x):
                found = self.number(x)
                return None if found is None else (-found[1], -found[0])
            case Binary(op="//", left=a, right=Const(value=int(size))) if size > 0:
                found = self.number(a)
                return None if found is None else (found[0] // size, found[1] // size)
            case Binary(op="+" | "-" as op, left=a, right=b):
                left, right = self.number(a), self.number(b)
                if left is None or right is None:
                    return None
                if op == "+":
                    return left[0] + right[0], left[1] + right[1]
                return left[0] - right[1], left[1] - right[0]
            case Call(function="min" | "max" as name, args=args):
                known = [x for x in map(self.number, args) if x is not None]
                if len(known) < len(args):
                    return None
                join = torch.minimum if name == "min" else torch.maximum
                return reduce(join, [low for low, _ in known]), reduce(join, [high for _, high in known])
            case _:
                return None

    def _tiled(self, x: Tensor) -> Tensor:
        """Values of tokens [.., .., rows or 1, keys or 1] in tiles: [.., .., query tiles, key tiles, rows, keys]."""
        x = x.view((1,) * (4 - x.dim()) + x.shape)
        rows, keys = (self.rows if x.shape[2] > 1 else 1), (self.keys if x.shape[3] > 1 else 1)
        tiles: Tensor = x.unflatten(3, (-1, keys)).unflatten(2, (-1, rows)).transpose(3, 4)
        return tiles


def _leading(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The batch entries and heads of a tensor, as indices of so many dimensions."""
    b, h = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return b.view(-1, *(1,) * (dims - 1)), h.view(-1, *(1,) * (dims - 2))


def _mixed(e: Scalar) -> bool:
    return reads(e, "q") and reads(e, "k")


def _compared(op: str, left: Bounds, right: Bounds) -> Bounds:
    (a, b), (c, d) = left, right
    match op:
        case "<":
            return a < d, b < c
        case "<=":
            return a <= d, b <= c
        case ">":
            return b > c, a > d
        case ">=":
            return b >= c, a >= d
        case _:
            may, must = (a <= d) & (b >= c), (a == b) & (c == d) & (a == c)
            return (may, must) if op == "==" else (~must, ~may)
