"""Launches around which a call's tokens are copied into the order of unsorted data: see `attndsl.copying`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attndsl import copying
from attndsl.one_pass import prefers_two_passes
from attndsl.permuting import PermutedPiece
from attndsl.plan import Backend, BackwardPlan, Printed, Spec
from attndsl.program import Axis, InputDecl, Program
from attndsl.runtime.call import call_shape, device_target
from attndsl.runtime.engine import Gradients
from attndsl.runtime.gluon_backward import why_not
from attndsl.runtime.launcher import Slot
from attndsl.runtime.outputs import Outputs, empty_gradient, in_order_of
from attndsl.runtime.printing import PrintedBackward, printed_backward, printed_forward, printed_gradients
from attndsl.runtime.triton_backward import prepare_backward
from attndsl.runtime.triton_launch import (
    INTERPRETED,
    POINTER,
    TritonForward,
    prepare_small,
    shared_cache,
    together,
    why_not_gluon,
)
from attndsl.targets import default_refusal

if TYPE_CHECKING:
    from attndsl.runtime.engine import Engine

MOVE = "move_rows"
# Numbers that one program of the kernel moves at most, its rows at most, and its warps.
_NUMBERS, _MOST_ROWS, _WARPS = 8192, 512, 4


def moved_forward(
    engine: Engine, program: Program, spec: Spec, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor],
    backend: str, aligned: bool,
) -> Callable[..., tuple[Tensor, Tensor]] | None:  # fmt: skip
    """The launch of a kind of call that is attended so where its data asks for it; None for others."""
    piece = _piece(program, spec, (q, k, v), backend, aligned)
    if piece is None:
        return None
    there = copying.in_order(spec)
    if why_not_gluon(piece.program, there, True, *map(_room, (q, k, v))):
        return None
    if backend == "auto" and default_refusal(piece.program, replace(there, backend=Backend.GLUON)):
        return None
    on_hopper, portable = (
        printed_forward(of, made, (kind,), engine.tiling, {kind: printer}, shared_cache())[0]
        for of, made, kind, printer in (
            (piece.program, there, Backend.GLUON, engine.generators.gluon_forward),
            (program, copying.in_place(spec), Backend.TRITON, engine.generators.triton_forward),
        )
    )
    return forward_of_both(engine, piece, on_hopper, portable, q, k, v, inputs, aligned)


def forward_of_both(
    engine: Engine, piece: PermutedPiece, ordered: Printed, in_place: Printed, q: Tensor, k: Tensor, v: Tensor,
    inputs: Sequence[Tensor], aligned: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """The launch of two kernels, of which the data chooses one: of tokens in order, and of tokens where they lie."""
    program = _both(ordered.program, in_place.program)
    deriving = engine.deriving(program, q, k, v, inputs)
    given = [*inputs, *deriving.examples]
    first, second = together([
        lambda: TritonForward(replace(ordered, program=program), _room(q), _room(k), _room(v), given, True),
        lambda: TritonForward(replace(in_place, program=program), q, k, v, given, aligned),
    ])  # fmt: skip
    return deriving.forward(_Forward(first, second, _Orders.of(engine, piece, program, given), q, k, v))


def moved_backward(
    engine: Engine, program: Program, spec: Spec, dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
    inputs: Sequence[Tensor], backend: str, aligned: bool, uses_lse: bool,
) -> Callable[..., Gradients] | None:  # fmt: skip
    """The launch of the gradients of a kind of call that is attended so where its data asks for it; None for others."""
    piece = _piece(program, spec, (q, k, v, dout), backend, aligned)
    if piece is None:
        return None
    there, shape = copying.in_order(spec), call_shape(q, k, v)
    if why_not(piece.program, there, _room(q), backend):
        return None

    def wanted(plan: BackwardPlan) -> bool:
        return backend == "gluon" or not prefers_two_passes(plan, shape)

    printers, cache = engine.generators, shared_cache()
    on_hopper = replace(there, backend=Backend.GLUON)
    ordered = printed_gradients(piece.program, on_hopper, uses_lse, wanted, printers, cache)
    if ordered is None:
        return None
    in_place = printed_backward(program, copying.in_place(spec), uses_lse, engine.tiling, printers, cache)
    return backward_of_both(engine, piece, ordered, in_place, dout, q, k, v, inputs, aligned)


def backward_of_both(
    engine: Engine, piece: PermutedPiece, ordered: PrintedBackward, in_place: PrintedBackward, dout: Tensor, q: Tensor,
    k: Tensor, v: Tensor, inputs: Sequence[Tensor], aligned: bool,
) -> Callable[..., Gradients]:  # fmt: skip
    """The launch of the gradients' kernels of both kinds, of which the data chooses one."""
    program = _both(*(x.pieces[0][0].program for x in (ordered, in_place)))
    deriving = engine.deriving(program, q, k, v, inputs)
    given = [*inputs, *deriving.examples]
    first, second = (_with_program(x, program) for x in (ordered, in_place))
    one = prepare_backward(first, _room(dout), _room(q), _room(k), _room(v), given, True)
    other = prepare_backward(second, dout, q, k, v, given, aligned)
    return deriving.backward(_Backward(one, other, _Orders.of(engine, piece, program, given), dout, q, k, v))


