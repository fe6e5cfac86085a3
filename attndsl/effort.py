"""Bounded effort: integer-set operations can take exponential time, and patterns are untrusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import islpy as isl

# Elementary isl operations allowed to one step of lowering: about 0.1 s.
EFFORT = 200_000

_Result = TypeVar("_Result")


class TooHard(Exception):
    """A step passed its effort bound."""


def bounded(ctx: isl.Context, step: Callable[[], _Result], effort: int = EFFORT) -> _Result:
    """The result of a step, or `TooHard` once it takes more than `effort` elementary operations."""
    # Inside another bounded step, which goes on under its own bound.
    outer = ctx.get_max_operations()
    ctx.reset_operations()
    ctx.set_max_operations(effort)
    try:
        return step()
    except isl.Error as e:
        if "maximal number of operations" not in str(e):
            raise
        raise TooHard from e
    finally:
        ctx.set_max_operations(outer)
        ctx.reset_operations()
