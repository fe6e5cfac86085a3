"""What is visited: runs of tiles, whose ends are functions of a tile's index, the lengths and uniform scalars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from attndsl.linear import plainly
from attndsl.program import Binary, Const, Read, Scalar, Type, Var
from attndsl.simplify import fold

# The place of an entry in a list of tiles, and how many places stand before the tiles, for each own tile.
PLACE = Var("place")
LIST_HEAD = 3
# The numbers before what is listed of spans, for each query tile (`derivation.SpanList`).
SPAN_HEAD = 3


class TileKind(Enum):
    FULL = "full"
    PARTIAL = "partial"


@dataclass(frozen=True, slots=True)
class Run:
    """The tiles first, first + step, …, `count` of them (none where `count` is not positive).

    A *list run* has a `list`: the tiles are the entries of a list, at the places first, first + step, …. With `spans`
    it is of `count` tokens, those of the spans in a list, whose numbers for the own tile stand from `first` on.
    """

    first: Scalar
    count: Scalar
    step: int
    kind: TileKind
    list: Read | None = None
    spans: bool = False


@dataclass(frozen=True, slots=True)
class TileRuns:
    """The disjoint runs of one tile: of key tiles for query tile `q_tile`, or of query tiles for key tile `k_tile`,
    or for the tiles with q_tile - k_tile = `diagonal`."""

    full: tuple[Run, ...]
    partial: tuple[Run, ...]


def listed_runs(name: str, lead: tuple[Scalar, ...], own: Var) -> TileRuns:
    """The runs of tiles that a derived input lists, for the own tile `q_tile` or `k_tile`.

    `name`: an int32 input [..., n] whose last dimension is `Dim(Axis.LIST)`; `lead` indexes its other dimensions,
    which may be of size 1. A row of it begins with three places for each own tile t, at 3 t: where its full tiles
    begin, where its partial ones do, and where they end. The tiles themselves stand at these places, each once.

    Whoever makes the input owes the kernels that every tile in it exists, 0 <= tile < the other side's tiles: places
    are clamped to the row, and what stands there is taken without a check.
    """

    def entry(place: Scalar) -> Read:
        return Read(name, (*lead, place), Type.INT)

    begin = Binary("*", Const(LIST_HEAD), own)
    full, partial, end = (entry(fold(Binary("+", begin, Const(i)))) for i in range(LIST_HEAD))
    return TileRuns(
        (Run(full, Binary("-", partial, full), 1, TileKind.FULL, entry(PLACE)),),
        (Run(partial, Binary("-", end, partial), 1, TileKind.PARTIAL, entry(PLACE)),),
    )


def span_runs(name: str, lead: tuple[Scalar, ...]) -> TileRuns:
    """The tokens of the spans that a derived input lists for the own tile `q_tile`, as one run. Parameters as those of
    `listed_runs`; whoever makes the input owes the kernels spans of tokens that exist."""
    head = Binary("*", Const(SPAN_HEAD), Var("q_tile"))
    tokens = Read(name, (*lead, Binary("+", head, Const(2))), Type.INT)
    return TileRuns((), (Run(head, tokens, 1, TileKind.PARTIAL, Read(name, (*lead, PLACE), Type.INT), spans=True),))


def joined(listed: TileRuns) -> TileRuns:
    """Listed runs as one of partial tiles: full ones come first, and stand before the others."""
    (full,), (partial,) = listed.full, listed.partial
    assert isinstance(partial.count, Binary), "what is listed ends where it says"
    count = Binary("-", partial.count.left, full.first)
    return TileRuns((), (Run(full.first, count, 1, TileKind.PARTIAL, full.list),))


def plain_runs(runs: TileRuns, sizes: Mapping[str, int] = {}) -> TileRuns:
    """Runs with their ends put plainly, H, G, D, Dv (those in `sizes`) put in; those that then have no tiles go."""
    found = runs.full + runs.partial
    ends = plainly((x for run in found for x in (run.first, run.count)), sizes)
    plain = [replace(run, first=a, count=b) for run, a, b in zip(found, ends[::2], ends[1::2], strict=True)]
    full, partial = plain[: len(runs.full)], plain[len(runs.full) :]
    return TileRuns(*(tuple(run for run in some if run.count != Const(0)) for some in (full, partial)))


class Side(Enum):
    """Which tiles a kernel owns, one per program; its loops run over the other side's."""

    QUERY = "q_tile"
    KEY = "k_tile"
    DIAGONAL = "diagonal"  # square tiles; the loops run over query tiles
