"""Kernels that make lists of tiles from a plan. Read as text, and compiled for a device when it first needs them.

A program reads some rows of a plan that lists members, [batch, heads, classes, slots]; an entry counts if it is a
member above all before it. With the tiles of a query tile in a few intervals (`ends`: first, end, step and kind for
each), those that it sees whole are of kind 0, those that it sees in part of kind 1.
"""

import triton
import triton.language as tl


@triton.jit
def later(a, b):
    return tl.maximum(a, b)


@triton.jit
def kinds(
    plan_ptr,
    stride_b,
    stride_h,
    stride_r,
    stride_c,
    ends_ptr,
    b,
    h,
    tile,
    n,
    q_tiles,
    k_tiles,
    classes,
    class_rows,
    first_row,
    block_q,
    members,
    each,
    slots,
    ends_head,
    runs,
):
    """[tiles, entries]: the key tiles that query tiles list, and their kind, -1 where they do not count."""
    # Rows may stand before the first position: they see nothing, and read the first class.
    row_class = tl.maximum(tl.minimum((tile * block_q + first_row) // class_rows, classes - 1), 0)
    row = plan_ptr + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + row_class.to(tl.int64) * stride_r
    there = (tile < q_tiles) & (n < slots * each)
    slot = n // each
    entry = tl.load(row + slot * stride_c, mask=there, other=-1)
    earlier = tl.load(row + (slot - 1) * stride_c, mask=there & (slot > 0), other=-1)
    # Members are counted in 32 bits, whatever the plan has.
    entry = tl.minimum(tl.maximum(entry, -1), 2147483647).to(tl.int32)
    earlier = tl.minimum(tl.maximum(earlier, -1), 2147483647).to(tl.int32)
    before = tl.associative_scan(earlier, 1, later)
    k_tile = tl.minimum(entry, members) * each + n % each
    counts = there & (entry > before) & (entry < members) & (k_tile < k_tiles)
    kind = tl.full(k_tile.shape, -1, tl.int32)
    for i in range(runs):
        at = ends_ptr + h * ends_head + (tl.minimum(tile, q_tiles - 1) * runs + i) * 4
        low, high, step = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        inside = counts & (k_tile >= low) & (k_tile < high) & ((k_tile - low) % step == 0)
        kind = tl.where(inside, tl.load(at + 3), kind)
    return k_tile, kind


@triton.jit
def list_by_queries(
    plan_ptr,
    stride_b,
    stride_h,
    stride_r,
    stride_c,
    ends_ptr,
    out_ptr,
    out_head,
    heads,
    q_tiles,
    k_tiles,
    classes,
    class_rows,
    first_row,
    block_q,
    members,
    each,
    slots,
    ends_head,
    runs,
):
    """The key tiles of one query tile."""
    WIDTH: tl.constexpr = 16
    tile = tl.program_id(0) % q_tiles
    head = tl.program_id(0) // q_tiles
    n = tl.arange(0, WIDTH)
    k_tile, kind = kinds(
        plan_ptr, stride_b, stride_h, stride_r, stride_c, ends_ptr, head // heads, head % heads,
        tile + tl.zeros([1, 1], tl.int32), n[None, :], q_tiles, k_tiles, classes, class_rows, first_row, block_q,
        members, each, slots, ends_head, runs,
    )  # fmt: skip
    k_tile, kind = tl.reshape(k_tile, [WIDTH]), tl.reshape(kind, [WIDTH])
    full, partial = (kind == 0).to(tl.int32), (kind == 1).to(tl.int32)
    out = out_ptr + head.to(tl.int64) * out_head
    begin = 3 * q_tiles + tile * slots * each
    middle = begin + tl.sum(full, 0)
    tl.store(out + 3 * tile, begin)
    tl.store(out + 3 * tile + 1, middle)
    tl.store(out + 3 * tile + 2, middle + tl.sum(partial, 0))
    tl.store(out + begin + tl.cumsum(full, 0) - 1, k_tile, mask=kind == 0)
    tl.store(out + middle + tl.cumsum(partial, 0) - 1, k_tile, mask=kind == 1)


@triton.jit
def count_by_keys(
    plan_ptr,
    stride_b,
    stride_h,
    stride_r,
    stride_c,
    ends_ptr,
    counts_ptr,
    counts_head,
    heads,
    q_tiles,
    k_tiles,
    classes,
    class_rows,
    first_row,
    block_q,
    members,
    each,
    slots,
    ends_head,
    runs,
    chunks,
    steps,
):
    """How many entries of a chunk of query tiles go to each group: a key tile and a kind."""
    WIDTH: tl.constexpr = 16
    ROWS: tl.constexpr = 128 // WIDTH
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks
    n = tl.arange(0, WIDTH)
    counts = counts_ptr + head.to(tl.int64) * counts_head + chunk
    for step in range(steps):
        tile = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)
        k_tile, kind = kinds(
            plan_ptr, stride_b, stride_h, stride_r, stride_c, ends_ptr, head // heads, head % heads, tile[:, None],
            n[None, :], q_tiles, k_tiles, classes, class_rows, first_row, block_q, members, each, slots, ends_head,
            runs,
        )  # fmt: skip
        # Whole numbers: their sum has no order.
        at = counts + (2 * k_tile + kind).to(tl.int64) * chunks
        tl.atomic_add(at, 1, mask=kind >= 0, sem="relaxed")


@triton.jit
def place_by_keys(
    plan_ptr,
    stride_b,
    stride_h,
    stride_r,
    stride_c,
    ends_ptr,
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
    members,
    each,
    slots,
    ends_head,
    runs,
    chunks,
    steps,
    begin,
    codes,
):
    """Write the entries of a chunk to their places: counts are sums by now, of all before the chunk and its group.

    A step adds its own to those of its chunk, which no other program reads, so that the next one goes on after it.
    codes: an entry is written as query tile * codes + its place in the row (0: as the query tile).
    """
    WIDTH: tl.constexpr = 16
    ROWS: tl.constexpr = 128 // WIDTH
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks
    n = tl.arange(0, WIDTH)
    order = tl.arange(0, 128)
    counts = counts_ptr + head.to(tl.int64) * counts_head + chunk
    for step in range(steps):
        tile = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)
        k_tile, kind = kinds(
            plan_ptr, stride_b, stride_h, stride_r, stride_c, ends_ptr, head // heads, head % heads, tile[:, None],
            n[None, :], q_tiles, k_tiles, classes, class_rows, first_row, block_q, members, each, slots, ends_head,
            runs,
        )  # fmt: skip
        group = tl.reshape(tl.where(kind >= 0, 2 * k_tile + kind, -1), [128])
        code = tl.where(codes > 0, tile[:, None] * codes + n[None, :], tile[:, None] + n[None, :] * 0)
        code = tl.reshape(code, [128])
        same = (group[:, None] == group[None, :]) & (order[None, :] < order[:, None])
        rank = tl.sum(same.to(tl.int32), 1)
        at = counts + group.to(tl.int64) * chunks
        # Not from the cache of a multiprocessor, which atomics pass by.
        before = tl.load(at, mask=group >= 0, other=0, cache_modifier=".cg")
        tl.store(out_ptr + head.to(tl.int64) * out_head + begin + before + rank, code, mask=group >= 0)
        tl.debug_barrier()
        tl.atomic_add(at, 1, mask=group >= 0, sem="relaxed")
        tl.debug_barrier()


