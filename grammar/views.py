"""Lowers the parts of a branch, their views and their queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attndsl import syntax as ast
from attndsl.branches import Given, Part, Pick, Pool, PoolFunction, Queries, View, Visible
from attndsl.diagnostics import Span
from attndsl.grammar.candidates import settle
from attndsl.grammar.report import nearest
from attndsl.grammar.routing import members_of, partition
from attndsl.grammar.scalars import number, static_int
from attndsl.grammar.scope import Context, InputRef, LevelsRef, Poison, Use
from attndsl.grammar.selections import selection
from attndsl.grammar.sets import pattern_set, within
from attndsl.grammar.two_levels import two_levels
from attndsl.members import Runs
from attndsl.program import Axis, Dim, InputDecl, Inter, Read, Selected, Set, Type, Var
from attndsl.selection import Levels, Selection

_POOLS = tuple(function.value for function in PoolFunction)
_OWN = {Axis.B: Var("b"), Axis.G: Var("g")}
# The raw tokens as a view.
TOKENS = Pool(PoolFunction.MEAN, 1, 1)
_VISIBLE = tuple(visible.value for visible in Visible)


def lower_part(part: ast.Part, ctx: Context) -> tuple[Part, ...] | None:
    """A part over its view, over that of a `levels` one for each factor; None if a mistake in it was reported."""
    pattern = pattern_set(part.pattern, ctx)
    levels = None if part.over is None else _levels(part.over, ctx)
    if levels is not None:
        over: View | None = None
        pattern = None if pattern is None else within(pattern, levels, ctx)
    else:
        over = None if part.over is None else view(part.over, ctx)
    pattern = None if pattern is None else settle(pattern, ctx)
    before = len(ctx.report.errors)
    within_members = two_levels(part, ctx)
    if (
        pattern is None
        or len(ctx.report.errors) > before
        or (part.over is not None and over is None and levels is None)
    ):
        return None
    if levels is None:
        return (Part(pattern, over, part.span, within=within_members),)
    assert isinstance(levels.rule, Levels)
    factors = dict.fromkeys(levels.rule.factors)
    return tuple(Part(_of_level(pattern, x), _level_view(x), part.span) for x in factors)


def pooled_queries(parts: Sequence[ast.Part], ctx: Context) -> Queries | None:
    """What the parts of a branch say after `from`; None where they say nothing, or a mistake was reported."""
    said = [part for part in parts if part.queries is not None]
    if not said:
        return None
    found = [None if part.queries is None else view(part.queries, ctx) for part in said]
    for part, pool in zip(said, found, strict=True):
        assert part.queries is not None
        if pool is not None and (
            not isinstance(pool, Pool) or pool != Pool(pool.function, pool.size, pool.size) or pool != found[0]
        ):
            ctx.report.error(
                "A078", "queries are pooled in one way, each in one class", part.queries.span, "not classes of queries",
                "write `from pool(mean, 64)`, the same in every part",
            )  # fmt: skip
            return None
    if (other := next((part for part in parts if part.queries is None), None)) is not None:
        ctx.report.error(
            "A078", "queries are pooled in every part or in none", other.pattern.span, "not said here",
            "write the same `from` in every part, or branches of their own and `merge(a, b)`",
        )  # fmt: skip
        return None
    first = found[0]
    return Queries(first.function, first.size) if isinstance(first, Pool) else None


def _levels(node: ast.Expr, ctx: Context) -> Selection | None:
    """The selection of a `levels`, or of the name of one; None where the view is another, or wrong."""
    match node:
        case ast.Apply(function="levels"):
            return selection(node, ctx)
        case ast.Name(id=name) if isinstance(ctx.scope.find(name), LevelsRef):
            return ctx.maker.selections.get(name)
        case _:
            return None


def _of_level(pattern: Set, factor: int) -> Set:
    """A pattern within a `levels` as it is of one factor."""
    assert isinstance(pattern, Inter)
    assert isinstance(pattern.parts[-1], Selected)
    return replace(pattern, parts=(*pattern.parts[:-1], replace(pattern.parts[-1], level=factor)))


def _level_view(factor: int) -> Pool | None:
    return None if factor == 1 else Pool(PoolFunction.MEAN, factor, factor, counted=True)


def view(node: ast.Expr, ctx: Context) -> View | None:
    """Lowers `pool`, `pick` and `given`; what `lower_part` has found wrong already is."""
    match node:
        case ast.Apply(function="pool"):
            return _pool(node, ctx)
        case ast.Apply(function="given"):
            return _given(node, ctx)
        case ast.Apply(function="pick"):
            return _pick(node, ctx)
        case ast.Apply(function="levels"):
            pass
        case ast.Name(id=name) if isinstance(ctx.scope.find(name), LevelsRef | Poison):
            pass
        case ast.Name(id=name) if ctx.scope.find(name) is None:
            ctx.unknown(name, node.span)
        case _:
            help = "write `pool(mean, 64)`, `given(kc, vc, 64)` or a `levels` plan"
            ctx.report.error("A023", "this is not a view", node.span, "a view belongs here", help)
    return None


def _pool(node: ast.Apply, ctx: Context) -> Pool | None:
    positional: list[ast.Expr] = []
    named: dict[str, ast.Expr] = {}
    counted = False
    for arg in node.args:
        if arg.name is not None:
            named[arg.name] = arg.value
        elif isinstance(arg.value, ast.Name) and arg.value.id == "counted":
            counted = True
        else:
            positional.append(arg.value)
    if not 2 <= len(positional) <= 3:
        help = "write `pool(mean, 64)`"
        ctx.report.error(
            "A013", "`pool` takes a function, a size and a stride", node.span, f"{len(positional)} given", help
        )
        return None
    good = True
    function = positional[0]
    if not (isinstance(function, ast.Name) and function.id in _POOLS):
        near = nearest(function.id, _POOLS) if isinstance(function, ast.Name) else ""
        ctx.report.error(
            "A043", "this does not pool", function.span, "unknown word", near or "write mean, max, min or sum"
        )
        good = False
    for key, value in named.items():
        if key == "visible":
            if not (isinstance(value, ast.Name) and value.id in _VISIBLE):
                ctx.report.error(
                    "A043", "this is not a word of `visible`", value.span, "unknown word", "write `every` or `any`"
                )
                good = False
        elif key != "stride":
            ctx.report.error("A013", f"`pool` has no argument `{key}`", value.span, "unknown argument", "leave it out")
            good = False
    if isinstance(positional[1], ast.Apply) and positional[1].function == "segments":
        runs = _segments(positional[1], node, len(positional) > 2 or bool(named), ctx)
        if runs is None or not good or not isinstance(function, ast.Name):
            return None
        return Pool(PoolFunction(function.id), 1, 1, counted=counted, runs=runs)
    size = static_int(positional[1], ctx, "a pool's size")
    step = positional[2] if len(positional) == 3 else named.get("stride")
    stride = static_int(step, ctx, "a stride") if step is not None else size
    if counted and size is not None and stride is not None and stride != size:
        ctx.report.error(
            "A012", "`counted` needs stride = size", node.span, "entries overlap or leave gaps", "leave out `counted`"
        )
        good = False
    if not good or size is None or stride is None or not isinstance(function, ast.Name):
        return None
    word = named.get("visible")
    visible = Visible(word.id) if isinstance(word, ast.Name) else Visible.EVERY
    return Pool(PoolFunction(function.id), size, stride, visible, counted)


def _segments(node: ast.Apply, pool: ast.Apply, more: bool, ctx: Context) -> Runs | None:
    """The runs whose tokens are pooled; None if a mistake was reported. more: the pool says more than that."""
    if not partition(node, ctx):
        return None
    if more:
        ctx.report.error(
            "A013", "segments are pooled as they are, each whole", pool.span, "a stride or `visible` beside them",
            "leave it out",
        )  # fmt: skip
        return None
    found = members_of(node, ctx)
    assert found is not None
    runs = found[1]
    assert isinstance(runs, Runs)
    ids = _input(node.args[0].value, ctx)
    own = () if ids is None else tuple(_OWN.get(dim.axis) for dim in ids.dims[:-1])
    if own != runs.lead:
        ctx.report.error(
            "A048", f"`{runs.input}` does not say what the entries of a key head are of", node.span,
            "other dimensions than batch entries and key heads", f"declare it `int[b, g, k]` and write `{runs.input}`",
        )  # fmt: skip
        return None
    return runs


def _pick(node: ast.Apply, ctx: Context) -> Pick | None:
    names = [arg.name for arg in node.args]
    if names not in ([None], [None, "weight"]):
        what = "`pick` takes an input of tokens and their `weight`"
        ctx.report.error("A013", what, node.span, f"{len(names)} given", "write `pick(idx, weight = w)`")
        return None
    listed = node.args[0].value
    decl = _input(listed, ctx)
    if decl is None:
        return None
    if decl.type is not Type.INT or not decl.dims or not _of_keys(decl):
        ctx.report.error(
            "A048", f"`{decl.name}` does not list tokens of a key head", listed.span, "of another type or shape",
            f"declare `input {decl.name} : int[b, g, 64]`, or one entry every 64 tokens: `int[b, g, k/64]`",
        )  # fmt: skip
        return None
    lead = tuple(_OWN[dim.axis] for dim in decl.dims[:-1])
    found = Pick(decl.name, lead, decl.dims[-1])
    if len(node.args) == 1:
        return found
    weight = node.args[1].value
    bound = ctx.scope.find(weight.id) if isinstance(weight, ast.Name) else None
    if isinstance(bound, InputRef) and bound.decl.dims and bound.decl.dims[-1] == found.room:
        return _weighed(found, bound.decl, weight.span, ctx)
    value = number(weight, ctx.of(Use.PICKED))
    return None if value is None else replace(found, weight=value)


def _weighed(picked: Pick, decl: InputDecl, span: Span, ctx: Context) -> Pick | None:
    """Listed tokens with an input of their weights."""
    if decl.learnable:
        ctx.report.error(
            "A033", f"`{decl.name}` is learnable, and the weight of a listed token has no gradient", span, "read here",
            "declare a second input without `learnable`",
        )  # fmt: skip
        return None
    if decl.type is not Type.FLOAT or not _of_keys(decl):
        ctx.report.error(
            "A048", f"`{decl.name}` does not hold a weight for each entry", span, "of another type or shape",
            f"declare it as `{picked.input}`, of floats",
        )  # fmt: skip
        return None
    lead = tuple(_OWN[dim.axis] for dim in decl.dims[:-1])
    return replace(picked, weight=Read(decl.name, (*lead, Var("k")), Type.FLOAT))


def _of_keys(decl: InputDecl) -> bool:
    """Whether an input has entries of batch entries and key heads alone."""
    lead = [dim.axis for dim in decl.dims[:-1]]
    return decl.dims[-1].axis in (Axis.CONST, Axis.K) and lead in ([], [Axis.B], [Axis.G], [Axis.B, Axis.G])


def _given(node: ast.Apply, ctx: Context) -> Given | None:
    if not 2 <= len(node.args) <= 4 or any(arg.name for arg in node.args):
        help = "write `given(kc, vc, size, stride)`"
        ctx.report.error(
            "A013", "`given` takes two inputs, a size and a stride", node.span, f"{len(node.args)} given", help
        )
        return None
    keys, values = (_input(arg.value, ctx) for arg in node.args[:2])
    sizes = [static_int(arg.value, ctx, "a size") for arg in node.args[2:]]
    if keys is None or values is None or None in sizes:
        return None
    if len(node.args) == 2:
        # Entries as wide as the blocks that the keys are declared over.
        sizes = [keys.dims[2].block if len(keys.dims) == 4 else 1]
    size, stride = sizes[0], sizes[-1]
    assert size is not None and stride is not None
    good = True
    for decl, axes, last, at in ((keys, (Axis.D,), "D", node.args[0]), (values, (Axis.DV, Axis.D), "Dv", node.args[1])):
        lead = (Dim(Axis.B), Dim(Axis.G), Dim(Axis.K, stride))
        if decl.type is not Type.FLOAT or decl.dims[:3] != lead or len(decl.dims) != 4 or decl.dims[3].axis not in axes:
            over = f"k/{stride}" if stride > 1 else "k"
            ctx.report.error(
                "A048", f"`{decl.name}` does not hold the entries of this view", at.span,
                f"one entry every {stride} tokens", f"declare `input {decl.name} : float[b, g, {over}, {last}]`",
            )  # fmt: skip
            good = False
    return Given(keys.name, values.name, size, stride) if good else None


def _input(node: ast.Expr, ctx: Context) -> InputDecl | None:
    """The declaration of an input; None where there is none, or one with a mistake."""
    bound = ctx.scope.find(node.id) if isinstance(node, ast.Name) else None
    if isinstance(bound, InputRef):
        return bound.decl
    if isinstance(bound, Poison):
        return None
    if isinstance(node, ast.Name) and bound is None:
        ctx.unknown(node.id, node.span)
    else:
        ctx.report.error(
            "A023", "an input belongs here", node.span, "not an input", "declare one: `input x : float[b, k, D]`"
        )
    return None
