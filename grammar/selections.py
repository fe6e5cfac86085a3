"""Checks data-dependent selections (`top`, `cover`, `above`, `levels`): their form, option words and types.

They are not compiled yet, so nothing is lowered: a good selection stands for the set of all pairs.
"""

from __future__ import annotations

from dataclasses import replace

from attndsl import syntax as ast
from attndsl.grammar import sets
from attndsl.grammar.arguments import match_arguments
from attndsl.grammar.places import place_of, tiles
from attndsl.grammar.report import nearest
from attndsl.grammar.scalars import integer, number, static_float, static_int
from attndsl.grammar.scope import BranchRef, Context, InputRef, Poison, TableRef, Use
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.program import Set, Where

# The words each option takes, in the order of the specification.
WORDS = {
    "share": ("none", "group", "heads"),
    "forced": ("counted", "extra", "overlay"),
    "normalise": ("none", "softmax", "minmax"),
    "compete": ("row", "head", "all"),
}
_COMMON = ("of", "per", "share", "among", "always", "forced", "by", "normalise")
_OPTIONS = {
    "top": ("n", *_COMMON),
    "cover": ("p", *_COMMON, "compete", "exclusive", "at_least", "at_most"),
    "above": ("t", *_COMMON, "relative", "at_most"),
    "levels": ("factors", *_COMMON, "quantiles", "masses"),
}
_FLAGS = ("exclusive", "relative")
_POOLERS = ("mean", "max", "min", "first", "last", "sum")


def selection(node: ast.Apply, ctx: Context) -> Set | None:
    """Checks a selection, and reports it as unsupported if nothing else is wrong with it."""
    matched = _matched(node, ctx)
    if matched is None:
        return None
    name, good = node.function, True
    required = (_OPTIONS[name][0], "of", "by")
    for word in required:
        if word not in matched:
            ctx.report.error(
                "A013",
                f"`{name}` needs `{word}`",
                node.span,
                "left out here",
                f"write `{name}({', '.join(required[:2])}, by = ...)`",
            )
            good = False
    if ctx.among and "among" not in matched:
        ctx.report.error(
            "A044",
            f"`{name}` in {ctx.among} must say what it selects among",
            node.span,
            "no `among`",
            "write `among = causal`",
        )
        good = False
    for word, arg in matched.items():
        good = _option(name, word, arg.value, ctx) and good
    if not good:
        return None
    unsupported(Feature.SELECTIONS, node.span, ctx)
    return Where(ctx.maker.const(True, node.span), node.span)


def _matched(node: ast.Apply, ctx: Context) -> dict[str, ast.Argument] | None:
    """The arguments; option words may stand alone."""
    name, flags, rest = node.function, list[ast.Argument](), list[ast.Argument]()
    for arg in node.args:
        alone = arg.name is None and isinstance(arg.value, ast.Name) and arg.value.id in _FLAGS
        (flags if alone else rest).append(arg)
    matched = match_arguments(name, _OPTIONS[name], tuple(rest), node.span, ctx)
    if matched is None:
        return None
    for arg in flags:
        assert isinstance(arg.value, ast.Name)
        if arg.value.id not in _OPTIONS[name]:
            ctx.report.error(
                "A043", f"`{name}` has no option `{arg.value.id}`", arg.span, "unknown word", "leave it out"
            )
            return None
    return matched


def _option(name: str, word: str, node: ast.Expr, ctx: Context) -> bool:
    match word:
        case "n":
            return _budget(node, ctx)
        case "p" | "t":
            share = static_float(node, ctx, f"`{word}`")
            if share is not None and not 0 <= share <= 1:
                ctx.report.error("A012", f"`{word}` lies in [0, 1]", node.span, f"this is {share}", "write a share")
                return False
            return share is not None
        case "factors":
            return _numbers(node, ctx, whole=True)
        case "quantiles" | "masses":
            return _numbers(node, ctx, whole=False)
        case "of":
            return partition(node, ctx)
        case "per":
            return rows(node, ctx)
        case "among" | "always":
            return sets.pattern_set(node, replace(ctx, among="an option")) is not None
        case "by":
            return routing_score(node, replace(ctx, use=Use.BY))
        case "exclusive" | "relative":
            if isinstance(node, ast.Truth):
                return True
            ctx.report.error("A043", f"`{word}` is true or false", node.span, "unknown word", f"write `{word} = true`")
            return False
        case "at_least" | "at_most":
            return static_int(node, ctx, f"`{word}`") is not None
        case _:
            return _word(word, node, ctx)


def _word(option: str, node: ast.Expr, ctx: Context) -> bool:
    words = WORDS[option]
    if isinstance(node, ast.Name) and node.id in words:
        return True
    help = (
        nearest(node.id, words) if isinstance(node, ast.Name) else ""
    ) or f"write {', '.join(words[:-1])} or {words[-1]}"
    ctx.report.error("A043", f"this is not a word of `{option}`", node.span, "unknown word", help)
    return False


def _budget(node: ast.Expr, ctx: Context) -> bool:
    if isinstance(node, ast.Apply) and node.function == "fraction":
        if len(node.args) != 1:
            ctx.report.error(
                "A013", "`fraction` takes 1 argument", node.span, f"{len(node.args)} given", "write `fraction(0.1)`"
            )
            return False
        return static_float(node.args[0].value, ctx, "a fraction") is not None
    return integer(node, replace(ctx, use=Use.SET)) is not None


