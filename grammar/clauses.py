"""Lowers an attention: its clauses in order, then its branches with their modifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, assert_never

from attndsl import syntax as ast
from attndsl.branches import Attended, Branch, Factor, Output, Part, Pick
from attndsl.diagnostics import Span
from attndsl.grammar import views
from attndsl.grammar.candidates import planned, settle
from attndsl.grammar.declare import declare_axes, declare_input, declare_params
from attndsl.grammar.observations import check_observed, observation
from attndsl.grammar.outputs import lower_output
from attndsl.grammar.packing import check_packing, clause_input
from attndsl.grammar.scalars import number, static_float
from attndsl.grammar.scope import SELECTIONS, BranchRef, Context, LevelsRef, PatternRef, PlanRef, Poison, Scope, Use
from attndsl.grammar.selections import selection
from attndsl.grammar.sets import pattern_set
from attndsl.grammar.two_levels import check_two_levels
from attndsl.grid import Grid
from attndsl.program import Program, Scalar, reads

M = TypeVar("M", bound=ast.Modifier)


@dataclass(frozen=True, slots=True)
class _Modifiers:
    """What the modifiers of one level say; `softmax` tells a plain `softmax` from none."""

    scale: Scalar | None = None
    score: Scalar | None = None
    sink: Scalar | None = None
    weights: Scalar | None = None
    softmax: bool = False
    skip: float | None = None


def lower_bare(
    name: str,
    body: ast.Expr,
    params: tuple[ast.Param, ...],
    values: Mapping[str, object],
    ctx: Context,
    at: Span,
    *,
    assume: bool = False,
) -> Program | None:
    """A pattern as a whole program: one branch, scale 1/sqrt(D), softmax."""
    scope = Scope(ctx.scope)
    # The pattern itself is being expanded, so a call of its own name is recursion.
    bound = ctx.scope.find(name)
    calls = ((id(bound.decl), name),) if isinstance(bound, PatternRef) and bound.decl.body is body else ()
    inner = replace(ctx, scope=scope, calls=calls)
    args, tables = declare_params(params, values, inner, at, assume=assume)
    pattern = pattern_set(body, inner)
    pattern = None if pattern is None else settle(pattern, inner)
    if pattern is None:
        return None
    branch = Branch((Part(pattern, span=body.span),), span=body.span)
    chosen = tuple(ctx.maker.selections.values())
    inputs = planned(ctx.maker.inputs.values(), chosen, (pattern,))
    return Program(name, (branch,), inputs, args, tables, selections=chosen)


def lower_attention(
    node: ast.Attention, values: Mapping[str, object], ctx: Context, *, broken: bool, assume: bool = False
) -> Program | None:
    """The program of an attention; None if a mistake in it was reported."""
    scope = Scope(ctx.scope)
    ctx = ctx.under(scope)
    args, tables = declare_params(node.params, values, ctx, node.name_span, assume=assume)
    _once(node.clauses, (ast.Axes, ast.Align, ast.Packed, ast.Lengths, ast.Output), ctx)
    aligned = _align(node, ctx)
    ctx = replace(ctx, align_start=aligned, packed=any(isinstance(clause, ast.Packed) for clause in node.clauses))
    # Inputs, patterns and axes may be used before they are written.
    grid: Grid | None = None
    for clause in node.clauses:
        match clause:
            case ast.Pattern():
                scope.declare(clause.name, PatternRef(clause, scope), clause.name_span, ctx.report)
            case ast.Axes():
                grid = declare_axes(clause, ctx)
            case ast.Input():
                declare_input(clause, ctx)
            case _:
                pass
    shared = [c for c in node.clauses if isinstance(c, ast.Scale | ast.Score | ast.Softmax | ast.Weights | ast.Skip)]
    outer = _modifiers(tuple(shared), ctx)
    branches: list[Branch | None] = []
    for clause in node.clauses:
        branch = _clause(clause, outer, ctx)
        if isinstance(clause, ast.Branch):
            branches.append(branch)
    if not branches and not broken:
        ctx.report.error(
            "A041", f"`{node.name}` attends to nothing", node.name_span, "no `attend`", "add `attend causal`"
        )
    check_observed(ctx.maker.observations, branches, ctx)
    check_two_levels(branches, ctx)
    output = _combination(node, branches, ctx)
    packing = [
        next((clause_input(clause, ctx) for clause in node.clauses if isinstance(clause, kind)), None)
        for kind in (ast.Packed, ast.Lengths)
    ]
    found = tuple(branch for branch in branches if branch is not None)
    if not found or len(found) < len(branches) or outer is None or output is None:
        return None
    # The output of the only branch is that of a program that does not name it.
    only = len(found) == 1 and isinstance(output, Attended)
    chosen = tuple(replace(selection, scale=outer.scale) for selection in ctx.maker.selections.values())
    patterns = (part.pattern for branch in found for part in branch.parts)
    inputs = planned(ctx.maker.inputs.values(), chosen, patterns)
    inputs = tuple(decl.of_documents(ctx.packed) for decl in inputs)
    combined = None if only else output
    packed, lengths = packing
    observed = tuple(ctx.maker.observations)
    program = Program(
        node.name, found, inputs, args, tables, aligned, chosen, grid, combined, packed, lengths, observed
    )  # fmt: skip
    return program if check_packing(program, node, ctx) else None


def _once(clauses: tuple[ast.Clause, ...], kinds: tuple[type[ast.Clause], ...], ctx: Context) -> None:
    for kind in kinds:
        for again in [clause for clause in clauses if isinstance(clause, kind)][1:]:
            word = kind.__name__.lower()
            ctx.report.error("A040", f"`{word}` is given twice", again.span, "again here", "keep one of them")


def _align(node: ast.Attention, ctx: Context) -> bool:
    for clause in node.clauses:
        if isinstance(clause, ast.Align):
            if clause.word == "start":
                return True
            ctx.report.error(
                "A043",
                f"there is no alignment `{clause.word}`",
                clause.span,
                "unknown word",
                "write `align start`, or leave it out",
            )
    return False


def _clause(clause: ast.Clause, outer: _Modifiers | None, ctx: Context) -> Branch | None:
    match clause:
        case ast.Branch():
            return _branch(clause, outer, ctx)
        case ast.Plan(name=name, value=value):
            at = _name_span(clause.span, name)
            if not isinstance(value, ast.Apply) or value.function not in SELECTIONS:
                what = f"`{name}` is not a selection"
                ctx.report.error("A023", what, value.span, "a set", "write `pattern` where nothing is selected")
                ctx.scope.declare(name, Poison(), at, ctx.report)
                return None
            selection(value, replace(ctx, among="a plan"), name)
            ctx.scope.declare(name, LevelsRef() if value.function == "levels" else PlanRef(), at, ctx.report)
        case ast.Observe():
            if (found := observation(clause, _name_span(clause.span, clause.name), ctx)) is not None:
                ctx.maker.observations.append(found)
        case ast.Input() | ast.Pattern() | ast.Axes() | ast.Align() | ast.Output() | ast.Packed() | ast.Lengths():
            pass
        case ast.Scale() | ast.Score() | ast.Softmax() | ast.Weights() | ast.Skip():
            pass
        case _:
            assert_never(clause)
    return None


def _name_span(span: Span, name: str) -> Span:
    start = span.source.text.index(name, span.start + 4)
    return Span(span.source, start, start + len(name))


def _branch(node: ast.Branch, outer: _Modifiers | None, ctx: Context) -> Branch | None:
    raw = [part for part in node.parts if part.over is None and part.queries is None and part.within is None]
    for extra in raw[1:]:
        ctx.report.error(
            "A042", "two parts attend to the raw tokens", extra.span, "a second one", "write `|` between them: `a | b`"
        )
    parts = [views.lower_part(part, ctx) for part in node.parts]
    queries = views.pooled_queries(node.parts, ctx)
    own = _modifiers(node.modifiers, ctx)
    if node.name is not None:
        at = Span(node.span.source, node.span.start, node.span.start + len(node.name))
        ctx.scope.declare(node.name, BranchRef(), at, ctx.report)
    if own is None or outer is None or None in parts:
        return None
    lowered = tuple(x for part in parts if part is not None for x in part)
    if queries is not None:
        # Which rows of a class see a token is asked as of an entry, and a token is the mean of one.
        lowered = tuple(replace(x, view=views.TOKENS) if x.view is None else x for x in lowered)
    branch = Branch(lowered, *_effective(own, outer), node.name, node.span, queries=queries)
    if branch.weights is None:
        branch = replace(branch, skip=outer.skip if own.skip is None else own.skip)
    return branch if _one_raw(branch, len(raw), ctx) and _fits_views(branch, ctx) else None


def _one_raw(branch: Branch, written: int, ctx: Context) -> bool:
    """Refuses a `levels` whose factor 1 attends to raw tokens beside a part that does."""
    raw = [part.span for part in branch.parts if part.view is None]
    if len(raw) > max(1, written) and raw[-1] is not None:
        ctx.report.error(
            "A042", "two parts attend to the raw tokens", raw[-1], "a second one, where the factor is 1",
            "force what the other attends to: `always = ...`",
        )  # fmt: skip
        return False
    return True


def _fits_views(branch: Branch, ctx: Context) -> bool:
    """Reports what a branch says of scores that has no meaning for the entries of a view."""
    views = [(part.view, part.span) for part in branch.parts if part.view is not None]
    if not views:
        return True
    first = views[0][1]
    for word, e in (("scale", branch.scale), ("score", branch.score), ("weights", branch.weights)):
        if e is not None and reads(e, "q", "k"):
            ctx.report.error(
                "A047", f"`{word}` reads a position, and a view has none", first, "over a view",
                "attend to the view in a branch of its own, with its own `score s`",
            )  # fmt: skip
            return False
    for view, span in views:
        if isinstance(view, Pick) and view.weight is not None and branch.weights is not None:
            ctx.report.error(
                "A047", "the weight of a listed token adds to a score, and `weights` takes its place", span,
                "weighed here", "leave out the weight",
            )  # fmt: skip
            return False
        if view.counted and branch.weights is not None:
            ctx.report.error(
                "A047", "`counted` adds to a score, and `weights` takes its place", span, "counted here",
                "leave out `counted`",
            )  # fmt: skip
            return False
    return True


def _effective(own: _Modifiers, outer: _Modifiers) -> tuple[Scalar | None, Scalar | None, Scalar | None, Scalar | None]:
    """Scale, score, sink and weights of a branch: the attention's, where the branch has none of its own."""
    scale = own.scale if own.scale is not None else outer.scale
    if own.weights is not None:
        return scale, None, None, own.weights
    if own.score is not None or own.softmax:
        score = own.score if own.score is not None else outer.score
        return scale, score, own.sink if own.softmax else outer.sink, None
    return scale, outer.score, outer.sink, outer.weights


