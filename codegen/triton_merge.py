"""The small kernels beside those of decode: one merges the slices of a row, one keeps of a plan what counts."""

from __future__ import annotations

from attndsl.codegen.lines import Lines
from attndsl.decode import DecodePlan

MERGE = "merge_slices"
CHECK = "check_members"
# Slices that the merge reads at once, and entries of a plan that are checked at once.
_MERGED, _CHECKED = 16, 256


def merge_slices(plan: DecodePlan) -> str:
    """The kernel that merges the slices of a row: by their lse, or where nothing is normalised by adding them up."""
    softmax, dim, heads = plan.softmax, plan.spec.v_dim, plan.spec.heads
    width = max(16, 1 << (dim - 1).bit_length())
    padded = f" & (dims[None, :] < {dim})" if width > dim else ""
    lines = Lines()
    lines.add("@triton.jit")
    names = ["part_ptr", *(["part_lse_ptr"] if softmax else []), "out_ptr", *(["lse_ptr"] if softmax else [])]
    names += ["stride_outb", "stride_outh", "stride_outn", "rows", "splits"]
    with lines.block(f"def {MERGE}("):
        lines.add(*(f"{name}," for name in names))
    with lines.block("):"):
        lines.add('"""One row of one head: its slices, merged in order."""')
        if softmax:
            lines.add("LOG2_E: tl.constexpr = 1.4426950408889634")
        lines.add(
            # Divided in 32 bits: in 64 that takes as long as a load.
            "head = tl.program_id(0) // rows",
            "q_row = tl.program_id(0) % rows",
            f"b = head // {heads}",
            f"h = head % {heads}",
            "row_at = tl.program_id(0).to(tl.int64)",
            f"dims = tl.arange(0, {width})",
            f"acc = tl.zeros([{width}], tl.float32)",
        )
        if softmax:
            lines.add("row_max = -1.0e38", "row_sum = 0.0")
        with lines.block(f"for first in range(0, splits, {_MERGED}):"):
            lines.add(
                f"slices = first + tl.arange(0, {_MERGED})",
                f"part_ptrs = part_ptr + (row_at * splits + slices)[:, None] * {dim} + dims[None, :]",
                f"part = tl.load(part_ptrs, mask=(slices < splits)[:, None]{padded}, other=0.0)",
            )
            if softmax:
                lines.add(
                    'lse = tl.load(part_lse_ptr + row_at * splits + slices, mask=slices < splits, other=float("-inf"))',
                    "new_max = tl.maximum(row_max, tl.max(lse, 0))",
                    "weights = tl.exp2(lse - new_max)",
                    "decay = tl.exp2(row_max - new_max)",
                    "row_sum = row_sum * decay + tl.sum(weights, 0)",
                    "row_max = new_max",
                    "acc = acc * decay + tl.sum(part * weights[:, None], 0)",
                )
            else:
                lines.add("acc = acc + tl.sum(part, 0)")
        if softmax:
            lines.add(
                "acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)",
                'lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) / LOG2_E)',
                "tl.store(lse_ptr + row_at, lse)",
            )
        lines.add(
            "out_at = out_ptr + b.to(tl.int64) * stride_outb + h.to(tl.int64) * stride_outh",
            "out_ptrs = out_at + q_row.to(tl.int64) * stride_outn + dims",
            f"tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty){f', mask=dims < {dim}' if width > dim else ''})",
        )
    return lines.text()


def check_members() -> str:
    """The kernel that keeps of a plan what counts: members, each above all before it."""
    lines = Lines()
    lines.add("@triton.jit")
    names = ("plan_ptr", "list_ptr", "stride_planb", "stride_planh", "stride_planr", "stride_planc", "plan_heads")
    with lines.block(f"def {CHECK}("):
        lines.add(*(f"{name}," for name in (*names, "plan_rows", "list_size", "members")))
    with lines.block("):"):
        lines.add(
            '"""One list of a plan: -1 in the place of what is no member, or not above all before it."""',
            "nth = tl.program_id(0).to(tl.int64)",
            "r = nth % plan_rows",
            "h = nth // plan_rows % plan_heads",
            "b = nth // plan_rows // plan_heads",
            "plan_at = plan_ptr + b * stride_planb + h * stride_planh + r * stride_planr",
            "list_at = list_ptr + nth * list_size",
            "highest = tl.full([], -1, tl.int64)",
        )
        with lines.block(f"for first in range(0, list_size, {_CHECKED}):"):
            lines.add(
                f"place = first + tl.arange(0, {_CHECKED})",
                "exists = place < list_size",
                "entry = tl.load(plan_at + place * stride_planc, mask=exists, other=-1).to(tl.int64)",
                "before = tl.load(plan_at + (place - 1) * stride_planc, mask=exists & (place > first), other=-1)",
                "before = tl.maximum(tl.associative_scan(before.to(tl.int64), 0, larger), highest)",
                "counts = (entry > before) & (entry < members)",
                "tl.store(list_at + place, tl.where(counts, entry, -1).to(tl.int32), mask=exists)",
                "highest = tl.maximum(highest, tl.max(entry, 0))",
            )
    return lines.text()
