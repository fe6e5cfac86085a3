"""Kernels of cuts, and of the query tiles that begin where these jump. Read as text, and compiled for a device when it
first needs them."""

import triton
import triton.language as tl


@triton.jit
def search(
    own_ptr,
    stride_own_b,
    stride_own_h,
    stride_own_n,
    other_ptr,
    stride_other_b,
    stride_other_h,
    stride_other_n,
    out_ptr,
    heads,
    size,
    keys,
    first,
    position,
    inclusive,
    reflexive,
    steps,
    chunks,
):
    """Of each of `size` own values how many of the other side's lie below it, or at most at it, and `first`.

    What is left to search is divided by four in each step: a step waits for memory once. reflexive: own value n is that
    of the other side at `position` + n, which bounds what is found.
    """
    SIZE: tl.constexpr = 128
    lead = tl.program_id(0) // chunks
    b = (lead // heads).to(tl.int64)
    h = (lead % heads).to(tl.int64)
    n = tl.program_id(0) % chunks * SIZE + tl.arange(0, SIZE)
    at = own_ptr + b * stride_own_b + h * stride_own_h
    own = tl.load(at + n * stride_own_n, mask=n < size, other=0).to(tl.int64)
    other = other_ptr + b * stride_other_b + h * stride_other_h
    low = tl.zeros([SIZE], tl.int32)
    high = low + keys
    for _ in range(steps):
        left = high - low
        second = low + left // 4
        third = low + left // 2
        fourth = third + (left - left // 2) // 2
        open = (n < size) & (left > 0)
        past_second = passed(other, stride_other_n, second, own, inclusive, open)
        past_third = passed(other, stride_other_n, third, own, inclusive, open)
        past_fourth = passed(other, stride_other_n, fourth, own, inclusive, open)
        above = tl.where(past_third, tl.where(past_fourth, fourth, third), second) + 1
        below = tl.where(past_third, tl.where(past_fourth, high, fourth), third)
        high = tl.where(open, tl.where(past_second, below, second), high)
        low = tl.where(open & past_second, above, low)
    found = low + first
    if reflexive != 0:
        itself = n + position
        found = tl.where(inclusive != 0, tl.maximum(found, itself + 1), tl.minimum(found, itself))
    tl.store(out_ptr + lead.to(tl.int64) * size + n, found, mask=n < size)


@triton.jit
def passed(other, stride, at, own, inclusive, open):
    value = tl.load(other + at * stride, mask=open, other=0).to(tl.int64)
    return (value < own) | ((value == own) & (inclusive != 0))


@triton.jit
def begin_tiles(
    first_ptr,
    stride_first_b,
    stride_first_n,
    out_ptr,
    out_batch,
    rows,
    start,
    k_len,
    most,
):
    """Of one batch entry the number of tiles, the first row of each, and from then on `rows`: `most` + 2 numbers.

    A program goes over chunks of LONG rows. A document that is long enough holds the first row of some chunk, so these
    tell of all of them where they begin, and at most one begins inside a chunk. Whatever the cuts hold, tiles follow
    one another, none has more than SIZE rows, and a chunk has at most one more than it is long.
    """
    SIZE: tl.constexpr = 128
    LONG: tl.constexpr = 256
    CHUNKS: tl.constexpr = 64
    b = tl.program_id(0).to(tl.int64)
    first = first_ptr + b * stride_first_b
    out = out_ptr + b * out_batch
    total = 0
    origin = 0
    for chunk in range(0, (rows + LONG - 1) // LONG, CHUNKS):
        row = (chunk + tl.arange(0, CHUNKS)) * LONG
        begun = long_document(first, stride_first_n, row, rows, start, k_len, LONG)
        next_begun = long_document(first, stride_first_n, row + LONG, rows, start, k_len, LONG)
        # What begins in the chunk before, or with this one, tiles count from.
        origins = tl.maximum(tl.associative_scan(tl.where(begun > row - LONG, begun, 0), 0, later), origin)
        end = tl.minimum(row + LONG, rows)
        inside = (next_begun > row) & (next_begun < end)
        place = row + ((origins - row) & (SIZE - 1))
        before = tl.maximum((tl.where(inside, next_begun, end) - place + SIZE - 1) // SIZE, 0)
        after = tl.where(inside, (end - next_begun + SIZE - 1) // SIZE, 0)
        count = tl.where(row < rows, before + after, 0)
        at = total + tl.cumsum(count, 0) - count
        for i in tl.static_range(LONG // SIZE + 1):
            tile = tl.where(i < before, place + i * SIZE, next_begun + (i - before) * SIZE)
            tl.store(out + 1 + at + i, tile, mask=i < count)
        total += tl.sum(count, 0)
        origin = tl.max(origins, 0)
    tl.store(out, total)
    for i in range(total, most + 1, CHUNKS):
        tile = i + tl.arange(0, CHUNKS)
        tl.store(out + 1 + tile, rows, mask=tile <= most)


@triton.jit
def later(a, b):
    return tl.maximum(a, b)


@triton.jit
def long_document(first, stride, row, rows, start, k_len, LONG: tl.constexpr):
    """The first row of the document of a row, of those that begin in the call and have LONG rows in it; else -1."""
    there = (row >= 0) & (row < rows)
    at = tl.minimum(tl.maximum(row + start, 0), k_len - 1)
    begin = tl.load(first + at * stride, mask=there, other=-1) - start
    found = there & (begin >= 0) & (begin <= row) & (begin <= rows - LONG)
    last = tl.minimum(tl.maximum(begin + start + LONG - 1, 0), k_len - 1)
    same = tl.load(first + last * stride, mask=found, other=-1) - start
    return tl.where(found & (same == begin), begin, -1)
