"""Features that are parsed and checked, and not compiled yet: one stable code each."""

from __future__ import annotations

from enum import Enum

from attndsl.diagnostics import Span
from attndsl.grammar.scope import Context


class Feature(Enum):
    WITHIN = ("A904", "a softmax inside such members", "write `within blocks(B)`")
    PARTITIONS = (
        "A905",
        "selecting by these members or row classes",
        "write `blocks(B)`, `tokens`, `tiles(...)`, `segments(ids)` or `diagonals(B)`",
    )
    PACKED = (
        "A907",
        "`packed` around {}",
        "write `causal & document(doc)`: positions then count from the start of the batch entry",
    )

    @property
    def code(self) -> str:
        return self.value[0]


def unsupported(feature: Feature, span: Span, ctx: Context, around: str = "", why: str = "") -> None:
    """Reports a feature at its place, unless a constant condition has ruled the place out.

    around: what a clause does not go with; why: what the carets say of it.
    """
    if ctx.maker.dead:
        return
    code, what, help = feature.value
    ctx.report.error(code, f"{what.format(around)} is not yet supported", span, why, help)
