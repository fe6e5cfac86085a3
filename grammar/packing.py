"""`packed` and `lengths`: the inputs that they name, and what does not yet stand beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attndsl import syntax as ast
from attndsl.branches import Given, factors
from attndsl.derivation import Random, Segment
from attndsl.diagnostics import Span
from attndsl.grammar.scope import Context, InputRef, Poison
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.program import (
    Axis,
    Choose,
    Coarsen,
    Complement,
    Dim,
    InputDecl,
    Inter,
    Minus,
    On,
    Permuted,
    Program,
    Read,
    Selected,
    Set,
    Type,
    Union,
    Where,
    scalars,
    walk,
)  # fmt: skip
from attndsl.selection import Bound, Dot, Probs, Selection, Top

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


@dataclass(frozen=True, slots=True)
class _Barred:
    """What does not stand beside a clause, why, and where it is written."""

    what: str
    why: str
    span: Span | None = None


# Why not, where several things have the same reason.
_TOGETHER = "tiles and classes of rows hold tokens of several sequences"


def check_packing(program: Program, node: ast.Attention, ctx: Context) -> bool:
    """Whether everything in a program may stand beside its clauses; what may not was reported."""
    for clause in node.clauses:
        if isinstance(clause, ast.Packed | ast.Lengths):
            packed = isinstance(clause, ast.Packed)
            found = next(_barred(program, packed), None)
            if found is not None:
                feature = Feature.PACKED if packed else Feature.LENGTHS
                unsupported(feature, found.span or clause.span, ctx, found.what, found.why)
                return False
    return True


def _barred(program: Program, packed: bool) -> Iterator[_Barred]:
    for each in program.observations:
        if packed:
            yield _Barred("`observe`", "which blocks are a document's would follow from data", each.span)
    for branch in program.branches:
        if branch.skip is not None and packed:
            yield _Barred("`skip below`", _TOGETHER)
        if branch.within is not None and packed:
            yield _Barred("`within`", "shares of members are of all of a call's tokens")
        if branch.queries is not None and packed:
            yield _Barred("pooled queries", _TOGETHER)
    for part in (part for branch in program.branches for part in branch.parts):
        if isinstance(part.view, Given) and packed:
            yield _Barred("entries handed in", "which of them are a document's is not said", part.span)
        if packed and part.view is not None and part.view.told:
            yield _Barred("such a view", "data says which tokens its entries are of", part.span)
    for chosen in program.selections:
        if chosen.members is not None or chosen.row_tiles is not None:
            yield _Barred("a selection of members that are no blocks", _TOGETHER, chosen.span)
        if packed and (reason := _not_of_documents(chosen, program)):
            yield _Barred("such a selection", reason, chosen.span)
    sets = [part.pattern for branch in program.branches for part in branch.parts]
    for chosen in program.selections:
        sets += [x for x in (chosen.among, chosen.always) if x is not None]
    for pattern in sets:
        yield from _barred_sets(pattern, program, packed)
    if packed:
        yield from _of_blocks(program, sets)


def _not_of_documents(chosen: Selection, program: Program) -> str:
    """Why a selection has none in each document, empty where it has."""
    if chosen.rows != 1:
        return "which rows choose together would follow from data: choose for each query"
    if isinstance(chosen.rule, Top) and chosen.rule.count is None:
        return "how many members a document has would follow from data"
    match chosen.score:
        case Dot(y=y):
            vectors = [y]
        case Bound(low=low, high=high):
            vectors = [low, high]
        case Probs(branch=name):
            (part, *others) = program.named(name).parts
            view = part.view
            size = (1, 1) if view is None else (view.size, view.stride)
            whole = not others and size == (chosen.keys, chosen.keys)
            return "" if whole else "its members are not the entries of that branch"
        case _:
            vectors = []
    if any(v.source != "K" and v.pool is None and chosen.keys > 1 for v in vectors):
        return "which vectors are a document's is not said"
    return ""


def _of_blocks(program: Program, sets: list[Set]) -> Iterator[_Barred]:
    """What reads blocks or rows of a batch entry where those of a document are meant."""
    read = [e for x in program.branches for e in (x.scale, x.score, x.sink, x.weights) if e is not None]
    read += [] if program.output is None else factors(program.output)
    names = {x.input for e in (*(e for p in sets for e in scalars(p)), *read) for x in walk(e) if isinstance(x, Read)}
    for name in sorted(names):
        if any(dim.block > 1 for dim in program.input(name).dims):
            yield _Barred(f"`{name}`, an input over blocks", "which of its blocks are a document's is not said")


def _barred_sets(pattern: Set, program: Program, packed: bool, placed: bool = False) -> Iterator[_Barred]:
    """What of a set means nothing, for each sequence of a call, that the compiler can say for all of them.

    placed: whether it stands where data places tokens.
    """
    match pattern:
        case Where():
            pass
        case Union(parts=parts) | Inter(parts=parts):
            for x in parts:
                yield from _barred_sets(x, program, packed, placed)
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            yield from _barred_sets(a, program, packed, placed)
            yield from _barred_sets(b, program, packed, placed)
        case Coarsen() | Random() if packed and placed:
            word = "coarsen" if isinstance(pattern, Coarsen) else "random"
            yield _Barred(f"a placed `{word}`", "a document's blocks lie in no order here", pattern.span)
        case Complement(operand=x) | Coarsen(operand=x) | Random(among=x):
            yield from _barred_sets(x, program, packed, placed)
        case On(operand=x, place=place):
            yield from _barred_sets(x, program, packed, placed or isinstance(place, Permuted | Segment))
        case Selected(plan=plan, span=span):
            if packed and Dim(Axis.Q) not in program.input(plan).dims:
                yield _Barred("such a plan", "which rows choose together is not said: choose for each query", span)
