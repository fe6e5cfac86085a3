"""The kernels that find which tiles `skip below` leaves, one for each part of a branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attndsl.left_tiles import TILE, tiles_of_documents
from attndsl.plan import Backend
from attndsl.program import CallShape, Program
from attndsl.runtime.call import call_shape
from attndsl.runtime.cpu import call_values, cpu_function
from attndsl.runtime.cuts import document_ends
from attndsl.runtime.engine import Engine, default_scale
from attndsl.runtime.entries import keys_of
from attndsl.runtime.lasting import table_tensor
from attndsl.runtime.runs import document_blocks
from attndsl.skipping import LeftPlan, left_plans

FUNCTION = "attention_left"


def prepare_left(
    engine: Engine, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None, backend: str,
    aligned: bool,
) -> Callable[..., list[Tensor]]:  # fmt: skip
    """What finds the tiles of a kind of call, as `Engine.left_tiles` returns them."""
    program, spec = engine.program_of(scale), engine.spec_of(q, k, v, inputs, scale)
    # Hopper's own kernels do not skip: the portable one does.
    chosen = engine.choose("auto" if backend == "gluon" else backend, spec, max(q.shape[2], k.shape[2]))
    on_cpu = chosen == "cpu"
    if not on_cpu:
        from attndsl.runtime.triton_launch import loads_for

        spec = replace(spec, loads=loads_for(spec, aligned, k))
    steps = []
    for plan in left_plans(program, replace(spec, backend=Backend.CPU if on_cpu else Backend.TRITON)):
        deriving = engine.deriving(plan.program, q, k, v, inputs)
        step: Callable[..., Tensor]
        if on_cpu:
            step = CpuLeft(plan, engine.generators.cpu_left(plan))
        else:
            text = engine.generators.triton_left(plan)
            step = TritonLeft(plan, text, q, k, v, [*inputs, *deriving.examples], aligned)
        steps.append(deriving.forward(step))

    def find(
        q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None
    ) -> list[Tensor]:
        given = dict(zip((decl.name for decl in program.inputs), inputs, strict=True))
        rows, of_tiles = _tiles(program, q, k, given)
        found = []
        for part, step in zip(program.only.parts, steps, strict=True):
            own = of_tiles
            if own is not None and part.view is not None:
                own = entry_tiles(own, _ids(program, k, given), part.view.stride)
            found.append(step(q, k, v, inputs, args, scale, own))
        if of_tiles is not None:
            # The first tile of keys that a row sees is never dropped. Documents of one tile have no other.
            for left in found:
                left[..., :1] = True
        return [rows, *found]

    return find


def _tiles(program: Program, q: Tensor, k: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The number of each row's tile, and of a packed call the table of its tiles."""
    if program.packed is None:
        return torch.arange(q.shape[2], dtype=torch.int32, device=q.device) // TILE, None
    count = None if program.lengths is None else given[program.lengths].clamp(0, k.shape[2]).expand(k.shape[0])
    return document_tiles(_ids(program, k, given), count, q.shape[2])


