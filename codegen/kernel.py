"""What every generated Triton kernel has: its parameters, leaves of expressions, and loops over runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from attndsl.plan import ForwardPlan
from attndsl.program import Arg, Axis, Const, Dim, Read, Scalar, Table, TableDecl, Type, Var
from attndsl.tiles import Run

from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import Level, Printer

_VARIABLES = {
    "q": "q_pos", "k": "k_pos", "b": "b", "h": "h", "g": "g", "Nk": "k_len", "start": "start",
    "q_tile": "q_tile", "k_tile": "k_tile",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Leaves:
    """Text of a Triton kernel's leaves."""

    plan: ForwardPlan

    def __call__(self, e: Scalar, printer: Printer) -> str:
        match e:
            case Var(name="Nq"):
                return "rows" if self.plan.program.align_start else "k_len"
            case Var(name="s"):
                raise AssertionError("the score has a name before it is read")
            case Var(name=name):
                return _VARIABLES[name]
            case Arg(name=name):
                return f"arg_{name}"
            case Table(name=name, index=index):
                return self._table(self.plan.program.table(name), index, printer)
            case Read(input=name, index=index):
                return self._read(name, index, printer)
            case _:
                raise AssertionError(f"not a leaf: {e}")

    def _table(self, table: TableDecl, index: tuple[Scalar, ...], printer: Printer) -> str:
        terms, stride = [], 1
        for e, size, dim in reversed(list(zip(index, table.shape, table.dims, strict=True))):
            text = self._clamped(e, dim, str(size - 1), printer)
            terms.append(text if stride == 1 else f"{text} * {stride}")
            stride *= size
        return f"tl.load({table.name}_table + {' + '.join(reversed(terms))})"

    def _read(self, name: str, index: tuple[Scalar, ...], printer: Printer) -> str:
        decl = self.plan.program.input(name)
        terms = []
        for i, (e, dim) in enumerate(zip(index, decl.dims, strict=True)):
            text = self._index(e, dim, f"{name}_size_{i}", printer)
            # All but the last dimension may carry an offset past 2**31.
            if i < len(index) - 1 and not text.isdecimal():
                text = f"{text}.to(tl.int64)" if text.isidentifier() else f"({text}).to(tl.int64)"
            terms.append(f"{text} * {name}_stride_{i}")
        load = f"tl.load({name}_ptr + {' + '.join(terms)})" if terms else f"tl.load({name}_ptr)"
        return f"{load}.to(tl.float32)" if decl.type is Type.FLOAT else load

    def _index(self, e: Scalar, dim: Dim, size: str, printer: Printer) -> str:
        if dim.axis is Axis.Q and dim.block == 1:
            if e == Var("q"):
                return "tl.minimum(q_rows, rows - 1)[:, None]"
            printer.helpers.add("clamp")
            return f"clamp({printer.text(e, Level.SUM)} - start, 0, rows - 1)"
        last = f"{dim.size - 1}" if dim.axis is Axis.CONST else f"{size} - 1"
        if dim.axis is Axis.K and dim.block == 1:
            last = "k_len - 1"
        return self._clamped(e, dim, last, printer)

    def _clamped(self, e: Scalar, dim: Dim, last: str, printer: Printer) -> str:
        """The index between 0 and the dimension's last, unless it is the dimension's own variable."""
        match e:
            case Var(name="b" | "h" | "g" as name) if name == dim.axis.value:
                return name
            case Const(value=int(value)) if dim.axis is Axis.CONST and 0 <= value < dim.size:
                return str(value)
            case Var(name="k") if dim.axis is Axis.K:
                return f"tl.minimum(k_pos, {last})"
            case _:
                printer.helpers.add("clamp")
                return f"clamp({printer.text(e)}, 0, {last})"


def scalar_parameters(plan: ForwardPlan) -> list[str]:
    """Parameters of the program's inputs, tables and arguments; sizes and strides only where the text reads them."""
    found: list[str] = []
    for decl in plan.inputs:
        found.append(f"{decl.name}_ptr")
        found += [f"{decl.name}_stride_{i}" for i in range(len(decl.dims))]
        found += [f"{decl.name}_size_{i}" for i in range(len(decl.dims))]
    found += [f"{table.name}_table" for table in plan.tables]
    return found + [f"arg_{name}" for name in plan.args]


def used_parameters(candidates: list[str], body: str) -> list[str]:
    """Those of the candidates that the body reads, in order: a kernel has no dead parameters."""
    words = set(re.findall(r"\w+", body))
    return [name for name in candidates if name in words]


@contextmanager
def run_loop(lines: Lines, printer: Printer, runs: tuple[Run, ...], label: str, tile: str) -> Iterator[None]:
    """A loop over the tiles of several runs, as if they were one: `tile` is the tile's index inside."""
    for i, run in enumerate(runs):
        suffix = f"_{i}" if len(runs) > 1 else ""
        lines.add(f"{label}_first{suffix} = {printer.text(run.first)}")
        lines.add(f"{label}_count{suffix} = {printer.text(run.count)}")
    if len(runs) == 1:
        with lines.block(f"for i in range({label}_count):"):
            lines.add(f"{tile} = {label}_first + i" + (f" * {runs[0].step}" if runs[0].step > 1 else ""))
            yield
        return
    # Iterations before `end_n` belong to run n or an earlier one; a run's tiles start at `base_n + 0 * step`.
    ends = []
    for i, run in enumerate(runs):
        before = f"{label}_end_{i - 1}" if i else ""
        lines.add(f"{label}_end_{i} = {before + ' + ' if before else ''}{label}_count_{i}")
        step = f" * {run.step}" if run.step > 1 else ""
        lines.add(f"{label}_base_{i} = {label}_first_{i}" + (f" - {before}{step}" if before else ""))
        ends.append(f"{label}_end_{i}")
    same_step = len({run.step for run in runs}) == 1
    with lines.block(f"for i in range({ends[-1]}):"):
        choice = ""
        for i in reversed(range(len(runs))):
            step = f" * {runs[i].step}" if runs[i].step > 1 else ""
            value = f"{label}_base_{i}" if same_step else f"{label}_base_{i} + i{step}"
            choice = f"tl.where(i < {ends[i]}, {value}, {choice})" if choice else value
        step = f" * {runs[0].step}" if runs[0].step > 1 else ""
        lines.add(f"{tile} = {choice} + i{step}" if same_step else f"{tile} = {choice}")
        yield
