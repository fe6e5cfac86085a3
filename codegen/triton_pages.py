"""Kernels over the pages of a cache, in portable Triton: bounds of keys, scores by them, and the choice of pages."""

from __future__ import annotations

from attndsl.codegen.lines import Lines
from attndsl.codegen.prelude_helpers import prelude
from attndsl.codegen.triton_rank import choose_greatest
from attndsl.paging import PagePlan
from attndsl.plan import DType

BOUNDS, SCORES, CHOICE = "bound_pages", "score_pages", "choose_pages"
# Tokens of a page that are loaded at once, and keys of the choice that are compared at once.
_TOKENS, _COMPARED = 64, 8192


def pages_source(plan: PagePlan) -> str:
    """Text of a Python file with the plan's kernels, `bound_pages`, `score_pages` and `choose_pages`."""
    spec = plan.spec
    title = (
        f"# attndsl: pages of {plan.page} tokens, their bounds and the choice of them, portable Triton\n#\n"
        f"# heads {spec.heads}, key heads {spec.kv_heads}, head dimension {spec.dim}, {spec.dtype.value}, {spec.target}"
        f"\n\nimport triton\nimport triton.language as tl\n\n\n"
    )
    helpers = prelude("prelude.py", ["clamp", *(["from_e4m3"] if plan.fp8 else [])])
    return title + "\n\n\n".join(x.rstrip("\n") for x in (helpers, _bounds(plan), _scores(plan), _choice(plan))) + "\n"


def _dims(plan: PagePlan) -> tuple[str, str]:
    """The line that names the elements of a key, padded to a power of two, and the condition for those that exist."""
    dim = plan.spec.dim
    width = max(16, 1 << (dim - 1).bit_length())
    return f"dims = tl.arange(0, {width})", "" if width == dim else f" & (dims < {dim})[None, :]"


def _bounds(plan: PagePlan) -> str:
    kv_heads, dim = plan.spec.kv_heads, plan.spec.dim
    tokens = min(_TOKENS, 1 << (plan.page - 1).bit_length())
    named, exist = _dims(plan)
    value = "from_e4m3(k)" if plan.fp8 else "k.to(tl.float32)"
    lines = Lines()
    lines.add("@triton.jit")
    with lines.block(f"def {BOUNDS}("):
        lines.add(
            "k_ptr,", "k_min_ptr,", "k_max_ptr,", "seq_lens_ptr,", "page_table_ptr,", "stride_kb,", "stride_kh,",
            "stride_kn,", "stride_lens,", "stride_table,", "capacity,", "pages,", "new,", "touched,",
        )  # fmt: skip
    with lines.block("):"):
        lines.add(
            '"""The bounds of one of the pages that hold the last `new` tokens of a sequence, for one key head."""',
            f"PAGE: tl.constexpr = {plan.page}",
            f"g = tl.program_id(0) % {kv_heads}",
            f"nth = tl.program_id(0) // {kv_heads} % touched",
            f"b = tl.program_id(0) // ({kv_heads} * touched)",
            "k_len = clamp(tl.load(seq_lens_ptr + b * stride_lens), 0, capacity)",
            "place = tl.maximum(k_len - new, 0) // PAGE + nth",
            "held = place.to(tl.int64) * PAGE < k_len",
            "page = tl.load(page_table_ptr + b.to(tl.int64) * stride_table + place, mask=held, other=-1).to(tl.int64)",
            "held = held & (page >= 0) & (page < pages)",
            "k_at = k_ptr + page * stride_kb + g.to(tl.int64) * stride_kh",
            named,
            f'low = tl.full([{tokens}, {named.split()[-1].rstrip(")")}], float("inf"), tl.float32)',
            "high = -low",
        )
        with lines.block(f"for first in range(0, PAGE, {tokens}):"):
            lines.add(
                f"token = first + tl.arange(0, {tokens})[:, None]",
                f"present = held & (token < PAGE) & (place * PAGE + token < k_len){exist}",
                "k = tl.load(k_at + token.to(tl.int64) * stride_kn + dims[None, :], mask=present, other=0)",
                f'low = tl.minimum(low, tl.where(present, {value}, float("inf")))',
                f'high = tl.maximum(high, tl.where(present, {value}, float("-inf")))',
            )
        end = "held" if not exist else f"held & (dims < {dim})"
        lines.add(
            f"bound_at = (page * {kv_heads} + g) * {dim} + dims",
            f"tl.store(k_min_ptr + bound_at, tl.min(low, 0).to(k_min_ptr.dtype.element_ty), mask={end})",
            f"tl.store(k_max_ptr + bound_at, tl.max(high, 0).to(k_max_ptr.dtype.element_ty), mask={end})",
        )
    return lines.text()


