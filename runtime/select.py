"""Makes the plan of a selection on its device: in one fused kernel where it has one, else strip by strip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attndsl.branch_mass import BranchMass, branch_masses
from attndsl.capacity import budgets, capacity, lags_of, rows_that_see
from attndsl.diagnostics import error
from attndsl.keeping import KEYS, of_members, vectors_of
from attndsl.members import Lags, extent
from attndsl.plans import plan_heads, plan_input
from attndsl.program import CallShape, Inter, Program, Scalar, Set, reads
from attndsl.runtime.call import present_lengths
from attndsl.runtime.derive import Deriver
from attndsl.runtime.derive_ragged import RaggedDeriver
from attndsl.runtime.groups import Groups
from attndsl.runtime.in_order import in_one_piece
from attndsl.runtime.keep import update_in_torch
from attndsl.runtime.lasting import number_tensor, table_tensor
from attndsl.runtime.masses import leading, pooled_members
from attndsl.runtime.ranking import listed
from attndsl.runtime.strips import STRIP, Ragged, State, Strips
from attndsl.runtime.touched import Touched
from attndsl.select_plan import SelectPlan, why_not_fused
from attndsl.selection import Antidiagonal, Dot, Given, Probs, Selection, Share, Top, Vectors

if TYPE_CHECKING:
    from attndsl.runtime.triton_rank import TritonRank
    from attndsl.runtime.triton_select import TritonSelect

# Pairs of rows and keys of a branch that one row class may have.
MAX_PAIRS = 1 << 32
# Members of all row classes of a call that may compete: what they are ranked by takes some 60 bytes of each.
MAX_TOGETHER = 1 << 27
# Rows for which heads may choose single tokens each on their own.
MAX_TOKEN_ROWS = 16


@dataclass(slots=True)
class Selector:
    """The plan of one selection for one kind of call: same shapes, dtypes and device, and strides of q."""

    program: Program
    selection: Selection
    shape: CallShape
    device: torch.device
    # The call's inputs, or tensors of their shapes and dtypes.
    given: Sequence[Tensor] = ()
    # What prints the fused kernel. Without, or where there is none, plans are made strip by strip.
    printer: Callable[[SelectPlan], str] | None = None
    # A decode: sequences have lengths of their own, and the shape's is the most that one may have. Of q's dtype, where
    # kernels may choose.
    # Where it ranks single keys, they may lie in pages of `page` tokens.
    ragged: bool = False
    dtype: torch.dtype | None = None
    page: int | None = None
    # Its single keys are entries of documents.
    of_entries: bool = False
    # The registered program, which knows how to pool on a GPU.
    key: str = ""
    capacity: int = field(init=False)
    budgets: Tensor | None = field(init=False, default=None)
    # Whether all heads choose as many.
    even: bool = field(init=False, default=True)
    tables: dict[str, Tensor] = field(init=False)
    among: Touched | None = field(init=False, default=None)
    always: Touched | None = field(init=False, default=None)
    groups: Touched | None = field(init=False, default=None)
    # Of each part of the branch of a mass.
    masses: tuple[BranchMass, ...] = field(init=False, default=())
    mass_derivers: tuple[Deriver, ...] = field(init=False, default=())
    # The rows that it may let see anything.
    seeing: tuple[int, int] = field(init=False, default=(0, 0))
    whole: bool = field(init=False)
    fused: TritonSelect | None = field(init=False, default=None)
    rank: TritonRank | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Raises `PatternError` for what would be slow in silence (A570), or where no list is long enough (A571)."""
        selection, shape = self.selection, self.shape
        heads = (shape.heads, shape.kv_heads)
        if not self.of_entries:
            check_tokens(selection, shape)
        if isinstance(selection.score, Probs):
            self.masses = checked_masses(self.program, selection, shape, self.ragged)
            self.seeing = seeing_rows(self.program, self.masses, shape, self.ragged)
        check_together(selection, shape.batch * shape.heads * self.classes * self.members)
        self.capacity = capacity(self.program, selection, heads, self.members)
        # Where the call holds every row, its row classes are whole.
        self.whole = not self.ragged and selection.rows is not None and shape.rows == shape.q_len(self.program)
        self.whole = self.whole and selection.row_tiles is None
        self.tables = {table.name: table_tensor(table, self.device) for table in self.program.tables}
        if self.ragged and self.printer is not None and self.dtype is not None:
            from attndsl.runtime.triton_rank import TritonRank

            self.rank = TritonRank.of(
                self.program, selection, shape, self.dtype, self.device, self.members, self.printer, self.page
            )
        fused = self.printer is not None and not self.ragged and not why_not_fused(self.program, selection, heads)
        if self.rank is None and not fused:
            self._prepare_strips(heads)

    def _prepare_strips(self, heads: tuple[int, int]) -> None:
        selection = self.selection
        if isinstance(selection.rule, Top) and selection.rule.count is not None:
            found = budgets(self.program, selection.rule.count, heads)
            self.budgets = number_tensor(found, (1, len(found), 1, 1), torch.int64, self.device)
            self.even = len(set(found)) == 1
        keys = selection.keys if selection.members is None else 1
        self.among = self._touched(selection.among, selection.rows, keys)
        if selection.always is not None:
            forced = Inter((selection.among, selection.always))
            self.always = self._touched(forced, selection.rows, keys)
        if selection.members is not None:
            self._check_candidates(self.among)
        make = RaggedDeriver if self.ragged else Deriver
        self.mass_derivers = tuple(make(x.program, self.shape, self.device, given=self.given) for x in self.masses)
        if isinstance(selection.score, Antidiagonal):
            self.groups = self._touched(selection.among, selection.score.stride, selection.score.stride)

    def _check_candidates(self, among: Touched) -> None:
        """Raises `PatternError` (A577) where finding the candidates would look at too many pairs."""
        shape, asked, of = self.shape, among.condition, self.selection.members
        heads = (shape.heads, shape.kv_heads)
        size = of.size if isinstance(of, Lags) and self.selection.row_tiles is None else 0
        if not reads(asked, "k") or (size and lags_of(among.program, heads, size, self.selection.rows) is not None):
            return
        by_classes = (self.whole and not isinstance(of, Lags)) or self.selection.rows == 1
        rows = self.classes if by_classes else shape.rows
        check_pairs(self.selection, shape, asked, rows)

    def _touched(self, pattern: Set, rows: int | None, keys: int) -> Touched:
        # On a diagonal each row of a class has a key of its own.
        of_classes = self.whole and not isinstance(self.selection.members, Lags)
        rows = (rows or 1) if of_classes else 1
        score = self.selection.score
        more = (score.value,) if isinstance(score, Given) else ()
        return Touched.of(self.program, pattern, rows, keys, self.shape, self.device, self.given, self.ragged, more)

    @property
    def members(self) -> int:
        return members_of(self.program, self.selection, self.shape)

    @property
    def classes(self) -> int:
        return classes_of(self.program, self.selection, self.shape)

    def vectors(self, v: Vectors, k: Tensor, inputs: Sequence[Tensor], groups: Groups | None = None) -> Tensor:
        """[B, G or H or 1, members, D] of what the keys hold, float32 (float64 for float64 tensors).

        groups: the members' keys, where members are no blocks in a row.
        """
        real = torch.float64 if k.dtype == torch.float64 else torch.float32
        x = k
        if v.source != "K":
            names = [decl.name for decl in self.program.inputs]
            x = leading(self.program.input(v.source), inputs[names.index(v.source)])
        if v.pool is None:
            return x.expand(-1, -1, self.members, -1).to(real)
        x = x.expand(-1, -1, self.shape.k_len, -1)
        if groups is not None:
            return groups.pooled(x.expand(self.shape.batch, -1, -1, -1).to(real), v.pool, self.key)
        return pooled_members(x, self.selection.keys, v.pool, real, present_lengths(self.program, self.shape, inputs))

    def _ranked(self, v: Vectors, ragged: Ragged, inputs: Sequence[Tensor]) -> Tensor:
        """The same of a decode for kernels, which take what is kept of keys, or the keys, as they are."""
        if v.source != KEYS:
            return self.kept(v, ragged, inputs)
        return ragged.members[KEYS if (found := of_members(self.selection, v)) is None else found.name]

    def kept(self, v: Vectors, ragged: Ragged, inputs: Sequence[Tensor], groups: Groups | None = None) -> Tensor:
        """The same of a decode: what is kept of keys, or what inputs hold, of the tokens that a sequence has."""
        if groups is not None:
            return self.vectors(v, self.keys_in_order(ragged) if v.source == KEYS else ragged.seq_lens, inputs, groups)
        if v.source == KEYS:
            x = self._ranked(v, ragged, inputs)
            if of_members(self.selection, v) is None:
                x = self.keys_in_order(ragged)
            return x.to(torch.promote_types(x.dtype, torch.float32))
        given = inputs[[decl.name for decl in self.program.inputs].index(v.source)]
        if v.pool is None:
            return self.vectors(v, given, inputs)
        x = leading(self.program.input(v.source), given).expand(self.shape.batch, -1, self.shape.k_len, -1)
        size, real = self.selection.keys, torch.promote_types(x.dtype, torch.float32)
        members = torch.zeros(*x.shape[:2], self.members, x.shape[3], dtype=real, device=self.device)
        present = present_lengths(self.program, self.shape, inputs, ragged.lengths)
        assert present is not None
        update_in_torch(x, members, present.view(-1), None, v.pool, size, size, self.shape.k_len, self.members)
        return members

    def keys_in_order(self, ragged: Ragged) -> Tensor:
        """The keys of a decode, [B, Hkv, M, D]."""
        keys = ragged.members[KEYS]
        return keys if ragged.page_table is None else in_one_piece(keys, ragged.page_table)

    # ----------------------------------------------------------------------------------------- plans

    def __call__(
        self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None = None,
        state: State | None = None, ragged: Ragged | None = None,
    ) -> Tensor:  # fmt: skip
        """The plan: int32 [B, H', R, C], or uint8 [B, H', R, M] where nothing bounds it.

        scale: in the place of the attention's own. state: for `probs`, what it reads of its branch. ragged: of a
        decode, which needs no k.
        """
        plan = empty_plan(self.program, self.selection, self.shape, self.device)
        if self.rank is not None:
            assert ragged is not None
            keys, lse = state if state is not None else (None, None)
            vectors = (
                [*keys] if keys is not None else [self._ranked(v, ragged, inputs) for v in vectors_of(self.selection)]
            )
            table = None if self.page is None else ragged.page_table
            self.rank(plan, q, vectors, ragged.seq_lens, table, inputs, args, scale, lse)
            return plan
        if self.among is None:
            self._fused(plan, q, k, inputs, args, scale, state)
            return plan
        strips = Strips(self, q, k, inputs, args, scale, state, ragged)
        heads = plan.shape[1]
        step = max(1, STRIP[self.device.type] // max(1, self.shape.batch * self.shape.heads * strips.width))
        if strips.of_call is not None:
            self._of_call(plan, strips, strips.of_call, step)
            return plan
        if self.selection.together:
            level = strips.levels(0, self.classes, step)[:, :: self.shape.heads // heads]
            plan.copy_(listed(level, self.capacity) if self.selection.bounded else level)
            return plan
        room = self.capacity if self.selection.bounded else None
        for low in range(0, self.classes, step):
            high = min(low + step, self.classes)
            plan[:, :, low:high] = strips.chosen(low, high, heads, room)
        return plan

    def scores(
        self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, state: State
    ) -> Tensor:  # fmt: skip
        """What members are ranked by, of each row class: float [B, Hq, R, M], float32 (float64 for float64 tensors)."""
        strips = Strips(self, q, k, inputs, args, scale, state)
        found = q.new_zeros(self.shape.batch, self.shape.heads, self.classes, self.members, dtype=strips.real)
        step = max(1, STRIP[self.device.type] // max(1, self.shape.batch * self.shape.heads * strips.width))
        for low in range(0, self.classes if found.numel() and q.numel() else 0, step):
            at = slice(low, min(low + step, self.classes))
            found[:, :, at] = strips.scores(at.start, at.stop)
        return found

    def _of_call(self, plan: Tensor, strips: Strips, classes: Tensor, step: int) -> None:
        """Write the plan of a decode that chooses for blocks or tiles of rows: of those that hold rows of the call,
        which are others in each sequence. The rest choose nothing."""
        plan.fill_(-1 if self.selection.bounded else 0)
        (batch, heads, last, width), count = plan.shape, classes.shape[1]
        if not plan.numel():
            return
        # With a place for what is no class, which is dropped.
        found = torch.cat((plan, plan[:, :, :1]), 2)
        room = self.capacity if self.selection.bounded else None
        # Where all of them compete they are one strip.
        wide = count if self.selection.together else step
        for low in range(0, count, wide):
            high = min(low + wide, count)
            if self.selection.together:
                level = strips.levels(low, high, min(step, high - low))[:, :: self.shape.heads // heads]
                made = level if room is None else listed(level, room)
            else:
                made = strips.chosen(low, high, heads, room)
            at = classes[:, low:high].clamp(max=last)
            found.scatter_(2, at[:, None, :, None].expand(batch, heads, high - low, width), made.to(found.dtype))
        plan.copy_(found[:, :, :-1])

    def _fused(
        self, plan: Tensor, q: Tensor, k: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        state: State | None,
    ) -> None:  # fmt: skip
        from attndsl.runtime.triton_select import TritonSelect

        assert self.printer is not None
        lse: Tensor | None = None
        if isinstance(self.selection.score, Dot):
            vectors = self.vectors(self.selection.score.y, k, inputs)
        else:
            assert state is not None
            vectors, lse = state[0][0].to(q.dtype), state[1].contiguous()
        if self.fused is None:
            self.fused = TritonSelect(
                self.program, self.selection, self.shape, q, vectors.shape[1], self.given, self.printer
            )
        self.fused(plan, q, vectors, inputs, args, scale, lse)


def check_tokens(selection: Selection, shape: CallShape) -> None:
    """Raises `PatternError` (A570) where choosing single tokens would be slow in silence."""
    single = selection.keys == selection.rows == 1 and isinstance(selection.members, Lags | NoneType)
    if single and selection.share is Share.NONE and shape.rows > MAX_TOKEN_ROWS:
        raise error(
            "A570", f"each of {shape.heads} heads chooses single tokens for each of {shape.rows} rows",
            selection.span, help="write `share = group` or `share = heads`, larger members, or `per = rows(64)`",
        )  # fmt: skip


def check_pairs(selection: Selection, shape: CallShape, asked: Scalar, rows: int) -> None:
    """Raises `PatternError` (A577) where a condition of single pairs is asked of too many, for so many rows."""
    lead = (shape.batch if reads(asked, "b") else 1) * (shape.heads if reads(asked, "h", "g") else 1)
    if (pairs := lead * rows * shape.k_len) > MAX_PAIRS:
        raise error(
            "A577", f"which members {rows} rows may choose is looked up in {pairs:,} pairs", selection.span,
            help=f"at most {MAX_PAIRS:,}: choose `per = rows(64)`, or among what does not read k",
        )  # fmt: skip


def check_together(selection: Selection, together: int) -> None:
    """Raises `PatternError` (A577) where so many members of all row classes are too many to compete."""
    if selection.together and together > MAX_TOGETHER:
        raise error(
            "A577", f"{together:,} members of all row classes compete", selection.span,
            help=f"at most {MAX_TOGETHER:,}: choose `per = rows(128)` or larger members, or write `compete = row`",
        )  # fmt: skip


def empty_plan(program: Program, selection: Selection, shape: CallShape, device: torch.device) -> Tensor:
    """A plan without anything in it."""
    heads = {Share.NONE: shape.heads, Share.GROUP: shape.kv_heads, Share.HEADS: 1}[plan_heads(selection)]
    width, dtype = members_of(program, selection, shape), torch.uint8
    if selection.bounded:
        width, dtype = capacity(program, selection, (shape.heads, shape.kv_heads), width), torch.int32
    return torch.empty(
        shape.batch, heads, classes_of(program, selection, shape), width, dtype=dtype, device=device
    )  # fmt: skip


def classes_of(program: Program, selection: Selection, shape: CallShape) -> int:
    """Row classes of a plan: the call's rows, blocks of all positions (of documents there is room for), or one."""
    match selection.rows:
        case 1:
            return shape.rows
        case None:
            return 1
        case _ if program.packed is not None:
            return shape.k_len  # Every token may be a document.
        case rows:
            tokens, each = (rows, 1) if selection.row_tiles is None else extent(selection.row_tiles)
            return -(-shape.q_len(program) // tokens) * each


def members_of(program: Program, selection: Selection, shape: CallShape) -> int:
    """Members of a plan."""
    return shape.members(plan_input(selection), program)


def checked_masses(
    program: Program, selection: Selection, shape: CallShape, ragged: bool = False
) -> tuple[BranchMass, ...]:
    """The branch that a selection reads the probabilities of, part by part.

    Raises `PatternError` where it has none (A575), or where one row class would look at too many (A576).
    """
    masses = branch_masses(program, selection, (shape.heads, shape.kv_heads), ragged)
    keys, (low, high) = sum(x.keys(shape.k_len) for x in masses), seeing_rows(program, masses, shape, ragged)
    if selection.rows is None and shape.batch * shape.heads * (high - low) * keys > MAX_PAIRS:
        raise error(
            "A576", f"`probs` for all {high - low} rows that see looks at {keys} keys of each", selection.span,
            help=f"at most {MAX_PAIRS:,} pairs: take fewer rows, or `per = rows(64)`",
        )  # fmt: skip
    return masses


def seeing_rows(
    program: Program, masses: Sequence[BranchMass], shape: CallShape, ragged: bool = False
) -> tuple[int, int]:
    """The position of the first row of a call that a branch may let see anything, and one past the last. Of a decode,
    whose rows stand elsewhere in each sequence, as if all were as long as they may be: any row."""
    if ragged:
        return shape.k_len - shape.rows, shape.k_len
    call = (shape.heads, shape.kv_heads), shape.q_len(program), shape.k_len
    ends = [rows_that_see(mass.program, *call) for mass in masses]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    first = shape.first_position(program)
    return max(low, first), max(low, first, min(high, first + shape.rows))
