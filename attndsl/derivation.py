"""Sets that no closed form holds, and the tensors that the runtime computes for them before a kernel runs.

A *derived input* is read by a kernel like any other input; what it holds follows from a call's inputs, arguments and
lengths. `derive` puts reads of derived inputs in the place of the sets below; `runtime.derive` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from attndsl.diagnostics import Span
    from attndsl.program import Coarse, Scalar, Set
    from attndsl.runs import TileRuns


@dataclass(frozen=True, slots=True)
class Segment:
    """A place: the distance from the first token of the segment, a maximal run of equal entries of an int input.

    The input's last dimension is k; `lead` holds its other indices. Inside, Nq and Nk stay what they are: distances
    lie below them.
    """

    input: str
    lead: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Where a set that looks at all pairs stands inside a sequence of its own, of the tokens from `first` to before
    `end`, which a row reads: its coordinates are (q - first) // unit and (k - first) // unit (`unpack.py`).

    `alone`: of a coarsened set, the operand in these coordinates, where it is the same in every sequence. `at`: the
    coordinates of a query and of a key at which the set is read, where data places tokens; some that the sequence has.
    `rows`: before which position its rows stand, where not before `end`: under `align start`.
    """

    first: Scalar
    end: Scalar
    unit: int
    alone: Set | None = None
    at: tuple[Scalar, Scalar] | None = None
    rows: Scalar | None = None


@dataclass(frozen=True, slots=True)
class Random:
    """A set: the pairs of `among` whose key member is one of the `count` drawn for their row class.

    Row class r of q is q // rows (None: 0, all rows are one class), member m of k is k // keys. Of the members with
    an existing pair in `among`, those with the least `splitmix64(seed, h, r, m)` are drawn, ties to the lower m.
    `written`: the text says `among`; otherwise everything around the set is within it already. `document`: rows,
    members and what exists are those of a sequence of its own; `among` is of the call's positions.
    """

    count: int
    keys: int
    rows: int | None
    seed: Scalar
    among: Set
    written: bool
    span: Span | None = field(default=None, compare=False, repr=False)
    document: Document | None = field(default=None, kw_only=True)


# ------------------------------------------------------------------------------------- derivations


@dataclass(frozen=True, slots=True)
class Offsets:
    """int32 of the input's own dimensions: each token's distance from the first of its segment."""

    input: str


@dataclass(frozen=True, slots=True)
class Extents:
    """Of the input's type, its tokens replaced by the entries of a view: the least or the largest of each extent
    [stride j, stride j + size)."""

    input: str
    size: int
    stride: int
    largest: bool


@dataclass(frozen=True, slots=True)
class EntryMap:
    """bool [b?, h?, rows or classes, entries]: whether `operand` holds for every token of an entry's nominal extent
    [stride j, stride j + size), or unless `every` for one of it that is present; at a row of the call, or with
    `rows` > 1 at each query of the nominal extent of a class q // rows. present: how many tokens are (None: all).
    ends: of entries that data tells, the first and the last token of the entry k."""

    operand: Set
    size: int
    stride: int
    every: bool
    rows: int
    present: Scalar | None
    ends: tuple[Scalar, ...] = ()


@dataclass(frozen=True, slots=True)
class OrderedRuns:
    """int64 [b?, h?, tokens]: the run of each token among tokens in the order of their places, a maximal one of equal
    ids, by the number of its first token there; -1 of a token at no place. `ids`, `place`: of token k. present: how
    many tokens are (None: all)."""

    ids: Scalar
    place: Scalar
    present: Scalar | None


@dataclass(frozen=True, slots=True)
class PresentRuns:
    """int64 of the input's own dimensions and the batch: what it holds of tokens that are present, as many as another
    input says (`lengths`), in a decode no more than a sequence has, and past them one number that no run of theirs goes
    on with. With `documents`, the input whose runs are documents, a number in the place of each run of equal entries in
    one document."""

    input: str
    lengths: str | None
    documents: str | None = None


@dataclass(frozen=True, slots=True)
class RunEnds:
    """int32 of the input's own dimensions, its tokens replaced by its runs of equal entries, in order: the first token
    of each, or with `last` its last."""

    input: str
    last: bool


@dataclass(frozen=True, slots=True)
class RunCount:
    """int32 of the input's own dimensions, its last of size 1: how many runs of equal entries it has."""

    input: str


@dataclass(frozen=True, slots=True)
class RunExtents:
    """Of the input's type, as int64 or bool, of its own dimensions and those of `ids`, its tokens replaced by the runs
    of equal entries of `ids`: the least or the largest of each; 0 of what is no run."""

    input: str
    ids: str
    largest: bool


