"""Types and lowers set expressions; calls of patterns are inlined here."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from attndsl import syntax as ast
from attndsl.coordinates import on_grid
from attndsl.diagnostics import Span
from attndsl.grammar import draws, selections
from attndsl.grammar.arguments import match_arguments
from attndsl.grammar.places import grid_of, not_along, places_of
from attndsl.grammar.scalars import FUNCTIONS, bind_locals, boolean, integer, scalar, static_float, static_int
from attndsl.grammar.scope import (
    RESERVED,
    SELECTIONS,
    AxisRef,
    Context,
    InputRef,
    LevelsRef,
    PatternRef,
    PlanRef,
    Poison,
    Scope,
    SetValue,
    TableRef,
    Use,
    Value,
)
from attndsl.grid import Along
from attndsl.plans import plan_input, selected
from attndsl.program import (
    Axis,
    Choose,
    Coarse,
    Coarsen,
    Complement,
    Const,
    InputDecl,
    Inter,
    Minus,
    On,
    Read,
    Selected,
    Set,
    Union,
    Where,
    nodes,
    scalars,
    walk,
)
from attndsl.selection import Selection
from attndsl.simplify import negated

MAX_LEVEL = 80
SET_FUNCTIONS = frozenset({"coarsen", "random", *SELECTIONS})


def pattern_set(node: ast.Expr, ctx: Context) -> Set | None:
    """The set of an expression; None if a mistake in it was reported."""
    ctx.maker.step(node.span)
    if ctx.level >= MAX_LEVEL:
        raise ctx.report.fatal(
            "A006", f"sets nest more than {MAX_LEVEL} levels", node.span, help="patterns that call patterns add levels"
        )
    ctx = replace(ctx, level=ctx.level + 1, use=Use.SET)
    span = node.span
    match node:
        case ast.Comprehension(cond=cond, bindings=bindings):
            ctx.maker.term(span)
            e = boolean(cond, bind_locals(bindings, ctx))
            if e is None:
                return None
            return gridded(Where(e, span), ctx) if ctx.maker.reads_grid(e) else Where(e, span)
        case ast.Algebra(op=op, operands=operands):
            sets = [pattern_set(operand, ctx) for operand in operands]
            good = tuple(s for s in sets if s is not None)
            if len(good) < len(sets):
                return None
            return Union(good, span) if op == "|" else Inter(good, span)
        case ast.Arithmetic():
            return _difference(node, ctx)
        case ast.Prefix(op="~", operand=operand):
            inner = pattern_set(operand, replace(ctx, among="`~`"))
            return None if inner is None else Complement(inner, span)
        case ast.Conditional():
            return _choose(node, ctx)
        case ast.Name():
            return _name(node, ctx)
        case ast.Apply():
            return _apply(node, ctx)
        case ast.Place():
            return _placed(node, ctx)
        case ast.Logic(op=op):
            word = "&" if op == "and" else "|"
            ctx.report.error(
                "A021",
                f"`{op}` combines booleans, and a set belongs here",
                span,
                "here",
                f"write `{word}` between sets",
            )
            return None
        case ast.Prefix(op="not"):
            ctx.report.error("A021", "`not` negates a boolean, and a set belongs here", span, "here", "write `~`")
            return None
        case ast.Comparison():
            ctx.report.error(
                "A023", "a set belongs here", span, "a condition", "put the condition in braces: `{ ... }`"
            )
            return None
        case ast.Truth(value=value):
            ctx.report.error("A023", "a set belongs here", span, "a boolean", f"write `{'all' if value else 'none'}`")
            return None
        case ast.Prefix() | ast.Number() | ast.Subscript() | ast.Coordinate() | ast.Group():
            ctx.report.error("A023", "a set belongs here", span, "a value", "write a condition in braces: `{ ... }`")
            return None
        case _:
            assert_never(node)


def is_set(node: ast.Expr, ctx: Context) -> bool:
    """Whether an expression is a set, by its form."""
    while isinstance(node, ast.Conditional | ast.Arithmetic):
        node = node.then if isinstance(node, ast.Conditional) else node.first
    match node:
        case ast.Comprehension() | ast.Algebra() | ast.Place() | ast.Prefix(op="~"):
            return True
        case ast.Name(id=name):
            return isinstance(ctx.scope.find(name), PatternRef | SetValue | PlanRef)
        case ast.Apply(function=name):
            return isinstance(ctx.scope.find(name), PatternRef) or name in SET_FUNCTIONS
        case _:
            return False


def _difference(node: ast.Arithmetic, ctx: Context) -> Set | None:
    wrong = [op for op, _ in node.rest if op != "-"]
    if wrong:
        help = "write `|` for both, `&` for what they share" if wrong[0] in "+*" else "put the condition in braces"
        ctx.report.error("A023", f"`{wrong[0]}` does not combine sets", node.span, "a set belongs here", help)
        return None
    left = pattern_set(node.first, ctx)
    taken = [pattern_set(operand, replace(ctx, among="the right of `-`")) for _, operand in node.rest]
    good = tuple(s for s in taken if s is not None)
    if left is None or len(good) < len(taken):
        return None
    # a - b - c is a - (b | c), which keeps long chains flat.
    right = good[0] if len(good) == 1 else Union(good, node.rest[0][1].span.to(node.span))
    return Minus(left, right, node.span)


def _choose(node: ast.Conditional, ctx: Context) -> Set | None:
    cond = boolean(node.cond, ctx)
    decided = cond.value if isinstance(cond, Const) else None
    inner = replace(ctx, among="`if`")
    ctx.maker.dead += decided is False
    then = pattern_set(node.then, inner)
    ctx.maker.dead += (decided is True) - (decided is False)
    other = pattern_set(node.other, inner)
    ctx.maker.dead -= decided is True
    if cond is None or then is None or other is None:
        return None
    if decided is None:
        found = Choose(cond, then, other, node.span)
        return gridded(found, ctx) if ctx.maker.reads_grid(cond) else found
    return then if decided else other


def _name(node: ast.Name, ctx: Context) -> Set | None:
    name, span = node.id, node.span
    bound = ctx.scope.find(name)
    match bound:
        case PatternRef():
            return _inline(name, bound, (), span, ctx)
        case SetValue(set=value, places=places):
            if places != ctx.places and _reads_positions(value, ctx):
                ctx.report.error(
                    "A031",
                    f"`{name}` reads an input by position and may not stand under `{ctx.inside}`",
                    span,
                    "placed here",
                    "intersect it outside",
                )
                return None
            return value
        case PlanRef(decl=InputDecl() as decl):
            return _planned(decl, span, ctx)
        case PlanRef():
            made = ctx.maker.selections.get(name)
            return None if made is None else _chosen(made, span, ctx)
        case Poison():
            return None
        case None if name == "off_grid":
            return _off_grid(span, ctx)
        case None:
            if name in RESERVED:
                help = "write a condition in braces: `{ ... }`"
                ctx.report.error("A023", "a set belongs here", span, f"`{name}` is not a set", help)
            else:
                ctx.unknown(name, span)
            return None
        case LevelsRef():
            ctx.report.error("A023", f"`{name}` is a view", span, "a set belongs here", f"write `over {name}`")
            return None
        case _:
            ctx.report.error(
                "A023", "a set belongs here", span, f"`{name}` is not a set", "write a condition in braces: `{ ... }`"
            )
            return None


def _placed(node: ast.Place, ctx: Context) -> Set | None:
    """`P on place`; along several axes one after another."""
    where = places_of(node.place, ctx)
    along = where is not None and isinstance(where[0][0], Along)
    deeper = replace(ctx, places=ctx.places + 1, inside="on", among="`on`", along=ctx.along or along)
    inner = pattern_set(node.operand, deeper)
    if inner is None or where is None:
        return None
    placed = []
    for chain in where:
        part = inner
        for place in reversed(chain):
            part = On(part, place, node.span)
        placed.append(part)
    found = placed[0] if len(placed) == 1 else Inter(tuple(placed), node.span)
    return gridded(found, ctx) if along else found


def gridded(pattern: Set, ctx: Context) -> Set:
    """The pairs of a set whose tokens lie on the grid."""
    grid = grid_of(ctx)
    return pattern if grid is None or grid.everywhere else Inter((pattern, Where(on_grid(grid))), pattern.span)


def _off_grid(span: Span, ctx: Context) -> Set | None:
    if not any(isinstance(ctx.scope.find(n), AxisRef) for n in ctx.scope.names()):
        ctx.report.error("A045", "`off_grid` needs axes", span, "there is no grid", "declare it: `axes y, x[64]`")
        return None
    if ctx.inside == "on":
        ctx.report.error(
            "A031", "`off_grid` tells tokens apart and may not stand under `on`", span, "no tokens here",
            "combine it outside: `(P on ...) | off_grid`",
        )  # fmt: skip
        return None
    grid = grid_of(ctx)
    return None if grid is None else Where(negated(on_grid(grid)), span)


def _chosen(made: Selection, span: Span, ctx: Context) -> Set | None:
    """The pairs that a selection chooses, of those that it chooses among."""
    if ctx.maker.dead:
        return Where(ctx.maker.const(True, span), span)
    ctx.maker.inputs[made.name] = plan_input(made)
    found = _planned(ctx.maker.inputs[made.name], span, ctx, made)
    if found is None or made.among == Where(Const(True)):
        return found
    return Inter((made.among, found), span)


def within(pattern: Set, made: Selection, ctx: Context) -> Set | None:
    """A pattern within what a selection chooses, which is its last operand."""
    assert made.span is not None
    chosen = _chosen(made, made.span, ctx)
    operands = (pattern, chosen)
    parts = (x for p in operands if p is not None for x in (p.parts if isinstance(p, Inter) else (p,)))
    return None if chosen is None else Inter(tuple(parts), pattern.span)


def _planned(decl: InputDecl, span: Span, ctx: Context, made: Selection | None = None) -> Set | None:
    """The pairs that a plan chooses, read at the current row."""
    if ctx.places:
        ctx.report.error(
            "A031",
            f"`{decl.name}` is read by position and may not stand under `{ctx.inside}`",
            span,
            "placed here",
            "intersect it outside",
        )
        return None
    ctx.maker.term(span)
    return selected(decl, made, span)


def _reads_positions(value: Set, ctx: Context) -> bool:
    if any(isinstance(node, Selected) for node in nodes(value)):
        return True
    found = (e for root in scalars(value) for e in walk(root) if isinstance(e, Read))
    return any(dim.axis in (Axis.Q, Axis.K) for e in found for dim in ctx.maker.inputs[e.input].dims)


def _apply(node: ast.Apply, ctx: Context) -> Set | None:
    name, span = node.function, node.span
    bound = ctx.scope.find(name)
    if isinstance(bound, PatternRef):
        return _inline(name, bound, node.args, span, ctx)
    if isinstance(bound, Poison):
        return None
    if bound is not None:
        help = (
            f"call it otherwise: it hides the pattern `{name}`" if ctx.scope.hides(name) else "leave out the brackets"
        )
        ctx.report.error("A023", f"`{name}` is not a pattern", node.name_span, "called here", help)
        return None
    match name:
        case "coarsen":
            return _coarsen(node, ctx)
        case "random":
            return draws.random(node, ctx)
        case "levels":
            ctx.report.error("A023", "`levels` makes a view", span, "a set belongs here", "write `P over levels(...)`")
            return None
        case _ if name in SELECTIONS:
            made = selections.selection(node, ctx)
            return None if made is None else _chosen(made, span, ctx)
        case _ if name in FUNCTIONS:
            ctx.report.error(
                "A023", f"`{name}` gives a value, and a set belongs here", span, "a value", "compare it in braces"
            )
            return None
        case _:
            ctx.unknown(name, node.name_span, SET_FUNCTIONS)
            return None


# ------------------------------------------------------------------------------------------ calls
def _inline(name: str, ref: PatternRef, args: tuple[ast.Argument, ...], span: Span, ctx: Context) -> Set | None:
    decl = ref.decl
    if id(decl) in {key for key, _ in ctx.calls}:
        path = " -> ".join([*(called for _, called in ctx.calls), name])
        ctx.report.error("A014", f"`{name}` calls itself", span, path, "patterns cannot recurse: write it out")
        return None
    matched = match_arguments(name, tuple(p.name for p in decl.params), args, span, ctx)
    if matched is None:
        return None
    scope = Scope(ref.scope)
    with ctx.report.calling(span):
        return _expand(name, ref, matched, span, scope, ctx)


def _expand(
    name: str, ref: PatternRef, matched: dict[str, ast.Argument], span: Span, scope: Scope, ctx: Context
) -> Set | None:
    """The body of a pattern, its parameters bound."""
    decl = ref.decl
    inner = replace(ctx, scope=scope, calls=(*ctx.calls, (id(decl), name)), known=())
    for param in decl.params:
        arg = matched.get(param.name)
        if arg is not None:
            bound = _argument(arg.value, param, ctx)
        elif param.default is not None:
            bound = _argument(param.default, param, inner)
        else:
            ctx.report.error(
                "A013", f"`{name}` needs `{param.name}`", span, "left out here", f"write `{name}({param.name} = ...)`"
            )
            bound = Poison()
        scope.set(param.name, bound)
    return pattern_set(decl.body, inner)


def _argument(node: ast.Expr, param: ast.Param, ctx: Context) -> Value | SetValue | TableRef | InputRef | Poison:
    if isinstance(node, ast.Name):
        bound = ctx.scope.find(node.id)
        if isinstance(bound, InputRef | TableRef) and (bound.decl.dims or isinstance(bound, TableRef)):
            return bound
    if is_set(node, ctx):
        value = pattern_set(node, replace(ctx, among="an argument"))
        return Poison() if value is None else SetValue(value, ctx.places)
    if param.type is not None and param.type.name == "int":
        e = integer(node, ctx)
    elif isinstance(node, ast.Number):
        # A float literal is fine as an argument: what reads it decides.
        e = scalar(node, replace(ctx, use=Use.STATIC))
    else:
        e = scalar(node, ctx)
    return Poison() if e is None else Value(e, ctx.places)


def _coarsen(node: ast.Apply, ctx: Context) -> Set | None:
    matched = match_arguments("coarsen", ("operand", "size", "mode"), node.args, node.span, ctx)
    if matched is None:
        return None
    if len(matched) < 3:
        ctx.report.error(
            "A013",
            "`coarsen` takes a set, a block size and a mode",
            node.span,
            f"{len(matched)} given",
            "add `any` or `all`",
        )
        return None
    if ctx.along:
        not_along("coarsen", node.span, ctx)
        return None
    inside = ctx.inside or "coarsen"
    operand = pattern_set(
        matched["operand"].value, replace(ctx, places=ctx.places + 1, inside=inside, among="`coarsen`")
    )
    size = matched["size"].value
    pair = size.items if isinstance(size, ast.Group) else (size, size)
    if len(pair) != 2:
        ctx.report.error(
            "A013", "block sizes are one number or two", size.span, f"{len(pair)} given", "write `(Bq, Bk)`"
        )
        return None
    block_q, block_k = (static_int(item, ctx, "a block size") for item in pair)
    mode = _mode(matched["mode"].value, ctx)
    if operand is None or block_q is None or block_k is None or mode is None:
        return None
    return Coarsen(operand, block_q, block_k, *mode, span=node.span)


def _mode(node: ast.Expr, ctx: Context) -> tuple[Coarse, float] | None:
    """The mode of `coarsen`, and the share of pairs that it asks for."""
    match node:
        case ast.Name(id="any"):
            return Coarse.ANY, 1.0
        case ast.Name(id="all"):
            return Coarse.ALL, 1.0
        case ast.Apply(function="fraction", args=[ast.Argument(name=None, value=value)]):
            share = static_float(value, ctx, "a fraction")
            if share is not None and not 0 < share <= 1:
                ctx.report.error("A012", "a fraction lies in (0, 1]", value.span, f"this is {share}", "write a share")
                return None
            return None if share is None else (Coarse.FRACTION, float(share))
        case _:
            ctx.report.error(
                "A043",
                "this is not a mode of `coarsen`",
                node.span,
                "unknown word",
                "write `any`, `all` or `fraction(t)`",
            )
            return None
