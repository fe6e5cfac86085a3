"""Two levels: a tile of keys is a member, so the softmax inside it is done with once the tile is scored.

Nothing is carried from tile to tile: a pair weighs its probability inside the member times what its row gives the
member, its *share*. With p the probability and dp = dout . v, a share's gradient is the member's sum of p dp, and the
logit's is share p (dp - that sum): what delta is to a row, it is to a row and a member.

A member larger than a product's tile is gone over in strips. Forward its softmax runs over them; backward the kernel of
dq goes over them twice, and keeps its lse and that sum for the kernel of dk and dv.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attndsl.codegen.scalars import Names
from attndsl.codegen.votes import vote
from attndsl.listing import EntryTiles

if TYPE_CHECKING:
    from attndsl.codegen.backward_kernel import BackwardKernel
    from attndsl.codegen.kernel import KernelWriter
    from attndsl.codegen.triton_backward import DkDvKernel, DqKernel
    from attndsl.codegen.triton_forward import ForwardWriter


def member_softmax(kernel: KernelWriter, logits: str, keys_axis: int, along: str) -> None:
    """`inner`: the softmax inside the tile's member; `weights`: that times the share.

    logits: their name, as exponents of 2. keys_axis: that of the tile of pairs on which the keys lie. along: how a
    vector over rows lies in it.
    """
    share = _share(kernel, keys_axis)
    _of_member(kernel, logits, keys_axis)
    kernel.lines.add(
        f"top = tl.maximum(tl.max({logits}, {keys_axis}), -1.0e38)",
        f"inner = tl.exp2({logits} - top{along})",
        f"total = tl.sum(inner, {keys_axis})",
        f"inner = inner / tl.where(total == 0.0, 1.0, total){along}",
        f"weights = inner * {share}",
    )


def entry_place(kernel: KernelWriter, tiles: EntryTiles) -> None:
    """Where a tile lies that is an entry of a document, and which of its members it is."""
    text = kernel.fresh().text
    kernel.lines.add(
        f"k_first = {text(tiles.first)}",
        f"k_end = {text(tiles.end)}",
        f"k_document = {text(tiles.document)}",
        "k_member = (k_first - k_document) // BLOCK_K",
    )


def entry_tokens(kernel: KernelWriter) -> None:
    """`k_rows`: the tokens of such a tile; those past its last lie past any length."""
    kernel.lines.add(
        "k_rows = k_first + k_offset",
        "in_member = k_rows < k_end",
        "k_rows = tl.where(in_member, k_rows, 1 << 30)",
    )


def leave_without_entry(kernel: KernelWriter, tiles: EntryTiles) -> None:
    """Leave a program whose tile is none: there is room for as many as there are tokens."""
    with kernel.lines.block(f"if {kernel.fresh().text(tiles.first)} >= k_len:"):
        kernel.lines.add("return  # There are fewer entries.")


def keep_share(kernel: KernelWriter) -> None:
    """Write the gradient of what rows give the tile's member, and where this is gone over in strips, its lse. Rows of
    other documents have a member of that number, too."""
    tiles, written = kernel.plan.tiles_of, "q_rows < rows"
    if tiles is not None:
        stop = kernel.printer.within(Names(kernel.leaves, {tiles.first: "k_first"})).text(tiles.stop)
        written = f"({written}) & (start + q_rows >= k_document) & (start + q_rows < {stop})"
    assert kernel.plan.shares is not None
    if not kernel.plan.shares.kept(kernel.plan.tiling.strip):
        return
    kernel.lines.add(
        f"share_at = {_kept_at(kernel, 'head')}", f"tl.store(d_shares_ptr + share_at, d_share, mask={written})"
    )
    if kernel.plan.tiling.strip:
        kernel.lines.add(f"tl.store(member_lse_ptr + share_at, member_lse, mask={written})")


# ---------------------------------------------------------------------------------------- strips


def attend_in_strips(kernel: ForwardWriter, masked: bool) -> None:
    """A member that no product takes whole: a running softmax over its strips, added to the output at its end."""
    lines, parts = kernel.lines, kernel.v_parts
    lines.add(
        "# The member, strip by strip.",
        *(f"inner{part.suffix} = tl.zeros([BLOCK_Q, {part.size}], tl.float32)" for part in parts),
        "top = tl.full([BLOCK_Q], -1.0e38, tl.float32)",
        "total = tl.zeros([BLOCK_Q], tl.float32)",
    )
    with kernel.strips():
        kernel.logits(masked)
        _of_member(kernel, "scores", 1)
        lines.add(
            "new_top = tl.maximum(top, tl.max(scores, 1))",
            "weights = tl.exp2(scores - new_top[:, None])",
            "decay = tl.exp2(top - new_top)",
            "total = total * decay + tl.sum(weights, 1)",
            "top = new_top",
            *(f"inner{part.suffix} = inner{part.suffix} * decay[:, None]" for part in parts),
        )
        kernel.add_values(masked, "inner")
    lines.add(f"share = {_share(kernel, 1)} / tl.where(total == 0.0, 1.0, total)[:, None]")
    lines.add(*(f"acc{part.suffix} = acc{part.suffix} + inner{part.suffix} * share" for part in parts))


def sum_strips(kernel: DqKernel, masked: bool) -> None:
    """The first time over a member's strips: its lse, as exponents of 2, and its sum of p dp, kept for dk and dv."""
    kernel.lines.add(
        "# The member, strip by strip: first what all of its pairs need.",
        "top = tl.full([BLOCK_Q], -1.0e38, tl.float32)",
        "total = tl.zeros([BLOCK_Q], tl.float32)",
        "d_share = tl.zeros([BLOCK_Q], tl.float32)",
    )
    with kernel.strips():
        kernel.score_pairs(masked)
        _of_member(kernel, "logits", 1)
        kernel.lines.add(
            "new_top = tl.maximum(top, tl.max(logits, 1))",
            "inner = tl.exp2(logits - new_top[:, None])",
            "decay = tl.exp2(top - new_top)",
            "total = total * decay + tl.sum(inner, 1)",
            "d_share = d_share * decay + tl.sum(inner * d_weights, 1)",
            "top = new_top",
        )
    kernel.lines.add(
        "total = tl.where(total == 0.0, 1.0, total)", "d_share = d_share / total", "member_lse = top + tl.log2(total)"
    )
    keep_share(kernel)


