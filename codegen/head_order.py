"""In which order programs take heads and tiles: what takes long must not start last."""

from __future__ import annotations

from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import Printer
from attndsl.plan import Plan
from attndsl.program import Read, Scalar, reads, walk

# The last heads, whose tiles take turns.
_BESIDE = 4


def last_beside(lines: Lines, language: str, program: str, tiles: str, beside: int = _BESIDE) -> tuple[str, str]:
    """The texts of a program's head and of its place among the head's `tiles`; `heads` is known.

    Heads one after another share what they read among programs in flight. The last ones are side by side, so that all
    that takes long has started before the end. beside: how many.
    """
    lines.add(
        f"alone = {language}.maximum(heads - {beside}, 0)",
        f"beside = {program} - alone * {tiles}",
        "turns = heads - alone",
    )
    head = f"{language}.where(beside < 0, {program} // {tiles}, alone + beside % turns)"
    return head, f"{language}.where(beside < 0, {program} % {tiles}, beside // turns)"


def heavy_first(lines: Lines, language: str, tiles: str) -> None:
    """A program's head and key tile where these lie in order. tiles: the line that says how many a head has."""
    lines.add(
        "",
        "# Heads one after another, the last few side by side; the first keys first: most rows see them.",
        "# Before all others the tiles that far more rows see than the rest, `heavy` in each head.",
        tiles,
        f"heads = {language}.num_programs(0) // k_tiles",
        f"program = {language}.program_id(0)",
        "rest = program - heavy * heads",
        f"light = {language}.maximum(k_tiles - heavy, 1)",
    )
    head, place = last_beside(lines, language, "rest", "light")
    lines.add(
        f"head = {language}.where(rest < 0, program % heads, {head})",
        f"k_tile = {language}.where(rest < 0, program // heads, heavy + {place})",
    )


def head_counts(plan: Plan) -> list[Scalar]:
    """How many tiles a query tile visits, run by run, where what the program says of heads decides it."""
    counts = [run.count for run in plan.runs.full + plan.runs.partial]
    nodes = [x for e in counts for x in walk(e)]
    given = all(plan.program.input(x.input).derivation is None for x in nodes if isinstance(x, Read))
    known = given and plan.layout.plain and plan.spec.heads > 1
    return counts if known and any(reads(e, "h", "g") for e in counts) else []


def head_of_rank(lines: Lines, printer: Printer, counts: list[Scalar], heads: int, of_head: str) -> None:
    """The program's batch entry and head, where heads with more tiles come first.

    The counts are those of a head's last tile, for all heads at once: tables and inputs say them, at call time and
    without the host. of_head: the line that makes `g` of `h`.
    """
    lines.add(
        "",
        "# Heads one after another: programs in flight share keys. Those whose last rows visit more tiles first,",
        "# and of a head its last rows: they are longest.",
        f"batch = tl.num_programs(0) // (q_tiles * {heads})",
        "nth = tl.program_id(0) // q_tiles",
        "b = nth % batch",
        f"every = tl.arange(0, {1 << (heads - 1).bit_length()})",
        f"h = tl.minimum(every, {heads - 1})",
        of_head,
        "q_tile = q_tiles - 1",
    )
    printer.share(lines, counts, "ranked_")
    total = " + ".join(f"tl.maximum({printer.text(e)}, 0)" for e in counts)
    lines.add(
        f"work = tl.where(every < {heads}, {total}, -1)",
        "as_much = (work[None, :] == work[:, None]) & (every[None, :] < every[:, None])",
        "ahead = (work[None, :] > work[:, None]) | as_much",
        "h = tl.sum(tl.where(tl.sum(tl.where(ahead, 1, 0), 1) == nth // batch, every, 0), 0)",
        f"head = b * {heads} + h",
    )
