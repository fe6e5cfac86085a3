"""What a cache may forget: tokens that no later row can read, from the integer sets, for every length at once.

A token is needed after s tokens if some row q >= s, at some length, may read it: whatever the data, the heads and the
arguments that are not known. So what may be forgotten stays so, and a column that a pattern leaves and comes back to is
kept. Where the sets are too hard, everything is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import islpy as isl
import numpy as np
from numpy.typing import NDArray

from attndsl.compose import Composition, part_programs
from attndsl.derive import derive
from attndsl.effort import TooHard, bounded
from attndsl.evaluate import evaluate
from attndsl.isl_sets import project_param
from attndsl.keeping import kept, kept_by
from attndsl.program import Arg, Binary, Compare, Const, Logic, Program, Read, Scalar, Var
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering

# Least and largest value of what is known of the uniform scalars: arguments, and inputs that do not read q or k.
Known = tuple[tuple[Scalar, int, int], ...]


@dataclass(frozen=True, slots=True)
class Retention:
    """Which pages of `page` tokens are needed: a condition on the page (`k`) and the tokens so far (`Nk`)."""

    page: int
    needed: Scalar

    def evictable(self, tokens: int, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these pages, by their place in a sequence, no row from `tokens` on can read; never one that is
        not full yet."""
        found = evaluate(self.needed, {"q": np.asarray(0), "k": pages, "Nk": np.asarray(tokens)}, {})
        return ~np.broadcast_to(found, pages.shape).astype(bool) & ((pages + 1) * self.page <= tokens)


def retention_of(
    program: Program, composition: Composition, page: int, arrays: Mapping[str, Any], args: Mapping[str, int]
) -> Retention:
    """What all that a program attends to needs: its parts over raw tokens, and of what is kept of a cache (`keeping`)
    the tokens of entries that are not complete, which further tokens make anew.

    arrays, args: inputs and arguments that are known.
    """
    needed: list[Scalar] = []
    for part in _raw(program, composition):
        needed.append(retention(part, page, known_scalars(part, arrays, args)).needed)
    tail = max((each.size for each in kept(program, composition)), default=1)
    if tail > 1:
        # A page whose last token comes after the first that an entry ending at the next token may begin with.
        end = Binary("*", Const(page), Binary("+", Var("k"), Const(1)))
        needed.append(Compare(">", end, Binary("-", Var("Nk"), Const(tail - 1))))
    found = needed[0] if len(needed) == 1 else Logic("or", tuple(needed)) if needed else Const(False)
    return Retention(page, found)


def _raw(program: Program, composition: Composition) -> Iterator[Program]:
    """The parts over raw tokens, as programs, and the candidates that are ranked by single keys."""
    for branch in (program,) if program.plain else composition.programs:
        yield from (part for part in part_programs(branch) if part.plain)
    for selection in program.selections:
        if None in kept_by(selection):
            yield Program.of(
                selection.name, selection.among, inputs=program.inputs, args=program.args, tables=program.tables
            )


@functools.lru_cache(maxsize=256)
def retention(program: Program, page: int, known: Known = ()) -> Retention:
    """What a program of one part over raw tokens needs of a sequence's pages."""
    program = derive(program)
    lowering = Lowering(program)
    relation = lowering.relation(program.branch.pattern)
    ranges = {e: (low, high) for e, low, high in known}

    def needed() -> Scalar:
        pairs = relation.project_atoms(relation.pairs.intersect_params(relation.context))
        pairs = pairs.intersect(lowering.set("[Nk, s] -> { [q, k] : s <= q < Nk and k < s and s >= 0 }"))
        for name, e in relation.uniform.items():
            if e in ranges:
                low, high = ranges[e]
                pairs = pairs.intersect(lowering.set(f"[{name}] -> {{ [q, k] : {low} <= {name} <= {high} }}"))
        for name in pairs.get_var_names(isl.dim_type.param):
            pairs = pairs if name == "s" else project_param(pairs, name)
        # From here Nk stands for the tokens so far, and k for a page.
        position = pairs.find_dim_by_name(isl.dim_type.param, "s")
        pairs = pairs.set_dim_name(isl.dim_type.param, position, "Nk")
        of_page = isl.Map.read_from_str(
            lowering.ctx, f"{{ [q, k] -> [0, p] : {page} p <= k < {page} p + {page} }}"
        )  # fmt: skip
        pages = pairs.apply(of_page).compute_divs().coalesce()
        context = lowering.set("[Nk] -> { : Nk >= 0 }")
        return condition(pages, context, {})

    try:
        return Retention(page, bounded(lowering.ctx, needed))
    except TooHard:
        return Retention(page, Const(True))


def known_scalars(program: Program, arrays: Mapping[str, Any], args: Mapping[str, int]) -> Known:
    """What is known of a program's uniform scalars, of the arguments and inputs that are given."""
    program = derive(program)
    lowering = Lowering(program)
    found: list[tuple[Scalar, int, int]] = []
    for e in lowering.relation(program.branch.pattern).uniform.values():
        match e:
            case Arg(name=name) if name in args:
                found.append((e, args[name], args[name]))
            case Read(input=name) if name in arrays and arrays[name].size:
                found.append((e, int(arrays[name].min()), int(arrays[name].max())))
            case _:
                pass
    return tuple(found)
