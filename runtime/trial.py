"""A pattern tried on this machine: random tensors, checked against the oracle and timed beside dense attention."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attndsl.blockgraph import block_graph
from attndsl.diagnostics import error
from attndsl.members import Placed, Runs
from attndsl.pairs import allowed, count_pairs, too_dense
from attndsl.parts import parts_of
from attndsl.plans import own_program
from attndsl.program import Axis, CallShape, Dim, InputDecl, On, Permuted, Program, Type, nodes
from attndsl.runtime.call import check_backend, device_target, dim_size
from attndsl.runtime.entries import all_view_places
from attndsl.runtime.reference import reference
from attndsl.runtime.select_op import as_input
from attndsl.skipping import TILE
from attndsl.targets import DTYPE_NAMES, make_spec
from attndsl.tile_sizes import default_tiling

# Length of the call of which every row is checked, and rows of the timed one that are.
CHECKED_LENGTH = 512
CHECKED_ROWS = 64
# Members that a row class of a random plan lists.
PLANNED = 16
# Largest error that is put down to rounding, relative to the largest value (at least 1).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Dense attention is left out where its mask alone takes more bytes.
MAX_MASK = 1 << 30
_MEASURE_S = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """What to try. A field that is None is chosen for the machine.

    n: tokens. args: values of runtime arguments. dense: also time dense attention with the same mask.
    """

    n: int | None = None
    batch: int = 1
    heads: int | None = None
    kv_heads: int | None = None
    dim: int = 64
    dtype: str | None = None
    backend: str = "auto"
    args: Mapping[str, int] = field(default_factory=dict)
    dense: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it.

    inputs: how each declared input was made. pairs: allowed pairs, exactly or nearly; tiles: visited share of all. Of
    several parts both are sums.
    error: largest difference from the oracle over the checked rows; allowed_error: what rounding may explain.
    ms, dense_ms: time of a call, of ours and of dense attention; dense_why: why there is no such time.
    masked: whether dense attention had the same mask. Views and branches are none: then it attends every pair.
    """

    shape: CallShape
    dtype: str
    device: str
    backend: str
    inputs: tuple[tuple[str, str], ...]
    pairs: int | None
    tiles: float | None
    rows_checked: int
    error: float
    allowed_error: float
    ms: float
    dense_ms: float | None
    dense_why: str
    masked: bool

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed_error  # false for NaN

    @property
    def flops(self) -> float | None:
        """Useful operations of a call: those of allowed pairs."""
        return None if self.pairs is None else 2.0 * self.pairs * (self.shape.dim + self.shape.v_dim)


Attend = Callable[..., Any]


