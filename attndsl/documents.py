"""Views of a packed call: entries begin anew with each document, so data tells which tokens they are of.

Entries lie one document after the other, with room for as many as there are tokens. Which of them a row sees is decided
in closed form for a document alone, of an entry's first token; in positions of the call that token is what a derived
input holds, and it does not decrease. So `causal` ends at the entry whose last token is the row's own, as elsewhere.
Runs of an input are such entries too, and listed tokens: what no closed form says of them, the ends of their tokens do
(`entry_ends.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attndsl.branches import Given, Part, Pick, Visible
from attndsl.derivation import BlockMap, DocumentEntries, Draw, EntryPlace, Offsets
from attndsl.diagnostics import PatternError, error
from attndsl.entry_ends import Ends, terms
from attndsl.program import (
    Axis,
    Binary,
    Call,
    Compare,
    Const,
    Dim,
    Inter,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Var,
    Where,
    reads,
    scalars,
    walk,
)  # fmt: skip
from attndsl.told_entries import Deriving, among_listed, among_runs, by_map, ends_of_listed, ends_of_runs
from attndsl.unpack import document_of, in_documents, standing


def over_documents(deriving: Deriving, part: Part) -> Part:
    """A part over a view of documents as one over entries of which each is a token of its own. Its pattern is that of a
    document alone; the program has the ends of documents for inputs.

    Raises `PatternError` (A912) where data of single keys decides.
    """
    view = part.view
    assert view is not None and view.packed is not None and not isinstance(view, Pick)
    count: Scalar = view.present or Var("Nk")
    if deriving.ragged and view.present is not None:
        # `lengths` may say more tokens than a sequence of a cache has.
        count = Call("min", (count, Var("Nk")))
    if view.runs is not None or (isinstance(view, Given) and view.picked is not None):
        return _by_ends(deriving, part, view, count) if isinstance(view, Given) else part
    entry = _Entries(deriving, view.packed, view.size, view.stride, count)
    classes = _classes(deriving)
    every = view.visible is Visible.EVERY
    # A pattern holds for a whole extent where each of the terms that it is the intersection of does.
    of = terms(part.pattern) if every else (part.pattern,)
    seen = [entry.seen(x, every, classes, part) for x in of]
    if classes > 1:
        # Implied by what its class sees, what the row itself would see bounds the tiles that are visited.
        seen += [entry.seen(x, every, 1, part) for x in of]
    mass = Call("max", (entry.tokens, Const(1))) if view.counted else None
    names = (view.keys, view.values) if isinstance(view, Given) else ("", "")
    pattern = Inter(tuple(Where(x, part.span) for x in (*entry.exists, *seen)), part.span)
    return replace(part, pattern=pattern, view=Given(*names, 1, 1, mass=mass))


def _classes(deriving: Deriving) -> int:
    """How many queries are pooled."""
    queries = deriving.program.only.queries
    return 1 if queries is None else queries.size


class _Entries:
    """The entries of `size` tokens every `stride` tokens of each document of an input, k being an entry."""

    def __init__(self, deriving: Deriving, doc: str, size: int, stride: int, count: Scalar) -> None:
        self.program, self.doc, self.size, self.stride, self.count = deriving.program, doc, size, stride, count
        self._deriving = deriving
        # Whether all tokens of the call are present.
        self._whole = count == Var("Nk") and not deriving.ragged

    def at(self, place: EntryPlace) -> Scalar:
        """A token that entry k has."""
        if self.size == self.stride == 1:
            return self._token(place)
        ids, made = self.program.input(self.doc), DocumentEntries(self.doc, self.size, self.stride, place)
        decl = self._deriving.declare(made, f"entry_{place.value}_{ids.name}", Type.INT, ids.dims, sorted=True)
        return Read(decl.name, (*(Var("b") for _ in ids.dims[:-1]), Var("k")), Type.INT)

    def _token(self, place: EntryPlace) -> Scalar:
        """Of entries that are tokens."""
        match place:
            case EntryPlace.FIRST:
                return Var("k")
            case EntryPlace.END:
                return Binary("+", Var("k"), Const(1))
            case EntryPlace.DOCUMENT:
                return document_of(self.program, self.doc, False, "k")

    @property
    def end(self) -> Scalar:
        """One past the last token of entry k that is present."""
        end = self.at(EntryPlace.END)
        return end if self._whole else Call("min", (end, self.count))

    @property
    def tokens(self) -> Scalar:
        """How many tokens of entry k are present."""
        return Binary("-", self.end, self.at(EntryPlace.FIRST))

    @property
    def exists(self) -> tuple[Scalar, ...]:
        """That row q and entry k are of one document, and are present."""
        same = Compare("==", document_of(self.program, self.doc, False, "q"), self.at(EntryPlace.DOCUMENT))
        if self._whole:
            return (same,)
        return (same, Compare("<", Var("q"), self.count), Compare("<", self.at(EntryPlace.FIRST), self.count))

    def seen(self, pattern: Set, every: bool, classes: int, part: Part) -> Scalar:
        """The condition for a pattern of a document to hold for every token of an extent, present or not, or for one
        that is present; at each query of a class of so many."""
        # Relations are made of derived programs: only here does deriving ask for one.
        from attndsl.entry_sets import FIRST, LAST, seen_from

        unit = self.stride if self.size <= self.stride else 0
        derived = self._deriving.derived(pattern)
        program = self._deriving.here
        found = seen_from(program, derived, self.size if every else None, unit, classes)
        if found is None or _of_the_call(program, found):
            raise _not_yet(part)
        ends: dict[str, Scalar] = {FIRST.name: self.at(EntryPlace.FIRST), LAST.name: Binary("-", self.end, Const(1))}
        read = {name: token for name, token in ends.items() if reads(found, name)}
        return standing(found, program, self.doc, self.count, read)


def _not_yet(part: Part) -> PatternError:
    return error(
        "A912", "a pattern over a view that reads data at single keys, or draws, is not yet supported", part.span,
        help="read it at q, or of blocks that hold whole entries",
    )  # fmt: skip


def _of_the_call(program: Program, cond: Scalar) -> bool:
    """Whether a condition reads what is derived of pairs and segments of the call, which are not a document's."""
    read = (program.input(x.input).derivation for x in walk(cond) if isinstance(x, Read))
    return any(isinstance(derivation, BlockMap | Draw | Offsets) for derivation in read)


