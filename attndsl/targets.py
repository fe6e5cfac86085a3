"""Devices that a kernel can be looked at, or compiled, for: none of them need be there."""

from __future__ import annotations

import re
from dataclasses import replace

from attndsl.branches import Given
from attndsl.derive import derive
from attndsl.diagnostics import error
from attndsl.effort import remembered
from attndsl.left_tiles import TILE, reads_tiles
from attndsl.listing import LEAST, reads_plans
from attndsl.pieces import choose_pieces
from attndsl.plan import Backend, DType, Loads, Spec, Tiling, head_parts
from attndsl.program import Program, reads
from attndsl.splitting import SplitPiece, splits
from attndsl.tile_sizes import HOPPER_ROWS, backward_tilings, copies_piece, default_tiling
from attndsl.tiling import all_listables, choose_backward_tilings, choose_tiling, prefers_portable
from attndsl.view_plans import listed_tilings

# As users write them, and as plans do.
TARGETS = {
    "sm_80": "cuda:80", "sm_86": "cuda:86", "sm_89": "cuda:89", "sm_90": "cuda:90", "sm_100": "cuda:100",
    "gfx90a": "hip:gfx90a", "gfx942": "hip:gfx942",
}  # fmt: skip
# Dense bf16 tensor operations a second and bytes of memory a second, from the vendors' data sheets.
RATES = {
    "cuda:80": (312e12, 2.0e12), "cuda:90": (989e12, 3.35e12), "cuda:100": (2250e12, 8.0e12),
    "hip:gfx942": (1307e12, 5.3e12),
}  # fmt: skip
DTYPE_NAMES = {dtype.value: dtype for dtype in DType} | {
    "bf16": DType.BFLOAT16, "fp16": DType.FLOAT16, "fp32": DType.FLOAT32, "fp64": DType.FLOAT64,
}  # fmt: skip
BYTES = {DType.BFLOAT16: 2, DType.FLOAT16: 2, DType.FLOAT32: 4, DType.FLOAT64: 8}
# Gluon's interface moves between releases: the versions that the Hopper lowering was tested on.
GLUON_VERSIONS = ("3.6.",)
BACKENDS = ("triton", "gluon", "cpu")
# Keys of a tile below which products on Hopper are not what they cost.
_KEYS = 64


def parse_target(target: str) -> str:
    """`sm_90` as `cuda:90`, `gfx942` as `hip:gfx942`; a plan's own spelling stays. Raises `PatternError` (A530)."""
    if target in TARGETS.values() or re.fullmatch(r"cuda:\d{2,3}|hip:gfx[0-9a-f]+", target):
        return target
    if target not in TARGETS:
        raise error("A530", f"there is no target {target!r}", help=f"one of {', '.join(TARGETS)}")
    return TARGETS[target]


def make_spec(
    target: str, backend: str, heads: int, kv_heads: int, dim: int, v_dim: int | None = None, dtype: str = "bfloat16"
) -> Spec:
    """What a kernel for dense tensors of these sizes is planned for. Raises `PatternError` for impossible ones."""
    if backend not in BACKENDS:
        raise error("A509", f"there is no backend {backend!r}", help=f"one of {', '.join(BACKENDS)}")
    if dtype not in DTYPE_NAMES:
        known = ", ".join(d.value for d in DType)
        raise error("A502", f"there is no dtype {dtype!r}", help=f"one of {known}")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise error("A505", f"{heads} query heads are not a multiple of {kv_heads} key heads", help="choose a multiple")
    for name, size in (("D", dim), ("Dv", dim if v_dim is None else v_dim)):
        if size % 8 or not 8 <= size <= 256:
            raise error("A506", f"{name} = {size}: head dimensions are multiples of 8 up to 256", help="choose one")
    kind = DTYPE_NAMES[dtype]
    if backend != "gluon" and kind is DType.FLOAT8:
        raise error(
            "A508", "float8 has products of its own on Hopper alone", help="choose backend 'gluon', or bfloat16"
        )
    if backend != "cpu" and kind is DType.FLOAT64:
        raise error("A508", "float64 runs on the CPU backend only", help="choose float32, or the CPU backend")
    device = "cpu" if backend == "cpu" else parse_target(target)
    spec = Spec(heads, kv_heads, dim, dim if v_dim is None else v_dim, kind, device)
    return replace(spec, loads=Loads.DESCRIPTOR) if has_tensor_copies(spec) else spec


