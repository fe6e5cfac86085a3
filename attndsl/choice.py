"""The oracle of selections: which members each row class chooses, dense, in float64, straight from the program.

Represent, score, withdraw, normalise, sum over the heads that share, choose: one function each, in this order. Like
`attndsl.oracle` it shares nothing with what computes plans on a device. Rows of a class are those of the call.

Where the language leaves a choice, this is what it is: fractions are the decimals as written; a row whose scores are
all equal has `minmax` 1; the members that are forced are chosen even where they are more than `n`, and get the first
of the `levels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from attndsl.choice_values import real
from attndsl.members import Lags, extent
from attndsl.oracle import Array, Evaluator
from attndsl.oracle_places import tile_numbers
from attndsl.program import CallShape, Inter, Program, Scalar, Set
from attndsl.selection import (
    Above,
    Antidiagonal,
    Bound,
    Compete,
    Cover,
    Dot,
    Forced,
    Given,
    Levels,
    Normalise,
    Pool,
    Probs,
    Selection,
    Share,
    Top,
    Vectors,
)

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a selection chooses in a call, for every head: arrays [B, Hq, R, M] over row classes and members.

    Attributes:
        level: 0 where a member is out, else its factor (1 where the selection is no `levels`); uint8.
        score: what the candidates are ranked by (their masses), float64; -inf where a member is none.
        free: candidates that are not forced.
    """

    level: npt.NDArray[np.uint8]
    score: Floats
    free: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Mass:
    """The probabilities of a branch's part, float64 [B, Hq, rows, keys]; key j stands for the tokens
    [j * stride, j * stride + size), or where data tells for those of `tokens`, bool [B, Hq, keys, Nk]."""

    probabilities: Floats
    size: int = 1
    stride: int = 1
    tokens: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """What a call gives: q float64 [B, Hq, rows, D], k [B, Hkv, Nk, D], inputs and arguments by name, the factor of
    q . k (one, or [1, Hq, 1, 1]), and the masses of each branch that `probs` reads, one a part."""

    q: Floats
    k: Floats
    inputs: Mapping[str, Array]
    args: Mapping[str, int]
    scale: float | Floats
    masses: Mapping[str, Sequence[Mass]]


def choose(program: Program, selection: Selection, shape: CallShape, data: Data) -> Chosen:
    """What a selection of the program chooses.

    Raises:
        ValueError: an input, or the probabilities of a branch, are missing.
    """
    call = _Call(program, selection, shape, data)
    return call.chosen()


def plan_sizes(program: Program, selection: Selection, shape: CallShape) -> tuple[int, int]:
    """How many row classes and members there are in a call."""
    nothing = np.zeros((0,))
    call = _Call(program, selection, shape, Data(nothing, nothing, {}, {}, 1.0, {}))
    return call.classes, call.members


def given_masses(program: Program, selection: Selection, shape: CallShape, data: Data) -> Floats:
    """What a selection by `probs` ranks its members by, for each class of the call's rows: [B, Hq, R, M]."""
    assert isinstance(selection.score, Probs)
    call = _Call(program, selection, shape, data)
    return call._mass(data.masses[selection.score.branch], selection.score.largest)


