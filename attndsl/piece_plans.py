"""Kernel plans of programs in pieces: one plan a piece, all of one program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from attndsl.box_runs import box_mask, box_runs
from attndsl.box_tiles import BoxRuns
from attndsl.boxes import Boxes
from attndsl.compose import raw_first
from attndsl.cuts import with_cuts
from attndsl.derive import derive, with_needed
from attndsl.effort import remembered
from attndsl.grid_pieces import BoxPiece
from attndsl.layers import layers
from attndsl.layout import Layout, Permutation
from attndsl.learned import Over
from attndsl.left_tiles import of_left_tiles
from attndsl.linear import normalise
from attndsl.mask import shaped
from attndsl.permuting import PermutedPiece
from attndsl.pieces import Piece, choose_pieces
from attndsl.plan import (
    Backend,
    BackwardPlan,
    DType,
    ForwardPlan,
    Loads,
    Plan,
    Spec,
    Tiling,
    backward_plan,
    branch_scalars,
    forward_plan,
    slopes,
)  # fmt: skip
from attndsl.program import CallShape, InputDecl, Program, Scalar
from attndsl.quasi_affine import condition
from attndsl.runs import Side, TileRuns
from attndsl.simplify import fold, specialise
from attndsl.skipping import skipping_plan
from attndsl.splitting import SplitPiece, splits
from attndsl.targets import part_refusal, pieces_refusal
from attndsl.tile_sizes import backward_tilings, copies_piece, default_tiling
from attndsl.tiling import choose_backward_tilings, choose_tiling, usual_tiling, visits_many
from attndsl.view_plans import view_backward, view_forward
from attndsl.visits import closed_runs
from attndsl.within_plans import within_backward, within_forward

P = TypeVar("P", bound=Plan)


@remembered(1024)
def forward_plans(
    program: Program, spec: Spec, tiling: Tiling | None = None, alone: bool = True
) -> tuple[ForwardPlan, ...]:
    """The forward kernels of a program's pieces, in the order in which they run; one where it stays whole.

    tiling: None lets the cost model choose, and in a layout the default for how it loads. alone: other parts of the
    same softmax do not share the program.
    """
    if program.only.skip is not None and program.packed is not None:
        # Tiles of documents are found before.
        program = of_left_tiles(program)
    if program.only.within is not None:
        return (within_forward(program, spec),)
    if not program.plain:
        return _of_parts(program, lambda part, first: _forward_part(part, spec, tiling, first))
    if program.branch.skip is not None:
        return (skipping_plan(program, spec),)
    pieces = _pieces(program, spec, alone)
    if not pieces:
        return (forward_plan(program, spec, tiling or choose_tiling(program, spec)),)
    if isinstance(pieces, PermutedPiece):
        return (_permuted_forward(pieces, spec, tiling),)
    if isinstance(pieces[0], SplitPiece):
        return _of_split(pieces, lambda piece: _split_forward(piece, spec, tiling))
    program = _of_pieces(program)
    branch = branch_scalars(program, spec)
    return _of_one_program(
        _piece_plan(program, piece, spec, tiling, branch, number) for number, piece in enumerate(pieces)
    )


# -------------------------------------------------------------------------------------- parts


def _of_parts(program: Program, make: Callable[[Program, bool], tuple[P, ...]]) -> tuple[P, ...]:
    """The plans of a branch's parts, that over raw tokens first: each further one is a piece of the same softmax.

    Their programs have one part each, and the same inputs: of the derived ones those that some plan reads.
    """
    program, found = derive(program), list[P]()
    for part in raw_first(program):
        found += make(program.with_branch(parts=(part,)), not found)
        # What the plans of a part declare, those of the next call otherwise.
        more = dict.fromkeys(decl for plan in found for decl in plan.program.inputs if decl not in program.inputs)
        program = replace(program, inputs=(*program.inputs, *more))
    used = dict.fromkeys(decl for plan in found for decl in plan.program.inputs)
    inputs = [decl for decl in program.inputs if decl in used]
    return tuple(replace(plan, program=replace(plan.program, inputs=tuple(inputs))) for plan in found)


def _forward_part(program: Program, spec: Spec, tiling: Tiling | None, first: bool) -> tuple[ForwardPlan, ...]:
    if spec.backend is Backend.GLUON and (part_refusal(program, spec) or pieces_refusal(program, spec)):
        spec = replace(spec, backend=Backend.TRITON)
    if program.only.skip is not None:
        return (skipping_plan(program, spec, not first),)
    if program.plain:
        return forward_plans(program, spec, tiling, alone=False)
    chosen = tiling or default_tiling(spec)
    plan = view_forward(program, spec, chosen, not first)
    if tiling is None and chosen.several and visits_many(plan):
        plan = view_forward(program, spec, replace(chosen, several=False), not first)
    return (plan,)


def _backward_part(
    program: Program, spec: Spec, tilings: tuple[Tiling, Tiling] | None, uses_lse: bool, first: bool
) -> tuple[BackwardPlan, ...]:
    if not program.plain:
        return (view_backward(program, spec, tilings or backward_tilings(spec), uses_lse, not first),)
    return backward_plans(program, spec, tilings, uses_lse, alone=False)


# ------------------------------------------------------------------------------------- pieces


def _of_split(pieces: Iterable[SplitPiece], make: Callable[[SplitPiece], P]) -> tuple[P, ...]:
    """The plans of the pieces of a split, whose program is the whole with what some plan reads."""
    pieces = tuple(pieces)
    plans, whole, used = list[P](), pieces[0].whole, dict[InputDecl, None]()
    for piece in pieces:
        # What earlier ones declare too: a name means one input.
        beside = (decl for decl in used if decl not in piece.program.inputs)
        plans.append(make(replace(piece, program=replace(piece.program, inputs=(*piece.program.inputs, *beside)))))
        used |= dict.fromkeys(plans[-1].program.inputs)
    # Sums over the whole pattern read all that it reads.
    of_all = {x.over for plan in plans if isinstance(plan, BackwardPlan) for x in plan.learned}
    learns = not of_all.isdisjoint((Over.DIAGONALS, Over.PAIRS))
    inputs = tuple(decl for decl in whole.inputs if learns or decl in used)
    program = replace(whole, inputs=(*inputs, *(decl for decl in used if decl not in whole.inputs)))
    return tuple(replace(plan, program=program) for plan in plans)


def _split_forward(piece: SplitPiece, spec: Spec, tiling: Tiling | None) -> ForwardPlan:
    if isinstance(piece.layout, Permutation):
        return _permuted_forward(PermutedPiece(piece.layout, piece.program), spec, tiling, piece.further)
    chosen = tiling or choose_tiling(piece.program, spec)
    return forward_plan(piece.program, spec, chosen, follows=piece.further)


def _split_backward(
    piece: SplitPiece, spec: Spec, tilings: tuple[Tiling, Tiling] | None, uses_lse: bool
) -> BackwardPlan:
    if isinstance(piece.layout, Permutation):
        return _permuted_backward(PermutedPiece(piece.layout, piece.program), spec, tilings, uses_lse, piece.further)
    chosen = tilings or choose_backward_tilings(piece.program, spec)
    return backward_plan(piece.program, spec, *chosen, uses_lse=uses_lse, follows=piece.further)


def _pieces(
    program: Program, spec: Spec, alone: bool
) -> tuple[Piece | BoxPiece, ...] | PermutedPiece | tuple[SplitPiece, ...]:
    """The pieces of a program, none where it stays whole, its tokens in order; or all of it in another order."""
    found = choose_pieces(program, (spec.heads, spec.kv_heads)).pieces
    if apart := tuple(x for x in found if isinstance(x, SplitPiece)):
        return apart if alone and splits(apart, spec) else ()
    in_order = tuple(x for x in found if not isinstance(x, PermutedPiece | SplitPiece))
    if len(in_order) == len(found):
        return in_order
    # The parts of a softmax share a program, and with it what positions mean.
    return next(x for x in found if isinstance(x, PermutedPiece)) if alone else ()


def _permuted_spec(spec: Spec) -> Spec:
    """Rows and keys are loaded from where they lie. Positions count from 0, and no tiles are mapped."""
    return replace(spec, loads=Loads.POINTER, even_start=False, maps=False)


def _permuted_forward(piece: PermutedPiece, spec: Spec, tiling: Tiling | None, follows: bool = False) -> ForwardPlan:
    spec = _permuted_spec(spec)
    # Triton counts the loads of orders as stages: so many keep as many tiles in flight as half as many elsewhere.
    tiling = tiling or _scattered_tiling(piece, spec, stages=5) or default_tiling(spec)
    return forward_plan(piece.program, spec, _tiling_of(piece, spec, tiling), layout=piece.layout, follows=follows)


def _permuted_backward(
    piece: PermutedPiece, spec: Spec, tilings: tuple[Tiling, Tiling] | None, uses_lse: bool, follows: bool = False
) -> BackwardPlan:
    spec = _permuted_spec(spec)
    scattered = _scattered_tiling(piece, spec, stages=2, gradients=True)
    tiling, key_tiling = tilings or (backward_tilings(spec) if scattered is None else (scattered, scattered))
    return backward_plan(piece.program, spec, tiling, key_tiling, uses_lse, layout=piece.layout, follows=follows)


def _of_pieces(program: Program) -> Program:
    """The program that the plans of its pieces have: they read no derived inputs but cuts."""
    program = derive(program)
    own = {decl.name for decl in program.inputs if decl.derivation is not None}
    program = with_cuts(program)
    return replace(program, inputs=tuple(decl for decl in program.inputs if decl.name not in own))


def _of_one_program(plans: Iterable[P]) -> tuple[P, ...]:
    """The plans of pieces, whose program has the cuts that one of them reads."""
    plans = tuple(plans)
    program = with_needed(plans[0].program, (decl for plan in plans for decl in plan.inputs))
    return tuple(replace(plan, program=program) for plan in plans)


def _piece_plan(
    program: Program, piece: Piece | BoxPiece, spec: Spec, tiling: Tiling | None, branch: dict[str, Any], number: int
) -> ForwardPlan:
    spec = _spec_of(piece, spec)
    if spec.whole and not isinstance(piece, BoxPiece) and not copies_piece(piece.layout, spec):
        spec = replace(spec, loads=Loads.POINTER, whole=False)
    hopper = spec.backend is Backend.GLUON
    scattered = None if hopper else _scattered_tiling(piece, spec)
    tiling = _tiling_of(piece, spec, tiling or scattered or usual_tiling(program, spec))
    if number:
        # What all pieces share enters with the first.
        branch = branch | {"sink": None}
    if isinstance(piece, BoxPiece):
        layout, visited, mask = _boxes(program, piece, spec, tiling)
        if not all(
            layers(layout, side, block) for side, block in zip("qk", (tiling.block_q, tiling.block_k), strict=True)
        ):
            spec = replace(spec, loads=Loads.POINTER, whole=False)
        nothing = TileRuns((), ())
        return ForwardPlan(
            program, spec, tiling, nothing, mask, **branch, layout=layout, follows=number > 0, box_runs=visited
        )
    runs = closed_runs(piece.relation, program, spec, tiling, Side.QUERY, piece.layout)
    mask = piece_mask(piece, spec) if runs.partial or hopper else None
    return ForwardPlan(program, spec, tiling, runs, mask, **branch, layout=piece.layout, follows=number > 0)


def _boxes(
    program: Program, piece: BoxPiece, spec: Spec, tiling: Tiling, side: Side = Side.QUERY
) -> tuple[Boxes, BoxRuns, Scalar | None]:
    """The boxes of a piece, those that a box of one side visits, and the mask of those that are not full."""
    block = (tiling.block_q, tiling.block_k)
    layout = piece.boxes(*block)
    runs = box_runs(piece, layout, spec, block, side, program.align_start)
    return layout, runs, box_mask(piece, layout, spec, block) if runs.partial else None


def _scattered_tiling(
    piece: Piece | BoxPiece | PermutedPiece, spec: Spec, stages: int = 3, gradients: bool = False
) -> Tiling | None:
    """Tile sizes of pieces whose tokens do not lie in a row, where others than the usual ones were faster (measured:
    benchmarks/RESULTS.md): smaller boxes reach less far, and two programs a multiprocessor hide each other's loads."""
    half, dim = spec.dtype in (DType.BFLOAT16, DType.FLOAT16), max(spec.dim, spec.v_dim)
    # Drawing what is dropped key by key takes the registers of more warps in the forward kernel.
    drops = spec.dropout and not (gradients and not isinstance(piece, BoxPiece))
    if piece.layout.plain or spec.target != "cuda:90" or drops or not half or not 64 < dim <= 128:
        return None
    return Tiling(64, 64, warps=4, stages=stages)