def _modifiers(clauses: tuple[ast.Modifier, ...], ctx: Context) -> _Modifiers | None:
    """The modifiers of one level; None if a mistake in them was reported."""
    before = len(ctx.report.errors)
    _once(clauses, (ast.Scale, ast.Score, ast.Softmax, ast.Weights, ast.Skip), ctx)
    weights = _first(clauses, ast.Weights)
    for other in clauses:
        if weights is not None and isinstance(other, ast.Score | ast.Softmax | ast.Skip):
            word = type(other).__name__.lower()
            ctx.report.error(
                "A040", f"`weights` replaces `{word}`", other.span, "both are given", f"leave out `{word}`"
            )
    found = _Modifiers(softmax=any(isinstance(c, ast.Softmax) for c in clauses))
    for clause in clauses:
        match clause:
            case ast.Scale(value=value):
                found = replace(found, scale=number(value, ctx.of(Use.SCALE)))
            case ast.Score(value=value):
                found = replace(found, score=number(value, ctx.of(Use.SCORE)))
            case ast.Weights(value=value):
                found = replace(found, weights=number(value, ctx.of(Use.WEIGHTS)))
            case ast.Softmax():
                found = replace(found, sink=_sink(clause, ctx))
            case ast.Skip(word=word, value=value):
                found = replace(found, skip=_skip(clause, word, value, ctx))
            case _:
                assert_never(clause)
    return found if len(ctx.report.errors) == before else None


