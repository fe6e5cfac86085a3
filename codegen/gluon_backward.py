"""The backward kernel for Hopper in Gluon: dq, dk and dv in one pass over key tiles, five products a tile.

The portable kernels make the scores and their gradients twice, once for dq and once for dk and dv: seven products, and
no atomics. Here a program owns a key tile, keeps its dk and dv in registers, and adds what a tile of pairs gives to dq
to a float32 tensor by the hardware's copies, which add in the cache beside the kernel's work. In which order programs
add is not fixed, so dq may differ in its last bits from run to run; where that is not wanted there are the others.

One warp loads tiles of q and dout, and what the forward pass kept of their rows. Two warpgroups own half of the keys
each. They hold their pairs transposed, keys by rows, so that weights and d_scores stand in registers as the products
for dv and dk take them. For dq they exchange d_scores through shared memory, and each makes half of its columns, or
rows. The tensor cores are kept busy: beside a product for dk, dq leaves and the next tile's scores are begun.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from attndsl.codegen.gluon import (
    IMPORTS,
    IN_TILE,
    PART,
    TILE_FIRST,
    barriers,
    by_place,
    count_of,
    device_function,
    helper_functions,
    specialized,
)  # fmt: skip
from attndsl.codegen.head_order import heavy_first
from attndsl.codegen.header import header
from attndsl.codegen.kernel import leave_to_another, scalar_parameters, used_parameters
from attndsl.codegen.kernel_loops import Visits
from attndsl.codegen.leaves import Leaves
from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import GLUON, Level, Names, Printer
from attndsl.codegen.triton_rows import rows_source
from attndsl.plan import Backend, BackwardPlan
from attndsl.program import Axis, Const, Var, reads

GRADIENTS = "attention_gradients"
# Of a product.
_LEAST_ROWS = 64

# Where the rows of a tile stand. A thread's places differ by numbers that are the same for all threads: with what is
# the thread's own in the tile's first row, they are compared with constants, and none stands in a register.
_PLACES = (
    "q_place = gl.expand_dims(gl.arange(0, BLOCK_Q, ROW), 0)",
    "q_first = start + q_tile * BLOCK_Q + (q_place & LANE)",
    "q_place = q_place & ~LANE",
)
_ADD = '''\
@builtin
def add_shared_to_global(desc, coord, source, _semantic=None):
    """Add a tile in shared memory to a tensor, by the hardware's copies."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, source.handle)