def _tiling_of(piece: Piece | BoxPiece | PermutedPiece, spec: Spec, tiling: Tiling) -> Tiling:
    """Addresses of single rows take registers: below Hopper, where operands do too, more warps share them.

    On the CPU the keys of a box are gathered cell by cell.
    """
    if isinstance(piece, BoxPiece) and spec.target == "cpu" and spec.backend is Backend.CPU:
        return replace(tiling, block_k=1)
    older = spec.target.startswith("cuda:") and int(spec.target.partition(":")[2]) < 90
    spread = older and not piece.layout.plain and tiling.block_q >= 128 and tiling.warps < 8
    return replace(tiling, warps=8) if spread else tiling


def _spec_of(piece: Piece | BoxPiece, spec: Spec) -> Spec:
    """A piece's tokens do not lie in a row, as hardware copies of tiles need, unless they fill layers of their own."""
    if spec.backend is Backend.GLUON and not copies_piece(piece.layout, spec):
        spec = replace(spec, backend=Backend.TRITON, whole=spec.whole and isinstance(piece, BoxPiece))
    return spec if piece.layout.plain or spec.whole else replace(spec, loads=Loads.POINTER)


# Rows, 4 bytes each, that a copy takes at least: residues have multiples of so many.
_ROWS_TOGETHER = 4


