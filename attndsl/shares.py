"""What weighs the members of two levels in a kernel: an entry a row and member that a call brings, or *votes*.

Where the branch that weighs them attends to an entry for each member, its probability of that entry is
exp(logit - lse), with an lse that it has found: a product of the row with the entry and no more, so a kernel makes it
anew and nothing is kept of rows and members. Of its gradients that of the lse is minus delta, out * dout summed over
the row, since what members give is their share times d_share.
"""

from __future__ import annotations

from dataclasses import dataclass

from attndsl.program import Binary, Const, Read, Scalar, Var


@dataclass(frozen=True, slots=True)
class Votes:
    """What a row gives the member `k_tile` by an entry of its own: exp(logit - lse) where it sees it.

    `keys`: the input that holds the entries, `learns` whether it has a gradient. `scale`: of q . entry (None: a
    kernel's argument), `logit`: what the score makes of that, s (None: s itself), `slope`: its derivative by s, where
    gradients are made (None: 1). `seen`: the condition under which a row sees it (None: where it sees some of the
    member's tokens). `lse`: that of the row, in the entries' softmax.
    """

    keys: str
    learns: bool
    scale: Scalar | None
    logit: Scalar | None
    slope: Scalar | None
    seen: Scalar | None
    lse: Read

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """What a kernel computes."""
        found = (self.scale, self.logit, self.slope, self.seen, self.lse)
        return tuple(e for e in found if e is not None)


@dataclass(frozen=True, slots=True)
class Shares:
    """What weighs a key's member, whose number is `member`: what `given` reads of the call, or votes."""

    member: Scalar
    given: Read | None = None
    votes: Votes | None = None

    def in_tiles(self, keys: int) -> bool:
        """Whether each member is a tile of so many keys."""
        return self.member == Binary("//", Var("k"), Const(keys))

    def kept(self, strip: int) -> bool:
        """Whether the backward pass, with strips of so many keys (0: none), keeps something of each row and member."""
        return self.votes is None or strip > 0

    @property
    def learned(self) -> set[str]:
        """The inputs that have gradients by them."""
        read = {x.input for x in (self.given, None if self.votes is None else self.votes.lse) if x is not None}
        return read | ({self.votes.keys} if self.votes is not None and self.votes.learns else set())

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """What a kernel computes."""
        votes = () if self.votes is None else self.votes.scalars
        return (self.member, *(() if self.given is None else (self.given,)), *votes)
