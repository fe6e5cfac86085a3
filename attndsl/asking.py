"""What a user hands to a question about a pattern: arrays, sizes, and what they lack, as diagnostics."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, TypeVar

from attndsl.diagnostics import PatternError, error
from attndsl.plans import own_program
from attndsl.program import Axis, CallShape, InputDecl, Program
from attndsl.widths import check_argument

_Answer = TypeVar("_Answer")
_LENGTHS = "lengths are ints from 0 to 2**31 - 1"


def as_array(x: Any) -> Any:
    """A tensor or array-like as a numpy array."""
    import numpy as np

    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
    return np.asarray(x)


def batch_of(program: Program, arrays: Mapping[str, Any]) -> int:
    """Batch entries that the inputs have."""
    sizes = [
        size
        for decl in program.inputs
        if decl.name in arrays
        for dim, size in zip(decl.dims, arrays[decl.name].shape, strict=False)
        if dim.axis is Axis.B
    ]
    return max(sizes, default=1)


def check_names(program: Program, given: Mapping[str, object]) -> None:
    """Raises `PatternError` for the first input that is missing, or that the program does not have."""
    spans = {decl.name: decl.span for decl in own_program(program).inputs}
    wanted = (*spans, *program.args)
    for name in wanted:
        if name not in given:
            takes = f"this attention takes {', '.join(wanted)}"
            raise error("A522", f"`{name}` is missing: {takes}", spans.get(name))
    for name in given:
        if name not in wanted:
            takes = f"it takes {', '.join(wanted)}" if wanted else "it takes no inputs"
            raise error("A522", f"`{name}` is not an input of this attention: {takes}")


def of_lengths(program: Program, given: Mapping[str, object]) -> object:
    """Of inputs by name the one that `lengths` names, None where it names none.

    Raises `PatternError` (A522) where it is missing.
    """
    if program.lengths is None:
        return None
    if program.lengths not in given:
        what = f"`{program.lengths}` is missing: `lengths` says how many tokens are present by it"
        raise error("A522", what, program.input(program.lengths).span)
    return given[program.lengths]


def check_plain(*programs: Program) -> None:
    """Raises `PatternError` (A911) for what is not one branch over raw tokens."""
    for program in programs:
        _ = program.branch


def known(program: Program, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Inputs as numpy arrays, and runtime arguments. Inputs may be missing: what needs one says so itself.

    What selections choose may be among them, by name, as `Attention.plan` returns it.
    """
    names, made = [decl.name for decl in program.inputs], {selection.name for selection in program.selections}
    for name in given:
        if name not in names and name not in program.args:
            check_names(program, given)
    arrays = {
        decl.name: _plan_array(given[decl.name], decl) if decl.name in made else as_array(given[decl.name])
        for decl in program.inputs
        if decl.name in given
    }
    return arrays, arguments(program, given)


def arguments(program: Program, given: Mapping[str, Any]) -> dict[str, int]:
    """The runtime ints among what is given. Raises `PatternError` (A516) for what is none, or too large for kernels."""
    found = {}
    for name in program.args:
        if name in given:
            try:
                found[name] = operator.index(given[name])
            except TypeError:
                raise not_an_int(name, given[name]) from None
            if isinstance(given[name], bool):
                raise not_an_int(name, given[name])
            check_argument(program, name, found[name])
    return found


def not_an_int(name: str, value: object) -> PatternError:
    return error("A516", f"`{name}` is a runtime int, not {repr(value)[:40]}", help="pass a Python int")


def _plan_array(plan: Any, decl: InputDecl) -> Any:
    """A plan [B, H', R, C] as the input that it is: without the dimensions that it has for nothing."""
    found = as_array(plan)
    axes = [dim.axis for dim in decl.dims]
    gone = [i for i, axis in ((1, {Axis.H, Axis.G}), (2, {Axis.Q})) if not axis & set(axes)]
    if found.ndim != 4 or any(found.shape[i] != 1 for i in gone):
        raise error(
            "A573",
            f"`{decl.name}` is no plan of this attention: its shape is {list(found.shape)}",
            decl.span,
            help="pass what `attn.plan` returns",
        )
    return found.squeeze(tuple(gone))


def asked(question: Callable[[], _Answer]) -> _Answer:
    """The answer, or as a diagnostic what the inputs lack."""
    try:
        return question()
    except PatternError:
        raise
    except ValueError as problem:
        raise error("A523", str(problem), help="pass inputs by name, each of its declared shape") from None


def tokens_of(length: Any) -> int:
    """A length as an int. Raises `PatternError` (A524) where no sequence has it."""
    if not _possible(length):
        raise error("A524", f"there is no sequence of {repr(length)[:40]} tokens", help=_LENGTHS)
    return operator.index(length)


def check_new(new: object) -> None:
    """Raises `PatternError` (A524) where it is no number of new tokens."""
    if not hasattr(new, "__index__"):
        raise error("A524", f"`new` is a number of tokens, not {repr(new)[:40]}", help=_LENGTHS)


def _possible(length: Any) -> bool:
    if isinstance(length, bool) or not isinstance(length, Integral):
        return False
    return 0 <= int(length) < 1 << 31


def checked(shape: CallShape) -> CallShape:
    """The shape. Raises `PatternError` (A524) where there is no such call."""
    possible = _possible(shape.rows) and _possible(shape.k_len)
    if not possible or min(shape.heads, shape.kv_heads) < 1 or shape.heads % shape.kv_heads:
        sizes = f"{shape.rows} rows, {shape.k_len} keys, {shape.heads} query heads, {shape.kv_heads} key heads"
        raise error("A524", f"there is no call with {sizes}", help=f"{_LENGTHS}, heads a multiple of key heads")
    return shape
