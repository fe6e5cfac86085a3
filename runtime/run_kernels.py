"""Kernels of runs of equal ids along tokens. Read as text, and compiled for a device when it first needs them."""

import triton
import triton.language as tl


@triton.jit
def run_ends(
    ids_ptr,
    out_ptr,
    tokens,
    lead,
    chunks,
):
    """Of each token the first one of its run, and one past the last: [2, lead, tokens] of ids [lead, tokens].

    A program has the tokens of a chunk. Where the first of them begins no run, it looks back for the one that does.
    Ends are the beginnings of the tokens in the other order.
    """
    SIZE: tl.constexpr = 1024
    LONG: tl.constexpr = 4096
    start = tl.program_id(0) % chunks * SIZE
    row = tl.program_id(0) // chunks % lead
    mirrored = tl.program_id(0) // chunks // lead
    origin = mirrored * (tokens - 1)
    sign = 1 - 2 * mirrored
    ids = ids_ptr + row.to(tl.int64) * tokens
    i = start + tl.arange(0, SIZE)
    first = tl.associative_scan(tl.where(begins_run(ids, i, origin, sign, tokens), i, -1), 0, later)
    found = tl.max(tl.where(i == start, first, -1), 0)
    at = start
    while (found < 0) & (at > 0):
        at -= LONG
        j = at + tl.arange(0, LONG)
        found = tl.max(tl.where(begins_run(ids, j, origin, sign, tokens), j, -1), 0)
    first = tl.maximum(first, found)
    out = out_ptr + (mirrored * lead + row).to(tl.int64) * tokens
    tl.store(out + origin + sign * i, tl.where(mirrored != 0, tokens - first, first), mask=i < tokens)


@triton.jit
def begins_run(ids, i, origin, sign, tokens):
    """Whether tokens in an order have another id than the one before."""
    there = (i >= 0) & (i < tokens)
    own = tl.load(ids + origin + sign * i, mask=there, other=0)
    before = tl.load(ids + origin + sign * (i - 1), mask=there & (i > 0), other=0)
    return there & ((i == 0) | (own != before))


@triton.jit
def later(a, b):
    return tl.maximum(a, b)


@triton.jit
def run_entries(
    ends_ptr,
    present_ptr,
    out_ptr,
    tokens,
    lead,
    chunks,
    size,
    step,
    bounded,
):
    """The entries of runs, as `runs.document_entries` has them: [4, lead, tokens] of ends as `run_ends` makes them.

    A program has the tokens of a chunk, and counts the entries of those before. bounded: `present` tells how many
    tokens there are.
    """
    SIZE: tl.constexpr = 1024
    LONG: tl.constexpr = 4096
    chunk = tl.program_id(0) % chunks
    row = tl.program_id(0) // chunks
    each = lead.to(tl.int64) * tokens
    begins = ends_ptr + row.to(tl.int64) * tokens
    start = chunk * SIZE
    before = 0
    for at in range(0, start, LONG):
        j = at + tl.arange(0, LONG)
        begin = tl.load(begins + j, mask=j < start, other=0)
        before += tl.sum(((j < start) & ((j - begin) % step == 0)).to(tl.int32), 0)
    n = start + tl.arange(0, SIZE)
    there = n < tokens
    begin = tl.load(begins + n, mask=there, other=0)
    end = tl.minimum(n + size, tl.load(begins + each + n, mask=there, other=0))
    if bounded != 0:
        end = tl.minimum(end, tl.load(present_ptr + row))
    opens = there & ((n - begin) % step == 0)
    number = before + tl.cumsum(opens.to(tl.int32), 0) - 1
    out = out_ptr + row.to(tl.int64) * tokens
    tl.store(out + n, number, mask=there)
    tl.store(out + each + number, n, mask=opens)
    tl.store(out + 2 * each + number, end, mask=opens)
    tl.store(out + 3 * each + number, begin, mask=opens)
    if chunk == chunks - 1:
        for at in range(before + tl.sum(opens.to(tl.int32), 0), tokens, SIZE):
            j = at + tl.arange(0, SIZE)
            for part in tl.static_range(1, 4):
                tl.store(out + part * each + j, tokens, mask=j < tokens)
