"""Lists of tiles made by kernels (`list_kernels.py`): where a device would wait for the host to start many operations.

What they make is what `plans.tile_list` and `plans.gathering` define, and these stay for plans that are maps, for wide
plans and for the CPU.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from attndsl.runtime.build import KernelSource, compile_kernel, parameters
from attndsl.runtime.call import device_target
from attndsl.runtime.launcher import Slot, launcher
from attndsl.runtime.load import load_source

# Entries of a row that one program ranks, and of a chunk.
MAX_WIDTH = 128
# Counts that a head may have: of key tiles and kinds, for each chunk.
MAX_COUNTS = 1 << 24


def width_of(entries: int) -> int:
    """Entries of a row as a power of two."""
    return max(2, 1 << max(0, entries - 1).bit_length())


def chunks_of(q_tiles: int, entries: int) -> int:
    """Chunks of query tiles with so many entries each."""
    return -(-q_tiles // (MAX_WIDTH // width_of(entries)))


def by_queries(plan: Tensor, ends: Tensor, sizes: dict[str, int]) -> Tensor:
    """int32 [batch, heads, 3 q_tiles + q_tiles * slots * each]: `plans.tile_list` of query tiles.

    plan: int [batch, heads, classes, slots]. ends: int32 [1 or heads, q_tiles, runs, 4]. sizes: of the parameters.
    """
    batch, heads = plan.shape[:2]
    entries = sizes["slots"] * sizes["each"]
    out = torch.empty(batch, heads, sizes["q_tiles"] * (3 + entries), dtype=torch.int32, device=plan.device)
    given = {"out_ptr": out, "out_head": out.stride(1), **_given(plan, ends, sizes)}
    _launch("list_by_queries", width_of(entries), batch * heads * sizes["q_tiles"], given)
    return out


def by_keys(plan: Tensor, ends: Tensor, sizes: dict[str, int], head: int, codes: int) -> tuple[Tensor, Tensor]:
    """The same by key tiles: int32 [batch, heads, head + entries], of which the first `head` numbers are left open, and
    the places [batch, heads, 2 k_tiles + 1] where groups begin, counted from there. codes: as in `place_by_keys`."""
    batch, heads = plan.shape[:2]
    q_tiles, entries = sizes["q_tiles"], sizes["slots"] * sizes["each"]
    chunks, groups = chunks_of(q_tiles, entries), 2 * sizes["k_tiles"]
    counts = torch.zeros(batch, heads, groups * chunks, dtype=torch.int32, device=plan.device)
    given = {"counts_ptr": counts, "counts_head": counts.stride(1), "chunks": chunks, **_given(plan, ends, sizes)}
    grid = batch * heads * chunks
    _launch("count_by_keys", width_of(entries), grid, given)
    sums = counts.cumsum(-1, dtype=torch.int32)
    out = torch.empty(batch, heads, head + q_tiles * entries, dtype=torch.int32, device=plan.device)
    given |= {"counts_ptr": sums, "out_ptr": out, "out_head": out.stride(1), "begin": head, "codes": codes}
    _launch("place_by_keys", width_of(entries), grid, given)
    places = torch.zeros(batch, heads, groups + 1, dtype=torch.int32, device=plan.device)
    places[..., 1:] = sums[..., chunks - 1 :: chunks]
    return out, places


def _given(plan: Tensor, ends: Tensor, sizes: dict[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {"plan_ptr": plan, "ends_ptr": ends, "heads": plan.shape[1], "classes": plan.shape[2]}
    strides = (0 if size == 1 else stride for size, stride in zip(plan.shape, plan.stride(), strict=True))
    found |= {f"stride_{axis}": stride for axis, stride in zip("bhrc", strides, strict=True)}
    return found | {"ends_head": ends.stride(0) if ends.shape[0] > 1 else 0, "runs": ends.shape[2]} | sizes


def _launch(function: str, width: int, grid: int, given: dict[str, Any]) -> None:
    device = given["plan_ptr"].device
    if grid == 0:
        return
    if device.type != "cuda":
        kernel = getattr(load_source(_text(width), "list_kernels"), function)
        kernel[(grid,)](*(given[name] for name in parameters(_text(width), function)))
        return
    facts = tuple((name, x.dtype if isinstance(x, Tensor) else x) for name, x in given.items())
    launch, names = _ready(function, width, grid, device, facts)
    launch([given[name] for name in names])


@functools.lru_cache(maxsize=1024)
def _ready(function: str, width: int, grid: int, device: torch.device, facts: tuple[tuple[str, Any], ...]) -> Any:
    """A launch of tensors, and their names in order. facts: of each parameter its dtype or its value."""
    from attndsl.runtime.triton_launch import POINTER, shared_cache

    given, names = dict(facts), parameters(_text(width), function)
    types = tuple((name, POINTER[given[name]] if name.endswith("_ptr") else _integer(name)) for name in names)
    source = KernelSource(_text(width), function, types, (), warps=4, stages=1)
    kernel = compile_kernel(source, device_target(device), shared_cache(), whole=False)
    tensors = [name for name in names if name.endswith("_ptr")]
    template = [Slot(tensors.index(name), type) if name in tensors else given[name] for name, type in types]
    return launcher(kernel, grid, device.index, template), tensors


def _integer(name: str) -> str:
    return "i64" if name.startswith("stride_") or name.endswith("_head") else "i32"


@functools.cache
def _text(width: int) -> str:
    text = files("attndsl.runtime").joinpath("list_kernels.py").read_text("utf-8")
    return text.replace("WIDTH: tl.constexpr = 16", f"WIDTH: tl.constexpr = {width}")
