"""Types and lowers scalar expressions: numbers and booleans, in sets, scores and options."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from attndsl import syntax as ast
from attndsl.coordinates import coordinate
from attndsl.diagnostics import Span
from attndsl.grammar.guards import divisor_may_stand, negated
from attndsl.grammar.indexing import read_input, read_table
from attndsl.grammar.report import nearest
from attndsl.grammar.scope import (
    RESERVED,
    AxisRef,
    BranchRef,
    Context,
    InputRef,
    LevelsRef,
    ObservedRef,
    PatternRef,
    PlanRef,
    Poison,
    Scope,
    SetValue,
    TableRef,
    Use,
    Value,
)
from attndsl.program import (
    BOOL_CALLS,
    BUILTINS,
    FLOAT_CALLS,
    INT_CALLS,
    Binary,
    Call,
    Compare,
    Const,
    Scalar,
    Type,
    Unary,
    Var,
    reads,
)

FUNCTIONS = {**INT_CALLS, **BOOL_CALLS, **FLOAT_CALLS}

_POSITIONS = {"q", "k", "Nq", "Nk"}
_READABLE = {
    Use.SET: BUILTINS - {"s"},
    Use.SCORE: BUILTINS,
    Use.WEIGHTS: BUILTINS,
    Use.SINK: BUILTINS - {"s", "k", "Nq", "Nk"},
    Use.SCALE: BUILTINS - {"s"} - _POSITIONS,
    Use.PICKED: BUILTINS - {"s", "q", "k"},
    Use.SEED: BUILTINS - {"s"} - _POSITIONS,
    Use.STATIC: frozenset[str](),
    Use.BY: BUILTINS - {"s"},
    Use.OUTPUT: BUILTINS - {"s", "k"},
}
_SET_HELP = {"&": "and", "|": "or", "~": "not"}


def scalar(node: ast.Expr, ctx: Context) -> Scalar | None:
    """The typed scalar of an expression; None if a mistake in it was reported."""
    ctx.maker.step(node.span)
    span = node.span
    match node:
        case ast.Number(value=value):
            if isinstance(value, float) and ctx.use is Use.SET:
                _no_floats(span, ctx)
                return None
            return ctx.maker.const(value, span)
        case ast.Truth(value=value):
            return ctx.maker.const(value, span)
        case ast.Name():
            return _name(node, ctx)
        case ast.Prefix():
            return _prefix(node, ctx)
        case ast.Arithmetic():
            return _arithmetic(node, ctx)
        case ast.Comparison():
            return _comparison(node, ctx)
        case ast.Logic():
            return _logic(node, ctx)
        case ast.Conditional():
            return _conditional(node, ctx)
        case ast.Apply():
            return _apply(node, ctx)
        case ast.Subscript():
            return _subscript(node, ctx)
        case ast.Coordinate():
            return _coordinate(node, ctx)
        case ast.Algebra(op=op):
            word = _SET_HELP[op]
            ctx.report.error(
                "A021",
                f"`{op}` combines sets, and these are not sets",
                span,
                "here",
                f"write `{word}` between booleans",
            )
            return None
        case ast.Comprehension():
            ctx.report.error("A023", "a set stands where a value belongs", span, "a set", "leave out the braces")
            return None
        case ast.Place():
            ctx.report.error("A023", "`on` places sets, not values", span, "a set", "move `on` outside the braces")
            return None
        case ast.Group():
            ctx.report.error("A023", "a tuple stands where a value belongs", span, "a tuple", "write one value")
            return None
        case _:
            assert_never(node)


def number(node: ast.Expr, ctx: Context) -> Scalar | None:
    """An int or float."""
    e = scalar(node, ctx)
    if e is not None and e.type is Type.BOOL:
        _mismatch(node.span, "a number", e.type, ctx, "write `if c then 1 else 0` to count a condition")
        return None
    return e


def integer(node: ast.Expr, ctx: Context) -> Scalar | None:
    """An int: floats do not convert."""
    e = scalar(node, ctx)
    if e is not None and e.type is not Type.INT:
        _mismatch(node.span, "an int", e.type, ctx, "use `//` for whole quotients")
        return None
    return e


def boolean(node: ast.Expr, ctx: Context) -> Scalar | None:
    e = scalar(node, ctx)
    if e is not None and e.type is not Type.BOOL:
        _mismatch(node.span, "a boolean", e.type, ctx, "compare it, as in `x > 0`")
        return None
    return e


def static(node: ast.Expr, ctx: Context, what: str) -> int | float | bool | None:
    """A value known at compile time."""
    e = scalar(node, replace(ctx, use=Use.STATIC))
    if e is None:
        return None
    if not isinstance(e, Const):
        ctx.report.error(
            "A024", f"{what} must be known at compile time", node.span, "not a constant", "use a literal or a parameter"
        )
        return None
    return e.value


def static_int(node: ast.Expr, ctx: Context, what: str, least: int = 1) -> int | None:
    """A compile-time int of at least `least`."""
    value = static(node, ctx, what)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        ctx.report.error("A020", f"{what} must be an int", node.span, f"{value} is not an int", "write a whole number")
        return None
    if value < least and not ctx.maker.dead:
        kind = "a positive integer" if least == 1 else f"at least {least}"
        ctx.report.error(
            "A012", f"{what} must be at least {least}", node.span, f"{value} is not {kind}", f"write {least} or more"
        )
        return None
    return value


def static_float(node: ast.Expr, ctx: Context, what: str) -> float | None:
    value = static(node, ctx, what)
    if isinstance(value, bool):
        _mismatch(node.span, "a number", Type.BOOL, ctx, "write a number")
        return None
    return value


# --------------------------------------------------------------------------------------- mistakes
def _mismatch(span: Span, wanted: str, found: Type, ctx: Context, help: str) -> None:
    article = "an" if found is Type.INT else "a"
    label = f"this is {article} {'boolean' if found is Type.BOOL else found.value}"
    ctx.report.error("A020", f"{wanted} belongs here", span, label, help)


def _no_floats(span: Span, ctx: Context) -> None:
    ctx.report.error("A022", "sets know no floats", span, "a float", "use integers: `//` divides them")


# ------------------------------------------------------------------------------------------ names
def _name(node: ast.Name, ctx: Context) -> Scalar | None:
    name, span = node.id, node.span
    if name in RESERVED:
        return _builtin(name, span, ctx)
    bound = ctx.scope.find(name)
    match bound:
        case None:
            if name == "off_grid":
                ctx.report.error("A023", "`off_grid` is a set", span, "a set", "combine it with `&`, `|`, `~`")
            else:
                ctx.unknown(name, span)
            return None
        case Poison():
            return None
        case Value(scalar=e, places=places):
            if places != ctx.places and reads(e, *_POSITIONS):
                ctx.report.error(
                    "A032",
                    f"`{name}` reads positions outside `{ctx.inside}` and is used inside it",
                    span,
                    "positions mean something else here",
                    "pass values that do not read q, k, Nq or Nk",
                )
                return None
            if ctx.use is Use.SET and e.type is Type.FLOAT:
                _no_floats(span, ctx)
                return None
            if ctx.use is Use.STATIC and not isinstance(e, Const):
                ctx.report.error(
                    "A024",
                    f"`{name}` is not known at compile time",
                    span,
                    "here it must be",
                    "use a literal or a parameter",
                )
                return None
            return _check_readable(e, span, ctx)
        case TableRef(decl=decl):
            return _typed(read_table(decl, (), span, ctx, []), span, ctx)
        case InputRef(decl=decl):
            return _typed(read_input(decl, (), span, ctx, []), span, ctx)
        case SetValue() | PatternRef() | PlanRef() | AxisRef() | BranchRef() | LevelsRef() | ObservedRef():
            kind = {SetValue: "a set", PatternRef: "a pattern", AxisRef: "an axis", BranchRef: "a branch"}
            kind |= {ObservedRef: "what is observed"}
            what = kind.get(type(bound), "a selection")
            help = (
                f"write `q.{name}` or `k.{name}`" if isinstance(bound, AxisRef) else "combine sets with `&`, `|`, `~`"
            )
            ctx.report.error("A023", f"`{name}` is {what}, not a value", span, what, help)
            return None
        case _:
            assert_never(bound)


def _check_readable(e: Scalar, span: Span, ctx: Context) -> Scalar | None:
    """A bound value may read what its place may read."""
    hidden = sorted(name for name in BUILTINS - _READABLE[ctx.use] if reads(e, name))
    if hidden:
        _builtin(hidden[0], span, ctx)
        return None
    return e


def _typed(e: Scalar | None, span: Span, ctx: Context) -> Scalar | None:
    if e is not None and e.type is Type.FLOAT and ctx.use is Use.SET:
        _no_floats(span, ctx)
        return None
    return e


def _builtin(name: str, span: Span, ctx: Context) -> Scalar | None:
    if name in _READABLE[ctx.use]:
        return ctx.maker.keep(Var(name), span)
    if name in ("Q", "K", "V"):
        ctx.report.error(
            "A035", f"`{name}` stands for vectors", span, "only in `by`", "in a score, `s` is the scaled Q . K"
        )
    elif ctx.use is Use.STATIC:
        ctx.report.error(
            "A024", f"`{name}` is not known at compile time", span, "here it must be", "use a literal or a parameter"
        )
    else:
        allowed = ", ".join(sorted(_READABLE[ctx.use]))
        ctx.report.error(
            "A035", f"{ctx.use.value} may not read `{name}`", span, "not known here", f"it may read {allowed}"
        )
    return None


def _coordinate(node: ast.Coordinate, ctx: Context) -> Scalar | None:
    if node.name not in ("q", "k"):
        ctx.report.error(
            "A045", f"`{node.name}` has no coordinates", node.span, "only q and k have", "write `q.` or `k.`"
        )
        return None
    if not isinstance(ctx.scope.find(node.axis), AxisRef | Poison):
        if node.axis not in ctx.lost:
            known = [n for n in ctx.scope.names() if isinstance(ctx.scope.find(n), AxisRef)]
            help = nearest(node.axis, known) or "declare it: `axes y, x[64]`"
            ctx.report.error("A045", f"there is no axis `{node.axis}`", node.span, "not an axis", help)
        return None
    if node.name not in _READABLE[ctx.use]:
        return _builtin(node.name, node.span, ctx)
    if ctx.inside == "on":
        ctx.report.error(
            "A031",
            f"`{node.name}.{node.axis}` belongs to a token and may not be read under `on`",
            node.span,
            "coordinates of something else here",
            "intersect it outside: `(P on ...) & { ... }`",
        )
        return None
    axis = ctx.scope.find(node.axis)
    if not isinstance(axis, AxisRef) or axis.grid is None:
        return None
    return ctx.maker.coordinate(coordinate(axis.grid, axis.axis, Var(node.name)), node.span)


# -------------------------------------------------------------------------------------- operators
def _prefix(node: ast.Prefix, ctx: Context) -> Scalar | None:
    match node.op:
        case "~":
            ctx.report.error(
                "A021", "`~` complements sets, and this is not a set", node.span, "here", "write `not` before a boolean"
            )
            return None
        case "not":
            e = boolean(node.operand, ctx)
        case _:
            e = number(node.operand, ctx)
    return None if e is None else ctx.maker.make(Unary(node.op, e), node.span)


def _arithmetic(node: ast.Arithmetic, ctx: Context) -> Scalar | None:
    left = number(node.first, ctx)
    for op, operand in node.rest:
        right = number(operand, ctx)
        if left is None or right is None:
            left = None
            continue
        span = node.first.span.to(operand.span)
        if op == "/" and ctx.use is Use.SET:
            ctx.report.error("A022", "`/` gives a float, and sets know no floats", span, "a float", "write `//`")
            left = None
            continue
        if op in ("//", "%") and Type.FLOAT in (left.type, right.type):
            _mismatch(
                operand.span if right.type is Type.FLOAT else span, "an int", Type.FLOAT, ctx, "write `/` for floats"
            )
            left = None
            continue
        if op in ("//", "%", "/") and not divisor_may_stand(op, right, operand.span, ctx):
            left = None
            continue
        left = ctx.maker.make(Binary(op, left, right), span)
    return left


def _comparison(node: ast.Comparison, ctx: Context) -> Scalar | None:
    links: list[Scalar] = []
    good = True
    previous, left = node.first, scalar(node.first, ctx)
    for op, operand in node.rest:
        right = scalar(operand, ctx)
        if left is None or right is None:
            good = False
        elif (left.type is Type.BOOL) != (right.type is Type.BOOL):
            wrong, at = (left, previous) if left.type is Type.BOOL else (right, operand)
            _mismatch(at.span, "a number", wrong.type, ctx, "compare numbers with numbers and booleans with booleans")
            good = False
        elif left.type is Type.BOOL and op not in ("==", "!="):
            _mismatch(previous.span, "a number", Type.BOOL, ctx, "booleans compare with `==` and `!=` only")
            good = False
        else:
            links.append(ctx.maker.make(Compare(op, left, right), previous.span.to(operand.span)))
        previous, left = operand, right
    return ctx.maker.logic("and", links, node.span) if good else None


def _logic(node: ast.Logic, ctx: Context) -> Scalar | None:
    operands: list[Scalar] = []
    good, dead, inner = True, False, ctx
    for operand in node.operands:
        ctx.maker.dead += dead
        e = boolean(operand, inner)
        ctx.maker.dead -= dead
        if e is None:
            good = False
            continue
        operands.append(e)
        facts = (e,) if node.op == "and" else negated(e)
        inner = replace(inner, known=(*inner.known, *facts)) if len(inner.known) < 16 else inner
        dead = dead or (isinstance(e, Const) and e.value is (node.op == "or"))
    return ctx.maker.logic(node.op, operands, node.span) if good else None


def _conditional(node: ast.Conditional, ctx: Context) -> Scalar | None:
    cond = boolean(node.cond, ctx)
    decided = cond.value if isinstance(cond, Const) else None
    facts = () if cond is None else (cond,)
    refuted = () if cond is None else negated(cond)
    ctx.maker.dead += decided is False
    then = scalar(node.then, replace(ctx, known=(*ctx.known, *facts)))
    ctx.maker.dead += (decided is True) - (decided is False)
    other = scalar(node.other, replace(ctx, known=(*ctx.known, *refuted)))
    ctx.maker.dead -= decided is True
    if cond is None or then is None or other is None:
        return None
    if (then.type is Type.BOOL) != (other.type is Type.BOOL):
        _mismatch(
            node.other.span, f"{_article(then.type)}, as after `then`,", other.type, ctx, "give both sides one type"
        )
        return None
    return ctx.maker.if_(cond, then, other, node.span)


def _article(type: Type) -> str:
    return "a boolean" if type is Type.BOOL else "a number"


# ------------------------------------------------------------------------------------------ calls
def _apply(node: ast.Apply, ctx: Context) -> Scalar | None:
    name, span = node.function, node.span
    bound = ctx.scope.find(name)
    if isinstance(bound, PatternRef):
        ctx.report.error("A023", f"`{name}` is a pattern, not a function", span, "a set", "move it outside the braces")
        return None
    if name not in FUNCTIONS:
        if isinstance(bound, InputRef | TableRef):
            ctx.report.error("A023", f"`{name}` is not a function", span, "a tensor", f"index it: `{name}[...]`")
        elif bound is None:
            ctx.unknown(name, node.name_span, frozenset(FUNCTIONS))
        elif not isinstance(bound, Poison):
            ctx.report.error("A023", f"`{name}` is not a function", span, "called here", "leave out the brackets")
        return None
    if name in FLOAT_CALLS and ctx.use is Use.SET:
        ctx.report.error("A022", f"`{name}` gives a float, and sets know no floats", span, "a float", "use integers")
        return None
    wanted = FUNCTIONS[name]
    named = [arg for arg in node.args if arg.name is not None]
    if named or (len(node.args) != wanted if wanted is not None else not node.args):
        count = "at least one argument" if wanted is None else f"{wanted} argument{'s' * (wanted != 1)}"
        ctx.report.error(
            "A013", f"`{name}` takes {count}", span, f"{len(node.args)} given", "arguments have no names here"
        )
        return None
    whole = name in ("bit_length", "is_power_of_two")
    args = [integer(arg.value, ctx) if whole else number(arg.value, ctx) for arg in node.args]
    good = [arg for arg in args if arg is not None]
    return ctx.maker.make(Call(name, tuple(good)), span) if len(good) == len(args) else None


def _subscript(node: ast.Subscript, ctx: Context) -> Scalar | None:
    bound = ctx.scope.find(node.name)
    # An index is an int wherever it stands; a sink's index may read what a sink may.
    index = [integer(item, ctx) for item in node.index]
    match bound:
        case TableRef(decl=decl):
            return _typed(read_table(decl, node.index, node.span, ctx, index), node.span, ctx)
        case InputRef(decl=decl):
            return _typed(read_input(decl, node.index, node.span, ctx, index), node.span, ctx)
        case Poison():
            return None
        case None:
            if node.name in RESERVED:
                ctx.report.error(
                    "A023", f"`{node.name}` cannot be indexed", node.span, "not a tensor", "leave out the index"
                )
            else:
                ctx.unknown(node.name, node.name_span)
            return None
        case _:
            ctx.report.error(
                "A023", f"`{node.name}` cannot be indexed", node.span, "not a tensor", "leave out the index"
            )
            return None


def bind_locals(bindings: tuple[ast.Binding, ...], ctx: Context) -> Context:
    """The context inside a comprehension: each `where` binding sees the earlier ones."""
    scope = Scope(ctx.scope)
    inner = ctx.under(scope)
    for binding in bindings:
        e = scalar(binding.value, inner)
        # A name is bound only now: its own value does not see it.
        name_span = Span(binding.span.source, binding.span.start, binding.span.start + len(binding.name))
        scope.declare(binding.name, Poison() if e is None else Value(e, ctx.places), name_span, ctx.report)
    return inner
