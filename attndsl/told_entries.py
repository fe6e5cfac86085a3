"""Views whose entries data tells, runs of an input or listed tokens: as ones over entries of which each is a token of
its own, which rows see by where its tokens begin and end."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from attndsl.branches import Given, Part, Pick, View
from attndsl.derivation import Derivation, DocumentEnds, PresentRuns, RunCount, RunEnds, RunExtents
from attndsl.diagnostics import PatternError
from attndsl.entry_ends import Ends, first_of, terms, token_read
from attndsl.members import Runs
from attndsl.program import (
    Axis,
    Binary,
    Call,
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
    Var,
    Where,
)  # fmt: skip


class Deriving(Protocol):
    """What derives a program: `here` is the program with the inputs found so far."""

    @property
    def program(self) -> Program: ...

    @property
    def here(self) -> Program: ...

    @property
    def ragged(self) -> bool: ...

    def declare(
        self, derivation: Derivation, name: str, type: Type, dims: tuple[Dim, ...], sorted: bool = False
    ) -> InputDecl: ...

    def offsets(self, name: str) -> str: ...

    def derived(self, pattern: Set) -> Set: ...

    def entry_map(self, operand: Set, view: View, entries: Dim, ends: tuple[Scalar, ...]) -> Read: ...


def ends_of_runs(deriving: Deriving, program: Program, part: Part, runs: Runs) -> Ends:
    """What is known of runs of an input. program: what patterns read has its inputs."""
    ids = program.input(runs.input)

    def end(last: bool) -> Read:
        name = f"{'last' if last else 'first'}_{ids.name}"
        decl = deriving.declare(RunEnds(ids.name, last), name, Type.INT, ids.dims, sorted=True)
        return Read(decl.name, (*runs.lead, Var("k")), Type.INT)

    def least(decl: InputDecl, largest: bool) -> tuple[str, tuple[Scalar, ...]]:
        name = f"{'largest' if largest else 'least'}_{decl.name}"
        more = {dim: e for dim, e in zip(ids.dims[:-1], runs.lead, strict=True) if dim not in decl.dims}
        dims = (*decl.dims[:-1], *more, Dim(Axis.K))
        found = deriving.declare(RunExtents(decl.name, ids.name, largest), name, decl.type, dims)
        return found.name, (*more.values(),)

    first, last = end(False), end(True)
    same: dict[Scalar, Scalar] = {}

    def alike(decl: InputDecl) -> None:
        """What an input holds of a token is what it holds of its run's first."""
        lead = tuple(e for dim, e in zip(ids.dims[:-1], runs.lead, strict=True) if dim in decl.dims)
        same[token_read(decl.name, lead)] = Read(decl.name, (*lead, first), Type.INT)

    same[token_read(ids.name, runs.lead)] = Read(ids.name, (*runs.lead, first), Type.INT)
    names = {ids.name}
    if isinstance(ids.derivation, PresentRuns):
        # Patterns read what the call gave, of which a run lies in one run, and in one document.
        names |= {name for name in (ids.derivation.input, ids.derivation.documents) if name is not None}
        for decl in program.inputs:
            if decl.name in names or (isinstance(decl.derivation, DocumentEnds) and decl.derivation.input in names):
                alike(decl)
        # And chosen segments, what tells where theirs begin.
        own = program.input(ids.derivation.input)
        lead = tuple(e for dim, e in zip(ids.dims[:-1], runs.lead, strict=True) if dim in own.dims)
        same[first_of(deriving.offsets(own.name), lead)] = first
    same[first_of(deriving.offsets(ids.name), runs.lead)] = first
    return Ends(program, first, last, same, least, part.span)


def over_runs(deriving: Deriving, part: Part, view: Given, runs: Runs) -> Part:
    """A part over the runs of an input."""
    program = deriving.program
    ids = program.input(runs.input)
    if deriving.ragged and ids.derivation is None:
        # Each sequence ends elsewhere, and with it its last run.
        lead, dims = runs.lead, ids.dims
        if Dim(Axis.B) not in dims:
            lead, dims = (Var("b"), *lead), (Dim(Axis.B), *dims)
        ids = deriving.declare(PresentRuns(ids.name, None), f"present_{ids.name}", Type.INT, dims)
        program, runs = replace(program, inputs=(*program.inputs, ids)), Runs(ids.name, lead)
    ends = ends_of_runs(deriving, program, part, runs)
    seen = _seen(deriving, part, view, ends, Dim(Axis.K))
    return among_runs(deriving, replace(part, pattern=seen), view, runs, ends)


