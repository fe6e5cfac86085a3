"""Matches the arguments of a call, positional or named, with what is declared."""

from __future__ import annotations

from attndsl import syntax as ast
from attndsl.diagnostics import Span
from attndsl.grammar.report import nearest
from attndsl.grammar.scope import Context


def match_arguments(
    name: str, params: tuple[str, ...], args: tuple[ast.Argument, ...], span: Span, ctx: Context
) -> dict[str, ast.Argument] | None:
    """Arguments by parameter name; None if they do not fit (reported)."""
    matched: dict[str, ast.Argument] = {}
    good = True
    for position, arg in enumerate(args):
        if arg.name is None:
            if position >= len(params):
                shown = f"`{name}({', '.join(params)})`" if params else f"`{name}`, without arguments"
                ctx.report.error(
                    "A013", f"`{name}` takes {_count(len(params))}", arg.span, "one too many", f"write {shown}"
                )
                good = False
                break
            key = params[position]
        else:
            key = arg.name
            if key not in params:
                help = nearest(key, params) or (f"it has {', '.join(params)}" if params else "it has no arguments")
                ctx.report.error("A013", f"`{name}` has no argument `{key}`", arg.span, "unknown argument", help)
                good = False
                continue
        if key in matched:
            ctx.report.error("A013", f"`{key}` is given twice", arg.span, "again here", "give each argument once")
            good = False
            continue
        matched[key] = arg
    return matched if good else None


def _count(n: int) -> str:
    return "no arguments" if n == 0 else f"at most {n} argument{'s' * (n != 1)}"
