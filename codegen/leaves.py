"""Leaves of the expressions in a Triton or Gluon kernel: positions, arguments, and entries of tables and inputs."""

from __future__ import annotations

from dataclasses import dataclass

from attndsl.codegen.scalars import Level, Printer
from attndsl.derivation import Gathering, Listed, RowTiles, SpanList, TileList
from attndsl.grid import AXIS_NAMES
from attndsl.plan import Plan
from attndsl.program import Arg, Axis, Const, Dim, Read, Scalar, Table, TableDecl, Type, Var
from attndsl.widths import LARGEST

_VARIABLES = {
    "q": "q_pos", "k": "k_pos", "b": "b", "h": "h", "g": "g", "Nk": "k_len", "start": "start",
    "q_tile": "q_tile", "k_tile": "k_tile", "diagonal": "diagonal", "residue": "residue", "i": "i_pos", "j": "j_pos",
    "i_start": "i_start", "shift": "shift", "q_last": "q_last", "d": "channel",
}  # fmt: skip
# Along each axis of a grid: indices have the shape of a tile of pairs, all else is a number.
_VARIABLES |= {name: name.replace("i_", "i_pos_").replace("j_", "j_pos_") for name in AXIS_NAMES}


@dataclass(frozen=True, slots=True)
class Leaves:
    """Text of a Triton kernel's leaves. `ragged`: each sequence has its own length, and `last_key` its last index."""

    plan: Plan
    ragged: bool = False

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

    def any_integers(self, e: Read | Table) -> bool:
        """Whether an input holds integers that a call gives: any that its memory has, however long the call is. Or a
        table the largest of 32 bits."""
        if isinstance(e, Read):
            return self.plan.program.input(e.input).holds_integers
        return e.type is Type.INT and any(abs(x) >= LARGEST for x in self.plan.program.table(e.name).values)

    def _table(self, table: TableDecl, index: tuple[Scalar, ...], printer: Printer) -> str:
        terms, stride = [], 1
        for e, size, dim in reversed(list(zip(index, table.shape, table.dims, strict=True))):
            text = self._clamped(e, dim, str(size - 1), printer)
            terms.append(text if stride == 1 else f"{text} * {stride}")
            stride *= size
        return f"{printer.dialect.language}.load({table.name}_table + {' + '.join(reversed(terms))})"

    def _read(self, name: str, index: tuple[Scalar, ...], printer: Printer) -> str:
        decl = self.plan.program.input(name)
        terms: list[str] = []
        language = printer.dialect.language
        looked_up = isinstance(decl.derivation, Listed)
        for i, (e, dim) in enumerate(zip(index, decl.dims, strict=True)):
            if looked_up and dim.axis is Axis.LIST:
                printer.helpers.add("listed")
                row = " + ".join(terms) or "0"
                return f"listed({decl.parameter}_ptr, {row}, {decl.parameter}_size_{i}, {printer.text(e)})"
            text = self._index(e, dim, f"{decl.parameter}_size_{i}", printer)
            # All but the last dimension may carry an offset past 2**31.
            if i < len(index) - 1 and not text.isdecimal():
                text = f"{text}.to({language}.int64)" if text.isidentifier() else f"({text}).to({language}.int64)"
            # Entries of a derived list lie side by side: a stride would be a product of 64 bits for each.
            beside = dim.axis is Axis.LIST and isinstance(decl.derivation, TileList | SpanList | Gathering | RowTiles)
            terms.append(text if beside else f"{text} * {decl.parameter}_stride_{i}")
        load = f"{language}.load({' + '.join([f'{decl.parameter}_ptr', *terms])})"
        if decl.holds_integers:
            printer.helpers.add("widened")
            return f"widened({load})"
        return f"{load}.to({language}.float32)" if decl.type is Type.FLOAT else load

    def flat(self, read: Read, printer: Printer) -> str:
        """The place of an entry among all of the input's declared shape, row-major, in 64 bits."""
        decl, found = self.plan.program.input(read.input), ""
        for i, (e, dim) in enumerate(zip(read.index, decl.dims, strict=True)):
            size = str(dim.size) if dim.axis is Axis.CONST else f"{decl.parameter}_size_{i}"
            text = self._index(e, dim, f"{decl.parameter}_size_{i}", printer)
            if not text.isdecimal():
                text = f"{text}.to(tl.int64)" if text.isidentifier() else f"({text}).to(tl.int64)"
            found = f"({found}) * {size} + {text}" if " " in found else f"{found} * {size} + {text}" if found else text
        return found or "0"

    def _index(self, e: Scalar, dim: Dim, size: str, printer: Printer) -> str:
        if dim.axis is Axis.Q and dim.block == 1:
            if e == Var("q"):
                return "q_index"
            printer.helpers.add("within")
            return f"within({printer.text(e, Level.SUM)} - start, rows - 1)"
        last = f"{dim.size - 1}" if dim.axis is Axis.CONST else f"{size} - 1"
        if self.ragged and dim.axis in (Axis.K, Axis.Q):
            last = "last_key" if dim.block == 1 or dim.apart else f"last_key // {dim.block}"
            if dim.size > 1:
                # Of tiles as many of a block.
                last = f"{last} * {dim.size} + {dim.size - 1}"
        elif dim.axis is Axis.K and dim.block == 1:
            last = "k_len - 1"
        return self._clamped(e, dim, last, printer)

    def _clamped(self, e: Scalar, dim: Dim, last: str, printer: Printer) -> str:
        """The index between 0 and the dimension's last, unless it is the dimension's own variable."""
        match e:
            case Var(name="b" | "h" | "g" as name) if name == dim.axis.value:
                return name
            case Const(value=int(value)) if dim.axis is Axis.CONST and 0 <= value < dim.size:
                return str(value)
            case Var(name="d") if dim.axis is Axis.DV and self.plan.spec.v_dim.bit_count() == 1:
                return "channel"
            case Var(name="k") if dim.axis is Axis.K:
                return f"{printer.dialect.language}.minimum(k_pos, {last})"
            case _:
                printer.helpers.add("within")
                return f"within({printer.text(e)}, {last})"