def hopper_refusal(program: Program, spec: Spec) -> str:
    """Why a program has no Hopper lowering for a spec; empty where it has one, or where only the order of its tokens
    can be in the way (`layout_refusal`)."""
    if spec.target != "cuda:90":
        return f"the Hopper lowering is for sm_90, not {spec.target}"
    if spec.dtype not in (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT8):
        return f"the Hopper lowering takes bfloat16 and float16, not {spec.dtype.value}"
    if spec.dropout:
        return "dropout has no Hopper lowering yet"
    # One part of a softmax that has it is enough: the others run before or after it.
    reasons = [part_refusal(program.with_branch(parts=(part,)), spec) for part in program.only.parts]
    return "" if "" in reasons else reasons[0]


@remembered(1024)
def part_refusal(program: Program, spec: Spec) -> str:
    """Why a program of one part has none on Hopper, as `hopper_refusal` says it."""
    if program.only.within is not None:
        return "two levels have no Hopper lowering yet"
    if program.only.skip is not None:
        return "tiles that scores skip have no Hopper lowering yet"
    if reads_tiles(program):
        return f"tiles that scores left have {TILE} rows: the Hopper lowering has {HOPPER_ROWS}"
    if spec.dtype is DType.FLOAT8 and (reason := _float8_refusal(program, spec)):
        return reason
    return _lists_refusal(program, spec) if program.plain else _view_refusal(program, spec)


def _view_refusal(program: Program, spec: Spec) -> str:
    """Why the entries of a view do not suit it: a list of its tiles has to be one of the kernel's own."""
    (part,) = derive(program).only.parts
    if isinstance(part.view, Given) and part.view.mass is not None and reads(part.view.mass, "k"):
        return "how many tokens an entry counts for is data, read entry by entry: a tile's threads do not hold so many"
    own = default_tiling(replace(spec, backend=Backend.GLUON))
    (tiling,) = listed_tilings(program, spec, (own,))
    return _small_tiles(tiling) if tiling != own else ""


def _lists_refusal(program: Program, spec: Spec) -> str:
    """Why tiles that plans or draws list do not suit the Hopper lowering, as `hopper_refusal` says it: it takes lists
    of its own tiles, of 128 rows and of at least 64 keys."""
    listed = [found for found, _ in all_listables(program, (spec.heads, spec.kv_heads), spec.lists)]
    if not listed or (not spec.even_start and not reads_plans(program)):
        return ""
    if spec.lists and any(found.gathers(LEAST) for found in listed):
        return "rows that choose for themselves are gathered, which the Hopper lowering does not"
    if choose_tiling(program, replace(spec, backend=Backend.TRITON)).collects:
        return "a tile is made of several members that a plan lists, which the Hopper lowering does not"
    own = choose_tiling(program, replace(spec, backend=Backend.GLUON))
    if not any(found.fits(own.block_q, own.block_k, spec.even_start) for found in listed):
        return "no tile lies in one row class and one member of a plan"
    return _small_tiles(own)


def _small_tiles(own: Tiling) -> str:
    """Why listed tiles are too small, empty where they are not."""
    if own.block_q >= HOPPER_ROWS and own.block_k >= _KEYS:
        return ""
    return f"tiles of {own.block_q} rows and {own.block_k} keys are listed: the Hopper lowering has {HOPPER_ROWS} rows"