def _both(a: Program, b: Program) -> Program:
    """A program with the derived inputs of two of the same kind."""
    return replace(a, inputs=(*a.inputs, *(decl for decl in b.inputs if decl not in a.inputs)))


def _with_program(kernels: PrintedBackward, program: Program) -> PrintedBackward:
    ((plan, before, after),) = kernels.pieces
    return PrintedBackward(((replace(plan, program=program), before, after),), None, None)


def _piece(
    program: Program, spec: Spec, tensors: Sequence[Tensor], backend: str, aligned: bool
) -> PermutedPiece | None:
    """A program in the order of its data, where a call of it is copied into that order."""
    rows, keys = tensors[0].shape[2], tensors[1].shape[2]
    asked = backend == "gluon" or (backend == "auto" and copying.is_long(min(rows, keys)))
    if INTERPRETED or not aligned or not asked:
        return None
    return copying.copied(program, spec) if all(x.stride(3) == 1 for x in tensors) else None


def _room(x: Tensor) -> Tensor:
    """Room for what a tensor is copied to."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# ----------------------------------------------------------------------------------------- copies


@dataclass(frozen=True, slots=True)
class _Order:
    """Where an order of tokens stands among a call's inputs, its declaration, and a tensor like it."""

    at: int
    decl: InputDecl
    like: Tensor


@dataclass(frozen=True, slots=True)
class _Orders:
    """The orders of a call's rows and keys, where it stands whether copies are made, and what prints the kernel that
    makes them."""

    q: _Order
    k: _Order
    chosen: int
    text: Callable[[int, int, bool], str]

    @classmethod
    def of(cls, engine: Engine, piece: PermutedPiece, program: Program, inputs: Sequence[Tensor]) -> _Orders:
        names = [decl.name for decl in program.inputs]
        of_rows, of_keys = (
            _Order(n, program.inputs[n], inputs[n])
            for n in (names.index(x.input) for x in (piece.layout.q, piece.layout.k))
        )
        assert piece.alike is not None
        return cls(of_rows, of_keys, names.index(piece.alike.input), engine.generators.triton_move)


