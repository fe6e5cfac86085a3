"""The closed-form runs of a program's tiles, evaluated for every query tile of one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.cut_values import cut_values
from attndsl.cuts import known_cuts, with_cuts
from attndsl.derivation import Cut
from attndsl.derive import derive
from attndsl.effort import remembered
from attndsl.evaluate import evaluate
from attndsl.oracle import check_inputs, index_origin
from attndsl.program import Arg, CallShape, Program, Read, Scalar, Table, Var, children, reads, walk
from attndsl.run_values import run_counts
from attndsl.runs import Side, TileKind, TileRuns
from attndsl.tiles import tile_runs
from attndsl.view_plans import part_relation

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class RunLists:
    """The runs of every query tile: those of tile t are the entries offsets[t] to offsets[t + 1], by `first`.

    offsets: int64 [q_tiles + 1]; first, count, step: int32 [runs]; full: bool [runs].
    """

    offsets: NDArray[np.int64]
    first: NDArray[np.int32]
    count: NDArray[np.int32]
    step: NDArray[np.int32]
    full: NDArray[np.bool_]

    def key(self) -> bytes:
        """Equal for equal lists."""
        return b"".join(a.tobytes() for a in (self.offsets, self.first, self.count, self.step, self.full))


def call_runs(
    program: Program,
    shape: CallShape,
    block_q: int,
    block_k: int,
    inputs: Mapping[str, Array],
    args: Mapping[str, int],
) -> tuple[NDArray[np.int32], tuple[RunLists, ...]]:
    """The distinct run lists of a call, and which of them each [batch, head] has.

    Raises ValueError where an input or argument that decides tiles is missing, or an input has a wrong shape.
    """
    check_inputs(program, shape, {name: np.shape(value) for name, value in inputs.items()})
    heads = (shape.heads, shape.kv_heads)
    positions = (shape.q_len(program), shape.k_len, shape.first_position(program))
    uniform, runs, program = _closed_runs(program, heads, block_q, block_k, positions, frozenset(inputs))
    derived = cut_values(program, shape, inputs, args) | run_counts(program, shape, inputs)
    reader = Reader(program, shape, {**inputs, **derived}, args)
    b, h = np.divmod(np.arange(shape.batch * shape.heads), max(1, shape.heads))
    # Where every uniform scalar has one value, the runs are the same.
    values = [np.broadcast_to(reader.value(e, reader.variables(b, h)), b.shape).astype(np.int64) for e in uniform]
    table = np.stack([np.zeros_like(b), *values], axis=1)
    _, chosen, classes = np.unique(table, axis=0, return_index=True, return_inverse=True)
    variables = reader.variables(b[chosen, None], h[chosen, None])
    variables["q_tile"] = np.arange(-(-shape.rows // block_q))
    found: dict[bytes, RunLists] = {}
    place = np.zeros(len(chosen), np.int32)
    for c, lists in enumerate(_lists(runs, (len(chosen), variables["q_tile"].size), reader, variables)):
        key = lists.key()
        found.setdefault(key, lists)
        place[c] = list(found).index(key)
    return place[classes.reshape(shape.batch, shape.heads)], tuple(found.values())


def most_visits(program: Program, runs: TileRuns, shape: CallShape, block_q: int, block_k: int) -> int:
    """A bound on the key tiles that a query tile of a call visits: the most, or all where data decides them."""
    tiles = -(-shape.k_len // block_k)
    reader = Reader(program, shape, {}, {})
    variables = reader.variables(np.zeros((1, 1), np.int64), np.arange(shape.heads)[:, None])
    variables["q_tile"] = np.arange(-(-shape.rows // block_q))
    try:
        counts = [np.maximum(reader.value(run.count, variables), 0) for run in runs.full + runs.partial]
    except ValueError:
        return tiles
    return min(tiles, int(np.max(sum(counts), initial=0)))


@remembered(256)
def _closed_runs(
    program: Program, heads: tuple[int, int], block_q: int, block_k: int, positions: tuple[int, int, int],
    given: frozenset[str],
) -> tuple[tuple[Scalar, ...], TileRuns, Program]:  # fmt: skip
    """The uniform scalars that the runs may depend on, and the runs; and the program with its cuts.

    positions: Nq, Nk and the first row's position. Only the tile is left symbolic, a fifth of the work that all lengths
    at once take. given: the inputs that are known. Tiles that others rule out count as visited.
    """
    relation = part_relation(program, heads).at(*positions)
    derived = derive(program)
    cut = known_cuts(with_cuts(derived) if program.plain else derived, given)
    runs = tile_runs(relation, block_q, block_k, Side.QUERY, program.align_start, program=cut)
    ends = [x for run in runs.full + runs.partial for x in (run.first, run.count)]
    cuts = {decl.name for decl in cut.inputs if isinstance(decl.derivation, Cut)}
    own = [Var(name) for name in "bh" if any(_follows(x, name, cuts) for e in ends for x in walk(e))]
    return (*relation.uniform.values(), *own), runs, cut


def _follows(e: Scalar, name: str, cuts: set[str]) -> bool:
    """Whether this is the entry of a cut of one batch entry or head."""
    return isinstance(e, Read) and e.input in cuts and reads(e, name)


def _lists(runs: TileRuns, size: tuple[int, int], reader: Reader, variables: Mapping[str, Array]) -> list[RunLists]:
    """The run lists of each class, empty runs left out."""
    found = (*runs.full, *runs.partial)
    first, count = np.zeros((len(found), *size), np.int32), np.zeros((len(found), *size), np.int32)
    for i, run in enumerate(found):
        first[i], count[i] = reader.value(run.first, variables), reader.value(run.count, variables)
    step = np.asarray([run.step for run in found], np.int32)
    full = np.asarray([run.kind is TileKind.FULL for run in found], np.bool_)
    lists = []
    for c in range(size[0]):
        tile, run_index = np.nonzero(count[:, c].T > 0)
        starts = first[run_index, c, tile]
        # Nearly sorted already, which a stable sort makes use of.
        order = np.argsort(tile * (int(starts.max(initial=0)) + 1) + starts, kind="stable")
        tile, run_index, starts = tile[order], run_index[order], starts[order]
        lengths = count[run_index, c, tile]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(tile, minlength=size[1]))]).astype(np.int64)
        # The step of a single tile says nothing.
        steps = np.where(lengths == 1, 1, step[run_index]).astype(np.int32)
        lists.append(RunLists(offsets, starts, lengths, steps, full[run_index]))
    return lists


@dataclass(frozen=True, slots=True)
class Reader:
    """Values of what the compiler derives, in one call: tables, inputs and arguments looked up."""

    program: Program
    shape: CallShape
    inputs: Mapping[str, Array]
    args: Mapping[str, int]

    def variables(self, b: Array, h: Array) -> dict[str, Array]:
        """The sizes of the call, and b, h, g; q_tile or k_tile remain to be added."""
        s = self.shape
        sizes = {
            "Nq": s.q_len(self.program), "Nk": s.k_len, "start": s.first_position(self.program),
            "H": s.heads, "G": s.kv_heads, "D": s.dim, "Dv": s.v_dim,
        }  # fmt: skip
        group = h // max(1, s.heads // max(1, s.kv_heads))
        return {"b": b, "h": h, "g": group} | {name: np.asarray(size, np.int64) for name, size in sizes.items()}

    def value(self, e: Scalar, variables: Mapping[str, Array]) -> Array:
        """Value of an int or bool scalar; ValueError where it reads an input or argument that is missing."""
        leaves: dict[Scalar, Array] = {}
        self._collect(e, variables, leaves)
        return evaluate(e, variables, leaves)

    def _collect(self, e: Scalar, variables: Mapping[str, Array], leaves: dict[Scalar, Array]) -> None:
        """Adds the values of the leaves under a scalar, those inside their indices first."""
        if isinstance(e, Arg | Table | Read) and e in leaves:
            return
        for x in children(e):
            self._collect(x, variables, leaves)
        match e:
            case Arg(name=name):
                if name not in self.args:
                    raise ValueError(f"argument `{name}` is missing, and the blocks of this pattern depend on it")
                leaves[e] = np.asarray(self.args[name], np.int64)
            case Table(name=name):
                decl = self.program.table(name)
                leaves[e] = self._entry(e, np.asarray(decl.values).reshape(decl.shape), variables, leaves)
            case Read(input=name):
                if name not in self.inputs:
                    raise ValueError(f"input `{name}` is missing, and the blocks of this pattern depend on it")
                leaves[e] = self._entry(e, np.asarray(self.inputs[name]), variables, leaves)
            case _:
                pass

    def _entry(
        self, e: Table | Read, values: Array, variables: Mapping[str, Array], leaves: Mapping[Scalar, Array]
    ) -> Array:
        dims = self.program.table(e.name).dims if isinstance(e, Table) else self.program.input(e.input).dims
        place = []
        for dim, size, index in zip(dims, values.shape, e.index, strict=True):
            row = evaluate(index, variables, leaves) - index_origin(dim, self.program, self.shape)
            place.append(np.clip(row, 0, size - 1))
        entry = np.asarray(values[tuple(place)])
        return entry if entry.dtype == np.bool_ else entry.astype(np.int64)
