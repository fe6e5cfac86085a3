"""The kernels of an output in portable Triton: how branches combine, and what flows back to them and to gates.

A program owns a tile of rows of one head, with all channels: every branch is read once, and written once is the
output, or in the backward pass the gradient of each branch, of its lse where the output merges, and of the gates.
"""

from __future__ import annotations

from typing import assert_never

from attndsl.branches import Attended, Factor, Handed, Merged, Output, Product, Sum, factors
from attndsl.codegen.header import program_lines
from attndsl.codegen.kernel import KernelWriter, scalar_parameters, used_parameters
from attndsl.codegen.leaves import Leaves
from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import Level
from attndsl.combining import CombinePlan, Learning
from attndsl.program import Axis, Const, Read, Scalar, walk

FORWARD, BACKWARD = "combine_branches", "combine_gradients"


def combine_source(plan: CombinePlan) -> str:
    """Text of a Python file with `combine_branches` or, for a plan of gradients, `combine_gradients`.

    Outputs of branches, the output and their gradients are [B, Hq, rows, Dv] with the strides of the first, `d_out`
    with its own; each lse is dense float32 [B, Hq, rows]. For the n-th learned read `sum_n` receives gradients: of own
    entries at `sum_n_offset` + row * `sum_n_stride` (+ channel), where a row is one of [B, Hq, rows], or a tile of rows
    where the input does not follow q; of others one a row, and `at_n` the place that it belongs to.
    """
    writer = GradientsWriter(plan) if plan.gradients else CombineWriter(plan)
    writer.write()
    return writer.file(f"{'gradients of ' if plan.gradients else ''}how the branches combine, portable Triton")


