"""Divisors must be positive: by their bounds, or by a condition that guards them."""

from __future__ import annotations

from attndsl.diagnostics import Span
from attndsl.grammar.make import reads_inputs
from attndsl.grammar.scope import Context
from attndsl.program import Compare, Const, Scalar


def divisor_may_stand(op: str, e: Scalar, span: Span, ctx: Context) -> bool:
    """Whether a division by it may stand; positive, or data (with a warning)."""
    if ctx.maker.dead:
        return True
    if op == "/":
        if isinstance(e, Const) and e.value == 0:
            ctx.report.error("A025", "division by zero", span, "this is 0", "divide by something else")
            return False
        return True
    bounds = ctx.maker.bounds(e)
    if (bounds.low is not None and bounds.low > 0) or any(_implies_positive(fact, e, ctx) for fact in ctx.known):
        return True
    if (bounds.high is not None and bounds.high <= 0) or not reads_inputs(e):
        label = f"this is {e.value}" if isinstance(e, Const) else "this may be 0 or less"
        help = "write a number of at least 1" if isinstance(e, Const) else "write `max(1, ...)`"
        ctx.report.error("A025", "a divisor must be provably positive", span, label, help)
        return False
    ctx.report.warning(
        "A801",
        "this divisor is known only at run time",
        span,
        "masked pair by pair: no tile is skipped for it",
        "make it a parameter, or write `max(1, ...)` if it may be 0",
    )
    return True


def _implies_positive(fact: Scalar, e: Scalar, ctx: Context) -> bool:
    match fact:
        case Compare(op=op, left=left, right=Const(value=int(bound))) if left == e:
            nonnegative = (low := ctx.maker.bounds(e).low) is not None and low >= 0
            return (op, bound) == (">=", 1) or (op == ">" and bound >= 0) or (op == "!=" and bound == 0 and nonnegative)
        case Compare(op=op, left=Const(value=int(bound)), right=right) if right == e:
            return (op == "<" and bound >= 0) or (op == "<=" and bound >= 1)
        case _:
            return False


_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def negated(e: Scalar) -> tuple[Scalar, ...]:
    """What is known where a condition does not hold."""
    return (Compare(_NEGATED[e.op], e.left, e.right),) if isinstance(e, Compare) else ()
