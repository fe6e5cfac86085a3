"""The kernels of pooled views in portable Triton: `pool_tokens` and its backward `spread_entries`.

Each program owns what it writes and adds in one order. Of a maximum or minimum `pick_tokens` says which token it is,
the first of several, so that the backward pass only compares places.
"""

from __future__ import annotations

from attndsl.branches import PoolFunction
from attndsl.codegen.lines import Lines
from attndsl.pooling import PoolPlan

POOL, PICK, SPREAD = "pool_tokens", "pick_tokens", "spread_entries"


def pool_source(plan: PoolPlan) -> str:
    """Text of a Python file with the plan's kernels."""
    stride = f" every {plan.stride}" if plan.stride != plan.size else ""
    extents = "runs of tokens" if plan.told else f"{plan.size} tokens{stride}"
    title = (
        f"# attndsl: {plan.function.value} of {extents}, portable Triton\n#\n"
        f"# dimension {plan.dim}, {plan.dtype.value}, {plan.target}\n\n"
        "import triton\nimport triton.language as tl\n\n\n"
    )
    kernels = [_entries(plan, POOL), *([_entries(plan, PICK)] if plan.picks else []), _spread(plan)]
    return title + "\n\n\n".join(x.rstrip("\n") for x in kernels) + "\n"


def _signature(lines: Lines, plan: PoolPlan, function: str, tensors: str) -> None:
    more = ["lengths"] * plan.ragged + ["first", "end"] * plan.told
    names = [f"{x}_ptr" for x in [*tensors.split(), *["number"] * (plan.told and function == SPREAD), *more]]
    names += [f"stride_x{axis}" for axis in "bhn"] + ["heads", "tokens", "entries"]
    lines.add("@triton.jit")
    with lines.block(f"def {function}("):
        lines.add(*(f"{name}," for name in names))
    lines.add("):")


def _counts(plan: PoolPlan) -> bool:
    """Whether what an entry is depends on how many tokens it has."""
    return plan.function is PoolFunction.MEAN


def _channels(plan: PoolPlan, axes: str) -> str:
    """The condition for channels that exist, empty where all do."""
    return "" if plan.width == plan.dim else f" & (channel < {plan.dim})[{axes}]"


def _prologue(lines: Lines, plan: PoolPlan, owned: str, block: int) -> None:
    lines.add(
        f"blocks = tl.cdiv({owned}, {block})",
        "head = tl.program_id(0) // blocks  # of all batch entries",
        f"first = tl.program_id(0) % blocks * {block}",
        f"channel = tl.arange(0, {plan.width})",
    )
    if plan.ragged:
        lines.add("present = tl.minimum(tl.load(lengths_ptr + head // heads), tokens)  # of the batch entry's tokens")


def _present(plan: PoolPlan) -> str:
    """How many tokens of a batch entry are present."""
    return "present" if plan.ragged else "tokens"


def _count(plan: PoolPlan) -> str:
    """How many tokens of an entry there are, at least 1."""
    if plan.told:
        return "tl.maximum(count, 1)"
    return f"tl.maximum(tl.minimum({_present(plan)} - entry * {plan.stride}, {plan.size}), 1)"


def _extent(body: Lines, exists: str) -> None:
    """The first token of entries, and how many they have, as a call tells."""
    body.add(
        "of_entry = head.to(tl.int64) * entries + entry",
        f"extent = tl.load(first_ptr + of_entry, mask={exists}, other=0)",
        f"count = tl.load(end_ptr + of_entry, mask={exists}, other=0) - extent",
    )


