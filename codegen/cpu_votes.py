"""What rows give the members of two levels by an entry of each, on the CPU: exp(logit - lse), at most 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attndsl.codegen.scalars import Names
from attndsl.program import Scalar, Var

if TYPE_CHECKING:
    from attndsl.codegen.cpu import TileLoop
    from attndsl.shares import Votes


def vote(loop: TileLoop, votes: Votes) -> None:
    """`given`: what rows give each of the members `numbers` of a chunk; `share`: that of each key's."""
    lines, name = loop.lines, f"{votes.keys}_input"
    loop.helpers |= {"exponential", "spread"}
    lines.add(
        f"entries = {loop.entries_of(name)}.to(compute)",
        "entries = entries.index_select(-2, numbers.clamp(max=entries.shape[-2] - 1))",
        f"votes = ({loop.voters()}.flatten(2, 3) @ entries.mT).unflatten(2, queries.shape[2:4])",
        f"votes = votes * {_scale(loop, votes)}",
        f"votes_lse = {text_of_votes(loop, votes.lse)}",
        "votes_lse = torch.where(votes_lse == -math.inf, math.inf, votes_lse)",
    )
    logit = "votes" if votes.logit is None else f"spread({text_of_votes(loop, votes.logit)}, votes)"
    lines.add(f"given = exponential(({logit} - votes_lse).clamp(max=0))")
    if votes.seen is not None:
        lines.add(f"given = torch.where(torch.as_tensor({text_of_votes(loop, votes.seen)}), given, 0)")
    lines.add("share = given[..., member]")


def hand_on(loop: TileLoop, votes: Votes) -> None:
    """Add what `d_share`, the gradient of `given`, hands on to the rows, and to the members' entries."""
    lines, slope = loop.lines, "d_votes"
    lines.add("d_votes = given * d_share")
    if votes.slope is not None:
        loop.helpers.add("passed_on")
        slope = f"passed_on(d_votes, {text_of_votes(loop, votes.slope)})"
    lines.add(
        f"d_votes = ({slope} * {_scale(loop, votes)}).flatten(2, 3)",
        "dq_votes += (d_votes @ entries).unflatten(2, queries.shape[2:4])",
    )
    if votes.learns:
        lines.add(
            f"entries = d_{votes.keys}[at_b, at_g]",
            "entries.index_add_(-2, numbers, (d_votes.mT @ queries.flatten(2, 3)).to(entries.dtype))",
        )


def text_of_votes(loop: TileLoop, e: Scalar) -> str:
    """An expression of rows and members, whose products are `votes`."""
    known: dict[Scalar, str] = {Var("s"): "votes", Var("k_tile"): "numbers"}
    return loop.tensors.within(Names(loop.tensors.names.leaf, known)).text(e)


def _scale(loop: TileLoop, votes: Votes) -> str:
    return "scale" if votes.scale is None else f"({text_of_votes(loop, votes.scale)})"
