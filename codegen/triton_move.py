"""The kernel that copies rows into an order of tokens, or from it, in portable Triton."""

from __future__ import annotations

_TEXT = """\
import triton
import triton.language as tl


@triton.jit
def move_rows(
    given_ptr,
    moved_ptr,
    order_ptr,
    chosen_ptr,
    stride_givenb,
    stride_givenh,
    stride_givenn,
    stride_movedb,
    stride_movedh,
    stride_movedn,
    order_b,
    order_h,
    heads,
    share,
    rows,
):
    if not tl.load(chosen_ptr):
        return  # Another kernel attends to this call.
    DIM: tl.constexpr = {dim}
    CHANNELS: tl.constexpr = {channels}
    BLOCK: tl.constexpr = {block}
    tiles = tl.cdiv(rows, BLOCK)
    head = tl.program_id(0) // tiles
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    place = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CHANNELS)
    there = place < rows
    token = tl.load(order_ptr + b * order_b + h // share * order_h + place, mask=there, other=0)
    kept = there[:, None] & (channel < DIM)[None, :]
    given_rows = given_ptr + b * stride_givenb + h * stride_givenh + {given}[:, None].to(tl.int64) * stride_givenn
    x = tl.load(given_rows + channel[None, :], mask=kept)
    moved_rows = moved_ptr + b * stride_movedb + h * stride_movedh + {moved}[:, None].to(tl.int64) * stride_movedn
    tl.store(moved_rows + channel[None, :], x, mask=kept)
"""


def move_source(dim: int, block: int, back: bool) -> str:
    """Text of a Python file whose `move_rows` writes row order[i] of [B, H, N, dim] to row i; with `back` row i to row
    order[i], where `chosen` holds. A program owns `block` places of a head; so many heads as `share` have one order.
    """
    given, moved = ("place", "token") if back else ("token", "place")
    channels = 1 << (dim - 1).bit_length()
    header = f"# attndsl: rows of {dim} numbers, {'back from' if back else 'put into'} an order of tokens\n\n"
    return header + _TEXT.format(dim=dim, channels=channels, block=block, given=given, moved=moved)
