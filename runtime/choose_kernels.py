"""The kernel that chooses of scored members. Read as text, and compiled for a device when it first needs it."""

import triton
import triton.language as tl


@triton.jit
def choose(
    score_ptr,
    competing_ptr,
    forced_ptr,
    limit_ptr,
    share_ptr,
    out_ptr,
    lists,
    members,
    room,
    rule,
    least,
    counted,
):
    """Of rows of scores, float32 [lists, members], what is chosen: lists of `room` members, or bytes where that is -1.

    Members rank by score, equal ones by the lower index, what is forced and counted before all others. Whether one is
    taken follows from how many rank before it and what their masses come to, and no member is taken that ranks after
    one that is not: so the last one that is taken is sought by halving, among scores and then among its equals, and
    nothing is sorted.
    """
    WIDTH: tl.constexpr = 256
    ROWS: tl.constexpr = 4
    CHUNK: tl.constexpr = min(1024, WIDTH)
    INFINITY: tl.constexpr = 0x7F800000
    FIRST: tl.constexpr = 0x7FFFFFFF
    NONE: tl.constexpr = -0x80000000
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, WIDTH)[None, :]
    there = (row < lists)[:, None] & (index < members)
    at = row.to(tl.int64)[:, None] * members + index
    order, _ = ordered(score_ptr, competing_ptr, forced_ptr, at, there, counted)
    # Masses follow from the order but for what ranks first.
    score = tl.load(score_ptr + at, mask=there & (order == FIRST), other=0.0)
    certain = tl.sum(tl.maximum(score, 0.0), 1)
    limit = tl.load(limit_ptr + row, mask=row < lists, other=0)
    share = tl.load(share_ptr)
    bound = share * (masses(order, order > 0) + certain)
    if rule == 3:
        bound = tl.zeros([ROWS], tl.float32) + share
    if rule == 4:
        largest = tl.max(tl.where(order == FIRST, score, score_of(tl.where(order == NONE, -0x7F800001, order))), 1)
        bound = share * largest
    # One below the order of minus infinity, and infinity, above which no score is.
    low = tl.full([ROWS], -0x7F800002, tl.int32)
    high = tl.full([ROWS], INFINITY, tl.int32)
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)
        before = order > middle[:, None]
        found = taken(before, order, certain, middle, limit, bound, rule, least)
        high = tl.where(found, middle, high)
        low = tl.where(found, low, middle)
    # Its equals rank by their index: `first` is taken if any is.
    first = tl.zeros([ROWS], tl.int32)
    end = tl.full([ROWS], WIDTH, tl.int32)
    for _ in range(15):
        middle = (first + end) // 2
        before = (order > high[:, None]) | ((order == high[:, None]) & (index < middle[:, None]))
        found = taken(before, order, certain, high, limit, bound, rule, least)
        first = tl.where(found, middle, first)
        end = tl.where(found, end, middle)
    total = tl.zeros([ROWS], tl.int32)
    for begin in range(0, members, CHUNK):
        member = begin + tl.arange(0, CHUNK)[None, :]
        exists = (row < lists)[:, None] & (member < members)
        place = row.to(tl.int64)[:, None] * members + member
        rank, extra = ordered(score_ptr, competing_ptr, forced_ptr, place, exists, counted)
        kept = (rank > high[:, None]) | ((rank == high[:, None]) & (member <= first[:, None]))
        kept = ((kept & (rank != NONE)) | extra) & exists
        if room < 0:
            tl.store(out_ptr + place, kept.to(tl.uint8), mask=exists)
        else:
            nth = total[:, None] + tl.cumsum(kept.to(tl.int32), 1) - 1
            tl.store(out_ptr + row.to(tl.int64)[:, None] * room + nth, member, mask=kept & (nth < room))
            total += tl.sum(kept.to(tl.int32), 1)


@triton.jit
def ordered(score_ptr, competing_ptr, forced_ptr, at, there, counted):
    """Integers that order as members rank, FIRST before all scores and NONE for what does not compete; and what is
    forced."""
    FIRST: tl.constexpr = 0x7FFFFFFF
    NONE: tl.constexpr = -0x80000000
    bits = (tl.load(score_ptr + at, mask=there, other=0.0) + 0.0).to(tl.int32, bitcast=True)
    competing = tl.load(competing_ptr + at, mask=there, other=0) != 0
    forced = tl.load(forced_ptr + at, mask=there, other=0) != 0
    order = tl.where(competing, bits ^ ((bits >> 31) & 0x7FFFFFFF), NONE)
    return tl.where(competing & forced & (counted != 0), FIRST, order), forced


@triton.jit
def taken(before, order, certain, own, limit, bound, rule, least):
    """Whether a member of a score is taken when these rank before it. Rules: 0 `top`, 1 `cover`, 2 one without what
    crosses, 3 `above`, 4 `above` relative to the largest.

    own: the order of its score; there may be no such member. certain: the mass of what ranks first.
    """
    count = tl.sum(before.to(tl.int32), 1)
    found = count < limit
    if (rule == 1) | (rule == 2):
        sums = masses(order, before) + certain
        covers = sums < bound
        if rule == 2:
            there = tl.max((order == own[:, None]).to(tl.int32), 1) > 0
            covers = sums + tl.where(there, own, 0).to(tl.float32, bitcast=True) <= bound
        found = found & ((covers & (own > 0)) | (count < least))
    if rule >= 3:
        found = found & (score_of(own) >= bound)
    return found


@triton.jit
def score_of(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def masses(order, which):
    """The sum of the scores above 0 of some members, whose bits are those of their orders, but for what ranks first."""
    counted = which & (order > 0) & (order < 0x7F800000)
    return tl.sum(tl.where(counted, order, 0).to(tl.float32, bitcast=True), 1)
