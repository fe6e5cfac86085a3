"""The CPU lowering of pieces whose key tiles are listed head by head: several query tiles of a head go together.

One head's tile and the few that it lists are little work beside what it takes to call for it, operator by operator.
Lists are made as long as the longest by a tile past the last key, which nobody sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attndsl.codegen.cpu import NumberLeaves, TensorLeaves, TileLoop
from attndsl.codegen.scalars import Names, Printer
from attndsl.layout import PLAIN
from attndsl.plan import Plan, run_scalars
from attndsl.program import Scalar, Var, reads
from attndsl.runs import Run

# Listed tiles attended together: bounds the scores held at once, which stay in a core's cache.
TOGETHER = 64


def goes_by_lists(plan: Plan) -> bool:
    """Whether query tiles go together: lists name all they visit, each head's its own (heads of the same go together
    as it is), and nothing is asked of the keys of one tile."""
    runs = plan.runs.full + plan.runs.partial if plan.layout == PLAIN else ()
    if not any(reads(e, "h", "g") for e in run_scalars(plan.runs)):
        return False
    alone = plan.spec.dropout or plan.skip is not None or plan.shares is not None or plan.view is not None
    return bool(runs) and not alone and all(_is_list(run) for run in runs)


def _is_list(run: Run) -> bool:
    """Whether a run is a part of its list, of which each query tile has its own."""
    if run.list is None or run.spans or run.step != 1 or any(reads(e, "q_tile") for e in run.list.index[:-1]):
        return False
    return reads(run.first, "q_tile") and reads(run.count, "q_tile")


class ListLoop(TileLoop):
    """The loop over groups of a head's query tiles, and the scores of a group: [tiles, batch, 1, rows, keys]."""

    b_index = "all_b[at_b].transpose(0, 1)"

    def __init__(self, plan: Plan, per_pair: tuple[Scalar | None, ...]) -> None:
        super().__init__(plan, per_pair)
        self.helpers -= {"key_spans", "chunks", "positions"}
        self.helpers |= {"listed_by_tile", "groups", "by_tile", "portions", "gather_by_tile"}

    @contextmanager
    def _query_tiles(self) -> Iterator[None]:
        lines, where = self.lines, self.plan.program.span
        lines.add(
            f"# The key tiles that each query tile visits{f'  [{where}]' if where else ''}",
            "q_tile = torch.arange(-(-rows // block_q))",
        )
        names = Names(TensorLeaves(self.plan), {Var(name): name for name in ("b", "h", "g")})
        printer = self.tensors.within(names)
        runs = self.plan.runs.full + self.plan.runs.partial
        printer.share(lines, [e for run in runs for e in (run.first, run.count)], "tile_")
        for label, found in (("full", self.plan.runs.full), ("partial", self.plan.runs.partial)):
            lists = " + ".join(self._listed(run, printer) for run in found)
            lines.add(f"{label}_tiles = {lists or '[[] for _ in q_tile]'}")
        size = TOGETHER if self.per_batch else f"{TOGETHER} // batch"
        with lines.block(f"for first, end in groups(full_tiles, partial_tiles, rows // block_q, {size}):"):
            lines.add(
                "tiles, low, high = end - first, first * block_q, min(end * block_q, rows)",
                "at = (at_b, at_g, at_r, slice(low, high))",
                "q_pos = torch.arange(start + low, start + high).view(tiles, 1, 1, -1, 1)",
            )
            yield

    def _listed(self, run: Run, printer: Printer) -> str:
        assert run.list is not None, "all runs are lists"
        numbers = self.numbers.within(Names(NumberLeaves(self.plan)))
        tensor = f"{run.list.input}_input"
        at = [f"min(max({numbers.text(e)}, 0), {tensor}.shape[{i}] - 1)" for i, e in enumerate(run.list.index[:-1])]
        row = f"{tensor}[{', '.join(at)}]" if at else tensor
        return f"listed_by_tile({row}, {printer.text(run.first)}, {printer.text(run.count)})"

    def spans(self) -> None:
        """What is visited is known before the tiles are grouped."""

    def rows(self, x: str) -> str:
        return f"by_tile({x}[at], tiles)"

    def put(self, x: str, value: str) -> None:
        self.lines.add(f"{self.rows(x)}.copy_({value})")

    @contextmanager
    def chunk(self) -> Iterator[Printer]:
        lines = self.lines
        lines.add("lists = full_tiles[first:end], partial_tiles[first:end]")
        with lines.block(f"for listed, in_part in portions(*lists, -(-k_len // block_k), {TOGETHER}):"):
            printer = self.tensors.within(self.tensors.names.inner())
            lines.add(
                "k_pos = (listed[..., None] * block_k + torch.arange(block_k)).view(tiles, 1, 1, 1, -1)",
                "k_tokens = k_pos.clamp(max=k_len - 1).flatten()",
                "keys = gather_by_tile(k[at_b, at_g], k_tokens, tiles).to(compute)",
                "values = gather_by_tile(v[at_b, at_g], k_tokens, tiles).to(compute)",
                "scores = (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4]).mul_(scale)",
            )
            yield printer

    def mask(self, target: str, value: str) -> None:
        lines = self.lines
        if self.plan.mask is not None:
            printer = self.tensors.within(self.tensors.names.inner())
            printer.names.known[Var("k")] = "partial_pos"
            with lines.block("if in_part:"):
                lines.add(
                    "partial_pos = k_pos[..., -in_part * block_k :]",
                    f"allowed = torch.as_tensor({printer.text(self.plan.mask)})",
                    f"{target}[..., -in_part * block_k :].masked_fill_(~allowed, {value})",
                )
        lines.add("exist = k_pos < k_len")
        with lines.block("if not exist.all():"):
            lines.add(f"{target}.masked_fill_(~exist, {value})")
