"""What `probs(branch)` ranks or weighs by: which keys of the branch rows see, their logits, how keys lie in members."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attndsl.branches import Branch, Given, View
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
    """A branch of one part, which attends to tokens or to the entries of a view.

    `program` is the derived program of that branch alone. `seen`: the condition under which row q sees key k, the
    index of an entry over a view. `logit`: what the score makes of s (None: s itself). Key k stands for the tokens
    [k * stride, k * stride + size).
    """

    program: Program
    branch: Branch
    seen: Scalar
    logit: Scalar | None
    size: int
    stride: int

    @property
    def view(self) -> View | None:
        return self.branch.parts[0].view

    def keys(self, k_len: int) -> int:
        """How many keys the branch has."""
        return -(-k_len // self.stride)


@remembered(256)
def branch_mass(program: Program, selection: Selection, heads: tuple[int, int], ragged: bool = False) -> BranchMass:
    """What a selection by `probs(branch)` needs to know of the branch. ragged: as in `derive`.

    Raises `PatternError` (A575) for one that has several parts, or no lse.
    """
    assert isinstance(selection.score, Probs)
    branch = program.named(selection.score.branch)
    if reason := branch.why_no_mass:
        raise error(
            "A575", f"the probabilities of `{branch.name}` rank nothing yet: {reason}", selection.span,
            help="select by a branch of one part and a softmax",
        )  # fmt: skip
    return mass_of(program, branch, heads, ragged)


@remembered(256)
def mass_of(program: Program, branch: Branch, heads: tuple[int, int], ragged: bool = False) -> BranchMass:
    """What `probs` needs to know of a branch that has a mass."""
    alone = derive(replace(program, branches=(branch,), output=None, selections=()), ragged)
    (part,), logit = alone.only.parts, alone.only.score
    view = part.view
    if view is None:
        seen = fold(Lowering(alone, heads).predicate(alone.branch.pattern))
        return BranchMass(alone, branch, seen, logit, 1, 1)
    relation = entries_of(alone, heads)
    seen = fold(normalise(condition(relation.pairs, relation.context, relation.uniform | relation.atoms)))
    if view.counted or (isinstance(view, Given) and view.mass is not None):
        logit = counted(logit, view)
    return BranchMass(alone, branch, seen, logit, view.size, view.stride)
