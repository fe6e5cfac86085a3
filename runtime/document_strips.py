"""What a selection of a packed call chooses for rows of documents of one kind, strip by strip of its row classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.runtime.document_blocks import BlockSums, Kind
from attndsl.runtime.document_members import InBlocks, InGroups, Members, Rows
from attndsl.runtime.document_vectors import BlockVectors, GroupVectors, MemberVectors, picked
from attndsl.runtime.groups import Groups
from attndsl.runtime.masses import leading, softmax
from attndsl.runtime.ranking import listed, of_candidates
from attndsl.runtime.runs import document_entries
from attndsl.runtime.strips import STRIP
from attndsl.runtime.touched import Touched
from attndsl.runtime.values import Values
from attndsl.selection import Antidiagonal, Bound, Dot, Given, Probs, Share, Vectors

if TYPE_CHECKING:
    from attndsl.runtime.document_select import Call, Classes


class OfKind:
    """What is chosen in one call for the rows of documents of one kind."""

    def __init__(self, call: Call, kind: Kind) -> None:
        self.call, self.of, self.kind, self.shape = call, call.of, kind, call.shape
        self.selection, self.keys = call.of.selection, call.of.selection.keys
        self.documents, self.tokens = kind.documents, call.shape.k_len
        # In a document of few members rows are given what they need of these, else rows and members are multiplied out.
        self.few = kind.most <= call.of.short
        self.members: Members = call.members(kind)
        self.holds = kind.holds
        at = call.position.clamp(min=0)
        self.classes: Classes | None = None
        there = self.holds.gather(-1, at) & (call.position >= 0)
        if self.selection.rows == 1:
            # The token that a class begins with, and whether there is one.
            self.begin, self.exist = at, there
            self.number = at
        else:
            self.classes = call.classes(kind)
            self.begin, self.exist = self.classes.begin, self.classes.exist
            # The class of each of the call's rows.
            self.number = torch.where(there, self.classes.of_token.gather(-1, at), self.classes.room)

    def _count(self, size: int) -> int:
        """How many blocks of so many tokens a document may have."""
        return InBlocks(self.kind, size).count

    def _first(self, at: slice) -> Tensor:
        """The first tokens of the documents of some row classes, [B, n]."""
        return self.documents.first.gather(-1, self.begin[:, at])

    # ----------------------------------------------------------------------------------------- plans

    def write(self, plan: Tensor) -> None:
        """Write what is chosen."""
        classes, share = self.begin.shape[1], self.shape.heads // plan.shape[1]
        step = max(1, STRIP[plan.device.type] // (self.shape.batch * self.shape.heads * self._width))
        strips = [slice(low, min(low + step, classes)) for low in range(0, classes, step)]
        room = plan.shape[3] if self.selection.bounded else None
        # A class that does not exist goes to a place of its own, which is dropped.
        made = plan if self.classes is None else torch.cat((plan, plan[:, :, :1]), 2)
        if self.selection.together:
            raw, candidates, forced = (torch.cat(x, 2) for x in zip(*map(self._scored, strips), strict=True))
            # Of a document the first class that is of it.
            documents = self._first(slice(0, classes))
            documents = torch.searchsorted(documents, documents)
            level = self.of.ranking.decided(raw, candidates, forced, documents)[:, ::share]
            self._put(made, level if room is None else listed(level, room), slice(0, classes))
        else:
            for at in strips:
                self._put(made, self.of.ranking.chosen(*self._scored(at), plan.shape[1], room), at)
        if made is not plan:
            plan.copy_(made[:, :, :-1])

    def _put(self, plan: Tensor, chosen: Tensor, at: slice) -> None:
        """Write what some row classes choose of their columns, listed or in bytes."""
        found = self._named(chosen, at) if self.selection.bounded else self._mapped(chosen, at, plan.shape[3])
        if self.classes is None:
            plan[:, :, at] = torch.where(self.exist[:, None, at, None], found, plan[:, :, at])
            return
        to = torch.where(self.exist[:, at], self.classes.place[:, at], plan.shape[2] - 1)
        plan.scatter_(2, to[:, None, :, None].expand(found.shape), found)

    def _numbers(self, at: slice, heads: int) -> Tensor | None:
        """The members that the columns of some row classes are, for so many heads; None: a member each."""
        number = None if self._by_number else self.members.numbers(self._first(at))
        if number is None:
            return None
        return number.expand(-1, self.shape.heads, -1, -1)[:, :: self.shape.heads // heads]

    def _named(self, columns: Tensor, at: slice) -> Tensor:
        """Columns in increasing order, -1 after them, as members."""
        number = self._numbers(at, columns.shape[1])
        if number is None:
            return columns
        found = number.gather(-1, columns.clamp(min=0).to(torch.int64))
        return torch.where(columns >= 0, found, -1).to(torch.int32)

    @property
    def _width(self) -> int:
        """What is held of each row class."""
        width = max(self.members.width, self.members.count, self._most_numbers if self._by_number else 0)
        if isinstance(self.selection.score, Dot | Bound):
            width = max(width, self._low.width)
        of_rows = self.classes is None and isinstance(self.selection.score, Probs)
        return max(width, self._mass_width) if of_rows else width

    def _mapped(self, level: Tensor, at: slice, width: int) -> Tensor:
        """What columns get, [B, H', n, columns], as what each of so many members gets."""
        number = self._numbers(at, level.shape[1])
        if number is None:
            return pad(level, (0, width - level.shape[3]))
        found = torch.zeros(*level.shape[:3], width + 1, dtype=torch.uint8, device=level.device)
        return found.scatter_(-1, number.clamp(max=width), level)[..., :width]

    # ------------------------------------------------------------------------------------ candidates

    def _scored(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of some row classes the scores of candidates, which these are, and which are forced."""
        shape = (self.shape.batch, self.shape.heads, at.stop - at.start, self.members.count)
        candidates = self._inside(at).expand(shape)
        forced = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=candidates.device).expand(shape)
        if self.of.always is not None:
            forced = self._forced(at).expand(shape) & candidates
        raw = self._scores(at).expand(shape)
        raw = of_candidates(raw, candidates)
        if self._by_number:
            number = self.members.numbers(self._first(at))
            assert number is not None
            most = self._most_numbers
            number = number.clamp(max=most).expand(shape)
            raw, candidates, forced = (_placed(x, number, most) for x in (raw, candidates, forced))
        return raw, candidates, forced

    @property
    def _by_number(self) -> bool:
        """Whether columns stand at their members' numbers: of heads that share, each has keys of other members."""
        return isinstance(self.members, InGroups) and self.members.apart and self.selection.share is not Share.NONE

    @property
    def _most_numbers(self) -> int:
        """How many numbers the members of a document may have."""
        return self.of.numbers(min(self.kind.most, self.tokens))

    def _inside(self, at: slice) -> Tensor:
        if self.classes is None:
            return self.members.touched(self.of.among.condition, self.call.among, self._rows(at))
        return self._candidates[:, :, at]

    def _forced(self, at: slice) -> Tensor:
        assert self.of.always is not None and self.call.always is not None
        if self.classes is None:
            return self.members.touched(self.of.always.condition, self.call.always, self._rows(at))
        return self._always[:, :, at]

    def _rows(self, at: slice) -> Rows:
        """Some of the call's rows."""
        position = self.call.position[:, at].clamp(min=0)
        first, end = (x.gather(-1, position) for x in (self.documents.first, self.documents.end))
        return Rows(position, first, end, self.holds.gather(-1, position) & (self.call.position[:, at] >= 0))

    @cached_property
    def _candidates(self) -> Tensor:
        assert self.classes is not None
        if self.of.among_classes is not None and self.call.among_classes is not None:
            return self._of_whole_classes(self.of.among_classes, self.call.among_classes)
        return self._of_classes(self.members, self.of.among, self.call.among, self.number, self.classes.sums)

    @cached_property
    def _always(self) -> Tensor:
        assert self.classes is not None and self.of.always is not None and self.call.always is not None
        if self.of.always_classes is not None and self.call.always_classes is not None:
            return self._of_whole_classes(self.of.always_classes, self.call.always_classes)
        return self._of_classes(self.members, self.of.always, self.call.always, self.number, self.classes.sums)

    def _of_whole_classes(self, touched: Touched, values: Values) -> Tensor:
        """As `_of_classes`, asked of classes whose rows the call holds all of: of the first row of each."""
        assert self.classes is not None
        width = max(self.members.width, self.members.count)
        step = max(1, STRIP[self.call.device.type] // max(1, self.shape.batch * self.shape.heads * width))
        found = []
        for low in range(0, self.classes.room, step):
            at = slice(low, min(low + step, self.classes.room))
            begin = self.begin[:, at]
            first, end = (x.gather(-1, begin) for x in (self.documents.first, self.documents.end))
            rows = Rows(begin, first, end, self.exist[:, at])
            found.append(self.members.touched(touched.condition, values, rows))
        return torch.cat(found, 2)

    def _of_classes(
        self, members: Members, touched: Touched, values: Values, number: Tensor, sums: Callable[[bool], BlockSums]
    ) -> Tensor:
        """Whether classes of the call's rows, `number` telling which, have a pair with columns of these members."""
        found = sums(True)
        for at in self._row_strips(max(members.width, members.count)):
            inside = members.touched(touched.condition, values, self._rows(at)).to(torch.int32)
            found.add(inside, number[:, at])
        return found.found > 0

    def _row_strips(self, width: int) -> Iterator[slice]:
        rows, strip = self.shape.rows, STRIP[self.call.device.type]
        step = max(1, strip // max(1, self.shape.batch * self.shape.heads * width))
        for low in range(0, rows, step):
            yield slice(low, min(low + step, rows))

    # ---------------------------------------------------------------------------------------- scores

    def _scores(self, at: slice) -> Tensor:
        score, begin = self.selection.score, self.begin[:, at]
        match score:
            case Dot(x=x):
                return self._dots(self._queries(x, at), self._low, at) * self.call.scale(begin)
            case Bound(x=x):
                rows = self._queries(x, at)
                above = self._dots(rows.clamp(min=0), self._high, at)
                return (above + self._dots(rows.clamp(max=0), self._low, at)) * self.call.scale(begin)
            case Probs() | Antidiagonal():
                return self._rows_masses(at) if self.classes is None else self._masses[:, :, at]
            case Given():
                assert self.of.value is not None
                here = self.call.among.at(q=begin[:, None, :, None], k=self.members.first(self._first(at)))
                return here.tensor(self.of.value).to(self.call.real)
            case _:
                assert_never(score)

    @cached_property
    def _low(self) -> MemberVectors:
        score = self.selection.score
        assert isinstance(score, Dot | Bound)
        return self._vectors(score.y if isinstance(score, Dot) else score.low)

    @cached_property
    def _high(self) -> MemberVectors:
        score = self.selection.score
        assert isinstance(score, Bound)
        return self._vectors(score.high)

    def _vectors(self, v: Vectors) -> MemberVectors:
        if isinstance(self.members, InGroups):
            return GroupVectors(self.members, self.call.grouped(v, self.members.groups))
        return BlockVectors(self.kind.blocks(self.keys), self.call.vectors(v), self.few)

    def _queries(self, v: Vectors, at: slice) -> Tensor:
        """[B, Hq or 1, classes, D]: NaN where a class has no rows."""
        if v.source != "Q":
            decl = self.of.program.input(v.source)
            x = leading(decl, self.call.inputs[v.source]).to(self.call.real)
            if self.classes is None:
                return x.expand(-1, -1, self.shape.rows, -1)[:, :, at]
            x = x.expand(self.shape.batch, -1, self.tokens, -1)
            number, _ = document_entries(self.call.ids, self.classes.rows, self.classes.rows)
            return picked(x, number.number.to(torch.int64).gather(-1, self.begin[:, at]))
        if self.classes is None:
            return self.call.q[:, :, at].to(self.call.real)
        return self._pooled[:, :, at]

    @cached_property
    def _pooled(self) -> Tensor:
        """The queries of all classes, pooled."""
        assert self.classes is not None
        score = self.selection.score
        assert isinstance(score, Dot | Bound) and score.x.pool is not None
        groups = Groups.labelled(self.number.unsqueeze(1), self.classes.room)
        return groups.pooled(self.call.q.to(self.call.real), score.x.pool, self.of.key)

    def _dots(self, x: Tensor, of: MemberVectors, at: slice) -> Tensor:
        """Vectors of some row classes [B, H or 1, n, D] times those of their documents' members: [B, H, n, columns]."""
        return of.dots(x.expand(self.shape.batch, self.shape.heads, -1, -1), self._first(at), self.members.count)

    # ---------------------------------------------------------------------------------------- masses

    @cached_property
    def _masses(self) -> Tensor:
        """Those of all classes."""
        assert self.classes is not None
        score = self.selection.score
        if isinstance(score, Antidiagonal):
            return self._antidiagonal(score.stride)
        assert isinstance(score, Probs)
        found = self.classes.sums(score.largest)
        for at in self._row_strips(max(self._mass_width, self.members.width, self.members.count)):
            found.add(self._rows_masses(at), self.number[:, at])
        return found.found

    @property
    def _mass_width(self) -> int:
        """What is held of each row to find its masses."""
        _, stride = self._entries
        # Where a document has few, each row is given the vectors of its own.
        return self._count(stride) * self.shape.dim if self.few else self.kind.blocks(stride).room

    @property
    def _entries(self) -> tuple[int, int]:
        """The size and the stride of the branch's entries."""
        assert isinstance(self.selection.score, Probs)
        view = self.of.program.named(self.selection.score.branch).parts[0].view
        return (1, 1) if view is None else (view.size, view.stride)

    @cached_property
    def _branch_keys(self) -> BlockVectors:
        assert self.call.state is not None
        size, stride = self._entries
        entries, _ = document_entries(self.call.ids, size, stride)
        x = self.call.state[0][0].to(self.call.real)
        return BlockVectors(self.kind.blocks(stride), self.call.numbered(x, entries.number), self.few)

    def _rows_masses(self, at: slice) -> Tensor:
        """exp(logit - lse) of the branch's keys, given to members by their shares of tokens: [B, H, rows, members]."""
        call, mass, values, state = self.call, self.of.mass, self.call.mass, self.call.state
        assert isinstance(self.selection.score, Probs) and mass is not None and values is not None and state is not None
        (size, stride), rows = self._entries, self._rows(at)
        position, first, end = rows.position, rows.first, rows.end
        logits = self._branch_keys.dots(call.q[:, :, at].to(call.real), first, self._count(stride))
        number, _ = document_entries(call.ids, size, stride)
        nth = torch.arange(logits.shape[3], device=logits.device)
        index = number.number.to(torch.int64).gather(-1, first)[..., None] + nth
        q, own = position[:, None, :, None], mass.program.only.scale
        scale: float | Tensor = self.shape.dim**-0.5 if call.given_scale is None else call.given_scale
        if call.given_scale is None and own is not None:
            scale = values.at(q=q).tensor(own)
        logits = logits * scale
        here = values.at(q=q, k=index.clamp(max=self.tokens - 1)[:, None], s=logits)
        if mass.logit is not None:
            logits = here.tensor(mass.logit).to(call.real)
        exists = (first[..., None] + nth * stride < end[..., None]) & rows.there[..., None]
        seen = here.tensor(mass.seen) & exists[:, None]
        lse = state[1][:, :, at, None].to(call.real)
        found = torch.where(seen, torch.exp(logits - lse), 0).nan_to_num(0.0, posinf=0.0)
        return self.members.given(found, self._entries, rows, self.selection.score.largest)

    def _antidiagonal(self, stride: int) -> Tensor:
        """Groups of `stride` rows and keys: a softmax over each row group's candidates, summed over classes and
        members."""
        call, groups = self.call, self.kind.blocks(stride)
        assert self.classes is not None and self.of.groups is not None and call.groups is not None
        at = call.position.clamp(min=0)
        there = self.holds.gather(-1, at) & (call.position >= 0)
        number = torch.where(there, groups.number.gather(-1, at), groups.room)
        in_groups = InBlocks(self.kind, stride)
        inside = self._of_classes(
            in_groups, self.of.groups, call.groups, number, lambda largest: BlockSums(groups.room, stride, largest)
        )
        y = BlockVectors(groups, lambda token: self._concatenated(call.k, token, stride, flip=True), self.few)
        found = BlockSums(self.classes.room, self.classes.rows // stride, largest=False)
        width = self._count(stride) * stride * self.shape.dim if self.few else groups.room
        step = max(1, STRIP[call.device.type] // (self.shape.batch * self.shape.heads * width))
        for low in range(0, groups.room, step):
            part = slice(low, min(low + step, groups.room))
            token = groups.place[:, part].clamp(max=self.tokens - 1)
            x = self._concatenated(call.q, token, stride, rows=True)
            first = self.documents.first.gather(-1, token)
            logits = y.dots(x.expand(self.shape.batch, self.shape.heads, -1, -1), first, in_groups.count)
            logits = logits * (call.scale(token) / stride)
            mass = softmax(logits, inside[:, :, part].expand(logits.shape))
            tall = self.keys // stride
            count = self.members.count
            mass = pad(mass, (0, count * tall - mass.shape[3])).unflatten(3, (count, tall)).sum(4)
            exists = groups.place[:, part] < self.tokens
            found.add(mass, torch.where(exists, self.classes.of_token.gather(-1, token), self.classes.room))
        return found.found

    def _concatenated(self, x: Tensor, token: Tensor, size: int, flip: bool = False, rows: bool = False) -> Tensor:
        """[B, H, n, size * D] of the tokens from each of [B, n] on that its document has, one after the other (`flip`:
        the last first), zeros for others. rows: x [B, H, .., D] holds the rows of the call."""
        each = torch.arange(size, device=token.device)
        at = token[..., None] + (each.flip(0) if flip else each)
        there = at < self.documents.end.gather(-1, token)[..., None]
        if rows:
            at = at - self.call.first_row[..., None]
            there = there & (at >= 0) & (at < self.shape.rows)
        at = at.clamp(0, x.shape[2] - 1).flatten(1)
        found = torch.where(there.flatten(1)[:, None, :, None], picked(x, at), 0).to(self.call.real)
        whole: Tensor = found.unflatten(2, (-1, size)).flatten(3)
        return whole


def _placed(x: Tensor, number: Tensor, most: int) -> Tensor:
    """What columns have [B, H, n, columns] at these of so many places, `most` for none; nothing elsewhere."""
    empty = -torch.inf if x.is_floating_point() else 0
    found = x.new_full((*x.shape[:3], most + 1), empty)
    return found.scatter_(-1, number, x)[..., :most]


__all__ = ["OfKind"]
