"""Kernel plans of selections: what the fused kernel that ranks members and keeps the best of them is generated from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attndsl.branch_mass import BranchMass, branch_masses
from attndsl.branches import Branch, Part
from attndsl.capacity import capacity
from attndsl.cuts import with_cuts
from attndsl.derive import derive, with_needed
from attndsl.effort import remembered
from attndsl.keeping import KEYS
from attndsl.mask import pair_mask, written_condition
from attndsl.plan import Backend, Plan, Spec, Tiling
from attndsl.plans import plan_heads
from attndsl.program import Coarse, Coarsen, Const, Inter, Program, Read, Scalar, Set, reads, walk
from attndsl.relation import Lowering, lowered
from attndsl.runs import Side, TileRuns
from attndsl.selection import Bound, Dot, Forced, Normalise, Probs, Selection, Share, Top
from attndsl.simplify import fold, specialise
from attndsl.visits import closed_runs

# The longest list that a kernel keeps in registers.
MAX_WIDTH = 64
_RANKED = "only `dot(Q, …)` and `probs(branch)` are ranked in tiles"


@dataclass(frozen=True, slots=True)
class SelectPlan(Plan):
    """A kernel that chooses members for each query.

    `program` is that of the candidates, whose pattern is coarsened to members, so `runs` visits tiles of members and
    `mask` is read at a member's first token; a query tile has `block_q` rows of `share` heads each, a tile of members
    `block_k` tokens. `forced`: the condition of what is (None: nothing). `budget`: how many are chosen.
    `width`: entries of the list that is kept, a power of two; `capacity`: entries of the plan.
    """

    selection: Selection
    forced: Scalar | None
    budget: Scalar
    capacity: int
    share: int
    # Of a selection by `probs`: the condition under which a row sees the entry of a member.
    seen: Scalar | None
    # Of a decode that ranks single keys: tokens of a page, None where those of a sequence lie together.
    page: int | None = None

    def _further(self) -> tuple[Scalar, ...]:
        return tuple(e for e in (self.budget, self.forced, self.seen) if e is not None)

    @property
    def width(self) -> int:
        return max(2, 1 << (self.capacity - 1).bit_length())

    @property
    def side(self) -> int:
        """Heads whose columns lie side by side: those that share, more where a product has less than 8 columns."""
        return max(1 << (self.share - 1).bit_length(), 8 // self.tiling.block_q)

    @property
    def abreast(self) -> int:
        """Lists that a program of a decode ranks members for: those of the heads of a key head that choose apart, where
        members are what the key head holds."""
        match self.selection.score:
            case Dot(y=y) | Bound(low=y):
                of_keys = y.source == KEYS
            case _:
                of_keys = True
        return self.spec.heads // self.spec.kv_heads if of_keys and self.share == 1 else 1

    @property
    def members(self) -> int:
        """Members of a tile."""
        return self.tiling.block_k // self.selection.keys


def why_not_fused(program: Program, selection: Selection, heads: tuple[int, int]) -> str:
    """Why a selection has no fused kernel, empty where it has."""
    if reason := _why_not_ranked(program, selection, heads):
        return reason
    if isinstance(selection.score, Bound):
        return _RANKED
    if program.packed is not None:
        return "its members are no entries of documents"
    if capacity(program, selection, heads, MAX_WIDTH + 1) > MAX_WIDTH:
        return f"lists have more than {MAX_WIDTH} entries"
    return ""


def _why_not_ranked(program: Program, selection: Selection, heads: tuple[int, int], ragged: bool = False) -> str:
    """Why no kernel ranks a selection's members, empty where one does. ragged: in a decode."""
    rule, score = selection.rule, selection.score
    if selection.members is not None:
        return "its members are no blocks in a row"
    if selection.rows != 1:
        return "it chooses for classes of rows"
    if not isinstance(rule, Top) or rule.count is None:
        return "only `top` of a fixed number keeps a list"
    if isinstance(score, Probs):
        if reason := _why_not_mass(program, selection, heads, ragged):
            return reason
    elif not isinstance(score, Dot | Bound) or score.x.source != "Q":
        return _RANKED
    if selection.scale is not None and not isinstance(selection.scale, Const):
        return "the scale depends on the head"
    if selection.forced is Forced.OVERLAY and selection.always is not None:
        return "what is overlaid is ranked twice"
    if selection.normalise is not Normalise.NONE and selection.share is not Share.NONE:
        return "masses are summed over heads"
    if selection.share is Share.HEADS and heads[1] > 1:
        return "heads of several key heads share a choice"
    if plan_heads(selection) is not selection.share:
        return "heads that share choose among members of their own"
    return ""


def _why_not_mass(program: Program, selection: Selection, heads: tuple[int, int], ragged: bool) -> str:
    """Why the probabilities of a branch are not ranked in tiles: an entry is one member's, and its logit is s."""
    assert isinstance(selection.score, Probs)
    mass, *others = branch_masses(program, selection, heads, ragged)
    if others or selection.score.largest or mass.view is None or not mass.of_blocks or mass.size != selection.keys:
        return "the branch's entries are not the members"
    if mass.logit is not None or not (mass.branch.scale is None or isinstance(mass.branch.scale, Const)):
        return "the branch's logits are not scaled products"
    # Of entries that are single keys, as those of documents are, the kernel reads what the program declares.
    known = {decl.name for decl in program.inputs} if selection.keys == 1 and not ragged else {program.lengths}
    if any(isinstance(x, Read) and x.input not in known for x in walk(mass.seen)):
        return "which entries the branch sees depends on data"
    if sharing(selection, heads) > 1 and reads(mass.seen, "h"):
        return "heads that share a choice see different entries of the branch"
    return ""


