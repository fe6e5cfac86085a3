"""Patterns that lie in part in blocks that `random` draws: what holds without the draw, then what only it allows.

`window(128) | random(3, …)` touches every tile that the draw could choose, and fills few. With the draw put false it is
a window, with closed-form runs. What is left lies in the draw, so its tiles are listed (`listing.py`). The two are
disjoint pieces of one softmax, in the order of tokens. Nothing is asked of the pattern but that a draw only adds pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attndsl.cuts import with_cuts
from attndsl.isl_sets import where_param
from attndsl.layout import PLAIN, Layout, Permutation
from attndsl.listing import Listable, draws_of
from attndsl.program import Const, Logic, Program, Scalar, Unary, Where, rebuild
from attndsl.relation import Relation, lowered
from attndsl.simplify import fold

if TYPE_CHECKING:
    from attndsl.plan import Spec


@dataclass(frozen=True, slots=True, eq=False)
class SplitPiece:
    """One of two programs that together are the whole one. `further`: it adds to what the other has found. `layout`: a
    permutation where it is in places of one (`mixing.py`)."""

    whole: Program
    program: Program
    further: bool
    layout: Layout | Permutation = PLAIN


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Two pieces; the relation of the whole, without the draw and with all of what it could add; and what is drawn."""

    pieces: tuple[SplitPiece, SplitPiece]
    without: Relation
    whole: Relation
    drawn: Listable


def splits(pieces: Iterable[object], spec: Spec) -> bool:
    """Whether calls of a kind are divided so: their rows stand where tiles begin, or are all tokens."""
    apart = [x for x in pieces if isinstance(x, SplitPiece)]
    return spec.even_start if all(x.layout.plain for x in apart) else spec.all_rows


def split(program: Program, heads: tuple[int, int]) -> Split | None:
    """The derived program without a draw, and what only that allows; None where no draw adds pairs to others."""
    if not program.plain or program.grid is not None:
        return None
    lowering, relation = lowered(program, heads)
    for drawn in draws_of(program, relation):
        without, within = (where_param(relation.pairs, drawn.atom, truth) for truth in (0, 1))
        if without.is_empty() or not without.is_subset(within):
            continue
        program = with_cuts(program)
        condition = fold(lowering.predicate(program.branch.pattern))
        rest, all_of_it = (_where(condition, drawn.read, truth) for truth in (False, True))
        only = fold(Logic("and", (drawn.read, all_of_it, Unary("not", rest))))
        first, second = (program.with_branch(pattern=Where(e, program.branch.span)) for e in (rest, only))
        pieces = (SplitPiece(program, first, False), SplitPiece(program, second, True))
        return Split(pieces, replace(relation, pairs=without), replace(relation, pairs=within), drawn)
    return None


def _where(condition: Scalar, draw: Scalar, truth: bool) -> Scalar:
    """A condition where the draw holds, or does not."""
    return fold(rebuild(condition, lambda e: Const(truth) if e == draw else e))
