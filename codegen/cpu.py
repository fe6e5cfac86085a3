"""The CPU lowering: blocked PyTorch over the same plan, cost following the pattern's area.

For each query tile the visited keys are gathered (full tiles first) and attended in a few large products.
Heads and batch entries go together unless the runs depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from attndsl.codegen.cpu_votes import vote
from attndsl.codegen.header import header
from attndsl.codegen.lines import Lines
from attndsl.codegen.prelude_helpers import prelude
from attndsl.codegen.scalars import PYTHON, TORCH, Level, Names, Printer
from attndsl.derivation import Listed
from attndsl.layout import PLAIN, Comb, Layout, Permutation
from attndsl.listing import whole_classes
from attndsl.plan import Plan, run_scalars
from attndsl.program import Arg, Axis, Dim, Read, Scalar, Table, Type, Var, reads
from attndsl.runs import Run

# Keys attended in one product: bounds the scores held at once.
CHUNK = 8192


@dataclass(frozen=True, slots=True)
class TensorLeaves:
    """Leaves as tensors that broadcast over [batch, kv_heads, group, rows, keys]."""

    plan: Plan

    def any_integers(self, e: Read | Table) -> bool:
        """As in a kernel for GPUs: here integers have 64 bits."""
        return False

    def __call__(self, e: Scalar, printer: Printer) -> str:
        match e:
            case Var(name="q"):
                return "q_pos"
            case Var(name="k"):
                return "k_pos"
            case Var(name="Nq"):
                return "rows" if self.plan.program.align_start else "k_len"
            case Var(name="Nk"):
                return "k_len"
            case Var(name="i" | "j" as name):
                return f"{name}_pos"
            case Var(name="b" | "h" | "g" as name):
                return f"{name}_index"
            case Var(name=name):
                return name
            case Arg(name=name):
                return f"arg_{name}"
            case Table(name=name, index=index):
                table = self.plan.program.table(name)
                return f"{name}_table[{self.indices(index, table.dims, f'{name}_table', printer)}]"
            case Read(input=name, index=index):
                decl = self.plan.program.input(name)
                tensor = f"{name}_input"
                if isinstance(decl.derivation, Listed):
                    printer.helpers.add("looked_up")
                    at = self.indices(index[:-1], decl.dims[:-1], tensor, printer)
                    return f"looked_up({tensor}[{at}], {printer.text(index[-1])})"
                if not index:
                    text = tensor
                else:
                    text = f"{tensor}[{self.indices(index, decl.dims, tensor, printer)}]"
                if decl.holds_integers:
                    return f"{text}.long()"
                return f"{text}.to(compute)" if decl.type is Type.FLOAT else text
            case _:
                raise AssertionError(f"not a leaf: {e}")

    def indices(self, index: tuple[Scalar, ...], dims: tuple[Dim, ...], tensor: str, printer: Printer) -> str:
        """The indices of an entry, each clamped to its dimension."""
        found = []
        for i, (e, dim) in enumerate(zip(index, dims, strict=True)):
            text = printer.text(e, Level.SUM)
            if dim.axis is Axis.Q and dim.block == 1:
                text = f"{text} - start"
            printer.helpers.add("clamp")
            found.append(f"clamp({text}, 0, {tensor}.shape[{i}] - 1)")
        return ", ".join(found)


@dataclass(frozen=True, slots=True)
class NumberLeaves:
    """Leaves as Python numbers, for the runs of one tile of one head."""

    plan: Plan

    def any_integers(self, e: Read | Table) -> bool:
        """As in a kernel for GPUs: here integers have 64 bits."""
        return False

    def __call__(self, e: Scalar, printer: Printer) -> str:
        match e:
            case Var(name="Nq"):
                return "rows" if self.plan.program.align_start else "k_len"
            case Var(name="Nk"):
                return "k_len"
            case Var(name=name):
                return name
            case Arg(name=name):
                return f"arg_{name}"
            case Table(name=name, index=index):
                return self._item(f"{name}_table", index, self.plan.program.table(name).dims, printer)
            case Read(input=name, index=index):
                return self._item(f"{name}_input", index, self.plan.program.input(name).dims, printer)
            case _:
                raise AssertionError(f"not a leaf: {e}")

    def _item(self, tensor: str, index: tuple[Scalar, ...], dims: tuple[Dim, ...], printer: Printer) -> str:
        at = []
        for i, (e, dim) in enumerate(zip(index, dims, strict=True)):
            # Rows of a call are counted from its first.
            of_call = " - start" if dim.axis is Axis.Q and dim.block == 1 else ""
            at.append(f"min(max({printer.text(e, Level.SUM)}{of_call}, 0), {tensor}.shape[{i}] - 1)")
        return f"{tensor}[{', '.join(at)}].item()" if at else f"{tensor}.item()"


class TileLoop:
    """What the forward and backward functions share: the loop over query tiles, and a tile's scores."""

    b_index = "all_b[at_b]"
    # What says which rows see nothing whatever the mask says, for `or`.
    absent = ""

    def __init__(self, plan: Plan, per_pair: tuple[Scalar | None, ...]) -> None:
        """`per_pair`: what is computed for every pair, besides the mask."""
        self.plan = plan
        self.order = plan.layout if isinstance(plan.layout, Layout) else PLAIN
        self.permutation = plan.layout if isinstance(plan.layout, Permutation) else None
        self.reads_keys = any(reads(e, "k") for e in per_pair if e is not None)
        self.reads_values = True
        self.lines = Lines(indent=1)
        self.helpers: set[str] = {"key_spans", "chunks", "positions"}
        self.numbers = Printer(PYTHON, Names(NumberLeaves(plan)), self.helpers)
        self.tensors = Printer(TORCH, Names(TensorLeaves(plan)), self.helpers)
        decided = run_scalars(plan.runs)
        if plan.shares is not None:
            decided += (plan.shares.member,)
        if self.permutation is not None:
            decided += (self.permutation.q, self.permutation.k)
        self.per_batch = any(reads(x, "b") for x in decided)
        self.per_head = any(reads(x, "h", "g") for x in decided)

    def parameters(self) -> list[str]:
        """Names of what the function takes after its tensors: scale, lengths, inputs, tables, arguments."""
        plan = self.plan
        return (
            ["tokens"] * (plan.view is not None)
            + [f"{decl.name}_input" for decl in plan.inputs]
            + [f"{table.name}_table" for table in plan.tables]
            + [f"arg_{name}" for name in plan.args]
            + (["seed", "drop_below", "keep_scale"] if plan.spec.dropout else [])
        )

    def file(self, function: str, signature: str, title: str) -> str:
        body = self.lines.text()
        helpers = prelude("torch_prelude.py", self.helpers)
        modules = "import itertools\nimport math" if "itertools." in body else "import math"
        return (
            header(self.plan, title) + f"{modules}\n\nimport torch\n\n\n" + helpers + "\n\n\n"
            f"def {function}({signature}):\n" + body
        )  # fmt: skip

    def prologue(self) -> None:
        plan, lines = self.plan, self.lines
        lines.add(
            f"block_q, block_k = {plan.tiling.block_q}, {plan.tiling.block_k}",
            "batch, kv_heads, group, rows, _ = q.shape",
            *(["k_len = k.shape[-2]"] if plan.view is None else ["k_len, entries = tokens, k.shape[-2]"]),
            "start = 0" if plan.program.align_start else "start = k_len - rows",
            "compute = torch.float64 if q.dtype == torch.float64 else torch.float32",
            "all_b = torch.arange(batch).view(-1, 1, 1, 1, 1)",
            "all_h = torch.arange(kv_heads * group).view(1, kv_heads, group, 1, 1)",
        )

    @contextmanager
    def batches(self) -> Iterator[None]:
        """A loop over batch entries, where the runs need it; inside, `at_b` selects those attended together."""
        with self.lines.block("for b in range(batch):" if self.per_batch else "for b in [slice(None)]:"):
            self.lines.add("at_b = slice(b, b + 1)" if self.per_batch else "at_b = b")
            yield

    @contextmanager
    def tiles(self) -> Iterator[None]:
        """Loops over heads (where the runs need it) and query tiles; inside, `at` selects the rows of a tile."""
        lines = self.lines
        heads = "for h in range(kv_heads * group):" if self.per_head else "for h in [slice(None)]:"
        with self.batches(), lines.block(heads):
            if self.per_head:
                lines.add("g = h // group", "at_g, at_r = slice(g, g + 1), slice(h % group, h % group + 1)")
            else:
                lines.add("at_g, at_r = slice(None), slice(None)")
            lines.add(
                f"b_index, h_index = {self.b_index}, all_h[:, at_g, at_r]",
                "g_index = h_index // group",
            )
            if self.plan.scale is not None:
                lines.add(f"scale = {self.tensors.text(self.plan.scale)}")
            classes = self.plan.layout.classes
            residues = lines.block(f"for residue in range({classes}):") if classes > 1 else nullcontext()
            with residues, self._query_tiles():
                self.spans()
                yield

    @contextmanager
    def _query_tiles(self) -> Iterator[None]:
        lines, comb = self.lines, self.order.q
        if self.permutation is not None:
            lines.add(f"# Tokens: {self.plan.layout}.")
            names = {"q_order": self.permutation.q, "k_order": self.permutation.k}
            lines.add(*(f"{name} = {self._order(read)}" for name, read in names.items()))
        elif not self.plan.layout.plain:
            lines.add(f"# Tokens: {self.plan.layout}. `nth` counts them.")
        if not self.order.k.every:
            lines.add(f"k_end = {self._index(self.order.k, 'Nk')}")
        if comb.every:
            with lines.block("for q_tile in range(-(-rows // block_q)):"):
                rows = "slice(low, high)" if self.permutation is None else "q_order[low:high]"
                lines.add(
                    "low, high = q_tile * block_q, min((q_tile + 1) * block_q, rows)",
                    f"at = (at_b, at_g, at_r, {rows})",
                    "q_pos = torch.arange(start + low, start + high).view(-1, 1)",
                )
                plan = self.plan
                classes = whole_classes(plan.program, plan.scalars, plan.tiling.block_q, plan.spec.even_start)
                for e, size in classes.items():
                    self.tensors.names.known[e] = f"class_{size}"
                    lines.add(f"class_{size} = (start + low) // {size}")
                yield
            return
        end = "Nq" if self.plan.program.align_start else "Nk"
        lines.add(f"i_start, i_end = {self._index(comb, 'start')}, {self._index(comb, end)}")
        with lines.block("for q_tile in range(-(-(i_end - i_start) // block_q)):"):
            lines.add(
                "low, high = i_start + q_tile * block_q, min(i_start + (q_tile + 1) * block_q, i_end)",
                "i_pos = torch.arange(low, high).view(-1, 1)",
                f"q_pos = {self._tokens(comb, 'i_pos')}",
            )
            if comb.width == 1:
                rows = ", ".join(f"{self._tokens(comb, x)} - start" for x in ("low", "high"))
                lines.add(f"at = (at_b, at_g, at_r, slice({rows}, {comb.period}))")
            else:
                lines.add("at = (at_b, at_g, at_r, q_pos[:, 0] - start)")
            yield

    def rows(self, x: str) -> str:
        """What q, out or lse has of the rows of a tile, as text."""
        return f"{x}[at]"

    def put(self, x: str, value: str) -> None:
        """Write a value, made of its dtype, to the rows of a tile."""
        self.lines.add(f"{x}[at] = {value}.to({x}.dtype)")

    def _order(self, read: Read) -> str:
        """The tokens in the order of a permutation, as text."""
        tensor = f"{read.input}_input"
        *index, _ = (self.numbers.within(Names(NumberLeaves(self.plan))).text(e) for e in read.index)
        return f"{tensor}[{', '.join(index)}]" if index else tensor

    def _index(self, comb: Comb, variable: str) -> str:
        """The index of the first token at or after a position, as text."""
        return self.numbers.within(Names(NumberLeaves(self.plan))).text(comb.index(Var(variable)))

    def _tokens(self, comb: Comb, nth: str) -> str:
        """The tokens of indices, as text."""
        printer = self.tensors.within(Names(TensorLeaves(self.plan)))
        printer.names.known[Var("i")] = nth
        return printer.text(comb.position(Var("i")))

    def spans(self) -> None:
        runs, lines = self.plan.runs, self.lines
        where = self.plan.program.span
        lines.add(f"# The keys that these rows visit{f'  [{where}]' if where else ''}")
        self.numbers.names.known.clear()
        self.numbers.share(lines, list(run_scalars(runs)), "tile_")
        for label, found in (("full", runs.full), ("partial", runs.partial)):
            if not found:
                lines.add(f"{label}_spans = []")
                continue
            lines.add(f"{label}_runs = [")
            lines.add(*(f"    {self._run(run)}," for run in found))
            tokens = "k_len" if self.plan.view is None else "entries"
            end = tokens if self.order.k.every else "k_end"
            lines.add("]", f"{label}_spans = key_spans({label}_runs, block_k, {end})")

    def attended(self) -> None:
        """What is to be done when all keys of a tile are attended."""

    def _run(self, run: Run) -> str:
        """A run as (first, count, step), or those that the tiles of its list make."""
        first, count = self._number(run.first), self._number(run.count)
        if run.list is None:
            return f"({first}, {count}, {run.step})"
        *index, _ = run.list.index
        tensor = f"{run.list.input}_input"
        at = [f"min(max({self._number(e)}, 0), {tensor}.shape[{i}] - 1)" for i, e in enumerate(index)]
        row = f"{tensor}[{', '.join(at)}]" if at else tensor
        if run.spans:
            self.helpers.add("spans_listed")
            return f"*spans_listed({row}, {first})"
        self.helpers.add("listed")
        return f"*listed({row}, {first}, {count}, {run.step})"

    def _number(self, e: Scalar) -> str:
        return self.numbers.text(e)

    @contextmanager
    def chunk(self) -> Iterator[Printer]:
        """A loop over portions of the visited keys; inside, `keys`, `values` and `scores`, scale * q . k.

        Yields a printer for expressions in the loop.
        """
        lines = self.lines
        # Where tiles are skipped, a portion is a tile; members are whole in one.
        size: int | str = CHUNK if self.plan.skip is None else self.plan.tiling.block_k
        if self.plan.shares is not None:
            member = self.plan.tiling.block_k
            size = max(1, CHUNK // member) * member if self.plan.shares.in_tiles(member) else "k_len"
        with lines.block(f"for full, partial in chunks(full_spans, partial_spans, {size}):"):
            printer = self.tensors.within(self.tensors.names.inner())
            lines.add("spans = full + partial")
            if self.permutation is not None:
                lines.add("k_tokens = k_order[positions(spans)]")
            elif self.order.k.width > 1:
                lines.add("k_nth = positions(spans)", f"k_tokens = {self._tokens(self.order.k, 'k_nth')}")
            lines.add(
                f"keys = {self.rows_of('k')}.to(compute)",
                *([f"values = {self.rows_of('v')}.to(compute)"] if self.reads_values else []),
                "scores = (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4]).mul_(scale)",
            )
            if self.reads_keys:
                comb = self.order.k
                lines.add(f"k_pos = {'k_tokens' if comb.width > 1 else self._tokens(comb, 'positions(spans)')}")
            yield printer

    def drop(self, target: str) -> None:
        """Dropout of what every pair has, what is left made up for what is not."""
        if self.plan.spec.dropout:
            self.lines.add(f"{target} = torch.where(keep, {target} * keep_scale, 0)")

    def keep(self) -> None:
        """Which pairs dropout keeps."""
        if not self.plan.spec.dropout:
            return
        if self.order.k.every and self.permutation is None:
            self.helpers |= {"philox", "kept"}
            b = "b_index" if self.plan.view is None else "~b_index"
            self.lines.add(f"keep = kept(seed, {b}, h_index, q_pos, spans, drop_below)")
            return
        self.keep_apart(*self.tokens_of_pairs())

    def keep_apart(self, rows: str, keys: str) -> None:
        """As `keep`, of tokens that do not lie in a row: positions of rows and keys, as text."""
        self.helpers |= {"philox", "kept_apart"}
        self.lines.add(f"keep = kept_apart(seed, b_index, h_index, {rows}, {keys}, drop_below)")

    def tokens_of_pairs(self) -> tuple[str, str]:
        """The positions of the rows of a tile, and of its keys, as text."""
        if self.permutation is None:
            return "q_pos", "k_tokens" if self.order.k.width > 1 else self._tokens(self.order.k, "positions(spans)")
        first = "" if self.permutation.aligned else " + k_len - rows"
        return f"q_order[low:high].view(-1, 1){first}", "k_tokens"

    def members(self) -> None:
        """Two levels. `member`: the place of each key's, among those of the chunk, which are whole in it; `inner`: the
        softmax of `scores` inside each; `share`: what a row gives a pair's member."""
        shares = self.plan.shares
        assert shares is not None
        self.helpers |= {"within_members", "exponential"}
        printer = self.tensors.within(Names(TensorLeaves(self.plan)))
        # Keys of another document may have the same number: no row sees both.
        self.lines.add(
            "k_pos = positions(spans)",
            f"numbers, member = torch.unique({printer.text(shares.member)}, return_inverse=True)",
            "member = member.flatten()",
            "inner = within_members(scores, member)",
        )
        if shares.votes is not None:
            vote(self, shares.votes)
        elif shares.given is not None:
            self.lines.add(f"share = {printer.text(shares.given)}")

    def rows_of(self, x: str) -> str:
        """The keys or values of the spans: without a copy where they lie at equal distances in one span."""
        if self._selects:
            return f"{x}[at_b, at_g].index_select(-2, k_tokens)"
        self.helpers.add("gather")
        return f"gather({x}[{self._keys}], spans)"

    @property
    def _selects(self) -> bool:
        """Whether the keys of spans are named one by one."""
        return self.order.k.width > 1 or self.permutation is not None

    @property
    def _keys(self) -> str:
        """The keys that spans are counted in, of a tensor [batch, kv_heads, keys, D], where they are a slice."""
        comb = self.order.k
        return "at_b, at_g" if comb.every else f"at_b, at_g, {self.numbers.text(comb.first)}::{comb.period}"

    def entries_of(self, x: str) -> str:
        """The entries of an input [batch, kv_heads, entries, D] that may be broadcast, as text."""
        return f"{x}.expand(batch, kv_heads, -1, -1)[at_b, at_g]"

    def voters(self) -> str:
        """The rows whose products with entries weigh members, as text."""
        return "queries"

    def scatter(self, x: str, values: str) -> None:
        """Add values to tensor `x` at the keys of a chunk."""
        if self._selects:
            # No two of the tokens are the same: the sum has one order.
            self.lines.add(f"{x}[at_b, at_g].index_add_(-2, k_tokens, {values})")
            return
        self.helpers.add("scatter")
        self.lines.add(f"scatter({x}[{self._keys}], spans, {values})")

    def mask(self, target: str, value: str) -> None:
        """Put `value` in place of pairs that are not allowed: only among the keys of partial tiles, which come last."""
        if self.plan.mask is not None:
            printer = self.tensors.within(self.tensors.names.inner())
            printer.names.known |= {Var("k"): "partial_pos", Var("j"): "partial_nth"}
            comb, place = self.order.k, "partial_pos"
            with self.lines.block("if partial:"):
                if comb.every:
                    self.lines.add("partial_pos = positions(partial)")
                else:
                    place = "partial_nth"
                    self.lines.add("partial_nth = positions(partial)")
                    if reads(self.plan.mask, "k"):
                        self.lines.add(f"partial_pos = {self._tokens(comb, 'partial_nth')}")
                self.lines.add(
                    f"allowed = torch.as_tensor({printer.text(self.plan.mask)})",
                    f"{target}[..., -{place}.shape[0] :].masked_fill_(~allowed, {value})",
                )
