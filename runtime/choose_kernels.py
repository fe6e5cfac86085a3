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
    # Integers that order as scores do: of infinity, of what ranks before all scores, and of what does not compete.
    INFINITY: tl.constexpr = 0x7F800000
    FIRST: tl.constexpr = 0x7FFFFFFF
    NONE: tl.constexpr = -0x80000000
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, WIDTH)[None, :]
    there = (row < lists)[:, None] & (index < members)
    at = row.to(tl.int64)[:, None] * members + index
    score = tl.load(score_ptr + at, mask=there, other=0.0)
    competing = tl.load(competing_ptr + at, mask=there, other=0) != 0
    forced = tl.load(forced_ptr + at, mask=there, other=0) != 0
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(competing, bits ^ ((bits >> 31) & 0x7FFFFFFF), NONE)
    order = tl.where(competing & forced & (counted != 0), FIRST, order)
    mass = tl.where(competing, tl.maximum(score, 0.0), 0.0)
    limit = tl.load(limit_ptr + row, mask=row < lists, other=0)
    share = tl.load(share_ptr)
    bound = share * tl.sum(mass, 1)
    if rule == 3:
        bound = tl.zeros([ROWS], tl.float32) + share
    if rule == 4:
        bound = share * tl.max(tl.where(competing, score, -float("inf")), 1)
    # One below the order of minus infinity, and infinity, above which no score is.
    low = tl.full([ROWS], -0x7F800002, tl.int32)
    high = tl.full([ROWS], INFINITY, tl.int32)
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)
        before = order > middle[:, None]
        found = taken(before, order, mass, middle, limit, bound, rule, least)
        high = tl.where(found, middle, high)
        low = tl.where(found, low, middle)
    # Its equals rank by their index: `first` is taken if any is.
    first = tl.zeros([ROWS], tl.int32)
    end = tl.full([ROWS], WIDTH, tl.int32)
    for _ in range(12):
        middle = (first + end) // 2
        before = (order > high[:, None]) | ((order == high[:, None]) & (index < middle[:, None]))
        found = taken(before, order, mass, high, limit, bound, rule, least)
        first = tl.where(found, middle, first)
        end = tl.where(found, end, middle)
    kept = (order > high[:, None]) | ((order == high[:, None]) & (index <= first[:, None]))
    kept = ((kept & competing) | forced) & there
    if room < 0:
        tl.store(out_ptr + at, kept.to(tl.uint8), mask=there)
    else:
        place = tl.cumsum(kept.to(tl.int32), 1) - 1
        tl.store(out_ptr + row.to(tl.int64)[:, None] * room + place, index, mask=kept & (place < room))


@triton.jit
def taken(before, order, mass, own, limit, bound, rule, least):
    """Whether a member of a score is taken when these rank before it. Rules: 0 `top`, 1 `cover`, 2 one without what
    crosses, 3 `above`, 4 `above` relative to the largest.

    own: the order of its score. There may be no such member: then it has no mass.
    """
    value = (own ^ ((own >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    count = tl.sum(before.to(tl.int32), 1)
    sums = tl.sum(tl.where(before, mass, 0.0), 1)
    covers = sums < bound
    if rule == 2:
        covers = sums + tl.max(tl.where(order == own[:, None], mass, 0.0), 1) <= bound
    covers = (covers & (own > 0)) | (count < least)
    found = tl.where(rule == 0, count < limit, tl.where(rule <= 2, covers, value >= bound))
    return found & (count < limit)
