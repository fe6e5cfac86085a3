"""The tables of query tiles that begin where documents do (`attndsl/begins.py`), in one launch and without waiting."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from attndsl.begins import most_tiles
from attndsl.derivation import RowTiles
from attndsl.program import Axis, CallShape, InputDecl
from attndsl.runtime.cuts import kernel_text
from attndsl.runtime.device_kernels import device_kernel


def row_tiles(made: RowTiles, first: InputDecl, values: Tensor, shape: CallShape) -> Tensor:
    """The table, int32, of the first tokens `values` of each token's document."""
    size = table_size(made, first, shape)
    found = torch.empty(size, dtype=torch.int32, device=values.device)
    batch_stride = values.stride(0) if len(size) == 2 and values.shape[0] > 1 else 0
    batch = size[0] if len(size) == 2 else 1
    sizes = (batch, shape.rows, shape.k_len, size[-1])
    launch = _ready(values.device, values.dtype, (batch_stride, values.stride(-1)), sizes, made.rows, made.long)
    launch(first_ptr=values, out_ptr=found)
    return found


def table_size(made: RowTiles, first: InputDecl, shape: CallShape) -> list[int]:
    """Sizes of the table: of the most tiles that there may be, and two numbers more."""
    batch = [shape.batch] if any(dim.axis is Axis.B for dim in first.dims) else []
    return [*batch, most_tiles(made, shape.rows) + 2]


@functools.lru_cache(maxsize=256)
def _ready(
    device: torch.device, dtype: torch.dtype, strides: tuple[int, int], sizes: tuple[int, int, int, int], block: int,
    long: int,
) -> Callable[..., None]:  # fmt: skip
    batch, rows, k_len, size = sizes
    written = "SIZE: tl.constexpr = {}\n    LONG: tl.constexpr = {}\n"
    assert kernel_text().count(written.format(128, 256)) == 1
    text = kernel_text().replace(written.format(128, 256), written.format(block, long))
    given = {
        "first_ptr": dtype, "stride_first_b": strides[0], "stride_first_n": strides[1], "out_ptr": torch.int32,
        "out_batch": size, "rows": rows, "start": k_len - rows, "k_len": k_len, "most": size - 2,
    }  # fmt: skip
    return device_kernel(text, "begin_tiles", batch, device, given)
