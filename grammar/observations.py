"""Lowers `observe`: which probabilities of a branch are summed, or of which the largest is taken."""

from __future__ import annotations

from collections.abc import Iterable

from attndsl import syntax as ast
from attndsl.branches import Branch
from attndsl.diagnostics import Span
from attndsl.grammar.arguments import match_arguments
from attndsl.grammar.routing import keys_of, partition, probabilities, rows, rows_of
from attndsl.grammar.scope import Context, ObservedRef
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.observation import Observation

# Blocks of other sizes have no tiles that fit into them.
_STEP = 16


def observation(clause: ast.Observe, at: Span, ctx: Context) -> Observation | None:
    """What a clause observes under a name, which stands at `at`; None if a mistake was reported."""
    ctx.scope.declare(clause.name, ObservedRef(), at, ctx.report)
    node = clause.value
    if not isinstance(node, ast.Apply) or node.function != "probs":
        ctx.report.error(
            "A043", "`observe` reads probabilities", node.span, "here", "write `probs(branch, sum, head, tokens)`"
        )
        return None
    before = len(ctx.report.errors)
    if not probabilities(node, ctx):
        return None
    matched = match_arguments("probs", ("branch", "reduce", "per", "of"), node.args, node.span, ctx) or {}
    if "of" not in matched:
        help = "write `probs(branch, sum, head, tokens)`"
        ctx.report.error("A013", "`observe` needs row classes and members", node.span, "left out here", help)
        return None
    branch, reduce = matched["branch"].value, matched.get("reduce")
    assert isinstance(branch, ast.Name)
    largest = reduce is not None and reduce.value == ast.Name("max", reduce.value.span)
    of, per = matched["of"].value, matched["per"].value if "per" in matched else None
    members, row_class = keys_of(of, ctx), 1 if per is None else rows_of(per, ctx)
    if len(ctx.report.errors) > before:
        return None
    if members is None or row_class is None:
        # A partition of another kind: it was checked already.
        unknown = of if members is None else per
        assert unknown is not None
        good = partition(unknown, ctx) if members is None else rows(unknown, ctx)
        if good:
            unsupported(Feature.PARTITIONS, unknown.span, ctx)
        return None
    found = Observation(clause.name, branch.id, largest, row_class or None, members, clause.span)
    return found if _fits(found, node, ctx) else None


def _fits(found: Observation, node: ast.Apply, ctx: Context) -> bool:
    """Refuses what is as large as all pairs, and blocks for which there is no good kernel."""
    if found.rows == found.keys == 1:
        ctx.report.error(
            "A074", "the probability of each query and each token is as large as all pairs", node.span, "not reduced",
            "write `head` or `rows(64)`, or `blocks(64)` in the place of `tokens`",
        )  # fmt: skip
        return False
    for size in (found.rows or 1, found.keys):
        if size & (size - 1) and size % _STEP:
            ctx.report.error(
                "A075", f"blocks of {size} do not fit into tiles", node.span, f"{size} tokens",
                f"observe blocks of {-(-size // _STEP) * _STEP}: a power of two, or a multiple of {_STEP}",
            )  # fmt: skip
            return False
    return True


def check_observed(found: Iterable[Observation], branches: Iterable[Branch | None], ctx: Context) -> None:
    """Reports observations of branches that have no probabilities."""
    named = {branch.name: branch for branch in branches if branch is not None}
    for each in found:
        branch = named.get(each.branch)
        several = branch is not None and len(branch.parts) > 1
        if branch is not None and not several and (reason := branch.why_no_mass):
            ctx.report.error(
                "A076", f"`{each.branch}` has no probabilities: {reason}", each.span, "observed here",
                "observe a branch with a plain softmax",
            )  # fmt: skip
