"""The oracle, its numpy half: which pairs a program allows, straight from its nodes.

Every scalar is an int64 or bool array that broadcasts to [batch, heads, rows, k_len]; a set is such an
array of booleans. Dense and slow on purpose: this file and `runtime.reference` define what a program
means, so they share nothing with the simplifier, the tiles or the generated code.
What operators are is in `oracle_operators`; every index is clamped to its dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from math import ceil
from typing import assert_never

import numpy as np
import numpy.typing as npt

from attndsl.alone import separate, sequences, together
from attndsl.branches import Given, Part, Pick, Queries, View, Visible
from attndsl.derivation import Random, Segment
from attndsl.grid import Along
from attndsl.members import Lags, Members, Placed, Runs, Tiles, extent
from attndsl.oracle_operators import Array as Array
from attndsl.oracle_operators import apply
from attndsl.oracle_places import axis_size, block_sums, coordinates, listed, run_starts, runs_in_order, tile_numbers
from attndsl.oracle_views import seen_extents
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    Blocks,
    Call,
    CallShape,
    Choose,
    Coarse,
    Coarsen,
    Compare,
    Complement,
    Const,
    Dim,
    If,
    Inter,
    Logic,
    Minus,
    On,
    Permuted,
    Place,
    Program,
    Read,
    Scalar,
    Selected,
    Set,
    Table,
    Type,
    Unary,
    Union,
    Var,
    Where,
    children,
)


def mask(
    program: Program, shape: CallShape, inputs: Mapping[str, Array] = {}, args: Mapping[str, int] = {}
) -> npt.NDArray[np.bool_]:
    """Which pairs the program allows in a call.

    >>> from attndsl.program import Compare, Var
    >>> causal = Program.of("causal", Where(Compare("<=", Var("k"), Var("q"))))
    >>> mask(causal, CallShape(1, 1, 1, rows=2, k_len=3, dim=8, v_dim=8)).astype(int)
    array([[[[1, 1, 0],
             [1, 1, 1]]]])

    Args:
        program: what to evaluate; its scores play no part.
        shape: sizes of the call.
        inputs: the int and bool inputs, each of its declared shape (an axis of size 1 broadcasts).
        args: the runtime ints.

    Returns:
        bool [batch, heads, rows, k_len], over a view with entries last; what all documents list is at its tokens. Rows
        at negative positions are rows like any: a call may have them where the pattern gives them nothing, or asks of
        no row where it stands.

    Raises:
        ValueError: an input that the pattern reads is missing, or one has another shape than declared.
    """
    check_inputs(program, shape, {name: array.shape for name, array in inputs.items()})
    (part,) = program.only.parts
    last = entries(part.view, shape.k_len) if _listed_apart(program, part.view) is None else shape.k_len
    full = (shape.batch, shape.heads, shape.rows, last)
    if 0 in full:
        return np.zeros(full, np.bool_)
    if not separate(program):
        return Evaluator.of_call(program, shape, inputs, args).seen(part, program.only.queries)
    found = np.zeros(full, np.bool_)
    for x in sequences(program, shape, inputs):
        own = Evaluator.of_call(together(program), x.shape(shape), x.inputs(program, inputs), args, x.entry)
        inside = own.seen(part, program.only.queries)
        if (picked := _listed_apart(program, part.view)) is not None:
            own.at_tokens(inside, picked, found[x.entry : x.entry + 1, :, x.rows, x.keys])
            continue
        found[x.entry : x.entry + 1, :, x.rows, x.keys.start : x.keys.start + inside.shape[-1]] = inside
    return found


def _listed_apart(program: Program, view: View | None) -> Pick | None:
    """What every document lists at the same places."""
    picked = view.picked if isinstance(view, Given) else view
    same = program.packed is not None and isinstance(picked, Pick) and picked.room.axis is Axis.CONST
    return picked if same and isinstance(picked, Pick) else None


def evaluate(
    e: Scalar,
    program: Program,
    shape: CallShape,
    inputs: Mapping[str, Array] = {},
    args: Mapping[str, int] = {},
) -> Array:
    """Value of an int or bool scalar of the program, broadcastable to [batch, heads, rows, k_len]."""
    return Evaluator.of_call(program, shape, inputs, args).scalar(e)


def check_inputs(program: Program, shape: CallShape, given: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless each given input has its declared shape, up to axes of size 1."""
    for decl in program.inputs:
        if decl.name not in given:
            continue
        sizes = tuple(given[decl.name])
        expected = tuple(dim_size(dim, program, shape) for dim in decl.dims)
        if decl.members is not None and len(sizes) == len(expected):
            # A list of members, of whatever length, or one entry a member.
            expected = (*expected[:-1], sizes[-1])
        if len(sizes) != len(expected) or any(n not in (1, m) for n, m in zip(sizes, expected, strict=True)):
            raise ValueError(f"input `{decl.name}` has shape {sizes}, and this call needs {expected}")


