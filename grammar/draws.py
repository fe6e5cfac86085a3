"""`random`: its arguments, and what it draws among where the text leaves that to the place where it stands."""

from __future__ import annotations

from dataclasses import replace

from attndsl import syntax as ast
from attndsl.derivation import Random
from attndsl.diagnostics import Span
from attndsl.grammar import routing, sets
from attndsl.grammar.arguments import match_arguments
from attndsl.grammar.places import not_along
from attndsl.grammar.scalars import integer, static_int
from attndsl.grammar.scope import Context, Use
from attndsl.program import (
    Axis,
    Const,
    InputDecl,
    Read,
    Scalar,
    Selected,
    Set,
    Where,
    nodes,
    reads,
    scalars,
    walk,
)  # fmt: skip

_WORDS = ("n", "of", "per", "seed", "among")


def random(node: ast.Apply, ctx: Context) -> Set | None:
    """The set of a `random(n, of, per, seed)`; None if a mistake in it was reported.

    Without `among` it is left open here, and `settle` fills it in once the whole pattern is known.
    """
    matched = match_arguments("random", _WORDS, node.args, node.span, ctx)
    if matched is None:
        return None
    missing = [word for word in _WORDS[:4] if word not in matched]
    if missing:
        ctx.report.error(
            "A013", f"`random` needs `{missing[0]}`", node.span, "left out here", "write `random(n, of, per, seed)`"
        )
        return None
    if ctx.along:
        not_along("random", node.span, ctx)
        return None
    ctx.maker.term(node.span)
    written = matched.get("among")
    if ctx.among and written is None and not ctx.maker.dead:
        ctx.report.error(
            "A044",
            f"`random` in {ctx.among} must say what it draws among",
            node.span,
            "no `among`",
            "write `among = causal`",
        )
    count = static_int(matched["n"].value, ctx, "`n`")
    keys = _keys(matched["of"].value, ctx)
    rows = _rows(matched["per"].value, ctx)
    seed = _seed(matched["seed"].value, ctx.of(Use.SEED))
    among: Set | None = Where(Const(True))
    if written is not None:
        among = sets.pattern_set(written.value, replace(ctx, among="an option"))
    if count is None or keys is None or rows is None or seed is None or among is None:
        return None
    found = Random(count, keys, rows or None, seed, among, written is not None, node.span)
    return found if written is None or rows_are_known(found, ctx.maker.inputs, ctx) else None


def _seed(node: ast.Expr, ctx: Context) -> Scalar | None:
    """An int of the head; an input with a `q` dimension reads q without saying so."""
    seed = integer(node, ctx)
    if seed is not None and reads(seed, "q"):
        ctx.report.error("A035", "a seed may not read `q`", node.span, "it has a row", "draw for a head, not for a row")
        return None
    return seed


def _keys(node: ast.Expr, ctx: Context) -> int | None:
    """Keys of a member."""
    before = len(ctx.report.errors)
    found = routing.keys_of(node, ctx)
    if found is None and len(ctx.report.errors) == before and routing.partition(node, ctx):
        _refused(node.span, "keys", "write `tokens` or `blocks(64)`", ctx)
    return found


def _rows(node: ast.Expr, ctx: Context) -> int | None:
    """Rows of a row class; 0 for all of them."""
    before = len(ctx.report.errors)
    found = routing.rows_of(node, ctx)
    if found is None and len(ctx.report.errors) == before and routing.rows(node, ctx):
        _refused(node.span, "rows", "write `query`, `rows(64)` or `head`", ctx)
    return found


def _refused(span: Span, what: str, help: str, ctx: Context) -> None:
    ctx.report.error("A043", f"`random` does not divide the {what} so", span, "not for `random`", help)


def rows_are_known(found: Random, inputs: dict[str, InputDecl], ctx: Context) -> bool:
    """Rows beyond those of the call decide the candidates of a block of rows: what belongs to a call's rows may not."""
    if found.rows == 1 or found.span is None:
        return True
    found_in = {e.input for root in scalars(found.among) for e in walk(root) if isinstance(e, Read)}
    found_in |= {p.plan for p in nodes(found.among) if isinstance(p, Selected)}
    rows = sorted(n for n in found_in if any(d.axis is Axis.Q and d.block == 1 for d in inputs[n].dims))
    if rows:
        ctx.report.error(
            "A031",
            f"`{rows[0]}` holds the rows of a call, and `random` draws for rows beyond them",
            found.span,
            f"its candidates read `{rows[0]}`",
            "write `per = query`, or `among` without it",
        )
    return not rows
