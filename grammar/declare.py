"""Declarations: inputs, parameters with their compile-time values, axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attndsl import syntax as ast
from attndsl.diagnostics import Span
from attndsl.grammar.report import nearest
from attndsl.grammar.scalars import scalar, static_int
from attndsl.grammar.scope import AxisRef, Context, InputRef, PlanRef, Poison, TableRef, Use, Value
from attndsl.grammar.tables import table_value
from attndsl.grid import MAX_AXES, Grid
from attndsl.program import Arg, Axis, Const, Dim, InputDecl, TableDecl, Type

TYPES = {"int": Type.INT, "float": Type.FLOAT, "bool": Type.BOOL}
# Positions are below 2**POSITION_BITS.
POSITION_BITS = 31
_AXES = {"b": Axis.B, "h": Axis.H, "g": Axis.G, "q": Axis.Q, "k": Axis.K, "D": Axis.D, "Dv": Axis.DV}


# ----------------------------------------------------------------------------------------- inputs
def declare_input(node: ast.Input, ctx: Context) -> None:
    at = _name_span(node.span, "input", node.name)
    kind = node.type.name
    dims = [dim(item, ctx) for item in node.type.dims]
    good = [d for d in dims if d is not None]
    if kind in ("tokens", "blocks"):
        decl = _plan(node, dims, ctx)
        if decl is not None:
            ctx.maker.inputs[node.name] = decl
        ctx.scope.declare(node.name, Poison() if decl is None else PlanRef(decl), at, ctx.report)
        return
    if kind not in TYPES or node.type.size is not None:
        help = nearest(kind, [*TYPES, "tokens", "blocks"]) or "write int, float, bool, tokens or blocks(B)"
        ctx.report.error("A030", f"there is no input type `{kind}`", node.type.span, "unknown type", help)
        ctx.scope.declare(node.name, Poison(), at, ctx.report)
        return
    if len(good) < len(dims):
        ctx.scope.declare(node.name, Poison(), at, ctx.report)
        return
    decl = InputDecl(
        node.name, TYPES[kind], tuple(good), "learnable" in node.flags, "sorted" in node.flags, span=node.span
    )
    _check_flags(node, decl, ctx)
    ctx.maker.inputs[node.name] = decl
    ctx.scope.declare(node.name, InputRef(decl), at, ctx.report)


def _plan(node: ast.Input, dims: list[Dim | None], ctx: Context) -> InputDecl | None:
    """The declaration of an input that holds a plan; None if a mistake was reported."""
    kind, size = node.type.name, node.type.size
    if (kind == "blocks") != (size is not None):
        help = "write `blocks(64)[b, q]`" if kind == "blocks" else "write `tokens[b, q]`"
        ctx.report.error("A030", f"this is not how `{kind}` is written", node.type.span, "an input type", help)
        return None
    members = 1 if size is None else static_int(size, ctx, "a block size")
    good = tuple(d for d in dims if d is not None)
    if members is None or len(good) < len(dims):
        return None
    if any(d.axis not in (Axis.B, Axis.H, Axis.G, Axis.Q) for d in good):
        ctx.report.error(
            "A030", "a plan is chosen for b, h or g, and q or blocks of q", node.type.span, "other dimensions",
            "leave the members out: a plan lists them in a last dimension of its own",
        )  # fmt: skip
        return None
    if node.flags:
        ctx.report.error("A030", "a plan has no flags", node.span, "here", f"leave out `{node.flags[0]}`")
        return None
    decl = InputDecl(node.name, Type.INT, (*good, Dim(Axis.LIST)), members=members, span=node.span)
    before = len(ctx.report.errors)
    _check_flags(node, decl, ctx)
    return decl if len(ctx.report.errors) == before else None


def _check_flags(node: ast.Input, decl: InputDecl, ctx: Context) -> None:
    if decl.learnable and decl.type is not Type.FLOAT:
        ctx.report.error(
            "A030",
            f"a learnable input is a float, not {decl.type.value}",
            node.span,
            "no gradient",
            "leave out `learnable`",
        )
    if decl.sorted and (decl.type is not Type.INT or not decl.dims):
        ctx.report.error(
            "A030",
            "`sorted` describes an int input along its last axis",
            node.span,
            "nothing to sort",
            "leave out `sorted`",
        )
    if len(set(node.flags)) < len(node.flags):
        ctx.report.error("A030", "a flag is given twice", node.span, "here", "write it once")
    axes = [d.axis for d in decl.dims if d.axis is not Axis.CONST and d.axis is not Axis.D]
    if len({(d.axis, d.block) for d in decl.dims if d.axis is not Axis.CONST}) < len(
        [d for d in decl.dims if d.axis is not Axis.CONST]
    ):
        ctx.report.error("A030", "a dimension is given twice", node.type.span, "here", "name each dimension once")
    elif Axis.H in axes and Axis.G in axes:
        ctx.report.error("A030", "h already says which g", node.type.span, "both h and g", "leave out g")


def dim(node: ast.Expr, ctx: Context) -> Dim | None:
    """A dimension: an axis, blocks of q or k, or a constant."""
    match node:
        case ast.Name(id=name) if name in _AXES:
            return Dim(_AXES[name])
        case ast.Arithmetic(first=ast.Name(id="q" | "k" as name), rest=[("/", divisor)]):
            block = static_int(divisor, ctx, "a block size")
            return None if block is None else Dim(_AXES[name], block)
        case ast.Arithmetic(first=ast.Name(id="q" | "k" as name), rest=[("//", _)]):
            ctx.report.error(
                "A030", "a dimension of blocks is written with `/`", node.span, "here", f"write `{name}/64`"
            )
            return None
        case _:
            size = static_int(node, ctx, "a dimension")
            return None if size is None else Dim(Axis.CONST, size=size)


def _name_span(span: Span, word: str, name: str) -> Span:
    """The name in a declaration that starts with a word (or with the name itself)."""
    start = span.source.text.index(name, span.start + len(word))
    return Span(span.source, start, start + len(name))


# ------------------------------------------------------------------------------------- parameters
def declare_params(
    params: tuple[ast.Param, ...], values: Mapping[str, object], ctx: Context, at: Span, *, assume: bool
) -> tuple[tuple[str, ...], tuple[TableDecl, ...]]:
    """Binds parameters to their values or defaults; returns the runtime arguments and the tables.

    `assume` is for declarations that are only checked: a parameter without value then says nothing.
    """
    args: list[str] = []
    names = [param.name for param in params]
    for name in values:
        if name not in names and not assume:
            help = nearest(str(name), names) or (f"it has {', '.join(names)}" if names else "it has none")
            ctx.report.error("A015", f"there is no parameter `{name}`", at, "declared here", help)
    for param in params:
        span = _name_span(param.span, "", param.name)
        if not _type_is_good(param, ctx):
            ctx.scope.declare(param.name, Poison(), span, ctx.report)
            continue
        if param.runtime:
            if param.name in values or param.default is not None:
                where = "the call" if param.name in values else "a default"
                ctx.report.error(
                    "A015", f"`{param.name}` is a runtime int: {where} cannot fix it here", span, "given at call time",
                    "leave out `runtime`",
                )  # fmt: skip
            args.append(param.name)
            ctx.scope.declare(param.name, Value(ctx.maker.keep(Arg(param.name), span), 0), span, ctx.report)
        elif param.name in values:
            bound = _given(param, values[param.name], span, ctx)
            ctx.scope.declare(param.name, bound, span, ctx.report)
        elif param.default is not None:
            ctx.scope.declare(param.name, _default(param, ctx), span, ctx.report)
        else:
            if not assume:
                help = f"pass `{param.name}=...`, or give it a default"
                ctx.report.error("A015", f"parameter `{param.name}` has no value", span, "no default", help)
            ctx.scope.declare(param.name, Poison(), span, ctx.report)
    return tuple(args), tuple(ctx.maker.tables.values())


def _type_is_good(param: ast.Param, ctx: Context) -> bool:
    type = param.type
    if type is None:
        return True
    if type.name not in TYPES or type.size is not None:
        help = nearest(type.name, TYPES) or "write int, float or bool"
        ctx.report.error("A030", f"there is no parameter type `{type.name}`", type.span, "unknown type", help)
        return False
    if param.runtime and (type.name != "int" or type.dims):
        ctx.report.error("A030", "a runtime parameter is a single int", type.span, "here", "declare an input instead")
        return False
    return True


def _default(param: ast.Param, ctx: Context) -> Value | Poison:
    assert param.default is not None
    e = scalar(param.default, replace(ctx, use=Use.STATIC))
    if e is None:
        return Poison()
    if not isinstance(e, Const):
        ctx.report.error(
            "A024", "a default must be known at compile time", param.default.span, "here", "write a literal"
        )
        return Poison()
    if param.type is not None and param.type.dims:
        ctx.report.error(
            "A015", "a table has no default", param.default.span, "one value", "pass the table when compiling"
        )
        return Poison()
    return _typed(param, e.value, param.default.span, ctx)


def _typed(param: ast.Param, value: int | float | bool, span: Span, ctx: Context) -> Value | Poison:
    wanted = TYPES[param.type.name] if param.type is not None else None
    found = Const(value).type
    if wanted is Type.FLOAT and found is Type.INT:
        return Value(ctx.maker.const(float(value), span), 0)
    if wanted is not None and wanted is not found:
        ctx.report.error(
            "A015",
            f"`{param.name}` is {wanted.value}, and {value!r} is {found.value}",
            span,
            "wrong type",
            f"give {wanted.value}",
        )
        return Poison()
    return Value(ctx.maker.const(value, span), 0)


def _given(param: ast.Param, value: object, span: Span, ctx: Context) -> Value | TableRef | Poison:
    table = table_value(value)
    if table is None:
        ctx.report.error(
            "A015", f"`{param.name}` cannot be {type(value).__name__}", span, "a number or a table", "pass numbers"
        )
        return Poison()
    if isinstance(table, str):
        ctx.report.error("A015", f"`{param.name}`: {table}", span, "a table", "pass a rectangular table of numbers")
        return Poison()
    shape, values = table
    dims = () if param.type is None else param.type.dims
    if len(shape) != len(dims):
        wanted = f"{len(dims)} dimensions" if dims else "one value"
        ctx.report.error(
            "A015",
            f"`{param.name}` takes {wanted}, and has {len(shape)}",
            span,
            "here",
            "declare `name : int[h]` for a table",
        )
        return Poison()
    if not dims:
        return _typed(param, values[0], span, ctx)
    return _table(param, shape, values, span, ctx)


def _table(
    param: ast.Param, shape: tuple[int, ...], values: tuple[int | float | bool, ...], span: Span, ctx: Context
) -> TableRef | Poison:
    assert param.type is not None
    declared: list[Dim] = []
    for node, size in zip(param.type.dims, shape, strict=True):
        d = dim(node, ctx)
        if d is None:
            return Poison()
        if d.axis not in (Axis.H, Axis.G, Axis.CONST):
            ctx.report.error(
                "A030",
                "a compile-time table has dimensions h, g or constants",
                node.span,
                "not known here",
                "make it an input",
            )
            return Poison()
        if d.axis is Axis.CONST and d.size != size:
            ctx.report.error(
                "A015",
                f"`{param.name}` has {size} entries where {d.size} are declared",
                span,
                "wrong size",
                f"pass {d.size}",
            )
            return Poison()
        declared.append(d)
    wanted = TYPES[param.type.name]
    if wanted is Type.FLOAT:
        values = tuple(float(v) for v in values)
    if any(Const(v).type is not wanted for v in values):
        ctx.report.error(
            "A015", f"`{param.name}` holds {wanted.value} entries only", span, "wrong type", f"pass {wanted.value}s"
        )
        return Poison()
    for v in values:
        ctx.maker.const(v, span)
    decl = TableDecl(param.name, wanted, tuple(declared), shape, values)
    ctx.maker.tables[param.name] = decl
    return TableRef(decl)


# ------------------------------------------------------------------------------------------- axes
def declare_axes(node: ast.Axes, ctx: Context) -> Grid | None:
    """Declares the axes; returns their grid, None where a mistake in it was reported."""
    sizes = _axis_sizes(node, ctx)
    first = 0 if node.first is None else static_int(node.first, ctx, "the first token", least=0)
    order = _order(node, sizes, ctx)
    grid = None
    if sizes is not None and first is not None and order is not None:
        grid = Grid(tuple(axis.name for axis in node.axes), sizes, first, order)
        if max(first, grid.stride * (sizes[0] or 1)) >= 1 << POSITION_BITS:
            ctx.report.error("A045", "this grid has more cells than a sequence has tokens", node.span, "too large",
                             "take smaller sizes")  # fmt: skip
            grid = None
    for position, axis in enumerate(node.axes):
        bound = AxisRef(grid, position)
        ctx.scope.declare(axis.name, bound, _name_span(axis.span, "", axis.name), ctx.report)
    return grid


def _axis_sizes(node: ast.Axes, ctx: Context) -> tuple[int | None, ...] | None:
    good, sizes = True, list[int | None]()
    if len(node.axes) > MAX_AXES:
        ctx.report.error("A045", f"a grid has at most {MAX_AXES} axes", node.span, f"{len(node.axes)} here",
                         "join axes that no set tells apart")  # fmt: skip
        good = False
    for position, axis in enumerate(node.axes):
        size = None if axis.size is None else static_int(axis.size, ctx, "the size of an axis")
        good = good and (axis.size is None or size is not None)
        if axis.size is None and position:
            ctx.report.error(
                "A045", f"axis `{axis.name}` needs a size", axis.span, "only the first may be open", "write `x[64]`"
            )
            good = False
        sizes.append(size)
    return tuple(sizes) if good else None


def _order(node: ast.Axes, sizes: tuple[int | None, ...] | None, ctx: Context) -> tuple[int, ...] | None:
    """The tiles by which tokens run."""
    if node.order is None:
        return (1,) * len(node.axes)
    if not (isinstance(node.order, ast.Apply) and node.order.function == "tiles"):
        ctx.report.error(
            "A043", "this is not an order of tokens", node.order.span, "after `in`", "write `tiles(4, 8, 8)`"
        )
        return None
    found = [static_int(arg.value, ctx, "a tile size") for arg in node.order.args]
    good = tuple(size for size in found if size is not None)
    if len(found) != len(node.axes):
        ctx.report.error(
            "A013", f"`tiles` takes one size for each of {len(node.axes)} axes", node.order.span,
            f"{len(found)} given", "write one size an axis",
        )  # fmt: skip
        return None
    if sizes is None or len(good) < len(found):
        return None
    for size, tile, arg, axis in zip(sizes, good, node.order.args, node.axes, strict=True):
        if size is not None and size % tile:
            ctx.report.error(
                "A045", f"tiles of {tile} do not divide axis `{axis.name}` of {size}", arg.value.span,
                "tiles would be cut off", "pad the grid to whole tiles",
            )  # fmt: skip
            return None
    return good
