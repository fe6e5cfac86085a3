"""`packed` and `lengths` as ordinary sets: where a token's document begins is read, and positions count from there.

    packed doc    { first[q] == first[k] } & P, its q, k, Nq, Nk counted from first[q]     first, end: derived inputs
    lengths n     { q < n[b] and k < n[b] } & P, its Nq and Nk min(n[b], Nk)

`first` does not decrease, whatever the ids, so a document's tiles are found as those of sorted ids are (`cuts.py`), and
what reads q - k alone loses `first` again. The oracle does not know these sets: see `alone.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from attndsl.derivation import DocumentEnds, Segment
from attndsl.linear import normalise
from attndsl.program import (
    Axis,
    Binary,
    Blocks,
    Call,
    Choose,
    Compare,
    Complement,
    Const,
    InputDecl,
    Inter,
    Logic,
    Minus,
    On,
    Permuted,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Union,
    Var,
    Where,
    rebuild,
)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def unpacked(program: Program) -> Program:
    """The program without the clauses, its pattern and scores saying what they say."""
    if program.packed is None and program.lengths is None:
        return program
    lengths = Var("Nk")
    inputs, conditions = list(program.inputs), list[Scalar]()
    length: Scalar = lengths
    if program.lengths is not None:
        decl = program.input(program.lengths)
        count = Read(decl.name, tuple(Var("b") for _ in decl.dims), Type.INT)
        length = Call("clamp", (count, Const(0), lengths))
        conditions.append(Compare("<", Var("k"), count))
        if not program.align_start:
            conditions.append(Compare("<", Var("q"), count))
    place = _Place(program, None, length, length if not program.align_start else Var("Nq"))
    if program.packed is not None:
        decl = program.input(program.packed)
        taken = {x.name for x in inputs}
        for ends in (False, True):
            name = f"{'end' if ends else 'first'}_{decl.name}"
            while name in taken:
                name += "_"
            inputs.append(InputDecl(name, Type.INT, decl.dims, sorted=True, derivation=DocumentEnds(decl.name, ends)))

        def entry(n: int, x: str) -> Scalar:
            return Read(inputs[n].name, (*(Var("b") for _ in decl.dims[:-1]), Var(x)), Type.INT)

        conditions.append(Compare("==", entry(-2, "q"), entry(-2, "k")))
        first, end = entry(-2, "q"), Call("min", (entry(-1, "q"), length))
        own = Binary("-", end, first)
        place = _Place(program, (first, end), own, own)
    pattern = place.set(program.branch.pattern, place.names())
    cond = conditions[0] if len(conditions) == 1 else Logic("and", tuple(conditions))
    branch = program.branch
    scores = {
        name: None if e is None else place.scalar(e, place.names())
        for name, e in (
            ("scale", branch.scale),
            ("score", branch.score),
            ("sink", branch.sink),
            ("weights", branch.weights),
        )
    }
    changed = program.with_branch(pattern=Inter((Where(cond, branch.span), pattern), branch.span), **scores)
    return replace(changed, inputs=tuple(inputs), packed=None, lengths=None)


Names = dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where sets and scalars stand. `document`: its first token and one past its last; `k_len`, `q_len`: Nk and Nq."""

    program: Program
    document: tuple[Scalar, Scalar] | None
    k_len: Scalar
    q_len: Scalar

    def names(self) -> Names:
        """What the positions and lengths are, written in those of the call."""
        lengths: Names = {"Nk": self.k_len, "Nq": self.q_len}
        if self.document is None:
            return lengths
        first, _ = self.document
        return lengths | {x: Binary("-", Var(x), first) for x in "qk"}

    def set(self, pattern: Set, names: Names) -> Set:
        match pattern:
            case Where(cond=cond):
                return replace(pattern, cond=self.scalar(cond, names))
            case Union(parts=parts) | Inter(parts=parts):
                return replace(pattern, parts=tuple(self.set(x, names) for x in parts))
            case Minus(left=left, right=right):
                return replace(pattern, left=self.set(left, names), right=self.set(right, names))
            case Complement(operand=operand):
                return replace(pattern, operand=self.set(operand, names))
            case Choose(cond=cond, then=then, other=other):
                return replace(
                    pattern, cond=self.scalar(cond, names), then=self.set(then, names), other=self.set(other, names)
                )
            case On(operand=operand, place=Blocks(size=size)):
                return self.set(operand, {x: _block(e, size, x in ("Nq", "Nk")) for x, e in _whole(names).items()})
            case On(operand=operand, place=Permuted() | Segment()) if self.document is None:
                return replace(pattern, operand=self.set(operand, {x: names[x] for x in ("Nq", "Nk")}))
            case _:
                raise AssertionError(f"the front end lets no {type(pattern).__name__} stand here")

    def scalar(self, e: Scalar, names: Names) -> Scalar:
        """A scalar in the positions of the call."""

        def step(x: Scalar) -> Scalar:
            match x:
                case Var(name=name) if name in names:
                    return names[name]
                case Read() if self.document is not None:
                    return self._read(x, *self.document)
                case _:
                    return x

        found = rebuild(e, step)
        return rebuild(found, _settled) if self.document is not None else found

    def _read(self, read: Read, first: Scalar, end: Scalar) -> Scalar:
        """An entry of an input over tokens: the document's own, its index held within the document."""
        dims = self.program.input(read.input).dims
        index = list(read.index)
        for i, (dim, x) in enumerate(zip(dims, read.index, strict=True)):
            if dim.axis in (Axis.Q, Axis.K):
                at = normalise(Binary("+", x, first))
                inside = isinstance(at, Var) and at.name in ("q", "k")
                index[i] = at if inside else Call("clamp", (at, first, Binary("-", end, Const(1))))
        return replace(read, index=tuple(index))


def _whole(names: Names) -> Names:
    return {x: names.get(x, Var(x)) for x in ("q", "k", "Nq", "Nk")}


def _block(e: Scalar, size: int, length: bool) -> Scalar:
    """A position's block; of a length, how many blocks it comes to."""
    whole = Binary("+", e, Const(size - 1)) if length else e
    return Binary("//", whole, Const(size))


def _settled(e: Scalar) -> Scalar:
    """An integer expression in its normal form: what a document's first token adds and takes away is gone."""
    match e:
        case Binary(type=Type.INT):
            return normalise(e)
        case Compare(left=a, right=b) if a.type is b.type is Type.INT:
            return normalise(e)
        case _:
            return e
