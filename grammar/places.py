"""The coordinates after `on`."""

from __future__ import annotations

from attndsl import syntax as ast
from attndsl.derivation import Segment
from attndsl.diagnostics import Span
from attndsl.grammar.scalars import static_int
from attndsl.grammar.scope import AxisRef, Context, InputRef, Poison
from attndsl.grid import Along, Grid
from attndsl.members import Tiles
from attndsl.program import Axis, Blocks, InputDecl, Permuted, Place, Scalar, Type, Var

_LEAD = {Axis.B: "b", Axis.H: "h", Axis.G: "g"}


def places_of(node: ast.Expr, ctx: Context) -> tuple[tuple[Place, ...], ...] | None:
    """The places of an expression, several for a tuple of axes or tiles, each with what is placed by it next; None if
    it is wrong (reported)."""
    match node:
        case ast.Group(items=items) if items:
            axes = [_axis(item, ctx) for item in items]
            good = tuple((x,) for x in axes if x is not None)
            return good if len(good) == len(axes) else None
        case ast.Apply(function="tiles"):
            found = tiles(node, ctx)
            if found is None or not _tokens_here(node, ctx):
                return None
            return tuple((Along(found.grid, axis), Blocks(size)) for axis, size in enumerate(found.sizes))
        case _:
            place = place_of(node, ctx)
            return None if place is None else ((place,),)


def place_of(node: ast.Expr, ctx: Context) -> Place | None:
    """The place of an expression that is one; None if it is wrong (reported)."""
    match node:
        case ast.Apply(function="blocks", args=[ast.Argument(name=None | "size", value=value)]):
            size = static_int(value, ctx, "a block size")
            return None if size is None else Blocks(size)
        case ast.Apply(function="permuted", args=[ast.Argument(name=None, value=ast.Name() as name)]):
            return _permuted(name, ctx)
        case ast.Apply(function="segment", args=[ast.Argument(name=None, value=ast.Name() as name)]):
            found = _permuted(name, ctx)
            return None if found is None else Segment(found.input, found.lead)
        case ast.Name(id=name):
            bound = ctx.scope.find(name)
            if isinstance(bound, AxisRef):
                return _axis(node, ctx)
            if isinstance(bound, Poison):
                return None
            if isinstance(bound, InputRef):
                return _permuted(node, ctx)
            if bound is None and name not in ("tokens", "q", "k"):
                ctx.unknown(name, node.span)
                return None
        case _:
            pass
    ctx.report.error(
        "A045", "this is not a place", node.span, "after `on`", "write `blocks(64)`, an axis, or an int input of tokens"
    )
    return None


def tiles(node: ast.Apply, ctx: Context) -> Tiles | None:
    """`tiles(a, b)`, one size an axis; None if it is wrong (reported)."""
    axes = sum(isinstance(ctx.scope.find(name), AxisRef) for name in ctx.scope.names())
    sizes = [static_int(arg.value, ctx, "a tile size") for arg in node.args]
    if not axes:
        ctx.report.error("A045", "`tiles` needs axes", node.span, "there is no grid", "declare it: `axes y, x[64]`")
        return None
    if len(sizes) != axes:
        ctx.report.error(
            "A013", f"`tiles` takes one size for each of {axes} axes", node.span, f"{len(sizes)} given",
            "add sizes" if len(sizes) < axes else "leave some out",
        )  # fmt: skip
        return None
    grid, known = grid_of(ctx), tuple(size for size in sizes if size is not None)
    return None if grid is None or len(known) < axes else Tiles(grid, known)


def grid_of(ctx: Context) -> Grid | None:
    """The grid that is declared here; None if there is none, or a mistake in it was reported."""
    found = (ctx.scope.find(name) for name in ctx.scope.names())
    return next((axis.grid for axis in found if isinstance(axis, AxisRef)), None)


def not_along(what: str, span: Span, ctx: Context) -> None:
    """Reports what chooses among tokens, and stands where positions are coordinates along an axis."""
    ctx.report.error(
        "A031", f"`{what}` chooses among tokens and may not stand under an axis", span, "coordinates here",
        "intersect it outside: `(P on y) & ...`",
    )  # fmt: skip


def _axis(node: ast.Expr, ctx: Context) -> Along | None:
    axis = ctx.scope.find(node.id) if isinstance(node, ast.Name) else None
    if isinstance(axis, Poison):
        return None
    if not isinstance(axis, AxisRef):
        ctx.report.error(
            "A045", "a tuple of places holds axes", node.span, "not an axis", "declare it: `axes y, x[64]`"
        )
        return None
    return None if axis.grid is None or not _tokens_here(node, ctx) else Along(axis.grid, axis.axis)


def _tokens_here(node: ast.Expr, ctx: Context) -> bool:
    if ctx.inside != "on":
        return True
    ctx.report.error(
        "A031", "an axis places tokens and may not stand under `on`", node.span, "no tokens here",
        "write it last: `P on blocks(4) on y` places by y first",
    )  # fmt: skip
    return False


def _permuted(node: ast.Name, ctx: Context) -> Permuted | None:
    bound = ctx.scope.find(node.id)
    if isinstance(bound, Poison):
        return None
    if bound is None:
        ctx.unknown(node.id, node.span)
        return None
    if not isinstance(bound, InputRef) or not _places_tokens(bound.decl):
        ctx.report.error(
            "A045", f"`{node.id}` does not place tokens", node.span, "after `on`", "declare it: `input pi : int[b, k]`"
        )
        return None
    if ctx.align_start:
        ctx.report.error(
            "A034",
            f"under `align start`, `{node.id}` belongs to the keys and cannot place queries",
            node.span,
            "q and k count different sequences",
            "write a condition that reads it at k",
        )
        return None
    if ctx.inside == "on":
        ctx.report.error(
            "A031",
            f"`{node.id}` is indexed by positions and may not be read under `on`",
            node.span,
            "coordinates here",
            "write it last: `P on blocks(4) on pi` places by pi first",
        )
        return None
    lead: list[Scalar] = [ctx.maker.keep(Var(_LEAD[dim.axis]), node.span) for dim in bound.decl.dims[:-1]]
    return Permuted(bound.decl.name, tuple(lead))


def _places_tokens(decl: InputDecl) -> bool:
    if decl.type is not Type.INT or not decl.dims:
        return False
    *lead, last = decl.dims
    return last.axis is Axis.K and last.block == 1 and all(dim.axis in _LEAD for dim in lead)
