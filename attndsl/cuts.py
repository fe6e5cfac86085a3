"""Conditions on sorted data as intervals of keys, whose ends move forward with the row.

`doc[q] == doc[k]` with non-decreasing ids allows a row the keys of one interval. Its ends, as functions of the row, do
not decrease either: so a tile of rows can only reach keys from the first row's first to the last row's last, and
reaches all keys from the last row's first to the first row's last. Those four numbers are all that the tile relation
(`tiles.py`) needs of the data; the transpose has them of a key's rows. The ends are derived inputs (`Cut`).

The same holds for every comparison of something that does not decrease with q with something that does not decrease
with k: `seg[k] <= seg[q] + 1`, `k < limit[q]`, `seg[k] == 0`, as long as the inputs are `sorted`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from attndsl.derivation import Cut
from attndsl.linear import terms, total
from attndsl.monotone import direction
from attndsl.program import (
    Axis,
    Binary,
    CallShape,
    Compare,
    Const,
    Dim,
    InputDecl,
    Logic,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Unary,
    Var,
    reads,
    rebuild,
    scalars,
    substitute,
    walk,
)  # fmt: skip
from attndsl.simplify import fold

_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_OTHER = {"q": "k", "k": "q"}


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a condition holds for one position: for those of the other side from `low` to `high` (None: no end), or
    where it is not `inside`, for all but those."""

    low: Cut | None
    high: Cut | None
    inside: bool = True

    @property
    def ends(self) -> tuple[Cut, ...]:
        return tuple(end for end in (self.low, self.high) if end is not None)

    @property
    def variable(self) -> str:
        """The position that lies in the interval."""
        return self.ends[0].cut


def interval(cond: Scalar, program: Program, owner: str) -> Interval | None:
    """The interval that a condition allows to the positions of the side that is not `owner`'s, where it is one whose
    ends do not decrease with the owner's position. One that reads a single side is an interval of that side."""
    match cond:
        case Unary(op="not", operand=x):
            found = interval(x, program, owner)
            return None if found is None else replace(found, inside=not found.inside)
        case Compare(op=op, left=left, right=right) if left.type is right.type is Type.INT:
            sides = _apart(left, right, program)
            if sides is None:
                return None
            of_q, of_k, falling = sides
            # Data that cancels (`ids[q] + k <= ids[q] + q`) leaves a comparison of positions, which no search decides.
            if not any(isinstance(x, Read) for side in (of_q, of_k) for x in walk(side)):
                return None
            return _between(op if not falling else _FLIPPED[op], of_q, of_k, owner)
        case _:
            return None


def _between(op: str, of_q: Scalar, of_k: Scalar, owner: str) -> Interval | None:
    """The interval of `of_q op of_k`, both of which do not decrease."""
    sides = {"q": of_q, "k": of_k}
    single = [v for v in "qk" if not reads(sides[v], v)]
    if len(single) == 2:
        return None
    # What reads no position owns the other side's interval, whoever asks.
    owner = single[0] if single else owner
    own, other = sides[owner], sides[_OTHER[owner]]
    if owner == "k":
        op = _FLIPPED[op]

    def cut(inclusive: bool) -> Cut:
        return Cut(own, other, "" if single else owner, _OTHER[owner], inclusive)

    match op:
        case "<":
            return Interval(cut(True), None)
        case "<=":
            return Interval(cut(False), None)
        case ">":
            return Interval(None, cut(False))
        case ">=":
            return Interval(None, cut(True))
        case _:
            return Interval(cut(False), cut(True), op == "==")


def _apart(left: Scalar, right: Scalar, program: Program) -> tuple[Scalar, Scalar, bool] | None:
    """`left op right` as F(q) op G(k), neither of which decreases; or as G(k) and F(q) negated, and then True."""
    constant, found = terms(Binary("-", left, right))
    of_q = {t: c for t, c in found.items() if not reads(t, "k")}
    of_k = {t: -c for t, c in found.items() if reads(t, "k")}
    if any(reads(t, "q") for t in of_k):
        return None
    factors = [(t, c) for side in (of_q, of_k) for t, c in side.items()]
    ways = [(direction(t, "q", "k", is_sorted=lambda name: program.input(name).sorted), c) for t, c in factors]
    directions = {d if d is None or c > 0 else -d for d, c in ways} - {0}
    if directions == {1}:
        return total(constant, of_q), total(0, of_k), False
    if directions == {-1}:
        negated = ({t: -c for t, c in side.items()} for side in (of_q, of_k))
        return total(-constant, next(negated)), total(0, next(negated)), True
    return None


# --------------------------------------------------------------------------------- as derived inputs


@functools.lru_cache(maxsize=1024)
def with_cuts(program: Program, ragged: bool = False) -> Program:
    """The derived program with an input for each end of its conditions' intervals, after all others.

    ragged: as in `derive`. Then only rows own intervals, of keys, those of a call have entries, and heads have none of
    their own: a tile is of rows of several.
    """
    found: dict[Cut, InputDecl] = {}
    known = {decl.derivation for decl in program.inputs}
    taken = {decl.name for decl in program.inputs}
    (part,) = program.only.parts
    for cond in _conditions(part.pattern):
        for owner in "q" if ragged else "qk":
            allowed = interval(cond, program, owner)
            for end in () if allowed is None else allowed.ends:
                if end not in found and end not in known and not (ragged and _of_heads_or_keys(end)):
                    found[end] = _declared(end, program, taken, ragged)
                    taken.add(found[end].name)
    return replace(program, inputs=(*program.inputs, *found.values())) if found else program


