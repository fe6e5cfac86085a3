"""What a call makes before the kernels that attend, and after: entries of views, plans, output, what is observed."""

from __future__ import annotations

from collections.abc import Iterator

from attndsl.branches import Pool
from attndsl.chosen_entries import ranked
from attndsl.compose import compose
from attndsl.kernel_names import combines
from attndsl.observed import by_members
from attndsl.plan import Spec
from attndsl.program import CallShape, Program
from attndsl.select_plan import why_not_fused
from attndsl.targets import BYTES


def around(program: Program, spec: Spec, shape: CallShape) -> Iterator[str]:
    """A line for each, with the kernel that makes it or why there is none, and the bytes that it has to move."""
    on_cpu, size = spec.target == "cpu", BYTES[spec.dtype]
    composition = compose(program)
    for pooling in () if program.plain else composition.pools:
        count = pooling.pool.entries(shape.k_len)
        nth = composition.pooled.index(pooling.pool) + 1 if isinstance(pooling.pool, Pool) else 0
        kernel = "torch" if on_cpu or not nth else f"`pool{'' if nth == 1 else f'_{nth}'}`, of keys and of values"
        read = shape.k_len if nth else count
        moved = size * shape.batch * shape.kv_heads * (spec.dim + spec.v_dim) * (read + count)
        yield f"{pooling.name}: {count:,} entries by {kernel}; {amount(moved)}B"
    for selection in program.selections:
        reason = why_not_fused(*ranked(program, selection, (spec.heads, spec.kv_heads)), (spec.heads, spec.kv_heads))
        if on_cpu or reason:
            reason = reason or "there is no GPU"
            yield f"{selection.name}: chosen by torch operators, since {reason}"
        else:
            yield f"{selection.name}: chosen by `{selection.name}.select`, which keeps lists of the best"
    if combines(program):
        kernel = "torch, in float32" if on_cpu else "`combine`, which reads each once"
        rows = shape.batch * shape.heads * shape.rows
        moved = size * rows * spec.v_dim * (len(composition.branches) + 1)
        yield f"output: combined by {kernel}; {amount(moved)}B of branches and output"
    for each in program.observations:
        kernel = "torch operators" if by_members(program, each) else f"`{each.name}.observe`"
        kernel = "PyTorch" if on_cpu else kernel
        yield f"{each.name}: observed by {kernel} where a call asks, from q, k and lse once more"


def amount(x: float) -> str:
    """A number with the prefix of its unit: `1.5 G`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.3g} {prefix}"
    return f"{x:g} "
