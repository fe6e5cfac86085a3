"""`packed` and `lengths`: the inputs that they name, and what does not yet stand beside them."""

from __future__ import annotations

from attndsl import syntax as ast
from attndsl.branches import factors
from attndsl.derivation import Random, Segment
from attndsl.grammar.scope import Context, InputRef, Poison
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.grid import Along
from attndsl.program import (
    Axis,
    Blocks,
    Choose,
    Coarse,
    Coarsen,
    Complement,
    InputDecl,
    Inter,
    Minus,
    On,
    Permuted,
    Program,
    Read,
    Scalar,
    Selected,
    Set,
    Type,
    Union,
    Var,
    Where,
    children,
    scalars,
    walk,
)  # fmt: skip
from attndsl.selection import Selection

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
            if program.observations or not _stands(program, packed):
                unsupported(Feature.PACKED if packed else Feature.LENGTHS, clause.span, ctx)
                return False
    return True


def _stands(program: Program, packed: bool) -> bool:
    if any(x.skip is not None or x.within is not None or x.queries is not None for x in program.branches):
        # Tiles and classes hold rows of several sequences; shares of members are of all of a call's tokens.
        return False
    views = [part.view for branch in program.branches for part in branch.parts if part.view is not None]
    if any(view.told for view in views):
        return False
    sets = [part.pattern for branch in program.branches for part in branch.parts]
    for chosen in program.selections:
        sets += [x for x in (chosen.among, chosen.always) if x is not None]
    if not all(_placed(x, packed) for x in sets):
        return False
    return _alone(program, sets) if packed else not any(_apart(x) for x in program.selections)


def _apart(chosen: Selection) -> bool:
    """Whether the members of a selection, or its classes of rows, are no blocks in a row."""
    return chosen.members is not None or chosen.row_tiles is not None


def _alone(program: Program, sets: list[Set]) -> bool:
    """Whether nothing in a program, with these sets, counts blocks or entries from the start of the batch entry."""
    if program.selections or any(part.view is not None for branch in program.branches for part in branch.parts):
        return False
    read = [e for x in program.branches for e in (x.scale, x.score, x.sink, x.weights) if e is not None]
    names = {x.input for e in (*(e for p in sets for e in scalars(p)), *read) for x in walk(e) if isinstance(x, Read)}
    # Which blocks of an input are a document's is not said.
    if any(dim.block > 1 for name in names for dim in program.input(name).dims):
        return False
    return program.output is None or not any(_reads_position(e) for e in factors(program.output))


def _reads_position(e: Scalar) -> bool:
    """Whether a factor of an output reads where a row stands, but to read what a call gives for that row."""
    if isinstance(e, Read):
        return any(x != Var("q") and _reads_position(x) for x in e.index)
    return e == Var("q") or any(map(_reads_position, children(e)))


def _placed(pattern: Set, packed: bool) -> bool:
    """Whether a set means something for each sequence of a call that the compiler can say for all of them."""
    match pattern:
        case Where():
            return True
        case Union(parts=parts) | Inter(parts=parts):
            return all(_placed(x, packed) for x in parts)
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            return _placed(a, packed) and _placed(b, packed)
        case Complement(operand=operand) | On(operand=operand, place=Blocks() | Along()):
            return _placed(operand, packed)
        case On(operand=operand, place=Permuted() | Segment()):
            return not packed and _placed(operand, packed)
        case Coarsen(operand=operand, mode=mode):
            return not packed and mode is not Coarse.FRACTION and _placed(operand, packed)
        case Random(among=among):
            return not packed and _placed(among, packed)
        case Selected():
            return not packed
        case On():
            return False