def among_runs(deriving: Deriving, part: Part, view: Given, runs: Runs, ends: Ends) -> Part:
    """A part over entries that are runs of an input, whose pattern is one of these, without what data tells."""
    if deriving.ragged:
        exists = Compare("<", ends.first, Var("Nk"))
    else:
        ids, one = deriving.here.input(runs.input), Dim(Axis.CONST, size=1)
        counts = deriving.declare(RunCount(ids.name), f"runs_{ids.name}", Type.INT, (*ids.dims[:-1], one))
        exists = Compare("<", Var("k"), Read(counts.name, (*runs.lead, Const(0)), Type.INT))
    # What is no run has a last token before its first.
    tokens = Call("max", (Binary("+", Binary("-", ends.last, ends.first), Const(1)), Const(1)))
    mass = tokens if view.counted else None
    view = replace(view, runs=None, packed=None, counted=False, mass=mass)
    return replace(part, pattern=Inter((Where(exists, part.span), part.pattern), part.span), view=view)


def _seen(deriving: Deriving, part: Part, view: Given, ends: Ends, entries: Dim) -> Set:
    """The entries that rows see: what the ends of their tokens do not decide, or not in time, or of pooled queries not
    alike for a class, a map does."""
    # Relations are made of derived programs: only here does deriving ask for one.
    from attndsl.entry_sets import undecided
    from attndsl.view_plans import in_time

    queries, found, hard = deriving.program.only.queries, list[Set](), list[Set]()
    alone = terms(part.pattern)
    for term in alone:
        try:
            told = ends.over(term)
        except PatternError:
            hard.append(term)
            continue
        apart = queries is not None and undecided(deriving.here, told, view, queries)
        (hard if apart else found).append(term if apart else told)
    if found and not in_time(deriving.here, replace(part, pattern=Inter(tuple(found))), queries):
        found, hard = [], list(alone)
    if hard:
        found.append(by_map(deriving, Inter(tuple(hard), part.span), view, ends, entries))
    return Inter(tuple(found), part.span)


def by_map(deriving: Deriving, pattern: Set, view: Given, ends: Ends, entries: Dim) -> Set:
    """The entries whose tokens, up to their ends, are all in a pattern, as a map has them."""
    return Where(deriving.entry_map(pattern, view, entries, (ends.first, ends.last)), ends.span)


def over_listed(deriving: Deriving, part: Part, view: Given, picked: Pick) -> Part:
    """A part over listed tokens."""
    ends = ends_of_listed(deriving.here, part, picked)
    seen = _seen(deriving, part, view, ends, picked.room)
    return among_listed(replace(part, pattern=seen), view, picked, ends.first)


def ends_of_listed(program: Program, part: Part, picked: Pick) -> Ends:
    """What is known of listed tokens."""
    token = Read(picked.input, (*picked.lead, Var("k")), Type.INT)
    return Ends(program, token, token, {}, None, part.span)


def among_listed(part: Part, view: Given, picked: Pick, token: Scalar) -> Part:
    """A part over listed tokens, whose pattern is one of these, without what data tells."""
    room, tokens = picked.room, view.present or Var("Nk")
    count: Scalar = Const(room.size)
    if room.axis is Axis.K:
        whole = Binary("+", tokens, Const(room.block - 1))
        count = tokens if room.block == 1 else Binary("//", whole, Const(room.block))
    bounds = (Compare("<", Var("k"), count), Compare(">=", token, Const(0)), Compare("<", token, tokens))
    weight = picked.weight
    mass = None if weight is None else Call("max", (Binary("*", weight, Const(1.0)), Const(0.0)))
    exists = Where(Logic("and", bounds), part.span)
    pattern = Inter((exists, part.pattern), part.span)
    return replace(part, pattern=pattern, view=replace(view, picked=None, packed=None, mass=mass))


__all__ = [
    "Deriving",
    "among_listed",
    "among_runs",
    "by_map",
    "ends_of_listed",
    "ends_of_runs",
    "over_listed",
    "over_runs",
]
