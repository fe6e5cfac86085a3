"""Backward kernels in portable Triton for learnable inputs that q and k read together: bias tables.

They follow `attention_dq`, whose delta they read, and compute the gradient of the logits once more. Each program owns
the sums that it writes, so there are no atomics and two runs agree to the bit.

- `attention_diagonals` serves indices that follow q - k alone. A program owns a diagonal of square tiles, those with
  q_tile - k_tile = diagonal: their pairs lie alike, so it adds the tiles up as they are, and the 2 * BLOCK - 1
  diagonals of the sum at the end.
- `attention_pairs` serves one read with any other index. A program owns a tile of pairs in those batch entries and
  heads that the index follows, and adds up the others (or a portion of them).
"""

from __future__ import annotations

from attndsl.codegen.backward_kernel import BackwardKernel
from attndsl.codegen.kernel import FULL, PARTIAL
from attndsl.codegen.kernel_loops import Visits, run_loop
from attndsl.codegen.leaves import Leaves
from attndsl.codegen.scalars import Names, Printer
from attndsl.learned import Learned, Over, Owned, on_diagonal
from attndsl.plan import BackwardPlan, run_scalars
from attndsl.program import Scalar, Var, reads

DIAGONALS = "attention_diagonals"
PAIRS = "attention_pairs"


def diagonals_source(plan: BackwardPlan) -> str:
    """Text of a Python file whose `attention_diagonals` sums all reads that follow q - k. The plan is of diagonals."""
    return _Diagonals(plan).source()


def pairs_sources(plan: BackwardPlan) -> dict[int, str]:
    """Texts of Python files whose `attention_pairs` sums the n-th read, for each that needs it."""
    return {n: _Pairs(plan, n).source() for n, x in enumerate(plan.learned) if x.over is Over.PAIRS}


class _Learning(BackwardKernel):
    """A tile of pairs as both kernels add it up."""

    def pairs(self, masked: bool) -> list[Scalar]:
        # Nothing flows on to queries and keys here, and `weights` are their own logits.
        found = (self.plan.mask if masked else None, self.plan.score)
        return [e for e in (*found, *(x.slope for _, x in self.from_pairs)) if e is not None]

    def head(self) -> None:
        """What is the same for all tiles of a batch entry's head."""
        self.lines.add(*(self.base(x, head) for x, head in (("q", "h"), ("k", "g"), ("v", "g"), ("dout", "h"))))
        if self.softmax:
            self.lines.add(f"row_head = b * {self.plan.spec.heads} + h")
        self.scale(folded=False)
        if self.folded:
            self.lines.add("factor = scale * LOG2_E")

    def place_tile(self) -> None:
        """The positions of a tile's rows and keys."""
        self.lines.add(
            "q_rows = q_tile * BLOCK_Q + q_offset",
            "q_pos = start + q_rows[:, None]",
            "k_pos = k_tile * BLOCK_K + k_offset[None, :]",
        )
        if self.reads_rows:
            self.lines.add("q_index = tl.minimum(q_rows, rows - 1)[:, None]")

    def tile(self, masked: bool) -> None:
        spec, lines = self.plan.spec, self.lines
        printer = self.printer.within(self.printer.names.inner())
        self.keep()
        if self.folded or any(reads(e, "s") for e in self.pairs(masked)):
            self.load("q", self.q_parts, spec.dim, "q", "h", bounded=True)
            self.load("k", self.q_parts, spec.dim, "k", "g", bounded=masked)
        self.load("dout", self.v_parts, spec.v_dim, "q", "h", bounded=True)
        self.load("v", self.v_parts, spec.v_dim, "k", "g", bounded=masked)
        if self.softmax:
            self.load_row("lse", "row_lse", 'float("inf")')
            self.load_row("delta", "delta", "0.0")
        self.scores("q{}", "tl.trans(k{})")
        if self.softmax:
            self.probabilities(printer, masked, "[BLOCK_Q, BLOCK_K]", existing=True)
        else:
            printer.names.known[Var("s")] = "scores"
            printer.share(lines, self.pairs(masked), "pair_")
        lines.add("d_weights = " + self.dots(self.v_parts, "dout{}", "tl.trans(v{})"))
        self.drop()
        self.logit_gradient(printer, masked, existing=True)
        self.learn(printer)

    def learn(self, printer: Printer) -> None:
        for n, x in self.from_pairs:
            self.lines.add(f"sum_{n} += {self.passed_on(x.slope, printer)}")


