"""Tiles of queries that the heads of a key head share, and tiles of keys that are made of several listed ones."""

from __future__ import annotations

from collections.abc import Iterator

from attndsl.codegen.lines import Lines
from attndsl.codegen.scalars import Printer
from attndsl.plan import Plan
from attndsl.program import Read
from attndsl.runs import PLACE, Run


def packed_tile(lines: Lines, plan: Plan, start: str) -> None:
    """Which rows of which key head a program owns: `head`, `h` and `q_rows` say it of each row of its tile.

    start: the line that says where the call's first row stands.
    """
    spec, rows, pack = plan.spec, plan.tiling.block_q, plan.tiling.pack
    group = spec.heads // spec.kv_heads
    place = "q_offset" if rows == 1 else f"q_offset % {pack}"
    row = "q_tile + tl.zeros([BLOCK_Q], tl.int32)" if rows == 1 else f"q_tile * {rows} + q_offset // {pack}"
    several = f"of the {group} heads of a key head, which choose together" if group > 1 else "of a head"
    lines.add(
        "",
        f"# {rows} row{'s' * (rows > 1)} {several}.",
        f"q_tiles = {'rows' if rows == 1 else f'tl.cdiv(rows, {rows})'}",
        f"b = tl.program_id(0) // q_tiles // {spec.kv_heads}",
        f"g = tl.program_id(0) // q_tiles % {spec.kv_heads}",
        "q_tile = q_tiles - 1 - tl.program_id(0) % q_tiles",
        start,
        "",
        "q_offset = tl.arange(0, BLOCK_Q)",
        "k_offset = tl.arange(0, BLOCK_K)",
    )
    if group < pack:
        lines.add(f"# Of a row's {pack} places {group} exist{'s' * (group == 1)}.", f"own_head = {place}")
        lines.add(f"q_rows = tl.where(own_head < {group}, {row}, rows)")
        place = f"tl.minimum(own_head, {group - 1})"
    else:
        lines.add(f"q_rows = {row}")
    if group > 1:
        lines.add(f"q_heads = g * {group} + {place}", "h = q_heads[:, None]", f"head = b * {spec.heads} + q_heads")
    else:
        lines.add("h = g", f"head = b * {spec.heads} + h")
    lines.add("q_pos = start + q_rows[:, None]")


def collected_loop(lines: Lines, printer: Printer, run: Run, block_k: int, unit: int) -> Iterator[bool]:
    """A loop over the tiles of keys that a list fills: `k_rows` are the keys of one, the number of keys in the place of
    one that is missing. Yields that pairs are masked."""
    several = block_k // unit
    assert run.list is not None
    lines.add(f"listed_first = {printer.text(run.first)}", f"listed_count = {printer.text(run.count)}")
    if several == 1:
        # Read a turn ahead: the loads of a tile wait for no entry.
        lines.add(f"next_listed = {_entry(printer, run.list, 'listed_first')}")
    with lines.block(f"for i in range({'listed_count' if several == 1 else f'tl.cdiv(listed_count, {several})'}):"):
        if several == 1:
            lines.add(
                "listed = next_listed",
                f"next_listed = {_entry(printer, run.list, 'listed_first + i + 1')}",
                "k_rows = listed * BLOCK_K + k_offset",
            )
        else:
            key = "listed" if unit == 1 else f"listed * {unit} + k_offset % {unit}"
            lines.add(
                f"places = i * {several} + k_offset{f' // {unit}' if unit > 1 else ''}",
                f"listed = {_entry(printer, run.list, 'listed_first + places')}",
                f"k_rows = tl.where(places < listed_count, {key}, k_len)",
            )
        yield True
    lines.add("")


def spanned_loop(lines: Lines, printer: Printer, run: Run) -> Iterator[bool]:
    """The same of tiles that the tokens of listed spans fill, counted one after another.

    Each span has a token at least, so those that a tile has tokens of are among as many as it has keys: of these the
    ends that lie before a token say which is its own. The next tile's keys are found after a tile, as in lists.
    """
    listed = run.list
    assert listed is not None

    def entry(place: str) -> str:
        return _entry(printer, listed, place)

    first = printer.text(run.first)
    lines.add(
        f"ends_at = {entry(first)}",
        f"shifts_at = {entry(f'{first} + 1')}",
        f"listed_count = {printer.text(run.count)}",
        "# The listed spans lie end to end: how many spans end at or before a place says which one holds it.",
        "to_shift = shifts_at - ends_at",
    )

    def find(place: str) -> None:
        """Which keys the tokens from a place on are."""
        lines.add(
            f"place = {place}",
            f"ends = tl.where(ends_at + k_offset < shifts_at, {entry('ends_at + k_offset')}, listed_count)",
            "inside = (ends >= place) & (ends < place + BLOCK_K)",
            "span_at = ends_at + tl.cumsum(tl.histogram(ends - place, BLOCK_K, mask=inside), 0)",
            f"key = place + k_offset + {entry('span_at + to_shift')}",
            "found = tl.where(place + k_offset < listed_count, key, k_len)",
            "ends_at += tl.sum((ends <= place + BLOCK_K).to(tl.int32), 0)",
        )

    find("0")
    with lines.block("for i in range(tl.cdiv(listed_count, BLOCK_K)):"):
        lines.add("k_rows = found")
        yield True
        find("(i + 1) * BLOCK_K")
    lines.add("")


def _entry(printer: Printer, entry: Read, place: str) -> str:
    """What a list holds at a place, or at each of several."""
    inner = printer.within(printer.names.inner())
    inner.names.known[PLACE] = place
    return inner.text(entry)
