"""Patterns over views that data of single keys decides, where neither closed forms nor the ends of extents tell.

What a pattern is the intersection of is asked term by term. A term over overlapping entries that compares the data of
a key has the least and the largest of each extent, as `extents` has them; of any other whose truths differ from token
to token a *map* says for each row, or class of pooled queries, and each entry whether it holds: for the whole extent,
or for some token of it. A map has a byte a row and entry, and is made strip by strip. The terms that integer sets hold
stay, and bound the tiles that are visited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attndsl.branches import Given, Part, Pick, Queries, Visible
from attndsl.entry_ends import terms
from attndsl.extents import Declare, of_entries
from attndsl.program import (
    Axis,
    Binary,
    Call,
    Coarsen,
    Const,
    Dim,
    Inter,
    Logic,
    Program,
    Read,
    Scalar,
    Set,
    Var,
    Where,
    nodes,
    rebuild,
    substitute,
)  # fmt: skip

# Declares the map of a set, for the entries of a part, and reads it at a row and an entry k.
Mapped = Callable[[Set], Read]


def decided(
    program: Program, part: Part, queries: Queries | None, extents: Declare | None, mapped: Mapped, padded: bool
) -> Part:
    """A part of a derived program with what integer sets cannot say of its entries beside its pattern (`entries`).

    extents: declares the least or the largest of an input's extents, where entries overlap and these are the same in
    all sequences. padded: the pattern reads how many tokens are present.
    """
    # Relations are made of derived programs: only here does deriving ask for one.
    from attndsl.entry_sets import undecided

    view = part.view
    assert view is not None and not isinstance(view, Pick)
    if isinstance(view, Given) and view.as_tokens and queries is None:
        return part
    every = view.visible is Visible.EVERY
    kept, found, hard = list[Set](), list[Scalar](), list[Set]()
    for term in _conjuncts(part.pattern):
        if not undecided(program, term, view, queries):
            kept.append(term)
            continue
        told = None
        if every and queries is None and extents is not None and isinstance(term, Where):
            told = of_entries(term.cond, program, view.size, view.stride, extents)
        if told is None:
            hard.append(term)
        else:
            found.append(told)
    coarse = [term for term in kept if any(isinstance(x, Coarsen) for x in nodes(term))]
    if coarse or padded or queries is not None:
        for term in _too_hard(program, part, queries, kept, coarse):
            kept.remove(term)
            hard.append(term)
    if not hard and not found:
        return part
    if hard:
        # Each token of an extent is in every term: one token that is in all of them is asked for all at once.
        found.append(mapped(_all(hard) if every else part.pattern))
    return replace(part, pattern=_all(kept), entries=Where(_both(found), part.span))


def inside(e: Scalar, program: Program, present: Scalar | None) -> Scalar:
    """The condition of a map in a derived program, at positions past the last ones too, which extents reach: data, and
    what is drawn, are there as at the last that are present. present: how many tokens are, if not all of a call's."""
    count: Scalar = Var("Nk") if present is None else Call("clamp", (present, Const(0), Var("Nk")))
    ends = {"q": Var("Nq") if program.align_start else count, "k": count}

    def last(dim: Dim) -> Scalar:
        side = "k" if dim.axis is Axis.K else "q"
        token = Binary("-", ends[side], Const(1))
        block = token if dim.block == 1 else Binary("//", token, Const(dim.block))
        if dim.size <= 1:
            return block
        # Of tiles, as many of a block.
        return Binary("-", Binary("*", Binary("+", block, Const(1)), Const(dim.size)), Const(1))

    def step(x: Scalar) -> Scalar:
        if isinstance(x, Call) and x.function == "drawn":
            own = {name: Call("min", (Var(name), Binary("-", end, Const(1)))) for name, end in ends.items()}
            return substitute(x, own)
        if isinstance(x, Read) and present is not None:
            dims = program.input(x.input).dims
            index = (
                Call("min", (i, last(dim))) if dim.axis in (Axis.Q, Axis.K) else i
                for dim, i in zip(dims, x.index, strict=True)
            )
            return replace(x, index=tuple(index))
        return x

    return rebuild(e, step)


def _too_hard(program: Program, part: Part, queries: Queries | None, kept: list[Set], coarse: list[Set]) -> list[Set]:
    """Of terms that integer sets decide those of which they do not say in time which entries see them all: those of
    blocks that neither classes nor extents divide, or else all."""
    from attndsl.view_plans import in_time

    if in_time(program, replace(part, pattern=_all(kept)), queries):
        return []
    rest = [term for term in kept if term not in coarse]
    return coarse if in_time(program, replace(part, pattern=_all(rest)), queries) else list(kept)


def _conjuncts(pattern: Set) -> tuple[Set, ...]:
    found = list[Set]()
    for term in terms(pattern):
        match term:
            case Where(cond=Logic(op="and", operands=operands)):
                found += [replace(term, cond=x) for x in operands]
            case _:
                found.append(term)
    return tuple(found)


def _all(sets: list[Set]) -> Set:
    if not sets:
        return Where(Const(True))
    return sets[0] if len(sets) == 1 else Inter(tuple(sets))


def _both(conditions: list[Scalar]) -> Scalar:
    return conditions[0] if len(conditions) == 1 else Logic("and", tuple(conditions))


__all__ = ["decided", "inside"]