@triton.jit
def head_by_keys(
    counts_ptr,
    counts_head,
    out_ptr,
    out_head,
    k_tiles,
    chunks,
    begin,
    blocks,
):
    """Where the entries of each key tile begin, where those of kind 1 do, and where they end."""
    head = tl.program_id(0) // blocks
    k_tile = tl.program_id(0) % blocks * 128 + tl.arange(0, 128)
    counts = counts_ptr + head.to(tl.int64) * counts_head
    out = out_ptr + head.to(tl.int64) * out_head + 3 * k_tile
    there = k_tile < k_tiles
    for i in range(3):
        groups = (2 * k_tile + i).to(tl.int64)
        before = tl.load(counts + groups * chunks, mask=there, other=0)
        tl.store(out + i, begin + before, mask=there)


@triton.jit
def cut_lists(
    list_ptr,
    list_batch,
    list_head,
    parts_ptr,
    heads,
    tiles,
    longest,
    parts,
):
    """The parts of a head's lists that have more than `longest` entries: which list, where the entries begin and end,
    and of the first part of a list how many it has. The rest of the table holds zeros."""
    LISTS: tl.constexpr = 1024
    program = tl.program_id(0)
    lists = list_ptr + program // heads * list_batch + program % heads * list_head
    table = parts_ptr + program.to(tl.int64) * parts * 4
    n = tl.arange(0, LISTS)
    before = 0
    for block in range(tl.cdiv(tiles, LISTS)):
        tile = block * LISTS + n
        begin = tl.load(lists + 3 * tile, mask=tile < tiles, other=0)
        end = tl.load(lists + 3 * tile + 2, mask=tile < tiles, other=0)
        count = tl.where(end - begin > longest, tl.cdiv(end - begin, longest), 0)
        size = tl.cdiv(end - begin, tl.maximum(count, 1))
        first = before + tl.cumsum(count) - count
        for i in range(tl.max(count)):
            at = table + 4 * (first + i)
            there = (i < count) & (first + i < parts)
            tl.store(at, tile, mask=there)
            tl.store(at + 1, begin + i * size, mask=there)
            tl.store(at + 2, tl.minimum(begin + (i + 1) * size, end), mask=there)
            tl.store(at + 3, tl.where(i == 0, count, 0), mask=there)
        before += tl.sum(count)
    for block in range(tl.cdiv(4 * tl.maximum(parts - before, 0), LISTS)):
        at = 4 * before + block * LISTS + n
        tl.store(table + at, tl.zeros([LISTS], tl.int32), mask=at < 4 * parts)
