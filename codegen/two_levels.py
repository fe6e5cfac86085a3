"""Two levels: a tile of keys is a member, so the softmax inside it is done with once the tile is scored.

Nothing is carried from tile to tile: a pair weighs its probability inside the member times what its row gives the
member, its *share*. With p the probability and dp = dout . v, a share's gradient is the member's sum of p dp, and the
logit's is share p (dp - that sum): what delta is to a row, it is to a row and a member.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attndsl.codegen.scalars import Names
from attndsl.listing import EntryTiles

if TYPE_CHECKING:
    from attndsl.codegen.kernel import KernelWriter


def member_softmax(kernel: KernelWriter, logits: str, keys_axis: int, along: str) -> None:
    """`inner`: the softmax inside the tile's member; `weights`: that times the share.

    logits: their name, as exponents of 2. keys_axis: that of the tile of pairs on which the keys lie. along: how a
    vector over rows lies in it.
    """
    read = kernel.plan.shares
    assert read is not None
    assert kernel.plan.tiled_members or kernel.plan.tiles_of is not None, "a tile of keys is a member"
    share = kernel.printer.within(Names(kernel.leaves, {read.index[-1]: kernel.tile_number()})).text(read)
    if kernel.spare or kernel.plan.tiles_of is not None:
        in_tile = "in_member[None, :]" if keys_axis == 1 else "in_member[:, None]"
        kernel.lines.add(f'{logits} = tl.where({in_tile}, {logits}, float("-inf"))')
    kernel.lines.add(
        f"top = tl.maximum(tl.max({logits}, {keys_axis}), -1.0e38)",
        f"inner = tl.exp2({logits} - top{along})",
        f"total = tl.sum(inner, {keys_axis})",
        f"inner = inner / tl.where(total == 0.0, 1.0, total){along}",
        f"weights = inner * {share}",
    )


def entry_tokens(kernel: KernelWriter, tiles: EntryTiles) -> None:
    """`k_rows`: the tokens of a tile that is an entry of a document; those past its last lie past any length."""
    text = kernel.fresh().text
    kernel.lines.add(
        f"k_first = {text(tiles.first)}",
        f"k_document = {text(tiles.document)}",
        "k_member = (k_first - k_document) // BLOCK_K",
        "k_rows = k_first + k_offset",
        f"in_member = k_rows < {text(tiles.end)}",
        "k_rows = tl.where(in_member, k_rows, 1 << 30)",
    )


def leave_without_entry(kernel: KernelWriter, tiles: EntryTiles) -> None:
    """Leave a program whose tile is none: there is room for as many as there are tokens."""
    with kernel.lines.block(f"if {kernel.fresh().text(tiles.first)} >= k_len:"):
        kernel.lines.add("return  # There are fewer entries.")


def keep_share(kernel: KernelWriter) -> None:
    """Write the gradient of what rows give the tile's member. Rows of other documents have a member of that number,
    too."""
    tiles, written = kernel.plan.tiles_of, "q_rows < rows"
    if tiles is not None:
        stop = kernel.printer.within(Names(kernel.leaves, {tiles.first: "k_first"})).text(tiles.stop)
        written = f"({written}) & (start + q_rows >= k_document) & (start + q_rows < {stop})"
    kernel.lines.add(
        f"share_at = (head.to(tl.int64) * rows + q_rows) * tl.cdiv(k_len, BLOCK_K) + {kernel.tile_number()}",
        f"tl.store(d_shares_ptr + share_at, d_share, mask={written})",
    )
