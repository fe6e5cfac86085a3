"""Patterns that lie in part in a relation of unsorted data: each such alternative in the order of its data.

`window(64) | window(256) on pi` is a window in two orders. With tokens in order the second touches every tile, sorted
by pi the first does. So the pattern is divided: what lies in no such order, with closed-form runs, then one alternative
after the other less what came before, each visited in the order of its data (`permuting.py`). They are pieces of one
softmax.

Places count from 0, so positions do too: such pieces are those of calls whose rows are all tokens. Of others, chunks of
a longer call, the pattern stays whole and in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from attndsl.derive import derive
from attndsl.layout import PLAIN, Layout, Permutation
from attndsl.permuting import eligible, permuted_by
from attndsl.program import Choose, Logic, Program, Scalar, Union, Where, nodes, scalars, walk
from attndsl.relation import Lowering
from attndsl.simplify import fold, negated
from attndsl.splitting import SplitPiece

# Alternatives of a pattern, and how many of them are visited in orders of their own.
MAX_ALTERNATIVES, MAX_ORDERS = 8, 4


def mixes(program: Program) -> bool:
    """Whether a program may have pieces in several orders: of a call's kind it then asks whether its rows are all."""
    if not program.plain or not eligible(derive(program)):
        return False
    pattern = program.branch.pattern
    either = any(isinstance(x, Union | Choose) for x in nodes(pattern))
    return either or any(isinstance(x, Logic) and x.op == "or" for e in scalars(pattern) for x in walk(e))


def mixture(program: Program, heads: tuple[int, int]) -> tuple[SplitPiece, ...]:
    """The derived program as pieces: what lies in no order of unsorted data, where there is such, and each alternative
    that does. There are none where no alternative lies in such an order, or the whole pattern does."""
    if not eligible(program):
        return ()
    condition = fold(Lowering(program, heads).predicate(program.branch.pattern))
    found = list(_alternatives(condition, lambda e: permuted_by(program, conjuncts(e), heads) is not None))
    sorted_by_data = [e for e, fits in found if fits]
    if not 0 < len(sorted_by_data) <= MAX_ORDERS or not 1 < len(found) <= MAX_ALTERNATIVES:
        return ()
    before = [e for e, fits in found if not fits]
    # Rows are all tokens: the program in order may as well count from 0.
    whole, span = replace(program, align_start=True), program.branch.span
    made: list[tuple[Program, Layout | Permutation]] = []
    if before:
        made.append((whole.with_branch(pattern=Where(_either(before), span)), PLAIN))
    for e in sorted_by_data:
        less = (negated(_either(before)),) if before else ()
        piece = permuted_by(replace(program, inputs=whole.inputs), (*conjuncts(e), *less), heads)
        if piece is None:
            return ()
        made.append((piece.program, piece.layout))
        whole = replace(whole, inputs=piece.program.inputs)
        before.append(e)
    return tuple(SplitPiece(whole, x, number > 0, layout) for number, (x, layout) in enumerate(made))


def _alternatives(e: Scalar, fits: Callable[[Scalar], bool]) -> Iterator[tuple[Scalar, bool]]:
    """A condition as alternatives of which one holds, taken apart until they fit; and whether they do."""
    if fits(e):
        yield e, True
        return
    either = next((x for x in conjuncts(e) if isinstance(x, Logic) and x.op == "or"), None)
    if either is None:
        yield e, False
        return
    beside = tuple(x for x in conjuncts(e) if x is not either)
    for x in either.operands:
        both = (*beside, *conjuncts(x))
        yield from _alternatives(fold(Logic("and", both)) if len(both) > 1 else x, fits)


def conjuncts(e: Scalar) -> tuple[Scalar, ...]:
    """The conditions that all hold where one does."""
    return e.operands if isinstance(e, Logic) and e.op == "and" else (e,)


def _either(alternatives: Sequence[Scalar]) -> Scalar:
    return alternatives[0] if len(alternatives) == 1 else Logic("or", tuple(alternatives))
