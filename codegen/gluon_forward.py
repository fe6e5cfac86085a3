"""The forward kernel for Hopper in Gluon: one warp loads, two warpgroups of consumers compute.

The same plan as the portable kernel: the same runs, mask, scores and sinks, printed by the same printer. The
producer streams tiles of k and v through shared memory by hardware tensor copies; each consumer owns half of the
query tile's rows, and multiplies the scores of one tile while the values of the tile before are multiplied too.
"""

from __future__ import annotations

from attndsl.codegen.header import header
from attndsl.codegen.kernel import Leaves, scalar_parameters, used_parameters
from attndsl.codegen.kernel_loops import Visits
from attndsl.codegen.lines import Lines
from attndsl.codegen.prelude_helpers import prelude
from attndsl.codegen.scalars import GLUON, Names, Printer
from attndsl.plan import ForwardPlan
from attndsl.program import Axis, Binary, Const, Scalar, Var, reads

KERNEL = "attention_forward"
# Registers of a thread of a consumer and of the producer; 128 of the former and a warp of the latter fill the file.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24

_IMPORTS = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


"""


def forward_source(plan: ForwardPlan) -> str:
    """Text of a Python file whose `attention_forward` is the plan's kernel for Hopper."""
    return _Forward(plan).source()


class _Forward:
    def __init__(self, plan: ForwardPlan) -> None:
        self.plan = plan
        self.helpers: set[str] = set()
        # With no score expression the scale goes into the exponent: one multiply-add per pair.
        self.folded = plan.score is None and plan.positive_scale
        self.uniform = ["scale", "rows", "k_len", *scalar_parameters(plan)]

    def source(self) -> str:
        producer, consumer = self._producer(), self._consumer()
        shared = ["q_smem", "k_smem", "v_smem", "q_ready", "k_ready", "k_free", "v_ready", "v_free"]
        where = ["b", "h", "g", "head", "q_tile"]
        candidates = ["q_desc", "k_desc", "v_desc", "out_desc", "lse_ptr", *shared, *where, *self.uniform]
        takes = {
            "load_tiles": used_parameters(candidates, producer),
            "attend_rows": used_parameters(candidates, consumer),
        }
        kernel = self._kernel(takes)
        entry = [
            name
            for name in ["q_desc", "k_desc", "v_desc", "out_desc", "lse_ptr", *self.uniform]
            if name in used_parameters([name], kernel)
        ]
        helpers = prelude("prelude.py", self.helpers).replace("@triton.jit", "@gluon.jit").replace("tl.", "gl.")
        return "".join(
            (
                header(self.plan, "forward kernel, Gluon for Hopper"),
                _IMPORTS,
                helpers + "\n\n\n" if helpers else "",
                _function("load_tiles", takes["load_tiles"], producer),
                "\n\n",
                _function("attend_rows", ["part: gl.constexpr", *takes["attend_rows"]], consumer),
                "\n\n",
                _function(KERNEL, entry, kernel),
            )
        )

    # --------------------------------------------------------------------------------- the parts

    def _opening(self, lines: Lines, printer: Printer) -> tuple[Visits | None, Visits | None]:
        """Sizes, the query tile's position, and the tiles it visits: partial ones first."""
        plan = self.plan
        lines.add(
            f"BLOCK_Q: gl.constexpr = {plan.tiling.block_q}",
            f"BLOCK_K: gl.constexpr = {plan.tiling.block_k}",
            f"STAGES: gl.constexpr = {plan.tiling.stages}",
            "start = 0" if plan.program.align_start else "start = k_len - rows",
            "q_first = start + q_tile * BLOCK_Q",
        )
        first: Scalar = Binary("*", Const(plan.tiling.block_q), Var("q_tile"))
        printer.names.known[first if plan.program.align_start else Binary("+", Var("start"), first)] = "q_first"
        runs = plan.runs
        printer.share(lines, [x for run in runs.full + runs.partial for x in (run.first, run.count)], "tile_")
        partial = Visits(lines, printer, runs.partial, "partial") if runs.partial else None
        full = Visits(lines, printer, runs.full, "full") if runs.full else None
        lines.add(f"partial = {partial.total if partial else 0}", f"full = {full.total if full else 0}")
        lines.add(
            "# A row block that visits nothing visits one tile all the same, and masks it.",
            "partial = gl.where(partial + full == 0, 1, partial)",
        )
        return partial, full

    def _tile(self, visits: Visits | None, i: str) -> str:
        return visits.tile(i) if visits is not None else "0"

    def _printer(self) -> Printer:
        return Printer(GLUON, Names(Leaves(self.plan)), self.helpers)

    def _producer(self) -> str:
        lines, printer = Lines(indent=1), self._printer()
        partial, full = self._opening(lines, printer)
        lines.add(
            "",
            "mbarrier.expect(q_ready, 2 * q_desc.block_type.nbytes)",
            "for half in gl.static_range(2):",
            "    row = q_tile * BLOCK_Q + half * (BLOCK_Q // 2)",
            "    tma.async_copy_global_to_shared(q_desc, [b, h, row, 0], q_ready, q_smem.index(half))",
        )
        with lines.block("for n in range(partial + full):"):
            lines.add("k_tile = gl.where(")
            lines.add(
                f"    n < partial, gl.maximum({self._tile(partial, 'n')}, 0), {self._tile(full, '(n - partial)')}"
            )
            lines.add(
                ")",
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
        partial, full = self._opening(lines, printer)
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
            "k_offset = gl.arange(0, BLOCK_K, gl.SliceLayout(0, SCORES))",
            "q_pos = gl.expand_dims(start + q_rows, 1)",
        )
        if any(d.axis is Axis.Q and d.block == 1 for decl in plan.inputs for d in decl.dims):
            lines.add("q_index = gl.expand_dims(gl.minimum(q_rows, rows - 1), 1)")
        scale = "scale" if plan.scale is None else printer.text(plan.scale)
        lines.add(f"factor = {scale} * LOG2_E" if self.folded else f"scale = {scale}")
        pairs = [e for e in (plan.mask, plan.score) if e is not None]
        printer.hoist(lines, pairs, ("k", "s"), "row_")
        lines.add(
            "",
            "# The first tile: scores alone. From then on a tile's scores go with the values of the tile before.",
            "q = q_smem.index(part).reshape([ROWS, DIM])",
            "mbarrier.wait(q_ready, 0)",
            "mbarrier.wait(k_ready.index(0), 0)",
            f"k_tile = gl.where(partial > 0, gl.maximum({self._tile(partial, '0')}, 0), {self._tile(full, '0')})",
            "keys = k_smem.index(0).reshape([BLOCK_K, DIM]).permute((1, 0))",
            "zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)",
            "scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)",
            "scores = warpgroup_mma_wait(0, deps=[scores])",
            "mbarrier.arrive(k_free.index(0), count=1)",
        )
        self._score(lines, printer.within(printer.names.inner()), masked=True)
        scaled = " * factor" if self.folded else ""
        lines.add(
            "# Finite, so that rows that see nothing yet need no care: exp2(-inf - row_max) is 0.",
            f"row_max = gl.maximum(gl.max(scores, 1){scaled}, -1.0e38)",
            f"weights = gl.exp2(scores{scaled} - gl.expand_dims(row_max, 1))",
            "row_sum = gl.sum(weights, 1)",
            "weights = gl.convert_layout(weights.to(dtype), WEIGHTS)",
            "acc = gl.zeros([ROWS, DIM], gl.float32, OUT)",
            "",
        )
        if plan.runs.partial:
            lines.add(f"# Partial tiles: pairs are masked.{self._origin}")
            with lines.block("for n in range(1, partial):"):
                lines.add(f"k_tile = {self._tile(partial, 'n')}")
                self._step(lines, printer, masked=True)
        if plan.runs.full:
            lines.add(f"# Full tiles: every pair is allowed.{self._origin}")
            with lines.block("for n in range(gl.maximum(partial, 1), partial + full):"):
                if plan.score is not None and reads(plan.score, "k"):
                    lines.add(f"k_tile = {self._tile(full, '(n - partial)')}")
                self._step(lines, printer, masked=False)
        lines.add(
            "",
            "# The last tile's values.",
            "last = partial + full - 1",
            "mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)",
            "values = v_smem.index(last % STAGES).reshape([BLOCK_K, DIM])",
            "acc = warpgroup_mma(weights, values, acc, is_async=True)",
            "acc = warpgroup_mma_wait(0, deps=[acc])",
        )
        self._finish(lines, printer)
        return lines.text()

    @property
    def _origin(self) -> str:
        span = self.plan.program.span
        return f"  [{span}]" if span else ""

    def _score(self, lines: Lines, printer: Printer, masked: bool) -> None:
        """`scores` = q . k made logits (times log2 e unless folded), masked in partial tiles."""
        plan = self.plan
        mask = plan.mask if masked else None
        pairs = [e for e in (mask, plan.score) if e is not None]
        if any(reads(e, "k") for e in pairs):
            lines.add("k_pos = gl.expand_dims(k_tile * BLOCK_K + k_offset, 0)")
        if not self.folded:
            lines.add("scores = scores * scale")
            printer.names.known[Var("s")] = "scores"
        printer.share(lines, pairs, "pair_")
        if plan.score is not None:
            whole = "" if reads(plan.score, "s") else " + zeros"
            lines.add(f"scores = ({printer.text(plan.score)}) * LOG2_E{whole}")
        elif not self.folded:
            lines.add("scores = scores * LOG2_E")
        if mask is not None:
            lines.add(f'scores = gl.where({printer.text(mask)}, scores, float("-inf"))')

    def _step(self, lines: Lines, printer: Printer, masked: bool) -> None:
        """Tile n's scores, and the values of tile n - 1 while their softmax runs."""
        scaled = " * factor" if self.folded else ""
        lines.add(
            "stage = n % STAGES",
            "before = (n - 1) % STAGES",
            "mbarrier.wait(k_ready.index(stage), (n // STAGES) & 1)",
            "keys = k_smem.index(stage).reshape([BLOCK_K, DIM]).permute((1, 0))",
            "zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)",
            "scores = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)",
            "mbarrier.wait(v_ready.index(before), ((n - 1) // STAGES) & 1)",
            "values = v_smem.index(before).reshape([BLOCK_K, DIM])",
            "next_acc = warpgroup_mma(weights, values, acc, is_async=True)",
            "scores = warpgroup_mma_wait(1, deps=[scores])",
            "mbarrier.arrive(k_free.index(stage), count=1)",
        )
        self._score(lines, printer.within(printer.names.inner()), masked)
        lines.add(
            f"new_max = gl.maximum(row_max, gl.max(scores, 1){scaled})",
            f"scores = gl.exp2(scores{scaled} - gl.expand_dims(new_max, 1))",
            "decay = gl.exp2(row_max - new_max)",
            "row_sum = row_sum * decay + gl.sum(scores, 1)",
            "row_max = new_max",
            "acc = warpgroup_mma_wait(0, deps=[next_acc])",
            "mbarrier.arrive(v_free.index(before), count=1)",
            "acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, OUT)), 1)",
            "weights = gl.convert_layout(scores.to(dtype), WEIGHTS)",
        )

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
            'lse = gl.where(row_sum == 0.0, float("-inf"), (row_max + gl.log2(row_sum)) / LOG2_E)',
            "gl.store(lse_ptr + head.to(gl.int64) * rows + q_rows, lse, mask=q_rows < rows)",
            "tma.store_wait(0)",
        )

    def _kernel(self, takes: dict[str, list[str]]) -> str:
        plan, lines, spec = self.plan, Lines(indent=1), self.plan.spec
        ratio = spec.heads // spec.kv_heads
        lines.add(
            f"BLOCK_Q: gl.constexpr = {plan.tiling.block_q}",
            f"BLOCK_K: gl.constexpr = {plan.tiling.block_k}",
            f"STAGES: gl.constexpr = {plan.tiling.stages}",
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
            "q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())",
        )
        barriers = ("k_ready", "k_free", "v_ready", "v_free")
        lines.add(
            *(f"{x} = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())" for x in barriers)
        )
        lines.add("mbarrier.init(q_ready, count=1)")
        with lines.block("for stage in gl.static_range(STAGES):"):
            # The producer's copy makes a tile ready; both consumers free it.
            lines.add(*(f"mbarrier.init({x}.index(stage), count={1 if 'ready' in x else 2})" for x in barriers))
        consumer, producer = ", ".join(takes["attend_rows"]), ", ".join(takes["load_tiles"])
        lines.add(
            "fence_async_shared()",
            "gl.warp_specialize(",
            "    [",
            f"        (attend_rows, (0, {consumer})),",
            f"        (attend_rows, (1, {consumer})),",
            f"        (load_tiles, ({producer})),",
            "    ],",
            "    [4, 1],",
            f"    [{CONSUMER_REGISTERS}, {PRODUCER_REGISTERS}],",
            ")",
        )
        return lines.text()


def _function(name: str, parameters: list[str], body: str) -> str:
    lines = Lines()
    lines.add("@gluon.jit")
    with lines.block(f"def {name}("):
        lines.add(*(f"{p}," for p in parameters))
    return lines.text() + "):\n" + body
