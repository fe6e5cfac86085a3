"""Lowers `within ... with probs(...)`: a softmax inside each member, and one over the members."""

from __future__ import annotations

from collections.abc import Iterable

from attndsl import syntax as ast
from attndsl.branches import Branch, Within
from attndsl.diagnostics import Span
from attndsl.grammar.arguments import match_arguments
from attndsl.grammar.routing import keys_of, partition, probabilities
from attndsl.grammar.scope import Context
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.program import Read, reads, walk


def two_levels(part: ast.Part, ctx: Context) -> Within | None:
    """What a part says after `within`; None where it says nothing, or a mistake in it was reported."""
    if part.within is None or part.weight is None:
        return None
    good = partition(part.within, ctx)
    if not (isinstance(part.weight, ast.Apply) and part.weight.function == "probs"):
        ctx.report.error(
            "A043", "`with` takes the probabilities of a branch", part.weight.span, "here", "write `with probs(name)`"
        )
        return None
    if not (probabilities(part.weight, ctx) and good):
        return None
    matched = match_arguments("probs", ("branch", "reduce", "per", "of"), part.weight.args, part.weight.span, ctx) or {}
    branch, rest = matched["branch"].value, [arg for name, arg in matched.items() if name != "branch"]
    assert isinstance(branch, ast.Name)
    if rest:
        ctx.report.error(
            "A043", "members weigh the sum of their probabilities, for each query", rest[0].span, "left to nobody",
            f"write `with probs({branch.id})`",
        )  # fmt: skip
        return None
    if part.over is not None or part.queries is not None:
        at = (part.over or part.queries or part.within).span
        _error("two levels are of raw tokens", at, "not raw tokens", ctx)
        return None
    keys = keys_of(part.within, ctx)
    if keys is None:
        unsupported(Feature.WITHIN, part.within.span, ctx)
        return None
    return Within(keys, branch.id)


def check_two_levels(branches: Iterable[Branch | None], ctx: Context) -> None:
    """Reports what a branch of two levels says beside them, and probabilities that there are not."""
    named = {branch.name: branch for branch in branches if branch is not None}
    for branch in named.values():
        found = next((part for part in branch.parts if part.within is not None), None)
        if found is None or found.within is None or found.span is None:
            continue
        if len(branch.parts) > 1:
            _error("two levels stand alone in their branch", found.span, "beside other parts", ctx)
        said = {"sink": branch.sink, "weights": branch.weights, "skip": branch.skip}
        if clause := next((word for word, e in said.items() if e is not None), None):
            _error(f"two levels have no `{clause}`", found.span, "the softmax is that of each member", ctx)
        scores = [] if branch.score is None else [x for x in walk(branch.score) if isinstance(x, Read)]
        both = [x for x in scores if reads(x, "q") and reads(x, "k") and ctx.maker.inputs[x.input].learnable]
        if both:
            # Its sums go over tiles of another shape.
            what = f"two levels learn nothing that q and k read together, as `{both[0].input}`"
            _error(what, found.span, "with this score", ctx)
        by = named.get(found.within.branch)
        if by is not None and (reason := by.why_no_mass):
            _error(f"the probabilities of `{by.name}` weigh nothing: {reason}", found.span, "weighed by them", ctx)


def _error(message: str, span: Span, label: str, ctx: Context) -> None:
    help = "weigh by a branch of a plain softmax, and attend to anything else in a branch of its own"
    ctx.report.error("A077", message, span, label, help)