def load_member(kernel: DkDvKernel) -> None:
    """What the kernel of dq kept of a member and the tile's rows."""
    kernel.lines.add(f"share_at = {_kept_at(kernel, f'(b * {kernel.plan.spec.heads} + h)')}")
    for name, kept in (("member_lse", "member_lse"), ("d_share", "d_shares")):
        kernel.lines.add(f"{name} = tl.load({kept}_ptr + share_at, mask=q_rows < rows, other=0.0)")


def strip_softmax(kernel: BackwardKernel) -> None:
    """`inner` and `weights` of a strip, as `member_softmax` has them, from the member's lse and what rows give it."""
    _of_member(kernel, "logits", kernel.keys_axis)
    kernel.lines.add(f"inner = tl.exp2(logits - member_lse{kernel.along_q})", "weights = inner * share")


def name_share(kernel: BackwardKernel) -> None:
    """`share`: what rows give the tile's member, for all of its strips."""
    text = _share(kernel, kernel.keys_axis)
    if text != "share":
        kernel.lines.add(f"share = {text}")


def _share(kernel: KernelWriter, keys_axis: int) -> str:
    """What rows give the tile's member. keys_axis: that of the tile of pairs on which the keys lie."""
    shares, tiling = kernel.plan.shares, kernel.plan.tiling
    assert shares is not None
    assert shares.in_tiles(tiling.block_k) or kernel.plan.tiles_of is not None, "a tile of keys is a member"
    if shares.votes is not None:
        vote(kernel, shares.votes, keys_axis)
        return "share"
    assert shares.given is not None, "what weighs members is given where there are no votes"
    return kernel.printer.within(Names(kernel.leaves, {shares.member: kernel.tile_number()})).text(shares.given)


def _of_member(kernel: KernelWriter, logits: str, keys_axis: int) -> None:
    """Leave out columns that are not of the tile's member."""
    if kernel.spare or kernel.plan.tiles_of is not None:
        in_tile = "in_member[None, :]" if keys_axis == 1 else "in_member[:, None]"
        kernel.lines.add(f'{logits} = tl.where({in_tile}, {logits}, float("-inf"))')


def _kept_at(kernel: KernelWriter, head: str) -> str:
    """The places of what is kept of rows and the tile's member."""
    return f"({head}.to(tl.int64) * rows + q_rows) * tl.cdiv(k_len, BLOCK_K) + {kernel.tile_number()}"
