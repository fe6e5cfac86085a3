"""The boxes that one box visits: products of the runs of tiles along each axis."""

from __future__ import annotations

from dataclasses import dataclass

from attndsl.program import Binary, Call, Const, Scalar
from attndsl.runs import Run, TileKind
from attndsl.simplify import fold


@dataclass(frozen=True, slots=True)
class BoxRun:
    """Boxes of a grid: of every axis the tiles of some disjoint runs, all of these with all of those."""

    axes: tuple[tuple[Run, ...], ...]
    kind: TileKind

    @property
    def count(self) -> Scalar:
        found: Scalar | None = None
        for runs in self.axes:
            along: Scalar = Const(0)
            for run in runs:
                along = Binary("+", along, Call("max", (run.count, Const(0))))
            found = along if found is None else Binary("*", found, along)
        assert found is not None
        return fold(found)

    @property
    def ends(self) -> tuple[Scalar, ...]:
        return tuple(x for runs in self.axes for run in runs for x in (run.first, run.count))


@dataclass(frozen=True, slots=True)
class BoxRuns:
    """The disjoint boxes that one box visits."""

    full: tuple[BoxRun, ...] = ()
    partial: tuple[BoxRun, ...] = ()

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The ends of the runs along each axis."""
        return tuple(x for run in self.full + self.partial for x in run.ends)
