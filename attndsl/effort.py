"""Bounded effort: integer-set operations can take exponential time, and patterns are untrusted."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import islpy as isl

# Elementary isl operations allowed to one step of lowering: about 0.1 s, and of hard ones ten times that.
EFFORT = 200_000
# Common multiples of a pattern's divisors, with which one operation takes up to 0.1 ms. Published patterns reach 2**17.
HUGE = 1 << 32
# Operations that steps take are told apart by so many.
GRAIN = 2048

_PASSED = "maximal number of operations"

_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")
_PLANNING = threading.RLock()


class TooHard(Exception):
    """A step passed its effort bound."""


def one_at_a_time(step: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """A step that shares isl contexts with others of its kind, which are for one thread at a time: a bound is of the
    context, and another thread's operations would count against it."""

    @functools.wraps(step)
    def alone(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        with _PLANNING:
            return step(*given, **named)

    return alone


def bounded(ctx: isl.Context, step: Callable[[], _Result], effort: int = EFFORT) -> _Result:
    """The result of a step, or `TooHard` once it takes more than `effort` elementary operations.

    Inside another bounded step its operations count there too, and end it where that one's would end.
    """
    outer = ctx.get_max_operations()
    if outer:
        effort = min(outer, spent(ctx) + effort)
    else:
        ctx.reset_operations()
    ctx.set_max_operations(max(effort, 1))
    try:
        return step()
    except (isl.Error, TypeError) as e:
        # A number that isl does not give past the bound is nothing to its binding.
        if not _exhausted(ctx, e):
            raise
        raise TooHard from e
    finally:
        ctx.set_max_operations(outer)


def spent(ctx: isl.Context) -> int:
    """The operations of a context since the outermost bounded step began, or up to an eighth and a GRAIN more.

    isl counts them and does not say: it is asked under which bound it would go on.
    """
    outer = ctx.get_max_operations()
    low, high = 0, GRAIN
    while not _goes_on(ctx, high):
        low, high = high, 2 * high
    while high - low > max(GRAIN, low // 8):
        middle = (low + high) // 2 // GRAIN * GRAIN
        low, high = (low, middle) if _goes_on(ctx, middle) else (middle, high)
    ctx.set_max_operations(outer)
    return high


def _goes_on(ctx: isl.Context, most: int) -> bool:
    ctx.set_max_operations(most)
    try:
        # A single operation, where reading the shortest text takes hundreds.
        isl.Val.int_from_si(ctx, 1)
    except isl.Error:
        return False
    return True


def eased(effort: int, multiple: int) -> int:
    """The operations allowed where divisors have a common multiple: past HUGE its multiples take the place of the small
    numbers that operations are elementary for."""
    return effort if multiple < HUGE else effort // 64


@dataclass(slots=True)
class Budget:
    """What steps that follow each other may take together. `left`: elementary operations."""

    left: int

    def bounded(self, ctx: isl.Context, step: Callable[[], _Result], effort: int = EFFORT) -> _Result:
        """As `bounded`, within what is left."""
        if self.left <= 0:
            raise TooHard
        before = spent(ctx) if ctx.get_max_operations() else 0
        try:
            return bounded(ctx, step, min(effort, self.left))
        finally:
            self.left -= spent(ctx) - before


def _exhausted(ctx: isl.Context, problem: Exception) -> bool:
    """Whether an error says that the bound was passed; isl's reader may call that a syntax error."""
    # Past the bound every further operation says so.
    return _PASSED in str(problem) or not _goes_on(ctx, ctx.get_max_operations())
