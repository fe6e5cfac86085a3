"""The parts of a selection: how it divides keys and rows, and what ranks its members (`by`)."""

from __future__ import annotations

from dataclasses import replace

from attndsl import syntax as ast
from attndsl.diagnostics import Span
from attndsl.grammar.arguments import match_arguments
from attndsl.grammar.indexing import read_input, read_table
from attndsl.grammar.places import place_of, tiles
from attndsl.grammar.report import nearest
from attndsl.grammar.scalars import number, static_int
from attndsl.grammar.scope import BranchRef, Context, InputRef, Poison, TableRef
from attndsl.members import Lags, Members, Placed, Runs, Tiles
from attndsl.program import Axis, Binary, Const, Dim, InputDecl, Permuted, Scalar, Type, Var
from attndsl.selection import Antidiagonal, Bound, Dot, Given, Pool, Probs, Score, Vectors

_POOLS = tuple(pool.value for pool in Pool)


# --------------------------------------------------------------------------------------- division


def partition(node: ast.Expr, ctx: Context) -> bool:
    """Checks `of`: how the keys are divided into members."""
    match node:
        case ast.Name(id="tokens"):
            return True
        case ast.Apply(function="blocks" | "diagonals", args=[ast.Argument(name=None, value=size)]):
            return static_int(size, ctx, "a block size") is not None
        case ast.Apply(function="segments", args=[ast.Argument(name=None, value=ids)]):
            return _placed_by(ids, ctx) is not None
        case ast.Apply(function="tiles"):
            return tiles(node, ctx) is not None
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
            return tiles(node, ctx) is not None
        case _:
            help = "write `query`, `rows(64)`, `head` or `tiles(...)`"
            ctx.report.error("A043", "this does not divide the rows", node.span, "unknown row class", help)
            return False


def keys_of(node: ast.Expr, ctx: Context) -> int | None:
    """Keys of a member, for a partition into tokens or blocks; None if it is another, or wrong."""
    match node:
        case ast.Name(id="tokens"):
            return 1
        case ast.Apply(function="blocks", args=[ast.Argument(name=None, value=size)]):
            return static_int(size, ctx, "a block size")
        case _:
            return None


def _placed_by(ids: ast.Expr, ctx: Context) -> Permuted | None:
    found = place_of(ast.Apply("permuted", (ast.Argument(None, ids, ids.span),), ids.span, ids.span), ctx)
    return found if isinstance(found, Permuted) else None


def members_of(node: ast.Expr, ctx: Context) -> tuple[int, Members | None] | None:
    """Keys of a member, and the members where they are no blocks in a row (one that has any number of keys counts 1);
    None where they are not supported, or wrong."""
    match node:
        case ast.Apply(function="tiles"):
            found = tiles(node, ctx)
            return None if found is None else _of_tiles(found)
        case ast.Apply(function="segments", args=[ast.Argument(name=None, value=ids)]):
            place = _placed_by(ids, ctx)
            return None if place is None else (1, Runs(place.input, place.lead))
        case ast.Apply(function="diagonals", args=[ast.Argument(name=None, value=size)]):
            width = static_int(size, ctx, "a block size")
            return None if width is None else (width, Lags(width))
        case ast.Place(operand=ast.Apply(function="segments") as operand, place=place_node):
            of, placed = members_of(operand, ctx), place_of(place_node, ctx)
            if of is None or not isinstance(placed, Permuted) or not isinstance(of[1], Runs):
                return None
            return 1, replace(of[1], order=Placed(1, placed.input, placed.lead))
        case ast.Place(operand=ast.Name() | ast.Apply(function="blocks" | "tiles") as operand, place=place_node):
            of, placed = members_of(operand, ctx), place_of(place_node, ctx)
            if of is None or not isinstance(placed, Permuted):
                return None
            tiles_of = of[1] if isinstance(of[1], Tiles) else None
            return of[0], Placed(of[0], placed.input, placed.lead, tiles_of)
        case _:
            keys = keys_of(node, ctx)
            return None if keys is None else (keys, None)


