"""What is kept of each page beside its keys, and which pages a row reads by it: Quest (arXiv 2406.10774).

A page's bounds are the least and the largest key of its tokens, dimension by dimension. No key of the page gives a row
a larger product than `sum over d of max(q_d * least_d, q_d * largest_d)`, so pages are ranked by that.
"""

from __future__ import annotations

from dataclasses import dataclass

from attndsl.comparison import Undecided, Verdict, compare
from attndsl.plan import DType, Spec
from attndsl.program import Binary, Compare, Const, Inter, Program, Set, Var, Where
from attndsl.selection import Bound, Forced, Normalise, Pool, Selection, Share, Top, Vectors


@dataclass(frozen=True, slots=True)
class PagePlan:
    """Kernels over the pages of a cache: bounds, scores by them, and the choice of the best.

    `spec`: of the attention; only heads, D, dtype and target matter. `page`: tokens of a page. `fp8`: keys are float8.
    `shared`: the heads of a key head choose together, by the sum of their scores.
    """

    spec: Spec
    page: int
    fp8: bool = False
    shared: bool = True

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.spec.heads // self.spec.kv_heads

    @property
    def scored(self) -> int:
        """Pages that a program scores: their bounds are held in registers."""
        return 16 if self.spec.dtype is DType.FLOAT32 or self.spec.dim > 128 else 32


@dataclass(frozen=True, slots=True)
class PageChoice:
    """What a selection, by its name, chooses of pages by their bounds: `count` of them, the `recent` last ones first.

    `shared`: the heads of a key head choose together.
    """

    name: str
    count: int
    recent: int
    shared: bool


def page_choices(program: Program, page: int) -> tuple[PageChoice, ...]:
    """The selections of a program that choose among all causal pages by their bounds, as Quest does."""
    found = (_by_bounds(selection, page) for selection in program.selections)
    return tuple(choice for choice in found if choice is not None)


def _by_bounds(selection: Selection, page: int) -> PageChoice | None:
    rule, least, largest = selection.rule, Vectors("K", Pool.MIN), Vectors("K", Pool.MAX)
    if (
        not isinstance(rule, Top)
        or not isinstance(rule.count, Const)
        or selection.score != Bound(Vectors("Q"), least, largest)
    ):
        return None
    if selection.members is not None:
        return None
    if (selection.keys, selection.rows, selection.normalise) != (page, 1, Normalise.NONE):
        return None
    if selection.share is Share.HEADS or selection.forced is not Forced.COUNTED or not _same(selection.among, _CAUSAL):
        return None
    shared = selection.share is Share.GROUP
    if selection.always is None:
        return PageChoice(selection.name, int(rule.count.value), 0, shared)
    own = Where(Compare("==", Binary("//", Var("q"), Const(page)), Binary("//", Var("k"), Const(page))))
    if not _same(Inter((selection.always, _CAUSAL)), Inter((own, _CAUSAL))):
        return None
    return PageChoice(selection.name, int(rule.count.value), 1, shared)


_CAUSAL = Where(Compare("<=", Var("k"), Var("q")))


def _same(a: Set, b: Set) -> bool:
    """Whether two sets hold the same pairs, as far as can be told."""
    try:
        return compare(Program.of("a", a), Program.of("b", b)).verdict is Verdict.EQUAL
    except Undecided:
        return False
