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
    title = (
        f"# attndsl: {plan.function.value} of {plan.size} tokens{stride}, portable Triton\n#\n"
        f"# dimension {plan.dim}, {plan.dtype.value}, {plan.target}\n\n"
        "import triton\nimport triton.language as tl\n\n\n"
    )
    kernels = [_entries(plan, POOL), *([_entries(plan, PICK)] if plan.picks else []), _spread(plan)]
    return title + "\n\n\n".join(x.rstrip("\n") for x in kernels) + "\n"


def _signature(lines: Lines, plan: PoolPlan, function: str, tensors: str) -> None:
    names = [f"{x}_ptr" for x in [*tensors.split(), *(["lengths"] if plan.ragged else [])]]
    names += [f"stride_x{axis}" for axis in "bhn"] + ["heads", "tokens", "entries"]
    lines.add("@triton.jit")
    with lines.block(f"def {function}("):
        lines.add(*(f"{name}," for name in names))
    lines.add("):")


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
    if function == PICK:
        body.add(f"place = tl.zeros([{block}, {width}], tl.int32)")
    with body.block(f"for begin in range(0, {plan.size}, {chunk}):"):
        body.add(
            f"nth = begin + tl.arange(0, {chunk})[None, :]",
            f"token = entry[:, None] * {plan.stride} + nth",
            f"inside = ((nth < {plan.size}) & (token < {_present(plan)}))[:, :, None]",
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
    if plan.function is PoolFunction.MEAN:
        # Past the last entry there is none.
        count = f"tl.maximum(tl.minimum({_present(plan)} - entry * {plan.stride}, {plan.size}), 1)"
        body.add(f"found = found / {count}[:, None].to(tl.float32)")
    if plan.ragged and plan.picks and function == POOL:
        body.add(f"found = tl.where((entry * {plan.stride} < present)[:, None], found, 0.0)")
    name, value = ("pooled", "found.to(pooled_ptr.dtype.element_ty)")
    if function == PICK:
        name, value = ("picked", f"entry[:, None] * {plan.stride} + place")
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
    with body.block(f"for back in range({plan.covers}):"):
        body.add(
            f"entry = token // {plan.stride} - back",
            f"covers = (entry >= 0) & (entry < entries) & (token < entry * {plan.stride} + {plan.size})"
            + " & (token < present)" * plan.ragged,
            f"at = (head.to(tl.int64) * entries + entry[:, None]) * {plan.dim} + channel[None, :]",
            f"exists = covers[:, None]{_channels(plan, 'None, :')}",
            "share = tl.load(gradient_ptr + at, mask=exists, other=0.0).to(tl.float32)",
        )
        if plan.picks:
            body.add(
                "picked = tl.load(picked_ptr + at, mask=exists, other=-1)",
                "share = tl.where(picked == token[:, None], share, 0.0)",
            )
        if plan.function is PoolFunction.MEAN:
            count = f"tl.maximum(tl.minimum({_present(plan)} - entry * {plan.stride}, {plan.size}), 1)"
            body.add(f"share = share / {count}[:, None].to(tl.float32)")
        body.add("total += share")
    body.add(
        "x_at = x_ptr + (head // heads).to(tl.int64) * stride_xb + (head % heads).to(tl.int64) * stride_xh",
        "at = x_at + token[:, None].to(tl.int64) * stride_xn + channel[None, :]",
        f"exists = (token < tokens)[:, None]{_channels(plan, 'None, :')}",
        "tl.store(at, total.to(x_ptr.dtype.element_ty), mask=exists)",
    )
    return lines.text() + body.text()
