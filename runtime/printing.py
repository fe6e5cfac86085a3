"""Kernels printed once for all processes: planning and printing take longer than loading what they make.

An entry of the kernel cache holds the texts of a program's pieces and what a launch has to know beside them (of forward
kernels tilings and layouts, of backward kernels their plans), under a key of everything that decides them: the program
and how it was written (comments of a text quote it), the kind of call, and the compiler's own sources. What it takes to
make them, the search for layouts too, is spared where an entry is found.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attndsl import box_tiles, boxes, branches, derivation, grid, inputs, listing, members, records, runs, shares
from attndsl import layout as layouts
from attndsl import plan as planned
from attndsl import program as programs
from attndsl import scalar as scalars
from attndsl.compose import raw_first
from attndsl.cuts import with_cuts
from attndsl.derivation import (
    CallMembers,
    Cut,
    Derivation,
    Draw,
    Gathering,
    Listed,
    Order,
    RowTiles,
    SpanList,
    TileList,
    TileMap,
)
from attndsl.derive import derive
from attndsl.diagnostics import error
from attndsl.learned import Over
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import Backend, BackwardPlan, ForwardPlan, Printed, Spec, Tiling, learning_plan
from attndsl.program import InputDecl, Program
from attndsl.runs import Side
from attndsl.runtime.cache import KernelCache, cache_key
from attndsl.runtime.texts import compiler_digest
from attndsl.targets import default_refusal, pieces_refusal
from attndsl.tile_sizes import learning_tiling

if TYPE_CHECKING:
    from attndsl.runtime.engine import Generators

_TEXT, _CHOICES = "kernel_{}.py", "choices.json"
_ROWS, _GRADIENTS = "rows.py", "gradients.py"
_DQ, _DKDV, _DIAGONALS, _PAIRS = "dq_{}.py", "dkdv_{}.py", "diagonals.py", "pairs_{}.py"
Printers = Mapping[Backend, Callable[[ForwardPlan], str]]


def printed_forward(
    program: Program, spec: Spec, backends: tuple[Backend, ...], tiling: Tiling | None, printers: Printers,
    cache: KernelCache | None,
) -> tuple[Printed, ...]:  # fmt: skip
    """The forward kernels of a kind of call, one for each piece of the program; their program is the derived one.

    backends: those to choose from, Gluon or Triton or both. tiling: None lets the cost model choose. cache: where the
    texts are kept; None plans and prints.

    Raises `PatternError` (A510) where there is Gluon alone, which does not visit tokens in the program's order.
    """

    def make() -> dict[str, bytes]:
        backend = _choice(program, spec, backends)
        # What dropout drops was timed with loads through pointers alone.
        whole = spec.whole and (backend is Backend.GLUON or not spec.dropout)
        plans = forward_plans(program, replace(spec, backend=backend, whole=whole), tiling)
        texts = {_TEXT.format(n): printers[plan.spec.backend](plan).encode() for n, plan in enumerate(plans, 1)}
        said = tuple((x.spec, x.tiling, x.layout, x.gathered, x.view, x.softmax, x.row_tiles) for x in plans)
        return texts | _choices(program, plans[0].program, said)

    files = _kept(cache, make, "printed forward", program, spec, backends, tiling)
    program, pieces = _chosen(files, program)
    return tuple(
        Printed(program, made, chosen, files[_TEXT.format(n)].decode(), layout, n > 1, gathered, view, softmax, begun)
        for n, (made, chosen, layout, gathered, view, softmax, begun) in enumerate(pieces, 1)
    )


@dataclass(frozen=True, slots=True)
class PrintedBackward:
    """The backward kernels of a kind of call.

    `pieces`: of each piece its plan, the text of dq and that of dk and dv (on Hopper those of the kernel of rows and of
    the one of all three). `diagonals`, `pairs`: for inputs that q and
    k read together, a plan and its text, or one text for each read.
    """

    pieces: tuple[tuple[BackwardPlan, str, str], ...]
    diagonals: tuple[BackwardPlan, str] | None
    pairs: tuple[BackwardPlan, Mapping[int, str]] | None


def printed_backward(
    program: Program, spec: Spec, uses_lse: bool, tiling: Tiling | None, printers: Generators, cache: KernelCache | None
) -> PrintedBackward:
    """The portable backward kernels of a kind of call. uses_lse: a gradient of lse comes in. Others as in
    `printed_forward`."""

    def make() -> dict[str, bytes]:
        plans = backward_plans(program, spec, None if tiling is None else (tiling, tiling), uses_lse=uses_lse)
        texts: dict[str, str] = {}
        for n, plan in enumerate(plans, 1):
            texts[_DQ.format(n)], texts[_DKDV.format(n)] = printers.triton_backward(plan)
        # These go over the whole pattern; what they need to know of scores the first piece's plan says.
        found, square = {x.over for x in plans[0].learned}, _square(tiling) or learning_tiling(spec)
        diagonals = pairs = None
        if Over.DIAGONALS in found:
            diagonals = learning_plan(plans[0], square, Side.DIAGONAL)
            texts[_DIAGONALS] = printers.triton_diagonals(diagonals)
        if Over.PAIRS in found:
            pairs = learning_plan(plans[0], square, Side.QUERY)
            if pairs.runs.full + pairs.runs.partial:
                texts |= {_PAIRS.format(n): text for n, text in printers.triton_pairs(pairs).items()}
        encoded = {name: text.encode() for name, text in texts.items()}
        return encoded | _choices(program, plans[0].program, (plans, diagonals, pairs))

    files = _kept(cache, make, "printed backward", program, spec, uses_lse, tiling)
    _, (plans, diagonals, pairs) = _chosen(files, program)
    texts = {name: content.decode() for name, content in files.items()}
    of_pairs = {n: texts[_PAIRS.format(n)] for n in range(len(plans[0].learned)) if _PAIRS.format(n) in texts}
    return PrintedBackward(
        tuple((plan, texts[_DQ.format(n)], texts[_DKDV.format(n)]) for n, plan in enumerate(plans, 1)),
        None if diagonals is None else (diagonals, texts[_DIAGONALS]),
        None if pairs is None or not of_pairs else (pairs, of_pairs),
    )


def printed_gradients(
    program: Program, spec: Spec, uses_lse: bool, wanted: Callable[[BackwardPlan], bool], printers: Generators,
    cache: KernelCache | None,
) -> PrintedBackward | None:  # fmt: skip
    """The kernels for Hopper that make all gradients in one pass, where their plan is wanted: that is asked, and kept,
    before anything is printed. Others as in `printed_backward`."""

    def make_plan() -> dict[str, bytes]:
        (plan,) = backward_plans(program, spec, uses_lse=uses_lse)
        return _choices(program, plan.program, plan)

    _, plan = _chosen(_kept(cache, make_plan, "planned gradients", program, spec, uses_lse), program)
    if not wanted(plan):
        return None

    def make() -> dict[str, bytes]:
        of_rows, of_keys = printers.gluon_backward(plan)
        return {_ROWS: of_rows.encode(), _GRADIENTS: of_keys.encode()}

    files = _kept(cache, make, "printed gradients", program, spec, uses_lse)
    return PrintedBackward(((plan, files[_ROWS].decode(), files[_GRADIENTS].decode()),), None, None)


def _square(tiling: Tiling | None) -> Tiling | None:
    if tiling is None:
        return None
    block = min(tiling.block_q, tiling.block_k)
    return replace(tiling, block_q=block, block_k=block)


# ---------------------------------------------------------------------------------------- entries

# The program is not written: whoever asks for its kernels has it.
_LEFT_OUT = {"BackwardPlan": ("program",)}


def _kept(
    cache: KernelCache | None, make: Callable[[], dict[str, bytes]], kind: str, program: Program, *decisive: Any
) -> Mapping[str, bytes]:
    """The entry of a program's kernels, or what `make` makes of it. decisive: what else decides the texts."""
    if cache is None:
        return make()
    written = None if program.source is None else (program.source.name, program.source.text)
    place = None if program.span is None else str(program.span)
    return cache.fetch(cache_key(kind, compiler_digest(), program, written, place, *decisive), make)


