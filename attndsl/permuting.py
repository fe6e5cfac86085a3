"""Patterns that lie in a relation of unsorted data, visited in the order in which that data is sorted.

`doc[q] == doc[k]` with ids in any order touches every tile of tokens in order. Sorted by id, rows and keys alike, it is
a document mask with sorted ids, `window(256) on pi` a window, and clusters, hash buckets and shuffled blocks are alike.
So a program becomes another one on the call's rows and keys in that order: its positions are places in it, what the
sorted data says is read from sorted inputs and becomes intervals in closed form (`cuts.py`), and everything else reads
the token that stands in a place. Kernels load rows and keys from where they lie (`layout.Permutation`).

    F(q) op G(k)      f[q] op g[k]                f, g: F and G in the order, sorted
    q - k <= c        place[q] - place[k] <= c    where F(q) == G(k) holds of all pairs
    any other q, k    rows[q] + Nk - Nq, keys[k]  rows, keys: which token stands in a place

Of equal data tokens keep their order, so where F(q) == G(k) the pairs of one value are places in a row too: `place`
counts first by value and then by token, and causality and windows inside documents are intervals as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from attndsl.cuts import Interval, interval
from attndsl.derivation import Alike, DocumentEnds, Offsets, Order, Place, Sorted
from attndsl.layout import Permutation
from attndsl.linear import terms
from attndsl.program import (
    Axis,
    Binary,
    Compare,
    Const,
    Dim,
    InputDecl,
    Logic,
    Memo,
    Program,
    Read,
    Scalar,
    Type,
    Var,
    Where,
    reads,
    rebuild,
    substitute,
    walk,
)  # fmt: skip
from attndsl.relation import Lowering
from attndsl.simplify import fold

# Where windows end further away than this, places do not tell documents apart.
_FAR = 1 << 30
# Places of a row and of a key while other places are put in, so that these are not put in again.
_I, _J = Var("i"), Var("j")


@dataclass(frozen=True, slots=True, eq=False)
class PermutedPiece:
    """A whole program in another order of its tokens: the program on places, and where their tokens lie. `alike`:
    where pairs have equal data, the read that says whether a row has many such keys."""

    layout: Permutation
    program: Program
    alike: Read | None = None


def permuted(program: Program, heads: tuple[int, int]) -> PermutedPiece | None:
    """The derived program in the order of unsorted data that its pattern lies in; None where there is none such."""
    if not eligible(program):
        return None
    condition = fold(Lowering(program, heads).predicate(program.branch.pattern))
    return permuted_by(
        program, condition.operands if isinstance(condition, Logic) and condition.op == "and" else (condition,), heads
    )


def permuted_by(program: Program, conjuncts: tuple[Scalar, ...], heads: tuple[int, int]) -> PermutedPiece | None:
    """The pairs of which these conditions hold, in the order of data that one of them compares."""
    for of_rows, of_keys in _keys(conjuncts, program, heads):
        found = _Permuting(program, of_rows, of_keys, conjuncts).piece()
        if found is not None:
            return found
    return None


def eligible(program: Program) -> bool:
    """Whether a program may be permuted: of plain tokens, and nothing in it knows tiles, blocks of plans or sums of
    inputs at tokens in order."""
    if not program.plain or program.grid is not None or any(decl.members for decl in program.inputs):
        return False
    if any(d.derivation is not None and not isinstance(d.derivation, Offsets | DocumentEnds) for d in program.inputs):
        return False
    branch = program.branch
    scores = [e for e in (branch.scale, branch.score, branch.sink, branch.weights) if e is not None]
    if any(
        isinstance(x, Read) and program.input(x.input).learnable and reads(x, "q", "k") for e in scores for x in walk(e)
    ):
        return False
    tokens = {Axis.Q, Axis.K}
    unsorted = (d for d in program.inputs if d.type is Type.INT and not d.sorted)
    return any(dim.axis in tokens for decl in unsorted for dim in decl.dims)


def _keys(conjuncts: Iterable[Scalar], program: Program, heads: tuple[int, int]) -> Iterator[tuple[Read, Read]]:
    """What tokens may be sorted by: pairs F(q), G(k) of reads that a comparison is of, those that it equates first."""
    found: dict[tuple[Read, Read], bool] = {}
    for cond in conjuncts:
        if not isinstance(cond, Compare) or not cond.left.type is cond.right.type is Type.INT:
            continue
        of_rows, of_keys = _outermost(cond, "q"), _outermost(cond, "k")
        if len(of_rows) != 1 or len(of_keys) != 1:
            continue
        (first,), (second,) = of_rows, of_keys
        ordered = all(program.input(x.input).sorted for x in (first, second))
        # The query heads of a key head share its keys, in one order.
        shared = heads[0] == heads[1] or not any(reads(x, "h") for x in (first, second))
        if not ordered and shared and not reads(first, "k") and not reads(second, "q"):
            key = (first, second)
            found[key] = found.get(key, False) or cond.op == "=="
    yield from sorted(found, key=lambda key: not found[key])


def _outermost(e: Scalar, variable: str) -> list[Read]:
    """The reads of integers at a position, those inside others' indices left out."""
    found = [x for x in walk(e) if isinstance(x, Read) and x.type is Type.INT and reads(x, variable)]
    inside = {y for x in found for index in x.index for y in walk(index)}
    return list(dict.fromkeys(x for x in found if x not in inside))