class _Diagonals(_Learning):
    def __init__(self, plan: BackwardPlan) -> None:
        super().__init__(plan, DIAGONALS, "q k v dout", "[:, None]", (Over.DIAGONALS,))

    def source(self) -> str:
        plan, lines, spec = self.plan, self.lines, self.plan.spec
        self.constants()
        lines.add(
            "",
            "# Which diagonal of tiles of which head: the tiles with q_tile - k_tile = diagonal.",
            "diagonals = tl.cdiv(rows, BLOCK_Q) + tl.cdiv(k_len, BLOCK_K) - 1",
            "head = tl.program_id(0) // diagonals",
            "diagonal = tl.program_id(0) % diagonals - (tl.cdiv(k_len, BLOCK_K) - 1)",
            f"b = head // {spec.heads}",
            f"h = head % {spec.heads}",
            f"g = h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "g = h",
            self.start,
            "",
            "q_offset = tl.arange(0, BLOCK_Q)",
            "k_offset = tl.arange(0, BLOCK_K)",
        )
        lines.add(*(f"sum_{n} = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)" for n, _ in self.learned))
        self.seed()
        self.head()
        self.printer.hoist(lines, self.pairs(masked=bool(plan.runs.partial)), ("q", "k", "s"), "head_")
        lines.add("")
        self.name_ends(plan.runs.full + plan.runs.partial)
        for found, label, comment in ((plan.runs.full, "full", FULL), (plan.runs.partial, "partial", PARTIAL)):
            if found:
                lines.add(f"# {comment}{self.origin}")
                with run_loop(lines, self.printer, found, label, "q_tile"):
                    lines.add("k_tile = q_tile - diagonal")
                    self.place_tile()
                    self.tile(masked=label == "partial")
        lines.add(
            "",
            "# Sums of the pairs (i, j) of a tile with i - j = c - (BLOCK_K - 1): one half of the columns c at a time.",
        )
        with lines.block("for half in tl.static_range(2):"):
            lines.add(
                "column = half * BLOCK_K + k_offset",
                "j = q_offset[:, None] + BLOCK_K - 1 - column[None, :]",
                "inside = (j >= 0) & (j < BLOCK_K)",
                "j = tl.where(inside, j, 0)",
                "sum_at = tl.program_id(0).to(tl.int64) * (2 * BLOCK_K) + column",
                "q_minus_k = start + diagonal * BLOCK_K + column - (BLOCK_K - 1)",
            )
            for n, x in self.learned:
                self._write_sum(n, x)
        return self.file("gradients of inputs read at q - k, portable Triton")

    def _write_sum(self, n: int, x: Learned) -> None:
        """Sum a tile along its diagonals, and write which entry each belongs to."""
        printer = self.printer.within(Names(Leaves(self.plan), {Var("q"): "q_minus_k"}))
        read = on_diagonal(x.read)
        assert read is not None
        self.lines.add(
            f"along = tl.where(inside, tl.gather(sum_{n}, j, 1), 0.0)",
            f"tl.store(sum_{n}_ptr + sum_at, tl.sum(along, 0))",
            f"tl.store(at_{n}_ptr + sum_at, {Leaves(self.plan).flat(read, printer)} + tl.zeros_like(sum_at))",
        )