class _Move:
    """Copies rows of tensors like one [B, H, N, D] into an order, or with `back` from it, if the data asks for it."""

    def __init__(self, x: Tensor, orders: _Orders, order: _Order, moved: Tensor, back: bool) -> None:
        batch, heads, rows, dim = x.shape
        axes, strides = [d.axis for d in order.decl.dims], order.like.stride()
        by = {axis: 0 if size == 1 else n for axis, n, size in zip(axes, strides, order.like.shape, strict=True)}
        # Where heads differ there is an order for each key head.
        share = heads // order.like.shape[axes.index(Axis.G)] if Axis.G in axes else heads
        block = min(_MOST_ROWS, 1 << (_NUMBERS // dim).bit_length() - 1)
        sources: dict[str, Any] = {
            "given_ptr": Slot(0, POINTER[x.dtype]), "moved_ptr": Slot(1, POINTER[x.dtype]),
            "order_ptr": Slot(2, "*i32"), "chosen_ptr": Slot(3, "*i1"), "order_b": by.get(Axis.B, 0),
            "order_h": by.get(Axis.G, 0), "heads": heads, "share": share, "rows": rows,
        }  # fmt: skip
        for name, tensor in (("given", x), ("moved", moved)):
            sources |= {f"stride_{name}{axis}": tensor.stride(n) for n, axis in enumerate("bhn")}
        self._at, grid = (order.at, orders.chosen), batch * heads * -(-rows // block)
        text = orders.text(dim, block, back)
        self._launch = prepare_small(text, MOVE, device_target(x.device), _WARPS, grid, sources, x.device)

    def __call__(self, x: Tensor, moved: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        self._launch((x, moved, *(inputs[n] for n in self._at)))
        return moved


def _into(x: Tensor, orders: _Orders, order: _Order) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """Copies tensors like x into an order."""
    move = _Move(x, orders, order, _room(x), False)
    return lambda x, inputs: move(x, _room(x), inputs)


class _Forward:
    """Two forward kernels, of which the data chooses one, and copies of a call's tensors around the first."""

    def __init__(
        self, ordered: TritonForward, in_place: TritonForward, orders: _Orders, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        self._ordered, self._in_place, self._made = ordered, in_place, Outputs.of(q, call_shape(q, k, v))
        self._into = [_into(x, orders, order) for x, order in ((q, orders.q), (k, orders.k), (v, orders.k))]
        out, lse = self._made.out(q), self._made.lse(q)[..., None]
        self._back = [_Move(_room(x), orders, orders.q, x, True) for x in (out, lse)]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        dropout: None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = self._made.out(q), self._made.lse(q)
        self._in_place.into(out, lse, q, k, v, inputs, args, scale, dropout)
        q, k, v = (move(x, inputs) for move, x in zip(self._into, (q, k, v), strict=True))
        found, found_lse = self._ordered(q, k, v, inputs, args, scale, dropout)
        self._back[0](found, out, inputs)
        self._back[1](found_lse[..., None], lse[..., None], inputs)
        return out, lse


class _Backward:
    """The kernels of gradients of both kinds, and copies of a call's tensors around the first."""

    def __init__(
        self, ordered: Callable[..., Gradients], in_place: Callable[..., Gradients], orders: _Orders, dout: Tensor,
        q: Tensor, k: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        self._ordered, self._in_place = ordered, in_place
        made = Outputs.of(q, call_shape(q, k, v))
        out, lse = made.out(q), made.lse(q)[..., None]
        both = ((dout, orders.q), (q, orders.q), (k, orders.k), (v, orders.k), (out, orders.q))
        self._into = [_into(x, orders, order) for x, order in both]
        self._lse = _into(lse, orders, orders.q)
        self._back = [_Move(_room(x), orders, order, empty_gradient(x), True) for x, order in both[1:4]]

    def __call__(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, dropout: None,
    ) -> Gradients:  # fmt: skip
        rest = (inputs, args, scale, dropout)
        *gradients, learned = self._in_place(dout, dlse, q, k, v, out, lse, *rest)
        given = (dout, q, k, v, in_order_of(q, out))
        dout, q, k, v, out = (move(x, inputs) for move, x in zip(self._into, given, strict=True))
        d_lse = None if dlse is None else self._of_rows(dlse, inputs)
        *found, _ = self._ordered(dout, d_lse, q, k, v, out, self._of_rows(lse, inputs), *rest)
        dq, dk, dv = (move(x, to, inputs) for move, x, to in zip(self._back, found, gradients, strict=True))
        return dq, dk, dv, learned

    def _of_rows(self, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """A number of each row, in order."""
        return self._lse(x.contiguous()[..., None], inputs)[..., 0]
