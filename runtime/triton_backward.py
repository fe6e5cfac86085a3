"""Launching the generated Triton kernels of the backward pass.

The kernels write the gradients of q, k and v. Of those of learnable inputs they write sums, and for each sum the entry
that it belongs to: here these are added up, in one order. Kernels for inputs that q and k read together follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attndsl.learned import Learned, Over
from attndsl.plan import Backend, BackwardPlan
from attndsl.program import CallShape
from attndsl.runtime.call import call_shape
from attndsl.runtime.dropout import PARAMETERS, Dropout
from attndsl.runtime.engine import Gradients, default_scale
from attndsl.runtime.entries import keys_of
from attndsl.runtime.launcher import Descriptor, Slot
from attndsl.runtime.long_lists import LongLists
from attndsl.runtime.outputs import empty_gradient, empty_output, in_order_of
from attndsl.runtime.sums import Totals
from attndsl.runtime.triton_launch import (
    ELEMENT,
    INPUTS,
    descriptors,
    dimensions,
    parameter_sources,
    prepare,
    together,
    without_memory,
)
from attndsl.tiling import heavy_tiles
from attndsl.view_plans import heads_apart

if TYPE_CHECKING:
    from attndsl.runtime.printing import PrintedBackward

DQ = "attention_dq"
DKDV = "attention_dkdv"
SUM_PARTS = "sum_parts"
# What the kernels of dq and of dk and dv sum.
_SIMPLE = (Over.TILE, Over.KEYS, Over.ROWS)
# Numbers that row sums hold at once, a few times.
_HELD = 1 << 24
# Given a call's values and the gradients of inputs, which it adds to.
Further = Callable[[Sequence[Any], Totals], None]


class TritonBackward:
    """The backward kernels for one kind of call: same shapes, strides, dtypes and alignment."""

    def __init__(
        self, plan: BackwardPlan, dq_text: str, dkdv_text: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
        inputs: Sequence[Tensor], aligned: bool,
    ) -> None:  # fmt: skip
        shape = call_shape(q, k, v)
        self.plan, self.shape = plan, shape
        self.default_scale = default_scale(shape.dim)
        layout = plan.layout
        self.q_tiles = layout.programs("q", plan.tiling.block_q, shape, plan.program)
        grid = self.q_tiles * shape.batch * (shape.heads if plan.tiling.pack == 1 else shape.kv_heads)
        keys = keys_of(plan, k, v, inputs)[0].shape[2]
        key_tiles = layout.programs("k", plan.key_tiling.block_k, replace(shape, k_len=keys), plan.program)
        if plan.tiles_of is not None:
            key_tiles = keys  # How many entries there are only the device knows.
        key_grid = key_tiles * shape.batch * (shape.heads if heads_apart(plan) else shape.kv_heads)
        sources = backward_parameters(plan, q, k, v, inputs, dout)
        self._learned = plan.learned
        self._dq = self._dkdv = self._sum_parts = None
        self._long = LongLists.of(plan, shape, inputs, q.device) if plan.cuts_lists else None
        parts = self._long.programs if self._long else 0

        def of_keys(function: str, programs: int) -> Callable[[Sequence[Any]], None]:
            return prepare(plan.of_keys(), dkdv_text, function, programs, sources, aligned, q.device)

        if grid and key_grid:
            self._dq, self._dkdv, self._sum_parts = together([
                lambda: prepare(plan, dq_text, DQ, grid, sources, aligned, q.device),
                lambda: of_keys(DKDV, key_grid + parts),
                lambda: of_keys(SUM_PARTS, parts) if parts else None,
            ])  # fmt: skip
        elif grid:
            # Without rows the gradients of k and v are 0; without keys there are none.
            self._dq = prepare(plan, dq_text, DQ, grid, sources, aligned, q.device)
        own = not plan.follows or plan.view is not None
        self._clears = own and (self._dkdv is None or not layout.all_keys(shape))

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, dropout: Dropout | None,
    ) -> Gradients:  # fmt: skip
        return InTurn((self,))(dout, dlse, q, k, v, out, lse, inputs, args, scale, dropout)

    def run(self, call: Sequence[Any], dk: Tensor, dv: Tensor, totals: Totals) -> list[Any]:
        """Write the gradients of q, k, v, or where the plan follows others, add to them; add those of inputs.

        call: what the kernels take, from q to row_lse; dk and dv are among it. Returns it with the sums of inputs.
        """
        given, sums = [*call], {}
        for n, x in enumerate(self._learned):
            if x.over in _SIMPLE:
                sums[n] = self._empty_sums(x, dk.device)
            given += sums.get(n, (None, None))
        given += self._long(call) if self._long else ()
        if self._clears:
            dk.zero_()
            dv.zero_()
        if self._dq is not None:
            self._dq(given)
        if self._dkdv is not None:
            self._dkdv(given)
        if self._sum_parts is not None:
            self._sum_parts(given)
        self._add(totals, sums)
        return given

    def _empty_sums(self, x: Learned, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for the sums of a read, [batch * heads, tiles, rows or keys], and for the entries they belong to."""
        heads = self.shape.batch * self.shape.heads
        size = {Over.TILE: self.q_tiles, Over.KEYS: self.shape.rows, Over.ROWS: self.shape.k_len}[x.over]
        places = heads if x.over is Over.TILE else heads * size
        # In a layout some programs have no tokens, and some tokens no program.
        make = torch.empty if self.plan.layout.plain else torch.zeros
        return make(heads, size, dtype=torch.float32, device=device), make(places, dtype=torch.int64, device=device)

    def _add(self, totals: Totals, sums: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Add the sums of dq's and dkdv's kernels to the gradients."""
        for n, (values, places) in sums.items():
            x = self._learned[n]
            if (self._dkdv if x.over is Over.ROWS else self._dq) is None:
                continue  # No kernel ran, and nothing was summed.
            totals.add(x.read.input, values.double().sum(1) if x.over is Over.TILE else values, places)


@dataclass(frozen=True, slots=True)
class InTurn:
    """The backward kernels of a program's pieces. Each but the first adds to the gradients of those before it.

    `further`: kernels that add to the gradients of inputs afterwards, those of the whole pattern.
    """

    pieces: tuple[TritonBackward, ...]
    further: tuple[Further, ...] = ()

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, dropout: Dropout | None,
    ) -> Gradients:  # fmt: skip
        first = self.pieces[0]
        plan, shape = first.plan, first.shape
        dq, dk, dv = map(empty_gradient, (q, k, v))
        out, lse = in_order_of(q, out), lse.contiguous()
        d_lse = None if dlse is None else dlse.contiguous()
        if not plan.layout.all_rows(shape, plan.program):
            dq.zero_()
        heads = shape.batch * shape.heads
        delta = row_lse = None
        if plan.softmax:
            room = (heads, stride := row_stride(shape.rows)), (stride, 1)
            delta, row_lse = lse.new_empty_strided(*room), lse.new_empty_strided(*room)
        scale = first.default_scale if scale is None else scale
        drops = dropout.values() if dropout else ()
        call = (q, k, v, out, lse, scale, *inputs, *args, *drops, dout, d_lse, dq, dk, dv, delta, row_lse)
        totals = Totals(plan.program, shape, q.device)
        shares = plan.shares
        if shares is not None:
            # A member that no row visits has no gradient.
            kept = members_kept(plan, shape, q.device)
            call = (*call, *kept.values())
        given = []
        for piece in self.pieces:
            view = piece.plan.view
            if view is None:
                given.append(piece.run(call, dk, dv, totals))
                continue
            entries = keys_of(piece.plan, k, v, inputs)
            d_keys, d_values = (_entry_gradient(piece.plan, x) for x in entries)
            own = (q, *entries, *call[3:-4], d_keys, d_values, delta, row_lse)
            given.append(piece.run(own, d_keys, d_values, totals))
            for name, x in ((view.keys, d_keys), (view.values, d_values)):
                totals.add_whole(name, x.unflatten(1, (shape.kv_heads, -1)).sum(2) if heads_apart(piece.plan) else x)
        if all(piece.plan.view is not None for piece in self.pieces):
            # No piece wrote them.
            dk.zero_()
            dv.zero_()
        if shares is not None and shares.given is not None:
            totals.add_whole(shares.given.input, kept["d_shares"])
        if plan.votes is not None:
            totals.add_whole(plan.votes.lse.input, -row_sums(out, dout))
            if plan.votes.learns:
                totals.add_whole(plan.votes.keys, kept["d_entries"])
        for kernel in self.further:
            kernel(given[0], totals)
        return dq, dk, dv, totals.gradients(inputs, [x.read.input for x in plan.learned])


def prepare_backward(
    kernels: PrintedBackward, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool
) -> Callable[..., Gradients]:
    """The launch of a kind of call."""
    from attndsl.runtime.triton_learned import DiagonalSums, PairSums

    further: list[Callable[[], Further]] = []
    if kernels.diagonals is not None:
        plan, text = kernels.diagonals
        further.append(functools.partial(DiagonalSums, plan, text, dout, q, k, v, inputs, aligned))
    if kernels.pairs is not None:
        plan, texts = kernels.pairs
        for n, text in texts.items():
            further.append(functools.partial(PairSums, plan, text, n, dout, q, k, v, inputs, aligned))
    if kernels.pieces[0][0].spec.backend is Backend.GLUON:
        from attndsl.runtime.gluon_backward import GluonBackward

        (kernel,) = kernels.pieces
        return GluonBackward(*kernel, dout, q, k, v, inputs, aligned)
    from attndsl.runtime.triton_gathered import GatheredBackward

    pieces: list[Callable[[], TritonBackward]] = [
        functools.partial(
            TritonBackward if plan.gathered is None else GatheredBackward, plan, of_q, of_keys, dout, q, k, v, inputs,
            aligned,
        )
        for plan, of_q, of_keys in kernels.pieces
    ]  # fmt: skip
    return InTurn(tuple(together(pieces)), tuple(together(further)))


def members_kept(plan: BackwardPlan, shape: CallShape, device: torch.device) -> dict[str, Tensor]:
    """What the kernels of two levels keep of members, for that of dk and dv or as gradients, float32. A member that no
    row visits has no gradient."""
    found: dict[str, tuple[int, ...]] = {}
    if plan.shares is None:
        return {}
    members = -(-shape.k_len // plan.tiling.block_k)
    if plan.shares.kept(plan.tiling.strip):
        found["d_shares"] = (shape.batch, shape.heads, shape.rows, members)
    if plan.tiling.strip:
        found["member_lse"] = found["d_shares"]
    if plan.votes is not None and plan.votes.learns:
        found["d_entries"] = (shape.batch, shape.kv_heads, members, shape.dim)
    return {name: torch.zeros(size, dtype=torch.float32, device=device) for name, size in found.items()}


def row_sums(out: Tensor, dout: Tensor) -> Tensor:
    """The sums of out * dout over rows, float32: some heads at a time, so that little is held in float32."""
    found = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    heads = max(1, _HELD // max(1, out.shape[2] * out.shape[3]))
    for x, y, sums in zip(out, dout, found, strict=True):
        for low in range(0, out.shape[1], heads):
            own = slice(low, low + heads)
            sums[own] = (x[own].float() * y[own]).sum(2)
    return found


def _entry_gradient(plan: BackwardPlan, x: Tensor) -> Tensor:
    """Room for the gradient of keys or values x [B, Hkv, keys, D] as the kernel writes it."""
    if not heads_apart(plan):
        return empty_gradient(x)
    batch, _, keys, dim = x.shape
    return x.new_empty(batch, plan.spec.heads, keys, dim, dtype=torch.float32)


def row_stride(rows: int) -> int:
    """Entries from one head's rows to the next's in what the kernels keep of each row: tensor copies want 16 bytes."""
    return -(-rows // 4) * 4


def backward_parameters(
    plan: BackwardPlan, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], dout: Tensor | None = None
) -> Mapping[str, Any]:
    """What each parameter that the kernels may have is given. Only shapes, strides and dtypes are read.

    dout: default one that is dense, in the memory order of q.
    """
    shape, found = call_shape(q, k, v), dict(parameter_sources(plan, q, k, v, inputs))
    k, v = keys_of(plan, k, v, inputs)
    first = INPUTS + len(inputs) + len(plan.program.args) + (len(PARAMETERS) if plan.spec.dropout else 0)
    element, real = f"*{ELEMENT[plan.spec.dtype]}", "*fp32"
    of_keys = real if heads_apart(plan) else element
    types = {
        "dout": element, "d_lse": real, "dq": element, "dk": of_keys, "dv": of_keys, "delta": real, "row_lse": real,
    }  # fmt: skip
    types |= dict.fromkeys(members_kept(plan, shape, torch.device("meta")), real)
    for n in range(len(plan.learned)):
        types |= {f"sum_{n}": real, f"at_{n}": "*i64"}
    if plan.cuts_lists:
        found |= LongLists.of(plan, shape, inputs, q.device).sizes
        types |= {"parts": "*i32", "part_sums": real}
    if plan.gathered is not None:
        types["part"] = real
    found |= {f"{name}_ptr": Slot(first + i, type) for i, (name, type) in enumerate(types.items())}
    q, k, v = map(without_memory, (q, k, v))
    dout = empty_output(q, shape)[0] if dout is None else dout
    found |= {"heavy": heavy_tiles(plan, shape), "row_stride": row_stride(shape.rows)}
    seen = dimensions(plan, "q", plan.key_tiling.block_q)
    for i, name in enumerate(types):
        if name in ("delta", "row_lse"):
            size = (shape.batch * shape.heads, *seen.shape(shape.rows))
            # Apart, the rows of a residue lie one after another.
            steps = (shape.rows // seen.unit, 1) if plan.rows_apart else seen.steps
            strides, block = (row_stride(shape.rows), *steps), (1, *seen.tile)
            found[f"{name}_desc"] = Descriptor(first + i, size, strides, block, f"tensordesc<fp32{list(block)}>")
    # The kernel of dk and dv loops over tiles of q and dout; that of dq over those of k and v.
    for index, name, x in ((0, "q", q), (first, "dout", dout)):
        found |= descriptors(plan, "q", name, index, x, plan.key_tiling.block_q)
    dq, dk, dv = empty_gradient(q), _entry_gradient(plan, k), _entry_gradient(plan, v)
    for name, x in (("dout", dout), ("dq", dq), ("dk", dk), ("dv", dv)):
        found |= {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}
    return found


__all__ = ["InTurn", "TritonBackward", "backward_parameters", "prepare_backward"]
