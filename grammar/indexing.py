"""Reads of inputs and tables: the left-out leading indices, and which positions may index what."""

from __future__ import annotations

from collections.abc import Sequence

from attndsl import syntax as ast
from attndsl.diagnostics import Span
from attndsl.grammar.scope import Context, Use
from attndsl.program import Axis, Binary, Const, Dim, InputDecl, Read, Scalar, Table, TableDecl, Type, Var, reads

_LEADING = {Axis.B: "b", Axis.H: "h", Axis.G: "g", Axis.Q: "q"}
_LEARNABLE_USES = (Use.SCORE, Use.WEIGHTS, Use.SINK, Use.OUTPUT, Use.BY)


def read_input(
    decl: InputDecl, nodes: Sequence[ast.Expr], span: Span, ctx: Context, index: list[Scalar | None]
) -> Scalar | None:
    """`input[index]`, every index written out."""
    if ctx.use is Use.STATIC:
        ctx.report.error("A024", f"`{decl.name}` is not known at compile time", span, "an input", "make it a parameter")
        return None
    if decl.learnable and ctx.use not in _LEARNABLE_USES:
        ctx.report.error(
            "A033",
            f"`{decl.name}` is learnable, and {ctx.use.value} has no gradient",
            span,
            "read here",
            "declare a second input without `learnable`",
        )
        return None
    full = _fill(decl.name, decl.dims, nodes, span, ctx, index)
    if full is None or not _positions(decl, full, nodes, span, ctx):
        return None
    return ctx.maker.keep(Read(decl.name, full, decl.type), span)


def read_table(
    decl: TableDecl, nodes: Sequence[ast.Expr], span: Span, ctx: Context, index: list[Scalar | None]
) -> Scalar | None:
    """An entry of a compile-time table; a constant where the index is one."""
    full = _fill(decl.name, decl.dims, nodes, span, ctx, index, decl.shape)
    if full is None:
        return None
    flat = 0
    for size, e in zip(decl.shape, full, strict=True):
        if not isinstance(e, Const):
            if ctx.use is Use.STATIC:
                ctx.report.error(
                    "A024",
                    f"`{decl.name}[...]` is not known at compile time",
                    span,
                    "here it must be",
                    "index it by constants",
                )
                return None
            return ctx.maker.keep(Table(decl.name, full, decl.type), span)
        flat = flat * size + min(max(int(e.value), 0), size - 1)
    return ctx.maker.const(decl.values[flat], span)


def _fill(
    name: str,
    dims: tuple[Dim, ...],
    nodes: Sequence[ast.Expr],
    span: Span,
    ctx: Context,
    index: list[Scalar | None],
    shape: tuple[int, ...] | None = None,
) -> tuple[Scalar, ...] | None:
    missing = len(dims) - len(index)
    if missing < 0:
        ctx.report.error(
            "A026", f"`{name}` has {len(dims)} dimensions", span, f"{len(index)} indices given", "leave some out"
        )
        return None
    full: list[Scalar] = []
    for dim in dims[:missing]:
        if dim.axis not in _LEADING:
            what = "k" if dim.axis is Axis.K else "an index"
            ctx.report.error(
                "A026",
                f"`{name}` needs {what} written out",
                span,
                "only leading b, h, g, q may be left out",
                _example(name, dims),
            )
            return None
        full.append(_leading(dim, span, ctx))
    good = True
    for position, (dim, given) in enumerate(zip(dims[missing:], index, strict=True)):
        if given is None:
            good = False
            continue
        size = shape[missing + position] if shape else (dim.size if dim.axis is Axis.CONST else None)
        bounds = ctx.maker.bounds(given)
        outside = (bounds.high is not None and bounds.high < 0) or (
            size is not None and bounds.low is not None and bounds.low >= size
        )
        # Size 1 broadcasts where the dimension is not a constant.
        if outside and not ctx.maker.dead and (size != 1 or dim.axis is Axis.CONST):
            ctx.report.error(
                "A027",
                f"this index of `{name}` is always out of range",
                nodes[position].span,
                f"the dimension has size {size}" if size is not None else "never below 0",
                "indices start at 0",
            )
            good = False
        full.append(given)
    return tuple(full) if good else None


def _example(name: str, dims: tuple[Dim, ...]) -> str:
    shown = [dim for dim in dims if dim.axis not in _LEADING]
    return f"write `{name}[{', '.join('k' if dim.axis is Axis.K else '...' for dim in shown)}]`"


def _leading(dim: Dim, span: Span, ctx: Context) -> Scalar:
    var = ctx.maker.keep(Var(_LEADING[dim.axis]), span)
    return var if dim.block == 1 else ctx.maker.make(Binary("//", var, ctx.maker.const(dim.block, span)), span)


def _positions(decl: InputDecl, full: tuple[Scalar, ...], nodes: Sequence[ast.Expr], span: Span, ctx: Context) -> bool:
    first_given = len(decl.dims) - len(nodes)
    for position, (dim, e) in enumerate(zip(decl.dims, full, strict=True)):
        at = nodes[position - first_given].span if position >= first_given else span
        if dim.axis is Axis.Q and not _is_row(dim, e):
            wanted = "q" if dim.block == 1 else f"q // {dim.block}"
            ctx.report.error(
                "A028",
                f"this dimension of `{decl.name}` holds rows",
                at,
                f"indexed by `{wanted}` only",
                f"write `{wanted}`",
            )
            return False
        if dim.axis is Axis.K and ctx.align_start and reads(e, "q"):
            ctx.report.error(
                "A034",
                f"under `align start`, `{decl.name}` belongs to the keys and is read at q",
                at,
                "q and k count different sequences",
                "give it a `q` dimension, or read it at k",
            )
            return False
        if dim.axis is Axis.Q or dim.axis is Axis.K:
            rows_elsewhere = ctx.inside == "coarsen" and dim.axis is Axis.Q
            if ctx.inside and (ctx.inside != "coarsen" or rows_elsewhere):
                ctx.report.error(
                    "A031",
                    f"`{decl.name}` is indexed by positions and may not be read under `{ctx.inside}`",
                    span,
                    "positions are coordinates here",
                    f"intersect it outside: `(P {ctx.inside} ...) & {{ ... }}`"
                    if ctx.inside == "on"
                    else "read it outside",
                )
                return False
    if decl.type is Type.BOOL or ctx.use is not Use.SINK:
        return True
    if any(dim.axis is Axis.K for dim in decl.dims):
        ctx.report.error(
            "A035", f"a sink may not read `{decl.name}`", span, "it is indexed by k", "sinks read b, h, g, q"
        )
        return False
    return True


def _is_row(dim: Dim, e: Scalar) -> bool:
    if dim.block == 1:
        return e == Var("q")
    return isinstance(e, Binary) and e.op == "//" and e.left == Var("q") and e.right == Const(dim.block)
