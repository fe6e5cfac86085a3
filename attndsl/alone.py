"""`packed` and `lengths`, by definition: a call is what its documents, or its unpadded sequences, are alone.

Each stands for itself: its tokens count from 0, its keys end with it, and an input over tokens holds its own. So the
oracle asks the program without the clause about each of them, and puts the answers in their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from attndsl.members import Tiles, extent
from attndsl.program import Axis, CallShape, Program

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Alone:
    """A sequence of its own inside a call: the batch entry, its keys, those of its rows that the call holds, and how
    many tokens each sequence before it has."""

    entry: int
    keys: slice
    rows: slice
    before: tuple[int, ...] = ()

    def shape(self, whole: CallShape) -> CallShape:
        return replace(whole, batch=1, rows=self.rows.stop - self.rows.start, k_len=self.keys.stop - self.keys.start)

    def blocks(self, size: int) -> slice:
        """Its blocks among those of all sequences of its batch entry, one sequence after the other; of a sequence
        without tokens one that nothing reads."""
        first = sum(-(-n // size) for n in self.before)
        return slice(first, first + max(1, -(-(self.keys.stop - self.keys.start) // size)))

    @property
    def earlier(self) -> Iterator[Alone]:
        """Those before it in its batch entry, without rows."""
        low = 0
        for i, n in enumerate(self.before):
            yield Alone(self.entry, slice(low, low + n), slice(0, 0), self.before[:i])
            low += n

    def tiles(self, tiles: Tiles) -> list[int]:
        """The first token in the call of each of its tiles, row by row; its first token of one that holds none."""
        import numpy as np

        from attndsl.oracle_places import tile_numbers

        tokens, each = extent(tiles)
        length = self.keys.stop - self.keys.start
        own, count = tile_numbers(tiles, np.arange(length)), max(1, -(-length // tokens) * each)
        return [self.keys.start + (int(np.argmax(own == tile)) if length else 0) for tile in range(count)]

    def inputs(self, program: Program, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of its call, numpy arrays or tensors, cut from those of the whole."""
        found = {}
        for decl in program.inputs:
            if decl.name not in inputs:
                continue
            x, place = inputs[decl.name], list[slice | list[int]]()
            for dim, size in zip(decl.dims, x.shape, strict=True):
                cut: slice | list[int] = slice(None)
                if size > 1 and dim.axis is Axis.B:
                    cut = slice(self.entry, self.entry + 1)
                elif size > 1 and dim.apart:
                    cut = self.blocks(dim.block) if dim.tiles is None else self.tiles(dim.tiles)
                elif size > 1 and dim.axis is Axis.Q and dim.block == 1:
                    cut = self.rows
                elif size > 1 and (dim.axis is Axis.K or (dim.axis is Axis.Q and not program.align_start)):
                    each = max(1, dim.size)
                    cut = slice(self.keys.start // dim.block * each, -(-self.keys.stop // dim.block) * each)
                place.append(cut)
            found[decl.name] = x[tuple(place)]
        return found


def separate(program: Program) -> bool:
    """Whether a call consists of sequences that stand alone."""
    return program.packed is not None or program.lengths is not None


def together(program: Program) -> Program:
    """The program of one of the sequences."""
    inputs = tuple(decl.of_documents(False) for decl in program.inputs)
    return replace(program, inputs=inputs, packed=None, lengths=None)


def sequences(program: Program, shape: CallShape, inputs: Mapping[str, Array]) -> Iterator[Alone]:
    """The sequences of a call; rows of tokens that are not present stand alone without keys.

    Raises ValueError where the input that tells them apart is missing.
    """
    first = shape.first_position(program)
    for entry in range(shape.batch):
        done, before = 0, list[int]()
        for low, end in _extents(program, shape, inputs, entry):
            stop = shape.rows if program.align_start else max(0, end - first)
            begin = 0 if program.align_start else max(0, low - first)
            if done < begin:
                yield Alone(entry, slice(low, low), slice(done, begin))
            yield Alone(entry, slice(low, end), slice(begin, stop), tuple(before))
            done = stop
            before.append(end - low)
        if done < shape.rows:
            yield Alone(entry, slice(0, 0), slice(done, shape.rows))


def _extents(program: Program, shape: CallShape, inputs: Mapping[str, Array], entry: int) -> Iterator[tuple[int, int]]:
    """First key and one past the last of each sequence of a batch entry."""
    import numpy as np

    end = shape.k_len
    if program.lengths is not None:
        lengths = np.broadcast_to(_given(program.lengths, inputs), (shape.batch,))
        end = min(max(int(lengths[entry]), 0), end)
    if program.packed is None:
        yield 0, end
        return
    ids = np.broadcast_to(_given(program.packed, inputs), (shape.batch, shape.k_len))[entry, :end]
    begins = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), end]
    yield from ((low, high) for low, high in pairwise(begins) if low < high)


def _given(name: str, inputs: Mapping[str, Array]) -> Array:
    if name not in inputs:
        raise ValueError(f"input `{name}` is missing")
    return inputs[name]