class _Pairs(_Learning):
    def __init__(self, plan: BackwardPlan, n: int) -> None:
        super().__init__(plan, PAIRS, "q k v dout", "[:, None]", (Over.PAIRS,))
        self.n = n
        self.read = plan.learned[n]
        self.learned = self.from_pairs = [(n, self.read)]
        self.owned = Owned.of(self.read.read, run_scalars(plan.runs))
        self.group = plan.spec.heads // plan.spec.kv_heads

    def _candidates(self) -> list[str]:
        own = ("first_cell", "cells", "all_cells", "visits", "portions", "batch", "stride_portion")
        return [*super()._candidates(), *own]

    def source(self) -> str:
        plan, lines, n = self.plan, self.lines, self.n
        self.constants()
        lines.add(
            "",
            "# A cell is a tile of pairs that some rows may visit; a portion, a share of those whose sums go together.",
            "# Past the last cell of all, the last one is summed again, to no use.",
            "cell = tl.minimum(first_cell + tl.program_id(0) % cells, all_cells - 1)",
            "portion = tl.program_id(0) // cells",
            "visit = cell % visits",
            "q_tiles = tl.cdiv(rows, BLOCK_Q)",
            "q_tile = (cell // visits) % q_tiles",
            "owner = cell // (visits * q_tiles)",
        )
        self._own()
        lines.add(
            self.start,
            "q_first = start + q_tile * BLOCK_Q",
            "",
            "q_offset = tl.arange(0, BLOCK_Q)",
            "k_offset = tl.arange(0, BLOCK_K)",
            "",
            f"# The tile that the rows visit in this place, the full ones first.{self.origin}",
        )
        self.know_tile_start()
        self._visit()
        self.place_tile()
        lines.add(f"sum_{n} = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)")
        self.seed()
        sharers = self._sharers()
        lines.add(
            "",
            "# Those that share the sums, one after another: one order.",
            f"sharers = {sharers}",
            "first_sharer = portion * sharers // portions",
            "end_sharer = (portion + 1) * sharers // portions",
        )
        with lines.block("for i in range(tl.where(visited, end_sharer - first_sharer, 0)):"):
            lines.add("sharer = first_sharer + i")
            self._share()
            self.head()
            self.tile(masked=bool(plan.runs.partial))
        lines.add("")
        if self.owned.takes_each_entry_once(self.read.read, plan.program.input(self.read.read.input)):
            lines.add(
                f"at = {Leaves(plan).flat(self.read.read, self.fresh())}",
                "exists = (q_rows[:, None] < tl.where(visited, rows, 0)) & (k_pos < k_len)",
                f"tl.store(sum_{n}_ptr + portion.to(tl.int64) * stride_portion + at, sum_{n}, mask=exists)",
            )
        else:
            lines.add(
                "pair = q_offset[:, None] * BLOCK_K + k_offset[None, :]",
                f"at = {Leaves(plan).flat(self.read.read, self.fresh())} + tl.zeros_like(pair)",
                f"tl.store(sum_{n}_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_Q * BLOCK_K) + pair, sum_{n})",
                "here = (tl.program_id(0) % cells).to(tl.int64) * (BLOCK_Q * BLOCK_K)",
                f"tl.store(at_{n}_ptr + here + pair, at, mask=(pair >= 0) & (portion == 0))",
            )
        return self.file(f"gradient of `{self.read.read.input}`, portable Triton")

    def _own(self) -> None:
        """The batch entry and head that a program owns."""
        owned, spec = self.owned, self.plan.spec
        count = {"h": spec.heads, "g": spec.kv_heads, "": 1}[owned.head]
        if owned.batch:
            self.lines.add(f"b = owner // {count}" if count > 1 else "b = owner")
        if owned.head:
            self.lines.add(f"{owned.head} = owner % {count}" if owned.batch else f"{owned.head} = owner")
        if owned.head == "h":
            self._group_of_head()

    def _group_of_head(self) -> None:
        self.lines.add(f"g = h // {self.group}" if self.group > 1 else "g = h")

    def _shared_heads(self) -> int:
        return {"h": 1, "g": self.group, "": self.plan.spec.heads}[self.owned.head]

    def _sharers(self) -> str:
        """How many batch entries and heads share the sums."""
        heads = self._shared_heads()
        if self.owned.batch:
            return str(heads)
        return f"batch * {heads}" if heads > 1 else "batch"

    def _share(self) -> None:
        """The batch entry and head of a sharer."""
        heads, lines = self._shared_heads(), self.lines
        if not self.owned.batch:
            lines.add(f"b = sharer // {heads}" if heads > 1 else "b = sharer")
        member = "sharer" if self.owned.batch else f"sharer % {heads}"
        match self.owned.head:
            case "g":
                lines.add(f"h = g * {self.group} + {member}" if heads > 1 else "h = g")
            case "":
                lines.add(f"h = {member}" if heads > 1 else "h = tl.zeros_like(sharer)")
                self._group_of_head()
            case _:
                pass

    def _visit(self) -> None:
        """`k_tile`, and whether there is one."""
        lines, runs = self.lines, self.plan.runs
        self.name_ends(runs.full + runs.partial)
        full = Visits(lines, self.printer, runs.full, "full") if runs.full else None
        partial = Visits(lines, self.printer, runs.partial, "partial") if runs.partial else None
        if full and partial:
            lines.add(
                f"visited = visit < {full.total} + {partial.total}",
                f"full_tile = {full.tile('visit')}",
                f"partial_tile = {partial.tile(f'(visit - {full.total})')}",
                f"k_tile = tl.where(visited, tl.where(visit < {full.total}, full_tile, partial_tile), 0)",
            )
        else:
            one = full or partial
            assert one is not None, "a pattern that visits no tile has no such kernel"
            lines.add(f"visited = visit < {one.total}", f"k_tile = tl.where(visited, {one.tile('visit')}, 0)")
