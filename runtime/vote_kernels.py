"""The kernels that add up what heads score by. Read as text, and compiled for a device when it first needs it."""

import triton
import triton.language as tl


@triton.jit
def ends(
    raw_ptr,
    candidate_ptr,
    forced_ptr,
    low_ptr,
    high_ptr,
    lists,
    heads,
    rows,
    members,
    how,
    extra,
    stride_raw_b,
    stride_raw_h,
    stride_raw_r,
    stride_raw_m,
    stride_candidate_b,
    stride_candidate_h,
    stride_candidate_r,
    stride_candidate_m,
    stride_forced_b,
    stride_forced_h,
    stride_forced_r,
    stride_forced_m,
):
    """Of each head's row, [lists], what scores are normalised by: how 1, a softmax: the sum of the exponentials and the
    largest; how 2: the least and the largest of those above minus infinity."""
    WIDTH: tl.constexpr = 256
    ROWS: tl.constexpr = 4
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r, h, b = row % rows, row // rows % heads, row // rows // heads
    of_raw = place(b, h, r, stride_raw_b, stride_raw_h, stride_raw_r)
    of_candidate = place(b, h, r, stride_candidate_b, stride_candidate_h, stride_candidate_r)
    of_forced = place(b, h, r, stride_forced_b, stride_forced_h, stride_forced_r)
    # Of each column first: what goes over the whole row is done once.
    high = tl.full([ROWS, WIDTH], -float("inf"), tl.float32)
    low = tl.full([ROWS, WIDTH], float("inf"), tl.float32)
    if how == 1:
        low = tl.zeros([ROWS, WIDTH], tl.float32)
    for begin in range(0, members, WIDTH):
        member = begin + tl.arange(0, WIDTH)[None, :]
        there = (row < lists)[:, None] & (member < members)
        candidate, forced, score = asked(
            candidate_ptr + of_candidate + member * stride_candidate_m,
            forced_ptr + of_forced + member * stride_forced_m,
            raw_ptr + of_raw + member * stride_raw_m,
            there,
        )
        score = tl.where(competes(candidate, forced, score, extra), score, -float("inf"))
        larger = tl.maximum(high, score)
        if how == 1:
            base = tl.where(larger == -float("inf"), 0.0, larger)
            low = low * tl.exp(high - base) + tl.exp(score - base)
        else:
            low = tl.minimum(low, tl.where(score == -float("inf"), float("inf"), score))
        high = larger
    largest = tl.max(high, 1)
    if how == 1:
        base = tl.where(largest == -float("inf"), 0.0, largest)
        least = tl.sum(low * tl.exp(high - base[:, None]), 1)
    else:
        least = tl.min(low, 1)
    tl.store(low_ptr + row, least, mask=row < lists)
    tl.store(high_ptr + row, largest, mask=row < lists)


@triton.jit
def vote(
    raw_ptr,
    candidate_ptr,
    forced_ptr,
    low_ptr,
    high_ptr,
    score_ptr,
    competing_ptr,
    lists,
    heads,
    rows,
    members,
    how,
    extra,
    masses,
    size,
    step,
    stride_raw_b,
    stride_raw_h,
    stride_raw_r,
    stride_raw_m,
    stride_candidate_b,
    stride_candidate_h,
    stride_candidate_r,
    stride_candidate_m,
    stride_forced_b,
    stride_forced_h,
    stride_forced_r,
    stride_forced_m,
):
    """The scores by which members rank, float32 [lists, members], and which compete: of every `step`th head, whose
    `size` heads add theirs up. heads: of the scores. low, high: what `ends` found."""
    WIDTH: tl.constexpr = 256
    ROWS: tl.constexpr = 4
    chunks = tl.cdiv(members, WIDTH)
    row = tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)
    member = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)[None, :]
    there = (row < lists)[:, None] & (member < members)
    made = heads // step
    r, own, b = row % rows, row // rows % made * step, row // rows // made
    first = own // size * size
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    some = tl.zeros([ROWS, WIDTH], tl.int32)
    gone = tl.zeros([ROWS, WIDTH], tl.int32)
    for nth in range(size):
        h = first + nth
        candidate, forced, score = asked(
            candidate_ptr
            + place(b, h, r, stride_candidate_b, stride_candidate_h, stride_candidate_r)
            + member * stride_candidate_m,
            forced_ptr + place(b, h, r, stride_forced_b, stride_forced_h, stride_forced_r) + member * stride_forced_m,
            raw_ptr + place(b, h, r, stride_raw_b, stride_raw_h, stride_raw_r) + member * stride_raw_m,
            there,
        )
        competing = competes(candidate, forced, score, extra)
        weight = score
        if how > 0:
            of_head = (b * heads + h) * rows + r
            low = tl.load(low_ptr + of_head, mask=row < lists, other=0.0)[:, None]
            high = tl.load(high_ptr + of_head, mask=row < lists, other=0.0)[:, None]
            if how == 1:
                weight = tl.where(low > 0, tl.exp(score - high) / tl.where(low > 0, low, 1.0), 0.0)
            else:
                apart = high > low
                between = tl.where(apart, (score - low) / tl.where(apart, high - low, 1.0), 1.0)
                weight = tl.where(score > -float("inf"), between, 0.0)
        total += tl.where(competing, weight, 0.0)
        some |= competing.to(tl.int32)
        gone |= (candidate & ~forced & (score == -float("inf"))).to(tl.int32)
    if masses != 0:
        gone = gone & ~some
    candidate, forced, score = asked(
        candidate_ptr
        + place(b, own, r, stride_candidate_b, stride_candidate_h, stride_candidate_r)
        + member * stride_candidate_m,
        forced_ptr + place(b, own, r, stride_forced_b, stride_forced_h, stride_forced_r) + member * stride_forced_m,
        raw_ptr + place(b, own, r, stride_raw_b, stride_raw_h, stride_raw_r) + member * stride_raw_m,
        there,
    )
    competing = candidate & (gone == 0) & ((extra == 0) | ~forced)
    at = row.to(tl.int64)[:, None] * members + member
    tl.store(score_ptr + at, tl.where(competing, total, -float("inf")), mask=there)
    tl.store(competing_ptr + at, competing, mask=there)


@triton.jit
def place(b, h, r, stride_b, stride_h, stride_r):
    """Where a head's row begins, [ROWS, 1]."""
    return (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + r.to(tl.int64) * stride_r)[:, None]


@triton.jit
def asked(candidate_ptr, forced_ptr, raw_ptr, there):
    """Which members are candidates and which forced, and scores: finite, or minus infinity, of no candidate too."""
    LARGEST: tl.constexpr = 3.0e38
    candidate = (tl.load(candidate_ptr, mask=there, other=0) != 0) & there
    forced = tl.load(forced_ptr, mask=there, other=0) != 0
    score = tl.load(raw_ptr, mask=there, other=0.0)
    score = tl.where(candidate & (score == score), score, -float("inf"))
    return candidate, forced, tl.where(score > LARGEST, LARGEST, score)


@triton.jit
def competes(candidate, forced, score, extra):
    """Whether members of a head compete: not those that only this head forces, nor what has no score."""
    scored = score > -float("inf")
    return candidate & tl.where(extra != 0, ~forced & scored, forced | scored)