def _numbers(node: ast.Expr, ctx: Context, *, whole: bool) -> bool:
    if not isinstance(node, ast.Group):
        ctx.report.error("A020", "a tuple of numbers belongs here", node.span, "one value", "write `(1, 2, 4)`")
        return False
    values = [static_int(i, ctx, "a factor") if whole else static_float(i, ctx, "a share") for i in node.items]
    return None not in values


def partition(node: ast.Expr, ctx: Context) -> bool:
    """Checks `of`: how the keys are divided into members."""
    match node:
        case ast.Name(id="tokens"):
            return True
        case ast.Apply(function="blocks" | "diagonals", args=[ast.Argument(name=None, value=size)]):
            return static_int(size, ctx, "a block size") is not None
        case ast.Apply(function="segments", args=[ast.Argument(name=None, value=ids)]):
            return (
                place_of(ast.Apply("permuted", (ast.Argument(None, ids, ids.span),), node.span, node.span), ctx)
                is not None
            )
        case ast.Apply(function="tiles"):
            return tiles(node, ctx)
        case ast.Place(operand=operand, place=place):
            return partition(operand, ctx) and place_of(place, ctx) is not None
        case _:
            help = "write `tokens`, `blocks(64)`, `tiles(...)`, `segments(ids)` or `diagonals(1)`"
            ctx.report.error("A043", "this does not divide the keys", node.span, "unknown partition", help)
            return False


def rows(node: ast.Expr, ctx: Context) -> bool:
    """Checks `per`: how the queries are divided into row classes."""
    match node:
        case ast.Name(id="query" | "head"):
            return True
        case ast.Apply(function="rows", args=[ast.Argument(name=None, value=size)]):
            return static_int(size, ctx, "a block size") is not None
        case ast.Apply(function="tiles"):
            return tiles(node, ctx)
        case _:
            help = "write `query`, `rows(64)`, `head` or `tiles(...)`"
            ctx.report.error("A043", "this does not divide the rows", node.span, "unknown row class", help)
            return False


def routing_score(node: ast.Expr, ctx: Context) -> bool:
    """Checks `by`: what ranks the members."""
    match node:
        case ast.Apply(function="dot" | "bound" | "antidiagonal" as name, args=args):
            wanted = 2 if name == "dot" else 3
            if len(args) != wanted or any(arg.name for arg in args):
                ctx.report.error(
                    "A013",
                    f"`{name}` takes {wanted} arguments",
                    node.span,
                    f"{len(args)} given",
                    "give them without names",
                )
                return False
            if name == "antidiagonal":
                vectors = _vectors(args[0].value, "Q", ctx) and _vectors(args[1].value, "K", ctx)
                return vectors and static_int(args[2].value, ctx, "a stride") is not None
            good = [_vectors(arg.value, "K" if position else "Q", ctx) for position, arg in enumerate(args)]
            return all(good)
        case ast.Apply(function="probs"):
            return probabilities(node, ctx)
        case ast.Name(id=name) if isinstance(bound := ctx.scope.find(name), InputRef | TableRef):
            # A tensor over rows and members: its own dimensions say which entry is meant.
            return bound is not None
        case _:
            return number(node, ctx) is not None


def _vectors(node: ast.Expr, which: str, ctx: Context) -> bool:
    match node:
        case ast.Name(id="Q" | "K" as name) if name == which:
            return True
        case ast.Apply(function=pooler, args=[ast.Argument(name=None, value=inner)]) if pooler in _POOLERS:
            return _vectors(inner, which, ctx)
        case ast.Name(id=name) if isinstance(ctx.scope.find(name), InputRef | Poison):
            return True
        case ast.Name(id=name) if ctx.scope.find(name) is None and name not in ("Q", "K", "V"):
            ctx.unknown(name, node.span)
            return False
        case _:
            help = f"write `{which}`, `mean({which})` or an input"
            ctx.report.error("A043", f"this is not made of {which}", node.span, "unknown vectors", help)
            return False


def probabilities(node: ast.Apply, ctx: Context) -> bool:
    """Checks `probs(branch, sum | max, per, of)`."""
    words = ("branch", "reduce", "per", "of")
    matched = match_arguments("probs", words, node.args, node.span, ctx)
    if matched is None:
        return False
    branch = matched.get("branch")
    if branch is None or not isinstance(branch.value, ast.Name):
        ctx.report.error("A013", "`probs` reads a branch", node.span, "no branch", "write `probs(name)`")
        return False
    bound = ctx.scope.find(branch.value.id)
    if bound is None:
        ctx.unknown(branch.value.id, branch.span)
        return False
    if not isinstance(bound, BranchRef | Poison):
        ctx.report.error("A023", f"`{branch.value.id}` is not a branch", branch.span, "here", "name an earlier branch")
        return False
    reduce = matched.get("reduce")
    if reduce is not None and not (isinstance(reduce.value, ast.Name) and reduce.value.id in ("sum", "max")):
        ctx.report.error(
            "A043", "`probs` sums or takes the largest", reduce.span, "unknown word", "write `sum` or `max`"
        )
        return False
    return ("per" not in matched or rows(matched["per"].value, ctx)) and (
        "of" not in matched or partition(matched["of"].value, ctx)
    )
