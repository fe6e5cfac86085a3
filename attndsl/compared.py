"""What the search for pieces compared: ways to visit a pattern, with what each costs. `explain` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Tokens in order are kept unless the pieces cost less than this share.
WORTH_IT = 0.75


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A way to visit a pattern. layouts: of its pieces, in turn. Costs are in tiles of 128 x 64: `tiles` of the tiles
    visited, `programs` of what programs do besides, among it taking up the results of earlier pieces.

    known: that is all it costs; else more of it is not known, or is not counted, being too much already.
    """

    layouts: tuple[Any, ...]
    tiles: float
    programs: float
    known: bool = True

    @property
    def cost(self) -> float:
        """What it costs, as far as that is known."""
        return self.tiles + self.programs


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Ways that were compared; at: where; chosen: the one that is taken, if one of these is."""

    at: str
    ways: tuple[Way, ...]
    chosen: Way | None

    def lines(self) -> list[str]:
        """The ways, those that cost least first."""
        share = f"{100 * WORTH_IT:.0f} %"
        found = [f"considered {self.at}, costs in tiles of 128 x 64, taken below {share} of tokens in order:"]
        for way in sorted(self.ways, key=lambda way: way.cost):
            mark = "chosen: " if way is self.chosen else ""
            cost = f"{way.cost:,.0f}{'' if way.known else ' or more'}"
            visited = f"{'' if way.known else 'at least '}{way.tiles:,.0f} visited"
            parts = f"{visited}, {way.programs:,.0f} for programs and merging"
            found.append(f"  {cost}  {mark}{in_turn(way.layouts)}  ({parts})")
        return found


def in_turn(layouts: Sequence[Any]) -> str:
    """Layouts of pieces that follow one another, equal ones counted."""
    texts = [str(layout) for layout in layouts]
    counted = [f"{f'{texts.count(text)} times ' * (texts.count(text) > 1)}{text}" for text in dict.fromkeys(texts)]
    return "; then ".join(counted)
