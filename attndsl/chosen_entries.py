"""Selections of packed calls that a kernel ranks: each query chooses among the entries that its own document has.

Of `blocks(B)` these are the entries of B tokens, of `tokens` the tokens (`documents.py`). Entries are as many as tokens
at most, so what chooses blocks of a document chooses single keys of a call whose keys are entries: which of them are
candidates, or forced, is one condition on the row and the entry, and their vectors come in as inputs. What it makes
counts entries of all documents; a plan counts those of the row's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attndsl.branches import Branch, Part, Pool, PoolFunction, Visible
from attndsl.capacity import forced_bound
from attndsl.derive import derive, own_inputs
from attndsl.diagnostics import PatternError
from attndsl.effort import remembered
from attndsl.plans import of_selection
from attndsl.program import Axis, Dim, InputDecl, Inter, Program, Type
from attndsl.selection import Dot, Probs, Selection, Vectors


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
    score, own = selection.score, own_inputs(derived)
    vectors = (score.y,) if isinstance(score, Dot) else ()
    made = tuple(_declared(v, own) for v in vectors)
    if isinstance(score, Dot):
        score = Dot(score.x, Vectors(made[0].name))
    whole = replace(
        derived, branches=(replace(derived.only, parts=seen),), inputs=(*own, *made, *derived.inputs[len(own) :])
    )
    chosen = replace(
        selection, keys=1, among=among, always=rest[0] if selection.always is not None else None, score=score,
        most_forced=forced_bound(program, heads, selection),
    )  # fmt: skip
    return OfEntries(whole, chosen, vectors, program.packed)


def why_not_entries(program: Program, selection: Selection) -> str:
    """Why what a packed program's queries choose is no choice among entries by products, empty where it is."""
    match selection.score:
        case _ if selection.rows != 1:
            return "it chooses for classes of rows"
        case _ if selection.members is not None:
            return "its members are no blocks in a row"
        case Dot():
            return ""
        case Probs(branch=name):
            (part, *others) = program.named(name).parts
            view = part.view
            whole = not others and view is not None and view.size == view.stride == selection.keys
            return "" if whole else "the branch's entries are not the members"
        case _:
            return "only `dot(Q, …)` and `probs(branch)` are ranked in tiles"


def ranked(program: Program, selection: Selection, heads: tuple[int, int]) -> tuple[Program, Selection]:
    """A selection of a program as what ranks its members has it, and the program that it is one of."""
    seen = of_selection(program, selection)
    if seen.packed is None or why_not_entries(seen, selection):
        return seen, selection
    try:
        found = of_entries(seen, selection, heads)
    except PatternError:
        # Data of single keys says which entries rows may choose.
        return seen, selection
    return found.program, found.selection


def _declared(v: Vectors, own: tuple[InputDecl, ...]) -> InputDecl:
    name = f"{'each' if v.pool is None else v.pool.value}_{v.source}"
    while any(decl.name == name for decl in own):
        name += "_"
    return InputDecl(name, Type.FLOAT, (Dim(Axis.B), Dim(Axis.G), Dim(Axis.K), Dim(Axis.D)))


__all__ = ["OfEntries", "of_entries", "ranked", "why_not_entries"]
