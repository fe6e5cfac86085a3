"""The oracle, its torch half: the output of a program, dense, in float64, differentiable.

It evaluates scores on allowed pairs only: every float scalar is a vector over the pairs where a mask
is true, and each side of an `if` only on the pairs that take it. So nothing is computed, and no
gradient flows, where the language says that nothing is read: a logarithm of a negative number above
the diagonal of a causal program does no harm. Scalars without floats come from `attndsl.oracle`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal, assert_never, overload

import numpy as np
import torch
from torch import Tensor

from attndsl import oracle
from attndsl.dropout import kept
from attndsl.program import (
    Arg,
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
    walk,
)

FLOAT_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


@overload
def reference(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    args: Mapping[str, int],
    scale: float | None = None,
    return_lse: Literal[False] = False,
    dropout: tuple[float, int] | None = None,
) -> Tensor: ...
@overload
def reference(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    args: Mapping[str, int],
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    dropout: tuple[float, int] | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def reference(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    args: Mapping[str, int],
    scale: float | None = None,
    return_lse: bool = False,
    dropout: tuple[float, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def reference(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    args: Mapping[str, int],
    scale: float | None = None,
    return_lse: bool = False,
    dropout: tuple[float, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What a program computes, by definition.

    Args:
        program: the attention.
        q: float [B, Hq, rows, D].
        k: float [B, Hkv, Nk, D].
        v: float [B, Hkv, Nk, Dv].
        inputs: the tensors that the program declares.
        args: the runtime ints.
        scale: multiplies q . k in place of the program's own scale, which is 1/sqrt(D) if it has none.
        return_lse: also return the logarithm of the softmax denominator.
        dropout: the rate and the seed of dropout, of the weights after the softmax (or of `weights`).

    Returns:
        out float64 [B, Hq, rows, Dv]; with `return_lse` also lse float64 [B, Hq, rows], natural log, the
        sink included. An empty row has output 0 and lse -inf, or the sink where there is one. Both are
        differentiable in q, k, v and the float inputs.

    Raises:
        ValueError: an input is missing or misshapen, or lse is asked of `weights`, which has none.
    """
    branch = program.branch
    if branch.weights is not None and (branch.score is not None or branch.sink is not None):
        raise ValueError("`weights` stands in place of `score` and `softmax`")
    if branch.weights is not None and return_lse:
        raise ValueError("lse is undefined under `weights`")
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    oracle.check_inputs(program, shape, {name: tensor.shape for name, tensor in inputs.items()})
    exact = {name: x.detach().cpu().numpy() for name, x in inputs.items() if not x.is_floating_point()}
    floats = {name: x.to(torch.float64) for name, x in inputs.items() if x.is_floating_point()}
    allowed = torch.from_numpy(oracle.mask(program, shape, exact, args)).to(q.device)

    share = shape.heads // shape.kv_heads
    keys, values = (x.to(torch.float64).repeat_interleave(share, dim=1) for x in (k, v))
    dots = q.to(torch.float64) @ keys.transpose(-1, -2)
    evaluator = oracle.Evaluator.of_call(program, shape, exact, args)

    def scored(pairs: _Pairs, e: Scalar | None) -> Tensor:
        """The scalar on these pairs, given s; s itself without one."""
        s = dots[pairs.where]
        if scale is not None:
            s = s * scale
        elif branch.scale is None:
            s = s / shape.dim**0.5
        else:
            s = s * pairs.scalar(branch.scale)
        return s if e is None else replace(pairs, s=s, memo={}).scalar(e).to(torch.float64)

    left: Tensor | None = None
    if dropout is not None:
        rate, seed = dropout
        left = torch.from_numpy(kept(program, shape, rate, seed)).to(q.device, torch.float64) / (1.0 - rate)
    pairs = _Pairs(evaluator, floats, allowed)
    if branch.weights is not None:
        weights = dots.new_zeros(dots.shape).masked_scatter(allowed, scored(pairs, branch.weights))
        return (weights if left is None else weights * left) @ values

    # A score of -inf removes the pair. Taking it out before the differentiable evaluation keeps the
    # derivative at that point, infinite for log(0), out of the gradient.
    with torch.no_grad():
        finite = scored(pairs, branch.score) != -torch.inf
    present = allowed.masked_scatter(allowed, finite)
    logits = scored(_Pairs(evaluator, floats, present), branch.score)
    sink: Tensor | None = None
    if branch.sink is not None:
        rows = torch.ones((*dots.shape[:3], 1), dtype=torch.bool, device=q.device)
        sink = _Pairs(evaluator, floats, rows).scalar(branch.sink).to(torch.float64).reshape(dots.shape[:3])
    out, lse = _softmax(logits, present, values, sink, left)
    return (out, lse) if return_lse else out