class CombineWriter(KernelWriter):
    """Writes the forward kernel. Tiles are [BLOCK_Q, WIDTH]; what has no channels is a column, what has no rows a row
    or a number."""

    plan: CombinePlan

    def __init__(self, plan: CombinePlan, function: str = FORWARD) -> None:
        super().__init__(plan, function, "")
        # What is named ahead of the body, where it reads that.
        self.before: dict[str, str] = {}
        self.values: dict[int, str] = {}
        self.shares: dict[int, list[str]] = {}
        self.totals: dict[int, str] = {}

    def comment(self, title: str) -> str:
        tiling, spec = self.plan.tiling, self.plan.spec
        sizes = f"heads {spec.heads}, key heads {spec.kv_heads}, values {spec.v_dim}, {spec.dtype.value}, {spec.target}"
        return program_lines(self.plan.program, title, sizes, f"{tiling.block_q} rows a program, {tiling.warps} warps")

    def _candidates(self) -> list[str]:
        branches = self.plan.parameters(self.plan.branches)
        names = [f"{kind}_{name}_ptr" for kind in ("out", "lse", "d_out", "d_lse") for name in branches]
        names += ["out_ptr", "lse_ptr", "d_out_ptr", "d_lse_ptr"]
        names += [f"stride_{x}{axis}" for x in ("out", "d_out") for axis in "bhn"]
        for n in range(len(self.plan.learned)):
            names += [f"sum_{n}_ptr", f"sum_{n}_offset", f"sum_{n}_stride", f"at_{n}_ptr"]
        return [*names, "rows", "k_len", *scalar_parameters(self.plan)]

    def write(self) -> None:
        plan, output = self.plan, self.plan.output
        self._load(self._scalars())
        found = self.text(output, Level.COND)
        self.lines.add(f"found = {found}", "tl.store(out_ptr + at, found.to(out_ptr.dtype.element_ty), mask=exists)")
        if plan.has_lse:
            self.lines.add(f"tl.store(lse_ptr + row_at, {self.totals[id(output)]}, mask=q_rows < rows)")
        self._finish()

    # ---------------------------------------------------------------------------------- prologue

    @property
    def _exists(self) -> str:
        padded = f" & (channel < {self.plan.spec.v_dim})" if self.plan.width != self.plan.spec.v_dim else ""
        return f"(q_rows < rows){padded}"

    def _scalars(self) -> list[Scalar]:
        """What the kernel computes beside branches."""
        return list(factors(self.plan.output))

    def _load(self, scalars: list[Scalar]) -> None:
        """Read each branch once, and each entry of an input that a scalar reads."""
        for name in self.plan.parameters(self.plan.branches):
            self.before[f"out_{name}"] = f"tl.load(out_{name}_ptr + at, mask=exists, other=0.0).to(tl.float32)"
        for name in self.plan.parameters(self.plan.merges):
            self.before[f"lse_{name}"] = f"tl.load(lse_{name}_ptr + row_at, mask=q_rows < rows, other=0.0)"
        found = dict.fromkeys(x for e in scalars for x in reversed([*walk(e)]) if isinstance(x, Read))
        for n, read in enumerate(found):
            name = f"read_{read.input}_{n}"
            self.before[name] = self.printer.text(read)
            self.printer.names.known[read] = name
        self.printer.share(self.lines, scalars, "shared_")

    def _finish(self) -> None:
        """Put before what is written so far what of the rows that a program owns, and of their data, it reads."""
        spec, body, lines = self.plan.spec, self.lines, Lines(indent=1)
        lines.add(f"BLOCK_Q: tl.constexpr = {self.plan.tiling.block_q}", f"WIDTH: tl.constexpr = {self.plan.width}", "")
        named = {
            "q_tiles": "tl.cdiv(rows, BLOCK_Q)",
            "head": "tl.program_id(0) // q_tiles",
            "b": f"head // {spec.heads}",
            "h": f"head % {spec.heads}",
            "g": f"h // {spec.heads // spec.kv_heads}" if spec.heads != spec.kv_heads else "h",
            "q_rows": "tl.program_id(0) % q_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]",
            "channel": "tl.arange(0, WIDTH)[None, :]",
            "exists": self._exists,
            "q_index": "tl.minimum(q_rows, rows - 1)",
            "start": self.start.removeprefix("start = "),
            "q_pos": "start + q_rows",
            "at": self._place("out"),
            "row_at": "head.to(tl.int64) * rows + q_rows",
            **self.before,
        }
        text, kept = body.text(), list[str]()
        for name, value in reversed(named.items()):
            if used_parameters([name], text):
                kept.append(f"{name} = {value}")
                text += kept[-1] + "\n"
        lines.add(*reversed(kept), "")
        self.lines = lines.followed_by(body)

    def _parameter(self, branch: str) -> str:
        return self.plan.parameters([branch])[0]

    def _place(self, x: str) -> str:
        head = f"b.to(tl.int64) * stride_{x}b + h.to(tl.int64) * stride_{x}h"
        return f"{head} + q_rows.to(tl.int64) * stride_{x}n + channel"

    # ------------------------------------------------------------------------------------ values

    def text(self, node: Output, level: Level) -> str:
        """The value of an output, in parentheses if it binds more loosely than `level`."""
        text, own = self._value(node)
        return text if own >= level else f"({text})"

    def _value(self, node: Output) -> tuple[str, Level]:
        if id(node) in self.values:
            return self.values[id(node)], Level.ATOM
        match node:
            case Attended(branch=name):
                return "out_" + self._parameter(name), Level.ATOM
            case Handed(out=value) | Factor(value=value):
                return self.printer.text(value, Level.ATOM), Level.ATOM
            case Sum(left=left, right=right):
                return f"{self.text(left, Level.SUM)} + {self.text(right, Level.TERM)}", Level.SUM
            case Product(factor=factor, operand=operand):
                return f"{self.printer.text(factor, Level.TERM)} * {self.text(operand, Level.UNARY)}", Level.TERM
            case Merged():
                self._merge(node)
                return self.values[id(node)], Level.ATOM
            case _:
                assert_never(node)

    def named(self, node: Output, name: str) -> str:
        """The value of an output under a name of its own, unless it has one."""
        text, level = self._value(node)
        if level is not Level.ATOM:
            self.lines.add(f"{name} = {text}")
            self.values[id(node)] = text = name
        return text

    def _lse(self, node: Attended | Handed | Merged) -> str:
        match node:
            case Attended(branch=name):
                return "lse_" + self._parameter(name)
            case Handed(lse=lse):
                return self.printer.text(lse, Level.ATOM)
            case Merged():
                self._value(node)
                return self.totals[id(node)]
            case _:
                assert_never(node)

    def _merge(self, node: Merged) -> None:
        """Each operand weighs e**lse; a row that none of them reached gets 0 and -inf."""
        for operand in node.operands:
            self._value(operand)
        n, found = len(self.totals), [self._lse(x) for x in node.operands]
        most = found[0]
        for lse in found[1:]:
            most = f"tl.maximum({most}, {lse})"
        self.lines.add(
            f"most_{n} = {most}",
            f'most_{n} = tl.where(most_{n} == -float("inf"), 0.0, most_{n})',
            *(f"share_{n}_{i} = tl.exp({lse} - most_{n})" for i, lse in enumerate(found)),
            f"total_{n} = {' + '.join(f'share_{n}_{i}' for i in range(len(found)))}",
            f"per_{n} = 1.0 / tl.where(total_{n} == 0.0, 1.0, total_{n})",
            *(f"share_{n}_{i} *= per_{n}" for i in range(len(found))),
        )
        terms = [f"share_{n}_{i} * {self.text(x, Level.UNARY)}" for i, x in enumerate(node.operands)]
        self.lines.add(f"merged_{n} = {' + '.join(terms)}")
        self.values[id(node)], self.totals[id(node)] = f"merged_{n}", f"(most_{n} + tl.log(total_{n}))"
        self.shares[id(node)] = [f"share_{n}_{i}" for i in range(len(found))]


