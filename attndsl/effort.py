"""Bounded effort: integer-set operations can take exponential time, and patterns are untrusted."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import islpy as isl

# Elementary isl operations allowed to one step of lowering: about 0.1 s.
EFFORT = 200_000

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
    """The result of a step, or `TooHard` once it takes more than `effort` elementary operations."""
    # Inside another bounded step, which goes on under its own bound.
    outer = ctx.get_max_operations()
    ctx.reset_operations()
    ctx.set_max_operations(effort)
    try:
        return step()
    except (isl.Error, TypeError) as e:
        # A number that isl does not give past the bound is nothing to its binding.
        if not _exhausted(ctx, e):
            raise
        raise TooHard from e
    finally:
        ctx.set_max_operations(outer)
        ctx.reset_operations()


def _exhausted(ctx: isl.Context, problem: Exception) -> bool:
    """Whether an error says that the bound was passed; isl's reader may call that a syntax error."""
    if _PASSED in str(problem):
        return True
    try:
        # Past the bound every further operation says so.
        isl.Set.read_from_str(ctx, "{ [x] : x > 0 }")
    except isl.Error as further:
        return _PASSED in str(further)
    return False
