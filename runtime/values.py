"""Values of scalars on a device, one torch operation a node: integers and booleans exact, floats in their own width."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, assert_never

import torch
from torch import Tensor

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
    Unary,
    Var,
    children,
)  # fmt: skip

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip
_FLOAT_CALLS: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "sqrt": torch.sqrt, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "softcap": lambda x, cap: cap * torch.tanh(x / cap),
}  # fmt: skip


def readable(x: Tensor) -> Tensor:
    """x, or a zero in the place of one without entries: where there are no keys, a kernel may read what follows a
    query's position all the same, and throws it away."""
    return x if x.numel() else x.new_zeros([size or 1 for size in x.shape])


@dataclass(frozen=True, slots=True)
class Values:
    """Scalars of a program in a call, at the places that `variables` names.

    variables: the built-in names, as numbers or int64 tensors that broadcast. tensors: inputs by name. tables:
    compile-time tables by name. lengths: int64 [B, 1, 1, 1] where each batch entry has one of its own, and the shape's
    is the most that one may have. Nothing here waits for the device.
    """

    program: Program
    shape: CallShape
    device: torch.device
    tensors: Mapping[str, Tensor]
    tables: Mapping[str, Tensor]
    args: Mapping[str, int]
    variables: Mapping[str, Any]
    lengths: Tensor | None = None
    # By identity, and with the nodes: one that goes would leave its identity to another.
    memo: dict[int, tuple[Scalar, Any]] = field(default_factory=dict)

    def at(self, **variables: Any) -> Values:
        """The same with other values of some variables."""
        known = (self.program, self.shape, self.device, self.tensors, self.tables, self.args)
        # As `dataclasses.replace` does it, which takes several times as long: a call asks some ten times.
        return Values(*known, {**self.variables, **variables}, self.lengths)

    def tensor(self, e: Scalar) -> Tensor:
        """The value as a tensor of the device, int64, bool or float."""
        found = self._value(e)
        return found if isinstance(found, Tensor) else torch.full((), found, device=self.device)

    def number(self, e: Scalar) -> Any:
        """The value as a number, which has no width, where it is one for the whole call."""
        return self._value(e)

    def _value(self, e: Scalar) -> Any:
        found = self.memo.get(id(e))
        if found is None:
            found = self.memo[id(e)] = e, self._step(e)
        return found[1]

    def _step(self, e: Scalar) -> Any:
        match e:
            case Const(value=value):
                return value
            case Var(name=name):
                return self.variables[name]
            case Arg(name=name):
                return self.args[name]
            case Table(name=name, index=index):
                return self._entry(self.tables[name], self.program.table(name).dims, index)
            case Read(input=name, index=index):
                return self._entry(self.tensors[name], self.program.input(name).dims, index)
            case Unary(op=op, operand=x):
                return -self._value(x) if op == "-" else self._negated(self._value(x))
            case Binary(op="//" | "%" as op, left=a, right=b):
                return self._divided(op, self._value(a), self._value(b))
            case Binary(op=op, left=a, right=b):
                return _ARITHMETIC[op](self._value(a), self._value(b))
            case Compare(op=op, left=a, right=b):
                return _COMPARE[op](self._value(a), self._value(b))
            case Logic(op=op, operands=xs):
                return reduce(operator.and_ if op == "and" else operator.or_, map(self._value, xs))
            case If(cond=c, then=a, other=b):
                return self._chosen(self._value(c), self._value(a), self._value(b))
            case Call(function=function):
                return self._call(function, [self._value(x) for x in children(e)])
            case _:
                assert_never(e)

    def _entry(self, values: Tensor, dims: tuple[Dim, ...], index: tuple[Scalar, ...]) -> Tensor:
        """An entry, every index clamped to its dimension; the bits of narrow numbers widened."""
        places = []
        for dim, size, e in zip(dims, values.shape, index, strict=True):
            place, last = self.tensor(e), size - 1
            if self.lengths is None:
                place = place - index_origin(dim, self.program, self.shape)
            elif dim.axis is Axis.Q and dim.block == 1:
                place = place - (self.lengths - self.shape.rows)
            elif dim.axis in (Axis.Q, Axis.K) and size > 1:
                block = (self.lengths - 1) // (1 if dim.apart else dim.block)
                # Of tiles, as many of a block.
                place = torch.minimum(place, block if dim.size <= 1 else (block + 1) * dim.size - 1)
            places.append(place.clamp(0, last))
        entry = values[tuple(places)] if places else values
        if entry.is_floating_point():
            return entry if entry.dtype == torch.float64 else entry.to(torch.float32)
        return entry if entry.dtype == torch.bool else entry.to(torch.int64)

    def _negated(self, x: Any) -> Any:
        return ~x if isinstance(x, Tensor) else not x

    def _divided(self, op: str, a: Any, b: Any) -> Any:
        """Rounding down; 0 where the divisor is 0, which a guard may stand before."""
        divide = operator.floordiv if op == "//" else operator.mod
        if not isinstance(b, Tensor):
            return divide(a, b) if b else 0
        zero = b == 0
        return torch.where(zero, 0, divide(a, b + zero))

    def _chosen(self, cond: Any, then: Any, other: Any) -> Any:
        if not isinstance(cond, Tensor):
            return then if cond else other
        return torch.where(cond, then, other)

    def _call(self, function: str, xs: list[Any]) -> Any:
        s = self.variables.get("s")
        real = s.dtype if isinstance(s, Tensor) else torch.float32
        wide = [
            x
            if isinstance(x, Tensor)
            else torch.full((), x, dtype=real if isinstance(x, float) else None, device=self.device)
            for x in xs
        ]
        match function, wide:
            case "min", _:
                return reduce(torch.minimum, wide)
            case "max", _:
                return reduce(torch.maximum, wide)
            case "abs", [x]:
                return x.abs()
            case "clamp", [x, low, high]:
                return torch.minimum(torch.maximum(x, low), high)
            case "bit_length", [x]:
                return sum(((x >> bit) > 0).to(torch.int64) for bit in range(63))
            case "is_power_of_two", [x]:
                return (x > 0) & ((x & (x - 1)) == 0)
            case "mix64", [x, y]:
                return mix64(x, y)
            case "drawn", [hash, member, last_hash, last]:
                before = ordered(hash) < ordered(last_hash)
                return before | ((hash == last_hash) & (member <= last))
            case _:
                return _FLOAT_CALLS[function](*(x if x.is_floating_point() else x.to(real) for x in wide))


def mix64(x: Tensor, y: Tensor) -> Tensor:
    """The output of SplitMix64 in state x ^ y, as the bits of an int64."""
    z = (x ^ y) - 0x61C8864680B583EB
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shifted(z, 31)


def ordered(bits: Tensor) -> Tensor:
    """An unsigned number's bits as an int64 that compares as the number does (and back)."""
    return bits ^ -(1 << 63)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Zeros shifted in from the left, where the operator repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