@dataclass(frozen=True)
class _Call:
    program: Program
    selection: Selection
    shape: CallShape
    data: Data

    # --------------------------------------------------------------------------------- row classes

    @property
    def positions(self) -> Array:
        return np.arange(self.shape.rows) + self.shape.first_position(self.program)

    @property
    def classes(self) -> int:
        """How many row classes a plan has: the call's rows, blocks of all positions, or one."""
        match self.selection.rows:
            case 1:
                return self.shape.rows
            case None:
                return 1
            case size:
                tiles = self.selection.row_tiles
                tokens, each = (size, 1) if tiles is None else extent(tiles)
                return -(-self.shape.q_len(self.program) // tokens) * each

    @property
    def members(self) -> int:
        tokens, each = self.selection.extent
        # Diagonals are as many as the distances from which a row may have a key.
        of_rows = isinstance(self.selection.members, Lags)
        return -(-(self.shape.q_len(self.program) if of_rows else self.shape.k_len) // tokens) * each

    @cached_property
    def labels(self) -> Array:
        """The member of each key, for each row: int64 [B, Hq, rows, Nk]; one that none has, of a key of no member."""
        call = Evaluator.of_call(self.program, self.shape, self.data.inputs, self.data.args)
        of, k_pos = self.selection.members, call.variables["k"]
        found = k_pos // self.selection.keys if of is None else call.members_of(of)
        return np.broadcast_to(found, (self.shape.batch, self.shape.heads, self.shape.rows, self.shape.k_len))

    @cached_property
    def row_labels(self) -> Array:
        """The class of each row of the call: int64 [rows]; -1 of one of none."""
        match self.selection.rows:
            case 1:
                found = np.arange(self.shape.rows)
            case None:
                found = np.zeros(self.shape.rows, np.int64)
            case size if self.selection.row_tiles is None:
                found = self.positions // size
            case _:
                found = tile_numbers(self.selection.row_tiles, self.positions)
        return np.where(self.positions >= 0, found, -1)

    def rows_of(self, row_class: int) -> Array:
        """The rows of the call (their indices, not positions) of a class; none before the first token."""
        return np.flatnonzero(self.row_labels == row_class)

    def _touched(self, pattern: Set) -> Array:
        """The (r, m) with a present pair in a set."""
        shape = (self.shape.batch, self.shape.heads, self.shape.rows, self.shape.k_len)
        call = Evaluator.of_call(self.program, self.shape, self.data.inputs, self.data.args)
        inside = np.broadcast_to(call.members(pattern), shape)
        found = np.zeros((*shape[:2], self.classes, self.members), np.bool_)
        for r in range(self.classes):
            of_rows, labels = (np.asarray(x[:, :, self.rows_of(r)]) for x in (inside, self.labels))
            for m in range(self.members):
                found[:, :, r, m] = (of_rows & (labels == m)).any((2, 3))
        return found

    # ----------------------------------------------------------------------------------- represent

    def vectors(self, v: Vectors, *, of_rows: bool) -> Floats:
        """[B, Hq, R or M, D]: one vector a row class, or one a member; NaN where there is nothing to pool."""
        given = {"Q": self.data.q, "K": self.data.k}.get(v.source)
        if given is None:
            given = self._input_vectors(v.source)
        if given.shape[1] != self.shape.heads:
            given = given.repeat(self.shape.heads // given.shape[1], axis=1)
        count = self.classes if of_rows else self.members
        if v.pool is None:
            return given
        found = np.full((*given.shape[:2], count, given.shape[3]), np.nan)
        for b, h, i in np.ndindex(*given.shape[:2], count):
            own = self.rows_of(i) if of_rows else np.flatnonzero(self.key_labels[b, h] == i)
            if own.size:
                found[b, h, i] = _POOLS[v.pool](given[b : b + 1, h : h + 1, own])
        return found

    @property
    def key_labels(self) -> Array:
        """The member of each key, which is that of all rows: [B, Hq, Nk]."""
        assert not isinstance(self.selection.members, Lags), "diagonals hold no vectors"
        if self.shape.rows:
            return self.labels[:, :, 0]
        return np.full((self.shape.batch, self.shape.heads, self.shape.k_len), -1)

    def _input_vectors(self, name: str) -> Floats:
        decl, values = self.program.input(name), np.asarray(self.data.inputs[name], np.float64)
        axes = [dim.axis.value for dim in decl.dims[:-2]]
        lead = [values.shape[axes.index(a)] if a in axes else 1 for a in "b"]
        heads = values.shape[axes.index("h" if "h" in axes else "g")] if {"h", "g"} & set(axes) else 1
        values = values.reshape(*lead, heads, *values.shape[-2:])
        along = self.shape.k_len if decl.dims[-2].axis.value == "k" else self.shape.q_len(self.program)
        if decl.dims[-2].axis.value == "q" and decl.dims[-2].block == 1:
            along = self.shape.rows
        tokens = -(-along // decl.dims[-2].block)
        return np.broadcast_to(values, (self.shape.batch, heads, tokens, self.shape.dim))

    # --------------------------------------------------------------------------------------- score

    def scores(self, candidates: Array) -> Floats:
        """[B, Hq, R, M], of whatever is no candidate too."""
        scale = self.data.scale
        match self.selection.score:
            case Dot(x=x, y=y):
                left, right = self.vectors(x, of_rows=True), self.vectors(y, of_rows=False)
                return np.asarray(scale * np.einsum("bhrd,bhmd->bhrm", left, right))
            case Bound(x=x, low=low, high=high):
                left = self.vectors(x, of_rows=True)[..., None, :]
                ends = [self.vectors(y, of_rows=False)[:, :, None] for y in (low, high)]
                return np.asarray(scale * np.maximum(left * ends[0], left * ends[1]).sum(-1))
            case Antidiagonal(stride=stride):
                return self._antidiagonal(stride)
            case Probs(branch=branch, largest=largest):
                return self._mass(self.data.masses[branch], largest)
            case Given(value=value):
                return self._given(value, candidates.shape)
            case _ as never:
                assert_never(never)

    def _mass(self, masses: Sequence[Mass], largest: bool) -> Floats:
        """A key gives a member the share of its present tokens that lie in it."""
        found = np.zeros((self.shape.batch, self.shape.heads, self.classes, self.members))
        for mass in masses:
            for j in range(mass.probabilities.shape[-1]):
                shares = self._shares(mass, j)
                of_members = mass.probabilities[..., j, None] * shares
                for r in range(self.classes):
                    of_rows = of_members[:, :, self.rows_of(r)]
                    if largest:
                        found[:, :, r] = np.maximum(found[:, :, r], of_rows.max(2, initial=0.0))
                    else:
                        found[:, :, r] += of_rows.sum(2)
        return found

    def _shares(self, mass: Mass, j: int) -> Floats:
        """Which share of key j's tokens each member has, for each row: [B, Hq, rows, members]."""
        if mass.tokens is None:
            tokens = slice(j * mass.stride, min(j * mass.stride + mass.size, self.shape.k_len))
            return np.asarray((self.labels[..., tokens, None] == np.arange(self.members)).mean(3))
        own = mass.tokens[:, :, j, None, :]
        inside = (self.labels[..., None] == np.arange(self.members)) & own[..., None]
        return np.asarray(inside.sum(3) / np.maximum(own.sum(3, keepdims=True), 1))

    def _antidiagonal(self, stride: int) -> Floats:
        """Groups of `stride` positions, missing tokens zero; what a group may see is what `among` lets it touch."""
        groups = replace(self, selection=replace(self.selection, keys=stride, rows=stride))
        candidates = groups._touched(self.selection.among)
        q_groups, k_groups = candidates.shape[2:]
        queries = np.zeros((*self.data.q.shape[:2], q_groups * stride, self.shape.dim))
        here = self.positions >= 0
        queries[:, :, self.positions[here]] = self.data.q[:, :, here]
        keys = np.zeros((*self.data.q.shape[:2], k_groups * stride, self.shape.dim))
        keys[:, :, : self.shape.k_len] = self.data.k.repeat(self.shape.heads // self.shape.kv_heads, axis=1)
        reversed_keys = keys.reshape(*keys.shape[:2], k_groups, stride, -1)[..., ::-1, :]
        of_groups = queries.reshape(*queries.shape[:2], q_groups, stride, -1)
        logits = np.einsum("bhqsd,bhksd->bhqk", of_groups, reversed_keys) * self.data.scale / stride
        mass = _softmax(logits, candidates)
        rows, keys_ = self.selection.rows, self.selection.keys
        assert rows is not None
        found = np.zeros((*mass.shape[:2], self.classes, self.members))
        for r in range(self.classes):
            for m in range(self.members):
                block = mass[:, :, r * rows // stride : (r + 1) * rows // stride]
                found[:, :, r, m] = block[..., m * keys_ // stride : (m + 1) * keys_ // stride].sum((-1, -2))
        return found

    def _given(self, value: Scalar, shape: tuple[int, ...]) -> Floats:
        first = self.positions if self.selection.rows == 1 else np.arange(self.classes) * (self.selection.rows or 1)
        if self.selection.row_tiles is not None:
            every = tile_numbers(self.selection.row_tiles, np.arange(self.shape.q_len(self.program)))
            first = np.asarray([_first(every == r) for r in range(self.classes)])
        token = np.asarray(
            [[[_first(x == m) for m in range(self.members)] for x in of_heads] for of_heads in self.key_labels]
        ).reshape(self.shape.batch, self.shape.heads, 1, self.members)
        call = Evaluator.of_call(self.program, self.shape, self.data.inputs, self.data.args)
        at = call.at(first.reshape(1, 1, -1, 1), token, call.variables["Nq"], call.variables["Nk"])
        return np.broadcast_to(np.asarray(real(at, value), np.float64), shape)

    # -------------------------------------------------------------------------------------- choose

    def chosen(self) -> Chosen:
        selection = self.selection
        extra = selection.forced is Forced.EXTRA
        candidates = self._touched(selection.among)
        forced = np.zeros_like(candidates)
        if selection.always is not None:
            forced = self._touched(Inter((selection.among, selection.always)))
        with np.errstate(invalid="ignore", over="ignore"):
            raw = np.where(candidates, self.scores(candidates), -np.inf)
        raw = np.minimum(np.where(np.isnan(raw), -np.inf, raw), np.finfo(np.float32).max)
        withdrawn = candidates & ~forced & (raw == -np.inf)
        competing = candidates & ~withdrawn & ~(forced & extra)
        score = self._normalised(raw, competing)
        score, withdrawn = self._summed(score, competing, withdrawn)
        competing = candidates & ~withdrawn & ~(forced & extra)
        score = np.where(competing, score, -np.inf)
        first = forced & (selection.forced is Forced.COUNTED)
        # The last key counts first, and the sort is stable: ties go to the lower index.
        order = np.lexsort((-score, ~first, ~competing), axis=-1)
        level = self._levels(score, competing, first, order) * competing
        level = np.where(forced, self._forced_level(level), level)
        return Chosen(level.astype(np.uint8), score, competing & ~forced)

    def _forced_level(self, level: Array) -> Array:
        rule = self.selection.rule
        return np.full_like(level, rule.factors[0] if isinstance(rule, Levels) else 1)

    def _summed(self, score: Floats, competing: Array, withdrawn: Array) -> tuple[Array, Array]:
        """Scores, and which members are withdrawn, after the heads that share have added theirs up.

        A head adds nothing for a member that is no candidate of its own. A mass is withdrawn where all heads withdraw
        it, another score where one does.
        """
        heads = self.shape.heads
        size = {Share.NONE: 1, Share.GROUP: heads // self.shape.kv_heads, Share.HEADS: heads}[self.selection.share]
        plain = self.selection.normalise is Normalise.NONE
        masses = not plain or isinstance(self.selection.score, Antidiagonal | Probs)
        groups = (score.shape[0], heads // size, size, *score.shape[2:])
        added = np.where(competing, score, 0.0).reshape(groups).sum(2)
        of_heads = withdrawn.reshape(groups)
        gone = of_heads.any(2)
        if masses:
            gone &= ~competing.reshape(groups).any(2)
        return added.repeat(size, axis=1), gone.repeat(size, axis=1)

    def _normalised(self, score: Floats, competing: Array) -> Floats:
        """Of each row; the least and the largest score are those of all that compete."""
        if self.selection.normalise is not Normalise.MINMAX:
            return _normalised(score, competing, self.selection.normalise)
        found = _normalised(self._pool(score), self._pool(competing), self.selection.normalise)
        return self._apart(found, score.shape)

    @property
    def _compete(self) -> Compete:
        rule = self.selection.rule
        return rule.compete if isinstance(rule, Cover) else Compete.ROW

    def _pool(self, x: Array, sharing: int = 1) -> Array:
        """[B, Hq, R, M] with all that compete along the last dimension, head by head, row by row.

        sharing: heads that decide together, which count once: the first of each group are in one pool, and so on.
        """
        batch, heads, rows, members = x.shape
        match self._compete:
            case Compete.ROW:
                return x
            case Compete.HEAD:
                return x.reshape(batch, heads, 1, rows * members)
            case Compete.ALL:
                apart = x.reshape(batch, heads // sharing, sharing, rows, members).swapaxes(1, 2)
                return apart.reshape(batch, sharing, 1, -1)
            case _ as never:
                assert_never(never)

    def _apart(self, x: Array, shape: tuple[int, ...], sharing: int = 1) -> Array:
        """What `_pool` made one of, in its place again."""
        if self._compete is not Compete.ALL:
            return x.reshape(shape)
        batch, heads, rows, members = shape
        return x.reshape(batch, sharing, heads // sharing, rows, members).swapaxes(1, 2).reshape(shape)

    def _covered(self, score: Floats, competing: Array, first: Array) -> list[Array]:
        """The mass before each member, that with it, and all of it, among all that compete."""
        heads = score.shape[1]
        sharing = {Share.NONE: 1, Share.GROUP: heads // self.shape.kv_heads, Share.HEADS: heads}[self.selection.share]
        inside = self._pool(np.where(competing, np.maximum(score, 0), 0), sharing)
        ranked = [self._pool(x, sharing) for x in (-score, ~first, ~competing)]
        order = np.lexsort(ranked, axis=-1)
        after = np.empty_like(inside)
        np.put_along_axis(after, order, np.cumsum(np.take_along_axis(inside, order, -1), -1), -1)
        total = np.broadcast_to(inside.sum(-1, keepdims=True), inside.shape)
        return [self._apart(x, score.shape, sharing) for x in (after - inside, after, total)]

    def _levels(self, score: Floats, competing: Array, first: Array, order: Array) -> Array:
        """What each competing member gets, `order` listing members by their rank: 0 where it is out."""
        rule = self.selection.rule
        rank = np.argsort(order, axis=-1, kind="stable")
        count = competing.sum(-1, keepdims=True)
        inside = np.where(competing, np.maximum(score, 0), 0)
        ranked = np.take_along_axis(inside, order, -1)
        total = inside.sum(-1, keepdims=True)
        until = np.concatenate((np.zeros_like(total), np.cumsum(ranked, -1)), -1)
        before, after = (np.take_along_axis(until, rank + i, -1) for i in range(2))
        match rule:
            case Top(count=None, fraction=fraction):
                assert fraction is not None
                return np.asarray(rank < np.maximum(1, _floor(fraction, count)))
            case Top(count=budget):
                assert budget is not None
                call = Evaluator.of_call(self.program, self.shape, self.data.inputs, self.data.args)
                return np.asarray(rank < call.scalar(budget))
            case Cover(share=share, exclusive=exclusive, at_least=least, at_most=most):
                if self._compete is not Compete.ROW:
                    before, after, total = self._covered(score, competing, first)
                within = (after <= share * total) if exclusive else (before < share * total)
                chosen = (within & (inside > 0)) | (rank < least)
                return np.asarray(chosen if most is None else chosen & (rank < most))
            case Above(share=share, relative=relative, at_most=most):
                largest = score.max(-1, keepdims=True, initial=-np.inf)
                reached = score >= (share * largest if relative else share)
                return np.asarray(reached if most is None else reached & (rank < most))
            case Levels(factors=factors, bounds=bounds, masses=masses):
                level = np.zeros(rank.shape, np.int64)
                for factor, bound in reversed(list(zip(factors, bounds, strict=True))):
                    below = before < bound * total if masses else rank < _floor(bound, count)
                    level = np.where(below, factor, level)
                return level
            case _ as never:
                assert_never(never)


# ---------------------------------------------------------------------------------------- numbers

_POOLS: dict[Pool, Callable[[Floats], Floats]] = {
    Pool.MEAN: lambda x: x.mean(2),
    Pool.MAX: lambda x: x.max(2),
    Pool.MIN: lambda x: x.min(2),
    Pool.SUM: lambda x: x.sum(2),
    Pool.FIRST: lambda x: x[:, :, 0],
    Pool.LAST: lambda x: x[:, :, -1],
}


def _first(inside: Array) -> int:
    """The first place that is true, 0 where none is."""
    return int(inside.argmax()) if inside.size else 0


def _floor(share: float, count: Array) -> Array:
    """floor(share * count), of the decimal as written."""
    exact = Fraction(repr(share))
    return np.asarray([math.floor(exact * int(n)) for n in count.flat]).reshape(count.shape)


def _softmax(logits: Floats, present: Array) -> Floats:
    top = np.where(present, logits, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    mass = np.where(present, np.exp(np.where(present, logits, 0) - np.where(top == -np.inf, 0, top)), 0.0)
    total = mass.sum(-1, keepdims=True)
    return np.asarray(mass / np.where(total == 0, 1, total))


def _normalised(score: Floats, competing: Array, how: Normalise) -> Floats:
    match how:
        case Normalise.NONE:
            return score
        case Normalise.SOFTMAX:
            return _softmax(score, competing)
        case Normalise.MINMAX:
            finite = competing & (score > -np.inf)
            low = np.where(finite, score, np.inf).min(-1, keepdims=True, initial=np.inf)
            high = np.where(finite, score, -np.inf).max(-1, keepdims=True, initial=-np.inf)
            width = np.where(high > low, high - low, 1.0)
            at = np.where(finite, score, 0) - np.where(finite.any(-1, keepdims=True), low, 0)
            return np.where(finite, np.where(high > low, at / width, 1.0), 0.0)
        case _ as never:
            assert_never(never)
