"""The kernel that lays out values of float8 for Hopper's products, in portable Triton.

Those products take both operands with what is summed over side by side, so values come transposed. The weights they are
multiplied by stay where the products of q and k leave them: a thread then has of 16 keys in a row not four neighbours
but two pairs, 8 keys apart, and the values stand in the order in which threads have their weights.
"""

from __future__ import annotations

_TEXT = """\
import triton
import triton.language as tl


@triton.jit
def values_in_order(
    v_ptr,
    ordered_ptr,
    stride_vb,
    stride_vh,
    stride_vn,
    heads,
    k_len,
    places,
):
    DIM: tl.constexpr = {dim}
    CHANNELS: tl.constexpr = {channels}
    BLOCK: tl.constexpr = {block}
    tiles = tl.cdiv(places, BLOCK)
    head = tl.program_id(0) // tiles
    place = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CHANNELS)

    # Of 16 places, four by four, thread c has pairs 2c and 8 + 2c.
    in_16 = place % 16
    key = place - in_16 + 2 * (in_16 // 4) + 8 * (in_16 // 2 % 2) + in_16 % 2
    v_at = v_ptr + (head // heads).to(tl.int64) * stride_vb + (head % heads).to(tl.int64) * stride_vh
    v_ptrs = v_at + key[:, None].to(tl.int64) * stride_vn + channel[None, :]
    v = tl.load(v_ptrs, mask=(key < k_len)[:, None] & (channel < DIM)[None, :], other=0)
    ordered_at = ordered_ptr + head.to(tl.int64) * DIM * places
    ordered_ptrs = ordered_at + channel[:, None].to(tl.int64) * places + place[None, :]
    tl.store(ordered_ptrs, tl.trans(v), mask=(channel < DIM)[:, None] & (place < places)[None, :])
"""


def values_source(v_dim: int, block: int) -> str:
    """Text of a Python file whose `values_in_order` makes [B, Hkv, Dv, places] of v [B, Hkv, Nk, Dv], both as bytes.
    A program owns `block` places of a head.

    Places are keys in the order above, a multiple of 16; those past the last key are zero.
    """
    header = f"# attndsl: values of float8, transposed, head dimension {v_dim}\n\n"
    return header + _TEXT.format(dim=v_dim, channels=1 << (v_dim - 1).bit_length(), block=block)
