"""What an attention attends to and how its branches combine.

    view    V ::= Pool f size stride visible counted | Given keys values size stride visible counted
                | Pool f size stride visible counted packed  whose entries begin anew with each document
                | Pool f (Runs input) counted                      an entry a run, its extent told by data
                | Pick input room weight                           an entry a listed token
    part    p ::= P (over V)?                                      over the raw tokens where there is no view
                | P within keys with branch                        two levels: a softmax inside each member
    branch    ::= (name =)? attend p+ (from Queries f size)? { scale e  score e  sink e  weights e }
    output  o ::= Attended name | Merged o+ | Handed e e | Factor e | Sum o o | Product e o

The keys of a view are *entries*: entry j stands for the tokens [j * stride, j * stride + size), its nominal extent,
and exists when j * stride < Nk. Row q sees it where the part's pattern holds at q for every token of that extent,
present or not (`visible = any`: for some token that is present).

Of a view of runs entry j is the j-th maximal run of equal entries of an int input, and its extent that run. There is
room for as many entries as there are tokens; what is no run no row sees. Of listed tokens entry j is the one that an
int input lists at j; a number that is no token's is no entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from attndsl.inputs import Axis, Dim
from attndsl.members import Runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from attndsl.diagnostics import Span
    from attndsl.program import Scalar, Set


# ------------------------------------------------------------------------------------------- views


class PoolFunction(Enum):
    """How an entry follows from the tokens of its extent that are present."""

    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    SUM = "sum"


class Visible(Enum):
    """For which tokens of an entry the pattern has to hold."""

    EVERY = "every"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Pool:
    """Keys and values pooled over the entries' extents; `counted`: log(tokens present) is added to the logit.

    present, packed: as in `Given`. runs: entries are the runs of an input, size and stride are 1.
    """

    function: PoolFunction
    size: int
    stride: int
    visible: Visible = Visible.EVERY
    counted: bool = False
    present: Scalar | None = None
    runs: Runs | None = field(default=None, kw_only=True)
    packed: str | None = field(default=None, kw_only=True)

    @property
    def told(self) -> bool:
        """As in `Given`."""
        return self.runs is not None or self.packed is not None

    def entries(self, tokens: int) -> int:
        """As in `Given`."""
        return tokens if self.told else -(-tokens // self.stride)


@dataclass(frozen=True, slots=True)
class Pick:
    """Single tokens that an int input lists; `lead` holds its other indices, `room` is its last dimension.

    weight: what an entry k counts for (None: 1); one that weighs nothing or less is not there. packed: as in `Given`.
    size, stride, visible, counted, present: those of every view.
    """

    input: str
    lead: tuple[Scalar, ...]
    room: Dim
    weight: Scalar | None = None
    packed: str | None = field(default=None, kw_only=True)

    size = stride = 1
    visible = Visible.EVERY
    counted = False
    present = None
    runs = None
    told = True

    def entries(self, tokens: int) -> int:
        """As in `Given`."""
        return _entries(self.room, tokens)


def _entries(room: Dim, tokens: int) -> int:
    """The size of a dimension of entries."""
    return room.size if room.axis is Axis.CONST else -(-tokens // room.block)


@dataclass(frozen=True, slots=True)
class Given:
    """Entries handed in as inputs: `keys` float[b, g, k/stride, D], `values` float[b, g, k/stride, Dv].

    present: how many tokens are, where `counted` asks and not all of a call's are (None: Nk). runs, picked: what tells
    entries, until the program is derived. packed: the input whose documents they are of, which then have room for one
    entry a token. listed: what tokens picked in documents are in positions of a call. room: the dimension of entries,
    where it is not one every `stride` tokens.
    mass: in a derived program, what entry k counts for where that is no function of k and the lengths.
    """

    keys: str
    values: str
    size: int
    stride: int
    visible: Visible = Visible.EVERY
    counted: bool = False
    present: Scalar | None = None
    runs: Runs | None = field(default=None, kw_only=True)
    picked: Pick | None = field(default=None, kw_only=True)
    packed: str | None = field(default=None, kw_only=True)
    listed: Pick | None = field(default=None, kw_only=True)
    room: Dim | None = field(default=None, kw_only=True)
    mass: Scalar | None = field(default=None, kw_only=True)

    @property
    def told(self) -> bool:
        """Whether data tells what its entries are of."""
        return self.runs is not None or self.picked is not None or self.packed is not None

    @property
    def as_tokens(self) -> bool:
        """Whether, of a derived program, entries are as many as tokens and each is one of its own."""
        return self.size == self.stride == 1 and self.room is None

    @property
    def space(self) -> Dim:
        """The dimension of entries."""
        return Dim(Axis.K, 1 if self.packed is not None else self.stride) if self.room is None else self.room

    def entries(self, tokens: int) -> int:
        """How many entries there is room for in a call of so many tokens."""
        return _entries(self.space, tokens)


View: TypeAlias = Pool | Pick | Given


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries pooled: in the place of each the function of those of the call with the same q // size. It sees what each
    of the nominal extent, present or not, would see. present: how many tokens are, where not all of a call's are.
    packed: in positions of a call, the input whose documents have classes of their own."""

    function: PoolFunction
    size: int
    present: Scalar | None = None
    packed: str | None = None


# ---------------------------------------------------------------------------------------- branches


