"""Views of a packed call: entries begin anew with each document, so data tells which tokens they are of.

Entries lie one document after the other, with room for as many as there are tokens. Which of them a row sees is decided
in closed form for a document alone, of an entry's first token; in positions of the call that token is what a derived
input holds, and it does not decrease. So `causal` ends at the entry whose last token is the row's own, as elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from attndsl.branches import Given, Part, Pick, Visible
from attndsl.derivation import BlockMap, Derivation, DocumentEntries, Draw, EntryPlace
from attndsl.diagnostics import error
from attndsl.entry_ends import terms
from attndsl.program import (
    Binary,
    Call,
    Compare,
    Const,
    Dim,
    InputDecl,
    Inter,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Var,
    Where,
    reads,
    walk,
)  # fmt: skip
from attndsl.unpack import document_of, standing


class Declare(Protocol):
    """Declares a derived input of a type and dimensions."""

    def __call__(
        self, derivation: Derivation, name: str, type: Type, dims: tuple[Dim, ...], sorted: bool
    ) -> InputDecl: ...


def over_documents(program: Program, part: Part, declare: Declare) -> Part:
    """A part over a view of documents as one over entries of which each is a token of its own.

    program: derived, with the ends of documents for inputs. Raises `PatternError` (A912) where data of single keys
    decides.
    """
    view = part.view
    assert view is not None and view.packed is not None and not isinstance(view, Pick)
    entry = _Entries(program, view.packed, view.size, view.stride, view.present or Var("Nk"), declare)
    every = view.visible is Visible.EVERY
    # A pattern holds for a whole extent where each of the terms that it is the intersection of does.
    of = terms(part.pattern) if every else (part.pattern,)
    seen = [entry.seen(x, every, part) for x in of]
    mass = Call("max", (entry.tokens, Const(1))) if view.counted else None
    names = (view.keys, view.values) if isinstance(view, Given) else ("", "")
    pattern = Inter(tuple(Where(x, part.span) for x in (*entry.exists, *seen)), part.span)
    return replace(part, pattern=pattern, view=Given(*names, 1, 1, mass=mass))


class _Entries:
    """The entries of `size` tokens every `stride` tokens of each document of an input, k being an entry."""

    def __init__(
        self, program: Program, doc: str, size: int, stride: int, count: Scalar, declare: Declare
    ) -> None:  # fmt: skip
        self.program, self.doc, self.size, self.stride, self.count = program, doc, size, stride, count
        self._declare = declare

    def at(self, place: EntryPlace) -> Read:
        """A token that entry k has."""
        ids, made = self.program.input(self.doc), DocumentEntries(self.doc, self.size, self.stride, place)
        decl = self._declare(made, f"entry_{place.value}_{ids.name}", Type.INT, ids.dims, True)
        return Read(decl.name, (*(Var("b") for _ in ids.dims[:-1]), Var("k")), Type.INT)

    @property
    def end(self) -> Scalar:
        """One past the last token of entry k that is present."""
        end = self.at(EntryPlace.END)
        return end if self.count == Var("Nk") else Call("min", (end, self.count))

    @property
    def tokens(self) -> Scalar:
        """How many tokens of entry k are present."""
        return Binary("-", self.end, self.at(EntryPlace.FIRST))

    @property
    def exists(self) -> tuple[Scalar, ...]:
        """That row q and entry k are of one document, and are present."""
        same = Compare("==", document_of(self.program, self.doc, False, "q"), self.at(EntryPlace.DOCUMENT))
        if self.count == Var("Nk"):
            return (same,)
        return (same, Compare("<", Var("q"), self.count), Compare("<", self.at(EntryPlace.FIRST), self.count))

    def _counts_pairs(self, cond: Scalar) -> bool:
        """Whether a condition reads what is counted of pairs of the call, which are not a document's."""
        read = (self.program.input(x.input).derivation for x in walk(cond) if isinstance(x, Read))
        return any(isinstance(derivation, BlockMap | Draw) for derivation in read)

    def seen(self, pattern: Set, every: bool, part: Part) -> Scalar:
        """The condition for a pattern of a document to hold for every token of an extent, present or not, or for one
        that is present."""
        # Relations are made of derived programs: only here does deriving ask for one.
        from attndsl.entry_sets import FIRST, LAST, seen_from

        unit = self.stride if self.size <= self.stride else 0
        found = seen_from(self.program, pattern, self.size if every else None, unit)
        if found is None or self._counts_pairs(found):
            raise error(
                "A912", "a pattern over a view that reads data at single keys, or draws, is not yet supported",
                part.span, help="read it at q, or of blocks that hold whole entries",
            )  # fmt: skip
        ends: dict[str, Scalar] = {FIRST.name: self.at(EntryPlace.FIRST), LAST.name: Binary("-", self.end, Const(1))}
        read = {name: token for name, token in ends.items() if reads(found, name)}
        return standing(found, self.program, self.doc, self.count, read)


__all__ = ["over_documents"]
