"""Tiles of places in a permutation: which tokens stand there."""

from __future__ import annotations

from attndsl.codegen.lines import Lines
from attndsl.layout import Permutation
from attndsl.plan import Plan


def permuted_tokens(lines: Lines, plan: Plan, order: Permutation, side: str, first: str, bounded: bool) -> None:
    """The places of a tile from `first` on, `q_nth` or `k_nth`, and the rows of their tokens in the tensors.

    bounded: the tile may reach past the last place. There a row is past the last token too.
    """
    decl = plan.program.input((order.q if side == "q" else order.k).input)
    nth, length, name = f"{side}_nth", "rows" if side == "q" else "k_len", decl.parameter
    strides = [f"{name}_stride_{i}" for i in range(len(decl.dims))]
    at = [f"{name}_ptr", *(f"{d.axis.value}.to(tl.int64) * {s}" for d, s in zip(decl.dims[:-1], strides, strict=False))]
    mask = f", mask={nth} < {length}, other={length}" if bounded else ""
    lines.add(
        f"{nth} = {first} + {side}_offset",
        f"{side}_rows = tl.load({' + '.join([*at, f'{nth} * {strides[-1]}'])}{mask})",
    )
