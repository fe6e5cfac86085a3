"""Bounded effort: integer-set operations can take exponential time, and patterns are untrusted.

    compilation     all that one request for kernels takes, whatever is lowered, searched, tiled and masked
      a step of it  a lowering, the tiles of one side, a search: `remembered` with what it took
        bounded     a part of a step, that can be given up: what is given up costs masks, not results

Each is held by its own bound and by those around it. What a request finds remembered counts as if it were done again,
so plans do not depend on what was planned before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import islpy as isl

# Elementary isl operations allowed to one step of lowering: about 0.1 s, and of hard ones ten times that.
EFFORT = 200_000
# … and to a whole compilation: of published patterns most take a tenth, and one six.
COMPILATION_EFFORT = 10 * EFFORT
# Common multiples of a pattern's divisors, with which one operation takes up to 0.1 ms. Published patterns reach 2**17.
HUGE = 1 << 32
# Operations that steps take are told apart by so many.
GRAIN = 256

_PASSED = "maximal number of operations"

_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")
_PLANNING = threading.RLock()


class TooHard(Exception):
    """A step passed its effort bound."""


@dataclass(slots=True)
class Compilation:
    """What one request for kernels may take, and has taken. cut: how often it was that which ended a step."""

    effort: int = COMPILATION_EFFORT
    taken: int = 0
    cut: int = 0

    @property
    def left(self) -> int:
        return self.effort - self.taken


# The compilation that this thread is in.
_COMPILATION: ContextVar[Compilation | None] = ContextVar("compilation", default=None)
# The context asked last, and operations that it is known to have taken, from which the next search goes on.
_AT_LEAST: ContextVar[tuple[isl.Context | None, int]] = ContextVar("at_least", default=(None, 0))


@contextmanager
def compilation(effort: int = COMPILATION_EFFORT) -> Iterator[Compilation]:
    """All that is planned inside shares one bound, unless it stands in another compilation.

    isl's contexts are for one thread at a time, since a bound is of a context, and other threads' operations would
    count against it.
    """
    with _PLANNING:
        outer = _COMPILATION.get()
        if outer is not None:
            yield outer
            return
        mine = Compilation(effort)
        token = _COMPILATION.set(mine)
        try:
            yield mine
        finally:
            _COMPILATION.reset(token)


def one_at_a_time(step: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """A step that is a compilation, or part of one."""

    @functools.wraps(step)
    def alone(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        with compilation():
            return step(*given, **named)

    return alone


def remembered(size: int) -> Callable[[Callable[_Given, _Result]], Remembered[_Given, _Result]]:
    """A step that is a compilation or part of one, whose last `size` results are kept with what they took."""

    def decorate(step: Callable[_Given, _Result]) -> Remembered[_Given, _Result]:
        return Remembered(step, size)

    return decorate


class Remembered(Generic[_Given, _Result]):
    """A step of a compilation and its results. One that the rest of a compilation cut short is not kept: another
    request may have more left."""

    def __init__(self, step: Callable[_Given, _Result], size: int) -> None:
        self.step, self.size = step, size
        self.known: dict[Any, tuple[_Result, int]] = {}
        functools.update_wrapper(self, step)

    def __call__(self, *given: _Given.args, **named: _Given.kwargs) -> _Result:
        key = (given, tuple(named.items())) if named else given
        if _COMPILATION.get() is None and (found := self.known.get(key)) is not None:
            return found[0]
        with compilation() as now:
            found = self.known.get(key)
            if found is not None and found[1] <= now.left:
                now.taken += found[1]
                return found[0]
            taken, cut = now.taken, now.cut
            result = self.step(*given, **named)
            if now.cut == cut:
                while len(self.known) >= self.size:
                    del self.known[next(iter(self.known))]
                self.known[key] = result, now.taken - taken
            return result

    def cache_clear(self) -> None:
        self.known.clear()


def bounded(ctx: isl.Context, step: Callable[[], _Result], effort: int = EFFORT) -> _Result:
    """The result of a step, or `TooHard` once it takes more than `effort` elementary operations.

    Inside another bounded step its operations count there too, and end it where that one's would end; and inside a
    compilation they count there.
    """
    outer, whole = ctx.get_max_operations(), _COMPILATION.get()
    if outer:
        effort, whole = min(outer, spent(ctx) + effort), None
    else:
        ctx.reset_operations()
        _AT_LEAST.set((None, 0))
    allowed = effort if whole is None else min(effort, whole.left)
    ctx.set_max_operations(max(allowed, 1))
    try:
        return step()
    except (isl.Error, TypeError) as e:
        # A number that isl does not give past the bound is nothing to its binding.
        if not _exhausted(ctx, e):
            raise
        raise TooHard from e
    finally:
        if whole is not None:
            whole.cut += allowed < effort and not _goes_on(ctx, max(allowed, 1))
            whole.taken += spent(ctx)
        ctx.set_max_operations(outer)


def spent(ctx: isl.Context) -> int:
    """The operations of a context since the outermost bounded step began, or up to an eighth and a GRAIN more.

    isl counts them and does not say: it is asked under which bound it would go on.
    """
    outer, (asked, low) = ctx.get_max_operations(), _AT_LEAST.get()
    # Another context's number says nothing, and to ask about this one's again is slow: isl answers with an error.
    low = low if asked == ctx else 0
    step = max(GRAIN, low // 8)
    while not _goes_on(ctx, low + step):
        low, step = low + step, 4 * step
    high = low + step
    while high - low > max(GRAIN, low // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if _goes_on(ctx, middle) else (middle, high)
    _AT_LEAST.set((ctx, low))
    ctx.set_max_operations(outer)
    return high


def left_of(ctx: isl.Context) -> int | None:
    """The operations that the bounded step around may still take, None outside of one."""
    most = ctx.get_max_operations()
    return most - spent(ctx) if most else None


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
