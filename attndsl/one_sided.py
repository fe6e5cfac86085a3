"""Masks with what one token decides folded into what is compared.

A kernel that computes what reads one token once for each row and each key pays for what reads both: each comparison and
each `and` and `or` of a pair. So `c(q) and a(q) > b(k)` is written `(a(q) if c(q) else least) > b(k)`, and of several
comparisons with the same other side one is left, with the larger or the smaller of their own.

All of it is exact: what is compared follows from positions, lengths and runtime ints, and lies well between the two
numbers that stand for "never" and "always" in any call that is not refused (`widths.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from attndsl.derivation import Cut
from attndsl.linear import terms, total
from attndsl.mask_cost import KEY, ROW, both_cost
from attndsl.program import (
    Binary,
    Call,
    Compare,
    Const,
    If,
    Logic,
    Program,
    Read,
    Scalar,
    Type,
    Unary,
    Var,
    reads,
    walk,
)  # fmt: skip
from attndsl.simplify import fold, negated
from attndsl.widths import largest

# Below and above what is compared. A token's position may be taken from them, which has at most 30 bits.
LEAST, GREATEST = Const(-3 << 29), Const(3 << 29)
_LARGEST = 1 << 30
# What has to be spared of each pair where keys have to be selected for it. What is compared with no position is a value
# a key: of the examples on Hopper, block diffusion spares 9 so and has a fifth fewer instructions, and those that spare
# 2 to 5 have up to 7 % more.
_WORTH = 6
Op = Literal["and", "or"]
_FLIPPED = {"<": ">", ">": "<", "==": "==", "!=": "!="}


@dataclass(frozen=True, slots=True)
class _Split:
    """`row op key` of what reads a row and what reads a key, op being >, <, == or !=. `most`: what bounds both, but for
    values that stand for conditions. `folded`: by which of "and" and "or" such were folded into it, one kind at most:
    one that is to win over the other kind finds no value for it.
    """

    op: str
    row: Scalar
    key: Scalar
    most: int = 1
    folded: Op | None = None


@dataclass(frozen=True, slots=True)
class _Join:
    op: Op
    parts: tuple[_Node, ...]


# What else there is stays as it was written.
_Node = _Split | _Join | Scalar


def folded(cond: Scalar, program: Program) -> Scalar:
    """The condition on a pair, or an equal one that costs so much less for what reads both tokens that it is ahead."""
    found, written = merged(cond, program), set(walk(cond))
    selects = any(isinstance(x, If | Call) and x not in written and reads(x, *KEY) for x in walk(found))
    return found if both_cost(found) <= both_cost(cond) - (_WORTH if selects else 1) else cond


def merged(cond: Scalar, program: Program) -> Scalar:
    """An equal condition with what reads one token folded into what is compared, as far as that goes."""
    return fold(_written(_Folder(program).node(cond)))


def _one_sided(e: Scalar, names: tuple[str, ...]) -> bool:
    return not reads(e, *names)


class _Folder:
    def __init__(self, program: Program) -> None:
        self.program = program

    def node(self, e: Scalar) -> _Node:
        match e:
            case Logic(op="and" | "or" as op, operands=xs):
                return self._joined(op, [self.node(x) for x in xs])
            case Unary(op="not", operand=Logic() | Unary() | Compare() as x):
                inner = negated(x)
                return e if isinstance(inner, Unary) else self.node(inner)
            case Compare():
                return self._split(e) or e
            case _:
                return e

    def _split(self, e: Compare) -> _Split | None:
        """A comparison as one of both sides, where what it reads is bounded and of one token each."""
        if _one_sided(e, ROW) or _one_sided(e, KEY):
            return None
        if e.left.type is e.right.type is Type.BOOL:
            sides = sorted((e.left, e.right), key=lambda x: reads(x, *KEY))
            if reads(sides[0], *KEY) or reads(sides[1], *ROW) or e.op not in ("==", "!="):
                return None
            of_q, of_k = (If(x, Const(1), Const(0)) for x in sides)
            return _Split(e.op, of_q, of_k)
        if e.left.type is not Type.INT or e.right.type is not Type.INT or not all(map(self._follows, walk(e))):
            return None
        constant, found = terms(Binary("-", e.left, e.right))
        of_row = {t: c for t, c in found.items() if not reads(t, *KEY)}
        of_key = {t: -c for t, c in found.items() if reads(t, *KEY)}
        if not of_key or any(reads(t, *ROW) for t in of_key):
            # Keys may cancel.
            return None
        # a >= b is a + 1 > b.
        more = {">=": 1, "<=": -1}.get(e.op, 0)
        op = e.op[0] if more else e.op
        if next(iter(of_key.values())) < 0:
            # The key itself is what a place in a tile is found from.
            op, constant, more = _FLIPPED[op], -constant, -more
            of_row, of_key = ({t: -c for t, c in of.items()} for of in (of_row, of_key))
        row, key = total(constant + more, of_row), total(0, of_key)
        most = max(largest(row, self.program), largest(key, self.program))
        return _Split(op, row, key, most) if most <= _LARGEST else None

    def _follows(self, e: Scalar) -> bool:
        """Whether a value follows from positions, lengths and runtime ints, whose bounds calls are held to."""
        if isinstance(e, Read):
            return isinstance(self.program.input(e.input).derivation, Cut)
        return e.type is not Type.FLOAT

    def _joined(self, op: Op, parts: Sequence[_Node]) -> _Node:
        flat = [y for x in parts for y in _parts(x, op)]
        written: list[Scalar] = [x for x in flat if not isinstance(x, _Split | _Join)]
        of_row = [x for x in written if _one_sided(x, KEY)]
        of_key = [x for x in written if not _one_sided(x, KEY) and _one_sided(x, ROW)]
        rest = _merged(op, [x for x in flat if x not in of_row and x not in of_key])
        for conditions, side in ((of_row, "row"), (of_key, "key")):
            if not conditions:
                continue
            cond = conditions[0] if len(conditions) == 1 else Logic(op, tuple(conditions))
            for n, x in enumerate(rest):
                if (with_it := _with(x, op, cond, side)) is not None:
                    rest[n] = with_it
                    break
            else:
                rest = [*conditions, *rest]
        return _join(op, _merged(op, rest))


def _join(op: Op, parts: Sequence[_Node]) -> _Node:
    """Parts joined, and what they have in common once."""
    other: Op = "or" if op == "and" else "and"
    inside = [_parts(x, other) for x in parts]
    common = [x for x in inside[0] if all(x in of for of in inside[1:])] if len(parts) > 1 else []
    if common:
        rest = [tuple(x for x in of if x not in common) for of in inside]
        if all(rest):
            common.append(_join(op, [x[0] if len(x) == 1 else _Join(other, x) for x in rest]))
        return _join(other, common)
    kept = list(parts)
    for x in parts:
        # What stands beside a part need not be asked inside it.
        beside = [y for y in kept if y is not x]
        inside = [tuple(y for y in _parts(z, op) if y not in beside) for z in _parts(x, other)]
        at = next(n for n, y in enumerate(kept) if y is x)
        if len(inside) > 1 and all(inside):
            kept[at] = _join(other, [y[0] if len(y) == 1 else _Join(op, y) for y in inside])
        elif len(inside) > 1:
            del kept[at]
    return kept[0] if len(kept) == 1 else _Join(op, tuple(kept))


def _parts(x: _Node, op: Op) -> tuple[_Node, ...]:
    if isinstance(x, Logic) and x.op == op:
        return x.operands
    return x.parts if isinstance(x, _Join) and x.op == op else (x,)


def _with(x: _Node, op: Op, cond: Scalar, side: str) -> _Node | None:
    """`x and cond` or `x or cond`, of a condition on one side's token, None where no value stands for it."""
    match x:
        case _Split(op=compared):
            value = _value(compared, op, side)
            if value is None or x.folded not in (None, op) or (side == "key" and isinstance(x.key, Var)):
                # A key's place in its tile is compared with one number of a row and tile, which costs nothing a key.
                return None
            own = x.row if side == "row" else x.key
            cond = cond if op == "and" else negated(cond)
            if isinstance(own, If) and own.other == value:
                cond, own = Logic("and", (own.cond, cond)), own.then
            chosen = If(cond, own, value)
            x = replace(x, row=chosen) if side == "row" else replace(x, key=chosen)
            return replace(x, folded=op)
        case _Join(parts=parts):
            found = [_with(y, op, cond, side) for y in parts]
            if any(y is None for y in found):
                return None
            return _Join(x.op, tuple(_merged(x.op, [y for y in found if y is not None])))
        case _:
            return None