def _first(clauses: tuple[ast.Modifier, ...], kind: type[M]) -> M | None:
    return next((clause for clause in clauses if isinstance(clause, kind)), None)


def _sink(clause: ast.Softmax, ctx: Context) -> Scalar | None:
    word, value = clause.word, clause.value
    if word is None or value is None:
        return None
    if word != "sink":
        ctx.report.error(
            "A043", f"`softmax` has no option `{word}`", clause.span, "unknown word", "write `softmax with sink x`"
        )
        return None
    return number(value, ctx.of(Use.SINK))


def _skip(clause: ast.Skip, word: str, value: ast.Expr, ctx: Context) -> float | None:
    if word != "below":
        ctx.report.error(
            "A043", f"`skip` has no option `{word}`", clause.span, "unknown word", "write `skip below 0.0001`"
        )
        return None
    bound = static_float(value, ctx, "the bound of `skip`")
    if bound is None:
        return None
    if not 0 < bound < 1:
        ctx.report.error("A012", "the bound of `skip` lies in (0, 1)", value.span, f"this is {bound}", "write `0.0001`")
        return None
    return float(bound)


def _combination(node: ast.Attention, branches: list[Branch | None], ctx: Context) -> Output | None:
    """What `output` says, or the only branch; None if a mistake in it was reported."""
    written = [clause for clause in node.clauses if isinstance(clause, ast.Branch)]
    output = next((clause for clause in node.clauses if isinstance(clause, ast.Output)), None)
    if output is None:
        if len(written) > 1:
            ctx.report.error(
                "A046", "several branches need an `output`", written[1].span, "a second branch", "add `output a + b`"
            )
            return None
        return Attended(written[0].name or "") if written else None
    named = {clause.name: branch for clause, branch in zip(written, branches, strict=True) if clause.name is not None}
    found = lower_output(output.value, named, ctx.of(Use.OUTPUT))
    if isinstance(found, Factor):
        if not ctx.report.errors:
            ctx.report.error(
                "A046", "`output` names no branch", output.span, "no branch here", "name a branch: `near = attend ...`"
            )
        return None
    return found
