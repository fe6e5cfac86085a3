"""The orders of a call's tokens (`permuting.py`) as numpy arrays, for counting tiles. Kernels get theirs from
`runtime.permute`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.derivation import Alike, Order, Place, Sorted
from attndsl.oracle import Evaluator
from attndsl.program import Axis, CallShape, InputDecl, Program, Scalar

Array = NDArray[Any]
# As `runtime.permute` has it.
TOKEN_BITS, MANY_ALIKE = 32, 1536


def order_values(
    program: Program, shape: CallShape, inputs: Mapping[str, Array], args: Mapping[str, int]
) -> dict[str, Array]:
    """What a permuted program reads of its orders, by name. Raises ValueError where an input is missing."""
    found: dict[str, Array] = {}
    for decl in program.inputs:
        match decl.derivation:
            case Order() | Sorted() | Place() | Alike():
                call = Evaluator.of_call(program, shape, {**inputs, **found}, args)
                found[decl.name] = _made(decl, decl.derivation, found, call)
            case _:
                pass
    return found


def _made(decl: InputDecl, d: Order | Sorted | Place | Alike, found: Mapping[str, Array], call: Evaluator) -> Array:
    match d:
        case Order(key=key, side=side):
            return np.argsort(_along(decl, key, side, call), axis=-1, kind="stable")
        case Sorted(key=key, side=side, order=order):
            return np.take_along_axis(_along(decl, key, side, call), found[order], -1)
        case Place(own=own, among=among, position=position, side=side):
            low, high = _ends(found[own], found[among])
            return (low + high << TOKEN_BITS) + _along(decl, position, side, call)
        case Alike(own=own, among=among):
            low, high = _ends(found[own], found[among])
            return np.array([(high - low).sum() >= MANY_ALIKE * low.size])


def _ends(own: Array, among: Array) -> tuple[Array, Array]:
    """Where the keys of each one's value begin and end among the keys, which are sorted."""
    low, high = np.empty(own.shape, np.int64), np.empty(own.shape, np.int64)
    for at in np.ndindex(own.shape[:-1]):
        low[at], high[at] = (np.searchsorted(among[at], own[at], side=x) for x in ("left", "right"))
    return low, high


def _along(decl: InputDecl, e: Scalar, side: str, call: Evaluator) -> Array:
    """A scalar at the tokens, or places, of one side, of the input's dimensions."""
    shape, axes = call.shape, [dim.axis for dim in decl.dims]
    tokens = shape.rows if side == "q" else shape.k_len
    position = np.arange(tokens).reshape(1, 1, -1, 1)
    value = call.at(position, position, call.variables["Nq"], call.variables["Nk"]).scalar(e)
    value = np.broadcast_to(value, (shape.batch, shape.heads, tokens, 1))[..., 0]
    # Key heads, by the first query head of each.
    value = value[:, :: shape.heads // shape.kv_heads] if Axis.G in axes else value[:, 0]
    return value if Axis.B in axes else value[0]
