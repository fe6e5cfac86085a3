"""Query tiles that begin where documents do.

Of a document whose first token lies inside a tile, each tile of rows sees a part of two key tiles; where the tiles of
both sides count from its first token, of one. So a kernel that is handed its query tiles takes them from a table that
the device makes of the first key of each row, a cut (`cuts.py`): a document long enough begins a tile, and the tiles
after it follow from there. Its key tiles count from the same token (`shifted` in `tiles.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from attndsl.cuts import reflexive
from attndsl.derivation import Chosen, Cut, Draw, Listed, RowTiles
from attndsl.inputs import Axis, Dim, InputDecl
from attndsl.mapping import mapped
from attndsl.program import Const, Program, Read, Scalar, Type, Var

if TYPE_CHECKING:
    from attndsl.plan import Spec, Tiling

# Tokens of a document that begins a tile. With 128 documents of a few hundred tokens visit 1 % fewer tiles, but where
# each is a token longer than a tile half more; with 512 it is 3 % more and at most a tenth.
LONG = 256


def with_row_tiles(program: Program, spec: Spec, tiling: Tiling) -> Program | None:
    """The program with the table of a kernel's query tiles as its last input, where it has one.

    The program declares its cuts, and its tiles are neither listed nor mapped.
    """
    listed = any(isinstance(decl.derivation, Chosen | Draw | Listed) for decl in program.inputs)
    if program.align_start or listed or (spec.maps and mapped(program)) or tiling.block_q % tiling.block_k:
        return None
    first = next((decl for decl in program.inputs if _begins(decl, program)), None)
    if first is None:
        return None
    lead = tuple(dim for dim in first.dims if dim.axis is Axis.B)
    name, taken = "row_tiles", {decl.name for decl in program.inputs}
    while name in taken:
        name += "_"
    decl = InputDecl(name, Type.INT, (*lead, Dim(Axis.LIST)), derivation=RowTiles(first.name, tiling.block_q, LONG))
    return replace(program, inputs=(*program.inputs, decl))


def _begins(decl: InputDecl, program: Program) -> bool:
    """Whether an input tells where the documents of rows begin, the same for all heads."""
    cut = decl.derivation
    if not isinstance(cut, Cut) or cut.owner != "q" or cut.inclusive or not reflexive(cut, program):
        return False
    return all(dim.axis in (Axis.B, Axis.K) and dim.block == 1 for dim in decl.dims)


def most_tiles(table: RowTiles, rows: int) -> int:
    """The most query tiles that a table of so many rows has."""
    return -(-rows // table.rows) + rows // table.long


def table_entry(decl: InputDecl, place: Scalar) -> Read:
    """An entry of the table: the number of tiles, then the first row of each, and the number of rows."""
    lead = (Var("b"),) if len(decl.dims) == 2 else ()
    return Read(decl.name, (*lead, place), Type.INT)


def table_head(decl: InputDecl) -> Read:
    return table_entry(decl, Const(0))
