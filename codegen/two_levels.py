"""Two levels: a tile of keys is a member, so the softmax inside it is done with once the tile is scored.

Nothing is carried from tile to tile: a pair weighs its probability inside the member times what its row gives the
member, its *share*. With p the probability and dp = dout . v, a share's gradient is the member's sum of p dp, and the
logit's is share p (dp - that sum): what delta is to a row, it is to a row and a member.
"""

from __future__ import annotations

from attndsl.codegen.kernel import KernelWriter
from attndsl.codegen.scalars import Names
from attndsl.program import Binary, Const, Var


def member_softmax(kernel: KernelWriter, logits: str, keys_axis: int, along: str) -> None:
    """`inner`: the softmax inside the tile's member; `weights`: that times the share.

    logits: their name, as exponents of 2. keys_axis: that of the tile of pairs on which the keys lie. along: how a
    vector over rows lies in it.
    """
    read = kernel.plan.shares
    assert read is not None
    member = Binary("//", Var("k"), Const(kernel.plan.tiling.block_k))
    assert read.index[-1] == member, "a tile of keys is a member"
    share = kernel.printer.within(Names(kernel.leaves, {member: kernel.tile_number()})).text(read)
    if kernel.spare:
        in_tile = "in_member[None, :]" if keys_axis == 1 else "in_member[:, None]"
        kernel.lines.add(f'{logits} = tl.where({in_tile}, {logits}, float("-inf"))')
    kernel.lines.add(
        f"top = tl.maximum(tl.max({logits}, {keys_axis}), -1.0e38)",
        f"inner = tl.exp2({logits} - top{along})",
        f"total = tl.sum(inner, {keys_axis})",
        f"inner = inner / tl.where(total == 0.0, 1.0, total){along}",
        f"weights = inner * {share}",
    )
