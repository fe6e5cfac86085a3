"""Findings: what in a legal pattern is probably not meant, each with a witness.

    W301  a term of `&`, `|` or `-` changes nothing
    W302  the pattern allows no pair
    W303  a row sees no key, whatever the data says
    W304  a decode differs from a longer prefill

Every finding holds for all lengths, heads, arguments and inputs; what cannot be decided within the effort bound
is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, assert_never

import islpy as isl

from attndsl.alone import together
from attndsl.canonical import canonical, has_coarsen
from attndsl.comparison import Existing, Undecided
from attndsl.coordinates import on_grid
from attndsl.derivation import Random
from attndsl.derive import derive
from attndsl.diagnostics import Diagnostic, Severity, Span
from attndsl.effort import EFFORT, TooHard, bounded, eased
from attndsl.isl_sets import common_multiple
from attndsl.program import (
    Call,
    Choose,
    Coarsen,
    Compare,
    Complement,
    Const,
    Inter,
    Minus,
    On,
    Program,
    Selected,
    Set,
    Union,
    Var,
    Where,
    reads,
    scalars,
)  # fmt: skip
from attndsl.relation import POSITION_BITS, Lowering
from attndsl.witness import Witness

if TYPE_CHECKING:
    from attndsl.worlds import World

# Elementary isl operations allowed to one question.
QUESTION_EFFORT = EFFORT // 4
# Terms of one pattern that are looked at, and questions that may pass their bound before the rest is left.
MAX_TERMS = 64
MAX_FAILURES = 2

_CAUSAL = canonical(Where(Compare("<=", Var("k"), Var("q"))))


def findings(program: Program) -> tuple[Diagnostic, ...]:
    """Warnings about a program's pattern, in the order of the text.

    >>> never = Program.of("never", Inter((_CAUSAL, Where(Compare("<", Var("q"), Var("k"))))))
    >>> print(*findings(never))
    warning[W302]: the pattern allows no pair
      = help: look at the signs and ends of its comparisons
    """
    if not program.plain:
        return ()
    found: list[Diagnostic] = []
    try:
        analysis = _Analysis(program)

        def collect() -> None:
            for diagnostic in analysis.run():
                found.append(diagnostic)

        bounded(analysis.lowering.ctx, collect)
    except TooHard:
        pass  # What was found before stands.
    return tuple(sorted(found, key=lambda d: (-1 if d.span is None else d.span.start, d.code)))


class _GaveUp(Exception):
    """Too many questions passed their bound."""


class _Analysis:
    def __init__(self, program: Program) -> None:
        # What a document or a sequence sees is what there is to judge: padding sees nothing.
        self.program = program = together(program)
        self.written = canonical(program.branch.pattern)
        # Derived inputs are taken for any values: what then holds, holds for theirs.
        derived = derive(program.with_branch(pattern=self.written))
        self.pattern = derived.branch.pattern
        self.lowering = Lowering(derived, effort=2 * QUESTION_EFFORT)
        self.existing = Existing(self.lowering, self.pattern)
        self.gridded = None if program.grid is None else canonical(Where(on_grid(program.grid)))
        # Members that are tiles say so of the keys alone, as `derive` writes it.
        keys = None if program.grid is None else Where(on_grid(program.grid, "k"))
        self.unwritten = (self.gridded, keys)
        self.terms = self.failures = 0
        self.effort = QUESTION_EFFORT

    def run(self) -> Iterator[Diagnostic]:
        try:
            pairs = self.existing.of(self.pattern)
            self.effort = eased(QUESTION_EFFORT, common_multiple(pairs))
            if self._holds(pairs.is_empty):
                yield Diagnostic(
                    "W302", Severity.WARNING, "the pattern allows no pair", self._span(self.pattern, None),
                    help="look at the signs and ends of its comparisons",
                )  # fmt: skip
                return
            yield from self._empty_rows(pairs)
            yield from self._length_dependence(pairs)
            yield from self._idle_terms(self.pattern, self.existing.domain, None)
        except _GaveUp:
            return

    def _ask(self, question: Callable[[], Any], share: int = 1) -> Any:
        """The answer of isl, None past the effort bound, or its `share`-th part."""
        try:
            return bounded(self.lowering.ctx, question, self.effort // share)
        except TooHard:
            self.failures += 1
            if self.failures > MAX_FAILURES:
                raise _GaveUp from None
            return None

    def _holds(self, question: Callable[[], bool]) -> bool:
        return self._ask(question) is True

    def _span(self, node: Set, within: Span | None) -> Span | None:
        """Where a set is written in the program's own text: its span, unless that is in the standard library."""
        source = self.program.source
        return node.span if node.span is not None and source in (None, node.span.source) else within

    # ------------------------------------------------------------------------------- empty rows

    def _empty_rows(self, pairs: isl.Set) -> Iterator[Diagnostic]:
        """Rows that no value of the data, the heads or the arguments lets see a key."""

        def rows() -> isl.Set:
            asked = self._without_data(self.existing.domain)
            if self.gridded is not None:
                # Rows past a grid of known size see nothing, and that is what its size says.
                asked = asked.intersect(self._any_key(self.existing.of(self.gridded)))
            return asked.subtract(self._any_key(self._without_data(pairs)))

        empty = self._ask(rows)
        if not isinstance(empty, isl.Set) or not self._holds(lambda: not empty.is_empty()):
            return
        witness = self._ask(lambda: self.existing.smallest(empty))
        if isinstance(witness, Witness):
            length = (
                f"Nk = {witness.k_len}"
                if not self.program.align_start
                else f"Nq = {witness.q_len}, Nk = {witness.k_len}"
            )
            yield Diagnostic(
                "W303", Severity.WARNING, "a row sees no key", self._span(self.pattern, None),
                help="let every row see at least itself, for example with `| {q == k}`, unless a zero output is meant",
                notes=(f"row q = {witness.q} at {length} sees nothing: its output is 0",),
            )  # fmt: skip

    def _without_data(self, pairs: isl.Set) -> isl.Set:
        for name in (*self.lowering.atoms, *self.lowering.uniform):
            position = pairs.find_dim_by_name(isl.dim_type.param, name)
            if position >= 0:
                pairs = pairs.project_out(isl.dim_type.param, position, 1)
        return pairs

    def _any_key(self, pairs: isl.Set) -> isl.Set:
        """All pairs of the rows that have one."""
        return pairs.apply(isl.Map.read_from_str(self.lowering.ctx, "{ [q, k] -> [q, x] }"))

    # ------------------------------------------------------------------------ dependence on length

    def _length_dependence(self, pairs: isl.Set) -> Iterator[Diagnostic]:
        """Pairs whose presence changes when one more token follows."""
        if self.program.align_start or not self._reads_length():
            return

        def changed(now: bool) -> isl.Set:
            later = self._one_longer(pairs)
            if not now:
                return later.intersect(self.existing.domain).subtract(pairs)
            # The longest call has none that is longer.
            shorter = self.lowering.set(f"[Nk] -> {{ [q, k] : Nk < {1 << POSITION_BITS} }}")
            return pairs.intersect(shorter).subtract(later)

        for now in (True, False):
            # Each is half of a question.
            difference = self._ask(partial(changed, now), 2)
            if isinstance(difference, isl.Set) and (witness := self._possible(difference, now)) is not None:
                n = witness.k_len
                has, has_not = (n, n + 1) if now else (n + 1, n)
                yield Diagnostic(
                    "W304", Severity.WARNING, "a decode differs from a longer prefill", self._span(self.pattern, None),
                    label="depends on how many tokens follow",
                    help="let the pattern depend on q and k alone, or run the whole sequence each time",
                    notes=(f"{replace(witness, q_len=has, k_len=has)} is allowed, and with Nk = {has_not} it is not",),
                )  # fmt: skip
                return

    def _reads_length(self) -> bool:
        read = any(reads(e, "Nq", "Nk") for e in scalars(self.pattern))
        return read or has_coarsen(self.pattern)

    def _one_longer(self, pairs: isl.Set) -> isl.Set:
        """The pairs at length Nk + 1, as a set for Nk; conditions that read the length become other conditions."""
        for name in ("Nk", "Nq"):
            position = pairs.find_dim_by_name(isl.dim_type.param, name)
            if position >= 0:
                pairs = pairs.set_dim_name(isl.dim_type.param, position, f"{name}_next")
        for name, e in (*self.lowering.uniform.items(), *self.lowering.atoms.items()):
            position = pairs.find_dim_by_name(isl.dim_type.param, name)
            if position >= 0 and reads(e, "Nq", "Nk"):
                pairs = pairs.project_out(isl.dim_type.param, position, 1)
        pairs = pairs.intersect(self.lowering.set("[Nk, Nk_next, Nq_next] -> { [q, k] : Nk_next = Nk + 1 = Nq_next }"))
        for name in ("Nk_next", "Nq_next"):
            pairs = pairs.project_out(isl.dim_type.param, pairs.find_dim_by_name(isl.dim_type.param, name), 1)
        return pairs

    def _possible(self, difference: isl.Set, now: bool) -> Witness | None:
        """A witness of the change that some call of both lengths shows."""

        def check(world: World, w: Witness) -> bool:
            shorter = world.shortened(w.k_len - 1)
            return shorter.member(self.written, w.q, w.k) == now != world.member(self.written, w.q, w.k)

        try:
            found = self._ask(lambda: self.existing.witness(difference, check, longer=1), 2)
        except Undecided:
            return None
        return found if isinstance(found, Witness) else None

    # -------------------------------------------------------------------------------- idle terms

    def _idle_terms(self, node: Set, care: isl.Set, within: Span | None) -> Iterator[Diagnostic]:
        """Operands under a set, which itself matters only for the pairs of `care`, that change nothing."""
        source = self.program.source
        if source is not None and node.span is not None and node.span.source is not source:
            # What the standard library is made of is not the user's concern.
            return
        within = self._span(node, within)
        match node:
            case Inter(parts=(_, Where(cond=Call(function="drawn")))):
                return  # `random`, whose `among` the text had to write.
            case Inter(parts=parts) | Union(parts=parts):
                yield from self._operands(node, parts, care, within)
            case Minus(left=left, right=right):
                inside, outside = self.existing.of(left), self.existing.of(right)
                if self._holds(lambda: care.intersect(inside).intersect(outside).is_empty()):
                    yield self._idle(right, within, "no pair of what stands before `-` is in it")
                else:
                    yield from self._idle_terms(right, care.intersect(inside), within)
                yield from self._idle_terms(left, care.subtract(outside), within)
            case Complement(operand=operand):
                yield from self._idle_terms(operand, care, within)
            case Choose(cond=cond, then=then, other=other):
                chosen = self.existing.of(Where(cond))
                for side, matters in ((then, care.intersect(chosen)), (other, care.subtract(chosen))):
                    # A side that is never taken says nothing of its terms.
                    if not self._holds(matters.is_empty):
                        yield from self._idle_terms(side, matters, within)
            case Where() | On() | Coarsen() | Random() | Selected():
                return
            case _:
                assert_never(node)

    def _operands(
        self, node: Inter | Union, parts: tuple[Set, ...], care: isl.Set, within: Span | None
    ) -> Iterator[Diagnostic]:
        """Those of `&` or `|`: one matters where the others leave the result open."""
        kept = list(parts)
        # Of two equal operands the later one is idle.
        for part in reversed(parts):
            self.terms += 1
            if self.terms > MAX_TERMS:
                raise _GaveUp
            rest = list(kept)
            rest.remove(part)
            matters = self._ask(lambda rest=rest: self._open(node, care, rest))  # type: ignore[misc]
            if not isinstance(matters, isl.Set):
                continue
            if self._changes_nothing(node, part, matters):
                kept = rest
                # That tokens lie on the grid, no text says.
                if not _is_habit(node, part) and part not in self.unwritten:
                    yield self._idle(part, within, "the terms beside and around it decide every pair already")
            else:
                yield from self._idle_terms(part, matters, within)

    def _open(self, node: Inter | Union, care: isl.Set, others: list[Set]) -> isl.Set:
        """The pairs of `care` for which the other operands do not decide."""
        for other in others:
            pairs = self.existing.of(other)
            care = care.intersect(pairs) if isinstance(node, Inter) else care.subtract(pairs)
        return care

    def _changes_nothing(self, node: Inter | Union, part: Set, matters: isl.Set) -> bool:
        pairs = self.existing.of(part)
        if isinstance(node, Union):
            return self._holds(lambda: matters.intersect(pairs).is_empty())
        # Where the others leave nothing, it is they that are wrong.
        return self._holds(lambda: not matters.is_empty() and matters.is_subset(pairs))

    def _idle(self, part: Set, within: Span | None, why: str) -> Diagnostic:
        own = self._span(part, None)
        notes = [f"for every length, {why}"]
        if own is None and part.span is not None:
            text = part.span.source.text[part.span.start : part.span.end]
            notes.append(f"the term is `{text}`, from {part.span}")
        return Diagnostic(
            "W301", Severity.WARNING, "a term changes nothing", within if own is None else own,
            label="the pattern is the same without it" if own is not None else "", help="leave it out",
            notes=tuple(notes),
        )  # fmt: skip


def _is_habit(node: Inter | Union, part: Set) -> bool:
    """Idle terms that say something to the reader all the same.

    `causal & window(n)` states that nothing sees the future, whatever the rest becomes; `all` under `&` and `none`
    under `|` are what parameters leave of a term.
    """
    match node, part:
        case Inter(), Where(cond=Const(value=True)):
            return True
        case Union(), Where(cond=Const(value=False)):
            return True
        case Inter(), _:
            return part == _CAUSAL
        case _:
            return False