'''
_TILES = ("q_smem", "dout_smem", "lse_smem", "delta_smem", "rows_ready", "rows_free")
_KEYS = ("k_smem", "v_smem", "keys_ready")
_EXCHANGE = ("pairs_smem", "dq_smem", "pairs_ready")
_DESCRIPTORS = (
    "q_desc",
    "k_desc",
    "v_desc",
    "dout_desc",
    "row_lse_desc",
    "delta_desc",
    "dq_desc",
    "dk_desc",
    "dv_desc",
)


def backward_sources(plan: BackwardPlan) -> tuple[str, str]:
    """Texts of two Python files: of `attention_rows`, and of `attention_gradients`."""
    return rows_source(replace(plan, spec=replace(plan.spec, backend=Backend.TRITON))), gradients_source(plan)


def gradients_source(plan: BackwardPlan) -> str:
    """Text of a Python file whose `attention_gradients` makes dq, dk and dv for Hopper."""
    return _Gradients(plan).source()


class _Gradients:
    def __init__(self, plan: BackwardPlan) -> None:
        self.plan = plan = plan.of_keys()
        self.helpers: set[str] = set()
        self.group = plan.spec.heads // plan.spec.kv_heads
        self.mask = None if self.plan.mask is None else by_place(self.plan.mask, "q")
        # Tiles loaded before: those of the other heads of the group.
        self.turn = "n" if self.group == 1 else "(done + n)"
        # Which half of dq's tile a warpgroup makes.
        self.of_rows = plan.tiling.block_q > _LEAST_ROWS
        self.scale_per_head = self.group > 1 and plan.scale is not None and reads(plan.scale, "h")
        self.slope = None if plan.d_score == Const(1.0) else plan.d_score
        self.reads_rows = any(d.axis is Axis.Q and d.block == 1 for decl in plan.inputs for d in decl.dims)
        self.uniform = [*(["scale"] if plan.scale is None else []), "rows", "k_len", *scalar_parameters(self.plan)]

    def source(self) -> str:
        producer, consumer = self._producer(), self._consumer()
        candidates = [*_DESCRIPTORS, *_TILES, *_KEYS, *_EXCHANGE, "b", "g", "k_tile", *self.uniform]
        takes = {
            "load_tiles": used_parameters(candidates, producer),
            "attend_keys": used_parameters(candidates, consumer),
        }
        kernel = self._kernel(takes)
        entry = used_parameters([*_DESCRIPTORS, "heavy", *self.uniform], kernel)
        return "".join(
            (
                header(self.plan, "gradients of q, k and v, Gluon for Hopper"),
                "from triton._C.libtriton import ir\n",
                IMPORTS.replace(
                    "gl\nfrom", "gl\nfrom triton.experimental.gluon.language._core import builtin\nfrom", 1
                ),
                helper_functions(self.helpers),
                _ADD,
                device_function("load_tiles", takes["load_tiles"], producer),
                "\n\n",
                device_function("attend_keys", [PART, *takes["attend_keys"]], consumer),
                "\n\n",
                device_function(GRADIENTS, entry, kernel),
            )
        )

    # --------------------------------------------------------------------------------- the parts

    def _constants(self, lines: Lines) -> None:
        tiling = self.plan.tiling
        lines.add(
            f"BLOCK_Q: gl.constexpr = {tiling.block_q}",
            f"BLOCK_K: gl.constexpr = {tiling.block_k}",
            f"STAGES: gl.constexpr = {tiling.stages}",
            f"DIM: gl.constexpr = {self.plan.spec.dim}",
        )

    def _start(self, lines: Lines) -> Printer:
        self._constants(lines)
        lines.add("start = 0" if self.plan.program.align_start else "start = k_len - rows")
        if self.group == 1:
            lines.add("h = g")
        return Printer(GLUON, Names(Leaves(self.plan)), self.helpers)

    @contextmanager
    def _heads(self, lines: Lines) -> Iterator[None]:
        """What is done for each of the query heads that share the keys, one after another."""
        if self.group == 1:
            yield
            return
        lines.add("done = 0")
        with lines.block(f"for member in range({self.group}):"):
            lines.add(f"h = g * {self.group} + member")
            yield
            lines.add("done += partial + full")

    def _visits(self, lines: Lines, printer: Printer) -> tuple[Visits | None, Visits | None]:
        """The query tiles that visit the key tile, partial ones first."""
        runs = self.plan.runs
        printer.share(lines, [x for run in runs.full + runs.partial for x in (run.first, run.count)], "tile_")
        partial = Visits(lines, printer, runs.partial, "partial") if runs.partial else None
        full = Visits(lines, printer, runs.full, "full") if runs.full else None
        lines.add(f"partial = {count_of(partial)}", f"full = {count_of(full)}")
        return partial, full

    def _turn(self, lines: Lines, partial: Visits | None, full: Visits | None) -> None:
        """Which tile turn n is about, and where it lies."""
        first, second = (x.tile(i) if x else "0" for x, i in ((partial, "n"), (full, "(n - partial)")))
        lines.add(f"q_tile = gl.where(n < partial, {first}, {second})", f"stage = {self.turn} % STAGES")

    def _producer(self) -> str:
        lines = Lines(indent=1)
        printer = self._start(lines)
        lines.add(
            "mbarrier.expect(keys_ready, 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)",
            "for half in gl.static_range(2):",
            "    at = [b, g, k_tile * BLOCK_K + half * (BLOCK_K // 2), 0]",
            "    tma.async_copy_global_to_shared(k_desc, at, keys_ready, k_smem.index(half))",
            "    tma.async_copy_global_to_shared(v_desc, at, keys_ready, v_smem.index(half))",
        )
        with self._heads(lines):
            partial, full = self._visits(lines, printer)
            lines.add(f"row_head = b * {self.plan.spec.heads} + h")
            with lines.block("for n in range(partial + full):"):
                self._turn(lines, partial, full)
                sizes = " + ".join(f"{x}_desc.block_type.nbytes" for x in ("q", "dout", "row_lse", "delta"))
                lines.add(
                    "ready = rows_ready.index(stage)",
                    f"mbarrier.wait(rows_free.index(stage), ({self.turn} // STAGES) & 1 ^ 1)",
                    f"mbarrier.expect(ready, {sizes})",
                )
                for x, smem, at in (
                    ("q", "q", "[b, h, q_tile * BLOCK_Q, 0]"),
                    ("row_lse", "lse", "[row_head, q_tile * BLOCK_Q]"),
                    ("dout", "dout", "[b, h, q_tile * BLOCK_Q, 0]"),
                    ("delta", "delta", "[row_head, q_tile * BLOCK_Q]"),
                ):
                    lines.add(f"tma.async_copy_global_to_shared({x}_desc, {at}, ready, {smem}_smem.index(stage))")
        return lines.text()

    def _consumer(self) -> str:
        plan, lines = self.plan, Lines(indent=1)
        printer = self._start(lines)
        lines.add(
            "LOG2_E: gl.constexpr = 1.4426950408889634",
            "KEYS: gl.constexpr = BLOCK_K // 2",
            "# Of the tile's dq a warpgroup makes half.",
            f"ROWS: gl.constexpr = BLOCK_Q{' // 2' if self.of_rows else ''}",
            f"COLUMNS: gl.constexpr = DIM{'' if self.of_rows else ' // 2'}",
            "PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])",
            "OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])",
            "DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])",
            "LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)",
            "ROW: gl.constexpr = gl.SliceLayout(0, PAIRS)",
            "# The bits of a row's place in its tile that tell threads apart.",
            "LANE: gl.constexpr = 6",
            "dtype: gl.constexpr = k_desc.dtype",
            "",
            "k_pos = k_tile * BLOCK_K + part * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, PAIRS))",
            "k_pos = gl.expand_dims(k_pos, 1)",
            "zeros = gl.zeros([KEYS, BLOCK_Q], gl.float32, PAIRS)",
            "no_dq = gl.zeros([ROWS, COLUMNS], gl.float32, DQ)",
            "dk = gl.zeros([KEYS, DIM], gl.float32, OUT)",
            "dv = gl.zeros([KEYS, DIM], gl.float32, OUT)",
            "keys = k_smem.index(part).reshape([KEYS, DIM])",
            "values = v_smem.index(part).reshape([KEYS, DIM])",
        )
        if not self.scale_per_head:
            self._scale(lines, printer)
        lines.add("mbarrier.wait(keys_ready, 0)")
        with self._heads(lines):
            if self.scale_per_head:
                self._scale(lines, printer)
            partial, full = self._visits(lines, printer)
            lines.add(
                "# Keys that do not exist are masked whatever the tile: what they weigh may be infinite.",
                "masked = gl.where(k_tile * BLOCK_K + BLOCK_K > k_len, partial + full, partial)",
            )
            printer.hoist(
                lines,
                [e for e in (self.mask, plan.score, self.slope) if e is not None],
                ("q", "s", "in_tile", "tile_first"),
                "column_",
            )
            lines.add("", "# The first tile's scores; those of the next are multiplied at the end of each turn.")
            self._scores(lines, "0", "partial + full > 0")
            lines.add("scores = warpgroup_mma_wait(0, deps=[next_scores])")
            if span := plan.program.span:
                lines.add(f"# [{span}]")
            with lines.block("for n in range(partial + full):"):
                self._tile(lines, printer.within(printer.names.inner()), partial, full)
        scaled = "dk" if self.scale_per_head else "(dk * scale)"
        lines.add(
            "",
            "# The keys' own part of v's shared memory is free now: dv leaves through it, and then dk.",
            "at = [b, g, k_tile * BLOCK_K + part * KEYS, 0]",
            "values.store(dv.to(dtype))",
            "fence_async_shared()",
            "tma.async_copy_shared_to_global(dv_desc, at, v_smem.index(part))",
            "tma.store_wait(0)",
            f"values.store({scaled}.to(dtype))",
            "fence_async_shared()",
            "tma.async_copy_shared_to_global(dk_desc, at, v_smem.index(part))",
            "tma.store_wait(0)",
        )
        return lines.text()

    def _scale(self, lines: Lines, printer: Printer) -> None:
        if self.plan.scale is not None:
            lines.add(f"scale = {printer.text(self.plan.scale)}")
        if self.plan.score is None:
            lines.add("factor = scale * LOG2_E")

    def _scores(self, lines: Lines, n: str, exists: str) -> None:
        """The product for the scores of the tile of turn n, begun where it is there: others are not looked at."""
        turn = n if self.group == 1 else f"done + {n}" if n != "0" else "done"
        turn = f"({turn})" if " " in turn else turn
        lines.add(
            f"coming = {turn} % STAGES",
            f"mbarrier.wait(rows_ready.index(coming), ({turn} // STAGES) & 1, pred={exists})",
            "next_q = q_smem.index(coming).reshape([BLOCK_Q, DIM])",
            "next_scores = warpgroup_mma(keys, next_q.permute((1, 0)), zeros, use_acc=False, is_async=True)",
        )

    def _tile(self, lines: Lines, printer: Printer, partial: Visits | None, full: Visits | None) -> None:
        """One tile of pairs, whose scores are known: what it adds to dk, dv and dq."""
        self._turn(lines, partial, full)
        lines.add(
            "q = q_smem.index(stage).reshape([BLOCK_Q, DIM])",
            "dout = dout_smem.index(stage).reshape([BLOCK_Q, DIM])",
            "d_weights = warpgroup_mma(values, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)",
            "lse = gl.expand_dims(lse_smem.index(stage).reshape([BLOCK_Q]).load(ROW), 0)",
        )
        self._weights(lines, printer)
        lines.add(
            "left = gl.convert_layout(weights.to(dtype), LEFT)",
            "next_dv = warpgroup_mma(left, dout, dv, is_async=True)",
            "d_weights = warpgroup_mma_wait(1, deps=[d_weights])",
            "delta = gl.expand_dims(delta_smem.index(stage).reshape([BLOCK_Q]).load(ROW), 0)",
            "d_scores = weights * (d_weights - delta)",
        )
        if self.slope is not None:
            # 0 where d_scores is, even where the derivative is infinite or not a number.
            slope = printer.text(self.slope, Level.UNARY)
            lines.add(f"d_scores = gl.where(d_scores != 0.0, d_scores * {slope}, 0.0)")
        if self.scale_per_head:
            lines.add("d_scores = d_scores * scale")
        scaled = "" if self.scale_per_head else " * scale"
        of_columns, of_rows = ".slice(part * COLUMNS, COLUMNS, dim=1)", ".slice(part * ROWS, ROWS, dim=1)"
        own_rows, own_columns = (" + part * ROWS", "0") if self.of_rows else ("", "part * COLUMNS")
        lines.add(
            "d_scores = d_scores.to(dtype)",
            "left = gl.convert_layout(d_scores, LEFT)",
            "# Both halves of the keys' d_scores, for dq. Of two buffers one is written while the other may be read.",
            f"buffer = {self.turn} % 2 * 2",
            "pairs_smem.index(buffer + part).store(d_scores)",
            "fence_async_shared()",
            "mbarrier.arrive(pairs_ready, count=1)",
            f"mbarrier.wait(pairs_ready, {self.turn} & 1)",
            "dq = no_dq",
            "for half in gl.static_range(2):",
            f"    columns = k_smem.index(half).reshape([KEYS, DIM]){'' if self.of_rows else of_columns}",
            f"    pairs = pairs_smem.index(buffer + half){of_rows if self.of_rows else ''}.permute((1, 0))",
            "    dq = warpgroup_mma(pairs, columns, dq, use_acc=half > 0, is_async=True)",
            "# dq leaves beside the product for dk, its columns in the order in which each thread has four in a row.",
            "next_dk = warpgroup_mma(left, q, dk, is_async=True)",
            "dv, dq = warpgroup_mma_wait(1, deps=[next_dv, dq])",
            "tma.store_wait(0)",
            f"dq = dq.reshape([ROWS, COLUMNS // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)){scaled}",
            "dq_smem.index(part).reshape([ROWS, COLUMNS]).store(dq.reshape([ROWS, COLUMNS]))",
            "fence_async_shared()",
            f"add_shared_to_global(dq_desc, [b, h, q_tile * BLOCK_Q{own_rows}, {own_columns}], dq_smem.index(part))",
        )
        self._scores(lines, "n + 1", "n + 1 < partial + full")
        lines.add(
            "dk = warpgroup_mma_wait(1, deps=[next_dk])",
            "mbarrier.arrive(rows_free.index(stage), count=1)",
            "scores = warpgroup_mma_wait(0, deps=[next_scores])",
        )

    def _weights(self, lines: Lines, printer: Printer) -> None:
        """`weights` of the tile's pairs, 0 where they are not allowed."""
        plan = self.plan
        everywhere = [e for e in (plan.score, self.slope) if e is not None]
        q_pos = ["q_pos = q_first + q_place", "q_rows = q_pos - start"]
        if self.reads_rows:
            q_pos.append("q_index = gl.minimum(q_rows, rows - 1)")
        if everywhere:
            lines.add(*_PLACES, *q_pos)
        if plan.score is not None:
            lines.add("scores = scores * scale")
        printer.names.known[Var("s")] = "scores"
        printer.share(lines, everywhere, "pair_")
        if plan.score is None:
            lines.add("weights = gl.exp2(scores * factor - lse)")
        else:
            whole = "" if reads(plan.score, "s") else " + zeros"
            lines.add(
                f"weights = gl.exp2({printer.text(plan.score, Level.TERM)} * LOG2_E - lse{whole})",
                "# A score of a row that does not exist may be anything.",
                "weights = gl.where(q_rows < rows, weights, 0.0)",
            )
        if self.mask is not None:
            with lines.block("if n < masked:"):
                if not everywhere:
                    lines.add(*_PLACES, *(q_pos if reads(self.mask, "q") else []))
                inner = printer.within(printer.names.inner())
                inner.names.known |= {IN_TILE: "q_place", TILE_FIRST: "q_first"}
                inner.share(lines, [self.mask], "pair_")
                lines.add(f"weights = gl.where({inner.text(self.mask)}, weights, 0.0)")

    def _kernel(self, takes: dict[str, list[str]]) -> str:
        lines, spec = Lines(indent=1), self.plan.spec
        half = "BLOCK_Q // 2, DIM" if self.of_rows else "BLOCK_Q, DIM // 2"
        leave_to_another(lines, Printer(GLUON, Names(Leaves(self.plan)), self.helpers), self.plan)
        self._constants(lines)
        heavy_first(lines, "gl", "k_tiles = gl.cdiv(k_len, BLOCK_K)")
        lines.add(
            f"b = head // {spec.kv_heads}",
            f"g = head % {spec.kv_heads}",
            "",
            "q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_Q, DIM], q_desc.layout)",
            "dout_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_Q, DIM], dout_desc.layout)",
            "lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], row_lse_desc.layout)",
            "delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], delta_desc.layout)",
            "k_smem = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 1, BLOCK_K // 2, DIM], k_desc.layout)",
            "v_smem = gl.allocate_shared_memory(v_desc.dtype, [2, 1, 1, BLOCK_K // 2, DIM], v_desc.layout)",
            "PAIRS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K // 2, BLOCK_Q], q_desc.dtype)",
            "pairs_smem = gl.allocate_shared_memory(q_desc.dtype, [4, BLOCK_K // 2, BLOCK_Q], PAIRS)",
            f"dq_smem = gl.allocate_shared_memory(gl.float32, [2, 1, 1, {half}], dq_desc.layout)",
        )
        lines.add(
            *barriers(("keys_ready", "pairs_ready"), stages=False),
            *barriers(("rows_ready", "rows_free"), stages=True),
            "mbarrier.init(keys_ready, count=1)",
            "mbarrier.init(pairs_ready, count=2)",
            "for stage in gl.static_range(STAGES):",
            "    mbarrier.init(rows_ready.index(stage), count=1)",
            "    mbarrier.init(rows_free.index(stage), count=2)",
            *specialized("attend_keys", takes["attend_keys"], "load_tiles", takes["load_tiles"]),
        )
        return lines.text()
