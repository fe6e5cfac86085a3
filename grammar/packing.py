"""`packed` and `lengths`: the inputs that they name, and what does not yet stand beside `packed`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attndsl import syntax as ast
from attndsl.branches import Branch, Part
from attndsl.diagnostics import Span
from attndsl.grammar.scope import Context, InputRef, Poison
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.members import Runs
from attndsl.program import (
    Axis,
    InputDecl,
    Program,
    Type,
)  # fmt: skip
from attndsl.selection import Probs

_DIMS = {"packed": (Axis.B, Axis.K), "lengths": (Axis.B,)}
_EXAMPLES = {"packed": "input doc : int[b, k]", "lengths": "input n : int[b]"}


def clause_input(clause: ast.Packed | ast.Lengths, ctx: Context) -> str | None:
    """The input that a clause names; None where a mistake was reported."""
    word = "packed" if isinstance(clause, ast.Packed) else "lengths"
    bound = ctx.scope.find(clause.input)
    if isinstance(bound, Poison):
        return None
    if bound is None:
        ctx.unknown(clause.input, clause.span)
        return None
    if not isinstance(bound, InputRef):
        what = f"`{clause.input}` is not an input"
        ctx.report.error("A023", what, clause.span, "an input belongs here", "declare it as an input")
        return None
    if not _fits(bound.decl, word):
        ctx.report.error(
            "A049", f"`{word}` does not take an input like `{clause.input}`", clause.span, "of another type or shape",
            f"declare it as `{_EXAMPLES[word]}`",
        )  # fmt: skip
        return None
    if word == "packed" and ctx.align_start:
        ctx.report.error(
            "A049", "`packed` says where queries stand, and so does `align start`", clause.span, "both are given",
            "leave out `align start`, or compare documents: `{ doc_of_row[q] == doc[k] }`",
        )  # fmt: skip
        return None
    return bound.decl.name


def _fits(decl: InputDecl, word: str) -> bool:
    axes = tuple(dim.axis for dim in decl.dims)
    whole = all(dim.block == 1 for dim in decl.dims)
    return decl.type is Type.INT and whole and axes in (_DIMS[word], _DIMS[word][1:])


_WHY_TOLD = "data tells what its entries are of"


@dataclass(frozen=True, slots=True)
class _Barred:
    """What does not stand beside `packed`, why, and where it is written."""

    what: str
    why: str
    span: Span | None = None


def check_packing(program: Program, node: ast.Attention, ctx: Context) -> bool:
    """Whether everything in a program may stand beside `packed`, if it is; what may not was reported."""
    for clause in node.clauses:
        if isinstance(clause, ast.Packed) and (found := next(_barred(program), None)) is not None:
            unsupported(Feature.PACKED, found.span or clause.span, ctx, found.what, found.why)
            return False
    return True


def _told(part: Part) -> bool:
    """Whether data tells which tokens a part's entries are of, beside what documents tell."""
    return part.view is not None and part.view.told


def _barred(program: Program) -> Iterator[_Barred]:
    for branch in program.branches:
        if branch.within is not None and any(map(_told, program.named(branch.within.branch).parts)):
            yield _Barred("such two levels", f"of the branch that weighs their members, {_WHY_TOLD}", branch.span)
        if branch.skip is not None and any(map(_told, branch.parts)):
            yield _Barred("`skip below` over such a view", "which entries of a document a tile has is not counted")
    for chosen in program.selections:
        if isinstance(chosen.members, Runs) and chosen.members.order is not None:
            why = "a permutation of all tokens places no document's"
            yield _Barred("a selection of segments in the order of places", why, chosen.span)
        if isinstance(chosen.score, Probs) and (why := _why_not_given(program.named(chosen.score.branch))):
            yield _Barred("such a selection", f"of the branch that it ranks by, {why}", chosen.span)
    for each in program.observations:
        if any(part.view is not None and part.view.told for part in program.named(each.branch).parts):
            yield _Barred("such an `observe`", "data says which tokens entries are of", each.span)
        if each.members is not None or each.row_tiles is not None:
            why = "it is found of the tokens of a call in strips, and they begin anew with each document"
            yield _Barred("`observe` of members that are no blocks", why, each.span)


def _why_not_given(branch: Branch) -> str:
    """Why the probabilities of a branch, where it has any, are not given to members of documents."""
    if branch.why_no_mass:
        return ""
    if len(branch.parts) > 1:
        return "it has several parts"
    return _WHY_TOLD if any(map(_told, branch.parts)) else ""