def _only(program: Program, selection: Selection, heads: tuple[int, int], ragged: bool = False) -> BranchMass:
    """What is ranked by of a branch of one part."""
    (found,) = branch_masses(program, selection, heads, ragged)
    return found


def sharing(selection: Selection, heads: tuple[int, int]) -> int:
    """How many query heads share a choice."""
    return {Share.NONE: 1, Share.GROUP: heads[0] // heads[1], Share.HEADS: heads[0]}[selection.share]


@remembered(1024)
def select_plan(program: Program, selection: Selection, spec: Spec, tiling: Tiling | None = None) -> SelectPlan:
    """The kernel of a selection that `why_not_fused` has nothing against; the plan's program is the derived one."""
    heads, keys = (spec.heads, spec.kv_heads), selection.keys
    static = derive(_over(program, _members(selection.among, keys)))
    candidates = with_cuts(static)
    share = sharing(selection, heads)
    listed = capacity(program, selection, heads, MAX_WIDTH)
    tiling = tiling or default_select_tiling(share, keys, listed, spec.target)
    lowering, relation = lowered(static, heads)
    runs = closed_runs(relation, candidates, spec, tiling, Side.QUERY)
    written = written_condition(lowering, spec.sizes)
    forced: Scalar | None = None
    if selection.always is not None:
        pattern = _members(Inter((selection.among, selection.always)), keys)
        both = derive(replace(_over(candidates, pattern), lengths=program.lengths))
        forced = specialise(fold(Lowering(both, heads).predicate(both.branch.pattern)), spec.sizes)
        candidates = replace(candidates, inputs=both.inputs)
    seen: Scalar | None = None
    if isinstance(selection.score, Probs):
        seen = specialise(_only(program, selection, heads).seen, spec.sizes)
    assert isinstance(selection.rule, Top) and selection.rule.count is not None
    plan = SelectPlan(
        candidates, replace(spec, backend=Backend.TRITON), tiling, runs, pair_mask(relation, written), None, None, None,
        None, selection, forced, specialise(selection.rule.count, spec.sizes),
        listed, share, seen,
    )  # fmt: skip
    return replace(plan, program=with_needed(candidates, plan.inputs))


def rank_plan(
    program: Program, selection: Selection, spec: Spec, most: int, page: int | None = None
) -> SelectPlan | None:
    """The kernels of a selection in a decode of caches with room for `most` members; None where it has none. page: as
    in `SelectPlan`."""
    heads, keys = (spec.heads, spec.kv_heads), selection.keys
    if _why_not_ranked(program, selection, heads, ragged=True):
        return None
    forced: Scalar | None = None
    candidates, mask = _condition(program, selection.among, keys, spec)
    if selection.always is not None:
        candidates, forced = _condition(candidates, Inter((selection.among, selection.always)), keys, spec)
    seen: Scalar | None = None
    if isinstance(selection.score, Probs):
        seen = specialise(_only(program, selection, heads, ragged=True).seen, spec.sizes)
    assert isinstance(selection.rule, Top) and selection.rule.count is not None
    # A warp holds its members' vectors in registers, and waits for no other.
    members = 8 if spec.dim > 128 else 16
    tiling = Tiling(1, members * keys, warps=1, stages=1)
    plan = SelectPlan(
        candidates, replace(spec, backend=Backend.TRITON), tiling, TileRuns((), ()), mask, None, None, None, None,
        selection, forced, specialise(selection.rule.count, spec.sizes),
        capacity(program, selection, heads, most), sharing(selection, heads), seen, page,
    )  # fmt: skip
    plan = replace(plan, program=with_needed(candidates, plan.inputs))
    # Maps of blocks are made in torch, and with them the choice.
    return None if any(decl.derivation is not None for decl in plan.program.inputs) else plan


def _condition(program: Program, pattern: Set, keys: int, spec: Spec) -> tuple[Program, Scalar]:
    """The condition under which a row has a pair of a set with the member that begins at key k, and the program that
    declares what it reads."""
    derived = derive(_over(program, _members(pattern, keys)), ragged=True)
    found = specialise(
        fold(Lowering(derived, (spec.heads, spec.kv_heads)).predicate(derived.branch.pattern)), spec.sizes
    )
    return derived, found


def default_select_tiling(share: int, keys: int, listed: int, target: str) -> Tiling:
    """Tiles of 64 members, and of as many queries as a product has columns for and registers hold lists of.

    Of eight queries or more a thread has two lists for eight, of fewer two, and of one query one; a place takes two
    registers. Where warps share out columns too (tensor cores before Hopper), few columns keep the heads of a query in
    one of them.
    """
    side = 1 << (share - 1).bit_length()
    backend, _, arch = target.partition(":")
    columns = 128 if backend == "cuda" and int(arch) >= 90 else 32
    most = 128 // max(1, listed) if listed <= 16 else 2 if listed <= 32 else 1
    most = max(1, min(columns // side, most))
    return Tiling(1 << (most.bit_length() - 1), 64 * keys, warps=4, stages=2)


def _over(program: Program, pattern: Set) -> Program:
    """The program with one branch over a pattern."""
    return replace(program, branches=(Branch((Part(pattern),)),), output=None)


def _members(pattern: Set, keys: int) -> Set:
    return pattern if keys == 1 else Coarsen(pattern, 1, keys, Coarse.ANY)