def _ids(program: Program, k: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """What tells the documents of a packed call apart, of each token: int [B, keys]."""
    assert program.packed is not None
    return given[program.packed].expand(k.shape[0], k.shape[2])


def entry_tiles(of_tiles: Tensor, ids: Tensor, stride: int) -> Tensor:
    """The tiles of `document_tiles` with entries, one every `stride` tokens of a document, for their keys."""
    if not ids.shape[1]:
        return of_tiles
    low, high, first, end = of_tiles.unbind(-1)
    begin = document_blocks(ids.contiguous(), stride).gather(1, first.clamp(max=ids.shape[1] - 1).to(torch.int64))
    entries = torch.div(end - first + stride - 1, stride, rounding_mode="floor")
    return torch.stack((low, high, begin.to(torch.int32), begin.to(torch.int32) + entries), -1).to(torch.int32)


def document_tiles(ids: Tensor, count: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Of the last `rows` tokens of documents, ids [batch, tokens], the number of each one's tile, int32 [batch, rows],
    and the tiles, int32 [batch, tiles, 4]: the first row and one past the last, the first key of their document and one
    past its last. Of tokens only the first `count` [batch] are present.

    A document of more keys than a tile has begins a tile, and others follow from there. What stands in the last of them
    behind its end are whole documents that share its number, and are no rows of it.
    """
    tokens, most = ids.shape[1], tiles_of_documents(rows)
    if not rows or not tokens:
        nothing = torch.zeros(ids.shape[0], most, 4, dtype=torch.int32, device=ids.device)
        return nothing.new_zeros(ids.shape[0], rows), nothing
    first, end = document_ends(ids, False), document_ends(ids, True)
    if count is not None:
        end = torch.minimum(end, count[:, None].to(torch.int32))
    position = torch.arange(tokens - rows, tokens, dtype=torch.int32, device=ids.device)
    # Rows before the first token are of no document.
    at = position.clamp(min=0)
    first, end = first[:, at], end[:, at]
    begins = ((position - first.clamp(min=tokens - rows)) % TILE == 0) & (end - first > TILE)
    begins[:, 0] = True
    number = (begins.cumsum(1) - 1).to(torch.int32)
    place = torch.arange(most, dtype=torch.int32, device=ids.device).expand(ids.shape[0], -1).contiguous()
    low = torch.searchsorted(number, place)
    high = torch.minimum(torch.searchsorted(number, place, right=True), low + TILE)
    row = low.clamp(max=rows - 1)
    of_first, of_end = first.gather(1, row), end.gather(1, row)
    high = torch.minimum(high, of_end - (tokens - rows))
    return number, torch.stack((low, high, of_first, of_end), -1).to(torch.int32)


@dataclass(frozen=True, slots=True)
class CpuLeft:
    """A generated function."""

    plan: LeftPlan
    source: str

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        of_tiles: Tensor | None,
    ) -> Tensor:  # fmt: skip
        plan, shape = self.plan, call_shape(q, k, v)
        keys, _values = keys_of(plan, k, v, inputs)
        left = torch.zeros(sizes(plan, shape, keys.shape[2]), dtype=torch.bool)
        grouped = (shape.kv_heads, shape.heads // shape.kv_heads)
        scale = default_scale(shape.dim) if scale is None else scale
        cpu_function(self.source, "cpu_left", FUNCTION)(
            q.unflatten(1, grouped), keys, left.unflatten(1, grouped), scale,
            **call_values(plan, shape.k_len, inputs, args, None), **({"of_tiles": of_tiles} if plan.apart else {}),
            **{f"{t.name}_table": table_tensor(t, torch.device("cpu")) for t in plan.tables},
        )  # fmt: skip
        return left


class TritonLeft:
    """The kernel for one kind of call."""

    def __init__(
        self, plan: LeftPlan, text: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool
    ) -> None:
        from attndsl.runtime.triton_launch import prepare

        shape = call_shape(q, k, v)
        self.plan, self.default_scale = plan, default_scale(shape.dim)
        self.sizes = sizes(plan, shape, keys_of(plan, k, v, inputs)[0].shape[2])
        grid = shape.batch * shape.heads * self.sizes[2] if self.sizes[3] else 0
        self.launch: Callable[[Sequence[Any]], None] | None = None
        if grid:
            sources = left_sources(plan, q, k, v, inputs)
            self.launch = prepare(plan, text, FUNCTION, grid, sources, aligned, q.device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        of_tiles: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # Tiles that nothing visits are not written.
        left = torch.zeros(self.sizes, dtype=torch.uint8, device=q.device)
        if self.launch is not None:
            k, v = keys_of(self.plan, k, v, inputs)
            scale = self.default_scale if scale is None else scale
            self.launch((q, k, v, None, None, scale, *inputs, *args, left, of_tiles))
        return left.view(torch.bool)


def left_sources(plan: LeftPlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
    """What each parameter that the kernel may have is given. Only shapes, strides and dtypes are read."""
    from attndsl.runtime.launcher import Slot
    from attndsl.runtime.triton_launch import INPUTS, parameter_sources

    place = INPUTS + len(inputs) + len(plan.program.args)
    _, _, row_tiles, key_tiles = sizes(plan, call_shape(q, k, v), keys_of(plan, k, v, inputs)[0].shape[2])
    own = {"left_ptr": Slot(place, "*u8"), "tiles_ptr": Slot(place + 1, "*i32")}
    return {**parameter_sources(plan, q, k, v, inputs), **own, "row_tiles": row_tiles, "key_tiles": key_tiles}


def sizes(plan: LeftPlan, shape: CallShape, keys: int) -> tuple[int, int, int, int]:
    """[B, Hq, row tiles, key tiles] of a part with so many keys."""
    row_tiles = tiles_of_documents(shape.rows) if plan.apart else -(-shape.rows // TILE)
    return shape.batch, shape.heads, row_tiles, -(-keys // TILE)
