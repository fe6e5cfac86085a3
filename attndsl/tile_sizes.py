"""Tile sizes that are good without tuning, by device, dtype and head dimension (measured: benchmarks/RESULTS.md)."""

from __future__ import annotations

from attndsl.layers import layers
from attndsl.layout import Layout
from attndsl.listing import EVEN
from attndsl.plan import Backend, DType, Loads, Spec, Tiling, head_parts


def default_tiling(spec: Spec) -> Tiling:
    """Tile sizes that are good without tuning (measured: benchmarks/RESULTS.md)."""
    backend, _, arch = spec.target.partition(":")
    dim = max(spec.dim, spec.v_dim)
    if backend == "cpu":
        return Tiling(128, 64)
    if spec.backend is Backend.GLUON:
        return _hopper_tiling(spec)
    if backend == "hip":
        return Tiling(128, 64, warps=4, stages=1) if dim <= 128 else Tiling(64, 32, warps=4, stages=1)
    if spec.dtype is DType.FLOAT32:
        # No tensor cores: both operands of a product lie in registers.
        if dim <= 64:
            return Tiling(64, 32, warps=8, stages=2)
        return Tiling(32, 16, warps=8, stages=1) if dim <= 128 else Tiling(16, 16, warps=8, stages=1)
    if spec.loads is Loads.DESCRIPTOR:
        # Two programs a multiprocessor hide each other's softmax: ahead of 128 x 128 with one (RESULTS.md).
        return Tiling(64, 64, warps=4, stages=3) if dim <= 128 else Tiling(128, 64, warps=8, stages=2)
    if int(arch) < 90:
        # Products accumulate in registers that hold operands too: larger tiles spill.
        if dim <= 64:
            return Tiling(128, 64, warps=8 if spec.dropout else 4, stages=3)
        if dim <= 128:
            return Tiling(128, 32, warps=8, stages=3)
        return Tiling(64, 16, warps=4, stages=2) if dim <= 192 else Tiling(64, 32, warps=8, stages=2)
    if dim <= 64:
        return Tiling(128, 64, warps=8 if arch == "90" else 4, stages=3)
    return Tiling(128, 64, warps=8, stages=2) if dim <= 128 else Tiling(64, 32, warps=8, stages=2)


# Rows of a program on Hopper, half of them a warpgroup's.
HOPPER_ROWS = 128
# Bytes of shared memory that a program may have on sm_90, and of them those left to barriers.
HOPPER_SHARED, _BARRIERS = 232448, 1024


def _hopper_tiling(spec: Spec) -> Tiling:
    """128 rows and, where registers and shared memory allow it, as many keys; at least two stages of them.

    Programs own several query tiles where there is room for the rows of two.
    """
    size, q_size, own, width = _columns(spec)
    rows = HOPPER_ROWS * (size * q_size + 2 * own)
    # A thread holds scores of half a row's keys and half of its output, beside the weights of the tile before.
    block_k = 128 if width // size - q_size <= 128 else 64

    def stages(places: int) -> int:
        return (HOPPER_SHARED - _BARRIERS - places * rows) // (block_k * width)

    while stages(1) < 2:
        block_k //= 2
    several = stages(2) >= 2
    most = 2 if size * max(spec.dim, spec.v_dim) > 128 else 4
    return Tiling(HOPPER_ROWS, block_k, warps=4, stages=min(stages(1 + several), most), several=several)


def copies_piece(layout: object, spec: Spec) -> bool:
    """Whether the Hopper lowering goes over a piece in this layout: hardware copies every m-th token as it does all."""
    if not isinstance(layout, Layout):
        return False
    seen = [layers(layout, side, HOPPER_ROWS) for side in "qk"]
    fills = all(x is not None and EVEN % x.unit == 0 for x in seen)
    return layout.plain or (spec.whole and fills and spec.dtype is not DType.FLOAT8)


def _columns(spec: Spec) -> tuple[int, int, int, int]:
    """Bytes of an element; columns of q, and of the output that do not leave through q; bytes of a key and value."""
    size = 1 if spec.dtype is DType.FLOAT8 else 2
    q_size, v_size = (sum(part.size for part in head_parts(dim)) for dim in (spec.dim, spec.v_dim))
    own = sum(part.size for n, part in enumerate(head_parts(spec.v_dim)) if not leaves_by_q(spec, n))
    return size, q_size, own, size * (q_size + v_size)


def leaves_by_q(spec: Spec, n: int) -> bool:
    """Whether part n of the output leaves through the shared memory of q: where that has one of its size there."""
    q_parts, part = head_parts(spec.dim), head_parts(spec.v_dim)[n]
    return spec.dtype is not DType.FLOAT8 and n < len(q_parts) and q_parts[n].size == part.size


def backward_tilings(spec: Spec) -> tuple[Tiling, Tiling]:
    """Tile sizes of the backward kernels: of dq, and of dk and dv."""
    if spec.target == "cpu":
        return default_tiling(spec), default_tiling(spec)
    if spec.backend is Backend.GLUON:
        return Tiling(64, 64, warps=4, stages=2), Tiling(64 if spec.dim > 64 else 128, 128, warps=4, stages=2)
    dim = max(spec.dim, spec.v_dim)
    if spec.dtype is DType.FLOAT32:
        if dim <= 64:
            return Tiling(32, 16, warps=8, stages=1), Tiling(16, 32, warps=8, stages=1)
        return Tiling(16, 16, warps=8, stages=1), Tiling(16, 16, warps=8, stages=1)
    if dim > 128:
        return Tiling(32, 32, warps=4, stages=1), Tiling(32, 32, warps=4, stages=1)
    if spec.loads is Loads.DESCRIPTOR:
        # Two or three programs a multiprocessor: ahead of larger tiles, and twice as fast as eight warps (RESULTS.md).
        tiling = Tiling(64, 64, warps=4, stages=3 if dim <= 64 else 2)
        return tiling, tiling
    # Hopper's products read shared memory; elsewhere operands take registers too, and the larger tiles spill.
    if dim <= 64 and spec.target == "cuda:90":
        return Tiling(64, 64, warps=4, stages=2), Tiling(64, 64, warps=4, stages=2)
    return Tiling(64, 64, warps=8, stages=2), Tiling(32, 64, warps=8, stages=2)


def learning_tiling(spec: Spec) -> Tiling:
    """Tile sizes, square, of the kernels for inputs that q and k read together: all operands are loaded per tile."""
    dim = max(spec.dim, spec.v_dim)
    if spec.dtype is DType.FLOAT32:
        return Tiling(32, 32, warps=8, stages=1) if dim <= 64 else Tiling(16, 16, warps=4, stages=1)
    if dim > 128:
        return Tiling(16, 16, warps=4, stages=1)
    # Where products take registers for operands, larger tiles spill.
    large = spec.target == "cuda:90" or spec.target.startswith("hip")
    return Tiling(64, 64, warps=8, stages=1) if large else Tiling(32, 32, warps=4 if dim <= 64 else 8, stages=1)
