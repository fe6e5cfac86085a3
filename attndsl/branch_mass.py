"""What `probs(branch)` ranks or weighs by: which keys of it rows see, their logits, which tokens they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attndsl.branches import Branch, Given, Part, Pick, Pool, View
from attndsl.derive import derive
from attndsl.diagnostics import error
from attndsl.effort import remembered
from attndsl.linear import normalise
from attndsl.program import Program, Scalar
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering
from attndsl.selection import Probs, Selection
from attndsl.simplify import fold
from attndsl.view_plans import counted, entries_of


@dataclass(frozen=True, slots=True)
class BranchMass:
    """A part of a branch, which attends to tokens or to the entries of a view.

    `program` is the derived program of that part alone. `seen`: the condition under which row q sees key k, the
    index of an entry over a view. `logit`: what the score makes of s (None: s itself). Key k stands for the tokens
    [k * stride, k * stride + size), unless the view is one that data tells.
    """

    program: Program
    branch: Branch
    view: View | None
    seen: Scalar
    logit: Scalar | None
    size: int
    stride: int

    def keys(self, k_len: int) -> int:
        """How many keys it has."""
        told = self.view is not None and self.view.told
        return self.view.entries(k_len) if self.view is not None and told else -(-k_len // self.stride)

    @property
    def told(self) -> bool:
        """Whether data tells what tokens its keys stand for, beside what documents tell."""
        match self.view:
            case None:
                return False
            case Pick():
                return True
            case Given(picked=picked) if picked is not None:
                return True
            case view:
                return view.runs is not None

    @property
    def of_blocks(self) -> bool:
        """Whether each key stands for a block of tokens in a row, all of which are some key's."""
        return self.size == self.stride and (self.view is None or not self.view.told)


@remembered(256)
def branch_masses(
    program: Program, selection: Selection, heads: tuple[int, int], ragged: bool = False
) -> tuple[BranchMass, ...]:
    """What a selection by `probs(branch)` needs to know of the branch, part by part. ragged: as in `derive`.

    Raises `PatternError` (A575) for one that has no probabilities.
    """
    assert isinstance(selection.score, Probs)
    branch = program.named(selection.score.branch)
    if reason := branch.why_no_mass:
        raise error(
            "A575", f"the probabilities of `{branch.name}` rank nothing yet: {reason}", selection.span,
            help="select by a branch of one softmax",
        )  # fmt: skip
    return tuple(mass_of(program, replace(branch, parts=(part,)), heads, ragged) for part in branch.parts)


@remembered(256)
def mass_of(program: Program, branch: Branch, heads: tuple[int, int], ragged: bool = False) -> BranchMass:
    """What `probs` needs to know of a branch of one part, which has a mass."""
    (written,) = branch.parts
    own = replace(branch, parts=(replace(written, view=_handed_in(written)),))
    alone = derive(replace(program, branches=(own,), output=None, selections=()), ragged)
    (part,), logit = alone.only.parts, alone.only.score
    view = part.view
    if view is None:
        seen = fold(Lowering(alone, heads).predicate(alone.branch.pattern))
        return BranchMass(alone, branch, None, seen, logit, 1, 1)
    relation = entries_of(alone, heads)
    seen = fold(normalise(condition(relation.pairs, relation.context, relation.uniform | relation.atoms)))
    if view.counted or (isinstance(view, Given) and view.mass is not None):
        logit = counted(logit, view)
    return BranchMass(alone, branch, written.view, seen, logit, view.size, view.stride)


def _handed_in(part: Part) -> View | None:
    """The view of a part, one that data tells as if its entries were handed in: which they are is all that is asked."""
    match part.view:
        case Pool(runs=runs) as view if runs is not None:
            return Given("", "", 1, 1, view.visible, view.counted, view.present, runs=runs)
        case Pick() as view:
            return Given("", "", 1, 1, picked=view, room=view.room)
        case view:
            return view
