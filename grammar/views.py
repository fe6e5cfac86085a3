"""Checks views and the further words of a branch's part: `over`, `from`, `within`."""

from __future__ import annotations

from attndsl import syntax as ast
from attndsl.grammar.report import nearest
from attndsl.grammar.routing import partition, probabilities
from attndsl.grammar.scalars import number, static_int
from attndsl.grammar.scope import BranchRef, Context, InputRef, LevelsRef, Poison
from attndsl.grammar.selections import selection
from attndsl.grammar.unsupported import Feature, unsupported

_POOLS = ("mean", "max", "min", "sum")
_VISIBLE = ("every", "any")


def check_part(part: ast.Part, ctx: Context) -> None:
    """Reports what a part asks for beside its pattern."""
    if part.over is not None and view(part.over, ctx):
        unsupported(Feature.VIEWS, part.over.span, ctx)
    if part.queries is not None and view(part.queries, ctx):
        unsupported(Feature.POOLED_QUERIES, part.queries.span, ctx)
    if part.within is not None and part.weight is not None:
        good = partition(part.within, ctx)
        if isinstance(part.weight, ast.Apply) and part.weight.function == "probs":
            good = probabilities(part.weight, ctx) and good
        else:
            ctx.report.error(
                "A043",
                "`with` takes the probabilities of a branch",
                part.weight.span,
                "here",
                "write `with probs(name)`",
            )
            good = False
        if good:
            unsupported(Feature.WITHIN, part.within.span.to(part.weight.span), ctx)


def view(node: ast.Expr, ctx: Context) -> bool:
    """Checks a view: `pool`, `given`, `pick`, `levels`, or the name of a `levels` plan."""
    match node:
        case ast.Apply(function="pool"):
            return _pool(node, ctx)
        case ast.Apply(function="given"):
            return _given(node, ctx)
        case ast.Apply(function="pick", args=[ast.Argument(name=None, value=idx), *rest]):
            return all([_is_input(idx, ctx), *(_is_input(arg.value, ctx) for arg in rest if arg.name == "weight")])
        case ast.Apply(function="levels"):
            return selection(node, ctx) is not None
        case ast.Name(id=name) if isinstance(ctx.scope.find(name), LevelsRef | Poison):
            return True
        case ast.Name(id=name) if ctx.scope.find(name) is None:
            ctx.unknown(name, node.span)
            return False
        case _:
            help = "write `pool(mean, 64)`, `given(kc, vc, 64)` or a `levels` plan"
            ctx.report.error("A023", "this is not a view", node.span, "a view belongs here", help)
            return False


def _pool(node: ast.Apply, ctx: Context) -> bool:
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
        return False
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
        return partition(positional[1], ctx) and good
    size = static_int(positional[1], ctx, "a pool's size")
    step = positional[2] if len(positional) == 3 else named.get("stride")
    stride = static_int(step, ctx, "a stride") if step is not None else size
    if counted and size is not None and stride is not None and stride != size:
        ctx.report.error(
            "A012", "`counted` needs stride = size", node.span, "entries overlap or leave gaps", "leave out `counted`"
        )
        good = False
    return good and size is not None and stride is not None


def _given(node: ast.Apply, ctx: Context) -> bool:
    if not 2 <= len(node.args) <= 4 or any(arg.name for arg in node.args):
        help = "write `given(kc, vc, size, stride)`"
        ctx.report.error(
            "A013", "`given` takes two inputs, a size and a stride", node.span, f"{len(node.args)} given", help
        )
        return False
    inputs = [_is_input(arg.value, ctx) for arg in node.args[:2]]
    sizes = [static_int(arg.value, ctx, "a size") for arg in node.args[2:]]
    return all(inputs) and None not in sizes


def _is_input(node: ast.Expr, ctx: Context) -> bool:
    bound = ctx.scope.find(node.id) if isinstance(node, ast.Name) else None
    if isinstance(bound, InputRef | Poison):
        return True
    if isinstance(node, ast.Name) and bound is None:
        ctx.unknown(node.id, node.span)
    else:
        ctx.report.error(
            "A023", "an input belongs here", node.span, "not an input", "declare one: `input x : float[b, k, D]`"
        )
    return False


def output(node: ast.Expr, ctx: Context) -> bool:
    """Checks `output`: whether an expression combines branches (true) or is a factor (false)."""
    match node:
        case ast.Name(id=name) if isinstance(ctx.scope.find(name), BranchRef):
            return True
        case ast.Arithmetic(first=first, rest=rest):
            left = output(first, ctx)
            for op, operand in rest:
                right = output(operand, ctx)
                if op not in ("+", "-", "*", "/") or (op == "/" and right):
                    help = "branches combine with `+`, `-`, `*` and `merge`"
                    ctx.report.error("A046", f"`{op}` does not combine branches", node.span, "here", help)
                elif op == "*" and left and right:
                    ctx.report.error(
                        "A046", "two branches cannot be multiplied", node.span, "here", "multiply by an input"
                    )
                left = left or right
            return left
        case ast.Prefix(op="-", operand=operand):
            return output(operand, ctx)
        case ast.Apply(function="merge", args=args):
            for arg in args:
                if not (isinstance(arg.value, ast.Apply) and arg.value.function == "given"):
                    if not output(arg.value, ctx):
                        ctx.report.error("A046", "`merge` joins branches", arg.span, "not a branch", "name a branch")
                else:
                    _given(arg.value, ctx)
            return True
        case ast.Apply(function="sigmoid", args=[ast.Argument(value=value)]):
            if output(value, ctx):
                ctx.report.error(
                    "A046", "`sigmoid` gates, it does not take a branch", node.span, "here", "gate with an input"
                )
            return False
        case ast.Name(id=name) if isinstance(ctx.scope.find(name), InputRef | Poison):
            return False
        case ast.Subscript(name=name) if isinstance(ctx.scope.find(name), InputRef):
            return False
        case _:
            number(node, ctx)
            return False


def observe(node: ast.Expr, ctx: Context) -> None:
    if isinstance(node, ast.Apply) and node.function == "probs":
        if probabilities(node, ctx):
            unsupported(Feature.OBSERVE, node.span, ctx)
        return
    ctx.report.error(
        "A043", "`observe` reads probabilities", node.span, "here", "write `probs(branch, sum, head, tokens)`"
    )


def segment_input(name: str, ctx: Context, node: ast.Clause) -> bool:
    """Checks the input of `packed` and `lengths`."""
    bound = ctx.scope.find(name)
    if isinstance(bound, InputRef | Poison):
        return True
    if bound is None:
        ctx.unknown(name, node.span)
    else:
        ctx.report.error(
            "A023", f"`{name}` is not an input", node.span, "an input belongs here", "declare it as an input"
        )
    return False