def _of_heads_or_keys(cut: Cut) -> bool:
    return cut.owner == "k" or cut.cut == "q" or any(map(_reads_any(cut), "hg"))


def known_cuts(program: Program, given: Collection[str]) -> Program:
    """The program without the cuts that read inputs other than these."""

    def known(decl: InputDecl) -> bool:
        cut = decl.derivation
        return not isinstance(cut, Cut) or all(
            x.input in given for e in (cut.own, cut.other) for x in walk(e) if isinstance(x, Read)
        )

    return replace(program, inputs=tuple(filter(known, program.inputs)))


def without_cuts(program: Program) -> Program:
    """The program without any."""
    return known_cuts(program, ())


def _conditions(pattern: Set) -> Iterator[Scalar]:
    """The comparisons of a set that read data at q or k, wherever they stand."""
    for e in scalars(pattern):
        for x in walk(e):
            if isinstance(x, Compare) and any(isinstance(y, Read) and reads(y, "q", "k") for y in walk(x)):
                yield x


def _declared(cut: Cut, program: Program, taken: set[str], ragged: bool) -> InputDecl:
    """`doc_k_first`: for each row, the first key whose `doc` is not below the row's; `doc_k_end`: one past the last."""
    read = next(x.input for e in (cut.own, cut.other) for x in walk(e) if isinstance(x, Read))
    name = f"{read}_{cut.cut}_{'end' if cut.inclusive else 'first'}"
    numbered = (f"{name}_{i}" for i in range(len(taken) + 1))
    name = next(n for n in (name, *numbered) if n not in taken)
    dims = [Dim(axis) for axis, names in ((Axis.B, "b"), (Axis.H, "hg")) if any(map(_reads_any(cut), names))]
    if ragged:
        # Sequences have lengths of their own.
        dims = [Dim(Axis.B)]
    if cut.owner:
        dims.append(Dim(Axis.Q if ragged or of_rows(cut.own, cut.owner, program) else Axis.K))
    return InputDecl(name, Type.INT, tuple(dims), derivation=cut)


def _reads_any(cut: Cut) -> Callable[[str], bool]:
    return lambda name: reads(cut.own, name) or reads(cut.other, name)


def of_rows(e: Scalar, variable: str, program: Program) -> bool:
    """Whether an integer is known at the rows of the call alone, not at every position."""
    if variable == "k":
        return False
    read = (dim for x in walk(e) if isinstance(x, Read) for dim in program.input(x.input).dims)
    return program.align_start or any(dim.axis is Axis.Q and dim.block == 1 for dim in read)


def domain(e: Scalar, variable: str, program: Program, shape: CallShape) -> tuple[int, int]:
    """The positions at which one side of a cut is known: the first, and one past the last."""
    if not variable:
        return 0, 1
    if not of_rows(e, variable, program):
        return 0, shape.k_len
    first = shape.first_position(program)
    return first, first + shape.rows


def reflexive(cut: Cut, program: Program) -> bool:
    """Whether both sides are the same function of any position: then the own position tells where the cut lies."""
    if not cut.owner or any(of_rows(e, v, program) for e, v in ((cut.own, cut.owner), (cut.other, cut.cut))):
        return False
    return substitute(cut.other, {cut.cut: Var(cut.owner)}) == cut.own


def cut_input(cut: Cut, program: Program) -> InputDecl | None:
    """The input that a program declares for a cut."""
    return next((decl for decl in program.inputs if decl.derivation == cut), None)


def entry(decl: InputDecl, at: Scalar) -> Scalar:
    """A cut's entry for a position."""
    names = {Axis.B: Var("b"), Axis.H: Var("h")}
    return Read(decl.name, tuple(names.get(dim.axis, at) for dim in decl.dims), Type.INT)


def by_cuts(e: Scalar, program: Program, owner: str, orders: frozenset[str]) -> Scalar:
    """A condition on pairs, with intervals in the place of conditions on data whose cuts the program declares.

    What reads a row alone is loaded once for all its keys.

    orders: "k <= q", "q <= k", where that holds of all pairs in question: then some ends need no comparison.
    """

    def bounds(x: Scalar) -> Scalar:
        allowed = interval(x, program, owner) if isinstance(x, Compare) else None
        if allowed is None or any(cut_input(end, program) is None for end in allowed.ends):
            return x
        own, position = Var(owner), Var(allowed.variable)
        found = list[Scalar]()
        for end, op, implied in (
            (allowed.low, ">=", f"{owner} <= {position.name}"),
            (allowed.high, "<", f"{position.name} <= {owner}"),
        ):
            decl = None if end is None else cut_input(end, program)
            if end is None or decl is None:
                continue
            # The own position lies in its own interval, and so does what is between it and one of its other positions.
            if not (reflexive(end, program) and end.inclusive == (op == "<") and implied in orders):
                found.append(Compare(op, position, entry(decl, own)))
        inside: Scalar = Const(True) if not found else found[0] if len(found) == 1 else Logic("and", tuple(found))
        return inside if allowed.inside else Unary("not", inside)

    return fold(rebuild(e, bounds))