@dataclass(frozen=True, slots=True)
class DocumentEnds:
    """int32 of the input's own dimensions: the first token of each token's document, a maximal run of equal entries, or
    with `ends` one past its last."""

    input: str
    ends: bool


@dataclass(frozen=True, slots=True)
class DocumentBlocks:
    """int32 of the input's own dimensions: the number of the first block of each token's document, blocks of `size`
    tokens of all documents being counted one document after the other."""

    input: str
    size: int


class EntryPlace(Enum):
    """A token that an entry of a document has: its first one, the one past its last, the first one of its document."""

    FIRST = "first"
    END = "end"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class DocumentEntries:
    """int32 of the input's own dimensions, its tokens replaced by entries, in order: one every `stride` tokens of each
    document, of at most `size` tokens that this has from there on. Of each a token (`place`); where there are no more
    entries, one past the last token."""

    input: str
    size: int
    stride: int
    place: EntryPlace


@dataclass(frozen=True, slots=True)
class BlockMap:
    """bool [b?, h?, q blocks, k blocks]: whether any, all, or a fraction of a block pair's pairs are in `operand`.

    `unit`: coordinates are positions // unit (1 unless under `on blocks`). `everywhere`: blocks of rows that the call
    does not hold are read too. `document`: bool [b?, h?, positions, k blocks], the blocks of each position's own
    sequence, which begin where that does.
    """

    operand: Set
    block_q: int
    block_k: int
    mode: Coarse
    fraction: float
    unit: int
    everywhere: bool
    document: Document | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """int64 [b?, h, row classes, 2]: the greatest hash drawn for a row class, as the bits of an unsigned number, and
    the greatest member drawn with that hash. `unit` and `everywhere` as in `BlockMap`; where what is drawn stands in
    documents there is an entry for each position, or row of the call, in the place of one for each class.

    With `members` int32 [b?, h, row classes?, count]: the members drawn themselves, as a plan lists them.
    """

    drawn: Random
    unit: int
    everywhere: bool
    members: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """int32 [b?, h?, positions?]: how far the positions of the other side reach whose value is below one's own.

    `own` and `other` are integers that do not decrease with their positions (`owner` and `cut`, "q" or "k"; `owner` is
    "" where `own` reads none). An entry is the first position at which `other` is no longer below `own` (`inclusive`:
    at most `own`), from the first that the other side has to one past its last, whatever the inputs hold.
    """

    own: Scalar
    other: Scalar
    owner: str
    cut: str
    inclusive: bool


# The fewest rows that an entry of a table stands for where it maps tiles: else it has as many as a call has rows.
LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Chosen:
    """bool of the plan's dimensions, its list replaced by all members, of `keys` tokens: which of them it chooses,
    or gives this `level`. `sought`: they may be as many as tokens, for few rows each, so that what a list has
    is looked up there (`listing.listed`)."""

    plan: str
    keys: int
    level: int | None = None
    sought: bool = False


@dataclass(frozen=True, slots=True)
class Listed:
    """int32 of the plan's dimensions: the members that it lists, each once and in increasing order, and after them the
    number of tokens. It stands for a `Chosen` (`listing.listed`): a kernel that reads it at a member looks that up."""

    plan: str


@dataclass(frozen=True, slots=True)
class SpanList:
    """int32 [b?, h or g?, n]: which tokens the segments have that a plan lists, for tiles of `block_q` queries.

    `listed`: the `Listed` input of the plan, `offsets`: each token's distance from the first of its segment, `rows` as
    in `TileList`. The tokens of a tile's segments are counted one after another. A list begins with `SPAN_HEAD` numbers
    for each query tile: the place of its ends, that of its shifts, and how many tokens there are. There is an end for
    each entry of the plan, how many tokens there are up to it, and a shift, how much further those of the segment stand
    than they are counted.

    With `marks` it is a list of key tiles of so many tokens, at most 32, as `TileList` has it with `marks`. A tile that
    lies in a segment has its list in common with all such tiles of it.
    """

    listed: str
    offsets: str
    rows: int | None
    block_q: int
    marks: int = 0


@dataclass(frozen=True, slots=True)
class CallMembers:
    """int32 [b, h or g?, rows, 2 * C]: the blocks of `keys` tokens of a call that hold a part of those of its document
    that a row chooses, which a plan lists, C a row; `ids` tells documents apart. A block of a document lies in at most
    two. Blocks do not decrease, but one may stand twice, and -1 anywhere, which counts for nothing in a plan."""

    plan: str
    ids: str
    keys: int