def _value(compared: str, op: Op, side: str) -> Const | None:
    """What one side has to be for a comparison never to hold (`and`), or always (`or`)."""
    match compared:
        case ">" | "<":
            return LEAST if ((compared == ">") == (side == "row")) == (op == "and") else GREATEST
        case "==" if op == "and":
            return LEAST if side == "row" else GREATEST
        case "!=" if op == "or":
            return LEAST if side == "row" else GREATEST
        case _:
            return None


def _merged(op: Op, parts: Iterable[_Node]) -> list[_Node]:
    """Parts of a conjunction or disjunction, those of its comparisons that share a side made one."""
    found = list[_Node]()
    for x in parts:
        for n, y in enumerate(found):
            if isinstance(x, _Split) and isinstance(y, _Split) and (one := _both(op, y, x)) is not None:
                found[n] = one
                break
        else:
            found.append(x)
    return found


def _both(op: Op, a: _Split, b: _Split) -> _Split | None:
    if a.op != b.op or not (a.folded == b.folded or None in (a.folded, b.folded)):
        return None
    kind, most = a.folded or b.folded, max(a.most, b.most)
    if a.op in ("<", ">"):
        wider = (a.op == ">") == (op == "or")
        if a.key == b.key:
            return replace(a, row=_extreme("max" if wider else "min", a.row, b.row), most=most, folded=kind)
        if a.row == b.row:
            return replace(a, key=_extreme("min" if wider else "max", a.key, b.key), most=most, folded=kind)
        return None
    truths = [x for x in (a, b) if _truth(x.row) and _truth(x.key)]
    if kind is None and (a.op == "==") == (op == "and") and truths and 2 * most < _LARGEST:
        # Two equalities, one of them of truths: one of twice the numbers and the truths.
        (truth,), (number,) = truths[:1], [x for x in (a, b) if x is not truths[0]]
        row, key = (
            Binary("+", Binary("*", Const(2), of), bit)
            for of, bit in ((number.row, truth.row), (number.key, truth.key))
        )
        return _Split(a.op, row, key, 2 * most + 1)
    return None


def _extreme(which: str, a: Scalar, b: Scalar) -> Scalar:
    """The larger or smaller of two values, of which one may stand in the place of the other or of none."""
    for x, y in ((a, b), (b, a)):
        beyond = GREATEST if which == "min" else LEAST
        if x == y or (isinstance(y, If) and (y.then, y.other) == (x, beyond)):
            return x
    return Call(which, (a, b))


def _truth(e: Scalar) -> bool:
    return isinstance(e, If) and (e.then, e.other) == (Const(1), Const(0))


def _written(x: _Node) -> Scalar:
    match x:
        case _Split(op=op, row=row, key=key):
            if _truth(row) and _truth(key):
                assert isinstance(row, If) and isinstance(key, If)
                return Compare(op, row.cond, key.cond)
            return Compare(op, row, key)
        case _Join(op=op, parts=parts):
            return Logic(op, tuple(map(_written, parts)))
        case _:
            return x