def _of_tiles(found: Tiles) -> tuple[int, Tiles | None]:
    """Tiles that are those in whose order tokens run are blocks of tokens in a row."""
    in_order = found.tokens == 1 or (found.grid.first == 0 and found.grid.tiles == found.sizes)
    return found.tokens, None if in_order else found


def classes_of(node: ast.Expr, ctx: Context) -> tuple[int, Tiles | None] | None:
    """Rows of a row class, 0 for all of them, and the tiles that classes are; None if it is wrong."""
    if isinstance(node, ast.Apply) and node.function == "tiles":
        found = tiles(node, ctx)
        return None if found is None else _of_tiles(found)
    size = rows_of(node, ctx)
    return None if size is None else (size, None)


def rows_of(node: ast.Expr, ctx: Context) -> int | None:
    """Rows of a row class, 0 for all of them; None if the classes are others, or wrong."""
    match node:
        case ast.Name(id="query"):
            return 1
        case ast.Name(id="head"):
            return 0
        case ast.Apply(function="rows", args=[ast.Argument(name=None, value=size)]):
            return static_int(size, ctx, "a block size")
        case _:
            return None


# ----------------------------------------------------------------------------------------- scores


def routing_score(node: ast.Expr, keys: int, rows: int, ctx: Context) -> Score | None:
    """What ranks members of `keys` tokens for classes of `rows` rows (0: of any number); None if a mistake was
    reported."""
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
                return None
            if name == "antidiagonal":
                return _antidiagonal(node, keys, rows, ctx)
            x = vectors(args[0].value, "Q", rows, ctx)
            y = [vectors(arg.value, "K", keys, ctx) for arg in args[1:]]
            found = [each for each in y if each is not None]
            if x is None or len(found) < len(y):
                return None
            return Dot(x, found[0]) if name == "dot" else Bound(x, found[0], found[1])
        case ast.Apply(function="probs"):
            return branch_mass(node, ctx)
        case ast.Name(id=name) if isinstance(bound := ctx.scope.find(name), InputRef | TableRef):
            value = _entry(bound, node.span, keys or 1, rows, ctx)
        case _:
            value = number(node, ctx)
    return None if value is None else Given(value)


def _antidiagonal(node: ast.Apply, keys: int, rows: int, ctx: Context) -> Antidiagonal | None:
    for arg, name in zip(node.args, "QK", strict=False):
        if arg.value != ast.Name(name, arg.value.span):
            ctx.report.error(
                "A043", f"`antidiagonal` takes {name} itself", arg.span, "here", "write `antidiagonal(Q, K, 16)`"
            )
            return None
    stride = static_int(node.args[2].value, ctx, "a stride")
    if stride is None:
        return None
    if keys % stride or rows % stride or not rows or not keys:
        ctx.report.error(
            "A070",
            f"groups of {stride} tokens do not divide the row classes and members",
            node.span,
            "blocks of another size",
            "write `per = rows(B)` and `blocks(B)` with a multiple of the stride",
        )
        return None
    return Antidiagonal(stride)


def vectors(node: ast.Expr, which: str, size: int, ctx: Context) -> Vectors | None:
    """The vectors of row classes (`which` is Q) or of members (K) of `size` tokens (0: any number)."""
    match node:
        case ast.Name(id="Q" | "K" as name) if name == which:
            return _fits(Vectors(name), which, size, node.span, ctx)
        case ast.Apply(function=pooler, args=[ast.Argument(name=None, value=ast.Name(id=name))]) if pooler in _POOLS:
            pool = Pool(pooler)
            if name == which:
                return Vectors(name, pool)
            match ctx.scope.find(name):
                case InputRef(decl=decl):
                    return _input_vectors(Vectors(name, pool), decl, which, size, node.span, ctx)
                case Poison():
                    return None
                case None if name not in ("Q", "K", "V"):
                    ctx.unknown(name, node.span)
                    return None
        case ast.Name(id=name) if isinstance(bound := ctx.scope.find(name), InputRef | Poison):
            if isinstance(bound, Poison):
                return None
            return _input_vectors(Vectors(name), bound.decl, which, size, node.span, ctx)
        case ast.Name(id=name) if ctx.scope.find(name) is None and name not in ("Q", "K", "V"):
            ctx.unknown(name, node.span)
            return None
    help = f"write `{which}`, `mean({which})` or an input"
    ctx.report.error("A043", f"this is not made of {which}", node.span, "unknown vectors", help)
    return None


