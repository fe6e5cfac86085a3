"""Warnings about parts and branches, each with a witness.

    W304  a part over segments shows rows the segment that they are in, as far as it has come
    W306  two parts of one softmax reach the same token, which then counts twice
    W307  a part's pattern allows a token that no part reaches
    W308  a branch sees later tokens, beside branches that do not

A part over a view reaches the tokens of the entries that rows see. What depends on data, or is too hard to decide, is
passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import islpy as isl

from attndsl.branches import Branch, Part
from attndsl.derive import derive
from attndsl.diagnostics import Diagnostic, PatternError, Severity
from attndsl.effort import TooHard, bounded
from attndsl.program import Program
from attndsl.relation import Lowering
from attndsl.view_plans import seen_entries


def part_findings(program: Program) -> tuple[Diagnostic, ...]:
    """Warnings about a program of several parts or branches, in the order of the text.

    >>> from attndsl.grammar import load
    >>> found = part_findings(load("attention a { attend causal & window(4), causal over pool(mean, 2) }").program)
    >>> found[0].notes
    ('row q = 1 at Nk = 2 reaches k = 0 in both',)
    """
    if program.plain or program.align_start:
        return ()
    branches = [_Branch(program, branch) for branch in program.branches]
    found = [x for branch in branches for x in branch.findings()]
    # Beside no other, a branch may see what it likes.
    futures = [branch.future() for branch in branches] if len(branches) > 1 else []
    if "" in futures:
        for branch, witness in zip(program.branches, futures, strict=True):
            if witness:
                found.append(_warning(
                    "W308", "a branch sees later tokens, and others do not", branch.span, "sees the future", witness,
                    "intersect its pattern with `causal`",
                ))  # fmt: skip
    return tuple(found)


def _warning(code: str, message: str, span: Any, label: str, note: str, help: str) -> Diagnostic:
    return Diagnostic(code, Severity.WARNING, message, span, label, help, (note,))


class _Branch:
    """The parts of a branch as relations of rows and tokens."""

    def __init__(self, program: Program, branch: Branch) -> None:
        # What holds of a document alone holds in a packed call.
        self.program = derive(replace(program, branches=(branch,), output=None, packed=None))
        self.parts = self.program.only.parts
        self.lowering = Lowering(self.program)
        self.existing = self.lowering.set("[Nk] -> { [q, k] : 0 <= q < Nk and 0 <= k < Nk }")
        self._reached: dict[Part, isl.Set | None] = {}

    def findings(self) -> Iterator[Diagnostic]:
        for part in self.parts:
            if part.view is not None and part.view.runs is not None and (witness := self.ending(part)):
                yield _warning(
                    "W304", "a decode differs from a longer prefill", part.span, "rows see segments that they are in",
                    f"{witness}, and a later token may go on with its segment",
                    "let rows see what lies before: `{ k < q }`",
                )  # fmt: skip
        if len(self.parts) < 2:
            return
        reached = [self.reached(part) for part in self.parts]
        for (_, first), (part, second) in combinations(zip(self.parts, reached, strict=True), 2):
            if first is not None and second is not None and (witness := self.least(first, second, isl.Set.intersect)):
                yield _warning(
                    "W306", "two parts reach the same token, which counts twice", part.span, "reached before",
                    f"{witness} in both", "split them, for example on entry boundaries",
                )  # fmt: skip
        known = [x for x in reached if x is not None]
        if len(known) < len(reached):
            return
        # Of raw tokens a part reaches those that it allows.
        for part in (part for part in self.parts if part.view is not None):
            allowed = self.allowed(part)
            if allowed is not None and (witness := self.least(allowed, self.all(known), isl.Set.subtract)):
                yield _warning(
                    "W307", "this pattern allows a token that no part reaches", part.span, "not as a whole entry",
                    f"{witness} in none", "split patterns on entry boundaries: `{ q // 16 - k // 16 < 8 }`",
                )  # fmt: skip
                return

    def ending(self, part: Part) -> str:
        """A row of a causal pattern that sees a segment up to its own token, empty where none does or data decides."""
        allowed = self.allowed(part)
        future = self.lowering.set("{ [q, k] : k > q }")
        if allowed is None or self.least(allowed, future, isl.Set.intersect):
            return ""
        return self.least(allowed, self.lowering.set("{ [q, k] : k = q }"), isl.Set.intersect)

    def allowed(self, part: Part) -> isl.Set | None:
        """The pairs of a row and an existing token that a part's pattern allows, None where data decides."""
        relation = self.lowering.relation(part.pattern)
        return None if relation.atoms or relation.uniform else relation.pairs.intersect(self.existing)

    def reached(self, part: Part) -> isl.Set | None:
        """The pairs of a row and a token that a part reaches, None where data decides or it is too hard to say."""
        if part not in self._reached:
            self._reached[part] = self._reach(part)
        return self._reached[part]

    def _reach(self, part: Part) -> isl.Set | None:
        if part.view is None:
            return self.allowed(part)
        if part.view.told:
            return None
        stride, size = part.view.stride, part.view.size
        try:
            relation = seen_entries(self.lowering, part, self.program.only.queries)
        except (TooHard, PatternError):
            return None
        if relation.atoms or relation.uniform:
            return None
        extent = self.lowering.map(f"{{ [q, j] -> [q, k] : {stride} j <= k < {stride} j + {size} }}")
        return relation.pairs.apply(extent).intersect(self.existing).coalesce()

    def future(self) -> str | None:
        """A row that sees a later token, empty where none does, None where that is not known."""
        later = self.lowering.set("{ [q, k] : k > q }")
        for part in self.parts:
            if (pairs := self.reached(part)) is None:
                return None
            if witness := self.least(pairs, later, isl.Set.intersect):
                return witness
        return ""

    def all(self, sets: list[isl.Set]) -> isl.Set:
        found = sets[0]
        for x in sets[1:]:
            found = found.union(x)
        return found

    def least(self, a: isl.Set, b: isl.Set, combine: Callable[[isl.Set, isl.Set], isl.Set]) -> str:
        """The pair of the shortest sequence that two sets combine to, as text; empty where there is none, or it is too
        hard to say."""
        try:
            return bounded(self.lowering.ctx, lambda: _least(combine(a, b)))
        except TooHard:
            return ""


def _least(pairs: isl.Set) -> str:
    if pairs.is_empty():
        return ""
    at = pairs.find_dim_by_name(isl.dim_type.param, "Nk")
    point = pairs.move_dims(isl.dim_type.set, 0, isl.dim_type.param, at, 1).lexmin().sample_point()
    k_len, q, k = (int(point.get_coordinate_val(isl.dim_type.set, i).to_python()) for i in range(3))
    return f"row q = {q} at Nk = {k_len} reaches k = {k}"
