"""Features that are parsed and checked, and not compiled yet: one stable code each."""

from __future__ import annotations

from enum import Enum

from attndsl.diagnostics import Span
from attndsl.grammar.scope import Context


class Feature(Enum):
    AXES = ("A901", "grids (`axes`)", "write coordinates out: `q // 64 == k // 64` for rows of 64")
    VIEWS = ("A902", "attending `over` a view", "pool the keys outside and pass them as k and v")
    POOLED_QUERIES = ("A903", "`from` pooled queries", "pool the queries outside")
    WITHIN = ("A904", "`within`", "run one attention per member and combine the outputs")
    SELECTIONS = ("A905", "attending a selection", "choose outside, and pass a bool input over blocks")
    PARTITIONS = (
        "A905",
        "selecting by these members or row classes",
        "write `blocks(B)` or `tokens`, `rows(B)` or `query`",
    )
    COMPETE = ("A905", "a `cover` over more than a row class", "write `compete = row`, or leave it out")
    PLAN_INPUTS = ("A906", "an input that holds a plan", "pass a bool input, as `keep : bool[b, k/64]`")
    PACKED = (
        "A907",
        "`packed`",
        "write `causal & document(doc)`: positions then count from the start of the batch entry",
    )
    LENGTHS = ("A908", "`lengths`", "write `{ q < n[b] and k < n[b] }`")
    SKIP = ("A909", "`skip below`", "leave it out: the result is then exact")
    OBSERVE = ("A910", "`observe`", "compute the probabilities from `return_lse`")
    BRANCHES = ("A911", "combining branches", "compile one attention per branch and combine the outputs")

    @property
    def code(self) -> str:
        return self.value[0]


def unsupported(feature: Feature, span: Span, ctx: Context) -> None:
    """Reports a feature at its place, unless a constant condition has ruled the place out."""
    if ctx.maker.dead:
        return
    code, what, help = feature.value
    ctx.report.error(
        code, f"{what} is not yet supported" if what[0] != "g" else f"{what} are not yet supported", span, help=help
    )