class _Permuting:
    """One program, put in the order of F(q) and G(k)."""

    def __init__(self, program: Program, of_rows: Read, of_keys: Read, conjuncts: tuple[Scalar, ...]) -> None:
        self.program, self.conjuncts = program, conjuncts
        self.sides = {"q": of_rows, "k": of_keys}
        batch = any(reads(x, "b") for x in (of_rows, of_keys))
        head = any(reads(x, "h", "g") for x in (of_rows, of_keys))
        # Where heads differ at all there is one for each key head.
        self.lead = (*([Axis.B] if batch else []), *([Axis.G] if head else []))
        self.declared: list[InputDecl] = []
        # Keys first: where the rows of a call are its keys, sorted by the same, what is known of keys is known of rows.
        self.alike = substitute(of_rows, {"q": Var("k")}) == of_keys
        self.orders: dict[str, str] = {}
        self.values: dict[str, str] = {}
        self.places: dict[str, str] = {}
        for s in "kq":
            of, key, same = self.sides[s].input, self._key(s), self._same(s, self.orders)
            self.orders[s] = self._declare(f"{_SIDE[s]}_by_{of}", s, Order(key, s, same))
        for s in "kq":
            of, key, same = self.sides[s].input, self._key(s), self._same(s, self.values)
            self.values[s] = self._declare(f"{of}_of_{_SIDE[s]}", s, Sorted(key, s, self.orders[s], same))

    def _same(self, side: str, found: dict[str, str]) -> str:
        """What rows have too where they are the keys."""
        return found["k"] if side == "q" and self.alike else ""

    def piece(self) -> PermutedPiece | None:
        """The program in the order; None where the order does not bound the keys of a row from both sides."""
        conjuncts = [self._by_value(e) for e in self.conjuncts]
        known = self._known()
        if not all(_bounds(interval(self._in_places(e), known, "q") for e in conjuncts)):
            return None
        equates = [self._equates(e) for e in self.conjuncts]
        alike = None
        if any(equates):
            alike = self._declare_alike()
            self._declare_places()
            known, placed = self._known(), [self._by_place(e) for e in conjuncts]
            low, high = _bounds(interval(self._in_places(e), known, "q") for e in placed if self._near(e))
            # What is near by place has the same value.
            conjuncts = [self._rest(low, high) if equal else e for e, equal in zip(placed, equates, strict=True)]
        moved = fold(Logic("and", tuple(self._in_places(e) for e in conjuncts)))
        branch = self.program.branch
        named = {"scale": branch.scale, "score": branch.score, "sink": branch.sink, "weights": branch.weights}
        scores = {name: None if e is None else self._in_places(self._by_value(e)) for name, e in named.items()}
        orders = (self._read(self.orders["q"], Var("q")), self._read(self.orders["k"], Var("k")))
        layout = Permutation(*orders, self.program.align_start)
        return PermutedPiece(layout, known.with_branch(pattern=Where(moved, branch.span), **scores), alike)

    def _known(self) -> Program:
        return replace(self.program, inputs=(*self.program.inputs, *self.declared), align_start=True)

    def _near(self, cond: Scalar) -> bool:
        """Whether a conjunct says how far apart places are, in a number that no value's tokens pass."""
        if not isinstance(cond, Compare):
            return False
        constant, found = terms(Binary("-", cond.left, cond.right))
        return abs(constant) <= _FAR and set(found) == {
            self._read(self.places["q"], _I),
            self._read(self.places["k"], _J),
        }

    def _rest(self, low: bool, high: bool) -> Scalar:
        """What is left of F(q) == G(k) where places bound a row's keys already, from below or above."""
        of_row, of_key = self._read(self.values["q"], _I), self._read(self.values["k"], _J)
        if low and high:
            return Const(True)
        return Compare("<=" if high else ">=" if low else "==", of_row, of_key)

    # --------------------------------------------------------------------------------- declarations

    def _free(self, name: str) -> str:
        taken = {decl.name for decl in (*self.program.inputs, *self.declared)}
        while name in taken:
            name += "_"
        return name

    def _declare(self, name: str, side: str, derivation: Order | Sorted | Place) -> str:
        name = self._free(name)
        dims = (*(Dim(axis) for axis in self.lead), Dim(Axis.Q if side == "q" else Axis.K))
        ordered = not isinstance(derivation, Order)
        self.declared.append(InputDecl(name, Type.INT, dims, sorted=ordered, derivation=derivation))
        return name

    def _declare_alike(self) -> Read:
        name = self._free(f"shared_{self.sides['k'].input}")
        derivation = Alike(self.values["q"], self.values["k"])
        self.declared.append(InputDecl(name, Type.BOOL, (Dim(Axis.CONST, size=1),), derivation=derivation))
        return Read(name, (Const(0),), Type.BOOL)

    def _declare_places(self) -> None:
        for s in "kq":
            token: Scalar = self._read(self.orders[s], Var(s))
            position = fold(Binary("+", token, self._first())) if s == "q" else token
            derivation = Place(self.values[s], self.values["k"], position, s, self._same(s, self.places))
            self.places[s] = self._declare(f"place_of_{_SIDE[s]}", s, derivation)

    def _read(self, name: str, at: Scalar) -> Read:
        return Read(name, (*(Var(axis.value) for axis in self.lead), at), Type.INT)

    def _key(self, side: str) -> Scalar:
        """What a side is sorted by, at the rows of a call or at the keys."""
        key: Scalar = self.sides[side]
        if self.lead and self.lead[-1] is Axis.G:
            # There are as many of either.
            key = substitute(key, {"h": Var("g")})
        return self._at_tokens(key, Var("q"), Var("k"))

    # --------------------------------------------------------------------------------- substitution

    def _at_tokens(self, e: Scalar, row: Scalar, key: Scalar) -> Scalar:
        """A scalar of the pair of the call's row `row` and the key `key`; what is read in places stays."""
        position = fold(Binary("+", row, self._first()))
        lengths = {} if self.program.align_start else {"Nq": Var("Nk")}
        named = {"q": position, "k": key} | lengths

        def step(x: Scalar) -> Scalar:
            match x:
                case Var(name=name):
                    return named.get(name, x)
                case Read(input=name, index=index) if all(decl.name != name for decl in self.declared):
                    dims = self.program.input(name).dims
                    rows = (d.axis is Axis.Q and d.block == 1 for d in dims)
                    moved = (
                        self._row(at, row, position) if of_rows else at for at, of_rows in zip(index, rows, strict=True)
                    )
                    return replace(x, index=tuple(moved))
                case _:
                    return x

        return fold(rebuild(e, step))

    def _first(self) -> Scalar:
        return Const(0) if self.program.align_start else Binary("-", Var("Nk"), Var("Nq"))

    def _row(self, at: Scalar, row: Scalar, position: Scalar) -> Scalar:
        """The row of a position, for inputs that hold the rows of a call."""
        return row if at == position else fold(Binary("-", at, self._first()))

    def _by_value(self, e: Scalar) -> Scalar:
        """A scalar with F(q) and G(k) read from where they are sorted."""
        sorted_reads = {
            self.sides["q"]: self._read(self.values["q"], _I),
            self.sides["k"]: self._read(self.values["k"], _J),
        }
        return _with_reads(e, sorted_reads)

    def _by_place(self, e: Scalar) -> Scalar:
        """A condition on values of which q - k alone is compared with what reads no token, in places."""

        def step(x: Scalar) -> Scalar:
            if not isinstance(x, Compare) or not x.left.type is x.right.type is Type.INT:
                return x
            _, found = terms(Binary("-", x.left, x.right))
            rest = [t for t in found if t not in (Var("q"), Var("k"))]
            by_difference = abs(found.get(Var("q"), 0)) == 1 and found[Var("q")] == -found.get(Var("k"), 0)
            if not by_difference or any(reads(t, "q", "k", "i", "j") for t in rest):
                return x
            places = {"q": self._read(self.places["q"], _I), "k": self._read(self.places["k"], _J)}
            return Compare(x.op, substitute(x.left, places), substitute(x.right, places))

        return rebuild(e, step)

    def _in_places(self, e: Scalar) -> Scalar:
        """What still reads tokens reads those that stand in places; places are called q and k from here on."""
        rows, keys = self._read(self.orders["q"], _I), self._read(self.orders["k"], _J)
        return fold(substitute(self._at_tokens(e, rows, keys), {"i": Var("q"), "j": Var("k")}))

    def _equates(self, cond: Scalar) -> bool:
        """Whether a conjunct says that F(q) == G(k)."""
        match cond:
            case Compare(op="==", left=left, right=right):
                constant, found = terms(Binary("-", left, right))
                factors = {found.get(self.sides[s], 0) for s in "qk"}
                return constant == 0 and len(found) == 2 and factors == {1, -1}
            case _:
                return False


_SIDE = {"q": "rows", "k": "keys"}


def _with_reads(e: Scalar, found: dict[Read, Read]) -> Scalar:
    """A scalar with some of its reads replaced, whose indices are not looked into."""
    memo: Memo = {}
    for x in walk(e):
        if isinstance(x, Read) and x in found:
            memo[id(x)] = x, found[x]
    return rebuild(e, lambda x: x, memo)


def _bounds(intervals: Iterable[Interval | None]) -> tuple[bool, bool]:
    """Whether some interval bounds keys from below, and some from above."""
    inside = [x for x in intervals if x is not None and x.inside]
    return any(x.low is not None for x in inside), any(x.high is not None for x in inside)
