"""What derived inputs hold, in words."""

from __future__ import annotations

from typing import assert_never

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
    EntryPlace,
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
from attndsl.notation import scalar_text, set_text
from attndsl.program import InputDecl
from attndsl.selection import WHOLE

_PLACES = {
    EntryPlace.FIRST: "first token", EntryPlace.END: "end", EntryPlace.DOCUMENT: "document's first token",
}  # fmt: skip


def made_of(decl: InputDecl) -> str:
    """What a derived input holds."""
    match decl.derivation:
        case DocumentEnds(input=name, ends=ends):
            return f"{'one past the last' if ends else 'the first'} token of each document of `{name}`"
        case DocumentBlocks(input=name, size=size):
            of = "the documents" if size >= WHOLE else f"the blocks of {size} tokens of documents"
            return f"how many of {of} of `{name}` lie before each token's"
        case CallMembers(plan=plan, keys=keys):
            return f"the blocks of {keys} tokens of the call that hold a part of those in `{plan}`"
        case Extents(input=name, largest=largest):
            return f"the {'largest' if largest else 'least'} `{name}` of each entry's tokens"
        case EntryMap(operand=operand, every=whole, rows=rows):
            which = "all tokens of each entry are" if whole else "a token of each entry is"
            return f"at which {'rows' if rows == 1 else 'classes of queries'} {which} in {set_text(operand)}"
        case RunEnds(input=name, last=last):
            return f"the {'last' if last else 'first'} token of each segment of `{name}`"
        case RunCount(input=name):
            return f"how many segments of `{name}` there are"
        case RunExtents(input=name, ids=ids, largest=largest):
            return f"the {'largest' if largest else 'least'} `{name}` of each segment of `{ids}`"
        case DocumentEntries(input=name, size=size, stride=stride, place=place):
            every = "" if stride == size else f" every {stride}"
            return f"the {_PLACES[place]} of each entry of {size} tokens{every} of documents of `{name}`"
        case OrderedRuns(ids=ids, place=place):
            return f"the segment of `{scalar_text(ids)}` that each token is of, in the order of {scalar_text(place)}"
        case PresentRuns(input=name, lengths=lengths, documents=documents):
            until = "" if lengths is None else f" of the tokens before `{lengths}`"
            return f"`{name}`{until}" + ("" if documents is None else f", each document of `{documents}` apart")
        case Offsets(input=name):
            return f"distances in the segments of `{name}`"
        case BlockMap(operand=operand):
            return f"the blocks of coarsen({set_text(operand)}, …)"
        case Cut(own=own, other=other, cut=cut, inclusive=inclusive):
            which = "at most" if inclusive else "below"
            side = "keys" if cut == "k" else "rows"
            return f"how far the {side} reach whose {scalar_text(other)} is {which} {scalar_text(own)}"
        case Draw(members=True):
            return "the members that `random` draws for a row class"
        case Draw():
            return "the last hash and member that `random` draws for a row class"
        case Order(key=key, side=side):
            return f"the {'rows' if side == 'q' else 'keys'} in the order of {scalar_text(key)}"
        case Sorted(key=key):
            return f"{scalar_text(key)} in that order"
        case Alike():
            return "whether rows share their value with many keys each, on average"
        case Place(side=side):
            return f"the places of {'rows' if side == 'q' else 'keys'}, by value and then by token"
        case RowTiles(long=long):
            return f"the query tiles of a call, which begin where documents of {long} tokens and more do"
        case TileMap():
            return "in which tiles the pattern can hold or must, by the least and greatest of what it compares"
        case Chosen(plan=plan, level=level):
            return f"which members `{plan}` {'chooses' if level is None else f'gives the factor {level}'}"
        case Listed(plan=plan):
            return f"the members that `{plan}` lists, in order"
        case SpanList(listed=listed, marks=marks):
            return f"the {'query tiles of each key tile' if marks else 'tokens of the segments'} in `{listed}`"
        case Gathering(plan=plan):
            return f"the rows that chose each member in `{plan}`"
        case TileList(plan=plan, of_keys=of_keys):
            return f"the {'query tiles of each key tile' if of_keys else 'key tiles of each query tile'} by `{plan}`"
        case None:
            raise AssertionError(f"`{decl.name}` is given")
        case _:
            assert_never(decl.derivation)
