"""What rows give the members of two levels by an entry of each, made in the kernel: exp(logit - lse), at most 1.

A member's entry is one vector. Its products with the rows of a tile are a product of tiles all the same, with rows of
zeros beside it: a sum over columns would hold the queries in registers. Of the gradients the kernel of dq makes the
queries', that of dk and dv the entry's own, each once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attndsl.codegen.scalars import Level, Names
from attndsl.program import Scalar, Var

if TYPE_CHECKING:
    from attndsl.codegen.backward_kernel import BackwardKernel
    from attndsl.codegen.kernel import KernelWriter
    from attndsl.codegen.triton_backward import DkDvKernel
    from attndsl.shares import Votes


# Rows of a product's tile, at least.
_ROWS = 16


def load_votes_lse(kernel: KernelWriter, votes: Votes) -> None:
    """`votes_lse`: of rows whose entries are none, inf, so that they give nothing."""
    kernel.lines.add(
        f"votes_lse = {kernel.fresh().text(votes.lse)}",
        'votes_lse = tl.where(votes_lse == float("-inf"), float("inf"), votes_lse)',
    )


def load_entry(kernel: KernelWriter, votes: Votes, like: str) -> None:
    """`ballot`: the entry of the tile's member, the first of as many rows as a product takes, whose others are 0.
    like: a tile of its dtype."""
    lines, name, dim = kernel.lines, kernel.plan.program.input(votes.keys).parameter, kernel.plan.spec.dim
    kernel.printer.helpers.add("within")
    lines.add(
        "# The entry of the tile's member, the first of the rows that a product takes; the others are 0.",
        f"voted = {kernel.tile_number()}",
        f"lead = tl.arange(0, {_ROWS}) == 0",
        f"ballot_at = within(voted, {name}_size_2 - 1).to(tl.int64) * {name}_stride_2",
        f"ballot_at += b.to(tl.int64) * {name}_stride_0 + g.to(tl.int64) * {name}_stride_1",
    )
    for part in kernel.q_parts:
        dims = kernel.dims(part)
        mask = f", mask={dims} < {dim}, other=0.0" if part.padded else ""
        loaded = f"tl.load({name}_ptr + ballot_at + {dims} * {name}_stride_3{mask}).to({like}.dtype)"
        lines.add(f"ballot{part.suffix} = tl.where(lead[:, None], {loaded}[None, :], 0.0)")


def vote(kernel: KernelWriter, votes: Votes, keys_axis: int) -> None:
    """`share`: what the rows of a tile give its member. keys_axis: that of the tile of pairs on which the keys lie."""
    lines, parts = kernel.lines, [p.suffix for p in kernel.q_parts]
    if keys_axis == 1:
        load_entry(kernel, votes, "q")
        dots = " + ".join(kernel.dot(f"q{x}", f"tl.trans(ballot{x})") for x in parts)
        lines.add(f"votes = {dots}", "vote = tl.sum(tl.where(lead[None, :], votes, 0.0), 1)[:, None]")
    else:
        dots = " + ".join(kernel.dot(f"ballot{x}", f"tl.trans(q{x})") for x in parts)
        lines.add(f"votes = {dots}", "vote = tl.sum(tl.where(lead[:, None], votes, 0.0), 0)[None, :]")
    lines.add(f"vote = vote * {_scale(kernel, votes)}")
    logit = "vote" if votes.logit is None else f"({_text(kernel, votes.logit)})"
    lines.add(f"share = tl.exp2(tl.minimum(({logit} - votes_lse) * LOG2_E, 0.0))")
    if votes.seen is not None:
        lines.add(f"share = tl.where({_text(kernel, votes.seen)}, share, 0.0)")


def add_to_queries(kernel: BackwardKernel, votes: Votes) -> None:
    """Add to the gradient of the rows what their votes for the tile's member hand on."""
    _hand_on(kernel, votes, scaled=votes.scale != kernel.plan.scale)
    kernel.lines.add("handed = tl.where(lead[None, :], d_vote, 0.0)")
    for x in (p.suffix for p in kernel.q_parts):
        kernel.lines.add(f"dq{x} = " + kernel.dot(f"handed.to(ballot{x}.dtype)", f"ballot{x}", f"dq{x}"))


def begin_entry(kernel: KernelWriter) -> list[str]:
    """The lines that begin the sums over rows of a member's entry."""
    return [f"d_entry{part.suffix} = tl.zeros([{_ROWS}, {part.size}], tl.float32)" for part in kernel.q_parts]


def add_to_entry(kernel: BackwardKernel, votes: Votes) -> None:
    """Add to the gradient of the member's entry what the rows of a tile hand on by their votes."""
    _hand_on(kernel, votes, scaled=True)
    kernel.lines.add("handed = tl.where(lead[:, None], d_vote, 0.0)")
    for x in (p.suffix for p in kernel.q_parts):
        kernel.lines.add(f"d_entry{x} = " + kernel.dot(f"handed.to(q{x}.dtype)", f"q{x}", f"d_entry{x}"))


def write_entry(kernel: DkDvKernel) -> None:
    """Write the gradient of the member's entry, in any strip the same."""
    lines, spec = kernel.lines, kernel.plan.spec
    lines.add(f"ballot_at = (b * {spec.kv_heads} + g).to(tl.int64) * tl.cdiv(k_len, BLOCK_K) + k_tile")
    for part in kernel.q_parts:
        dims = f"{kernel.dims(part)}[None, :]"
        place = f"d_entries_ptr + ballot_at * {spec.dim} + {dims} + tl.zeros([{_ROWS}, 1], tl.int64)"
        mask = f"lead[:, None] & ({dims} < {spec.dim})"
        lines.add(f"tl.store({place}, d_entry{part.suffix}, mask={mask})")


def _hand_on(kernel: BackwardKernel, votes: Votes, scaled: bool) -> None:
    """`d_vote`: the gradient of q . entry, or unscaled, of the product that is yet to be scaled."""
    factor = f" * {_scale(kernel, votes)}" if scaled else ""
    kernel.lines.add(f"d_vote = d_share{kernel.along_q} * share{factor}")
    if votes.slope is not None:
        slope = _text(kernel, votes.slope, Level.UNARY)
        kernel.lines.add(f"d_vote = tl.where(d_vote != 0.0, d_vote * {slope}, 0.0)")


def _scale(kernel: KernelWriter, votes: Votes) -> str:
    return kernel.votes_scale if votes.scale is None else f"({_text(kernel, votes.scale)})"


def _text(kernel: KernelWriter, e: Scalar, level: Level = Level.COND) -> str:
    known: dict[Scalar, str] = {Var("s"): "vote", Var("k_tile"): "voted"}
    return kernel.printer.within(Names(kernel.leaves, known)).text(e, level)
