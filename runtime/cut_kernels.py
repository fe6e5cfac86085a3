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
