"""Small operations on isl sets that isl spells at length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from typing import TypeVar

import islpy as isl

from attndsl.effort import TooHard, left_of

_Result = TypeVar("_Result")
_COMPARED: dict[str, Callable[[isl.PwAff, isl.PwAff], isl.Set]] = {
    "==": isl.PwAff.eq_set, "!=": isl.PwAff.ne_set, "<": isl.PwAff.lt_set, "<=": isl.PwAff.le_set,
    ">": isl.PwAff.gt_set, ">=": isl.PwAff.ge_set,
}  # fmt: skip
# Pieces of a function, a table's entries, from which on some are compared first.
MANY_PIECES = 16


def fold(items: list[_Result], combine: Callable[[_Result, _Result], _Result]) -> _Result:
    return reduce(combine, items)


def named_space(ctx: isl.Context, params: Sequence[str], dims: Sequence[str], out: Sequence[str] = ()) -> isl.Space:
    """The space of sets { [dims] }, or with `out` of maps { [dims] -> [out] }."""
    of_map = isl.Space.alloc(ctx, len(params), len(dims), len(out))
    space = of_map if out else isl.Space.set_alloc(ctx, len(params), len(dims))
    inner = isl.dim_type.in_ if out else isl.dim_type.set
    for kind, names in ((isl.dim_type.param, params), (inner, dims), (isl.dim_type.out, out)):
        for position, name in enumerate(names):
            space = space.set_dim_name(kind, position, name)
    return space


def where_all(space: isl.Space, *sums: Mapping[str, int]) -> list[isl.Constraint]:
    """That sums of a space's dimensions are not negative, each its factors by name and a constant at "1": isl takes
    many times longer to read them."""
    found, local, number = list[isl.Constraint](), isl.LocalSpace.from_space(space), isl.Val.int_from_si
    kinds = (isl.dim_type.param, isl.dim_type.set if space.is_set() else isl.dim_type.in_, isl.dim_type.out)
    for factors in sums:
        constraint = isl.Constraint.alloc_inequality(local)
        for name, factor in factors.items():
            value = number(space.get_ctx(), factor)
            if name == "1":
                constraint = constraint.set_constant_val(value)
            else:
                kind = next(kind for kind in kinds if space.find_dim_by_name(kind, name) >= 0)
                constraint = constraint.set_coefficient_val(kind, space.find_dim_by_name(kind, name), value)
        found.append(constraint)
    return found


def integer(value: isl.Val) -> int:
    # Numbers that fit 64 bits need not be written and read.
    small = value.get_num_si()
    return small if value.cmp_si(small) == 0 else int(value.to_python())


def common_multiple(items: isl.Set) -> int:
    """The least common multiple of a set's divisors: what its complement's conjunctions may hold together."""
    found = 1
    for basic in items.get_basic_sets():
        for i in range(basic.dim(isl.dim_type.div)):
            with suppress(isl.Error):  # One that is no quotient, but any number.
                found = math.lcm(found, int(basic.get_div(i).get_denominator_val().to_python()))
    return found


def compared(op: str, left: isl.PwAff, right: isl.PwAff) -> isl.Set:
    """Where two functions compare so. Raises TooHard early where a quarter of many pieces tell that all would.

    What comparisons take grows with the number of pieces or faster: at least so much as each of some took is certain.
    """
    ctx, on_left = left.get_ctx(), left.n_piece() > right.n_piece()
    many, other = (left, right) if on_left else (right, left)
    if many.n_piece() >= MANY_PIECES and (rest := left_of(ctx)) is not None:
        pieces = many.get_pieces()
        some = pieces[: len(pieces) // 4]
        sample = fold([isl.PwAff.alloc(*piece) for piece in some], isl.PwAff.union_add)
        _COMPARED[op](*((sample, other) if on_left else (other, sample)))
        if (rest - (left_of(ctx) or 0)) * len(pieces) > len(some) * rest:
            raise TooHard
    return _COMPARED[op](left, right)


def divided(x: isl.PwAff, divisor: isl.PwAff, rest: bool) -> isl.PwAff:
    """The quotient of x, rounded down, or its rest; the divisor is constant piece by piece, as a table's entry is."""
    parts = []
    for where, constant in divisor.get_pieces():
        m, part = constant.get_constant_val(), x.intersect_domain(where)
        parts.append(part.mod_val(m) if rest else part.scale_down_val(m).floor())
    return fold(parts, isl.PwAff.union_add)


def bit_length(number: isl.PwAff, bits: int) -> isl.PwAff:
    """The bit length of numbers below 2**bits, 0 of those that are not positive."""
    cases = "; ".join(f"[x] -> [{i}] : {1 << (i - 1)} <= x < {1 << i}" for i in range(1, bits + 1))
    table = isl.PwAff.read_from_str(number.get_ctx(), f"{{ [x] -> [0] : x <= 0; {cases} }}")
    return table.pullback_multi_pw_aff(isl.MultiPwAff.from_pw_aff(number))


def powers_of_two(number: isl.PwAff, bits: int) -> isl.Set:
    """Where a number is a power of two below 2**bits."""
    powers = " or ".join(f"x = {1 << i}" for i in range(bits))
    found = isl.Set.read_from_str(number.get_ctx(), f"{{ [x] : {powers} }}")
    return found.preimage_multi_pw_aff(isl.MultiPwAff.from_pw_aff(number))


