"""Combines the outputs of branches as an attention's `output` says, differentiably, in float32."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, assert_never

import torch
from torch import Tensor

from attndsl.branches import Attended, Factor, Handed, Merged, Output, Product, Sum
from attndsl.oracle import index_origin
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    Call,
    CallShape,
    Compare,
    Const,
    Dim,
    If,
    Logic,
    Program,
    Read,
    Scalar,
    Table,
    Type,
    Unary,
    Var,
    children,
)  # fmt: skip
from attndsl.runtime.lasting import table_tensor

State = tuple[Tensor, Tensor | None]
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "sqrt": torch.sqrt, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "softcap": lambda x, cap: cap * torch.tanh(x / cap), "abs": torch.abs,
    "clamp": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
    "bit_length": lambda x: sum(((x >> bit) > 0).to(torch.int64) for bit in range(63)),
    "is_power_of_two": lambda x: (x > 0) & ((x & (x - 1)) == 0),
    "min": lambda *xs: reduce(torch.minimum, xs), "max": lambda *xs: reduce(torch.maximum, xs),
}  # fmt: skip
_OWN = {Axis.B: "b", Axis.H: "h", Axis.G: "g", Axis.Q: "q", Axis.DV: "d"}
# Where a dimension of each axis stands in [batch, heads, rows, channels].
_PLACE = {Axis.B: 0, Axis.H: 1, Axis.G: 1, Axis.Q: 2, Axis.DV: 3}


@dataclass(frozen=True, slots=True)
class Combiner:
    """One call's output from its branches' outputs and lse: float [B, Hq, rows, Dv] and [B, Hq, rows].

    program: its output stands in positions of the call (`unpack.of_output`).
    """

    program: Program
    shape: CallShape
    device: torch.device
    inputs: Mapping[str, Tensor]
    args: Mapping[str, int]
    attended: Mapping[str, State]
    # Of a decode, int64 [batch, 1, 1, 1]: the length of each sequence, where the shape's is the most that one may have.
    lengths: Tensor | None = None
    # By identity, and with the nodes: one that goes would leave its identity to another.
    memo: dict[int, tuple[Scalar, Tensor]] = field(default_factory=dict)

    def result(self) -> State:
        """What `state` is of the program's output."""
        assert self.program.output is not None
        return self.state(self.program.output)

    def state(self, output: Output) -> State:
        """The value of an output, and its lse where it is that of one softmax."""
        match output:
            case Attended(branch=name):
                return self.attended[name]
            case Handed(out=out, lse=lse):
                return self.number(out), self.number(lse).expand(self._rows)[..., 0]
            case Merged(operands=operands):
                return merged([self.state(x) for x in operands])
            case Factor(value=value):
                return self.number(value), None
            case Sum(left=left, right=right):
                return self.state(left)[0].to(self._high) + self.state(right)[0].to(self._high), None
            case Product(factor=factor, operand=operand):
                return self.number(factor) * self.state(operand)[0].to(self._high), None
            case _:
                assert_never(output)

    @property
    def _high(self) -> torch.dtype:
        wide = any(out.dtype == torch.float64 for out, _ in self.attended.values())
        return torch.float64 if wide else torch.float32

    @property
    def _rows(self) -> tuple[int, ...]:
        return self.shape.batch, self.shape.heads, self.shape.rows, 1

    def number(self, e: Scalar) -> Tensor:
        """A scalar as a float that broadcasts to [batch, heads, rows, channels]."""
        return self._value(e).to(self._high)

    def _value(self, e: Scalar) -> Tensor:
        found = self.memo.get(id(e))
        if found is None:
            found = self.memo[id(e)] = e, self._step(e)
        return found[1]

    def _step(self, e: Scalar) -> Tensor:
        match e:
            case Const(value=value):
                kind = self._high if isinstance(value, float) else None
                return torch.full((), value, dtype=kind, device=self.device)
            case Arg(name=name):
                return torch.full((), self.args[name], device=self.device)
            case Var(name=name):
                return self._variable(name)
            case Table(name=name, index=index):
                decl = self.program.table(name)
                return self._entry(table_tensor(decl, self.device), decl.dims, index)
            case Read(input=name, index=index):
                entry = self._entry(self.inputs[name], self.program.input(name).dims, index)
                return entry.long() if e.type is Type.INT else entry
            case If(cond=c, then=a, other=b):
                return torch.where(self._value(c), self._value(a), self._value(b))
            case Unary(op=op, operand=x):
                return -self._value(x) if op == "-" else ~self._value(x)
            case Binary(op="//", left=a, right=b):
                return torch.div(self._value(a), self._value(b), rounding_mode="floor")
            case Binary(op="%", left=a, right=b):
                return torch.remainder(self._value(a), self._value(b))
            case Binary(op=op, left=a, right=b) | Compare(op=op, left=a, right=b):
                # Of integers torch makes float32, also beside a number that is wide.
                of = self.number if Type.FLOAT in (e.type, a.type, b.type) else self._value
                found: Tensor = _OPERATORS[op](of(a), of(b))
                return found
            case Logic(op=op, operands=xs):
                return reduce(operator.and_ if op == "and" else operator.or_, map(self._value, xs))
            case Call(function=function):
                values = [self._value(x) for x in children(e)]
                if e.type is Type.FLOAT:
                    values = [x.to(self._high) for x in values]
                return _FUNCTIONS[function](*values)
            case _:
                assert_never(e)

    def _variable(self, name: str) -> Tensor:
        shape, heads = self.shape, torch.arange(self.shape.heads, device=self.device).view(1, -1, 1, 1)
        match name:
            case "b":
                return torch.arange(shape.batch, device=self.device).view(-1, 1, 1, 1)
            case "h":
                return heads
            case "g":
                return heads // (shape.heads // shape.kv_heads)
            case "q":
                return torch.arange(shape.rows, device=self.device).view(1, 1, -1, 1) + self._first
            case "d":
                return torch.arange(shape.v_dim, device=self.device)
        sizes = {
            "Nq": shape.q_len(self.program), "Nk": shape.k_len, "H": shape.heads, "G": shape.kv_heads, "D": shape.dim,
            "Dv": shape.v_dim,
        }  # fmt: skip
        if self.lengths is not None and name in ("Nq", "Nk"):
            return self.lengths
        return torch.full((), sizes[name], device=self.device)

    @property
    def _first(self) -> int | Tensor:
        """The position of the call's first row."""
        return self.shape.first_position(self.program) if self.lengths is None else self.lengths - self.shape.rows

    def _entry(self, values: Tensor, dims: tuple[Dim, ...], index: tuple[Scalar, ...]) -> Tensor:
        """An entry, every index clamped to its dimension. Read at its own variables and at constants, it is a view."""
        if values.numel() == 0:
            # Of a call without tokens: nothing reads what stands here, but it has a gradient.
            return values.sum().to(values.dtype)
        if all(isinstance(e, Const) or _own(e, dim) for e, dim in zip(index, dims, strict=True)):
            return self._view(values, dims, index)
        places = []
        for dim, size, e in zip(dims, values.shape, index, strict=True):
            place = self._value(e)
            if self.lengths is None:
                place = place - index_origin(dim, self.program, self.shape)
            elif dim.axis is Axis.Q and dim.block == 1:
                place = place - self._first
            elif dim.axis in (Axis.Q, Axis.K) and size > 1:
                place = torch.minimum(place, (self.lengths - 1) // dim.block)
            places.append(place.clamp(0, size - 1))
        return values[tuple(places)]

    def _view(self, values: Tensor, dims: tuple[Dim, ...], index: tuple[Scalar, ...]) -> Tensor:
        kept, at = [], 0
        for dim, e in zip(dims, index, strict=True):
            if isinstance(e, Const):
                values = values.select(at, min(max(int(e.value), 0), values.shape[at] - 1))
                continue
            if dim.axis is Axis.G and values.shape[at] > 1:
                values = values.repeat_interleave(self.shape.heads // self.shape.kv_heads, dim=at)
            kept.append((_PLACE[dim.axis], at))
            at += 1
        order = sorted(kept)
        values = values.permute([i for _, i in order])
        sizes = dict(zip((place for place, _ in order), values.shape, strict=True))
        return values.reshape([sizes.get(place, 1) for place in range(4)])


def _own(e: Scalar, dim: Dim) -> bool:
    return dim.block == 1 and dim.axis in _OWN and e == Var(_OWN[dim.axis])


def merged(states: list[State]) -> State:
    """Several softmaxes over disjoint keys as one: each output weighs e**lse."""
    found = [lse for _, lse in states if lse is not None]
    assert len(found) == len(states), "what is merged has an lse"
    lse = torch.stack(found)
    empty = (lse == -torch.inf).all(0)
    # Finite where a row is empty, so that no gradient is NaN.
    total = torch.logsumexp(torch.where(lse == -torch.inf, -1e30, lse), 0)
    weights = torch.where(lse == -torch.inf, 0.0, torch.exp(torch.where(lse == -torch.inf, 0.0, lse - total)))
    out = reduce(operator.add, (w[..., None] * x for w, (x, _) in zip(weights, states, strict=True)))
    return out, torch.where(empty, -torch.inf, total)
