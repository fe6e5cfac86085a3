"""Lowers `observe`: which probabilities of a branch are summed, or of which the largest is taken."""

from __future__ import annotations

from collections.abc import Iterable

from attndsl import syntax as ast
from attndsl.branches import Branch
from attndsl.diagnostics import Span
from attndsl.grammar.arguments import match_arguments
from attndsl.grammar.routing import classes_of, members_of, partition, probabilities, rows
from attndsl.grammar.scope import Context, ObservedRef
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.members import extent
from attndsl.observation import Observation


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
    members, classes = members_of(of, ctx), (1, None) if per is None else classes_of(per, ctx)
    if len(ctx.report.errors) > before:
        return None
    if members is None:
        # A partition of another kind: it was checked already.
        if partition(of, ctx):
            unsupported(Feature.PARTITIONS, of.span, ctx)
        return None
    if classes is None:
        assert per is not None
        rows(per, ctx)
        return None
    (keys, of_keys), (size, row_tiles) = members, classes
    found = Observation(
        clause.name, branch.id, largest, size or None, keys, clause.span, members=of_keys, row_tiles=row_tiles
    )  # fmt: skip
    return found if _fits(found, node, ctx) else None


def _fits(found: Observation, node: ast.Apply, ctx: Context) -> bool:
    """Refuses what is as large as all pairs."""
    tokens, each = (found.keys, 1) if found.members is None else extent(found.members)
    if found.rows == 1 and tokens == each:
        ctx.report.error(
            "A074", "the probability of each query and each token is as large as all pairs", node.span, "not reduced",
            "write `head` or `rows(64)`, or `blocks(64)` in the place of `tokens`",
        )  # fmt: skip
        return False
    return True


def check_observed(found: Iterable[Observation], branches: Iterable[Branch | None], ctx: Context) -> None:
    """Reports observations of branches that have no probabilities."""
    named = {branch.name: branch for branch in branches if branch is not None}
    for each in found:
        branch = named.get(each.branch)
        if branch is not None and (reason := branch.why_no_mass):
            ctx.report.error(
                "A076", f"`{each.branch}` has no probabilities: {reason}", each.span, "observed here",
                "observe a branch with a plain softmax",
            )  # fmt: skip
