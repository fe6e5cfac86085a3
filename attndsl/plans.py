"""Plans: how what a selection chooses stands in a program, as an input that a call makes or is given."""

from __future__ import annotations

from dataclasses import replace

from attndsl.derivation import Random
from attndsl.diagnostics import Span
from attndsl.member_numbers import number
from attndsl.members import Lags, Placed, Runs, extent
from attndsl.program import (
    Axis,
    Binary,
    Const,
    Dim,
    InputDecl,
    Program,
    Scalar,
    Selected,
    Type,
    Var,
    nodes,
    reads,
    scalars,
)
from attndsl.selection import Probs, Selection, Share, Top


def plan_heads(selection: Selection) -> Share:
    """Which heads have one plan: those that share, unless what is allowed, or how many are chosen, reads the head."""
    sets = [selection.among] if selection.always is None else [selection.among, selection.always]
    written: list[Scalar] = [e for each in sets for e in scalars(each)]
    if isinstance(selection.members, Placed | Runs):
        written += selection.members.lead
    if isinstance(selection.members, Runs) and selection.members.order is not None:
        written += selection.members.order.lead
    if isinstance(selection.rule, Top) and selection.rule.count is not None:
        written.append(selection.rule.count)
    finer = {Share.NONE: (), Share.GROUP: ("h",), Share.HEADS: ("h", "g")}[selection.share]
    drawn = any(isinstance(node, Random) for each in sets for node in nodes(each))
    return Share.NONE if drawn or any(reads(e, *finer) for e in written) else selection.share


def plan_input(selection: Selection) -> InputDecl:
    """The declaration of a selection's plan. What all heads share, or all rows, it has no dimension for."""
    heads = {Share.NONE: (Dim(Axis.H),), Share.GROUP: (Dim(Axis.G),), Share.HEADS: ()}[plan_heads(selection)]
    rows = () if selection.rows is None else (Dim(Axis.Q, selection.rows),)
    if selection.row_tiles is not None:
        rows = (Dim(Axis.Q, *extent(selection.row_tiles), tiles=selection.row_tiles),)
    dims, (keys, each) = (Dim(Axis.B), *heads, *rows, Dim(Axis.LIST)), selection.extent
    of_rows = isinstance(selection.members, Lags)
    return InputDecl(selection.name, Type.INT, dims, members=keys, each=each, of_rows=of_rows, span=selection.span)


def selected(plan: InputDecl, selection: Selection | None = None, span: Span | None = None) -> Selected:
    """The pairs whose member a plan chooses for their row class; `selection`: what makes it, where no call gives it."""
    of, per = (None, None) if selection is None else (selection.members, selection.row_tiles)
    index: list[Scalar] = []
    for dim in plan.dims[:-1]:
        if dim.axis is Axis.Q and per is not None:
            index.append(number(per, "q"))
        else:
            index.append(Binary("//", Var("q"), Const(dim.block)) if dim.block > 1 else Var(dim.axis.value))
    assert plan.members is not None
    return Selected(plan.name, tuple(index), plan.members, members=of, span=span)


def plans_read(selection: Selection, program: Program) -> set[str]:
    """The program's selections that one reads: among which it chooses, by which it is forced, or of which the branch
    sees what they choose that it ranks by."""
    made = {other.name for other in program.selections}
    sets = [selection.among] if selection.always is None else [selection.among, selection.always]
    if isinstance(selection.score, Probs):
        sets += [part.pattern for part in program.named(selection.score.branch).parts]
    return {node.plan for each in sets for node in nodes(each) if isinstance(node, Selected) and node.plan in made}


def of_selection(program: Program, selection: Selection) -> Program:
    """The program as a selection sees it: with the inputs of a call, and the plans that it chooses among."""
    own, read = own_program(program), plans_read(selection, program)
    plans = (plan_input(each) for each in program.selections if each.name in read)
    plans = (decl.of_documents(program.packed is not None) for decl in plans)
    return replace(own, inputs=(*own.inputs, *plans))


def own_program(program: Program) -> Program:
    """The program with the inputs that a call gives alone: without the plans that its selections make."""
    made = {selection.name for selection in program.selections}
    return replace(program, inputs=tuple(decl for decl in program.inputs if decl.name not in made))
