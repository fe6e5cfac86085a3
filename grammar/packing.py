"""`packed` and `lengths`: the inputs that they name, and what does not yet stand beside them."""

from __future__ import annotations

from attndsl import syntax as ast
from attndsl.derivation import Random, Segment
from attndsl.grammar.scope import Context, InputRef, Poison
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.program import (
    Axis,
    Blocks,
    Choose,
    Coarsen,
    Complement,
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


def check_packing(program: Program, node: ast.Attention, ctx: Context) -> bool:
    """Whether everything in a program may stand beside its clauses; what may not was reported."""
    for clause in node.clauses:
        if isinstance(clause, ast.Packed | ast.Lengths):
            packed = isinstance(clause, ast.Packed)
            if not program.plain or program.grid or program.observations or not _stands(program, packed):
                unsupported(Feature.PACKED if packed else Feature.LENGTHS, clause.span, ctx)
                return False
    return True


def _stands(program: Program, packed: bool) -> bool:
    branch = program.branch
    if branch.skip is not None:
        return False  # Tiles hold rows of several sequences.
    read = [e for e in (branch.scale, branch.score, branch.sink, branch.weights) if e is not None]
    names = {x.input for e in (*scalars(branch.pattern), *read) for x in walk(e) if isinstance(x, Read)}
    # Which blocks of an input are a document's is not said.
    blocks = any(dim.block > 1 for name in names for dim in program.input(name).dims)
    return not (packed and blocks) and _placed(branch.pattern, packed)


def _placed(pattern: Set, packed: bool) -> bool:
    """Whether no part of a set looks at all pairs of a call, or places tokens otherwise than by blocks."""
    match pattern:
        case Where():
            return True
        case Union(parts=parts) | Inter(parts=parts):
            return all(_placed(x, packed) for x in parts)
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            return _placed(a, packed) and _placed(b, packed)
        case Complement(operand=operand) | On(operand=operand, place=Blocks()):
            return _placed(operand, packed)
        case On(operand=operand, place=Permuted() | Segment()):
            return not packed and _placed(operand, packed)
        case On() | Coarsen() | Random() | Selected():
            return False
