"""Layouts: the order in which a piece of a pattern counts tokens, chosen so that its pairs lie close together.

A scattered pattern touches nearly every tile of consecutive tokens and fills none. Counted another way, every 16th
token in a row, it is as dense as a window. A *layout* is such a way to count: a program of a kernel owns one residue
of the queries and counts them i = 0, 1, …; its keys, of a residue that follows from its own, it counts j = 0, 1, ….
The runs of tiles, masks and kernels are those of any pattern, in i and j; only the addresses of rows and keys differ,
so no tensor is copied or permuted.

A layout is what gives each side's `position`, `index` and `most`, and the number of `classes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attndsl.linear import normalise
from attndsl.program import Binary, Call, CallShape, Const, Program, Read, Scalar, Var
from attndsl.simplify import fold

RESIDUE = Var("residue")


@dataclass(frozen=True, slots=True)
class Comb:
    """Of every `period` tokens the `width` ones from `first` on, counted 0, 1, … from the sequence's start.

    first = (step * residue + shift) % period, so that first + width <= period for each residue.

    >>> from attndsl.notation import scalar_text
    >>> scalar_text(Comb(period=16, step=1).position(Var("i")))
    '16 * i + residue'
    >>> scalar_text(Comb(period=16, step=1).index(Var("Nk")))
    '(Nk - residue + 15) // 16'
    """

    period: int = 1
    width: int = 1
    step: int = 0
    shift: int = 0

    @property
    def every(self) -> bool:
        """Whether it holds every token."""
        return self.period == 1

    @property
    def first(self) -> Scalar:
        """The first of its tokens."""
        first = fold(Binary("+", Binary("*", Const(self.step), RESIDUE), Const(self.shift)))
        return normalise(Binary("%", first, Const(self.period)) if self._wraps else first)

    @property
    def _wraps(self) -> bool:
        return bool(self.step and self.shift)

    def position(self, i: Scalar) -> Scalar:
        """The token of index i >= 0, or where i is below 0, the one that so many steps back would be."""
        if self.every:
            return i
        whole: Scalar = i if self.width == 1 else Binary("//", i, Const(self.width))
        position = Binary("+", Binary("*", Const(self.period), whole), self.first)
        return fold(position if self.width == 1 else Binary("+", position, Binary("%", i, Const(self.width))))

    def index(self, x: Scalar) -> Scalar:
        """The index of its first token at or after position x."""
        if self.every:
            return x
        after, period = Binary("-", x, self.first), Const(self.period)
        if self.width == 1:
            return fold(normalise(Binary("//", Binary("+", after, Const(self.period - 1)), period)))
        rest = Call("min", (Binary("%", after, period), Const(self.width)))
        return fold(normalise(Binary("+", Binary("*", Const(self.width), Binary("//", after, period)), rest)))

    def residue(self, x: Scalar) -> Scalar:
        """The residue whose tokens are position x and others, where each token is of one."""
        return fold(Binary("//", Binary("%", Binary("-", x, Const(self.shift)), Const(self.period)), Const(self.step)))

    def most(self, length: int) -> int:
        """How many of its tokens so many consecutive positions hold at most."""
        return self.width * (length // self.period) + min(length % self.period, self.width)

    def text(self, i: str) -> str:
        """`position` as isl writes it."""
        if self.every:
            return i
        first = f"{self.step} residue + {self.shift}" if self.step else str(self.shift)
        if self._wraps:
            first = f"({first}) mod {self.period}"
        if self.width == 1:
            return f"({self.period}*({i}) + {first})"
        return f"({self.period}*floor(({i})/{self.width}) + {first} + ({i}) mod {self.width})"

    def __str__(self) -> str:
        if self.every:
            return "in order"
        which = f"of every {self.period}"
        if not self.step:
            return f"{self.width} {which}, from token {self.shift} on"
        moved = f" + {self.shift}" if self.shift else ""
        return f"{self.width} {which}, from {f'{self.step} ' * (self.step > 1)}residue{moved} on"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a piece counts its queries and its keys; `classes`: the number of residues, each a program's own."""

    q: Comb = field(default_factory=Comb)
    k: Comb = field(default_factory=Comb)
    classes: int = 1

    @property
    def plain(self) -> bool:
        """Whether tokens are counted in order."""
        return self.q.every and self.k.every

    def all_rows(self, shape: CallShape, program: Program) -> bool:
        """Whether every row of a call belongs to one of its residues."""
        return True

    def programs(self, side: str, block: int, shape: CallShape, program: Program) -> int:
        """How many tiles of one side the residues of a call have, the most that each can have."""
        comb, tokens = (self.q, shape.rows) if side == "q" else (self.k, shape.k_len)
        return -(-comb.most(tokens) // block) * self.classes

    def all_keys(self, shape: CallShape) -> bool:
        """Whether every key of a call belongs to one of its residues."""
        return self.k.every or (self.k.step > 0 and self.classes * self.k.width == self.k.period)

    def __str__(self) -> str:
        if self.plain:
            return "tokens in order"
        if self.q == self.k:
            return f"queries and keys {self.q}"
        return f"queries {self.q}, keys {self.k}"


PLAIN = Layout()


@dataclass(frozen=True, slots=True)
class Permutation:
    """Rows and keys in an order that the runtime finds (`permuting.py`): `q` reads, at the place q, the row of the call
    that stands there, and `k` the key at the place k. Runs, masks and scores of such a plan are of places. `aligned`:
    row i of a call stands at position i, and not at i + Nk less the rows."""

    q: Read
    k: Read
    aligned: bool = True
    classes: int = field(default=1, init=False)
    plain: bool = field(default=False, init=False)

    def all_rows(self, shape: CallShape, program: Program) -> bool:
        """Whether every row of a call has a place."""
        return True

    def all_keys(self, shape: CallShape) -> bool:
        """Whether every key has one."""
        return True

    def programs(self, side: str, block: int, shape: CallShape, program: Program) -> int:
        """How many tiles one side has."""
        return -(-(shape.rows if side == "q" else shape.k_len) // block)

    def __str__(self) -> str:
        return f"rows in the order of `{self.q.input}`, keys in that of `{self.k.input}`"
