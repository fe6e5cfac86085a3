"""The kernel that keeps entries of a cache up to date, in portable Triton."""

from __future__ import annotations

from attndsl.codegen.lines import Lines
from attndsl.codegen.prelude_helpers import prelude
from attndsl.keeping import KeepPlan
from attndsl.selection import Pool

UPDATE = "update_entries"


def keep_source(plan: KeepPlan) -> str:
    """Text of a Python file with the plan's kernel, `update_entries`."""
    stride = f" every {plan.stride}" if plan.stride != plan.size else ""
    where = "contiguous" if plan.page is None else f"in pages of {plan.page}"
    title = (
        f"# attndsl: {plan.function.value} of {plan.size} tokens{stride}, kept up to date, portable Triton\n#\n"
        f"# a cache {where}, dimension {plan.dim}, {plan.dtype.value}, {plan.target}\n\n"
        "import triton\nimport triton.language as tl\n\n\n"
    )
    return title + prelude("prelude.py", ["clamp", *["from_e4m3"] * plan.fp8]).rstrip("\n") + "\n\n\n" + _update(plan)


def _update(plan: KeepPlan) -> str:
    lines, paged = Lines(), plan.page is not None
    padded = "" if plan.width == plan.dim else f" & (channel < {plan.dim})"
    lines.add("@triton.jit")
    names = ["x_ptr", "entries_ptr", "seq_lens_ptr", *["page_table_ptr"] * paged, *["scale_ptr"] * plan.scaled]
    names += [f"stride_{x}{axis}" for x in ("x", "entries") for axis in "bhn"]
    names += ["stride_lens", *(["stride_table", "pages"] if paged else []), *["stride_scale"] * plan.scaled]
    names += ["capacity", "heads", "new", "touched"]
    with lines.block(f"def {UPDATE}("):
        lines.add(*(f"{name}," for name in names))
    with lines.block("):"):
        lines.add(
            '"""One of the entries that the last `new` tokens of a sequence belong to, for one key head, of all tokens',
            'that it has."""',
            "h = tl.program_id(0) % heads",
            "nth = tl.program_id(0) // heads % touched",
            "b = tl.program_id(0) // heads // touched",
            "k_len = clamp(tl.load(seq_lens_ptr + b * stride_lens), 0, capacity)",
            f"before = tl.maximum(k_len - new, 0) - {plan.size}",
            f"entry = tl.where(before < 0, 0, before // {plan.stride} + 1) + nth",
            f"exists = entry < tl.cdiv(k_len, {plan.stride})",
            f"channel = tl.arange(0, {plan.width})",
        )
        if paged:
            lines.add("table_at = page_table_ptr + b.to(tl.int64) * stride_table")
            lines.add("x_at = x_ptr + h.to(tl.int64) * stride_xh")
        else:
            lines.add("x_at = x_ptr + b.to(tl.int64) * stride_xb + h.to(tl.int64) * stride_xh")
        if plan.scaled:
            lines.add("scale = tl.load(scale_ptr + h * stride_scale).to(tl.float32)")
        _pool(plan, lines, padded)
        lines.add(
            "entries_at = entries_ptr + b.to(tl.int64) * stride_entriesb + h.to(tl.int64) * stride_entriesh",
            "entries_at += entry.to(tl.int64) * stride_entriesn",
            f"tl.store(entries_at + channel, found.to(entries_ptr.dtype.element_ty), mask=exists{padded})",
        )
    return lines.text()


def _pool(plan: KeepPlan, lines: Lines, padded: str) -> None:
    """`found`, what the entry is."""
    match plan.function:
        case Pool.FIRST | Pool.LAST:
            last = f"tl.minimum(entry * {plan.stride} + {plan.size}, k_len) - 1"
            lines.add(f"token = {f'entry * {plan.stride}' if plan.function is Pool.FIRST else last}")
            _find(plan, lines, "exists")
            lines.add(f"found = {_loaded(plan, 'at + channel', f'present{padded}', '0.0')}")
            return
        case Pool.MAX | Pool.MIN:
            sign = "-" if plan.function is Pool.MAX else ""
            start, reduce = f'float("{sign}inf")', "max" if plan.function is Pool.MAX else "min"
            step = f"found = tl.{reduce}imum(found, tl.{reduce}(x, 0))"
        case Pool.MEAN | Pool.SUM:
            start, step = "0.0", "found += tl.sum(x, 0)"
    lines.add(f"found = tl.full([{plan.width}], {start}, tl.float32)", "count = tl.zeros([], tl.int32)")
    columns = f" & (channel < {plan.dim})[None, :]" if padded else ""
    with lines.block(f"for first in range(0, {plan.size}, {plan.tokens}):"):
        lines.add(f"place = first + tl.arange(0, {plan.tokens})", f"token = entry * {plan.stride} + place")
        _find(plan, lines, f"exists & (place < {plan.size}) & (token < k_len)")
        there = f"present[:, None]{columns}"
        lines.add(
            f"x = {_loaded(plan, 'at[:, None] + channel[None, :]', there, start)}",
            step,
            "count += tl.sum(present.to(tl.int32), 0)",
        )
    lines.add("# Of tokens whose pages are gone nothing is left.")
    if plan.function is Pool.MEAN:
        lines.add("found = found / tl.maximum(count, 1).to(tl.float32)")
    elif plan.function is not Pool.SUM:
        lines.add("found = tl.where(count > 0, found, 0.0)")


def _loaded(plan: KeepPlan, at: str, there: str, other: str) -> str:
    """The numbers at some places, float32, and `other` where there are none."""
    if not plan.fp8:
        return f"tl.load({at}, mask={there}, other={other}).to(tl.float32)"
    scaled = " * scale" if plan.scaled else ""
    return f"tl.where({there}, from_e4m3(tl.load({at}, mask={there}, other=0)).to(tl.float32){scaled}, {other})"


def _find(plan: KeepPlan, lines: Lines, condition: str) -> None:
    """`at`, where tokens lie, and `present`, whether they are there: a page that does not exist is not read."""
    if plan.page is None:
        lines.add(f"present = {condition}", "at = x_at + token.to(tl.int64) * stride_xn")
        return
    lines.add(
        f"page = tl.load(table_at + token // {plan.page}, mask={condition}, other=-1).to(tl.int64)",
        "present = (page >= 0) & (page < pages)",
        f"at = x_at + page * stride_xb + (token % {plan.page}).to(tl.int64) * stride_xn",
    )