def _fits(found: Vectors, which: str, size: int, span: Span, ctx: Context) -> Vectors | None:
    """Vectors of single tokens, if the row classes or members are that."""
    if size == 1:
        return found
    what = "a row class" if which == "Q" else "a member"
    ctx.report.error(
        "A070",
        f"{what} has many tokens, and one vector is wanted",
        span,
        "one a token",
        f"write `mean({found.source})`",
    )
    return None


def _input_vectors(found: Vectors, decl: InputDecl, which: str, size: int, span: Span, ctx: Context) -> Vectors | None:
    axis = Axis.Q if which == "Q" else Axis.K
    along = [d for d in decl.dims if d.axis is axis]
    lead = [d.axis for d in decl.dims[:-2]]
    good = decl.type is Type.FLOAT and len(along) == 1 and decl.dims[-2] == along[0] and decl.dims[-1].axis is Axis.D
    good = good and lead in ([], [Axis.B], [Axis.H], [Axis.G], [Axis.B, Axis.H], [Axis.B, Axis.G])
    if good and along[0].block == 1:
        if found.pool is None:
            return _fits(found, which, size, span, ctx)
        # The rows of a call are not those of a whole class.
        good = which == "K"
        if good:
            return found
    if good and along[0].block == size and found.pool is None:
        return found
    name = "q" if which == "Q" else "k"
    wanted = f"{name}/{size}" if size > 1 else name
    ctx.report.error(
        "A070", f"`{found.source}` does not hold these vectors", span, "other dimensions than wanted",
        f"declare it `float[b, {'h' if which == 'Q' else 'g'}, {wanted}, D]`",
    )  # fmt: skip
    return None


def _entry(bound: InputRef | TableRef, span: Span, keys: int, rows: int, ctx: Context) -> Scalar | None:
    """A tensor over rows and members: its own dimensions say which entry is meant."""
    decl = bound.decl
    index = list[Scalar | None]()
    for dim in decl.dims:
        entry = _own(dim, span, ctx)
        size = {Axis.Q: rows, Axis.K: keys}.get(dim.axis, 1)
        if entry is None or (dim.axis in (Axis.Q, Axis.K) and (not size or dim.block % size)):
            what = "row classes" if dim.axis is Axis.Q else "members"
            help = "declare it over blocks, as `float[b, h, q/64, k/64]`, or write out which entry: `x[q, k // 64]`"
            ctx.report.error("A070", f"`{decl.name}` has no entry for each of the {what}", span, "here", help)
            return None
        index.append(entry)
    at = [ast.Name(decl.name, span)] * len(index)
    if isinstance(bound, TableRef):
        return read_table(bound.decl, at, span, ctx, index)
    return read_input(bound.decl, at, span, ctx, index)


def _own(dim: Dim, span: Span, ctx: Context) -> Scalar | None:
    """The index that a dimension stands for."""
    name = {Axis.B: "b", Axis.H: "h", Axis.G: "g", Axis.Q: "q", Axis.K: "k"}.get(dim.axis)
    if name is None:
        return None
    var = ctx.maker.keep(Var(name), span)
    if dim.block == 1:
        return var
    return ctx.maker.keep(Binary("//", var, ctx.maker.keep(Const(dim.block), span)), span)


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


def branch_mass(node: ast.Apply, ctx: Context) -> Probs | None:
    """The mass `probs(branch, sum | max)`."""
    if not probabilities(node, ctx):
        return None
    matched = match_arguments("probs", ("branch", "reduce", "per", "of"), node.args, node.span, ctx) or {}
    branch, reduce = matched["branch"].value, matched.get("reduce")
    assert isinstance(branch, ast.Name)
    return Probs(branch.id, reduce is not None and reduce.value == ast.Name("max", reduce.value.span))


def nearest_word(node: ast.Expr, words: tuple[str, ...]) -> str:
    """What to write in the place of an unknown word."""
    near = nearest(node.id, words) if isinstance(node, ast.Name) else ""
    return near or f"write {', '.join(words[:-1])} or {words[-1]}"
