"""The block graph of a call: which key tiles each query tile visits, stored as runs and never tile by tile.

The runs come from the closed forms of `tiles`, evaluated for all query tiles at once, so a graph costs time and
memory in proportion to the query tiles, not to the tiles they visit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.blockruns import call_runs
from attndsl.oracle import entries
from attndsl.program import CallShape, Program
from attndsl.render import Picture, save_picture, to_fragment, to_page, to_rich, to_text
from attndsl.runs import TileKind

if TYPE_CHECKING:
    import networkx as nx
    from rich.console import Console, ConsoleOptions, RenderResult

# More edges than this are no longer worth holding one by one.
MAX_EDGES = 2_000_000
# Tiles of `dense`, and of the square bit matrix of `receptive_field`.
MAX_DENSE = 1 << 28

Ints = NDArray[np.int32]


class TileCode(IntEnum):
    """A tile in `BlockGraph.dense`."""

    NONE = 0
    PARTIAL = 1
    FULL = 2


_CODES = {TileKind.PARTIAL: TileCode.PARTIAL, TileKind.FULL: TileCode.FULL}
_KINDS = {code: kind for kind, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class KeyRun:
    """Key tiles first, first + step, … (`count` of them) that a query tile visits."""

    first: int
    count: int
    step: int
    kind: TileKind

    @property
    def tiles(self) -> range:
        return range(self.first, self.first + self.count * self.step, self.step)


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """How far back and forth each query tile sees after some layers: arrays [q_tiles], in tiles."""

    first: Ints
    last: Ints
    count: Ints


@dataclass(frozen=True, slots=True, eq=False)
class BlockGraph:
    """Which key tiles each query tile of a call visits.

    >>> from attndsl.program import Compare, Var, Where
    >>> causal = Program.of("causal", Where(Compare("<=", Var("k"), Var("q"))))
    >>> graph = block_graph(causal, CallShape(1, 1, 1, rows=512, k_len=512, dim=64, v_dim=64))
    >>> graph.full, graph.partial, graph.density
    (6, 4, 0.625)

    Heads and batch entries with the same tiles share one *class*. The runs of query tile t of class c are
    the entries `offsets[c, t]` to `offsets[c, t + 1]` of `first`, `count`, `step` and `code`, in the order of
    `first`. Counts of tiles (`full`, `partial`, `tiles`, `work`) are over all batch entries and heads.

    Attributes:
        name: of the program.
        text: its source, where it has one.
        shape: sizes of the call, of a view with as many keys as it has entries.
        block_q, block_k: tile sizes in tokens.
        start: position of row 0.
        classes: int32 [batch, heads], the class of each.
        offsets: int64 [classes, q_tiles + 1].
        first, count, step: int32 [runs]; code: uint8 [runs], of `TileCode`.
    """

    name: str
    text: str
    shape: CallShape
    block_q: int
    block_k: int
    start: int
    classes: Ints
    offsets: NDArray[np.int64]
    first: Ints = field(repr=False)
    count: Ints = field(repr=False)
    step: Ints = field(repr=False)
    code: NDArray[np.uint8] = field(repr=False)

    # ------------------------------------------------------------------------------------ counts

    @property
    def q_tiles(self) -> int:
        return -(-self.shape.rows // self.block_q)

    @property
    def k_tiles(self) -> int:
        return -(-self.shape.k_len // self.block_k)

    @property
    def nbytes(self) -> int:
        """Bytes held by the graph's arrays."""
        arrays = (self.classes, self.offsets, self.first, self.count, self.step, self.code)
        return sum(array.nbytes for array in arrays)

    @property
    def full(self) -> int:
        """Tiles of which every pair is allowed."""
        return self._visited(TileCode.FULL)

    @property
    def partial(self) -> int:
        """Visited tiles that need a mask."""
        return self._visited(TileCode.PARTIAL)

    @property
    def tiles(self) -> int:
        """Tiles that are visited."""
        return self.full + self.partial

    @property
    def density(self) -> float:
        """Visited share of all tiles (0 where there are none)."""
        return self.tiles / max(1, self.classes.size * self.q_tiles * self.k_tiles)

    @property
    def work(self) -> NDArray[np.int64]:
        """int64 [q_tiles]: tiles visited by each query tile, the measure of load balance."""
        total = np.zeros(self.q_tiles, np.int64)
        for c, times in enumerate(self._times()):
            part = self._part(c)
            total += times * np.bincount(self._rows(c), weights=self.count[part], minlength=self.q_tiles).astype(
                np.int64
            )
        return total

    def _visited(self, code: TileCode) -> int:
        visited = 0
        for c, times in enumerate(self._times()):
            part = self._part(c)
            visited += int(times) * int(self.count[part][self.code[part] == code].sum(dtype=np.int64))
        return visited

    def _times(self) -> NDArray[np.int64]:
        """How many (batch entry, head) belong to each class."""
        return np.bincount(self.classes.ravel(), minlength=len(self.offsets))

    def _part(self, c: int) -> slice:
        """The entries of a class."""
        return slice(int(self.offsets[c, 0]), int(self.offsets[c, -1]))

    def _rows(self, c: int) -> NDArray[np.int64]:
        """The query tile of each entry of a class."""
        return np.repeat(np.arange(self.q_tiles), np.diff(self.offsets[c]))

    def _class(self, head: int, batch: int) -> int:
        if not (0 <= head < self.shape.heads and 0 <= batch < self.shape.batch):
            raise ValueError(
                f"no head {head} of batch entry {batch}: {self.shape.heads} heads, {self.shape.batch} entries"
            )
        return int(self.classes[batch, head])

    # ------------------------------------------------------------------------------------- views

    def runs(self, q_tile: int, head: int = 0, batch: int = 0) -> tuple[KeyRun, ...]:
        """The runs of key tiles that a query tile visits, in order."""
        if not 0 <= q_tile < self.q_tiles:
            raise ValueError(f"no query tile {q_tile}: there are {self.q_tiles}")
        c = self._class(head, batch)
        part = range(int(self.offsets[c, q_tile]), int(self.offsets[c, q_tile + 1]))
        return tuple(
            KeyRun(int(self.first[i]), int(self.count[i]), int(self.step[i]), _KINDS[TileCode(self.code[i])])
            for i in part
        )

    def dense(self, head: int = 0, batch: int = 0) -> NDArray[np.uint8]:
        """uint8 [q_tiles, k_tiles] of `TileCode`.

        Raises ValueError where that would be more than 2**28 tiles.
        """
        if self.q_tiles * self.k_tiles > MAX_DENSE:
            raise ValueError(
                f"{self.q_tiles} x {self.k_tiles} tiles are too many to lay out: use `runs` or larger tiles"
            )
        c = self._class(head, batch)
        tiles = np.zeros((self.q_tiles, self.k_tiles), np.uint8)
        for row, first, end, step, code in self._entries(c):
            tiles[row, first:end:step] = code
        return tiles

    def _entries(self, c: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Query tile, first key tile, end, step and code of every run of a class."""
        part = self._part(c)
        end = self.first[part].astype(np.int64) + self.count[part].astype(np.int64) * self.step[part]
        columns = (self._rows(c), self.first[part], end, self.step[part], self.code[part])
        yield from zip(*(column.tolist() for column in columns), strict=True)

    @property
    def graph(self) -> nx.DiGraph:
        """Head 0 of batch entry 0 as a bipartite networkx graph, made anew on each call: see `network`."""
        return self.network()

    def network(self, head: int = 0, batch: int = 0) -> nx.DiGraph:
        """Edges ("q", i) -> ("k", j) with `kind` "full" or "partial"; nodes have `bipartite` 0 (queries) or 1 (keys).

        Raises ValueError above 2,000,000 edges.
        """
        import networkx as nx

        c = self._class(head, batch)
        edges = int(self.count[self._part(c)].sum(dtype=np.int64))
        if edges > MAX_EDGES:
            raise ValueError(
                f"the graph has {edges:,} edges, more than {MAX_EDGES:,}: use `runs`, or larger tiles "
                f"(block_q={self.block_q}, block_k={self.block_k})"
            )
        graph = nx.DiGraph(name=self.name)
        graph.add_nodes_from((("q", i) for i in range(self.q_tiles)), bipartite=0)
        graph.add_nodes_from((("k", j) for j in range(self.k_tiles)), bipartite=1)
        for row, first, end, step, code in self._entries(c):
            kind = _KINDS[TileCode(code)].value
            graph.add_edges_from(((("q", row), ("k", j)) for j in range(first, end, step)), kind=kind)
        return graph

    # ---------------------------------------------------------------------------------- analyses

    @property
    def head_groups(self) -> tuple[tuple[int, ...], ...]:
        """Heads that share a graph in every batch entry, grouped."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for head in range(self.shape.heads):
            groups.setdefault(tuple(self.classes[:, head].tolist()), []).append(head)
        return tuple(tuple(group) for group in groups.values())

    def receptive_field(self, layers: int, batch: int = 0) -> Reach:
        """The key tiles whose tokens can influence each query tile after `layers` equal layers.

        A layer passes information through all its heads and keeps each token's own (the residual stream). Tiles are
        the grain: inside a visited tile every token is taken to reach every other, so the field is never too small.

        Raises ValueError unless queries and keys are the same tiles, and above 2**28 tiles.
        """
        self._check_layers(layers)
        if self.q_tiles**2 > MAX_DENSE:
            raise ValueError(f"{self.q_tiles} tiles are too many for their square: use larger tiles")
        size = self.q_tiles
        seen = np.packbits(np.eye(size, dtype=np.bool_), axis=1)
        for _ in range(layers):
            wider = seen.copy()
            for c in np.unique(self.classes[batch]):
                self._gather(int(c), seen, wider)
            if np.array_equal(wider, seen):
                break
            seen = wider
        reach = np.unpackbits(seen, axis=1, count=size)
        return Reach(
            first=reach.argmax(axis=1).astype(np.int32),
            last=(size - 1 - reach[:, ::-1].argmax(axis=1)).astype(np.int32),
            count=reach.sum(axis=1, dtype=np.int32),
        )

    def _gather(self, c: int, seen: NDArray[np.uint8], wider: NDArray[np.uint8]) -> None:
        """Adds to each query tile's row of `wider` what the key tiles it visits have `seen`.

        The union over a run is that of two overlapping spans of 2**p tiles, so doubling spans serve all runs.
        """
        part = self._part(c)
        rows, first, count, step = self._rows(c), self.first[part], self.count[part], self.step[part]
        for stride in np.unique(step):
            spans, length = seen, 1
            while True:
                fits = (step == stride) & (count >= length) & (count < 2 * length)
                low, high = first[fits], first[fits] + (count[fits] - length) * stride
                np.bitwise_or.at(wider, rows[fits], spans[low] | spans[high])
                if not np.any((step == stride) & (count >= 2 * length)):
                    break
                spans, length = spans[: -length * stride] | spans[length * stride :], 2 * length

    def unreachable(self, layers: int, batch: int = 0) -> tuple[int, ...]:
        """Key tiles whose tokens cannot influence the last query tile after `layers` equal layers.

        Raises ValueError unless queries and keys are the same tiles.
        """
        self._check_layers(layers)
        seen = np.zeros(self.q_tiles, np.bool_)
        seen[-1:] = True
        for _ in range(layers):
            wider = seen.copy()
            for c in np.unique(self.classes[batch]):
                part = self._part(int(c))
                chosen = seen[self._rows(int(c))]
                first, count, step = (
                    array[part][chosen].astype(np.int64) for array in (self.first, self.count, self.step)
                )
                plain = step == 1
                change = np.zeros(self.k_tiles + 1, np.int64)
                np.add.at(change, first[plain], 1)
                np.add.at(change, (first + count)[plain], -1)
                wider |= np.cumsum(change[:-1]) > 0
                for low, n, stride in zip(first[~plain], count[~plain], step[~plain], strict=True):
                    wider[low : low + n * stride : stride] = True
            if np.array_equal(wider, seen):
                break
            seen = wider
        return tuple(np.flatnonzero(~seen).tolist())

    def _check_layers(self, layers: int) -> None:
        if layers < 0:
            raise ValueError(f"{layers} layers")
        if self.start != 0 or self.shape.rows != self.shape.k_len or self.block_q != self.block_k:
            raise ValueError(
                "layers follow each other only where queries and keys are the same tokens in the same tiles: "
                f"{self.shape.rows} rows from position {self.start} in tiles of {self.block_q}, "
                f"{self.shape.k_len} keys in tiles of {self.block_k}"
            )

    # --------------------------------------------------------------------------------- rendering

    def picture(self, rows: int, columns: int, head: int = 0, batch: int = 0) -> Picture:
        """The graph of one head, scaled down to at most rows x columns cells."""
        c = self._class(head, batch)
        rows, columns = max(1, min(rows, self.q_tiles)), max(1, min(columns, self.k_tiles))
        part, row = self._part(c), self._rows(c) * rows // max(1, self.q_tiles)
        visited, full = np.zeros((rows, columns)), np.zeros((rows, columns))
        # Tiles of each run before each edge between cells; the differences are the tiles in a cell.
        edges = -(-np.arange(columns + 1) * self.k_tiles // columns)
        chunk = max(1, (1 << 20) // (columns + 1))
        for low in range(part.start, part.stop, chunk):
            some = slice(low, min(low + chunk, part.stop))
            first, count, step = (a[some, None].astype(np.int64) for a in (self.first, self.count, self.step))
            inside = np.diff(np.clip(-((first - edges) // step), 0, count), axis=1)
            at = row[some.start - part.start : some.stop - part.start]
            is_full = self.code[some] == TileCode.FULL
            np.add.at(visited, at, inside)
            np.add.at(full, at[is_full], inside[is_full])
        heights = np.diff(-(-np.arange(rows + 1) * self.q_tiles // rows))
        area = np.maximum(1, heights[:, None] * np.diff(edges))
        return Picture(
            title=self.name,
            text=self.text,
            facts=self._facts(head, batch),
            visited=visited / area,
            full=full / area,
            q_tiles=self.q_tiles,
            k_tiles=self.k_tiles,
            block_q=self.block_q,
            block_k=self.block_k,
            start=self.start,
        )

    def _facts(self, head: int, batch: int) -> tuple[tuple[str, str], ...]:
        work = self.work
        mean = float(work.mean()) if work.size else 0.0
        facts = [
            ("rows × keys", f"{self.shape.rows:,} × {self.shape.k_len:,}"),
            ("tiles", f"{self.q_tiles:,} × {self.k_tiles:,} of {self.block_q} × {self.block_k}"),
            ("visited", f"{self.tiles:,} ({100 * self.density:.2f} %): {self.full:,} full, {self.partial:,} partial"),
            ("per query tile", f"mean {mean:.1f}, most {int(work.max(initial=0)):,}"),
        ]
        if self.classes.size > 1:
            facts.append(("shown", f"head {head} of batch entry {batch}; {len(self.head_groups)} groups of heads"))
        return tuple(facts)

    def __str__(self) -> str:
        return to_text(self.picture(36, 36))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield to_rich(self.picture(36, max(8, (options.max_width - 4) // 2)))

    def _repr_html_(self) -> str:
        return to_fragment(self.picture(96, 96))

    def html(self, head: int = 0, batch: int = 0) -> str:
        """The graph of one head as a self-contained HTML page."""
        return to_page(self.picture(96, 96, head, batch))

    def save(self, path: str | PathLike[str], head: int = 0, batch: int = 0) -> None:
        """Writes the graph of one head to a file that ends in .png or .html."""
        save_picture(self.picture(96, 96, head, batch), self.picture(1024, 1024, head, batch), path)


# ------------------------------------------------------------------------------------------- making


def block_graph(
    program: Program,
    shape: CallShape,
    block_q: int = 128,
    block_k: int = 128,
    inputs: Mapping[str, NDArray[Any]] = {},
    args: Mapping[str, int] = {},
) -> BlockGraph:
    """The block graph of a call.

    Args:
        program: whose only part it is; over a view, the keys are its entries.
        shape: sizes of the call; `dim` and `v_dim` matter only to patterns that read D or Dv.
        block_q, block_k: tile sizes in tokens.
        inputs: the inputs that decide tiles (those read at b, h, g only), each of its declared shape.
        args: the runtime ints that the pattern reads.

    Raises:
        ValueError: an input or argument that decides tiles is missing, or an input has another shape than declared.
    """
    if block_q < 1 or block_k < 1:
        raise ValueError(f"tiles of {block_q} x {block_k}")
    classes, lists = call_runs(program, shape, block_q, block_k, inputs, args)
    bases = np.cumsum([0, *(len(part.first) for part in lists)], dtype=np.int64)[:-1]
    offsets = [part.offsets + base for part, base in zip(lists, bases, strict=True)]
    full = _joined([part.full for part in lists], np.bool_)
    (written,) = program.only.parts
    return BlockGraph(
        name=program.name,
        text="" if program.source is None else program.source.text,
        shape=replace(shape, k_len=entries(written.view, shape.k_len)),
        block_q=block_q,
        block_k=block_k,
        start=shape.first_position(program),
        classes=classes,
        offsets=np.stack(offsets) if offsets else np.zeros((0, 1), np.int64),
        first=_joined([part.first for part in lists], np.int32),
        count=_joined([part.count for part in lists], np.int32),
        step=_joined([part.step for part in lists], np.int32),
        code=np.where(full, TileCode.FULL, TileCode.PARTIAL).astype(np.uint8),
    )


def _joined(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts])