def _choices(program: Program, made: Program, said: Any) -> dict[str, bytes]:
    """What an entry of a program holds beside texts. made: the derived one, that the plans have."""
    derived = [decl for decl in made.inputs if decl.derivation is not None]
    # Lists of tiles follow from the plan, of several parts cuts do too, of two levels and in another order of
    # tokens everything, each after what it is made of.
    permuted = any(isinstance(decl.derivation, Order) for decl in derived)
    cuts: tuple[type, ...] = () if program.plain else (Cut,)
    whole = permuted or program.only.within is not None
    lists = tuple(d for d in derived if whole or _is_list(d.derivation) or isinstance(d.derivation, cuts))
    names = [decl.name for decl in derived if decl not in lists]
    choices = {
        "derived": names, "lists": records.write(lists, {}), "said": records.write(said, _LEFT_OUT),
        "permuted": permuted,
    }  # fmt: skip
    return {_CHOICES: json.dumps(choices).encode()}


def _is_list(derivation: Derivation | None) -> bool:
    if isinstance(derivation, Draw):
        return derivation.members
    return isinstance(derivation, CallMembers | TileList | SpanList | Listed | Gathering | TileMap | RowTiles)


def _chosen(files: Mapping[str, bytes], program: Program) -> tuple[Program, Any]:
    """The derived program, and what was said beside the texts."""
    choices = json.loads(files[_CHOICES])
    derived = derive(program)
    derived = with_cuts(derived) if derived.plain else derived.with_branch(parts=raw_first(derived)[:1])
    needed = (d for d in derived.inputs if d.derivation is None or d.name in choices["derived"])
    lists: tuple[InputDecl, ...] = records.read(choices["lists"], _recorded(), {})
    # Positions in another order are places from 0 on.
    aligned = program.align_start or choices["permuted"]
    program = replace(derived, inputs=(*needed, *lists), align_start=aligned)
    return program, records.read(choices["said"], _recorded(), {"BackwardPlan": {"program": program}})


@functools.cache
def _recorded() -> Mapping[str, type]:
    """The classes that an entry may hold."""
    sets = (programs, scalars, branches, inputs, derivation, members, boxes, grid, runs)
    return records.classes_of((*sets, listing, layouts, box_tiles, shares, planned))


def _choice(program: Program, spec: Spec, backends: tuple[Backend, ...]) -> Backend:
    if Backend.GLUON not in backends:
        return Backend.TRITON
    if reason := pieces_refusal(program, spec):
        if Backend.TRITON not in backends:
            raise error("A510", reason, help="leave `backend` out to get the portable kernel")
        return Backend.TRITON
    return Backend.TRITON if len(backends) > 1 and default_refusal(program, spec) else Backend.GLUON