def whole(program: Program, spec: Spec, shape: CallShape) -> bool:
    """Whether the rows and keys of a call fill the layers that the program's pieces see, so that tiles are copied."""
    if spec.loads is not Loads.DESCRIPTOR or not program.plain or spec.dropout:
        return False
    found = choose_pieces(program, (spec.heads, spec.kv_heads)).pieces
    pieces = [x for x in found if isinstance(x, Piece | BoxPiece)]
    if len(pieces) < len(found) or all(x.layout.plain for x in pieces):
        return False
    for piece in pieces:
        tiling = _scattered_tiling(piece, spec, stages=2) or backward_tilings(spec)[0]
        layout = piece.boxes(tiling.block_q, tiling.block_k) if isinstance(piece, BoxPiece) else piece.layout
        for side, block, tokens in (("q", tiling.block_q, shape.rows), ("k", tiling.block_k, shape.k_len)):
            seen = layers(layout, side, block)
            multiple = 1 if isinstance(layout, Boxes) else _ROWS_TOGETHER
            if seen is None or tokens % (seen.unit * multiple):
                return False
    return True


@remembered(1024)
def backward_plans(
    program: Program, spec: Spec, tilings: tuple[Tiling, Tiling] | None = None, uses_lse: bool = True,
    alone: bool = True,
) -> tuple[BackwardPlan, ...]:  # fmt: skip
    """The backward kernels of a program's pieces, in the order in which they run; one plan where it stays whole.

    tilings: of dq, and of dk and dv; None as in `forward_plans`. alone: as there.
    """
    assert program.only.skip is None, "gradients are those of the attention to the tiles that are left"
    if program.only.within is not None:
        return (within_backward(program, spec, uses_lse),)
    if not program.plain:
        return _of_parts(program, lambda part, first: _backward_part(part, spec, tilings, uses_lse, first))
    pieces = _pieces(program, spec, alone)
    if not pieces:
        return (backward_plan(program, spec, *(tilings or choose_backward_tilings(program, spec)), uses_lse=uses_lse),)
    if isinstance(pieces, PermutedPiece):
        return (_permuted_backward(pieces, spec, tilings, uses_lse),)
    if isinstance(pieces[0], SplitPiece):
        return _of_split(pieces, lambda piece: _split_backward(piece, spec, tilings, uses_lse))
    program = _of_pieces(program)
    branch = branch_scalars(program, spec)
    plans = [
        _backward_piece(program, piece, spec, tilings, branch, uses_lse, number) for number, piece in enumerate(pieces)
    ]
    first = plans[0]
    if len(plans) == 1 and spec.whole and isinstance(first.layout, Layout):
        elsewhere = {x.over for x in first.learned} & {Over.DIAGONALS, Over.PAIRS}
        plans = [replace(first, rows_apart=not first.layout.q.every and not elsewhere)]
    return _of_one_program(plans)


