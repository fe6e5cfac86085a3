"""Kernels where each row chooses members of the keys for itself: rows that chose the same member make a tile.

The keys of a tile are then in order, and loaded once for all of its rows. What a row gets from one of its members is
kept in a slot of its own, and the slots of a row are merged in order, so there are no atomics:

- `attention_forward` owns a tile of rows that chose one member, and writes output and lse to their slots;
  `merge_slots` merges those of each row.
- `attention_rows` makes what the kernels of the backward pass read of each row. `attention_dq` owns tiles as the
  forward kernel does, and `sum_slots` adds its slots up. `attention_dkdv` owns key tiles, and loops over the rows that
  chose their member.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from attndsl.codegen.kernel import FULL, PARTIAL, KernelWriter
from attndsl.codegen.row_lists import RowLists
from attndsl.codegen.triton_backward import DqKernel
from attndsl.codegen.triton_forward import KERNEL, ForwardWriter
from attndsl.listing import Gathered
from attndsl.plan import BackwardPlan, ForwardPlan, Loads, Part
from attndsl.runs import LIST_HEAD, PLACE

MERGE, ROWS, SUM = "merge_slots", "attention_rows", "sum_slots"
# Rows of a program that merges slots.
MERGED = 16


def forward_source(plan: ForwardPlan) -> str:
    """Text of a Python file with `attention_forward` and `merge_slots`."""
    attending, merging = _Forward(plan, KERNEL, "q k v"), _Merge(plan, MERGE, "out")
    attending.body()
    merging.body()
    return attending.file("forward kernel over gathered rows, portable Triton", merging)


def backward_sources(plan: BackwardPlan) -> tuple[str, str]:
    """Texts of two Python files: of `attention_dq`, `sum_slots` and `attention_rows`, and of `attention_dkdv`.

    Where the heads of a key head choose together, `attention_dq` goes over their lists, and stands alone.
    """
    if plan.tiling.pack > 1:
        return DqKernel(plan).source(), _DkDv(plan).source()
    of_q, summing = _Dq(plan), _Sum(plan, SUM, "dq")
    summing.body()
    of_q.beside = (summing,)
    if plan.softmax:
        rows = _Rows(replace(plan, gathered=None))
        rows.body()
        of_q.beside = (summing, rows)
    return of_q.source(), _DkDv(plan).source()


class _Gathering(KernelWriter, ABC):
    """The rows of a tile, read from the list of those that chose a member."""

    @property
    def gathered(self) -> Gathered:
        assert self.plan.gathered is not None
        return self.plan.gathered

    def listed(self, place: str) -> str:
        """What the list holds at a place, or at each of several."""
        printer = self.fresh()
        printer.names.known[PLACE] = place
        return printer.text(self.gathered.entry)

    def constants(self) -> None:
        super().constants()
        self.lines.add(f"MEMBER: tl.constexpr = {self.gathered.keys}")

    def query_tile(self) -> None:
        """Which rows a program owns, of one head, and the member that they chose."""
        spec, lines = self.plan.spec, self.lines
        lines.add(
            "",
            "# Heads one after another, of a head one member after another: programs in flight share keys.",
            "own_head = tl.program_id(0) // gathered_tiles",
            "head = first_head + own_head",
            "tile = tl.program_id(0) % gathered_tiles",
            f"b = head // {spec.heads}",
            f"h = head % {spec.heads}",
            f"g = h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "g = h",
            self.start,
            f"tile_at = {LIST_HEAD} * (tl.cdiv(k_len, MEMBER) + tile)",
            *(
                f"{name} = {self.listed(f'tile_at + {i}' if i else 'tile_at')}"
                for i, name in enumerate(("group", "first", "last"))
            ),
        )
        with lines.block("if first >= last:"):
            lines.add("return  # Not every head needs as many tiles.")
        lines.add("member = group // 2", "", "q_offset = tl.arange(0, BLOCK_Q)", *self.key_offsets())
        self.rows("first", "last")
        lines.add("q_pos = start + q_rows[:, None]")
        self.row_index("[:, None]")

    def rows(self, first: str, last: str) -> None:
        """The rows of the entries from `first` on; past `last`, rows that do not exist."""
        self.lines.add(
            f"places = {first} + q_offset",
            f"chosen = {self.listed('places')}",
            f"q_rows = tl.where(places < {last}, chosen >> slot_bits, rows)",
        )

    def member_loops(self) -> None:
        """Loops over the key tiles of the program's member: its rows see all of it, or each a part."""
        lines = self.lines
        lines.add(
            "tiles = tl.cdiv(tl.minimum(MEMBER, k_len - member * MEMBER), BLOCK_K)",
            "full_count = tl.where(group % 2 == 0, tiles, 0)",
        )
        for label, count, comment in (("full", "full_count", FULL), ("partial", "tiles - full_count", PARTIAL)):
            lines.add(f"# {comment}{self.origin}")
            with lines.block(f"for i in range({count}):"):
                lines.add("k_tile = member * (MEMBER // BLOCK_K) + i")
                self.member_tile(masked=label == "partial")
            lines.add("")

    @abstractmethod
    def member_tile(self, masked: bool) -> None:
        """One tile of pairs."""

    def store_slots(self, value: str, parts: tuple[Part, ...], dim: int) -> None:
        """Store the accumulators in the slots of the tile's entries."""
        self.lines.add(
            "slot = chosen & ((1 << slot_bits) - 1)",
            "slot_at = (own_head.to(tl.int64) * rows + (chosen >> slot_bits)) * slots + slot",
            f"part_ptrs = part_ptr + slot_at[:, None] * {dim}",
        )
        for part in parts:
            dims = self.dims(part)
            mask = "(q_rows < rows)[:, None]" + (f" & ({dims}[None, :] < {dim})" if part.padded else "")
            self.lines.add(f"tl.store(part_ptrs + {dims}[None, :], {value}{part.suffix}, mask={mask})")

    def _candidates(self) -> list[str]:
        return [
            *super()._candidates(),
            "part_ptr",
            "part_lse_ptr",
            "first_head",
            "gathered_tiles",
            "slots",
            "slot_bits",
        ]


