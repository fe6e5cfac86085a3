"""The dtypes of derived inputs."""

from __future__ import annotations

from typing import assert_never

import torch

from attndsl.derivation import (
    Alike,
    BlockMap,
    CallMembers,
    Chosen,
    Cut,
    DocumentBlocks,
    DocumentEnds,
    DocumentEntries,
    Draw,
    EntryMap,
    Extents,
    Gathering,
    Listed,
    Offsets,
    Order,
    OrderedRuns,
    Place,
    PresentRuns,
    RowTiles,
    RunCount,
    RunEnds,
    RunExtents,
    Sorted,
    SpanList,
    TileList,
    TileMap,
)
from attndsl.program import InputDecl, Type


def derived_dtype(decl: InputDecl) -> torch.dtype:
    """The dtype of a derived input."""
    match decl.derivation:
        case Offsets() | RunEnds() | RunCount() | Cut() | Order() | RowTiles():
            return torch.int32
        case DocumentEnds() | DocumentBlocks() | DocumentEntries():
            return torch.int32
        case BlockMap() | EntryMap() | Chosen() | Alike():
            return torch.bool
        case Extents() | RunExtents():
            return torch.bool if decl.type is Type.BOOL else torch.int64
        case Draw(members=members):
            return torch.int32 if members else torch.int64
        case Sorted() | Place() | PresentRuns() | OrderedRuns():
            return torch.int64
        case TileMap():
            return torch.uint8
        case CallMembers() | TileList() | Gathering() | Listed() | SpanList():
            return torch.int32
        case None:
            raise AssertionError(f"`{decl.name}` is given")
        case _:
            assert_never(decl.derivation)
