"""Results of a run as a table for people and as JSON for programs."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.peers import OURS, versions


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement, or the reason why there is none. `first_s`: seconds until the first result."""

    ms: float | None = None
    first_s: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row of the table: `area` is the allowed share of all pairs, `flop` what they cost; no floor on a CPU."""

    name: str
    title: str
    area: float
    flop: float
    floor_ms: float | None
    cells: dict[str, Cell]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a run found; `command` reproduces it."""

    command: str
    setting: str
    rows: list[RowResult] = field(default_factory=list)

    def save(self, path: Path) -> None:
        document = {"date": today(), "device": device_name(), "versions": versions(), **asdict(self)}
        path.write_text(json.dumps(document, indent=1) + "\n")


def today() -> str:
    return datetime.date.today().isoformat()


def device_name() -> str:
    """The GPU's name, else the processor's with the number of threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"


def heading(report: Report) -> str:
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{today()}, {device_name()}; {installed}\n{report.setting}"


def ratio(ours: Cell | None, other: Cell) -> str:
    """How many times longer the other took: above 1 we are ahead."""
    if ours is None or ours.ms is None or other.ms is None:
        return ""
    return f" {other.ms / ours.ms:.2f}x"


def cell_text(cell: Cell, flop: float, ours: Cell | None) -> str:
    if cell.ms is None:
        return cell.note
    return f"{cell.ms:.3g} ({flop / cell.ms / 1e9:.3g}){ratio(ours, cell)}"


def timing_table(report: Report) -> list[list[str]]:
    """Header and rows; a cell is `ms (effective TFLOP/s) ratio to ours`."""
    names = list(dict.fromkeys(name for row in report.rows for name in row.cells))
    table = [["pattern", "area", "floor ms", *names]]
    for row in report.rows:
        ours = row.cells.get(OURS.name)
        texts = [cell_text(row.cells[n], row.flop, None if n == OURS.name else ours) for n in names]
        table.append(
            [row.title, f"{100 * row.area:.2f} %", "-" if row.floor_ms is None else f"{row.floor_ms:.3g}", *texts]
        )
    return table


def render(table: Sequence[Sequence[str]], markdown: bool) -> str:
    """A table as aligned text, or as Markdown."""
    if markdown:
        escaped = [[text.replace("|", "\\|") for text in row] for row in table]
        lines = ["| " + " | ".join(row) + " |" for row in escaped]
        lines.insert(1, "|" + "---|" * len(table[0]))
        return "\n".join(lines)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in table)
