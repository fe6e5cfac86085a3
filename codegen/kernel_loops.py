"""Loops over runs of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import Level, Printer
from attndsl.program import Const, Read, Scalar, walk
from attndsl.runs import PLACE, Run


@contextmanager
def run_loop(lines: Lines, printer: Printer, runs: tuple[Run, ...], label: str, tile: str) -> Iterator[None]:
    """A loop over the tiles of several runs, as if they were one: `tile` is the tile's index inside.

    A list is read a turn ahead: where a turn read its own entry, the loads of its tile had to wait for it.
    """
    visits = Visits(lines, printer, runs, label)
    ahead = len(runs) == 1 and runs[0].list is not None
    if ahead:
        lines.add(f"{label}_next = {visits.tile('0')}")
    with lines.block(f"for i in range({visits.total}):"):
        if ahead:
            lines.add(f"{tile} = {label}_next", f"{label}_next = {visits.tile('(i + 1)')}")
        else:
            lines.add(f"{tile} = {visits.tile('i')}")
        yield


class Visits:
    """Several runs as one sequence: its length, and the tile that an iteration visits.

    given: the text of an end of these names, `ends`, where others found it; None: it is computed.
    """

    def __init__(
        self, lines: Lines, printer: Printer, runs: tuple[Run, ...], label: str, given: Callable[[], str] | None = None
    ) -> None:
        self.runs, self.label, self.select, self.printer = runs, label, printer.dialect.select, printer
        self.ends: list[str] = []
        for i, run in enumerate(runs):
            suffix = f"_{i}" if len(runs) > 1 else ""
            for end, e in (("first", run.first), ("count", run.count)):
                self.ends.append(f"{label}_{end}{suffix}")
                text = given() if given is not None else self._end(e, end == "count")
                lines.add(f"{self.ends[-1]} = {text}")
        self.total = f"{label}_count"
        if len(runs) > 1:
            # Iterations before `end_n` belong to run n or an earlier one; `base_n` is where run n would have begun.
            for i, run in enumerate(runs):
                before = f"{label}_end_{i - 1}" if i else ""
                lines.add(f"{label}_end_{i} = {before + ' + ' if before else ''}{label}_count_{i}")
                lines.add(f"{label}_base_{i} = {label}_first_{i}" + (f" - {before}{_times(run)}" if before else ""))
            self.total = f"{label}_end_{len(runs) - 1}"

    def _end(self, e: Scalar, count: bool) -> str:
        """The text of the first tile of a run, or of how many it has."""
        text, language = self.printer.text(e), self.printer.dialect.language
        if count and isinstance(e, Const):
            # Not a constant to the compiler, which would unroll the loop and with it its pipeline.
            text = f"{language}.minimum(k_len, {text})"
        if any(isinstance(x, Read) for x in walk(e)):
            # An input may be of 64 bits; tiles are counted in 32.
            text = f"({text}).to({language}.int32)"
        return text

    def tile(self, i: str) -> str:
        """The tile of iteration `i`."""
        runs, label = self.runs, self.label
        after = ["" if i == "0" else f" + {i}{_times(run)}" for run in runs]
        if len(runs) == 1:
            return self._at(runs[0], f"{label}_first{after[0]}")
        alike = len({run.step for run in runs}) == 1 and all(run.list is None for run in runs)
        choice = ""
        for n in reversed(range(len(runs))):
            value = f"{label}_base_{n}"
            if not alike:
                value = self._at(runs[n], f"{value}{after[n]}")
            choice = f"{self.select}({i} < {label}_end_{n}, {value}, {choice})" if choice else value
        return f"{choice}{after[0]}" if alike else choice

    def _at(self, run: Run, place: str) -> str:
        """The tile at a place of a run: itself, or the entry of the run's list."""
        if run.list is None:
            return place
        printer = self.printer.within(self.printer.names.inner())
        printer.names.known[PLACE] = place
        language = printer.dialect.language
        return f"{printer.text(run.list, Level.UNARY)}.to({language}.int32)"


def _times(run: Run) -> str:
    return f" * {run.step}" if run.step > 1 else ""
