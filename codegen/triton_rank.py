"""The kernels of a selection in a decode, in portable Triton: what members may give a row, and the choice of the best.

Rows are few and members many, so these are dealt out among programs, which leave a number of each member that orders
like its score; then one program a list takes the greatest.
"""

from __future__ import annotations

from attndsl.codegen.kernel import KernelWriter
from attndsl.codegen.lines import Lines
from attndsl.pooling import power_of_two
from attndsl.program import Axis, Read, Table, Var, walk
from attndsl.select_plan import SelectPlan
from attndsl.selection import Bound, Forced

RANK, CHOOSE = "rank_members", "choose_members"
# Numbers that are compared at once.
_COMPARED = 2048
# Up to so many heads the loop over them is written out.
_UNROLLED = 8
# The least number marks what is no candidate, the greatest what is forced.
LEAST, GREATEST = "-2147483648", "2147483647"


def rank_source(plan: SelectPlan) -> str:
    """Text of a Python file with `rank_members`, which writes int32 [B, lists, rows, members], and `choose_members`,
    which makes the plan of it, int32 [B, lists, rows, capacity]."""
    choosing = _Choose(plan)
    choosing.write()
    ranking = _Rank(plan)
    ranking.write()
    return ranking.file(f"choice of `{plan.selection.name}` in a decode, portable Triton", choosing)


class _Writer(KernelWriter):
    plan: SelectPlan

    def _candidates(self) -> list[str]:
        own = ["seq_lens_ptr", "page_table_ptr", "keys_ptr", "plan_ptr", "members", "stride_lens", "capacity"]
        own += ["stride_table", "pages"]
        further = (name for name in super()._candidates() if name not in ("k_len", "entries"))
        return [*own, *further, "vector_share"]

    def _list(self, lists: str, heads: int) -> None:
        """Which row a program has, and the first of so many heads."""
        spec, lines = self.plan.spec, self.lines
        lines.add(
            f"q_row = {lists} % rows",
            f"group = {lists} // rows",
            f"b = group // {spec.heads // heads}",
            f"h = group % {spec.heads // heads}" + (f" * {heads}" if heads > 1 else ""),
            f"g = h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "g = h",
        )


class _Rank(_Writer):
    def __init__(self, plan: SelectPlan) -> None:
        self.bound = isinstance(plan.selection.score, Bound)
        super().__init__(plan, RANK, "q low high" if self.bound else "q vectors", ragged=True)

    def write(self) -> None:
        plan, spec, lines = self.plan, self.plan.spec, self.lines
        width = power_of_two(spec.dim)
        padded = "" if width == spec.dim else f" & (dims < {spec.dim})[None, :]"
        lines.add(
            f"BLOCK_M: tl.constexpr = {plan.members}  # members of {plan.selection.keys} tokens",
            "",
            "chunks = tl.cdiv(members, BLOCK_M)",
            "chunk = tl.program_id(0) % chunks",
            "nth = tl.program_id(0) // chunks",
        )
        self._list("nth", plan.share * plan.abreast)
        self.printer.helpers.add("clamp")
        lines.add(
            "k_len = clamp(tl.load(seq_lens_ptr + b * stride_lens), 0, capacity)",
            "start = k_len - rows",
            "q_pos = start + q_row",
            "member = chunk * BLOCK_M + tl.arange(0, BLOCK_M)",
            f"k_pos = member * {plan.selection.keys}",
            "exists = (member < members) & (k_pos < k_len) & (q_pos >= 0)",
        )
        if any(dim.axis is Axis.Q and dim.block == 1 for decl in plan.inputs for dim in decl.dims):
            lines.add("q_index = q_row")
        if any(dim.axis is Axis.K or (dim.axis is Axis.Q and dim.block > 1) for x in plan.inputs for dim in x.dims):
            lines.add("last_key = tl.maximum(k_len - 1, 0)")
        lines.add(f"dims = tl.arange(0, {width})")
        there = "exists"
        if plan.page is not None:
            there = "(exists & (page >= 0) & (page < pages))"
            lines.add(
                "# A page that does not exist counts as zeros.",
                "table_at = page_table_ptr + b.to(tl.int64) * stride_table",
                f"page = tl.load(table_at + member // {plan.page}, mask=exists, other=-1).to(tl.int64)",
            )
        for x in ("low", "high") if self.bound else ("vectors",):
            slot, place = f"b.to(tl.int64) * stride_{x}b", "member"
            if plan.page is not None:
                slot, place = f"page[:, None] * stride_{x}b", f"(member % {plan.page})"
            lines.add(
                f"{x}_at = {x}_ptr + {slot} + (h // vector_share).to(tl.int64) * stride_{x}h",
                f"{x}_at = {x}_at + {place}.to(tl.int64)[:, None] * stride_{x}n + dims[None, :]",
                f"{x} = tl.load({x}_at, mask={there}[:, None]{padded}, other=0.0).to(tl.float32)",
            )
        if plan.seen is not None:
            lines.add("factor = scale * 1.4426950408889634")
        mask, heads = padded.replace("[None, :]", "").replace(" & ", ", mask="), plan.share * plan.abreast
        each = lines.block(f"for i in {'tl.static_range' if heads <= _UNROLLED else 'range'}({heads}):")
        if plan.abreast > 1:
            with each:
                lines.add("scores = tl.zeros([BLOCK_M], tl.float32)")
                self._score(mask)
                self._order(f"(b * {spec.heads} + h + i).to(tl.int64) * rows + q_row", "(h + i)")
            return
        lines.add("scores = tl.zeros([BLOCK_M], tl.float32)")
        with each:
            self._score(mask)
        self._order("nth.to(tl.int64)", "h")

    def _score(self, mask: str) -> None:
        """Add what a head gets of each member."""
        plan, lines = self.plan, self.lines
        lines.add(
            "q_at = q_ptr + b.to(tl.int64) * stride_qb + (h + i).to(tl.int64) * stride_qh",
            f"q = tl.load(q_at + q_row.to(tl.int64) * stride_qn + dims{mask}{', other=0.0' * bool(mask)})",
            "q = q.to(tl.float32)[None, :]",
            f"score = tl.sum({'tl.maximum(q * low, q * high)' if self.bound else 'q * vectors'}, 1)",
        )
        if plan.seen is None:
            lines.add("scores += score * scale")
            return
        of_entries = self.fresh()
        of_entries.names.known.update({Var("k"): "member", Var("h"): "(h + i)"})
        lines.add(
            f"seen = {of_entries.text(plan.seen)}",
            f"lse = tl.load(lse_ptr + (b * {plan.spec.heads} + h + i).to(tl.int64) * rows + q_row)",
            "score = tl.exp2(score * factor - lse * 1.4426950408889634)",
            "# A row that sees nothing has an lse of -inf; infinity is no probability.",
            'scores += tl.where(seen & (score < float("inf")), score, 0.0)',
        )

    def _order(self, nth: str, head: str) -> None:
        """Leave in the nth list a number of each member that orders like its score."""
        plan, lines = self.plan, self.lines
        lines.add(
            "# A float's bits order like it, once those of negative numbers are turned around. A score of -inf or NaN",
            "# withdraws a member.",
            "bits = (tl.minimum(scores, 3.0e38) + 0.0).to(tl.int32, bitcast=True)",
            "bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)",
            f'keys = tl.where(scores > float("-inf"), bits, {LEAST})',
        )
        printer = self.fresh()
        printer.names.known[Var("h")] = head
        if plan.forced is not None:
            lines.add(f"keys = tl.where({printer.text(plan.forced)}, {GREATEST}, keys)")
        candidate = "exists" if plan.mask is None else f"exists & ({printer.text(plan.mask)})"
        lines.add(
            f"keys = tl.where({candidate}, keys, {LEAST})",
            f"tl.store(keys_ptr + ({nth}) * members + member, keys, mask=member < members)",
        )


