"""Scalars as the oracle evaluates them: on allowed pairs only, differentiable, floats of one dtype."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor

from attndsl import oracle, oracle_operators
from attndsl.program import (
    Arg,
    Binary,
    Call,
    Compare,
    Const,
    Dim,
    If,
    Logic,
    Read,
    Scalar,
    Table,
    Type,
    Unary,
    Var,
    children,
    walk,
)

FLOAT_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


@dataclass(frozen=True, slots=True)
class Pairs:
    """Scalars on the entries of `where`, bool [B, Hq, rows, Nk], as vectors over them in order.

    `dtype` is that of floats, `s` the scaled dot product of each. `memo` keeps a value per node, and the
    nodes, which identities are of.
    """

    evaluator: oracle.Evaluator
    floats: Mapping[str, Tensor]
    where: Tensor
    dtype: torch.dtype
    s: Tensor | None = None
    memo: dict[int, tuple[Scalar, Tensor]] = field(default_factory=dict)

    def scalar(self, e: Scalar) -> Tensor:
        """Value of a scalar on each pair: of `dtype`, int64 or bool [pairs]."""
        found = self.memo.get(id(e))
        if found is None:
            found = self.memo[id(e)] = e, self._scalar(e)
        return found[1]

    def _scalar(self, e: Scalar) -> Tensor:
        if not any(node.type is Type.FLOAT for node in walk(e)):
            return self._spread(self.evaluator.scalar(e))
        match e:
            case Const(value=value):
                return self._spread(np.asarray(value, np.float64)).to(self.dtype)
            case Var():
                if self.s is None:
                    raise ValueError("`s` is read where there is no pair")
                return self.s
            case Table(name=name, index=index):
                table = self.evaluator.program.table(name)
                values = torch.tensor(table.values, dtype=self.dtype, device=self.where.device)
                return self._entry(values.reshape(table.shape), table.dims, index)
            case Read(input=name, index=index):
                if name not in self.floats:
                    raise ValueError(f"input `{name}` is missing or not of a float type")
                return self._entry(self.floats[name], self.evaluator.program.input(name).dims, index)
            case If():
                return self._branches(e)
            case Unary() | Binary() | Compare() | Logic() | Call():
                return self._operator(e, [self.scalar(child) for child in children(e)])
            case Arg():
                raise AssertionError("a runtime int is exact")
            case _ as never:
                assert_never(never)

    def _spread(self, value: oracle.Array) -> Tensor:
        """A value that broadcasts to the whole call, on each pair."""
        return torch.from_numpy(np.asarray(value)).to(self.where.device).expand(self.where.shape)[self.where]

    def _entry(self, values: Tensor, dims: Sequence[Dim], index: Sequence[Scalar]) -> Tensor:
        place = []
        for dim, size, e in zip(dims, values.shape, index, strict=True):
            origin = oracle.index_origin(dim, self.evaluator.program, self.evaluator.shape)
            place.append((self.scalar(e) - origin).clamp(0, max(size - 1, 0)))
        if 0 in values.shape:
            # As of integers: of a call without pairs, or of rows of no sequence, whose output is none.
            return values.new_zeros(torch.broadcast_shapes(*(x.shape for x in place)))
        return values[tuple(place)]

    def _branches(self, e: If) -> Tensor:
        """Each side on the pairs that take it, so that the other side's derivative is never formed."""
        cond = self.scalar(e.cond)
        dtype = {Type.FLOAT: self.dtype, Type.INT: torch.int64, Type.BOOL: torch.bool}[e.type]
        value = torch.zeros(cond.shape, dtype=dtype, device=cond.device)
        for taken, side in ((cond, e.then), (~cond, e.other)):
            where = self.where.masked_scatter(self.where, taken)
            subset = replace(self, where=where, s=None if self.s is None else self.s[taken], memo={})
            value = value.masked_scatter(taken, subset.scalar(side).to(dtype))
        return value

    def _operator(self, e: Unary | Binary | Compare | Logic | Call, operands: list[Tensor]) -> Tensor:
        if not any(x.is_floating_point() for x in operands) and e.type is not Type.FLOAT:
            # Exact in itself, over operands that looked at a float: `1 + (if s > 0 then 1 else 2)`.
            exact = oracle_operators.apply(e, [x.cpu().numpy() for x in operands])
            return torch.from_numpy(np.asarray(exact)).to(self.where.device)
        operands = [x.to(self.dtype) for x in operands]
        match e:
            case Unary():
                return -operands[0]
            case Binary(op=op):
                value: Tensor = FLOAT_ARITHMETIC[op](*operands)
                return value
            case Compare(op=op):
                holds: Tensor = oracle_operators.COMPARE[op](*operands)
                return holds
            case Call(function=function):
                return _call(function, operands)
            case Logic():
                raise AssertionError("`and` and `or` take booleans")
            case _ as never:
                assert_never(never)


def _call(function: str, operands: Sequence[Tensor]) -> Tensor:
    match function, operands:
        case "min", _:
            return reduce(torch.minimum, operands)
        case "max", _:
            return reduce(torch.maximum, operands)
        case "abs", [x]:
            return x.abs()
        case "clamp", [x, low, high]:
            return torch.minimum(torch.maximum(x, low), high)
        case "exp", [x]:
            return x.exp()
        case "exp2", [x]:
            return x.exp2()
        case "log", [x]:
            return x.log()
        case "sqrt", [x]:
            return x.sqrt()
        case "tanh", [x]:
            return x.tanh()
        case "sigmoid", [x]:
            return x.sigmoid()
        case "softcap", [x, cap]:
            return cap * torch.tanh(x / cap)
        case _:
            raise ValueError(f"`{function}` has no float value")
