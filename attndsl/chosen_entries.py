"""Selections of packed calls: each query chooses among the entries that its own document has.

Of `blocks(B)` these are the entries of B tokens, of `tokens` the tokens (`documents.py`). Entries are as many as tokens
at most, so what chooses blocks of a document chooses single keys of a call whose keys are entries: which of them are
candidates, or forced, is one condition on the row and the entry, and their vectors come in as inputs. What it makes
counts entries of all documents; a plan counts those of the row's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attndsl.branches import Branch, Part, Pool, PoolFunction, Visible
from attndsl.capacity import forced_bound
from attndsl.derivation import DocumentEntries, EntryPlace
from attndsl.derive import derive, own_inputs
from attndsl.effort import remembered
from attndsl.entry_sets import FIRST
from attndsl.plans import of_selection
from attndsl.program import Axis, Dim, InputDecl, Inter, Program, Read, Scalar, Type, Var, substitute
from attndsl.selection import Bound, Dot, Given, Probs, Score, Selection, Vectors
from attndsl.unpack import standing


@dataclass(frozen=True, slots=True)
class OfEntries:
    """A selection of the single keys of a program whose keys are entries, without `packed` and `lengths`.

    vectors: of which vectors of keys the program's inputs after a call's own hold those of entries: float [B, G, keys,
    D]. doc: the input that divides tokens.
    """

    program: Program
    selection: Selection
    vectors: tuple[Vectors, ...]
    doc: str


@remembered(256)
def of_entries(program: Program, selection: Selection, heads: tuple[int, int]) -> OfEntries:
    """A selection for single queries of a packed program, as a selection sees it (`plans.of_selection`)."""
    assert program.packed is not None
    entries = Pool(PoolFunction.MEAN, selection.keys, selection.keys, Visible.ANY)
    parts = [Part(selection.among, entries)]
    if selection.always is not None:
        parts.append(Part(Inter((selection.among, selection.always)), entries))
    branch = Branch(())
    if isinstance(selection.score, Probs):
        branch = program.named(selection.score.branch)
        parts += branch.parts
    derived = derive(replace(program, branches=(replace(branch, parts=tuple(parts)),), output=None, selections=()))
    among, *rest = (part.pattern for part in derived.only.parts)
    seen = derived.only.parts[-1:] if isinstance(selection.score, Probs) else ()
    score, vectors = _scored(selection.score, derived)
    own = own_inputs(derived)
    made = tuple(_declared(v, own) for v in vectors)
    whole = replace(
        derived, branches=(replace(derived.only, parts=seen),), inputs=(*own, *made, *derived.inputs[len(own) :])
    )
    if isinstance(score, Given):
        whole, value = _placed(score.value, whole, program, selection.keys)
        score = Given(value)
    chosen = replace(
        selection, keys=1, among=among, always=rest[0] if selection.always is not None else None, score=score,
        most_forced=forced_bound(program, heads, selection),
    )  # fmt: skip
    return OfEntries(whole, chosen, vectors, program.packed)


def ranked(program: Program, selection: Selection, heads: tuple[int, int]) -> tuple[Program, Selection]:
    """A selection of a program as what ranks its members has it, and the program that it is one of."""
    seen = of_selection(program, selection)
    if seen.packed is None:
        return seen, selection
    found = of_entries(seen, selection, heads)
    return found.program, found.selection


def _scored(score: Score, program: Program) -> tuple[Score, tuple[Vectors, ...]]:
    """A score with vectors of entries for inputs, and which vectors these hold."""
    own = own_inputs(program)

    def handed_in(v: Vectors) -> Vectors:
        return Vectors(_declared(v, own).name)

    match score:
        case Dot(x=x, y=y):
            return Dot(x, handed_in(y)), (y,)
        case Bound(x=x, low=low, high=high):
            return Bound(x, handed_in(low), handed_in(high)), (low, high)
        case _:
            return score, ()


def _declared(v: Vectors, own: tuple[InputDecl, ...]) -> InputDecl:
    name = f"{'each' if v.pool is None else v.pool.value}_{v.source}"
    while any(decl.name == name for decl in own):
        name += "_"
    return InputDecl(name, Type.FLOAT, (Dim(Axis.B), Dim(Axis.G), Dim(Axis.K), Dim(Axis.D)))


def _placed(value: Scalar, derived: Program, program: Program, keys: int) -> tuple[Program, Scalar]:
    """A scalar of a document at a member's first token as one of an entry, and the program with what it reads."""
    assert program.packed is not None
    ids, first = program.input(program.packed), DocumentEntries(program.packed, keys, keys, EntryPlace.FIRST)
    decl = next((x for x in derived.inputs if x.derivation == first), None)
    if decl is None:
        name = f"entry_first_{ids.name}"
        while any(x.name == name for x in derived.inputs):
            name += "_"
        decl = InputDecl(name, Type.INT, ids.dims, sorted=True, derivation=first)
        derived = replace(derived, inputs=(*derived.inputs, decl))
    token = Read(decl.name, (*(Var("b") for _ in ids.dims[:-1]), Var("k")), Type.INT)
    count: Scalar = Var("Nk")
    if program.lengths is not None:
        lengths = program.input(program.lengths)
        count = Read(lengths.name, tuple(Var("b") for _ in lengths.dims), Type.INT)
    placed = standing(substitute(value, {"k": FIRST}), derived, program.packed, count, {FIRST.name: token})
    return derived, placed


__all__ = ["OfEntries", "of_entries", "ranked"]