def _float8_refusal(program: Program, spec: Spec) -> str:
    """Why products of float8 do not suit a program, as `hopper_refusal` says it."""
    if not program.plain:
        return "entries of views are made in wider dtypes than float8"
    if program.branch.weights is not None:
        return "`weights` may be larger than float8 holds"
    if any(len(head_parts(dim)) > 1 or dim < 32 for dim in (spec.dim, spec.v_dim)):
        return "products of float8 take 32 numbers at once, and were checked with powers of two alone"
    return ""


def gradients_refusal(program: Program, spec: Spec) -> str:
    """Why a program's gradients have no Hopper lowering, as `hopper_refusal` says it of the forward kernel; the spec
    has its `loads`."""
    if reason := hopper_refusal(program, spec):
        return reason
    if spec.dtype is DType.FLOAT8:
        return "float8 tensors have no gradients"
    if not program.plain:
        return "gradients of views have no Hopper lowering yet"
    if program.branch.weights is not None:
        return "gradients of `weights` have no Hopper lowering yet"
    if spec.dim != spec.v_dim or spec.dim not in (64, 128):
        return "the Hopper lowering of gradients takes D = Dv = 64 or 128"
    if spec.loads is not Loads.DESCRIPTOR:
        return "q, k and v do not lie in memory as hardware tensor copies need"
    if any(decl.learnable for decl in program.inputs):
        return "gradients of learnable inputs have no Hopper lowering yet"
    if all_listables(program, (spec.heads, spec.kv_heads), spec.lists):
        hopper = replace(spec, backend=Backend.GLUON)
        (_, usual), (_, own) = backward_tilings(hopper), choose_backward_tilings(program, hopper)
        if own.block_k < usual.block_k:
            return f"tiles of {own.block_k} keys are listed: the Hopper lowering of gradients has {usual.block_k}"
    return ""


def layout_refusal(program: Program, spec: Spec) -> str:
    """Why the order in which tokens are visited has no Hopper lowering, empty where it has: known after a search."""
    if not program.plain:
        return ""  # Known of each part.
    choice = choose_pieces(program, (spec.heads, spec.kv_heads))
    if choice.plain or (isinstance(choice.pieces[0], SplitPiece) and not splits(choice.pieces, spec)):
        return ""
    return "it visits tokens out of order, in pieces, which the Hopper lowering does not yet"


def pieces_refusal(program: Program, spec: Spec) -> str:
    """Why no piece of a program has a Hopper lowering of its forward kernel, empty where one has."""
    if not (reason := layout_refusal(program, spec)):
        return ""
    pieces = choose_pieces(program, (spec.heads, spec.kv_heads)).pieces
    return "" if any(copies_piece(x.layout, spec) for x in pieces if not isinstance(x, SplitPiece)) else reason


def default_refusal(program: Program, spec: Spec) -> str:
    """Why a call that leaves the backend open gets the portable kernel where there is a Hopper lowering; empty where it
    gets the latter."""
    if not program.plain:
        return "as fast as the Hopper lowering over views of so small heads" if spec.dim <= 64 else ""
    if prefers_portable(program, spec):
        return "predicted to be ahead of the Hopper lowering with these heads and so few tiles a row"
    if spec.dim <= 64 and layout_refusal(program, spec):
        return "as fast as the Hopper lowering in pieces of so small heads"
    return ""


def has_tensor_copies(spec: Spec) -> bool:
    """Whether the device copies tiles of such tensors by hardware (TMA), given 16-byte strides and addresses.

    Head dimensions of two parts are left to pointers: with two copies in a row outside a pipelined loop Triton 3.6
    gave wrong values and wild reads on an H200 (the copies share one barrier's memory, which looks like the cause).
    """
    backend, _, arch = spec.target.partition(":")
    whole = len(head_parts(spec.dim)) == len(head_parts(spec.v_dim)) == 1
    return backend == "cuda" and int(arch) >= 90 and spec.dtype is not DType.FLOAT32 and whole
