"""Makes the plan of a selection in torch operators: score, and choose (`ranking.py`), strip by strip.

Strips are of row classes, so that no array of rows by members is ever whole. Scores are float32 (float64 for float64
tensors), and ties go to the lower index. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.capacity import lags_of
from attndsl.derive import own_inputs
from attndsl.members import Lags
from attndsl.program import reads
from attndsl.runtime.branch_masses import BranchMasses
from attndsl.runtime.call import present_lengths
from attndsl.runtime.groups import Groups, along_lags, class_rows, lag_sums, tile_of_rows, tiled_rows
from attndsl.runtime.masses import leading, pooled, softmax
from attndsl.runtime.ranking import Ranking, of_candidates
from attndsl.runtime.touched import Touched, as_rows
from attndsl.runtime.values import Values
from attndsl.selection import (
    Above,
    Antidiagonal,
    Bound,
    Dot,
    Given,
    Probs,
    Share,
    Vectors,
)
from attndsl.unpack import of_present

if TYPE_CHECKING:
    from attndsl.runtime.select import Selector

# What `probs` reads of a branch: the keys of each of its parts, [B, Hkv, keys, D], and the lse [B, Hq, rows] it had.
State: TypeAlias = tuple[Sequence[Tensor], Tensor]
# Scores of one strip.
STRIP = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass(frozen=True, slots=True)
class Ragged:
    """What differs in a decode: int32 lengths [B], of caches with room for `capacity` tokens, and vectors of members
    that are kept, by their names. `page_table`: where the keys themselves are among these and lie in pages."""

    seq_lens: Tensor
    capacity: int
    members: Mapping[str, Tensor]
    page_table: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """int64 [B, 1, 1, 1], none past the caches."""
        return self.seq_lens.clamp(0, self.capacity).to(torch.int64).view(-1, 1, 1, 1)


class Strips:
    """One call of a selector, by strips of its row classes."""

    def __init__(
        self, of: Selector, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        state: State | None = None, ragged: Ragged | None = None,
    ) -> None:  # fmt: skip
        self.of, self.selection, self.shape, self.device = of, of.selection, of.shape, of.device
        self.q, self.k, self.state, self.ragged = q, k, state, ragged
        # int64 [B, 1, 1, 1], where sequences have lengths of their own.
        self.lengths = None if ragged is None else ragged.lengths
        # How many tokens are present, where not all of a call or a cache are: the same.
        self.present = present_lengths(of.program, of.shape, inputs, self.lengths)
        assert of.among is not None
        self.real = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.candidates = of.among
        self.among = of.among.values(inputs, args, of.tables, self.lengths)
        self.always = None if of.always is None else of.always.values(inputs, args, of.tables, self.lengths)
        self.scale: float | Tensor = self.shape.dim**-0.5 if scale is None else scale
        if scale is None and self.selection.scale is not None:
            self.scale = self.among.tensor(of_present(self.selection.scale, of.program))
        self.ranking = Ranking(self.selection, (self.shape.heads, self.shape.kv_heads), of.budgets)
        self.first = self.shape.first_position(of.program)
        # Of a decode the position of the first row, int64 [B, 1].
        self.first_row: Tensor | None = None
        if ragged is not None:
            self.first_row = ragged.lengths.view(-1, 1) - self.shape.rows
            if isinstance(self.selection.score, Antidiagonal):
                self.k = of.keys_in_order(ragged)
        self.group = self.shape.heads // self.shape.kv_heads
        self.tensors = dict(zip((decl.name for decl in own_inputs(of.program)), inputs, strict=True))
        self.width = of.members
        self.members: Groups | None = None
        of_members = self.selection.members
        if of_members is not None and not isinstance(of_members, Lags):
            self.members = Groups.of(of_members, of.members, self.among, self.present)
            # Which keys a class may choose is asked of each, once for all heads where none differs.
            apart = self.members.label.shape[1] > 1 or any(map(self._apart, self._asked))
            self.width = max(of.members, self.shape.k_len // (1 if apart else self.shape.heads))
        self.tiles: Tensor | None = None
        if self.selection.row_tiles is not None:
            q_len = self.shape.q_len(of.program)
            self.tiles = tiled_rows(self.selection.row_tiles, of.classes, q_len, self.device, self.among)
        self.rows = class_rows(self.selection, self.shape.q_len(of.program), self.tiles)
        # Of a decode for blocks or tiles of rows the classes that may hold some, int64 [B, n]: strips are of these.
        self.of_call: Tensor | None = None
        if self.first_row is not None and self.selection.rows not in (None, 1):
            self.of_call = self._classes_of_call(self.first_row)
        score = self.selection.score
        if isinstance(score, Dot):
            self.keys = self._vectors(score.y, inputs)
        elif isinstance(score, Bound):
            low, high = (self._vectors(y, inputs) for y in (score.low, score.high))
            self.low, self.high = torch.minimum(low, high), torch.maximum(low, high)
        elif isinstance(score, Antidiagonal):
            rows = self.selection.rows
            assert rows is not None
            assert of.groups is not None
            self.groups, self.group_values = of.groups, of.groups.values(inputs, args, of.tables, self.lengths)
            self.width *= (rows // score.stride) * (self.selection.keys // score.stride)
        self.masses: BranchMasses | None = None
        if of.masses and state is not None:
            call = inputs, args, scale, self.real, self.lengths, self.present
            self.masses = BranchMasses(of, self.members, state[0], *call)
            self.width = self.masses.width * (self.selection.rows or self.shape.rows)
        if not of.whole:
            self.width *= self.selection.rows or self.shape.rows
        # What does not differ between heads is chosen once, and for as many row classes at a time.
        self.alike = self._alike()
        if self.alike:
            one = replace(self.selection, share=Share.NONE)
            self.ranking = Ranking(one, (1, 1), None if of.budgets is None else of.budgets[:, :1])
            self.width = -(-self.width // self.shape.heads)

    @property
    def _asked(self) -> list[Touched]:
        return [x for x in (self.of.among, self.of.always) if x is not None]

    def _apart(self, touched: Touched) -> bool:
        """Whether heads have candidates of their own."""
        return reads(touched.condition, "h", "g")

    def _alike(self) -> bool:
        """Whether all heads have the same scores and candidates, and choose as many."""
        selection, score = self.selection, self.selection.score
        if not isinstance(score, Given) or reads(score.value, "h", "g") or not self.of.even or selection.together:
            return False
        # Shared scores are added up, and what is compared with a number would be that of one head.
        if isinstance(selection.rule, Above) and not selection.rule.relative and selection.share is not Share.NONE:
            return False
        members = self.members is not None and self.members.label.shape[1] > 1
        return not members and not any(map(self._apart, self._asked))

    def _classes_of_call(self, first_row: Tensor) -> Tensor:
        """The row classes that hold rows of a decode, in order; one past the last where there are fewer."""
        count, rows = self.of.classes, self.shape.rows
        if self.tiles is None:
            assert self.selection.rows is not None
            block = self.selection.rows
            most = min(count, (rows - 1) // block + 2) if rows else 0
            return first_row.clamp(min=0) // block + torch.arange(most, device=self.device)
        assert self.selection.row_tiles is not None
        position = first_row + torch.arange(rows, device=self.device)
        at = tile_of_rows(self.selection.row_tiles, count, as_rows(position), self.among).flatten(1)
        at = torch.where(position >= 0, at.expand(position.shape), count).sort(-1).values
        again = pad(at[:, 1:] == at[:, :-1], (1, 0), value=False)
        return torch.where(again, count, at).sort(-1).values[:, : min(count, rows)]

    def _vectors(self, v: Vectors, inputs: Sequence[Tensor]) -> Tensor:
        """[B, G or H or 1, members, D] of what the keys hold."""
        if self.ragged is not None:
            return self.of.kept(v, self.ragged, inputs, self.members)
        return self.of.vectors(v, self.k, inputs, self.members)

    # ------------------------------------------------------------------------------------ row classes

    def _positions(self, low: int, high: int, rows: int) -> Tensor:
        """The first position of each of these row classes of `rows` rows: [classes], or [B, classes]."""
        if rows == 1:
            return torch.arange(low, high, device=self.device) + (
                self.first if self.first_row is None else self.first_row
            )
        classes = torch.arange(low, high, device=self.device) if self.of_call is None else self.of_call[:, low:high]
        return classes * rows

    def _present(self, touched: Touched, values: Values, low: int, high: int, rows: int | None) -> Tensor:
        """Whether these row classes have a pair with each member: bool [B or 1, H or 1, high - low, members]."""
        if touched is self.of.groups or self.selection.members is None:
            return self._of_classes(touched, values, low, high, rows)
        if self.members is None:
            return self._lags(touched, values, low, high, rows)
        return self.members.any(self._of_classes(touched, values, low, high, rows))

    def _of_classes(self, touched: Touched, values: Values, low: int, high: int, rows: int | None) -> Tensor:
        """As `_present`, of members that are blocks in a row, or else of their keys."""
        narrow = self.members is not None
        if rows is not None and (self.selection.rows == 1 or self.of.whole):
            return touched.at(values, self._positions(low, high, rows), narrow=narrow)
        if rows is None:
            found = torch.zeros((), dtype=torch.bool, device=self.device).view(1, 1, 1, 1)
            width = -(-self.shape.k_len // touched.keys)
            for start, end in self._row_strips(width // (1 if self._apart(touched) else self.shape.heads)):
                position = self._positions(start - self.first, end - self.first, 1)
                found = found | touched.at(values, position, narrow=narrow).any(2, keepdim=True)
            return found if narrow else found.expand(*found.shape[:3], -(-self.shape.k_len // touched.keys))
        position = self._class_positions(low, high, rows)
        inside = touched.at(values, position, narrow=narrow)
        by_class: Tensor = (inside & as_rows(self._of_call(position)[1])).unflatten(2, (-1, rows))
        return by_class.any(3)

    def _of_call(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of the call stand at these positions, and whether there are such."""
        row = position - (self.first if self.first_row is None else self.first_row)
        return row, (row >= 0) & (row < self.shape.rows) & (position >= 0)

    def _row_strips(self, width: int, low: int | None = None, high: int | None = None) -> Iterator[tuple[int, int]]:
        """The first and last positions of some of the call's rows after the other, which have `width` entries each; of
        those from `low` to before `high`."""
        step = max(1, STRIP[self.device.type] // max(1, self.shape.batch * self.shape.heads * width))
        begin = self.first if low is None else max(self.first, low)
        end = self.first + self.shape.rows
        end = end if high is None else min(end, high)
        for start in range(begin, end, step):
            yield start, min(start + step, end)

    def _class_positions(self, low: int, high: int, rows: int) -> Tensor:
        """The positions of all rows of these row classes, one class after another, [rows] or [B, rows]; -1 for a row
        that a tile lacks."""
        if self.tiles is not None:
            return self.tiles[low:high].flatten() if self.of_call is None else self._of_tiles(low, high).flatten(1)
        position = torch.arange(low * rows, high * rows, device=self.device)
        if self.of_call is None or self.rows is None:
            return position
        # Classes that follow one another in the call do so in the sequence, groups of their rows too.
        return self.of_call[:, position // self.rows] * (self.selection.rows or 1) + position % self.rows

    def _of_tiles(self, low: int, high: int) -> Tensor:
        """The rows of the tiles of a decode, int64 [B, high - low, rows]: -1 of one past the last."""
        assert self.tiles is not None and self.of_call is not None
        return pad(self.tiles, (0, 0, 0, 1), value=-1)[self.of_call[:, low:high]]

    def _lags(self, touched: Touched, values: Values, low: int, high: int, rows: int | None) -> Tensor:
        """Which diagonals these row classes have a pair on."""
        size, count, heads = self.selection.keys, self.of.members, (self.shape.heads, self.shape.kv_heads)
        closed = None if self.tiles is not None else lags_of(touched.program, heads, size, self.selection.rows)
        if closed is not None:
            of_class = torch.zeros(1, dtype=torch.int64, device=self.device)
            of_class = of_class if rows is None else self._positions(low, high, rows) // rows
            k = torch.arange(count, device=self.device).view(1, 1, 1, -1)
            start = max(0, self.first) if self.first_row is None else self.first_row.clamp(min=0).view(-1, 1, 1, 1)
            inside = values.at(q=as_rows(of_class), k=k, start=start).tensor(closed)
            lead = inside.shape[:2] if inside.dim() == 4 else (1, 1)
            return inside.expand(*lead, high - low, count)
        if rows is not None:
            single = self.selection.rows == 1
            position = self._positions(low, high, 1) if single else self._class_positions(low, high, rows)
            inside = touched.at(values, position) & as_rows(self._of_call(position)[1])
            found = along_lags(inside.expand(*inside.shape[:2], position.shape[-1], -1), position, size, count)
            of_classes: Tensor = found.any(4).unflatten(2, (-1, rows))
            return of_classes.any(3)
        found = torch.zeros(1, 1, count, dtype=torch.bool, device=self.device)
        for start, end in self._row_strips(self.shape.k_len):
            inside = touched.at(values, self._positions(start - self.first, end - self.first, 1))
            inside = inside.expand(*inside.shape[:2], end - start, -1).to(torch.int8)
            found = found | (self._along_lags(inside, start, largest=True) > 0)
        return found.unsqueeze(2)

    def _along_lags(self, x: Tensor, start: int, largest: bool) -> Tensor:
        """[B, H, rows, Nk] of the call's rows from position `start` on (of a decode of the longest sequence) along
        diagonals."""
        size, count = self.selection.keys, self.of.members
        if self.first_row is None:
            return lag_sums(x, start, size, count, largest)
        position = self._positions(start - self.first, start - self.first + x.shape[2], 1)
        lags = along_lags(x, position, size, count)
        found: Tensor = lags.amax(4).amax(2) if largest else lags.to(torch.float64).sum((2, 4))
        return found.to(x.dtype)

    def _rows(self, x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Vectors [B, H, rows, D] of the call's rows by class, [B, H, high - low, rows of a class, D], and which of
        them are there, [B or 1, high - low, rows of a class]."""
        rows, have = self.rows, self.shape.rows
        if rows is None:
            return x[:, :, None], self._there(self._positions(0, have, 1))[:, None]
        if self.selection.rows == 1:
            return x[:, :, low:high, None], self._there(self._positions(low, high, 1))[..., None]
        position = self._class_positions(low, high, rows)
        row, here = self._of_call(position)
        here, row = here & self._there(position), row.clamp(0, max(0, have - 1))
        if not have:
            picked = x.new_zeros(*x.shape[:2], row.shape[-1], x.shape[3])
        elif row.dim() == 1:
            picked = x[:, :, row]
        else:
            picked = x.gather(2, row[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return picked.unflatten(2, (-1, rows)), here.unflatten(1, (-1, rows))

    def _there(self, position: Tensor) -> Tensor:
        """Whether a sequence has rows at these positions, [rows] or [B, rows]: bool [B or 1, rows]."""
        position = _of_batch(position)
        if self.present is None or self.of.program.align_start:
            return position >= 0
        return (position >= 0) & (position < self.present.view(-1, 1))

    def _queries(self, v: Vectors, low: int, high: int) -> Tensor:
        """[B, Hq or 1, high - low, D]: NaN where a class has no rows."""
        if v.source != "Q":
            decl = self.of.program.input(v.source)
            x, along = leading(decl, self.tensors[v.source]), decl.dims[-2]
            x = x.expand(-1, -1, self.shape.rows if along.block == 1 else self.of.classes, -1)
            if along.block > 1 and self.of_call is not None:
                at = self.of_call[:, low:high].clamp(max=x.shape[2] - 1)
                x = x.expand(len(at), -1, -1, -1)
                return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])).to(self.real)
            return x[:, :, low:high].to(self.real)
        x, here = self._rows(self.q, low, high)
        return pooled(x.to(self.real), here, v.pool)

    # ---------------------------------------------------------------------------------------- scores

    def _dots(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, H or 1, R, D] . y [B, H or G or 1, M, D] as [B, H, R, M]."""
        x = x.expand(self.shape.batch, self.shape.heads, -1, -1)
        if y.shape[1] == self.shape.kv_heads != self.shape.heads:
            x, y = x.unflatten(1, (-1, self.group)), y.unsqueeze(2)
        dots: Tensor = x @ y.transpose(-1, -2)
        return dots.flatten(1, -3)

    def scores(self, low: int, high: int) -> Tensor:
        """[B, H, high - low, members], of whatever is no candidate too."""
        score = self.selection.score
        match score:
            case Dot(x=x):
                return self.scale * self._dots(self._queries(x, low, high), self.keys)
            case Bound(x=x):
                queries = self._queries(x, low, high)
                above = self._dots(queries.clamp(min=0), self.high) + self._dots(queries.clamp(max=0), self.low)
                return self.scale * above
            case Antidiagonal(stride=stride):
                return self._antidiagonal(stride, low, high)
            case Probs(largest=largest):
                return self._probabilities(low, high, largest)
            case Given(value=value):
                rows = self.selection.rows
                members = torch.arange(self.of.members, device=self.device).view(1, 1, 1, -1) * self.selection.keys
                if self.members is not None:
                    members = self.members.first.unsqueeze(2)
                # That of all rows begins with the first token, whatever rows the call holds.
                first = torch.zeros(1, dtype=torch.int64, device=self.device)
                first = first if rows is None else self._positions(low, high, rows)
                if self.tiles is not None:
                    tiles = self.tiles[low:high] if self.of_call is None else self._of_tiles(low, high)
                    first = tiles[..., 0].clamp(min=0)
                here = self.among.at(q=as_rows(first), k=members)
                return here.tensor(of_present(value, self.of.program)).to(self.real)
            case _:
                assert_never(score)

    def _probabilities(self, low: int, high: int, largest: bool) -> Tensor:
        """The masses of a branch's keys as those of members, over each class's rows."""
        rows = self.rows
        assert self.state is not None and self.masses is not None
        if rows is None:
            return self._of_all_rows(self.masses, self.state[1], largest)
        x, here = self._rows(self.q, low, high)
        lse, _ = self._rows(self.state[1].to(self.real).unsqueeze(-1), low, high)
        single = self.selection.rows == 1
        position = self._positions(low, high, 1) if single else self._class_positions(low, high, rows)
        flat = x.flatten(2, 3), lse.flatten(2, 3), position, here.flatten(1)
        of_rows: Tensor = self.masses.of_members(*flat, largest).unflatten(2, (high - low, -1))
        return of_rows.amax(3) if largest else of_rows.sum(3)

    def _of_all_rows(self, masses: BranchMasses, lse: Tensor, largest: bool) -> Tensor:
        """The same of the class of all rows, strip by strip: of those rows that the branch lets see."""
        shape = self.shape
        found = torch.zeros(shape.batch, shape.heads, self.of.members, dtype=self.real, device=self.device)
        for start, end in self._row_strips(masses.width, *self.of.seeing):
            at = slice(start - self.first, end - self.first)
            position = self._positions(at.start, at.stop, 1)
            rows = self.q[:, :, at], lse[:, :, at, None], position, self._there(position)
            if masses.diagonals:
                part = self._along_lags(masses.of_tokens(*rows, largest), start, largest)
            else:
                of_rows = masses.of_members(*rows, largest)
                part = of_rows.amax(2) if largest else of_rows.sum(2)
            found = torch.maximum(found, part) if largest else found + part
        return found.unsqueeze(2)

    def _antidiagonal(self, stride: int, low: int, high: int) -> Tensor:
        rows, keys, k_len = self.selection.rows, self.selection.keys, self.shape.k_len
        assert rows is not None
        x, here = self._rows(self.q, low, high)
        x = torch.where(here[:, None, :, :, None], x, 0).to(self.real)
        x = x.flatten(2, 3).unflatten(2, (-1, stride)).flatten(3)
        tokens = torch.arange(k_len, device=self.device).view(1, 1, -1, 1)
        k = self.k if self.present is None else torch.where(tokens < self.present, self.k, 0)
        y = pad(k, (0, 0, 0, -k_len % stride)).unflatten(2, (-1, stride)).flip(3).flatten(3).to(self.real)
        logits = self._dots(x, y) * (self.scale / stride)
        wide = rows // stride
        inside = self._present(self.groups, self.group_values, low * wide, high * wide, stride)
        # A group without a row gives nothing; of a class that ends early `_present` tells for all of its groups.
        inside = inside & here.flatten(1).unflatten(1, (-1, stride)).any(2)[:, None, :, None]
        mass = softmax(logits, inside.expand(logits.shape))
        tall = keys // stride
        mass = pad(mass, (0, -mass.shape[3] % tall)).unflatten(3, (-1, tall)).sum(4)
        of_classes: Tensor = mass.unflatten(2, (-1, wide))
        return of_classes.sum(3)

    # ---------------------------------------------------------------------------------------- choice

    def levels(self, low: int, high: int, step: int) -> Tensor:
        """uint8 [B, Hq, high - low, M] of these row classes: 0 where a member is out. step: of a strip's classes."""
        shape = (self.shape.batch, self.shape.heads, high - low, self.of.members)
        if 0 in shape:
            return torch.zeros(shape, dtype=torch.uint8, device=self.device)
        strips = [self._finite(at, min(at + step, high)) for at in range(low, high, step)]
        whole = strips[0] if len(strips) == 1 else (torch.cat(x, 2) for x in zip(*strips, strict=True))
        return self.ranking.decided(*whole)

    def chosen(self, low: int, high: int, heads: int, room: int | None) -> Tensor:
        """The plan of these row classes, for so many heads, as `Ranking.chosen` has it."""
        lead = (self.shape.batch, heads, high - low)
        if not self.shape.heads or 0 in (*lead, self.of.members):
            if room is None:
                return torch.zeros(*lead, self.of.members, dtype=torch.uint8, device=self.device)
            return torch.full((*lead, room), -1, dtype=torch.int32, device=self.device)
        found = self.ranking.chosen(*self._scored(low, high), 1 if self.alike else heads, room)
        return found.expand(-1, heads, -1, -1)

    def _finite(self, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `_scored`, of candidates alone."""
        raw, candidates, forced = self._scored(low, high)
        return of_candidates(raw, candidates), candidates, forced

    def _scored(self, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of these row classes the scores, of whatever is no candidate too, which are candidates and which forced."""
        shape = (self.shape.batch, 1 if self.alike else self.shape.heads, high - low, self.of.members)
        candidates = self._present(self.candidates, self.among, low, high, self.rows)
        forced = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=self.device)
        if self.of.always is not None and self.always is not None:
            forced = self._present(self.of.always, self.always, low, high, self.rows) & candidates
        return self.scores(low, high).expand(shape), candidates.expand(shape), forced.expand(shape)


def _of_batch(x: Tensor) -> Tensor:
    """[rows], or [B, rows] where sequences differ, as [B or 1, rows]."""
    return x[None] if x.dim() == 1 else x