@dataclass(frozen=True, slots=True)
class TileList:
    """int32 [b?, h or g?, n]: the tiles that a plan chooses, in lists as `tiles.listed_runs` reads them.

    `rows`: the queries of a row class (None: all rows are one class), `keys`: the tokens of a member; tiles lie inside
    them. `of_keys`: the query tiles of each key tile, instead of the key tiles of each query tile. `runs`: which key
    tiles of a query tile, were they chosen, are full or partial. `level`: as in `Chosen`. `mapped`: the plan is a
    `TileMap`, which tells full tiles too. Over a view with an entry every `stride` tokens, `keys` and `block_k` count
    entries.

    `complement`: the tiles that it does not choose.

    With `marks`, at most 32, a list of keys is of tiles of so many times `block_k` keys: a query tile stands in it once
    for several of these, and behind all entries stands for each a word whose bit i says that it chose the i-th.
    """

    plan: str
    rows: int | None
    keys: int
    block_q: int
    block_k: int
    of_keys: bool
    runs: TileRuns
    level: int | None = None
    mapped: bool = False
    marks: int = 0
    stride: int = 1
    complement: bool = False


@dataclass(frozen=True, slots=True)
class Gathering:
    """int32 [b?, h or g?, n]: which rows of a call chose each member in a plan that lists C members a row.

    An *entry* is row * W + slot, the slot being the member's place in the row's list and W the power of two from C on.
    Entries lie by member, those whose row sees the whole member before those that see a part, by row. A list begins
    with three places for each member: where its entries begin, where the second kind does, and where they end; then
    come three numbers for each query tile of at most `block` entries: 2 * member + (1 for the second kind), and where
    its entries begin and end, the same for a tile that is not needed; then the entries. `runs`: which members a row
    would see, whole or in part.
    """

    plan: str
    keys: int
    block: int
    runs: TileRuns


@dataclass(frozen=True, slots=True)
class TileMap:
    """uint8 [b?, h?, row tiles, key tiles]: 2 where a condition holds for all pairs of a tile of `rows` rows of the
    call and one of `keys` keys, 1 where it may hold for some, as far as the bounds of what it compares tell, else 0."""

    cond: Scalar
    rows: int
    keys: int


@dataclass(frozen=True, slots=True)
class Order:
    """int32 [b?, g?, rows or keys]: the tokens of one side (`side`, "q": the call's rows, "k": keys), those with the
    least `key` first, of equal ones the earlier first. `key` reads a row of the call as q (`permuting.py`). `same`: the
    input that this one is in calls with as many rows as keys, if there is one."""

    key: Scalar
    side: str
    same: str = ""


@dataclass(frozen=True, slots=True)
class Sorted:
    """int64 of the dimensions of `order`: the `key` of each of its tokens. `same`: as in `Order`."""

    key: Scalar
    side: str
    order: str
    same: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """int64 of the dimensions of `own`, of sorted keys: numbers that increase first with the key, then with `position`,
    that of the token. A key's share counts those of `among`, the keys' sorted keys, that come before it, and those that
    do not come after it: it increases from any key to a greater one that a token of either side has. `same`: as in
    `Order`."""

    own: str
    among: str
    position: Scalar
    side: str
    same: str = ""


@dataclass(frozen=True, slots=True)
class Alike:
    """bool [1]: whether the rows of a call share their sorted key (`own`) with many keys each, on average, of those in
    `among`."""

    own: str
    among: str


@dataclass(frozen=True, slots=True)
class RowTiles:
    """int32 [b?, n]: how many query tiles of at most `rows` rows a call has, the first row of each, and from then on
    the number of rows.

    A tile begins at row 0, where a document of at least `long` rows does, and where the one before is full. `first`:
    the cut that tells the first token of each token's document.
    """

    first: str
    rows: int
    long: int


Derivation: TypeAlias = (
    OrderedRuns | Offsets | Extents | EntryMap | PresentRuns | RunEnds | RunCount | RunExtents | DocumentEnds
    | DocumentBlocks | DocumentEntries | BlockMap | Draw | Chosen | CallMembers | Listed | SpanList | TileList | Cut
    | Gathering | TileMap | Order | Sorted | Place | RowTiles | Alike
)  # fmt: skip


def document_of(derivation: Derivation | None) -> Document | None:
    """Where the pairs that are counted stand inside sequences of their own."""
    match derivation:
        case BlockMap(document=document) | Draw(drawn=Random(document=document)):
            return document
        case _:
            return None


def counted(derivation: Derivation | None) -> Set | None:
    """The set whose pairs are counted for a derived input."""
    match derivation:
        case BlockMap(operand=operand) | EntryMap(operand=operand):
            return operand
        case Draw(drawn=drawn):
            return drawn.among
        case _:
            return None


def read_beside(derivation: Derivation | None) -> tuple[Scalar, ...]:
    """What a derived input of counted pairs follows from beside these."""
    match derivation:
        case EntryMap(ends=ends):
            return ends
        case Draw(drawn=drawn):
            return (drawn.seed,)
        case _:
            return ()