def entry(values: Sequence[int], index: isl.PwAff) -> isl.PwAff:
    """The entry of a table at an index, which is clamped to it."""
    last = len(values) - 1
    ends = [f"[x] -> [{values[0]}] : x <= 0"] + ([f"[x] -> [{values[last]}] : x >= {last}"] if last else [])
    inner = [f"[x] -> [{v}] : x = {i}" for i, v in enumerate(values) if 0 < i < last]
    table = isl.PwAff.read_from_str(index.get_ctx(), "{ " + "; ".join(ends + inner) + " }")
    return table.pullback_multi_pw_aff(isl.MultiPwAff.from_pw_aff(index))


def choose(chosen: isl.Set, then: isl.Set, other: isl.Set) -> isl.Set:
    return chosen.intersect(then).union(chosen.complement().intersect(other))


def parts_that_meet(items: isl.Set, other: isl.Set) -> isl.Set:
    """The conjunctions of a set that have something of another: as they are, with no bound of the other's in them."""
    parts = [isl.Set.from_basic_set(part) for part in items.get_basic_sets()]
    kept = [part for part in parts if not part.is_disjoint(other)]
    return fold(kept, isl.Set.union) if kept else isl.Set.empty(items.get_space())


def implied(wanted: isl.Set, existing: isl.Set, others: list[isl.Set]) -> bool:
    """Whether other sets, or already some of them, leave nothing of what exists that is not wanted."""
    left = existing
    # One of few parts decides it soon, as `causal` does for keys past the last one.
    for other in sorted(others, key=lambda found: found.n_basic_set()):
        left = left.intersect(other)
        if left.is_subset(wanted):
            return True
    return False


def project_param(pairs: isl.Set, name: str) -> isl.Set:
    position = pairs.find_dim_by_name(isl.dim_type.param, name)
    return pairs.project_out(isl.dim_type.param, position, 1) if position >= 0 else pairs


def involves_param(pairs: isl.Set, name: str) -> bool:
    """Whether a set depends on a parameter."""
    position = pairs.find_dim_by_name(isl.dim_type.param, name)
    return position >= 0 and bool(pairs.involves_dims(isl.dim_type.param, position, 1))


def rename_param(pairs: isl.Set, old: str, new: str) -> isl.Set:
    position = pairs.find_dim_by_name(isl.dim_type.param, old)
    return pairs.set_dim_name(isl.dim_type.param, position, new) if position >= 0 else pairs


def coarse_pairs(inner: isl.Set, block_q: int, block_k: int, every: bool) -> isl.Set:
    """The pairs { [q, k] } whose blocks hold an existing pair of `inner`, or with `every` nothing else."""
    ctx = inner.get_ctx()
    existing = _existing(ctx)
    same_block = isl.Map.read_from_str(
        ctx,
        f"{{ [q, k] -> [x, y] : floor(x/{block_q}) = floor(q/{block_q}) and floor(y/{block_k}) = floor(k/{block_k}) }}",
    )
    if not every:
        return inner.intersect(existing).apply(same_block).coalesce()
    missing = existing.subtract(inner).apply(same_block)
    return existing.apply(same_block).subtract(missing).coalesce()


def last_goes_on(pairs: isl.Set) -> isl.Set:
    """The pairs that are in a set when positions past the last are the last one, as an index is clamped."""
    ctx = pairs.get_ctx()
    row, key = (f"(0 <= {x} = {y} < {n} or {x} = {n} - 1 < {y})" for x, y, n in (("x", "q", "Nq"), ("y", "k", "Nk")))
    clamped = isl.Map.read_from_str(ctx, f"[Nq, Nk] -> {{ [x, y] -> [q, k] : {row} and {key} }}")
    return pairs.intersect(_existing(ctx)).apply(clamped).coalesce()


def _existing(ctx: isl.Context) -> isl.Set:
    return isl.Set.read_from_str(ctx, "[Nq, Nk] -> { [q, k] : 0 <= q < Nq and 0 <= k < Nk }")


def place_pairs(pairs: isl.Set, q: isl.PwAff, k: isl.PwAff, q_len: isl.PwAff, k_len: isl.PwAff) -> isl.Set:
    """The pairs whose coordinates (q, k) are in `pairs`, whose Nq and Nk become those of the coordinates."""
    ctx = pairs.get_ctx()
    pairs = rename_param(rename_param(pairs, "Nq", "Nq_inner"), "Nk", "Nk_inner")
    at = isl.MultiPwAff.from_pw_aff_list(
        isl.Space.alloc(ctx, 0, 2, 2).set_dim_name(isl.dim_type.in_, 0, "q").set_dim_name(isl.dim_type.in_, 1, "k"),
        isl.PwAffList.from_pw_aff(q).add(k),
    )
    pairs = pairs.preimage_multi_pw_aff(at)
    for name, length in (("Nq_inner", q_len), ("Nk_inner", k_len)):
        own = isl.PwAff.read_from_str(ctx, f"[{name}] -> {{ [q, k] -> [{name}] }}")
        pairs = project_param(pairs.intersect(own.eq_set(length)), name)
    return pairs


def where_param(pairs: isl.Set, name: str, value: int) -> isl.Set:
    """The pairs for which a parameter has a value, without it."""
    known = isl.Set.read_from_str(pairs.get_ctx(), f"[{name}] -> {{ [q, k] : {name} = {value} }}")
    return project_param(pairs.intersect(known), name).coalesce()
