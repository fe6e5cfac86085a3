"""Kernels that make lists of tiles from a map. Read as text, as those of `list_kernels.py` are, with which they go.

A map [batch, heads, classes, members] has a byte for each member: a row class chooses it where the byte is not 0, or is
`level` where that is not negative; with `inverted`, where it does not. A byte of 2 says with `whole` that a tile which
its query tile sees in part is seen whole. Which key tiles a query tile sees, whole or in part, is in `ends`, as there.
"""

import triton
import triton.language as tl


@triton.jit
def kinds_in_map(
    map_ptr,
    stride_b,
    stride_h,
    stride_r,
    stride_c,
    ends_ptr,
    ends_batch,
    ends_head,
    b,
    h,
    q_tile,
    k_tile,
    q_tiles,
    k_tiles,
    classes,
    class_rows,
    first_row,
    block_q,
    each,
    runs,
    level,
    inverted,
    whole,
):
    """[query tiles, key tiles]: 0 where a pair is seen whole, 1 where in part, -1 where it is not listed."""
    there = (q_tile < q_tiles) & (k_tile < k_tiles)
    row_class = tl.maximum(tl.minimum((q_tile * block_q + first_row) // class_rows, classes - 1), 0)
    at = map_ptr + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + row_class.to(tl.int64) * stride_r
    value = tl.load(at + (k_tile // each).to(tl.int64) * stride_c, mask=there, other=0).to(tl.int32)
    chosen = tl.where(level < 0, value, (value == level).to(tl.int32)) != 0
    listed = there & (chosen != (inverted != 0))
    kind = tl.full(there.shape, -1, tl.int32)
    at = ends_ptr + b.to(tl.int64) * ends_batch + h.to(tl.int64) * ends_head
    at += tl.minimum(q_tile, q_tiles - 1) * runs * 4
    for i in range(runs):
        low, high, step = tl.load(at + 4 * i), tl.load(at + 4 * i + 1), tl.load(at + 4 * i + 2)
        inside = listed & (k_tile >= low) & (k_tile < high) & ((k_tile - low) % step == 0)
        kind = tl.where(inside, tl.load(at + 4 * i + 3), kind)
    return tl.where((kind == 1) & (value == 2) & (whole != 0), 0, kind)


@triton.jit
def list_map_by_queries(
    map_ptr,
    stride_b,
    stride_h,
    stride_r,
    stride_c,
    ends_ptr,
    ends_batch,
    ends_head,
    out_ptr,
    out_head,
    heads,
    q_tiles,
    k_tiles,
    classes,
    class_rows,
    first_row,
    block_q,
    each,
    runs,
    level,
    inverted,
    whole,
    entries,
):
    """The key tiles of one query tile, which has room for `entries`: counted, then written."""
    CHUNK: tl.constexpr = 256
    tile = tl.program_id(0) % q_tiles
    head = tl.program_id(0) // q_tiles
    q_tile = tile + tl.zeros([CHUNK], tl.int32)
    full, partial = 0, 0
    for first in range(0, k_tiles, CHUNK):
        kind = kinds_in_map(
            map_ptr, stride_b, stride_h, stride_r, stride_c, ends_ptr, ends_batch, ends_head, head // heads,
            head % heads, q_tile, first + tl.arange(0, CHUNK), q_tiles, k_tiles, classes, class_rows, first_row,
            block_q, each, runs, level, inverted, whole,
        )  # fmt: skip
        full += tl.sum((kind == 0).to(tl.int32), 0)
        partial += tl.sum((kind == 1).to(tl.int32), 0)
    out = out_ptr + head.to(tl.int64) * out_head
    begin = 3 * q_tiles + tile * entries
    middle = begin + full
    tl.store(out + 3 * tile, begin)
    tl.store(out + 3 * tile + 1, middle)
    tl.store(out + 3 * tile + 2, middle + partial)
    for first in range(0, k_tiles, CHUNK):
        k_tile = first + tl.arange(0, CHUNK)
        kind = kinds_in_map(
            map_ptr, stride_b, stride_h, stride_r, stride_c, ends_ptr, ends_batch, ends_head, head // heads,
            head % heads, q_tile, k_tile, q_tiles, k_tiles, classes, class_rows, first_row,
            block_q, each, runs, level, inverted, whole,
        )  # fmt: skip
        is_full, is_partial = (kind == 0).to(tl.int32), (kind == 1).to(tl.int32)
        tl.store(out + begin + tl.cumsum(is_full, 0) - 1, k_tile, mask=kind == 0)
        tl.store(out + middle + tl.cumsum(is_partial, 0) - 1, k_tile, mask=kind == 1)
        begin += tl.sum(is_full, 0)
        middle += tl.sum(is_partial, 0)


@triton.jit
def count_map_by_keys(
    map_ptr,
    stride_b,
    stride_h,
    stride_r,
    stride_c,
    ends_ptr,
    ends_batch,
    ends_head,
    counts_ptr,
    counts_head,
    heads,
    q_tiles,
    k_tiles,
    classes,
    class_rows,
    first_row,
    block_q,
    each,
    runs,
    level,
    inverted,
    whole,
    chunks,
):
    """How many query tiles of a chunk go to each group of some key tiles: a key tile and a kind."""
    ROWS: tl.constexpr = 128
    COLUMNS: tl.constexpr = 16
    k_blocks = tl.cdiv(k_tiles, COLUMNS)
    chunk = tl.program_id(0) % chunks
    k_tile = tl.program_id(0) // chunks % k_blocks * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(0) // chunks // k_blocks
    kind = kinds_in_map(
        map_ptr, stride_b, stride_h, stride_r, stride_c, ends_ptr, ends_batch, ends_head, head // heads, head % heads,
        chunk * ROWS + tl.arange(0, ROWS)[:, None], k_tile[None, :], q_tiles, k_tiles, classes, class_rows, first_row,
        block_q, each, runs, level, inverted, whole,
    )  # fmt: skip
    at = counts_ptr + head.to(tl.int64) * counts_head + (2 * k_tile).to(tl.int64) * chunks + chunk
    tl.store(at, tl.sum((kind == 0).to(tl.int32), 0), mask=k_tile < k_tiles)
    tl.store(at + chunks, tl.sum((kind == 1).to(tl.int32), 0), mask=k_tile < k_tiles)


@triton.jit
def place_map_by_keys(
    map_ptr,
    stride_b,
    stride_h,
    stride_r,
    stride_c,
    ends_ptr,
    ends_batch,
    ends_head,
    counts_ptr,
    counts_head,
    out_ptr,
    out_head,
    heads,
    q_tiles,
    k_tiles,
    classes,
    class_rows,
    first_row,
    block_q,
    each,
    runs,
    level,
    inverted,
    whole,
    chunks,
    begin,
    codes,
):
    """Write a chunk's query tiles to their places: counts are sums by now, of all before the chunk and its group.

    codes: an entry is written as query tile * codes + key tile (0: as the query tile).
    """
    ROWS: tl.constexpr = 128
    COLUMNS: tl.constexpr = 16
    k_blocks = tl.cdiv(k_tiles, COLUMNS)
    chunk = tl.program_id(0) % chunks
    k_tile = tl.program_id(0) // chunks % k_blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    head = tl.program_id(0) // chunks // k_blocks
    q_tile = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    kind = kinds_in_map(
        map_ptr, stride_b, stride_h, stride_r, stride_c, ends_ptr, ends_batch, ends_head, head // heads, head % heads,
        q_tile, k_tile, q_tiles, k_tiles, classes, class_rows, first_row, block_q, each, runs, level, inverted, whole,
    )  # fmt: skip
    code = tl.where(codes > 0, q_tile * codes + k_tile, q_tile + k_tile * 0)
    out = out_ptr + head.to(tl.int64) * out_head + begin
    for i in tl.static_range(2):
        mine = (kind == i).to(tl.int32)
        counts = counts_ptr + head.to(tl.int64) * counts_head + (2 * k_tile + i).to(tl.int64) * chunks + chunk
        before = tl.load(counts, mask=k_tile < k_tiles, other=0)
        tl.store(out + before + tl.cumsum(mine, 0) - 1, code, mask=kind == i)
