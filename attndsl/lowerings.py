"""Which lowering a call on a target gets, forward and for its gradients, in words: `explain` says it."""

from __future__ import annotations

from dataclasses import replace

from attndsl.copying import copied, in_order, is_long
from attndsl.one_pass import prefers_two_passes
from attndsl.piece_plans import backward_plans
from attndsl.plan import Backend, Spec
from attndsl.program import CallShape, Program
from attndsl.properties import is_whole
from attndsl.targets import (
    GLUON_VERSIONS,
    default_refusal,
    gradients_refusal,
    hopper_refusal,
    layout_refusal,
    pieces_refusal,
)

_COPIES = "copies of q, k and v in that order where rows share their data with many keys"


def forward_lowering(program: Program, spec: Spec, shape: CallShape) -> str:
    """Which lowering a call gets."""
    spec = replace(spec, whole=is_whole(program, shape))
    if spec.target == "cpu":
        return "blocked PyTorch"
    of_copies = ""
    if (moved := _moved(program, spec, shape)) is not None and not default_refusal(moved, in_order(spec)):
        program, spec, of_copies = moved, in_order(spec), f", on {_COPIES}"
    if reason := hopper_refusal(program, spec) or pieces_refusal(program, spec):
        return f"portable Triton, since {reason}"
    if reason := default_refusal(program, spec):
        return f"portable Triton, {reason}"
    tested = f"the Hopper lowering (Gluon), with the Triton versions it was tested on ({', '.join(GLUON_VERSIONS)}x)"
    pieces = " of the pieces that hardware copies" if layout_refusal(program, spec) else ""
    return f"{tested}{of_copies}{pieces}; else, and with dropout, portable Triton"


def gradients_lowering(program: Program, spec: Spec, shape: CallShape) -> str:
    """Which lowering its gradients get."""
    if spec.target == "cpu":
        return "blocked PyTorch"
    moved, of_copies = _moved(program, spec, shape), ""
    if moved is not None and not gradients_refusal(moved, in_order(spec)):
        program, spec, of_copies = moved, in_order(spec), f"on {_COPIES}, else by portable Triton; "
    if reason := gradients_refusal(program, spec) or layout_refusal(program, spec):
        return f"portable Triton, since {reason}"
    one_pass = backward_plans(program, replace(spec, backend=Backend.GLUON))[0]
    if prefers_two_passes(one_pass, shape):
        return "portable Triton, predicted to be ahead of the Hopper lowering with so few tiles a key"
    sums = 4 * shape.batch * shape.heads * shape.rows * shape.dim / 2**20
    return (
        f"{of_copies}the Hopper lowering, in one pass: dk and dv repeat to the bit, dq to the rounding of its sums, "
        f"which take {sums:,.0f} MiB; with torch.use_deterministic_algorithms(True) portable Triton, where all repeat"
    )


def _moved(program: Program, spec: Spec, shape: CallShape) -> Program | None:
    """The program of a call's tokens in the order of its data, where they are copied into it."""
    piece = copied(program, spec) if is_long(min(shape.rows, shape.k_len)) else None
    return None if piece is None else piece.program