# -------------------------------------------------------------------------- runs and listed tokens


def _by_ends(deriving: Deriving, part: Part, view: Given, count: Scalar) -> Part:
    """A part over the runs of an input in documents, or tokens listed there, whose ends are positions of the call."""
    assert view.packed is not None
    doc = view.packed
    # In a row's own document, whose ends bound what lies there.
    first, end = (document_of(deriving.program, doc, ends, "q") for ends in (False, True))
    inside: list[Scalar] = [Compare("<=", first, Var("k")), Compare("<", Var("k"), end)]
    if view.present is not None:
        inside += [Compare("<", Var(x), count) for x in "qk"]
    alone = terms(part.pattern)
    placed = [_placed(deriving, x, doc, count) for x in alone]
    classes, picked, runs = _classes(deriving), view.picked, view.runs
    if runs is not None:
        ends, entries = ends_of_runs(deriving, deriving.here, part, runs), Dim(Axis.K)
    else:
        assert picked is not None
        ends, entries = ends_of_listed(deriving.here, part, picked), picked.room

    def seen() -> Iterator[Set]:
        for x in inside:
            yield ends.over(Where(x, part.span))
        for own, here in zip(alone, placed, strict=True):
            try:
                if classes > 1 and any(reads(e, "q") for e in scalars(here)):
                    raise _not_yet(part)
                yield ends.over(here)
            except PatternError:
                found = _whole(deriving, own, doc, count, ends)
                if found is not None:
                    yield Where(found, part.span)
                elif classes > 1:
                    raise
                else:
                    yield by_map(deriving, here, view, ends, entries)

    part = replace(part, pattern=Inter(tuple(seen()), part.span))
    if runs is not None:
        return among_runs(deriving, part, view, runs, ends)
    assert picked is not None
    return among_listed(part, view, picked, ends.first)


def _placed(deriving: Deriving, pattern: Set, doc: str, count: Scalar) -> Set:
    """A set of a document alone in positions of the call, derived."""
    here, made = in_documents(pattern, deriving.here, doc, count)
    for derivation, decl in made.items():
        deriving.declare(derivation, decl.name, decl.type, decl.dims, decl.sorted)
    return deriving.derived(here)


def _whole(deriving: Deriving, pattern: Set, doc: str, count: Scalar, ends: Ends) -> Scalar | None:
    """The condition for a set of a document alone to hold for every token of an entry, where that has a closed form."""
    from attndsl.entry_sets import FIRST, LAST, seen_whole

    derived = deriving.derived(pattern)
    program = deriving.here
    found = seen_whole(program, derived, FIRST, LAST, _classes(deriving))
    if found is None or _of_the_call(program, found):
        return None
    return standing(found, program, doc, count, {FIRST.name: ends.first, LAST.name: ends.last})


__all__ = ["over_documents"]