def _entries(plan: PoolPlan, function: str) -> str:
    """The kernel that owns entries: of what they are, or of which token each is."""
    lines, block, chunk, width = Lines(), plan.block, plan.tokens, plan.width
    largest = plan.function is PoolFunction.MAX
    _signature(lines, plan, function, "x pooled" if function == POOL else "x picked")
    body = Lines(indent=1)
    _prologue(body, plan, "entries", block)
    start = "0.0" if not plan.picks else 'float("-inf")' if largest else 'float("inf")'
    body.add(
        f"entry = first + tl.arange(0, {block})",
        "x_at = x_ptr + (head // heads).to(tl.int64) * stride_xb + (head % heads).to(tl.int64) * stride_xh",
        f"found = tl.full([{block}, {width}], {start}, tl.float32)",
    )
    if plan.told:
        _extent(body, "entry < entries")
    if function == PICK:
        body.add(f"place = tl.zeros([{block}, {width}], tl.int32)")
    size, here = (str(plan.size), f"(nth < {plan.size}) & (token < {_present(plan)})")
    token = f"entry[:, None] * {plan.stride}"
    if plan.told:
        size, here, token = "tl.max(count, 0)", "nth < count[:, None]", "extent[:, None]"
    with body.block(f"for begin in range(0, {size}, {chunk}):"):
        body.add(
            f"nth = begin + tl.arange(0, {chunk})[None, :]",
            f"token = {token} + nth",
            f"inside = ({here})[:, :, None]",
            "at = x_at + token[:, :, None].to(tl.int64) * stride_xn + channel[None, None, :]",
            f"x = tl.load(at, mask=inside{_channels(plan, 'None, None, :')}, other={start}).to(tl.float32)",
        )
        if function == PICK:
            reduce, compare = ("max", ">") if largest else ("min", "<")
            body.add(
                f"value, index = tl.{reduce}(x, 1, return_indices=True, return_indices_tie_break_left=True)",
                f"place = tl.where(value {compare} found, begin + index, place)",
                f"found = tl.{reduce}imum(found, value)",
            )
        elif plan.picks:
            reduce = "max" if largest else "min"
            body.add(f"found = tl.{reduce}imum(found, tl.{reduce}(x, 1))")
        else:
            body.add("found += tl.sum(x, 1)")
    if _counts(plan):
        # Past the last entry there is none.
        body.add(f"found = found / {_count(plan)}[:, None].to(tl.float32)")
    if plan.told and plan.picks and function == POOL:
        body.add("found = tl.where((count > 0)[:, None], found, 0.0)")
    if plan.ragged and plan.picks and function == POOL:
        body.add(f"found = tl.where((entry * {plan.stride} < present)[:, None], found, 0.0)")
    name, value = ("pooled", "found.to(pooled_ptr.dtype.element_ty)")
    if function == PICK:
        name, value = ("picked", f"{token} + place")
    body.add(
        f"at = (head.to(tl.int64) * entries + entry[:, None]) * {plan.dim} + channel[None, :]",
        f"tl.store({name}_ptr + at, {value}, mask=(entry < entries)[:, None]{_channels(plan, 'None, :')})",
    )
    return lines.text() + body.text()


def _spread(plan: PoolPlan) -> str:
    """The kernel that owns tokens, and adds what their entries hand on, the last entry first."""
    lines, block = Lines(), plan.token_block
    _signature(lines, plan, SPREAD, "gradient x" + " picked" * plan.picks)
    body = Lines(indent=1)
    _prologue(body, plan, "tokens", block)
    body.add(
        f"token = first + tl.arange(0, {block})",
        f"total = tl.zeros([{block}, {plan.width}], tl.float32)",
    )
    if plan.told:
        body.add("last = tl.load(number_ptr + head.to(tl.int64) * tokens + token, mask=token < tokens, other=-1)")
    with body.block(f"for back in range({plan.covers}):"):
        if plan.told:
            body.add("entry = last - back", "covers = entry >= 0")
            _extent(body, "covers")
            body.add("covers = covers & (token < extent + count)")
        else:
            body.add(
                f"entry = token // {plan.stride} - back",
                f"covers = (entry >= 0) & (entry < entries) & (token < entry * {plan.stride} + {plan.size})"
                + " & (token < present)" * plan.ragged,
            )
        body.add(
            f"at = (head.to(tl.int64) * entries + entry[:, None]) * {plan.dim} + channel[None, :]",
            f"exists = covers[:, None]{_channels(plan, 'None, :')}",
            "share = tl.load(gradient_ptr + at, mask=exists, other=0.0).to(tl.float32)",
        )
        if plan.picks:
            body.add(
                "picked = tl.load(picked_ptr + at, mask=exists, other=-1)",
                "share = tl.where(picked == token[:, None], share, 0.0)",
            )
        if _counts(plan):
            body.add(f"share = share / {_count(plan)}[:, None].to(tl.float32)")
        body.add("total += share")
    body.add(
        "x_at = x_ptr + (head // heads).to(tl.int64) * stride_xb + (head % heads).to(tl.int64) * stride_xh",
        "at = x_at + token[:, None].to(tl.int64) * stride_xn + channel[None, :]",
        f"exists = (token < tokens)[:, None]{_channels(plan, 'None, :')}",
        "tl.store(at, total.to(x_ptr.dtype.element_ty), mask=exists)",
    )
    return lines.text() + body.text()