@dataclass(frozen=True, slots=True)
class Within:
    """Two levels: a softmax inside each member, a block of `keys` tokens in a row, and the members' outputs summed with
    the probabilities of an earlier branch.

    `weights`: in a program of one branch, the input float[b, h, q, k/keys] that holds these, unless it has `votes`.
    `packed`: there, the input whose documents the members are of, each row's counted from the first of its own.
    """

    keys: int
    branch: str
    weights: str = ""
    packed: str | None = None
    votes: Ballot | None = None


@dataclass(frozen=True, slots=True)
class Ballot:
    """What a branch that weighs members says of them: it is over a view with an entry a member. `lse`: the input
    float[b, h, q] that holds its own."""

    entries: Part
    scale: Scalar | None
    score: Scalar | None
    lse: str


@dataclass(frozen=True, slots=True)
class Part:
    """A pattern over a view; without one, over the raw tokens. One of two levels is the only part of its branch.

    entries: in a derived program, in what rows and entries k must be beside, where the pattern of tokens cannot say.
    tiles: the input that tells which of its tiles are left where `skip below` dropped others; the pattern does not say
    so until the program is derived (`attndsl.skipping`).
    """

    pattern: Set
    view: View | None = None
    span: Span | None = field(default=None, compare=False, repr=False)
    within: Within | None = field(default=None, kw_only=True)
    entries: Set | None = field(default=None, kw_only=True)
    tiles: str = field(default="", kw_only=True)

    @property
    def plain(self) -> bool:
        """Whether it attends to raw tokens in one softmax."""
        return self.view is None and self.within is None


@dataclass(frozen=True, slots=True)
class Branch:
    """One softmax (or one weighted sum) over its parts; what two of them reach counts in both.

    `scale` multiplies q . k (None: 1/sqrt(D)); `score` maps s to the logit (None: s itself); `sink` adds
    e**sink to the denominator; `weights` replaces the softmax; `skip` drops tiles in which no weight is above it, in
    relation to what their rows have seen (`attndsl.skipping`). `queries`: they are pooled; all parts are over views,
    raw tokens as entries of one token.
    """

    parts: tuple[Part, ...]
    scale: Scalar | None = None
    score: Scalar | None = None
    sink: Scalar | None = None
    weights: Scalar | None = None
    name: str | None = None
    skip: float | None = field(default=None, kw_only=True)
    queries: Queries | None = field(default=None, kw_only=True)
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def pattern(self) -> Set:
        """The pattern of a branch of one part."""
        (part,) = self.parts
        return part.pattern

    @property
    def within(self) -> Within | None:
        """The two levels of a branch that has them."""
        return self.parts[0].within

    @property
    def why_no_mass(self) -> str:
        """Why it has no probabilities that `probs` could rank by, or `observe` give; empty where it has."""
        if self.weights is not None:
            return "`weights` replace its softmax"
        if self.skip is not None:
            return "which pairs it skips is not kept"
        return "it has two levels" if self.within is not None else ""


# ------------------------------------------------------------------------------------------ output


@dataclass(frozen=True, slots=True)
class Attended:
    """The output of a branch, which has an lse unless `weights` made it."""

    branch: str


@dataclass(frozen=True, slots=True)
class Handed:
    """An output and its lse that a call hands in: the operand `given(o, lse)` of `merge`."""

    out: Scalar
    lse: Scalar


@dataclass(frozen=True, slots=True)
class Merged:
    """Outputs of disjoint keys as if of one softmax: each weighs e**lse."""

    operands: tuple[Attended | Handed | Merged, ...]


@dataclass(frozen=True, slots=True)
class Factor:
    """A number, of b, h, g, q and the channel `d` of the output."""

    value: Scalar


@dataclass(frozen=True, slots=True)
class Sum:
    left: Output
    right: Output


@dataclass(frozen=True, slots=True)
class Product:
    factor: Scalar
    operand: Output


Output: TypeAlias = Attended | Handed | Merged | Factor | Sum | Product


def factors(output: Output) -> tuple[Scalar, ...]:
    """Every scalar written in an output, in order."""
    match output:
        case Attended():
            return ()
        case Handed(out=out, lse=lse):
            return (out, lse)
        case Merged(operands=operands):
            return tuple(e for x in operands for e in factors(x))
        case Factor(value=value):
            return (value,)
        case Sum(left=left, right=right):
            return (*factors(left), *factors(right))
        case Product(factor=factor, operand=operand):
            return (factor, *factors(operand))


def rewritten(output: Output, change: Callable[[Scalar], Scalar]) -> Output:
    """The output with every scalar in it changed."""

    match output:
        case Attended():
            return output
        case Handed(out=out, lse=lse):
            return Handed(change(out), change(lse))
        case Merged(operands=operands):
            changed = (rewritten(x, change) for x in operands)
            return Merged(tuple(x for x in changed if isinstance(x, Attended | Handed | Merged)))
        case Factor(value=value):
            return Factor(change(value))
        case Sum(left=left, right=right):
            return Sum(rewritten(left, change), rewritten(right, change))
        case Product(factor=factor, operand=operand):
            return Product(change(factor), rewritten(operand, change))


def combined(output: Output) -> tuple[str, ...]:
    """The branches that an output reads, each once, in order."""
    match output:
        case Attended(branch=name):
            return (name,)
        case Handed() | Factor():
            return ()
        case Merged(operands=operands):
            return tuple(dict.fromkeys(name for x in operands for name in combined(x)))
        case Sum(left=left, right=right):
            return tuple(dict.fromkeys((*combined(left), *combined(right))))
        case Product(operand=operand):
            return combined(operand)