class _Choose(_Writer):
    def __init__(self, plan: SelectPlan) -> None:
        super().__init__(plan, CHOOSE, "", ragged=True)

    def write(self) -> None:
        plan, lines = self.plan, self.lines
        if any(isinstance(x, Var | Read | Table) for x in walk(plan.budget)):
            self._list("tl.program_id(0)", plan.share)
        lines.add(
            "keys_at = keys_ptr + tl.program_id(0).to(tl.int64) * members",
            f"plan_at = plan_ptr + tl.program_id(0).to(tl.int64) * {plan.capacity}",
            f"count = tl.minimum(tl.maximum({self.fresh().text(plan.budget)}, 0) + tl.zeros([], tl.int32), members)",
        )
        if plan.forced is not None:
            lines.add("forced = tl.zeros([], tl.int32)")
            over_members(lines, _COMPARED, f"forced += tl.sum((key == {GREATEST}).to(tl.int32), 0)")
            extra = plan.selection.forced is Forced.EXTRA
            lines.add("count = forced + count" if extra else "count = tl.maximum(forced, count)")
        lines.add(f"count = tl.minimum(count, {plan.capacity})")
        choose_greatest(lines, _COMPARED, "plan_at", str(plan.capacity))


def over_members(lines: Lines, compared: int, *body: str) -> None:
    """A loop over a list's numbers, `key`, so many at once; `member` are their places."""
    with lines.block(f"for first in range(0, members, {compared}):"):
        lines.add(
            f"member = first + tl.arange(0, {compared})",
            f"key = tl.load(keys_at + member, mask=member < members, other={LEAST})",
            *body,
        )


def choose_greatest(lines: Lines, compared: int, into: str, width: str) -> None:
    """Write the places of the `count` greatest of the numbers at `keys_at`, of equal ones the first, in increasing
    order to `into`, then -1 up to its `width`."""
    lines.add(
        "# The greatest number that `count` keys reach, bit by bit: first whether it is negative.",
        f"least = tl.full([], {LEAST}, tl.int32)",
        "width = tl.full([], 1073741824, tl.int32)",
    )
    with lines.block("for bit in range(0, 32):"):
        lines.add("guess = tl.where(bit == 0, 0, least + width)", "reached = tl.zeros([], tl.int32)")
        over_members(lines, compared, "reached += tl.sum((key >= guess).to(tl.int32), 0)")
        lines.add(
            "least = tl.where(reached >= count, guess, least)",
            "width = tl.where(bit == 0, width, width // 2)",
        )
    lines.add("room = count + tl.zeros([], tl.int32)")
    over_members(lines, compared, "room -= tl.sum((key > least).to(tl.int32), 0)")
    lines.add("taken = tl.zeros([], tl.int32)", "equals = tl.zeros([], tl.int32)")
    over_members(
        lines,
        compared,
        f"equal = (key == least) & (key > {LEAST})",
        "nth = equals + tl.cumsum(equal.to(tl.int32), 0)",
        "chosen = (key > least) | (equal & (nth <= room))",
        "place = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1",
        f"tl.store({into} + place, member, mask=chosen)",
        "equals += tl.sum(equal.to(tl.int32), 0)",
        "taken += tl.sum(chosen.to(tl.int32), 0)",
    )
    with lines.block(f"for first in range(taken, {width}, {compared}):"):
        lines.add(
            f"place = first + tl.arange(0, {compared})",
            f"tl.store({into} + place, -1, mask=place < {width})",
        )
