"""The kernel of dk and dv where the rows of a key tile stand in a list: those that chose it, or some of its keys."""

from __future__ import annotations

from abc import ABC, abstractmethod

from attndsl.codegen.triton_backward import DkDvKernel
from attndsl.mask import ROW
from attndsl.program import Read, reads


class RowLists(DkDvKernel, ABC):
    """A program owns a key tile, and goes over the rows that its list names, for each head.

    Entries are read a turn ahead. Where a turn read its own, the loads of its rows had to wait for them: no pipeline
    begins a load before it knows the address.
    """

    @property
    @abstractmethod
    def row_list(self) -> Read:
        """An entry of the list."""

    @abstractmethod
    def ends(self) -> str:
        """Say where the tile's list begins and ends. Returns how many entries make a tile of rows."""

    @abstractmethod
    def read(self, place: str) -> None:
        """Read the entries from a place on."""

    @abstractmethod
    def take(self, place: str) -> None:
        """Of the entries that were read from a place on, the rows: `q_rows`."""

    def heads(self) -> None:
        """One loop over the rows of all heads: in a loop over heads, addresses of single rows would be kept between
        its turns, and spill. Where heads have lists of their own, or something is summed head by head, there is one
        all the same."""
        lines = self.lines
        if self.group == 1 or self.learned or reads(self.row_list, "h"):
            super().heads()
            return
        several = self.ends()
        lines.add(f"tiles = tl.cdiv(end - begin, {several})")
        self.printer.hoist(lines, self.pairs(masked=True), (*ROW, "s", "h"), "column_")
        self.read("begin")
        lines.add(
            f"# Rows that chose these keys, of one head after the other: their sum has one order. Pairs are "
            f"masked.{self.origin}"
        )
        with lines.block(f"for n in range({self.group} * tiles):"):
            lines.add(f"h = g * {self.group} + n // tiles")
            self.of_head()
            self._rows("n % tiles", "(n + 1) % tiles", several)

    def loops(self, tile: str) -> None:
        several = self.ends()
        self.read("begin")
        self.lines.add(f"# Rows that chose these keys: pairs are masked.{self.origin}")
        with self.lines.block(f"for i in range(tl.cdiv(end - begin, {several})):"):
            self._rows("i", "(i + 1)", several)

    def _rows(self, turn: str, following: str, several: str) -> None:
        self.take(f"begin + {turn} * {several}")
        self.tile(masked=True)
        # Last: read before the tile, the next entries take registers that spill.
        self.read(f"begin + {following} * {several}")