class _Forward(_Gathering, ForwardWriter):
    plan: ForwardPlan

    def body(self) -> None:
        spec, lines = self.plan.spec, self.lines
        self.constants()
        self.query_tile()
        lines.add(self.base("q", "h"))
        self.load("q", self.q_parts, spec.dim, "q", "h", bounded=True, pointer=True)
        if spec.loads is Loads.POINTER:
            lines.add(self.base("k", "g"), self.base("v", "g"))
        self._nothing_seen()
        self.seed()
        self.scale(folded=self.folded)
        self._hoist()
        self.member_loops()
        if self.softmax:
            self._normalise()
        elif spec.dropout:
            lines.add(*(f"acc{part.suffix} = acc{part.suffix} * keep_scale" for part in self.v_parts))
        self.store_slots("acc", self.v_parts, spec.v_dim)
        if self.softmax:
            lines.add(
                "# As exponents of 2 take it.",
                'lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))',
                "tl.store(part_lse_ptr + slot_at, lse, mask=q_rows < rows)",
            )

    def member_tile(self, masked: bool) -> None:
        self._tile(masked)


class _Dq(_Gathering, DqKernel):
    def loops(self, tile: str) -> None:
        self.member_loops()

    def member_tile(self, masked: bool) -> None:
        self.tile(masked)

    def write(self) -> None:
        self.store_slots("dq", self.q_parts, self.plan.spec.dim)


class _DkDv(_Gathering, RowLists):
    several = "BLOCK_Q"

    def ends(self) -> None:
        self.lines.add(
            f"places_at = {LIST_HEAD} * (k_tile * BLOCK_K // MEMBER)",
            f"begin = {self.listed('places_at')}",
            f"end = {self.listed('places_at + 2')}",
        )

    def read(self, place: str) -> None:
        self.lines.add(f"chosen = {self.listed(f'{place} + q_offset')}")

    def take(self, place: str) -> None:
        self.lines.add(f"q_rows = tl.where({place} + q_offset < end, chosen >> slot_bits, rows)")

    def member_tile(self, masked: bool) -> None:
        self.tile(masked)


class _Rows(DqKernel):
    """What the other kernels read of each row."""

    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan)
        self.function = ROWS

    def body(self) -> None:
        self.constants()
        self.query_tile()
        self.lines.add(self.base("dout", "h"))
        self.load("dout", self.v_parts, self.plan.spec.v_dim, "q", "h", bounded=True, pointer=True)
        self.delta()