def _scores(plan: PagePlan) -> str:
    spec, group, shared, scored = plan.spec, plan.group, plan.shared, plan.scored
    named, exist = _dims(plan)
    padded = max(16, 1 << (group - 1).bit_length())
    precision = ', input_precision="ieee"' if spec.dtype is DType.FLOAT32 else ""
    lines = Lines()
    lines.add("@triton.jit")
    with lines.block(f"def {SCORES}("):
        lines.add(
            "q_ptr,", "k_min_ptr,", "k_max_ptr,", "seq_lens_ptr,", "page_table_ptr,", "keys_ptr,", "stride_qb,",
            "stride_qh,", "stride_qn,", "stride_lens,", "stride_table,", "capacity,", "pages,", "rows,", "members,",
            "recent,",
        )  # fmt: skip
    with lines.block("):"):
        lines.add(
            '"""How much a row may get from each of some pages, as integers that order alike; -2**31: is no candidate.',
            "",
            "The product with what bounds a page is a sum of two: of what is positive of q with the largest keys, and",
            'of what is negative with the least."""',
            f"PAGE: tl.constexpr = {plan.page}",
            f"chunks = tl.cdiv(members, {scored})",
            "chunk = tl.program_id(0) % chunks",
            f"g = tl.program_id(0) // chunks % {spec.kv_heads}",
            f"row = tl.program_id(0) // (chunks * {spec.kv_heads}) % rows",
            f"b = tl.program_id(0) // (chunks * {spec.kv_heads}) // rows",
            "k_len = clamp(tl.load(seq_lens_ptr + b * stride_lens), 0, capacity)",
            "q_pos = k_len - rows + row",
            f"member = chunk * {scored} + tl.arange(0, {scored})",
            "candidate = (member < members) & (member.to(tl.int64) * PAGE <= q_pos)",
            "table_at = page_table_ptr + b.to(tl.int64) * stride_table",
            "page = tl.load(table_at + member, mask=candidate, other=-1).to(tl.int64)",
            "candidate = candidate & (page >= 0) & (page < pages)",
            named,
            f"own_head = tl.arange(0, {padded})",
            f"h = g * {group} + own_head",
            "q_at = q_ptr + b.to(tl.int64) * stride_qb + row.to(tl.int64) * stride_qn",
            "q_ptrs = q_at + h[:, None].to(tl.int64) * stride_qh + dims[None, :]",
            f"q = tl.load(q_ptrs, mask=(own_head < {group})[:, None]{exist}, other=0.0)",
            f"bound_at = (page * {spec.kv_heads} + g)[:, None] * {spec.dim} + dims[None, :]",
            f"high = tl.load(k_max_ptr + bound_at, mask=candidate[:, None]{exist}, other=0.0).to(q.dtype)",
            f"low = tl.load(k_min_ptr + bound_at, mask=candidate[:, None]{exist}, other=0.0).to(q.dtype)",
            "zero = tl.zeros_like(q)",
            f"scores = tl.dot(tl.where(q > 0.0, q, zero), tl.trans(high){precision})",
            f"scores = tl.dot(tl.where(q < 0.0, q, zero), tl.trans(low), scores{precision})",
        )
        if shared:
            lines.add("scores = tl.sum(scores, 0)[None, :]")
        lines.add(
            "# A float's bits order like it, once those of negative numbers are turned around. The last pages come",
            "# first.",
            "bits = (scores + 0.0).to(tl.int32, bitcast=True)",
            "keys = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)",
            "keys = tl.where(scores == scores, keys, -2147483648)",
            "keys = tl.where((member > q_pos // PAGE - recent)[None, :], 2147483647, keys)",
            "keys = tl.where(candidate[None, :], keys, -2147483648)",
        )
        if shared:
            lines.add(
                f"list_of = (b.to(tl.int64) * {spec.kv_heads} + g) * rows + row + tl.zeros([1, 1], tl.int64)",
                "tl.store(keys_ptr + list_of * members + member[None, :], keys, mask=(member < members)[None, :])",
            )
        else:
            lines.add(
                f"list_of = (b.to(tl.int64) * {spec.heads} + h[:, None]) * rows + row",
                f"stored = (own_head < {group})[:, None] & (member < members)[None, :]",
                "tl.store(keys_ptr + list_of * members + member[None, :], keys, mask=stored)",
            )
    return lines.text()


def _choice(plan: PagePlan) -> str:
    lines = Lines()
    lines.add("@triton.jit")
    with lines.block(f"def {CHOICE}("):
        lines.add("keys_ptr,", "list_ptr,", "members,", "count,")
    with lines.block("):"):
        lines.add(
            '"""The `count` members of the greatest keys, of equal ones the first, in increasing order; then -1."""',
            "keys_at = keys_ptr + tl.program_id(0).to(tl.int64) * members",
            "list_at = list_ptr + tl.program_id(0).to(tl.int64) * count",
        )
        choose_greatest(lines, _COMPARED, "list_at", "count")
    return lines.text()