class GradientsWriter(CombineWriter):
    """Writes the backward kernel: gradients flow down the output's tree, and end in branches and in gates."""

    def __init__(self, plan: CombinePlan) -> None:
        super().__init__(plan, BACKWARD)
        self.slopes = dict(plan.slopes)
        self.of_branches: dict[str, list[str]] = {name: [] for name in plan.branches}
        self.of_lses: dict[str, list[str]] = {name: [] for name in plan.merges}
        # Terms of each learned read, and whether they are columns.
        self.of_reads: dict[Read, list[tuple[str, bool]]] = {x.read: [] for x in plan.learned}
        self.flows = 0

    def write(self) -> None:
        plan, lines = self.plan, self.lines
        self._load(self._scalars())
        self.before["d_at"] = self._place("d_out")
        self.before["d_out"] = "tl.load(d_out_ptr + d_at, mask=exists, other=0.0).to(tl.float32)"
        self.before["d_lse"] = "tl.load(d_lse_ptr + row_at, mask=q_rows < rows, other=0.0)"
        self._flow(plan.output, "d_out", "d_lse" if plan.has_lse else None)
        lines.add("")
        for name, terms in self.of_branches.items():
            at = f"d_out_{self._parameter(name)}_ptr"
            found = terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"
            lines.add(f"tl.store({at} + at, {found}.to({at}.dtype.element_ty), mask=exists)")
        for name, terms in self.of_lses.items():
            found = " + ".join(terms)
            lines.add(f"tl.store(d_lse_{self._parameter(name)}_ptr + row_at, {found}, mask=q_rows < rows)")
        for n, x in enumerate(plan.learned):
            self._store(n, x)
        self._finish()

    def _scalars(self) -> list[Scalar]:
        return [*super()._scalars(), *(e for _, found in self.plan.slopes for _, e in found)]

    # ------------------------------------------------------------------------------------- flows

    def _flow(self, node: Output, d: str, d_lse: str | None) -> None:
        """Hand on the gradient `d` of a node's value, a name, and that of its lse."""
        match node:
            case Attended(branch=name):
                self.of_branches[name].append(d)
                if d_lse is not None:
                    self.of_lses[name].append(d_lse)
            case Handed(out=out, lse=lse):
                self._learn(out, d, column=False)
                if d_lse is not None:
                    self._learn(lse, d_lse, column=True)
            case Factor(value=value):
                self._learn(value, d, column=False)
            case Sum(left=left, right=right):
                self._flow(left, d, None)
                self._flow(right, d, None)
            case Product(factor=factor, operand=operand):
                if factor in self.slopes:
                    found = self.named(operand, self._name("value"))
                    self._learn(factor, self._named(f"{d} * {found}", "d_factor"), column=False)
                self._flow(operand, self._named(f"{self.printer.text(factor, Level.TERM)} * {d}", "d_value"), None)
            case Merged():
                self._part(node, d, d_lse)
            case _:
                assert_never(node)

    def _part(self, node: Merged, d: str, d_lse: str | None) -> None:
        """An operand has its share of both gradients; its lse also what moving a share to it changes of the output."""
        merged = self.named(node, "")
        for operand, share in zip(node.operands, self.shares[id(node)], strict=True):
            moved = f"tl.sum({d} * ({self.text(operand, Level.SUM)} - {merged}), 1)[:, None]"
            of_lse = f"({d_lse} + {moved})" if d_lse is not None else moved
            self._flow(operand, self._named(f"{share} * {d}", "d_value"), self._named(f"{share} * {of_lse}", "d_part"))

    def _learn(self, factor: Scalar, d: str, column: bool) -> None:
        """Add to the gradients of the learnable reads in a factor, given its own."""
        for read, slope in self.slopes.get(factor, ()):
            term = d if slope == Const(1.0) else f"{self.printer.text(slope, Level.TERM)} * {d}"
            self.of_reads[read].append((term, column))

    def _name(self, prefix: str) -> str:
        self.flows += 1
        return f"{prefix}_{self.flows - 1}"

    def _named(self, text: str, prefix: str) -> str:
        name = self._name(prefix)
        self.lines.add(f"{name} = {text}")
        return name

    # ------------------------------------------------------------------------------------- gates

    def _follows_rows(self, read: Read) -> bool:
        return any(dim.axis is Axis.Q for dim in self.plan.program.input(read.input).dims)

    def _store(self, n: int, x: Learning) -> None:
        """Store what a tile found of a read: of each row, or of the tile where its rows share an entry."""
        lines, terms = self.lines, self.of_reads[x.read]
        tiles = [term for term, column in terms if not column]
        columns = [term for term, column in terms if column]
        if tiles:
            found = " + ".join(tiles)
            columns += [] if x.channels else [f"tl.sum({found}, 1)[:, None]"]
        total = " + ".join([*([" + ".join(tiles)] if tiles and x.channels else []), *columns])
        mask = "exists" if x.channels else "q_rows < rows"
        if not x.own:
            size = f" * {self.plan.spec.v_dim} + channel" if x.channels else ""
            place = Leaves(self.plan).flat(x.read, self.printer)
            zeros = f"tl.zeros([BLOCK_Q, {'WIDTH' if x.channels else '1'}], tl.int64)"
            lines.add(
                f"tl.store(sum_{n}_ptr + row_at{size}, {total}, mask={mask})",
                f"tl.store(at_{n}_ptr + row_at{size}, {zeros} + {place}, mask={mask})",
            )
            return
        row = "row_at"
        if not self._follows_rows(x.read):
            total, row = f"tl.sum({total}, 0)[None, :]", "tl.program_id(0).to(tl.int64)"
            mask = f"channel < {self.plan.spec.v_dim}" if x.channels else ""
        of_channel = " + channel" if x.channels else ""
        at = f"sum_{n}_ptr + sum_{n}_offset + {row} * sum_{n}_stride{of_channel}"
        if not mask:
            at = f"{at} + tl.zeros([1, 1], tl.int32)"
        lines.add(f"tl.store({at}, {total}{f', mask={mask}' if mask else ''})")