class _Slots(KernelWriter):
    """A program owns some rows of a head, and goes over their slots."""

    def own_rows(self) -> None:
        spec, lines = self.plan.spec, self.lines
        lines.add(
            f"BLOCK_Q: tl.constexpr = {MERGED}",
            "LOG2_E: tl.constexpr = 1.4426950408889634",
            "q_tiles = tl.cdiv(rows, BLOCK_Q)",
            "own_head = tl.program_id(0) // q_tiles",
            "head = first_head + own_head",
            f"b = head // {spec.heads}",
            f"h = head % {spec.heads}",
            f"g = h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "g = h",
            self.start,
            "q_rows = tl.program_id(0) % q_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)",
            "exists = q_rows < rows",
            "slot_at = (own_head.to(tl.int64) * rows + q_rows) * slots",
        )

    def load_slot(self, parts: tuple[Part, ...], dim: int, there: str) -> None:
        self.lines.add(f"part_ptrs = part_ptr + (slot_at + slot)[:, None] * {dim}")
        for part in parts:
            dims = f"{self.dims(part)}[None, :]"
            mask = f"{there}[:, None]" + (f" & ({dims} < {dim})" if part.padded else "")
            self.lines.add(f"part{part.suffix} = tl.load(part_ptrs + {dims}, mask={mask}, other=0.0)")

    def write_rows(self, x: str, parts: tuple[Part, ...], dim: int) -> None:
        """Store the accumulators as rows of tensor `x`."""
        self.lines.add(self.base(x, "h"), f"{x}_ptrs = {x}_at + q_rows[:, None].to(tl.int64) * stride_{x}n")
        for part in parts:
            dims = f"{self.dims(part)}[None, :]"
            mask = "exists[:, None]" + (f" & ({dims} < {dim})" if part.padded else "")
            text = f"acc{part.suffix}.to({x}_ptr.dtype.element_ty)"
            self.lines.add(f"tl.store({x}_ptrs + {dims}, {text}, mask={mask})")

    def _candidates(self) -> list[str]:
        return [*super()._candidates(), "part_ptr", "part_lse_ptr", "first_head", "slots"]


class _Merge(_Slots, ForwardWriter):
    """Merges slots by their lse, or where nothing is normalised, adds them up."""

    plan: ForwardPlan

    def body(self) -> None:
        plan, lines = self.plan, self.lines
        self.own_rows()
        self._nothing_seen()
        with lines.block("for slot in range(slots):"):
            if self.softmax:
                lines.add(
                    'lse = tl.load(part_lse_ptr + slot_at + slot, mask=exists, other=float("-inf"))',
                    'seen = lse > float("-inf")',
                    "new_max = tl.maximum(row_max, lse)",
                    "weights = tl.exp2(lse - new_max)",
                    "decay = tl.exp2(row_max - new_max)",
                    "row_sum = row_sum * decay + weights",
                    "row_max = new_max",
                )
            self.load_slot(self.v_parts, plan.spec.v_dim, "seen" if self.softmax else "exists")
            for part in self.v_parts:
                acc, found = f"acc{part.suffix}", f"part{part.suffix}"
                merged = f"{acc} * decay[:, None] + {found} * weights[:, None]" if self.softmax else f"{acc} + {found}"
                lines.add(f"{acc} = {merged}")
        if plan.sink is not None:
            lines.add("q_pos = start + q_rows", "q_index = tl.minimum(q_rows, rows - 1)")
            self._add_sink(plan.sink)
        if self.softmax:
            lines.add("inverse = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)")
            self._rescale("inverse")
            lines.add(
                'lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) / LOG2_E)',
                "tl.store(lse_ptr + head.to(tl.int64) * rows + q_rows, lse, mask=exists)",
            )
        self.write_rows("out", self.v_parts, plan.spec.v_dim)


class _Sum(_Slots):
    """Adds up the slots of the gradient of q; a slot that no kernel wrote holds zeros."""

    def body(self) -> None:
        spec, lines = self.plan.spec, self.lines
        self.own_rows()
        lines.add(*(f"acc{p.suffix} = tl.zeros([BLOCK_Q, {p.size}], tl.float32)" for p in self.q_parts))
        with lines.block("for slot in range(slots):"):
            self.load_slot(self.q_parts, spec.dim, "exists")
            lines.add(*(f"acc{p.suffix} = acc{p.suffix} + part{p.suffix}" for p in self.q_parts))
        self.write_rows("dq", self.q_parts, spec.dim)


__all__ = ["MERGE", "MERGED", "ROWS", "SUM", "backward_sources", "forward_source"]
