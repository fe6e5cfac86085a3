"""What a tile knows of its conditions on sorted data: bounds of their intervals, as parameters of the tile relation.

For a condition `d` that allows the positions of an interval, a tile of owners has four numbers: the tiles of the other
side in which the intervals of its first and of its last owner begin and end. No pair of the tile has d true outside the
tiles that the hull of its intervals touches, or false in those that their intersection fills. That is all, and it is
said of pairs, so it holds whatever stands around d.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attndsl.cuts import Interval, cut_input, entry, interval, reflexive
from attndsl.derivation import Cut
from attndsl.layout import Comb
from attndsl.program import Binary, Call, Const, Program, Scalar


@dataclass(slots=True)
class TileCuts:
    """`scalars`: what the parameters stand for. `pairs`: for a condition, the sets { [q, k] } outside of which it is
    false, and true. `tiles`: what is known of the parameters of tile [x, y], as conditions."""

    scalars: dict[str, Scalar] = field(default_factory=dict)
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    tiles: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Owner:
    """The tiles that kernels own: their `variable`, and the positions of a tile's first token, of the last that counts,
    and one past its last; the first also as isl writes it. `exists`: none lies before the first position."""

    variable: str
    first: Scalar
    last: Scalar
    end: Scalar
    first_text: str
    size: int
    exists: bool


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of one side: `size` tokens each, of those that `comb` counts, from the index `origin` on. `from_zero`:
    positions before the first tile of the side are those below 0."""

    comb: Comb
    size: int
    origin: Scalar | None
    origin_text: str
    from_zero: bool = True

    def tile(self, position: Scalar) -> Scalar:
        """The tile of the first token at or after a position."""
        return Binary("//", self._index(position), Const(self.size))

    def tile_after(self, position: Scalar) -> Scalar:
        """The first tile that begins at or after a position."""
        return Binary("//", Binary("+", self._index(position), Const(self.size - 1)), Const(self.size))

    def _index(self, position: Scalar) -> Scalar:
        index = self.comb.index(position)
        return index if self.origin is None else Binary("-", index, self.origin)


def tile_cuts(
    program: Program, atoms: Mapping[str, Scalar], owner: Owner | None, grids: Mapping[str, Grid]
) -> TileCuts:
    """What tiles know of a relation's conditions on data, from the cuts that the program declares.

    owner: None where a kernel owns no tiles of one side; then only what all tiles share is known. grids: of q and of k.
    """
    found = TileCuts()
    for name, cond in atoms.items():
        allowed = interval(cond, program, "q" if owner is None else owner.variable)
        if allowed is None or any(cut_input(end, program) is None for end in allowed.ends):
            continue
        if owner is None and any(end.owner for end in allowed.ends):
            continue
        _Knowledge(found, program, owner, grids[allowed.variable], name).add(allowed)
    return found


@dataclass(frozen=True, slots=True)
class _Knowledge:
    """What is known of one condition; `grid`: the tiles in which its intervals lie."""

    found: TileCuts
    program: Program
    owner: Owner | None
    grid: Grid
    name: str

    def add(self, allowed: Interval) -> None:
        hull, gaps = list[str](), list[str]()
        at, size = f"{allowed.variable}{self.grid.origin_text}", self.grid.size
        if allowed.low is not None:
            touched, filled = self._begins(allowed.low)
            hull.append(f"{at} >= {size} {touched}")
            gaps.append(f"{at} < {size} {filled}")
        if allowed.high is not None:
            touched, filled = self._ends(allowed.high)
            hull.append(f"{at} < {size} {touched}")
            gaps.append(f"{at} >= {size} {filled}")
        parameters = ", ".join(["start", *self.found.scalars])
        some, none = (f"[{parameters}] -> {{ [q, k] : {c} }}" for c in (" and ".join(hull), " or ".join(gaps)))
        self.found.pairs[self.name] = (some, none) if allowed.inside else (none, some)

    def _begins(self, cut: Cut) -> tuple[str, str]:
        """The first tile that some interval touches, and the first that all intervals may fill."""
        first, last = self._entries(cut)
        after = Call("max", (first, last)) if last != first else first
        if self._own_side(cut) and not cut.inclusive:
            # Rows before the first token have no entry of their own.
            assert self.owner is not None
            first = Call("min", (first, self.owner.first))
        touched, filled = self._named("from", self.grid.tile(first), self.grid.tile_after(after))
        if self._own_side(cut) and not cut.inclusive:
            assert self.owner is not None
            self._know(f"{self._token(touched)} <= {self.owner.first_text}")
            if self.owner.exists:
                self._know(f"{self._token(filled)} < {self.owner.first_text} + {self.owner.size + self.grid.size - 1}")
        self._know(f"{touched} <= {filled}")
        if self.grid.from_zero:
            self._know(f"{self._token(filled)} >= 0")
        return touched, filled

    def _ends(self, cut: Cut) -> tuple[str, str]:
        """The first tile that no interval touches any more, and the first that some interval does not fill."""
        first, last = self._entries(cut)
        before = Call("min", (first, last)) if last != first else first
        if self._own_side(cut) and cut.inclusive:
            # Nor have tokens past the last one.
            assert self.owner is not None
            last = Call("max", (last, self.owner.end))
        touched, filled = self._named("to", self.grid.tile_after(last), self.grid.tile(before))
        if self._own_side(cut) and cut.inclusive:
            assert self.owner is not None
            own, size = self.owner, self.grid.size
            self._know(f"{self._token(touched)} >= {own.first_text} + {own.size}")
            self._know(f"{self._token(filled)} + {size} > {own.first_text} + 1")
        self._know(f"{filled} <= {touched}")
        if self.grid.from_zero:
            self._know(f"{filled} >= 0")
        return touched, filled

    def _entries(self, cut: Cut) -> tuple[Scalar, Scalar]:
        """A cut of a tile's first and of its last owner; which is less is certain only of sorted data."""
        decl = cut_input(cut, self.program)
        assert decl is not None
        if not cut.owner:
            return (entry(decl, Const(0)),) * 2
        assert self.owner is not None
        return entry(decl, self.owner.first), entry(decl, self.owner.last)

    def _named(self, which: str, touched: Scalar, filled: Scalar) -> tuple[str, str]:
        names = f"{self.name}_touched_{which}", f"{self.name}_filled_{which}"
        self.found.scalars |= dict(zip(names, (touched, filled), strict=True))
        return names

    def _token(self, tile: str) -> str:
        """The position of a tile's first token, tokens in order, as isl writes it."""
        return f"{self.grid.size} {tile} + {self.grid.origin_text.removeprefix(' - ') or '0'}"

    def _own_side(self, cut: Cut) -> bool:
        """Whether the own position tells where the cut lies."""
        return self.grid.comb.every and reflexive(cut, self.program)

    def _know(self, fact: str) -> None:
        self.found.tiles.append(fact)
