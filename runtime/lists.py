"""Lists of tiles made by kernels (`list_kernels.py`, of maps `map_kernels.py`): where a device would wait for the host
to start many operations, or hold arrays of all pairs of tiles.

What they make is what `plans.listed` makes by torch, which stays for wide plans, for marks and for the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.resources import files
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.runtime.device_kernels import device_kernel

# A list of a plan's data, or of another with its sizes and strides.
Maker: TypeAlias = Callable[[Tensor], Tensor]
# Entries of a row that one program ranks, and of a chunk.
MAX_WIDTH = 128
# In the place of a width, for kernels of maps.
_MAP = 0
# Chunks of a head: with more of them for more tokens, counts of each group in each would grow as their square.
MAX_CHUNKS = 512
# Counts that a head may have: of key tiles and kinds, for each chunk.
MAX_COUNTS = 1 << 24
# Numbers that torch adds up in one row: it gives a row to one block of threads.
LONG = 1 << 15


def width_of(entries: int) -> int:
    """Entries of a row as a power of two."""
    return max(2, 1 << max(0, entries - 1).bit_length())


def chunks_of(q_tiles: int, entries: int) -> tuple[int, int]:
    """Chunks of query tiles with so many entries each, and steps in which a program goes over its own."""
    steps = -(-q_tiles // (MAX_WIDTH // width_of(entries)))
    each = max(1, -(-steps // MAX_CHUNKS))
    return -(-steps // each), each


def sums_of(counts: Tensor, chunks: int) -> Tensor:
    """The sums of the counts before each, and of all, int32 [batch, heads, groups * chunks + 1]: where that is long,
    first of each group."""
    if counts.shape[-1] <= LONG:
        return pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))
    sums = counts.unflatten(-1, (-1, chunks)).cumsum(-1, dtype=torch.int32)
    of_groups = sums[..., -1:].clone()
    sums += of_groups.cumsum(-2, dtype=torch.int32) - of_groups
    return pad(sums.flatten(-2), (1, 0))


def by_queries(plan: Tensor, ends: Tensor, sizes: dict[str, int]) -> Maker:
    """Makes int32 [batch, heads, 3 q_tiles + q_tiles * slots * each], the lists of query tiles, of plans like `plan`.

    plan: int [batch, heads, classes, slots]. ends: int32 [1 or batch, 1 or heads, q_tiles, runs, 4]. sizes: of the
    parameters.
    """
    batch, heads = plan.shape[:2]
    entries = sizes["slots"] * sizes["each"]
    size = (batch, heads, sizes["q_tiles"] * (3 + entries))
    given = {"out_ptr": torch.int32, "out_head": size[2], **_given(plan, ends, sizes)}
    launch = _ready("list_by_queries", width_of(entries), batch * heads * sizes["q_tiles"], plan.device, given)

    def make(plan: Tensor) -> Tensor:
        out = torch.empty(size, dtype=torch.int32, device=plan.device)
        launch(plan_ptr=plan, ends_ptr=ends, out_ptr=out)
        return out

    return make


def by_keys(plan: Tensor, ends: Tensor, sizes: dict[str, int], head: int, codes: int) -> Maker:
    """Makes the lists of key tiles, int32 [batch, heads, head + entries]: three places for each key tile, counted from
    the beginning; up to `head` numbers left open; the entries. codes: as in `place_by_keys`."""
    batch, heads = plan.shape[:2]
    q_tiles, k_tiles, entries = sizes["q_tiles"], sizes["k_tiles"], sizes["slots"] * sizes["each"]
    (chunks, steps), width = chunks_of(q_tiles, entries), width_of(entries)
    counted, size = (batch, heads, 2 * k_tiles * chunks), (batch, heads, head + q_tiles * entries)
    given: dict[str, Any] = {"counts_ptr": torch.int32, "counts_head": counted[2], "chunks": chunks, "steps": steps}
    given |= _given(plan, ends, sizes)
    count = _ready("count_by_keys", width, batch * heads * chunks, plan.device, given)
    given = given | {"counts_head": counted[2] + 1, **_placing(size[2], k_tiles, head, codes)}
    heading = _ready("head_by_keys", width, batch * heads * given["blocks"], plan.device, given)
    place = _ready("place_by_keys", width, batch * heads * chunks, plan.device, given)

    def make(plan: Tensor) -> Tensor:
        counts = torch.zeros(counted, dtype=torch.int32, device=plan.device)
        count(plan_ptr=plan, ends_ptr=ends, counts_ptr=counts)
        sums = sums_of(counts, chunks)
        out = torch.empty(size, dtype=torch.int32, device=plan.device)
        # In this order: the second adds to the sums.
        heading(counts_ptr=sums, out_ptr=out)
        place(plan_ptr=plan, ends_ptr=ends, counts_ptr=sums, out_ptr=out)
        return out

    return make


def map_by_queries(plan: Tensor, ends: Tensor, sizes: dict[str, int], reading: dict[str, int]) -> Maker:
    """As `by_queries`, of a map: uint8 [batch, heads, classes, members]. reading: how its bytes are to be read."""
    batch, heads = plan.shape[:2]
    entries = sizes["slots"] * sizes["each"]
    size = (batch, heads, sizes["q_tiles"] * (3 + entries))
    given = {"out_ptr": torch.int32, "out_head": size[2], "entries": entries, **_given(plan, ends, sizes | reading)}
    launch = _ready("list_map_by_queries", _MAP, batch * heads * sizes["q_tiles"], plan.device, given)

    def make(plan: Tensor) -> Tensor:
        out = torch.empty(size, dtype=torch.int32, device=plan.device)
        launch(map_ptr=plan, ends_ptr=ends, out_ptr=out)
        return out

    return make


def map_by_keys(
    plan: Tensor, ends: Tensor, sizes: dict[str, int], reading: dict[str, int], head: int, codes: int
) -> Maker:
    """As `by_keys`, of a map; a code's second part is the key tile."""
    batch, heads = plan.shape[:2]
    q_tiles, k_tiles = sizes["q_tiles"], sizes["k_tiles"]
    chunks = map_chunks_of(q_tiles)
    counted = (batch, heads, 2 * k_tiles * chunks)
    size = (batch, heads, head + q_tiles * sizes["slots"] * sizes["each"])
    given: dict[str, Any] = {"counts_ptr": torch.int32, "counts_head": counted[2], "chunks": chunks}
    given |= _given(plan, ends, sizes | reading)
    grid = batch * heads * chunks * -(-k_tiles // 16)
    count = _ready("count_map_by_keys", _MAP, grid, plan.device, given)
    given = given | {"counts_head": counted[2] + 1, **_placing(size[2], k_tiles, head, codes)}
    place = _ready("place_map_by_keys", _MAP, grid, plan.device, given)
    heading = _ready("head_by_keys", MAX_WIDTH, batch * heads * -(-k_tiles // 128), plan.device, given)

    def make(plan: Tensor) -> Tensor:
        counts = torch.empty(counted, dtype=torch.int32, device=plan.device)
        count(map_ptr=plan, ends_ptr=ends, counts_ptr=counts)
        sums = sums_of(counts, chunks)
        out = torch.empty(size, dtype=torch.int32, device=plan.device)
        place(map_ptr=plan, ends_ptr=ends, counts_ptr=sums, out_ptr=out)
        heading(counts_ptr=sums, out_ptr=out)
        return out

    return make


def cut(lists: Tensor, device: torch.device, tiles: int, longest: int, parts: int) -> Maker:
    """Makes int32 [batch * heads, parts, 4] of lists like these, each in a row of its own that begins with three places
    for each of `tiles` of them: the parts of those that have more than `longest` entries (`list_kernels.cut_lists`).

    lists: int32 [batch, heads, n], either of which may be expanded.
    """
    size = (lists.shape[0] * lists.shape[1], parts, 4)
    given = {
        "list_ptr": torch.int32, "list_batch": lists.stride(0), "list_head": lists.stride(1), "parts_ptr": torch.int32,
        "heads": lists.shape[1], "tiles": tiles, "longest": longest, "parts": parts,
    }  # fmt: skip
    launch = _ready("cut_lists", MAX_WIDTH, size[0], device, given)

    def make(lists: Tensor) -> Tensor:
        found = torch.empty(size, dtype=torch.int32, device=device)
        launch(list_ptr=lists, parts_ptr=found)
        return found

    return make


def map_chunks_of(q_tiles: int) -> int:
    """Chunks of query tiles of a map."""
    return -(-q_tiles // 128)


def _given(plan: Tensor, ends: Tensor, sizes: dict[str, int]) -> dict[str, Any]:
    """What parameters are given: of tensors the dtype."""
    found: dict[str, Any] = {"plan_ptr": plan.dtype, "map_ptr": plan.dtype, "ends_ptr": torch.int32}
    found |= {"heads": plan.shape[1], "classes": plan.shape[2]}
    strides = (0 if size == 1 else stride for size, stride in zip(plan.shape, plan.stride(), strict=True))
    found |= {f"stride_{axis}": stride for axis, stride in zip("bhrc", strides, strict=True)}
    lead = (0 if size == 1 else stride for size, stride in zip(ends.shape[:2], ends.stride()[:2], strict=True))
    found |= dict(zip(("ends_batch", "ends_head"), lead, strict=True))
    return found | {"runs": ends.shape[3]} | sizes


def _placing(size: int, k_tiles: int, head: int, codes: int) -> dict[str, Any]:
    """What kernels are given that write entries of key tiles, `size` numbers a head."""
    return {
        "out_ptr": torch.int32, "out_head": size, "begin": head, "codes": codes, "blocks": -(-k_tiles // 128),
    }  # fmt: skip


def _ready(function: str, width: int, grid: int, device: torch.device, given: dict[str, Any]) -> Callable[..., None]:
    return device_kernel(_text(width), function, grid, device, given)


@functools.cache
def _text(width: int) -> str:
    name = "list_kernels.py" if width else "map_kernels.py"
    text = files("attndsl.runtime").joinpath(name).read_text("utf-8")
    return text.replace("WIDTH: tl.constexpr = 16", f"WIDTH: tl.constexpr = {width}")