def trial(attend: Attend, program: Program, options: Options) -> Trial:
    """Tries a compiled attention. Raises `PatternError` for options that do not go together."""
    device = torch.device("cuda" if torch.cuda.is_available() and options.backend != "cpu" else "cpu")
    dtype = _dtype(options, device)
    check_backend(options.backend)
    heads = options.heads or (4 if device.type == "cpu" else 16)
    n = options.n or (4096 if device.type == "cpu" else 16384)
    shape = CallShape(options.batch, heads, options.kv_heads or heads, n, n, options.dim, options.dim)
    args = {name: options.args.get(name, max(1, shape.k_len // 8)) for name in program.args}
    for name in options.args:
        if name not in program.args:
            raise error("A522", f"`{name}` is not a runtime argument of this attention", help="see its parameters")

    def call(q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = attend(q, k, v, backend=options.backend, **inputs, **args)
        return out

    generator = torch.Generator().manual_seed(options.seed)
    whole = replace(shape, rows=min(CHECKED_LENGTH, shape.rows), k_len=min(CHECKED_LENGTH, shape.k_len))
    checks = [_check_all(attend, call, program, whole, args, dtype, device, generator)]
    q, k, v, inputs = example_call(program, shape, dtype, device, generator)
    with torch.no_grad():
        out = call(q, k, v, inputs)
        given, inputs = inputs, inputs | _plans(attend, program, q, k, inputs, args)
        checks += _check_last(out, program, shape, args, q, k, v, inputs)
        ms = _milliseconds(lambda: call(q, k, v, given), device)
        dense_ms, why = None, "not asked for"
        if options.dense:
            dense_ms, why = _dense(program, shape, args, q, k, v, inputs)
    worst = max(checks, key=lambda check: float("inf") if math.isnan(check[0]) else check[0] / check[1])
    arrays = {name: x.cpu().numpy() for name, x in inputs.items() if not x.is_floating_point()}
    target = device_target(device)
    spec = make_spec(
        target, "cpu" if target == "cpu" else "triton", shape.heads, shape.kv_heads, shape.dim, None,
        str(dtype).removeprefix("torch."),
    )  # fmt: skip
    tiling = default_tiling(spec)
    tiles, pairs = 0, None if too_dense(program, shape) else 0
    for part in parts_of(program).values():
        graph = block_graph(part, shape, tiling.block_q, tiling.block_k, arrays, args)
        tiles += graph.tiles
        if pairs is not None:
            pairs += count_pairs(graph, part, shape, arrays, args).pairs
    every = shape.batch * shape.heads * -(-shape.rows // tiling.block_q) * -(-shape.k_len // tiling.block_k)
    density = tiles / max(1, every)
    return Trial(
        shape, str(dtype).removeprefix("torch."), _device_name(device),
        options.backend if options.backend != "auto" else spec.target.partition(":")[0].replace("cuda", "triton"),
        tuple((decl.name, _said(decl, program)) for decl in own_program(program).inputs), pairs, density,
        sum(check[2] for check in checks), worst[0], worst[1], ms, dense_ms, why, program.plain,
    )  # fmt: skip


def _dtype(options: Options, device: torch.device) -> torch.dtype:
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if name not in DTYPE_NAMES:
        raise error("A502", f"there is no dtype {name!r}", help="one of bfloat16, float16, float32, float64")
    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[name].value)
    return dtype


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device)


# ---------------------------------------------------------------------------------------- inputs


def example_call(
    program: Program, shape: CallShape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Random q, k, v and inputs of a call."""

    def normal(heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, length, dim, generator=generator).to(device, dtype)

    q = normal(shape.heads, shape.rows, shape.dim)
    k, v = (normal(shape.kv_heads, shape.k_len, dim) for dim in (shape.dim, shape.v_dim))
    declared = own_program(program).inputs
    inputs = {decl.name: _example(decl, program, shape, generator).to(device) for decl in declared}
    for i in all_view_places(program):
        # Entries that a call gives are of its dtype, those that it makes no inputs of its own.
        if (name := program.inputs[i].name) in inputs:
            inputs[name] = inputs[name].to(dtype)
    return q, k, v, inputs


def _plans(
    attend: Any, program: Program, q: Tensor, k: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int]
) -> dict[str, Tensor]:
    """What the program's selections choose, as the inputs that plans are: the oracle attends to the same."""
    if not program.selections:
        return {}
    found = attend.plan(q, k, **inputs, **args)
    return {decl.name: as_input(found[decl.name], decl) for decl in program.inputs if decl.name in found}


def _example(decl: InputDecl, program: Program, shape: CallShape, generator: torch.Generator) -> Tensor:
    """A plausible input: what `_said` says."""
    sizes = [dim_size(dim, program, shape) for dim in decl.dims]
    if decl.members is not None:
        # In order, and those that come twice do not count again.
        members = shape.members(decl, program)
        sizes[-1] = min(members, PLANNED)
        return torch.randint(0, max(1, members), sizes, generator=generator, dtype=torch.int32).sort(-1).values
    if decl.type is Type.FLOAT:
        return torch.randn(sizes, generator=generator)
    if decl.type is Type.BOOL:
        return torch.rand(sizes, generator=generator) < 0.5
    if decl.name in _permutations(program):
        return torch.rand(sizes, generator=generator).argsort(-1).to(torch.int32)
    length = sizes[-1] if sizes else 1
    if decl.sorted:
        begins = torch.rand(sizes, generator=generator) < 4 / max(4, length)
        return begins.cumsum(-1).to(torch.int32)
    if _per_token(decl):
        return torch.randint(0, 4, sizes, generator=generator, dtype=torch.int32)
    return torch.randint(1, max(2, shape.k_len + 1), sizes, generator=generator, dtype=torch.int32)


def _said(decl: InputDecl, program: Program) -> str:
    if decl.members is not None:
        return f"a plan of up to {PLANNED} members at random"
    if decl.type is Type.FLOAT:
        return "normally distributed"
    if decl.type is Type.BOOL:
        return "true and false alike"
    if decl.name in _permutations(program):
        return "random permutations"
    if decl.sorted:
        return "about four segments, numbered in order"
    return "0 to 3 at random" if _per_token(decl) else "1 to the number of tokens, at random"


def _per_token(decl: InputDecl) -> bool:
    return any(dim.axis in (Axis.Q, Axis.K) for dim in decl.dims)


def _permutations(program: Program) -> set[str]:
    patterns = (part.pattern for branch in program.branches for part in branch.parts)
    places = [node.place for pattern in patterns for node in nodes(pattern) if isinstance(node, On)]
    members = [selection.members for selection in program.selections]
    members += [x.order for x in members if isinstance(x, Runs)]
    return {x.input for x in (*places, *members) if isinstance(x, Permuted | Placed)}


# ---------------------------------------------------------------------------------------- checks

# Largest error, the largest that rounding explains, and the rows compared.
_Check = tuple[float, float, int]


def _check_all(
    attend: Any, call: Callable[..., Tensor], program: Program, shape: CallShape, args: Mapping[str, int],
    dtype: torch.dtype, device: torch.device, generator: torch.Generator,
) -> _Check:  # fmt: skip
    """Every row of a short call."""
    q, k, v, inputs = example_call(program, shape, dtype, device, generator)
    with torch.no_grad():
        out = call(q, k, v, inputs)
        plans = _plans(attend, program, q, k, inputs, args)
        return _compared(program, out, reference(program, q, k, v, inputs | plans, args))


def _check_last(
    out: Tensor, program: Program, shape: CallShape, args: Mapping[str, int], q: Tensor, k: Tensor, v: Tensor,
    inputs: Mapping[str, Tensor],
) -> list[_Check]:  # fmt: skip
    """The last rows of a call: the oracle takes them for a chunk, which means the same. (Not under `align start`,
    where the first rows would be the chunk and Nq another; nor under `coarsen`, where a row costs the oracle all.)"""
    if program.align_start or too_dense(program, shape):
        return []
    rows = min(CHECKED_ROWS, shape.rows)
    # Which tiles are dropped, and what queries are pooled to, depends on the rows that a call holds: a chunk begins
    # where a tile (of the call's rows) and a class (of positions) do.
    sizes = [branch.queries.size for branch in program.branches if branch.queries is not None]
    together = math.lcm(*sizes, TILE if _skips(program) else 1)
    rows = min(shape.rows, rows + ((shape.k_len if sizes else shape.rows) - rows) % together)
    chunk = {decl.name: _last_rows(inputs[decl.name], decl.dims, rows) for decl in program.inputs}
    exact = reference(program, q[:, :, -rows:], k, v, chunk, args)
    return [_compared(program, out[:, :, -rows:], exact)]


def _skips(program: Program) -> float:
    """The bound below which some branch drops tiles, 0 where none does."""
    return max((branch.skip or 0.0 for branch in program.branches), default=0.0)


def _last_rows(x: Tensor, dims: tuple[Dim, ...], rows: int) -> Tensor:
    for axis, dim in enumerate(dims):
        if dim.axis is Axis.Q and dim.block == 1 and x.shape[axis] > 1:
            x = x.narrow(axis, x.shape[axis] - rows, rows)
    return x


def _compared(program: Program, out: Tensor, exact: Tensor) -> _Check:
    if out.numel() == 0:
        return 0.0, 1.0, 0
    largest = max(1.0, float(exact.abs().max()))
    worst = float((out.double() - exact).abs().max())
    # Rounding may turn a decision about a tile, in which no pair weighs more than the bound.
    tolerance = TOLERANCE[out.dtype] + 2 * TILE * _skips(program)
    return worst, tolerance * largest, out.shape[0] * out.shape[1] * out.shape[2]


# ---------------------------------------------------------------------------------------- timing


def _dense(
    program: Program, shape: CallShape, args: Mapping[str, int], q: Tensor, k: Tensor, v: Tensor,
    inputs: Mapping[str, Tensor],
) -> tuple[float | None, str]:  # fmt: skip
    """Time of dense attention with the pattern as a mask, or why it was not taken; of every pair, and without a mask,
    where views or several branches are none."""
    keys, values = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
    if not program.plain:
        return _milliseconds(lambda: scaled_dot_product_attention(q, keys, values), q.device), ""
    size = shape.batch * shape.heads * shape.rows * shape.k_len
    if size > MAX_MASK:
        return None, f"its mask alone would take {size / 2**30:.1f} GiB"
    if too_dense(program, shape):
        return None, "the oracle makes no mask with `coarsen` at this length"
    arrays = {name: x.cpu().numpy() for name, x in inputs.items() if not x.is_floating_point()}
    mask = torch.empty(shape.batch, shape.heads, shape.rows, shape.k_len, dtype=torch.bool, device=q.device)
    start = shape.first_position(program)
    for low in range(0, shape.rows, 256):
        high = min(low + 256, shape.rows)
        rows = allowed(program, shape, start + np.arange(low, high), np.arange(shape.k_len), arrays, args)
        mask[:, :, low:high] = torch.from_numpy(rows)
    return _milliseconds(lambda: scaled_dot_product_attention(q, keys, values, attn_mask=mask), q.device), ""


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Duration of a call: on the GPU the median, on the CPU, where others compete for the cores, the shortest."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, return_mode="median"))
    call()
    times: list[float] = []
    stop = time.perf_counter() + _MEASURE_S
    while len(times) < 3 or time.perf_counter() < stop:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return 1e3 * min(times)
