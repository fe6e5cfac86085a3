"""Features that are parsed and checked, and not compiled yet: one stable code each."""

from __future__ import annotations

from enum import Enum

from attndsl.diagnostics import Span
from attndsl.grammar.scope import Context


class Feature(Enum):
    POOLED_QUERIES = (
        "A903",
        "pooled queries of raw tokens",
        "pool the keys too: `over pool(mean, 64) from pool(mean, 64)`",
    )
    WITHIN = ("A904", "a softmax inside such members", "write `within blocks(B)`, B a power of two from 16 to 256")
    PARTITIONS = (
        "A905",
        "selecting by these members or row classes",
        "write `blocks(B)`, `tokens`, `tiles(...)` or `segments(ids)`, and of diagonals `per = head`",
    )
    PACKED = (
        "A907",
        "`packed` around views, selections, `within`, `observe`, `skip below`, `coarsen`, `random` or blocks of inputs",
        "write `causal & document(doc)`: positions then count from the start of the batch entry",
    )
    LENGTHS = (
        "A908",
        "`lengths` around `observe`, `skip below`, `within`, pooled queries, `fraction` or members that are no blocks",
        "write `{ q < n[b] and k < n[b] }`",
    )
    SKIP = ("A909", "`skip below` over views and several parts", "skip in a branch over raw tokens")

    @property
    def code(self) -> str:
        return self.value[0]


def unsupported(feature: Feature, span: Span, ctx: Context) -> None:
    """Reports a feature at its place, unless a constant condition has ruled the place out."""
    if ctx.maker.dead:
        return
    code, what, help = feature.value
    ctx.report.error(code, f"{what} is not yet supported", span, help=help)
