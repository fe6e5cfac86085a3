"""A coarsened set of a sequence of its own (`derivation.Document`), as a condition on the call's tokens.

Integer sets hold it for every length, in the sequence's coordinates. Where the call's sequences begin is data, so there
it is a condition on data, but for how far apart its pairs are: that stays exact, and with it the tiles of bands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import islpy as isl

from attndsl import isl_sets
from attndsl.derive import coordinates_of
from attndsl.linear import normalise
from attndsl.program import Binary, Call, Coarse, Coarsen, Compare, Const, Logic, Scalar, Var, substitute
from attndsl.quasi_affine import condition


def coarse_apart(
    pattern: Coarsen, inner: isl.Set, context: isl.Set, uniform: Mapping[str, Scalar], past: bool
) -> Scalar:
    """The condition on q and k, inside one document, of a coarsened set whose operand `inner` reads no data; with
    `past` beyond the document's end too."""
    document = pattern.document
    assert document is not None
    coarse = isl_sets.coarse_pairs(inner, pattern.block_q, pattern.block_k, every=pattern.mode is Coarse.ALL)
    there = isl.Set.read_from_str(inner.get_ctx(), "[Nq, Nk] -> { [q, k] : 0 <= q < Nq and 0 <= k < Nk }")
    row, key = document.at or coordinates_of(document)

    def count(end: Scalar) -> Scalar:
        tokens = Binary("-", end, document.first)
        return normalise(Binary("//", Binary("+", tokens, Const(document.unit - 1)), Const(document.unit)))

    sizes = {"Nq": count(document.rows or document.end), "Nk": count(document.end)}
    own = condition(coarse.gist(there), context, uniform)
    if past:
        own = last_goes_on(own)
    at_tokens = substitute(own, {"q": row, "k": key, **sizes})
    if document.at is not None:
        return at_tokens
    pairs = isl_sets.last_goes_on(coarse) if past else coarse.intersect(there)
    return Logic("and", (*_distances(pairs, document.unit), at_tokens))


def last_goes_on(condition: Scalar) -> Scalar:
    """A condition on q and k with positions past the last being the last one, as `isl_sets.last_goes_on` has it."""
    ends = {x: Binary("-", Var(n), Const(1)) for x, n in (("q", "Nq"), ("k", "Nk"))}
    return substitute(condition, {x: Call("min", (Var(x), last)) for x, last in ends.items()})


def _distances(pairs: isl.Set, unit: int) -> Iterator[Scalar]:
    """Bounds of q - k at all pairs of a set, where no length and no input changes them."""
    apart = isl.Map.read_from_str(pairs.get_ctx(), "{ [q, k] -> [q - k] }")
    found = pairs.project_out_all_params().apply(apart)
    distance, rest = Binary("-", Var("q"), Var("k")), unit - 1
    if found.is_empty():
        return
    # Coordinates are `unit` tokens each.
    if (least := found.dim_min_val(0)).is_int():
        yield Compare(">=", distance, Const(unit * least.to_python() - rest))
    if (most := found.dim_max_val(0)).is_int():
        yield Compare("<=", distance, Const(unit * most.to_python() + rest))