def dim_size(dim: Dim, program: Program, shape: CallShape) -> int:
    """Size of a declared dimension in a call."""
    match dim.axis:
        case Axis.B:
            return shape.batch
        case Axis.H:
            return shape.heads
        case Axis.G:
            return shape.kv_heads
        case Axis.Q | Axis.K if dim.apart:
            return shape.k_len  # Every token may be a document.
        case Axis.Q if dim.block == 1:
            return shape.rows
        case Axis.Q:
            return -(-shape.q_len(program) // dim.block) * max(1, dim.size)
        case Axis.K:
            return -(-shape.k_len // dim.block) * max(1, dim.size)
        case Axis.D:
            return shape.dim
        case Axis.DV:
            return shape.v_dim
        case Axis.CONST | Axis.LIST:
            return dim.size
        case _ as never:
            assert_never(never)


def index_origin(dim: Dim, program: Program, shape: CallShape) -> int:
    """The index that stands for entry 0 of a dimension: a `q` dimension holds the rows of the call."""
    return shape.first_position(program) if dim.axis is Axis.Q and dim.block == 1 else 0


def entries(view: View | None, k_len: int) -> int:
    """How many keys a part has in a call of so many tokens: entry j exists when token j * stride does."""
    return k_len if view is None else view.entries(k_len)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Scalars and sets of a program at given positions.

    `variables` holds b, h, g, q, k as int64 arrays that broadcast to [batch, heads, rows, k_len] and the sizes as 0-d
    arrays. Expressions are graphs: `memo` keeps a value per node, and the nodes, which identities are of.
    """

    program: Program
    shape: CallShape
    inputs: Mapping[str, Array]
    args: Mapping[str, int]
    variables: Mapping[str, Array]
    memo: dict[int, tuple[Scalar, Array]] = field(default_factory=dict)

    @classmethod
    def of_call(
        cls, program: Program, shape: CallShape, inputs: Mapping[str, Array], args: Mapping[str, int], entry: int = 0
    ) -> Evaluator:
        """Evaluator at every position of a call, whose first batch entry is `entry`."""
        h = np.arange(shape.heads).reshape(1, -1, 1, 1)
        variables = {
            "b": entry + np.arange(shape.batch).reshape(-1, 1, 1, 1),
            "h": h,
            "g": h // (shape.heads // shape.kv_heads),
            "q": np.arange(shape.rows).reshape(1, 1, -1, 1) + shape.first_position(program),
            "k": np.arange(shape.k_len).reshape(1, 1, 1, -1),
        }
        sizes = {
            "Nq": shape.q_len(program),
            "Nk": shape.k_len,
            "H": shape.heads,
            "G": shape.kv_heads,
            "D": shape.dim,
            "Dv": shape.v_dim,
        }
        variables |= {name: np.asarray(size, np.int64) for name, size in sizes.items()}
        return cls(program, shape, inputs, args, variables)

    def at(self, q_pos: Array, k_pos: Array, q_len: Array, k_len: Array) -> Evaluator:
        """The same program with q, k, Nq and Nk replaced."""
        replaced = {"q": q_pos, "k": k_pos, "Nq": q_len, "Nk": k_len}
        return replace(self, variables={**self.variables, **replaced}, memo={})

    # -------------------------------------------------------------------------------- scalars

    def scalar(self, e: Scalar) -> Array:
        """Value of an int or bool scalar."""
        found = self.memo.get(id(e))
        if found is None:
            found = self.memo[id(e)] = e, self._scalar(e)
        return found[1]

    def _scalar(self, e: Scalar) -> Array:
        match e:
            case Const(value=value):
                return np.asarray(value)
            case Var(name=name):
                return self.variables[name]
            case Arg(name=name):
                return np.asarray(self.args[name], np.int64)
            case Table(name=name, index=index):
                table = self.program.table(name)
                values = np.asarray(table.values).reshape(table.shape)
                return self._entry(values, table.dims, index)
            case Read(input=name, index=index):
                return self._entry(self._input(name), self.program.input(name).dims, index)
            case If(cond=cond, then=then, other=other):
                return np.where(self.scalar(cond), self.scalar(then), self.scalar(other))
            case Unary() | Binary() | Compare() | Logic() | Call():
                return apply(e, [self.scalar(child) for child in children(e)])
            case _ as never:
                assert_never(never)

    def _input(self, name: str) -> Array:
        if name not in self.inputs:
            raise ValueError(f"input `{name}` is missing")
        return self.inputs[name]

    def _entry(self, values: Array, dims: Sequence[Dim], index: Sequence[Scalar]) -> Array:
        place = []
        for dim, size, e in zip(dims, values.shape, index, strict=True):
            row = self.scalar(e) - index_origin(dim, self.program, self.shape)
            place.append(np.clip(row, 0, size - 1))
        if 0 in values.shape:
            # An axis without entries belongs to a call without pairs: nothing reads what stands here.
            return np.zeros(np.broadcast_shapes(*(i.shape for i in place)), values.dtype)
        entry: Array = np.asarray(values[tuple(place)])
        return entry if entry.dtype == np.bool_ else entry.astype(np.int64)

    # ---------------------------------------------------------------------------------- views

    def seen(self, part: Part, queries: Queries | None = None) -> npt.NDArray[np.bool_]:
        """Which keys of a part each row sees, tokens or entries of its view: bool [batch, heads, rows, keys]. Of pooled
        queries, those that each of the nominal extent would see."""
        if queries is not None:
            begin, k_pos = self.variables["q"] // queries.size * queries.size, self.variables["k"]
            alone = [self.at(begin + offset, k_pos, *self._lengths).seen(part) for offset in range(queries.size)]
            return np.array(np.logical_and.reduce(alone))
        shape, view = self.shape, part.view
        picked = view if isinstance(view, Pick) else view.picked if isinstance(view, Given) else None
        full = (shape.batch, shape.heads, shape.rows, entries(picked or view, shape.k_len))
        if 0 in full:
            return np.zeros(full, np.bool_)
        if view is None:
            return np.array(np.broadcast_to(self.members(part.pattern), full))
        if view.runs is not None:
            return self._seen_runs(part.pattern, view.runs, full)
        if picked is not None:
            return self._seen_listed(part.pattern, picked, full)

        # The nominal extents reach past the last token: the pattern is asked there too.
        def inside(low: int, high: int) -> Array:
            tokens = np.arange(low, high).reshape(1, 1, 1, -1)
            return self.at(self.variables["q"], tokens, *self._lengths).members(part.pattern)

        return seen_extents(inside, full, view.size, view.stride, shape.k_len, view.visible is Visible.EVERY)

    def _seen_runs(self, pattern: Set, runs: Runs, full: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Which runs of an input each row sees, those of the batch entry's and head's own in order."""
        inside = np.broadcast_to(self.members(pattern), full)
        found = np.zeros(full, np.bool_)
        for b, h in np.ndindex(*full[:2]):
            for j, (first, end) in enumerate(self.extents(runs, b, h)):
                found[b, h, :, j] = inside[b, h, :, first:end].all(-1)
        return found

    def _seen_listed(self, pattern: Set, picked: Pick, full: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Which listed tokens each row sees."""
        inside = np.broadcast_to(self.members(pattern), (*full[:3], self.shape.k_len))
        found = np.zeros(full, np.bool_)
        for b, h in np.ndindex(*full[:2]):
            for j, token in enumerate(self.listed(picked, b, h)):
                if 0 <= token < self.shape.k_len:
                    found[b, h, :, j] = inside[b, h, :, token]
        return found

    def listed(self, picked: Pick, b: int, h: int) -> list[int]:
        """What an input lists for a batch entry and a head."""
        values = self._input(picked.input)
        values = np.broadcast_to(values, (*values.shape[:-1], entries(picked, self.shape.k_len)))
        lead = [np.clip(self.scalar(e), 0, n - 1) for e, n in zip(picked.lead, values.shape[:-1], strict=True)]
        whole = (self.shape.batch, self.shape.heads, 1, 1)
        place = tuple(int(np.broadcast_to(x, whole)[b, h, 0, 0]) for x in lead)
        found: list[int] = values[place].tolist()
        return found

    def at_tokens(self, inside: Array, picked: Pick, to: Array) -> None:
        """Which rows see a listed token, from those that see entries of the list: [1, heads, rows, ...]."""
        for h in range(self.shape.heads):
            for j, token in enumerate(self.listed(picked, 0, h)):
                if 0 <= token < self.shape.k_len:
                    to[0, h, :, token] |= inside[0, h, :, j]

    def extents(self, runs: Runs, b: int, h: int) -> list[tuple[int, int]]:
        """The first token of each run of an input, and one past its last, of a batch entry and a head."""
        starts = np.broadcast_to(self.members_of(runs), (self.shape.batch, self.shape.heads, 1, self.shape.k_len))
        firsts = np.unique(starts[b, h]).tolist()
        return list(pairwise([*firsts, self.shape.k_len]))

    @property
    def _lengths(self) -> tuple[Array, Array]:
        return self.variables["Nq"], self.variables["Nk"]

    # ----------------------------------------------------------------------------------- sets

    def members(self, pattern: Set) -> Array:
        """Which tuples (b, h, q, k) are in a set: bool, broadcastable to [batch, heads, rows, k_len]."""
        match pattern:
            case Where(cond=cond):
                return self.scalar(cond)
            case Union(parts=parts):
                return reduce(np.logical_or, map(self.members, parts))
            case Inter(parts=parts):
                return reduce(np.logical_and, map(self.members, parts))
            case Minus(left=left, right=right):
                return self.members(left) & ~self.members(right)
            case Complement(operand=operand):
                return ~self.members(operand)
            case Choose(cond=cond, then=then, other=other):
                return np.where(self.scalar(cond), self.members(then), self.members(other))
            case On(operand=operand, place=place):
                return self._placed(place).members(operand)
            case Coarsen():
                return self._coarsened(pattern)
            case Random():
                return self._drawn(pattern)
            case Selected():
                return self._selected(pattern)
            case _ as never:
                assert_never(never)

    def _placed(self, place: Place) -> Evaluator:
        q_pos, k_pos, q_len, k_len = (self.variables[name] for name in ("q", "k", "Nq", "Nk"))
        match place:
            case Blocks(size=size):
                return self.at(q_pos // size, k_pos // size, -(-q_len // size), -(-k_len // size))
            case Along(grid=grid, axis=axis):
                q_new, k_new = (coordinates(grid, x)[axis] for x in (q_pos, k_pos))
                return self.at(q_new, k_new, *(np.asarray(axis_size(grid, axis, int(n))) for n in (q_len, k_len)))
            case Permuted(input=name, lead=lead):
                values = self._input(name)
                head = [np.clip(self.scalar(e), 0, n - 1) for e, n in zip(lead, values.shape[:-1], strict=True)]
                q_new, k_new = (
                    values[(*head, np.clip(x, 0, values.shape[-1] - 1))].astype(np.int64) for x in (q_pos, k_pos)
                )
                return self.at(q_new, k_new, q_len, k_len)
            case Segment(input=name, lead=lead):
                ids = self._input(name)
                ids = np.broadcast_to(ids, (*ids.shape[:-1], int(k_len)))
                # Where there are no tokens, 0.
                distance = np.pad(np.arange(int(k_len)) - run_starts(ids), [(0, 0)] * (ids.ndim - 1) + [(0, 1)])
                head = [np.clip(self.scalar(e), 0, n - 1) for e, n in zip(lead, ids.shape[:-1], strict=True)]
                q_new, k_new = (distance[(*head, np.clip(x, 0, int(k_len) - 1))] for x in (q_pos, k_pos))
                return self.at(q_new, k_new, q_len, k_len)
            case _ as never:
                assert_never(never)

    def _everywhere(self, pattern: Set) -> Array:
        """Which of all existing pairs are in a set: bool [batch or 1, heads or 1, Nq, Nk]."""
        q_len, k_len = int(self.variables["Nq"]), int(self.variables["Nk"])
        q_pos, k_pos = np.arange(q_len).reshape(1, 1, -1, 1), np.arange(k_len).reshape(1, 1, 1, -1)
        inside = self.at(q_pos, k_pos, self.variables["Nq"], self.variables["Nk"]).members(pattern)
        return np.broadcast_to(inside, np.broadcast_shapes(inside.shape, (1, 1, q_len, k_len)))

    def _coarsened(self, e: Coarsen) -> Array:
        inside = self._everywhere(e.operand)
        q_len, k_len = inside.shape[2:]
        count = block_sums(inside, e.block_q, e.block_k)
        total = block_sums(np.ones((1, 1, q_len, k_len), np.bool_), e.block_q, e.block_k)
        match e.mode:
            case Coarse.ANY:
                chosen = count > 0
            case Coarse.ALL:
                chosen = count == total
            case Coarse.FRACTION:
                # The decimal as written, so that 0.07 of 100 pairs is 7 of them, not a rounding above.
                share = Fraction(repr(e.fraction))
                needed = [ceil(share * n) for n in total.flatten().tolist()]
                chosen = count >= np.asarray(needed, np.int64).reshape(total.shape)
            case _ as never:
                assert_never(never)
        return self._of_blocks(chosen, e.block_q, e.block_k)

    def _of_blocks(self, chosen: Array, block_q: int, block_k: int) -> Array:
        """Entries of [batch or 1, heads or 1, q blocks, k blocks] at the blocks of the pairs."""
        b, h = (self.variables[n] if size > 1 else 0 for n, size in zip("bh", chosen.shape[:2], strict=True))
        q_block = np.clip(self.variables["q"] // block_q, 0, chosen.shape[2] - 1)
        k_block = np.clip(self.variables["k"] // block_k, 0, chosen.shape[3] - 1)
        found: Array = chosen[b, h, q_block, k_block]
        return found

    def _drawn(self, e: Random) -> Array:
        inside = self._everywhere(e.among)
        rows = max(1, inside.shape[2]) if e.rows is None else e.rows
        candidate = block_sums(inside, rows, e.keys) > 0
        row, member = np.arange(candidate.shape[2])[:, None], np.arange(candidate.shape[3])
        state = np.zeros((1, 1, 1, 1), np.uint64)
        for x in (self.scalar(e.seed), self.variables["h"], row, member):
            state = splitmix64(state ^ x.astype(np.uint64))
        state, candidate = np.broadcast_arrays(state, candidate)
        # Candidates first, by hash; the sort is stable, so ties go to the lower index.
        order = np.lexsort((state, ~candidate), axis=-1)
        rank = np.argsort(order, axis=-1)
        drawn = candidate & (rank < e.count)
        return self._of_blocks(drawn, rows, e.keys) & self.members(e.among)

    def _selected(self, e: Selected) -> Array:
        plan, (tokens, each) = self._input(e.plan), (e.keys, 1) if e.members is None else extent(e.members)
        along = self.variables["Nq" if isinstance(e.members, Lags) else "Nk"]
        members = -(-int(along) // tokens) * each
        if e.level is not None:
            chosen = plan == e.level
        else:
            chosen = plan != 0 if plan.dtype == np.uint8 else listed(plan, members)
        chosen = chosen[..., :members]  # Those of a padded call may be more than its sequence has.
        if 0 in chosen.shape:
            return np.zeros((1, 1, 1, 1), np.bool_)
        place = []
        for dim, size, index in zip(self.program.input(e.plan).dims, chosen.shape, e.index, strict=False):
            place.append(np.clip(self.scalar(index) - index_origin(dim, self.program, self.shape), 0, size - 1))
        member = self.variables["k"] // e.keys if e.members is None else self.members_of(e.members)
        found: Array = chosen[(*place, np.clip(member, 0, chosen.shape[-1] - 1))]
        return found if e.members is None else found & (member >= 0) & (member < members)

    def members_of(self, members: Members) -> Array:
        """The member of each key, for the rows too where it depends on them; past the ends for a key that has none."""
        q_pos, k_pos = self.variables["q"], self.variables["k"]
        if isinstance(members, Tiles):
            return tile_numbers(members, k_pos)
        if isinstance(members, Lags):
            return np.where(k_pos <= q_pos, (q_pos - k_pos) // members.size, -1)
        k_len = int(self.variables["Nk"])
        values = self._input(members.input)
        values = np.broadcast_to(values, (*values.shape[:-1], k_len)).astype(np.int64)
        if isinstance(members, Placed):
            number = values // members.size if members.tiles is None else tile_numbers(members.tiles, values)
            values = np.where((values >= 0) & (values < k_len), number, -1)
        elif members.order is not None:
            return self._runs_in_order(members, members.order)
        else:
            values = run_starts(values)
        head = [np.clip(self.scalar(e), 0, n - 1) for e, n in zip(members.lead, values.shape[:-1], strict=True)]
        return np.asarray(values[(*head, np.clip(k_pos, 0, max(0, k_len - 1)))]) if k_len else k_pos - 1

    def _runs_in_order(self, runs: Runs, order: Placed) -> Array:
        """The run of each key among tokens in the order of their places, by the rank of its first token."""
        k_pos, k_len = self.variables["k"], int(self.variables["Nk"])
        here = replace(self, variables={**self.variables, "k": np.arange(k_len).reshape(1, 1, 1, -1)}, memo={})
        told = [Read(x.input, (*x.lead, Var("k")), Type.INT) for x in (runs, order)]
        found = runs_in_order(*np.broadcast_arrays(*map(here.scalar, told)))
        at = np.clip(k_pos, 0, max(0, k_len - 1))[0, 0]
        return np.asarray(np.take(found[:, :, 0], at, axis=-1)) if k_len else k_pos - 1


def splitmix64(x: Array) -> npt.NDArray[np.uint64]:
    """The output of SplitMix64 in state x (Steele, Lea, Flood: Fast splittable pseudorandom number generators)."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)
