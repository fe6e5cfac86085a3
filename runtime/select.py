"""Makes the plan of a selection on its device: represent, score, normalise, sum over heads, choose.

Here in torch operators, strip by strip of row classes, so that no array of rows by members is ever whole, and without
waiting for the device. Scores are float32 (float64 for float64 tensors), and ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.capacity import budgets, capacity
from attndsl.diagnostics import error
from attndsl.plans import plan_heads
from attndsl.program import Axis, CallShape, Inter, Program, Set
from attndsl.runtime.engine import table_tensor
from attndsl.runtime.masses import floor_share, normalised, pooled, softmax
from attndsl.runtime.touched import Touched
from attndsl.runtime.values import Values
from attndsl.selection import (
    Above,
    Antidiagonal,
    Bound,
    Cover,
    Dot,
    Forced,
    Given,
    Levels,
    Normalise,
    Probs,
    Selection,
    Share,
    Top,
    Vectors,
)

# Scores of one strip.
_STRIP = {"cpu": 1 << 20, "cuda": 1 << 24}
# The largest number that a score may be: infinity would make a softmax of NaN.
_LARGEST = 3.0e38
# Rows for which heads may choose single tokens each on their own.
MAX_TOKEN_ROWS = 16


@dataclass(slots=True)
class Selector:
    """The plan of one selection for one kind of call."""

    program: Program
    selection: Selection
    shape: CallShape
    device: torch.device
    # The call's inputs, or tensors of their shapes and dtypes.
    given: Sequence[Tensor] = ()
    capacity: int = field(init=False)
    _budgets: Tensor | None = field(init=False)
    _tables: dict[str, Tensor] = field(init=False)
    _among: Touched = field(init=False)
    _always: Touched | None = field(init=False)
    _whole: bool = field(init=False)

    def __post_init__(self) -> None:
        """Raises `PatternError` for what would be slow in silence (A570), or where no list is long enough (A571)."""
        selection, shape = self.selection, self.shape
        if selection.keys == selection.rows == 1 and selection.share is Share.NONE and shape.rows > MAX_TOKEN_ROWS:
            raise error(
                "A570", f"each of {shape.heads} heads chooses single tokens for each of {shape.rows} rows",
                selection.span, help="write `share = group` or `share = heads`, larger members, or `per = rows(64)`",
            )  # fmt: skip
        if isinstance(selection.score, Probs):
            raise error(
                "A575", f"selecting by the probabilities of `{selection.score.branch}` is not yet supported in a call",
                selection.span, help="hand in a plan: `plans={…}`",
            )  # fmt: skip
        heads = (shape.heads, shape.kv_heads)
        self.capacity = capacity(self.program, selection, heads, self.members)
        self._budgets = None
        if isinstance(selection.rule, Top) and selection.rule.count is not None:
            found = budgets(self.program, selection.rule.count, heads)
            self._budgets = torch.tensor(found, device=self.device).view(1, -1, 1, 1)
        self._tables = {table.name: table_tensor(table, self.device) for table in self.program.tables}
        # Where the call holds every row, its row classes are whole.
        self._whole = selection.rows is not None and shape.rows == shape.q_len(self.program)
        self._among = self._touched(selection.among)
        always = selection.always
        self._always = None if always is None else self._touched(Inter((selection.among, always)))

    def _touched(self, pattern: Set, rows: int | None = None, keys: int | None = None) -> Touched:
        rows = self.selection.rows if rows is None else rows
        return Touched.of(
            self.program, pattern, (rows or 1) if self._whole else 1, keys or self.selection.keys, self.shape,
            self.device, self.given,
        )  # fmt: skip

    @property
    def members(self) -> int:
        return -(-self.shape.k_len // self.selection.keys)

    @property
    def classes(self) -> int:
        return _classes(self.program, self.selection, self.shape)

    # ----------------------------------------------------------------------------------------- plans

    def __call__(
        self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None = None,
        masses: Mapping[str, Tensor] = {},
    ) -> Tensor:  # fmt: skip
        """The plan: int32 [B, H', R, C], or uint8 [B, H', R, M] where nothing bounds it.

        scale: in the place of the attention's own. masses: the probabilities of branches, summed over members.
        """
        call = _Call(self, q, k, inputs, args, scale, masses)
        plan = empty_plan(self.program, self.selection, self.shape, self.device)
        heads = plan.shape[1]
        step = max(1, _STRIP[self.device.type] // max(1, self.shape.batch * self.shape.heads * call.width))
        for low in range(0, self.classes, step):
            high = min(low + step, self.classes)
            level = call.levels(low, high)[:, :: self.shape.heads // heads]
            plan[:, :, low:high] = self._listed(level) if self.selection.bounded else level
        return plan

    def _listed(self, level: Tensor) -> Tensor:
        """Members in increasing order, -1 after them."""
        index = torch.arange(self.members, device=self.device, dtype=torch.int32)
        found = torch.where(level > 0, index, self.members).sort(-1).values[..., : self.capacity]
        return pad(torch.where(found < self.members, found, -1), (0, self.capacity - found.shape[-1]), value=-1)


class _Call:
    """One call of a selector."""

    def __init__(
        self, of: Selector, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        masses: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.of, self.selection, self.shape, self.device = of, of.selection, of.shape, of.device
        self.q, self.k, self.masses = q, k, masses
        self.real = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.among = of._among.values(inputs, args, of._tables)
        self.always = None if of._always is None else of._always.values(inputs, args, of._tables)
        self.scale: float | Tensor = self.shape.dim**-0.5 if scale is None else scale
        if scale is None and self.selection.scale is not None:
            self.scale = self.among.tensor(self.selection.scale)
        self.first = self.shape.first_position(of.program)
        self.group = self.shape.heads // self.shape.kv_heads
        self.tensors = dict(zip((decl.name for decl in of.program.inputs), inputs, strict=True))
        self.width = of.members
        score = self.selection.score
        if isinstance(score, Dot):
            self.keys = self._members(score.y)
        elif isinstance(score, Bound):
            low, high = self._members(score.low), self._members(score.high)
            self.low, self.high = torch.minimum(low, high), torch.maximum(low, high)
        elif isinstance(score, Antidiagonal):
            rows = self.selection.rows
            assert rows is not None
            self.groups = of._touched(self.selection.among, score.stride, score.stride)
            self.group_values = self.groups.values(inputs, args, of._tables)
            self.width *= (rows // score.stride) * (self.selection.keys // score.stride)
        if not of._whole:
            self.width *= self.selection.rows or self.shape.rows

    # ------------------------------------------------------------------------------------ row classes

    def _positions(self, low: int, high: int, rows: int) -> Tensor:
        """The first position of each of these row classes of `rows` rows."""
        start = self.first if rows == 1 else 0
        return torch.arange(low, high, device=self.device) * rows + start

    def _present(self, touched: Touched, values: Values, low: int, high: int, rows: int | None) -> Tensor:
        """Whether these row classes have a pair with each member: bool [B or 1, H or 1, high - low, members]."""
        if rows is not None and (rows == 1 or self.of._whole):
            return touched.at(values, self._positions(low, high, rows))
        if rows is None:
            step = max(1, _STRIP[self.device.type] // max(1, self.shape.batch * self.shape.heads * self.of.members))
            found = None
            for start in range(0, self.shape.rows, step):
                here = self._positions(start, min(start + step, self.shape.rows), 1)
                inside = touched.at(values, here).any(2, keepdim=True)
                found = inside if found is None else found | inside
            if found is None:
                return torch.zeros(1, 1, 1, self.of.members, dtype=torch.bool, device=self.device)
            return found
        position = torch.arange(low * rows, high * rows, device=self.device)
        inside = touched.at(values, position)
        here = (position >= max(0, self.first)) & (position < self.first + self.shape.rows)
        by_class: Tensor = (inside & here.view(1, 1, -1, 1)).unflatten(2, (-1, rows))
        return by_class.any(3)

    def _rows(self, x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Vectors [B, H, rows, D] of the call's rows by class, [B, H, high - low, rows of a class, D], and which of
        them are there."""
        rows, have = self.selection.rows, self.shape.rows
        if rows is None:
            here = torch.arange(have, device=self.device) + self.first >= 0
            return x[:, :, None], here.view(1, -1)
        if rows == 1:
            return x[:, :, low:high, None], (self._positions(low, high, 1) >= 0).view(-1, 1)
        position = torch.arange(low * rows, high * rows, device=self.device)
        row = position - self.first
        here = (row >= 0) & (row < have) & (position >= 0)
        picked = x[:, :, row.clamp(0, max(0, have - 1))] if have else x.new_zeros(*x.shape[:2], row.numel(), x.shape[3])
        return picked.unflatten(2, (-1, rows)), here.view(-1, rows)

    def _queries(self, v: Vectors, low: int, high: int) -> Tensor:
        """[B, Hq or 1, high - low, D]: NaN where a class has no rows."""
        if v.source != "Q":
            decl = self.of.program.input(v.source)
            x = self._leading(v.source)
            along = decl.dims[-2]
            x = x.expand(-1, -1, self.shape.rows if along.block == 1 else self.of.classes, -1)
            return x[:, :, low:high].to(self.real)
        x, here = self._rows(self.q, low, high)
        return pooled(x.to(self.real), here, v.pool)

    def _members(self, v: Vectors) -> Tensor:
        """[B, G or H or 1, members, D] of what the keys hold."""
        x = self.k if v.source == "K" else self._leading(v.source)
        size, k_len = self.selection.keys, self.shape.k_len
        if v.pool is None:
            return x.expand(-1, -1, self.of.members, -1).to(self.real)
        x = x.expand(-1, -1, k_len, -1)
        here = (torch.arange(self.of.members * size, device=self.device) < k_len).view(-1, size)
        return pooled(pad(x, (0, 0, 0, -k_len % size)).unflatten(2, (-1, size)).to(self.real), here, v.pool)

    def _leading(self, name: str) -> Tensor:
        """An input of vectors as [B or 1, H or G or 1, tokens, D]."""
        x, axes = self.tensors[name], [dim.axis for dim in self.of.program.input(name).dims]
        if Axis.H not in axes and Axis.G not in axes:
            x = x.unsqueeze(-3)
        return x if Axis.B in axes else x.unsqueeze(0)

    # ---------------------------------------------------------------------------------------- scores

    def _dots(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, H or 1, R, D] . y [B, H or G or 1, M, D] as [B, H, R, M]."""
        x = x.expand(self.shape.batch, self.shape.heads, -1, -1)
        if y.shape[1] == self.shape.kv_heads != self.shape.heads:
            x, y = x.unflatten(1, (-1, self.group)), y.unsqueeze(2)
        dots: Tensor = x @ y.transpose(-1, -2)
        return dots.flatten(1, -3)

    def _scores(self, low: int, high: int) -> Tensor:
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
            case Probs(branch=branch):
                return self.masses[branch][:, :, low:high]
            case Given(value=value):
                rows = self.selection.rows
                members = torch.arange(self.of.members, device=self.device) * self.selection.keys
                here = self.among.at(
                    q=self._positions(low, high, rows or 1).view(1, 1, -1, 1), k=members.view(1, 1, 1, -1)
                )
                return here.tensor(value).to(self.real)
            case _:
                assert_never(score)

    def _antidiagonal(self, stride: int, low: int, high: int) -> Tensor:
        rows, keys, k_len = self.selection.rows, self.selection.keys, self.shape.k_len
        assert rows is not None
        x, here = self._rows(self.q, low, high)
        x = torch.where(here.view(1, 1, *here.shape, 1), x, 0).to(self.real)
        x = x.flatten(2, 3).unflatten(2, (-1, stride)).flatten(3)
        y = pad(self.k, (0, 0, 0, -k_len % stride)).unflatten(2, (-1, stride)).flip(3).flatten(3).to(self.real)
        logits = self._dots(x, y) * (self.scale / stride)
        wide = rows // stride
        inside = self._present(self.groups, self.group_values, low * wide, high * wide, stride)
        mass = softmax(logits, inside.expand(logits.shape))
        tall = keys // stride
        mass = pad(mass, (0, -mass.shape[3] % tall)).unflatten(3, (-1, tall)).sum(4)
        of_classes: Tensor = mass.unflatten(2, (-1, wide))
        return of_classes.sum(3)

    # ---------------------------------------------------------------------------------------- choice

    def levels(self, low: int, high: int) -> Tensor:
        """uint8 [B, Hq, high - low, M] of these row classes: 0 where a member is out."""
        selection = self.selection
        shape = (self.shape.batch, self.shape.heads, high - low, self.of.members)
        if 0 in shape:
            return torch.zeros(shape, dtype=torch.uint8, device=self.device)
        extra = selection.forced is Forced.EXTRA
        candidates = self._present(self.of._among, self.among, low, high, selection.rows).expand(shape)
        forced = torch.zeros((), dtype=torch.bool, device=self.device)
        if self.of._always is not None and self.always is not None:
            forced = self._present(self.of._always, self.always, low, high, selection.rows).expand(shape) & candidates
        raw = self._scores(low, high).expand(shape)
        raw = torch.where(candidates & ~raw.isnan(), raw, -torch.inf).clamp(max=_LARGEST)
        withdrawn = candidates & ~forced & (raw == -torch.inf)
        competing = candidates & ~withdrawn
        if extra:
            competing = competing & ~forced
        score, withdrawn = self._summed(normalised(raw, competing, selection.normalise), competing, withdrawn)
        competing = candidates & ~withdrawn
        if extra:
            competing = competing & ~forced
        score = torch.where(competing, score, -torch.inf)
        # Two stable sorts: by score, and then what is forced and counted first, what is no candidate last.
        first = forced if selection.forced is Forced.COUNTED else torch.zeros_like(forced)
        place = torch.where(competing, torch.where(first, 0, 1), 2).to(torch.int8)
        order = score.sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, place.gather(-1, order).sort(dim=-1, stable=True).indices)
        level = self._ranked(score, competing, order) * competing
        top = selection.rule.factors[0] if isinstance(selection.rule, Levels) else 1
        return torch.where(forced, top, level).to(torch.uint8)

    def _summed(self, score: Tensor, competing: Tensor, withdrawn: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, and which members are withdrawn, after the heads that share have added theirs up."""
        selection = self.selection
        size = {Share.NONE: 1, Share.GROUP: self.group, Share.HEADS: self.shape.heads}[selection.share]
        if size == 1:
            return score, withdrawn
        masses = selection.normalise is not Normalise.NONE or isinstance(selection.score, Antidiagonal | Probs)
        added = torch.where(competing, score, 0).unflatten(1, (-1, size)).sum(2)
        gone = withdrawn.unflatten(1, (-1, size)).any(2)
        if masses:
            gone = gone & ~competing.unflatten(1, (-1, size)).any(2)
        return added.repeat_interleave(size, 1), gone.repeat_interleave(size, 1)

    def _ranked(self, score: Tensor, competing: Tensor, order: Tensor) -> Tensor:
        """What each member gets by its rank, int64."""
        rule = self.selection.rule
        index = torch.arange(self.of.members, device=self.device).expand(order.shape)
        rank = torch.empty_like(order).scatter_(-1, order, index)
        count = competing.sum(-1, keepdim=True)
        if isinstance(rule, Top):
            if self.of._budgets is None:
                assert rule.fraction is not None
                return (rank < floor_share(rule.fraction, count).clamp(min=1)).to(torch.int64)
            return (rank < self.of._budgets).to(torch.int64)
        inside = torch.where(competing, score.clamp(min=0), 0)
        until = pad(inside.gather(-1, order).cumsum(-1), (1, 0))
        total = inside.sum(-1, keepdim=True)
        before, after = until.gather(-1, rank), until.gather(-1, rank + 1)
        match rule:
            case Cover(share=share, exclusive=exclusive, at_least=least, at_most=most):
                within = after <= share * total if exclusive else before < share * total
                found = (within & (inside > 0)) | (rank < least)
                return (found if most is None else found & (rank < most)).to(torch.int64)
            case Above(share=share, relative=relative, at_most=most):
                found = score >= (share * score.amax(-1, keepdim=True) if relative else share)
                return (found if most is None else found & (rank < most)).to(torch.int64)
            case Levels(factors=factors, bounds=bounds, masses=masses):
                level = torch.zeros_like(rank)
                for factor, bound in reversed(list(zip(factors, bounds, strict=True))):
                    below = before < bound * total if masses else rank < floor_share(bound, count)
                    level = torch.where(below, factor, level)
                return level
            case _:
                assert_never(rule)


def empty_plan(program: Program, selection: Selection, shape: CallShape, device: torch.device) -> Tensor:
    """A plan without anything in it."""
    heads = {Share.NONE: shape.heads, Share.GROUP: shape.kv_heads, Share.HEADS: 1}[plan_heads(selection)]
    width, dtype = -(-shape.k_len // selection.keys), torch.uint8
    if selection.bounded:
        width, dtype = capacity(program, selection, (shape.heads, shape.kv_heads), width), torch.int32
    return torch.empty(
        shape.batch, heads, _classes(program, selection, shape), width, dtype=dtype, device=device
    )  # fmt: skip


def _classes(program: Program, selection: Selection, shape: CallShape) -> int:
    """Row classes of a plan: the call's rows, blocks of all positions, or one."""
    match selection.rows:
        case 1:
            return shape.rows
        case None:
            return 1
        case rows:
            return -(-shape.q_len(program) // rows)