def _softmax(
    logits: Tensor, present: Tensor, values: Tensor, sink: Tensor | None, left: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and lse; `logits` float64 [pairs] lists the entries of `present` bool [B, Hq, rows, Nk] in order.

    left: what dropout multiplies the weights by.
    """
    with torch.no_grad():
        dense = torch.full(present.shape, -torch.inf, dtype=torch.float64, device=present.device)
        dense = dense.masked_scatter(present, logits)
        top = dense.amax(-1) if dense.shape[-1] else dense.sum(-1) - torch.inf
        if sink is not None:
            top = torch.maximum(top, sink)
        top = torch.where(top == -torch.inf, 0.0, top)
    masses = torch.zeros_like(dense).masked_scatter(
        present, torch.exp(logits - top[..., None].expand_as(dense)[present])
    )
    total = masses.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - top)
    # Selecting twice keeps the infinite derivative of log at an empty row out of the gradient.
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    weights = masses / total[..., None]
    out = (weights if left is None else weights * left) @ values
    return out, torch.where(empty, -torch.inf, top + torch.log(total))


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Scalars on the entries of `where`, bool [B, Hq, rows, Nk], as vectors over them in order.

    `s` is the scaled dot product of each. Values are kept per node, by identity.
    """

    evaluator: oracle.Evaluator
    floats: Mapping[str, Tensor]
    where: Tensor
    s: Tensor | None = None
    memo: dict[int, Tensor] = field(default_factory=dict)

    def scalar(self, e: Scalar) -> Tensor:
        """Value of a scalar on each pair: float64, int64 or bool [pairs]."""
        if id(e) not in self.memo:
            self.memo[id(e)] = self._scalar(e)
        return self.memo[id(e)]

    def _scalar(self, e: Scalar) -> Tensor:
        if not any(node.type is Type.FLOAT for node in walk(e)):
            return self._spread(self.evaluator.scalar(e))
        match e:
            case Const(value=value):
                return self._spread(np.asarray(value, np.float64))
            case Var():
                if self.s is None:
                    raise ValueError("`s` is read where there is no pair")
                return self.s
            case Table(name=name, index=index):
                table = self.evaluator.program.table(name)
                values = torch.tensor(table.values, dtype=torch.float64, device=self.where.device)
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
            place.append((self.scalar(e) - origin).clamp(0, size - 1))
        return values[tuple(place)]

    def _branches(self, e: If) -> Tensor:
        """Each side on the pairs that take it, so that the other side's derivative is never formed."""
        cond = self.scalar(e.cond)
        dtype = {Type.FLOAT: torch.float64, Type.INT: torch.int64, Type.BOOL: torch.bool}[e.type]
        value = torch.zeros(cond.shape, dtype=dtype, device=cond.device)
        for taken, side in ((cond, e.then), (~cond, e.other)):
            where = self.where.masked_scatter(self.where, taken)
            subset = replace(self, where=where, s=None if self.s is None else self.s[taken], memo={})
            value = value.masked_scatter(taken, subset.scalar(side).to(dtype))
        return value

    def _operator(self, e: Unary | Binary | Compare | Logic | Call, operands: list[Tensor]) -> Tensor:
        if not any(x.is_floating_point() for x in operands) and e.type is not Type.FLOAT:
            # Exact in itself, over operands that looked at a float: `1 + (if s > 0 then 1 else 2)`.
            exact = oracle.apply(e, [x.cpu().numpy() for x in operands])
            return torch.from_numpy(np.asarray(exact)).to(self.where.device)
        operands = [x.to(torch.float64) for x in operands]
        match e:
            case Unary():
                return -operands[0]
            case Binary(op=op):
                value: Tensor = FLOAT_ARITHMETIC[op](*operands)
                return value
            case Compare(op=op):
                holds: Tensor = oracle.COMPARE[op](*operands)
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