def _backward_piece(
    program: Program, piece: Piece | BoxPiece, spec: Spec, tilings: tuple[Tiling, Tiling] | None,
    branch: dict[str, Any], uses_lse: bool, number: int,
) -> BackwardPlan:  # fmt: skip
    spec = _spec_of(piece, spec)
    scattered = _scattered_tiling(piece, spec, stages=2, gradients=True)
    tiling, key_tiling = tilings or (backward_tilings(spec) if scattered is None else (scattered, scattered))
    if number:
        branch = branch | {"sink": None}
    key_runs = TileRuns((), ())
    if isinstance(piece, BoxPiece):
        # One layout for both kernels.
        tiling = _tiling_of(piece, spec, tiling)
        layout, visited, mask = _boxes(program, piece, spec, tiling)
        key_visited, key_mask = BoxRuns(), None
        if spec.backend is not Backend.CPU:
            _, key_visited, key_mask = _boxes(program, piece, spec, tiling, Side.KEY)
        return BackwardPlan(
            program, spec, tiling, TileRuns((), ()), mask, **branch, key_tiling=tiling, key_runs=key_runs,
            key_mask=key_mask,
            **slopes(program, branch), uses_lse=uses_lse, layout=layout, follows=number > 0,
            box_runs=visited, key_box_runs=key_visited,
        )  # fmt: skip
    runs = closed_runs(piece.relation, program, spec, tiling, Side.QUERY, piece.layout)
    if spec.backend is not Backend.CPU:
        key_runs = closed_runs(piece.relation, program, spec, key_tiling, Side.KEY, piece.layout)
    mask = piece_mask(piece, spec) if runs.partial or key_runs.partial else None
    return BackwardPlan(
        program, spec, tiling, runs, mask, **branch, key_tiling=key_tiling, key_runs=key_runs, key_mask=mask,
        **slopes(program, branch), uses_lse=uses_lse, layout=piece.layout, follows=number > 0,
    )  # fmt: skip


def piece_mask(piece: Piece, spec: Spec) -> Scalar | None:
    """The condition for a pair of a visited tile of a piece, in the indices of its layout; None where it always holds.

    Conditions on data in it read the tokens.
    """
    relation, layout = piece.relation, piece.layout
    found = condition(relation.pairs, relation.context, relation.uniform | relation.atoms, layout)
    return shaped(specialise(fold(normalise(found)), spec.sizes))
