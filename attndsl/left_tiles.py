"""What `skip below` left, as tables: an attention to the tiles that were not dropped, which holds them constant.

Gradients are those of the output with the dropped tiles left out, as if a plan had chosen the others. So a call that
needs them finds first which tiles are left (`skipping.py`), and attends then to a program that reads it:

    tiles     bool[b, h, row tiles, key tiles]     one a part; of the rows of the call and of keys, or of entries
    row tile  int[q]                               the row tile of each row of the call

A pair is asked what its tiles are. Where tiles of kernels lie inside of these they are listed (`listing.py`), and no
pair is asked anything. Of a packed call tiles begin where documents do, of rows and of keys (`of_documents`), so that
they lie inside of none: they are mapped (`mapping.py`), and each call goes this way.
"""

from __future__ import annotations

from dataclasses import replace

from attndsl.branches import Given, Part
from attndsl.program import (
    Axis,
    Binary,
    Const,
    Dim,
    InputDecl,
    Inter,
    Program,
    Read,
    Scalar,
    Type,
    Var,
    Where,
)  # fmt: skip

# Rows of the call, and keys, of a tile.
TILE = 64
ROWS = "row_tile"


def of_left_tiles(program: Program) -> Program:
    """The program of one branch, which skips, that attends to the tiles handed in: after its own inputs the number of
    each row's tile, and a table for each part."""
    branch, taken = program.only, {decl.name for decl in program.inputs}

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    batch = () if program.packed is None else (Dim(Axis.B),)
    rows = InputDecl(free(ROWS), Type.INT, (*batch, Dim(Axis.Q)))
    dims = (Dim(Axis.B), Dim(Axis.H), Dim(Axis.LIST, TILE), Dim(Axis.LIST, TILE))
    tables = [InputDecl(free(f"tiles_{n}"), Type.BOOL, dims) for n in range(len(branch.parts))]
    parts = tuple(replace(part, tiles=table.name) for part, table in zip(branch.parts, tables, strict=True))
    inputs = (*program.inputs, rows, *tables)
    return replace(program.with_branch(parts=parts, skip=None), inputs=inputs)


def without_tiles(program: Program) -> Program:
    """The program as if all tiles were left."""
    if not any(part.tiles for part in program.only.parts):
        return program
    return program.with_branch(parts=tuple(replace(part, tiles="") for part in program.only.parts))


def within_left_tiles(part: Part, first: Scalar | None, program: Program) -> Part:
    """A part of a derived program whose pattern, or what is asked of its entries, says which tiles are left.

    first: of a packed call the first key of a row's document.
    """
    if not part.tiles:
        return part
    # The numbers of rows stand before the tables.
    place = next(n for n, decl in enumerate(program.inputs) if decl.tile)
    numbers = program.inputs[place - 1]
    row: Scalar = Read(numbers.name, tuple(Var(dim.axis.value) for dim in numbers.dims), Type.INT)
    key = Binary("//", Var("k") if first is None else Binary("-", Var("k"), first), Const(TILE))
    left = Where(Read(part.tiles, (Var("b"), Var("h"), row, key), Type.BOOL), part.span)
    if part.view is None or (isinstance(part.view, Given) and part.view.as_tokens):
        return replace(part, pattern=Inter((part.pattern, left), part.span), tiles="")
    entries = left if part.entries is None else Inter((part.entries, left), part.span)
    return replace(part, entries=entries, tiles="")


def tiles_of_documents(rows: int) -> int:
    """How many row tiles a packed call of so many rows may have: documents of no more keys than a tile has, whose first
    tile is their only one, share those of others (`of_documents`)."""
    return -(-rows // TILE) + rows // (TILE + 1) + 2


def reads_tiles(program: Program) -> bool:
    """Whether a program reads which tiles are left."""
    return any(decl.tile for decl in program.inputs)
