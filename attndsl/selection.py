"""Selections: which members of the keys each row class attends to, decided by the data. What `top` and its kin mean.

    selection ::= Selection rule of per share among always forced score normalise
    rule      ::= Top n | Cover p compete | Above t | Levels factors bounds
    score     ::= Dot vectors vectors | Bound vectors vectors vectors | Antidiagonal S | Probs branch | Given e
    vectors   ::= Vectors source pool

`of` and `per` are as in a `Random`: member m of k is k // keys, row class r of q is q // rows (None: all rows are one
class; of a packed call that is `WHOLE`, since each document has a class of its own), unless `members` or `row_tiles`
say otherwise. A selection decides once for every (r, m), in this order: represent, score, withdraw, normalise, sum over
the heads that share, choose. `attndsl.choice` is its oracle; a *plan* is the tensor that says what was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from attndsl.members import Members, Tiles, extent

if TYPE_CHECKING:
    from attndsl.diagnostics import Span
    from attndsl.program import Scalar, Set


# Rows of a class that holds all of a document: no call has so many.
WHOLE = 1 << 30


# ----------------------------------------------------------------------------------------- scores


class Pool(Enum):
    """How the vectors of a member's present tokens (or of a row class) become one."""

    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    SUM = "sum"
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Vectors:
    """Vectors of row classes or of members: those of Q, K or an input, pooled, or (None) as they are."""

    source: str
    pool: Pool | None = None


@dataclass(frozen=True, slots=True)
class Dot:
    """scale * x . y"""

    x: Vectors
    y: Vectors


@dataclass(frozen=True, slots=True)
class Bound:
    """scale * sum over d of max(x_d * low_d, x_d * high_d): no key between low and high scores more."""

    x: Vectors
    low: Vectors
    high: Vectors


@dataclass(frozen=True, slots=True)
class Antidiagonal:
    """A mass: tokens in groups of `stride`, the logit of two groups being the sum of q[i] . k[j] over their pairs with
    i + j = stride - 1, times scale / stride; softmax over the candidate groups of a row group, summed over the block
    pair (XAttention)."""

    stride: int


@dataclass(frozen=True, slots=True)
class Probs:
    """A mass: exp(s - lse) of an earlier branch, summed over (or the largest of) the pairs of a row class and member.

    An entry of a view gives each member the share of the entry's present tokens that lie in it.
    """

    branch: str
    largest: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """A scalar, read at the first row of the class and the first token of the member."""

    value: Scalar


Score: TypeAlias = Dot | Bound | Antidiagonal | Probs | Given


# ------------------------------------------------------------------------------------------ rules


@dataclass(frozen=True, slots=True)
class Top:
    """The first `count` of the rank, or max(1, floor(fraction * c)) of c candidates."""

    count: Scalar | None
    fraction: float | None = None


class Compete(Enum):
    """Whose members share one mass: those of a row class, of all classes of a head, or of all heads."""

    ROW = "row"
    HEAD = "head"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Cover:
    """Members in rank while the mass before them is below `share` of all of it. `exclusive`: without the member that
    crosses it. `at_least`, `at_most`: of each row class, by its own rank."""

    share: float
    exclusive: bool = False
    at_least: int = 0
    at_most: int | None = None
    compete: Compete = Compete.ROW


@dataclass(frozen=True, slots=True)
class Above:
    """Members of a mass of at least `share` (`relative`: times the row's largest)."""

    share: float
    relative: bool = False
    at_most: int | None = None


@dataclass(frozen=True, slots=True)
class Levels:
    """A view: the members between bounds[i - 1] and bounds[i] get factors[i], those past the last are dropped.

    Bounds are shares of the candidates by rank, or (`masses`) of the row's mass.
    """

    factors: tuple[int, ...]
    bounds: tuple[float, ...]
    masses: bool = False


Rule: TypeAlias = Top | Cover | Above | Levels


# -------------------------------------------------------------------------------------- selections


class Share(Enum):
    """Which heads decide together: their scores are summed."""

    NONE = "none"
    GROUP = "group"
    HEADS = "heads"


class Forced(Enum):
    """What forced members do to the others: take places and are credited; leave before normalising; compete as they
    are and are added after."""

    COUNTED = "counted"
    EXTRA = "extra"
    OVERLAY = "overlay"


class Normalise(Enum):
    """What is done to the scores of a row's candidates before they are summed over heads."""

    NONE = "none"
    SOFTMAX = "softmax"
    MINMAX = "minmax"


@dataclass(frozen=True, slots=True)
class Selection:
    """One selection of a program, by its name: that of its `plan`, or one made for it.

    Candidates are the (r, m) with a present pair in `among`, forced those with one in among & `always`. `scale` is the
    attention's (None: 1/sqrt(D)). With `members`, or `row_tiles`, `keys` (`rows`) is how many tokens those have, 1
    where that differs. `most_forced`: how many a row class may be forced to, where that is known beforehand.
    """

    name: str
    rule: Rule
    keys: int
    rows: int | None
    share: Share
    among: Set
    always: Set | None
    forced: Forced
    score: Score
    normalise: Normalise
    scale: Scalar | None = None
    members: Members | None = None
    row_tiles: Tiles | None = None
    most_forced: int | None = None
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def extent(self) -> tuple[int, int]:
        """Of n tokens there are ceil(n / extent[0]) * extent[1] members."""
        return (self.keys, 1) if self.members is None else extent(self.members)

    @property
    def together(self) -> bool:
        """Whether members of several row classes compete."""
        return isinstance(self.rule, Cover) and self.rule.compete is not Compete.ROW

    @property
    def bounded(self) -> bool:
        """Whether a plan lists members (int32), or else says of each whether it is in (uint8)."""
        match self.rule:
            case Top():
                return True
            case Cover(at_most=most) | Above(at_most=most):
                return most is not None
            case Levels():
                return False


@dataclass(frozen=True, slots=True)
class Selected:
    """The pairs whose key member is chosen for their row class in a plan; keys k are of member k // keys, or `members`.

    `plan` is an input with `members`, and `index` says the row class: an index for each of its dimensions but the last.
    `level`: only the members that the plan of a `levels` gives this factor. `member`: the number of k's member, where
    keys are counted from elsewhere than the first.
    """

    plan: str
    index: tuple[Scalar, ...]
    keys: int
    level: int | None = None
    members: Members | None = None
    member: Scalar | None = None
    span: Span | None = field(default=None, compare=False, repr=False)
