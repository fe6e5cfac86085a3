"""The forward kernel for Hopper in Gluon: one warp loads, two warpgroups of consumers compute.

The same plan as the portable kernel: the same runs, mask, scores and sinks, printed by the same printer. The
producer streams tiles of k and v through shared memory by hardware tensor copies; each consumer owns half of the
query tile's rows, and multiplies the scores of one tile while the values of the tile before are multiplied too.
"""

from __future__ import annotations

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
from attndsl.codegen.header import header
from attndsl.codegen.kernel import Leaves, scalar_parameters, used_parameters
from attndsl.codegen.kernel_loops import Visits
from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import GLUON, Names, Printer
from attndsl.plan import ForwardPlan
from attndsl.program import Axis, Binary, Const, Scalar, Var, reads

KERNEL = "attention_forward"
_STAGED = ("k_ready", "k_free", "v_ready", "v_free")


def forward_source(plan: ForwardPlan) -> str:
    """Text of a Python file whose `attention_forward` is the plan's kernel for Hopper."""
    return _Forward(plan).source()


class _Forward:
    def __init__(self, plan: ForwardPlan) -> None:
        self.plan = plan
        self.helpers: set[str] = set()
        # With no score expression the scale goes into the exponent: one multiply-add per pair.
        self.folded = plan.score is None and plan.positive_scale
        self.mask = None if plan.mask is None else by_place(plan.mask, "k")
        self.uniform = [*(["scale"] if plan.scale is None else []), "rows", "k_len", *scalar_parameters(plan)]

    def source(self) -> str:
        producer, consumer = self._producer(), self._consumer()
        shared = ["q_smem", "k_smem", "v_smem", "q_ready", *_STAGED]
        where = ["b", "h", "g", "head", "q_tile"]
        candidates = ["q_desc", "k_desc", "v_desc", "out_desc", "lse_ptr", *shared, *where, *self.uniform]
        takes = {
            "load_tiles": used_parameters(candidates, producer),
            "attend_rows": used_parameters(candidates, consumer),
        }
        kernel = self._kernel(takes)
        entry = used_parameters(["q_desc", "k_desc", "v_desc", "out_desc", "lse_ptr", *self.uniform], kernel)
        return "".join(
            (
                header(self.plan, "forward kernel, Gluon for Hopper"),
                IMPORTS,
                helper_functions(self.helpers),
                device_function("load_tiles", takes["load_tiles"], producer),
                "\n\n",
                device_function("attend_rows", [PART, *takes["attend_rows"]], consumer),
                "\n\n",
                device_function(KERNEL, entry, kernel),
            )
        )

    # --------------------------------------------------------------------------------- the parts

    def _constants(self, lines: Lines) -> None:
        tiling = self.plan.tiling
        lines.add(
            f"BLOCK_Q: gl.constexpr = {tiling.block_q}",
            f"BLOCK_K: gl.constexpr = {tiling.block_k}",
            f"STAGES: gl.constexpr = {tiling.stages}",
        )

    def _visits(self, lines: Lines, printer: Printer) -> tuple[Visits | None, Visits | None]:
        """The query tile's position, and the tiles it visits: partial ones first."""
        plan = self.plan
        lines.add(
            "start = 0" if plan.program.align_start else "start = k_len - rows",
            "q_first = start + q_tile * BLOCK_Q",
        )
        first: Scalar = Binary("*", Const(plan.tiling.block_q), Var("q_tile"))
        printer.names.known[first if plan.program.align_start else Binary("+", Var("start"), first)] = "q_first"
        runs = plan.runs
        printer.share(lines, [x for run in runs.full + runs.partial for x in (run.first, run.count)], "tile_")
        partial = Visits(lines, printer, runs.partial, "partial") if runs.partial else None
        full = Visits(lines, printer, runs.full, "full") if runs.full else None
        lines.add(f"partial = {count_of(partial)}", f"full = {count_of(full)}")
        lines.add(
            "# A row block that visits nothing visits one tile all the same, and masks it.",
            "partial = gl.where(partial + full == 0, 1, partial)",
        )
        return partial, full

    def _tile(self, visits: Visits | None, i: str) -> str:
        """The tile of iteration i. Where a row block visits nothing the ends of runs may lie before the first tile."""
        return f"gl.maximum({visits.tile(i)}, 0)" if visits is not None else "0"

    def _printer(self) -> Printer:
        return Printer(GLUON, Names(Leaves(self.plan)), self.helpers)

    def _producer(self) -> str:
        lines, printer = Lines(indent=1), self._printer()
        self._constants(lines)
        lines.add(
            "mbarrier.expect(q_ready, 2 * q_desc.block_type.nbytes)",
            "for half in gl.static_range(2):",
            "    row = q_tile * BLOCK_Q + half * (BLOCK_Q // 2)",
            "    tma.async_copy_global_to_shared(q_desc, [b, h, row, 0], q_ready, q_smem.index(half))",
        )
        partial, full = self._visits(lines, printer)
        with lines.block("for n in range(partial + full):"):
            lines.add(
                f"k_tile = {self._visited(partial, full, 'n')}",
                "stage = n % STAGES",
                "phase = (n // STAGES) & 1",
            )
            for x in "kv":
                lines.add(
                    f"mbarrier.wait({x}_free.index(stage), phase ^ 1)",
                    f"mbarrier.expect({x}_ready.index(stage), {x}_desc.block_type.nbytes)",
                    f"tma.async_copy_global_to_shared({x}_desc, [b, g, k_tile * BLOCK_K, 0], {x}_ready.index(stage), "
                    f"{x}_smem.index(stage))",
                )
        return lines.text()

    def _consumer(self) -> str:
        plan, lines, printer = self.plan, Lines(indent=1), self._printer()
        self._constants(lines)
        partial, full = self._visits(lines, printer)
        dim = plan.spec.dim
        lines.add(
            "LOG2_E: gl.constexpr = 1.4426950408889634",
            "ROWS: gl.constexpr = BLOCK_Q // 2",
            f"DIM: gl.constexpr = {dim}",
            "SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])",
            "OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])",
            "WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)",
            "dtype: gl.constexpr = q_desc.dtype",
            "",
            "q_rows = q_tile * BLOCK_Q + part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))",
            "k_offset = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, SCORES)), 0)",
            "q_pos = gl.expand_dims(start + q_rows, 1)",
        )
        if any(d.axis is Axis.Q and d.block == 1 for decl in plan.inputs for d in decl.dims):
            lines.add("q_index = gl.expand_dims(gl.minimum(q_rows, rows - 1), 1)")
        scale = "scale" if plan.scale is None else printer.text(plan.scale)
        if self.folded:
            lines.add(f"factor = {scale} * LOG2_E")
        elif plan.scale is not None:
            lines.add(f"scale = {scale}")
        pairs = [e for e in (self.mask, plan.score) if e is not None]
        printer.hoist(lines, pairs, ("k", "s", "in_tile", "tile_first"), "row_")
        scaled = " * factor" if self.folded else ""
        lines.add(
            "visits = partial + full",
            "",
            "# The first tile: scores alone. From then on a tile's scores go with the values of the tile before.",
            "q = q_smem.index(part).reshape([ROWS, DIM])",
            "zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)",
            "mbarrier.wait(q_ready, 0)",
            "mbarrier.wait(k_ready.index(0), 0)",
            "keys = k_smem.index(0).reshape([BLOCK_K, DIM]).permute((1, 0))",
            "scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)",
            "scores = warpgroup_mma_wait(0, deps=[scores])",
            "mbarrier.arrive(k_free.index(0), count=1)",
        )
        self._score(lines, printer, partial, full, "0")
        lines.add(
            "# Finite, so that rows that see nothing yet need no care: exp2(-inf - row_max) is 0.",
            f"row_max = gl.maximum(gl.max(scores, 1){scaled}, -1.0e38)",
            f"scores = gl.exp2(scores{scaled} - gl.expand_dims(row_max, 1))",
            "row_sum = gl.sum(scores, 1)",
            "acc = gl.zeros([ROWS, DIM], gl.float32, OUT)",
            "mbarrier.wait(v_ready.index(0), 0)",
            "mbarrier.wait(k_ready.index(1 % STAGES), 1 // STAGES, pred=visits > 1)",
            "",
        )
        if self._origin:
            lines.add(f"# {self._origin}")
        with lines.block("for n in range(1, visits):"):
            lines.add(
                "stage = n % STAGES",
                "before = (n - 1) % STAGES",
                "weights = gl.convert_layout(scores.to(dtype), WEIGHTS)",
                "keys = k_smem.index(stage).reshape([BLOCK_K, DIM]).permute((1, 0))",
                "scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)",
                "values = v_smem.index(before).reshape([BLOCK_K, DIM])",
                "next_acc = warpgroup_mma(weights, values, acc, is_async=True)",
                "scores = warpgroup_mma_wait(1, deps=[scores])",
            )
            self._score(lines, printer, partial, full, "n")
            lines.add(
                f"new_max = gl.maximum(row_max, gl.max(scores, 1){scaled})",
                f"scores = gl.exp2(scores{scaled} - gl.expand_dims(new_max, 1))",
                "decay = gl.exp2(row_max - new_max)",
                "row_sum = row_sum * decay + gl.sum(scores, 1)",
                "row_max = new_max",
                "# What the next turn multiplies is waited for here: nothing is moved across such a wait, so that",
                "# the softmax stays beside the products of values.",
                "mbarrier.wait(v_ready.index(stage), (n // STAGES) & 1)",
                "mbarrier.wait(k_ready.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=n + 1 < visits)",
                "acc = warpgroup_mma_wait(0, deps=[next_acc])",
                "mbarrier.arrive(v_free.index(before), count=1)",
                "mbarrier.arrive(k_free.index(stage), count=1)",
                "acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, OUT)), 1)",
            )
        lines.add(
            "",
            "# The last tile's values.",
            "weights = gl.convert_layout(scores.to(dtype), WEIGHTS)",
            "values = v_smem.index((visits - 1) % STAGES).reshape([BLOCK_K, DIM])",
            "acc = warpgroup_mma(weights, values, acc, is_async=True)",
            "acc = warpgroup_mma_wait(0, deps=[acc])",
        )
        self._finish(lines, printer)
        return lines.text()

    @property
    def _origin(self) -> str:
        span = self.plan.program.span
        return f"[{span}]" if span else ""

    def _score(self, lines: Lines, printer: Printer, partial: Visits | None, full: Visits | None, n: str) -> None:
        """`scores` = q . k of visited tile n made logits (times log2 e unless folded), masked in a partial tile."""
        plan, printer = self.plan, printer.within(printer.names.inner())
        if not self.folded:
            lines.add("scores = scores * scale")
            printer.names.known[Var("s")] = "scores"
        whole_tile = plan.score is not None and reads(plan.score, "k")
        if whole_tile:
            lines.add(f"k_first = {self._visited(partial, full, n)} * BLOCK_K", "k_pos = k_first + k_offset")
        if plan.score is not None:
            printer.share(lines, [plan.score], "pair_")
            whole = "" if reads(plan.score, "s") else " + zeros"
            lines.add(f"scores = ({printer.text(plan.score)}) * LOG2_E{whole}")
        elif not self.folded:
            lines.add("scores = scores * LOG2_E")
        if self.mask is None:
            return
        with lines.block("if partial > 0:" if n == "0" else f"if {n} < partial:"):
            if not whole_tile:
                lines.add(f"k_first = {self._tile(partial, n)} * BLOCK_K")
                if reads(self.mask, "k"):
                    lines.add("k_pos = k_first + k_offset")
            printer.names.known |= {IN_TILE: "k_offset", TILE_FIRST: "k_first"}
            printer.share(lines, [self.mask], "pair_")
            lines.add(f'scores = gl.where({printer.text(self.mask)}, scores, float("-inf"))')

    def _visited(self, partial: Visits | None, full: Visits | None, n: str) -> str:
        """The tile visited in turn n: partial ones first."""
        return f"gl.where({n} < partial, {self._tile(partial, n)}, {self._tile(full, f'({n} - partial)')})"

    def _finish(self, lines: Lines, printer: Printer) -> None:
        plan = self.plan
        if plan.sink is not None:
            lines.add("# The sink: one more key in the denominator, with no value.")
            lines.add("q_pos = start + q_rows", "q_index = gl.minimum(q_rows, rows - 1)")
            lines.add(
                f"sink = ({self._printer().text(plan.sink)}) * LOG2_E + row_sum * 0.0",
                "final_max = gl.maximum(row_max, sink)",
                "decay = gl.exp2(row_max - final_max)",
                "row_sum = row_sum * decay + gl.exp2(sink - final_max)",
                "row_max = final_max",
                "acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, OUT)), 1)",
            )
        lines.add(
            "inverse = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)",
            "acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, OUT)), 1)",
            "# The rows' own part of q's shared memory is free now: the output leaves through it.",
            "q.store(acc.to(dtype))",
            "fence_async_shared()",
            "row = q_tile * BLOCK_Q + part * ROWS",
            "tma.async_copy_shared_to_global(out_desc, [b, h, row, 0], q_smem.index(part))",
            "# Where nobody asks for lse there is no memory for it.",
            "asked = (q_rows < rows) & (lse_ptr.to(gl.int64) != 0)",
            'lse = gl.where(row_sum == 0.0, float("-inf"), (row_max + gl.log2(row_sum)) / LOG2_E)',
            "gl.store(lse_ptr + head.to(gl.int64) * rows + q_rows, lse, mask=asked)",
            "tma.store_wait(0)",
        )

    def _kernel(self, takes: dict[str, list[str]]) -> str:
        lines, spec = Lines(indent=1), self.plan.spec
        ratio = spec.heads // spec.kv_heads
        self._constants(lines)
        lines.add(
            f"DIM: gl.constexpr = {spec.dim}",
            "",
            "# Heads one after another: programs in flight share keys. A head's last rows first: they are longest.",
            "q_tiles = gl.cdiv(rows, BLOCK_Q)",
            "head = gl.program_id(0) // q_tiles",
            "q_tile = q_tiles - 1 - gl.program_id(0) % q_tiles",
            f"b = head // {spec.heads}",
            f"h = head % {spec.heads}",
            f"g = h // {ratio}" if ratio > 1 else "g = h",
            "",
            "q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BLOCK_Q // 2, DIM], q_desc.layout)",
            "k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_K, DIM], k_desc.layout)",
            "v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_K, DIM], v_desc.layout)",
        )
        lines.add(
            *barriers(("q_ready",), stages=False), *barriers(_STAGED, stages=True), "mbarrier.init(q_ready, count=1)"
        )
        with lines.block("for stage in gl.static_range(STAGES):"):
            # The producer's copy makes a tile ready; both consumers free it.
            lines.add(*(f"mbarrier.init({x}.index(stage), count={1 if 'ready' in x else 2})" for x in _STAGED))
        lines.add(*specialized("attend_rows", takes["attend_rows"], "load_tiles", takes["load_tiles"]))
        return lines.text()
