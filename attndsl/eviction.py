"""What a cache may forget: tokens that no later row can read, from the integer sets, for every length at once.

A token is needed after s tokens if some row q >= s, at some length, may read it: whatever the data, the heads and the
arguments that are not known. So what may be forgotten stays so, and a column that a pattern leaves and comes back to is
kept. Where the sets are too hard, everything is needed.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import islpy as isl
import numpy as np
from numpy.typing import NDArray

from attndsl.branches import Given
from attndsl.compose import Composition, of_one_level, part_programs
from attndsl.derive import derive
from attndsl.diagnostics import error
from attndsl.effort import TooHard, bounded, remembered
from attndsl.evaluate import evaluate
from attndsl.isl_sets import project_param
from attndsl.keeping import kept, kept_by, made_anew
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    Compare,
    Complement,
    Const,
    Dim,
    Inter,
    Logic,
    Minus,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Union,
    Var,
    Where,
    rebuild,
)
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering

# Least and largest value of what is known of the uniform scalars: arguments, and inputs that do not read q or k.
Known = tuple[tuple[Scalar, int, int], ...]


@dataclass(frozen=True, slots=True)
class KeyNeed:
    """What is needed by what inputs hold at single keys: a condition on the key (`k`) and the tokens so far (`Nk`).

    reads: arguments of the condition, and the reads at that key for which they stand.
    """

    needed: Scalar
    reads: tuple[tuple[Arg, Read], ...]

    def at(self, tokens: int, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """Which keys some row from `tokens` on reads, of any sequence and head: bool [keys]."""
        held: dict[Scalar, NDArray[Any]] = {arg: _by_lead(arrays[read.input], read) for arg, read in self.reads}
        keys = max(x.shape[-1] for x in held.values())
        found = evaluate(self.needed, {"q": np.asarray(0), "k": np.arange(keys), "Nk": np.asarray(tokens)}, held)
        needed = np.broadcast_to(found, np.broadcast_shapes(found.shape, (1, 1, 1, keys)))
        return np.asarray(needed.reshape(-1, keys).any(0))


def _by_lead(x: NDArray[Any], read: Read) -> NDArray[np.int64]:
    """What an input holds at keys, as [b, h, g, keys]; of dimensions that it lacks 1."""
    sizes = {e.name: n for e, n in zip(read.index, x.shape, strict=True) if isinstance(e, Var)}
    order = [i for name in "bhgk" for i, e in enumerate(read.index) if e == Var(name)]
    return x.astype(np.int64).transpose(order).reshape([sizes.get(name, 1) for name in "bhgk"])


@dataclass(frozen=True, slots=True)
class Retention:
    """Which pages of `page` tokens are needed: a condition on the page (`k`) and the tokens so far (`Nk`), or what
    `by_key` says of one of its keys."""

    page: int
    needed: Scalar
    by_key: tuple[KeyNeed, ...] = ()

    def evictable(
        self, tokens: int, pages: NDArray[np.int64], arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> NDArray[np.bool_]:
        """Which of these pages, by their place in a sequence, no row from `tokens` on can read; never one that is
        not full yet. arrays: what `by_key` reads; without them, which pages could be unread by what it may read."""
        found = evaluate(self.needed, {"q": np.asarray(0), "k": pages, "Nk": np.asarray(tokens)}, {})
        needed = np.broadcast_to(found, pages.shape).astype(bool)
        for each in self.by_key:
            if arrays is None:
                continue
            if any(read.input not in arrays for _, read in each.reads):
                return np.zeros(pages.shape, bool)
            keys = each.at(tokens, arrays)
            keys = np.asarray(np.pad(keys, (0, -len(keys) % self.page)).reshape(-1, self.page).any(1))
            # Past what is told of keys anything may be read.
            needed = needed | (pages >= len(keys)) | keys[np.minimum(pages, len(keys) - 1)]
        return ~needed & ((pages + 1) * self.page <= tokens)


def retention_of(
    program: Program, composition: Composition, page: int, arrays: Mapping[str, Any], args: Mapping[str, int],
    told: Sequence[str] = (),
) -> Retention:  # fmt: skip
    """What all that a program attends to needs: its parts over raw tokens, and of what is kept of a cache (`keeping`)
    the tokens of entries that are not complete, which further tokens make anew.

    arrays, args: inputs and arguments that are known. told: inputs of which it is told later what they hold at keys.
    Raises `PatternError` (A558) where nothing is ever evictable.
    """
    if program.align_start or page < 1:
        reason = "under `align start` a row's keys need not come before it" if page > 0 else f"pages of {page} tokens"
        raise error("A558", f"there is no eviction: {reason}", program.span, help="keep all pages")
    if made_anew(program, composition):
        return Retention(page, Const(True))
    needed: list[Scalar] = []
    by_key: list[KeyNeed] = []
    for part in _raw(program, composition):
        by_keys, reads = _at_keys(part, {*told, *(name for name, x in arrays.items() if x.size)})
        if reads:
            by_key.append(KeyNeed(retention(by_keys, 0, known_scalars(by_keys, arrays, args)).needed, reads))
        else:
            needed.append(retention(part, page, known_scalars(part, arrays, args)).needed)
    tail = max((each.size for each in kept(program, composition)), default=1)
    if tail > 1:
        # A page whose last token comes after the first that an entry ending at the next token may begin with.
        end = Binary("*", Const(page), Binary("+", Var("k"), Const(1)))
        needed.append(Compare(">", end, Binary("-", Var("Nk"), Const(tail - 1))))
    found = needed[0] if len(needed) == 1 else Logic("or", tuple(needed)) if needed else Const(False)
    return Retention(page, found, tuple(by_key))


def _at_keys(program: Program, names: Container[str]) -> tuple[Program, tuple[tuple[Arg, Read], ...]]:
    """The program with arguments in the place of what its sets read of known integers at the key alone, and which."""
    found: dict[Read, Arg] = {}
    own = {"b", "h", "g", "k"}

    def step(e: Scalar) -> Scalar:
        match e:
            case Read(input=name, index=(*_, Var(name="k")), type=Type.INT) if (
                name in names
                and all(isinstance(x, Var) and x.name in own for x in e.index)
                and len(set(e.index)) == len(e.index)
                and program.input(name).dims[-1] == Dim(Axis.K)
            ):
                return found.setdefault(e, Arg(f"at_key_{len(found)}"))
            case _:
                return e

    def rewritten(pattern: Set) -> Set:
        match pattern:
            case Where(cond=cond):
                return replace(pattern, cond=rebuild(cond, step))
            case Union(parts=parts) | Inter(parts=parts):
                return replace(pattern, parts=tuple(map(rewritten, parts)))
            case Minus(left=a, right=b):
                return replace(pattern, left=rewritten(a), right=rewritten(b))
            case Complement(operand=operand):
                return replace(pattern, operand=rewritten(operand))
            case _:
                # Elsewhere k is no token.
                return pattern

    told = program.with_branch(pattern=rewritten(program.branch.pattern))
    return replace(told, args=(*program.args, *(arg.name for arg in found.values()))), tuple(
        (arg, read) for read, arg in found.items()
    )


def _raw(program: Program, composition: Composition) -> Iterator[Program]:
    """The parts over raw tokens, as programs, and the candidates that are ranked by single keys. Of listed tokens any
    that the pattern allows may be read: lists change."""
    for branch in (program,) if program.plain else composition.programs:
        for own in map(of_one_level, part_programs(branch)):
            (part,) = own.only.parts
            if own.plain:
                yield own
            elif isinstance(part.view, Given) and part.view.picked is not None:
                yield own.with_branch(parts=(replace(part, view=None),))
    for selection in program.selections:
        if None in kept_by(selection):
            yield Program.of(
                selection.name, selection.among, inputs=program.inputs, args=program.args, tables=program.tables
            )


@remembered(256)
def retention(program: Program, page: int, known: Known = ()) -> Retention:
    """What a program of one part over raw tokens needs of a sequence's pages; of its keys where `page` is 0, for what
    its arguments named `at_key` are there."""
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
        told = {name: e for name, e in relation.uniform.items() if isinstance(e, Arg) and e.name.startswith("at_key_")}
        for name in pairs.get_var_names(isl.dim_type.param):
            pairs = pairs if name == "s" or (name in told and not page) else project_param(pairs, name)
        # From here Nk stands for the tokens so far, and k for a page.
        position = pairs.find_dim_by_name(isl.dim_type.param, "s")
        pairs = pairs.set_dim_name(isl.dim_type.param, position, "Nk")
        place = f"{page} p <= k < {page} p + {page}" if page else "p = k"
        of_page = isl.Map.read_from_str(lowering.ctx, f"{{ [q, k] -> [0, p] : {place} }}")
        pages = pairs.apply(of_page).compute_divs().coalesce()
        context = lowering.set("[Nk] -> { : Nk >= 0 }")
        return condition(pages, context, told)

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
