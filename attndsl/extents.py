"""Conditions on data of single keys as conditions on data of a view's entries: the least and the largest of an extent.

Every token of an extent has x[k] == y where the least and the largest x of it are both y, x[k] <= y where the largest
is at most y, and b[k] where the least b is true. So a document, a limit or a mark at keys decides of entries as closed
forms of blocks do; what an extent's least and largest do not tell (`x[k] != y`, two keys' data in one condition) stays.
Of entries without overlap they are data of a token's entry, so that a pattern stays one of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attndsl.program import (
    Axis,
    Binary,
    Compare,
    Const,
    Dim,
    InputDecl,
    Inter,
    Logic,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Unary,
    Var,
    Where,
    reads,
    walk,
)  # fmt: skip

# The name of a derived input that holds the least, or the largest, of an input's extents.
Declare = Callable[[InputDecl, bool], str]
_SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "=="}


def of_extents(pattern: Set, program: Program, size: int, stride: int, declare: Declare) -> Set:
    """A pattern over a view without overlap, as far as it is a conjunction, with its data of single keys as that of
    entries, of `size` tokens every `stride`."""
    match pattern:
        case Inter(parts=parts):
            return replace(pattern, parts=tuple(of_extents(x, program, size, stride, declare) for x in parts))
        case Where(cond=cond):
            return replace(pattern, cond=_Extents(program, size, stride, declare).condition(cond))
        case _:
            return pattern


def of_entries(cond: Scalar, program: Program, size: int, stride: int, declare: Declare) -> Scalar | None:
    """A condition on the data of a single key as one on that of an entry k, which may overlap others; None for what the
    least and the largest of an extent do not tell."""
    if isinstance(cond, Logic):
        return None
    found = _Extents(program, size, stride, declare, Var("k")).condition(cond)
    return None if found is cond else found


def extent_dims(decl: InputDecl, stride: int) -> tuple[Dim, ...]:
    """The dimensions of an input over tokens, with one entry every `stride` of them."""
    return (*decl.dims[:-1], Dim(Axis.K, stride))


class _Extents:
    def __init__(self, program: Program, size: int, stride: int, declare: Declare, index: Scalar | None = None) -> None:
        """index: the entry in question, if it is not the one that a token k lies in."""
        self.program, self.size, self.stride, self.declare = program, size, stride, declare
        self._index = index or (Binary("//", Var("k"), Const(stride)) if stride > 1 else Var("k"))

    def condition(self, e: Scalar) -> Scalar:
        match e:
            case Logic(op="and", operands=operands):
                return Logic("and", tuple(map(self.condition, operands)))
            case Read(type=Type.BOOL) if self._of_key(e):
                return self._entry(e, largest=False)
            case Unary(op="not", operand=Read(type=Type.BOOL) as read) if self._of_key(read):
                return Unary("not", self._entry(read, largest=True))
            case Compare(op=op, left=left, right=right) if op in _SWAPPED:
                if (ends := self._ends(left, right)) is not None:
                    return self._compared(op, *ends, right)
                if (ends := self._ends(right, left)) is not None:
                    return self._compared(_SWAPPED[op], *ends, left)
        return e

    def _ends(self, e: Scalar, other: Scalar) -> tuple[Scalar, Scalar] | None:
        """The least and the largest of a side that reads one key's data, or is the key itself where the other side is
        data; None for another."""
        if reads(other, "k"):
            return None
        if isinstance(e, Read) and self._of_key(e):
            return self._entry(e, largest=False), self._entry(e, largest=True)
        if e == Var("k") and any(isinstance(x, Read) for x in walk(other)):
            first = Binary("*", Const(self.stride), self._index)
            return first, Binary("+", first, Const(self.size - 1))
        return None

    def _compared(self, op: str, least: Scalar, largest: Scalar, other: Scalar) -> Scalar:
        if op == "==":
            return Logic("and", (Compare("==", least, other), Compare("==", largest, other)))
        return Compare(op, largest if op in ("<", "<=") else least, other)

    def _of_key(self, read: Read) -> bool:
        """Whether it reads an input over tokens at the key itself, and nothing else of the key."""
        decl = self.program.input(read.input)
        over = [dim.axis for dim in decl.dims]
        plain = bool(over) and decl.dims[-1] == Dim(Axis.K) and not {Axis.Q, Axis.K} & {*over[:-1]}
        return plain and read.index[-1] == Var("k") and not any(reads(e, "k") for e in read.index[:-1])

    def _entry(self, read: Read, *, largest: bool) -> Read:
        name = self.declare(self.program.input(read.input), largest)
        return Read(name, (*read.index[:-1], self._index), read.type)
