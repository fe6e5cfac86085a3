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
from attndsl.alone import separate, sequences, together
from attndsl.branches import (
    Attended,
    Branch,
    Factor,
    Given,
    Handed,
    Merged,
    Output,
    Part,
    Pool,
    PoolFunction,
    Product,
    Sum,
    View,
)
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
from attndsl.runtime.reference_skip import left_by_skipping

FLOAT_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


@overload
def reference(
    program: Program, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None = None,
    return_lse: Literal[False] = False,
    dropout: tuple[float, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor: ...  # fmt: skip
@overload
def reference(
    program: Program, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    dropout: tuple[float, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def reference(
    program: Program, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None = None,
    return_lse: bool = False,
    dropout: tuple[float, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def reference(
    program: Program, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None = None,
    return_lse: bool = False,
    dropout: tuple[float, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
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
        dtype: what is computed in. float64 is the oracle; float32 shows what rounding alone does to a definition.

    Returns:
        out float64 [B, Hq, rows, Dv]; with `return_lse` also lse float64 [B, Hq, rows], natural log, the
        sink included. An empty row has output 0 and lse -inf, or the sink where there is one. Both are
        differentiable in q, k, v and the float inputs.

    Raises:
        ValueError: an input is missing or misshapen, or lse is asked of `weights`, or of branches that are not merged
            to one softmax, which have none.
    """
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    oracle.check_inputs(program, shape, {name: tensor.shape for name, tensor in inputs.items()})
    exact = {name: x.detach().cpu().numpy() for name, x in inputs.items() if not x.is_floating_point()}
    floats = {name: x.to(dtype) for name, x in inputs.items() if x.is_floating_point()}
    left: Tensor | None = None
    if dropout is not None:
        if any(len(branch.parts) > 1 or branch.parts[0].view is not None for branch in program.branches):
            raise ValueError("dropout is that of branches over raw tokens")
        rate, seed = dropout
        left = torch.from_numpy(kept(program, shape, rate, seed)).to(q.device, dtype) / (1.0 - rate)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    whole = _Call(program, shape, q, k, v, oracle.Evaluator.of_call(program, shape, exact, args), floats, scale, left)
    out, lse = _apart(whole) if separate(program) else whole.result()
    if not return_lse:
        return out
    if lse is None:
        raise ValueError("lse is undefined under `weights` and of what is not one softmax")
    return out, lse


def _apart(call: _Call) -> tuple[Tensor, Tensor | None]:
    """Output and lse of a call whose sequences stand alone; rows of tokens that are not present see nothing."""
    program, shape, evaluator = call.program, call.shape, call.evaluator
    out = call.q.new_zeros(*call.q.shape[:3], shape.v_dim)
    lse: Tensor | None = call.q.new_full(call.q.shape[:3], -torch.inf)
    for x in sequences(program, shape, evaluator.inputs):
        at, own = slice(x.entry, x.entry + 1), together(program)
        exact = x.inputs(program, evaluator.inputs)
        part = _Call(
            own, x.shape(shape), call.q[at, :, x.rows], call.k[at, :, x.keys], call.v[at, :, x.keys],
            oracle.Evaluator.of_call(own, x.shape(shape), exact, evaluator.args, x.entry),
            x.inputs(program, call.floats), call.scale,
            None if call.left is None else call.left[at, :, x.rows, x.keys],
        )  # fmt: skip
        found, own_lse = part.result()
        place = torch.zeros(out.shape[:3], dtype=torch.bool, device=out.device)
        place[at, :, x.rows] = True
        out = out.masked_scatter(place[..., None], found)
        lse = None if lse is None or own_lse is None else lse.masked_scatter(place, own_lse)
    return out, lse


def probabilities(
    program: Program, branch: Branch, q: Tensor, k: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None = None, v_dim: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """exp(logit - lse) of each part of a branch, as `probs` reads them: float64 [B, Hq, rows, keys].

    v_dim: that of the values, which play no part (default: D).
    """
    v_dim = q.shape[3] if v_dim is None else v_dim
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v_dim)
    exact = {name: x.detach().cpu().numpy() for name, x in inputs.items() if not x.is_floating_point()}
    floats = {name: x.detach().to(torch.float64) for name, x in inputs.items() if x.is_floating_point()}
    evaluator = oracle.Evaluator.of_call(program, shape, exact, args)
    q, k = (x.detach().to(torch.float64) for x in (q, k))
    v = k.new_zeros(*k.shape[:3], v_dim)
    return _Call(program, shape, q, k, v, evaluator, floats, scale, None).probabilities(branch)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a program, its tensors in the dtype that it is computed in."""

    program: Program
    shape: CallShape
    q: Tensor
    k: Tensor
    v: Tensor
    evaluator: oracle.Evaluator
    floats: Mapping[str, Tensor]
    scale: float | None
    left: Tensor | None  # what dropout multiplies weights by

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Output and lse of the program."""
        output = self.program.output
        return self.branch(self.program.branches[0]) if output is None else self.output(output)

    def branch(self, branch: Branch) -> tuple[Tensor, Tensor | None]:
        """Output and lse of a branch, whose parts share one softmax."""
        if branch.weights is not None and (branch.score is not None or branch.sink is not None):
            raise ValueError("`weights` stands in place of `score` and `softmax`")
        parts = [self._scores(branch, part) for part in branch.parts]
        present, dense, values = (
            torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), (-1, -1, -2), strict=True)
        )
        if branch.weights is not None:
            return (dense if self.left is None else dense * self.left) @ values, None
        sink: Tensor | None = None
        if branch.sink is not None:
            sink = self._over(branch.sink, 1)[..., 0]
        if branch.skip is not None:
            present = present & left_by_skipping(dense, present, branch.skip)
        return _softmax(dense[present], present, values, sink, self.left)

    def probabilities(self, branch: Branch) -> list[Tensor]:
        """exp(logit - lse) of each of a branch's parts: float64 [B, Hq, rows, keys], 0 where a row sees nothing."""
        lse = self.branch(branch)[1]
        if lse is None:
            raise ValueError(f"branch `{branch.name}` has no lse")
        found = []
        for part in branch.parts:
            present, logits, _ = self._scores(branch, part)
            found.append(torch.where(present, torch.exp(logits - _below(lse)[..., None]), 0.0))
        return found

    def _scores(self, branch: Branch, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Of a part: which keys each row sees and do not score -inf, their logits or weights, and the values.

        bool and float64 [B, Hq, rows, keys] (what is not seen is 0), float64 [B, Hq, keys, Dv].
        """
        share = self.shape.heads // self.shape.kv_heads
        keys, values = (x.repeat_interleave(share, dim=1) for x in self._entries(part.view))
        dots = self.q @ keys.transpose(-1, -2)
        allowed = torch.from_numpy(self.evaluator.seen(part)).to(self.q.device)
        more: Tensor | None = None
        if part.view is not None and part.view.counted:
            first = torch.arange(keys.shape[-2], device=self.q.device) * part.view.stride
            more = (self.shape.k_len - first).clamp(max=part.view.size).to(dots.dtype).log().expand_as(dots)

        def scored(where: Tensor, e: Scalar | None) -> Tensor:
            """The scalar on these pairs, given s; s itself without one."""
            pairs = _Pairs(self.evaluator, self.floats, where, dots.dtype)
            s = dots[where]
            if self.scale is not None:
                s = s * self.scale
            elif branch.scale is None:
                s = s / self.shape.dim**0.5
            else:
                s = s * pairs.scalar(branch.scale)
            found = s if e is None else replace(pairs, s=s, memo={}).scalar(e).to(dots.dtype)
            return found if more is None else found + more[where]

        zero = dots.new_zeros(dots.shape)
        if branch.weights is not None:
            return allowed, zero.masked_scatter(allowed, scored(allowed, branch.weights)), values
        # A score of -inf removes the pair. Taking it out before the differentiable evaluation keeps the
        # derivative at that point, infinite for log(0), out of the gradient.
        with torch.no_grad():
            finite = scored(allowed, branch.score) != -torch.inf
        present = allowed.masked_scatter(allowed, finite)
        return present, zero.masked_scatter(present, scored(present, branch.score)), values

    def _entries(self, view: View | None) -> tuple[Tensor, Tensor]:
        """Keys and values of a part: float64 [B, Hkv, keys, D] and [B, Hkv, keys, Dv]."""
        match view:
            case None:
                return self.k, self.v
            case Pool():
                return self._pooled(self.k, view), self._pooled(self.v, view)
            case Given(keys=keys, values=values):
                lead = (self.shape.batch, self.shape.kv_heads, oracle.entries(view, self.shape.k_len), -1)
                return self.floats[keys].expand(lead), self.floats[values].expand(lead)
            case _ as never:
                assert_never(never)

    def _pooled(self, x: Tensor, view: Pool) -> Tensor:
        """Each entry's function of the tokens of its extent that are present."""
        found = []
        for j in range(oracle.entries(view, self.shape.k_len)):
            tokens = x[:, :, j * view.stride : j * view.stride + view.size]
            match view.function:
                case PoolFunction.MEAN:
                    found.append(tokens.mean(2))
                case PoolFunction.SUM:
                    found.append(tokens.sum(2))
                case PoolFunction.MAX:
                    # The first of the largest, to which alone the gradient flows.
                    found.append(tokens.gather(2, tokens.argmax(2, keepdim=True))[:, :, 0])
                case PoolFunction.MIN:
                    found.append(tokens.gather(2, tokens.argmin(2, keepdim=True))[:, :, 0])
                case _ as never:
                    assert_never(never)
        return torch.stack(found, 2) if found else x[:, :, :0]

    # ------------------------------------------------------------------------------------- output

    def output(self, output: Output) -> tuple[Tensor, Tensor | None]:
        """Value of an output, and its lse where it is that of one softmax."""
        match output:
            case Attended(branch=name):
                return self.branch(self.program.named(name))
            case Handed(out=out, lse=lse):
                return self._over(out, self.shape.v_dim), self._over(lse, 1)[..., 0]
            case Merged(operands=operands):
                outs, found = zip(*map(self.output, operands), strict=True)
                total = torch.logsumexp(torch.stack([_below(x) for x in found]), 0)
                weights = [torch.exp(_below(x) - total) for x in found]
                empty = torch.stack([x == -torch.inf for x in found]).all(0)
                merged = sum(w[..., None] * x for w, x in zip(weights, outs, strict=True))
                return torch.where(empty[..., None], 0.0, merged), torch.where(empty, -torch.inf, total)
            case Factor(value=value):
                return self._over(value, self.shape.v_dim), None
            case Sum(left=left, right=right):
                return self.output(left)[0] + self.output(right)[0], None
            case Product(factor=factor, operand=operand):
                return self._over(factor, self.shape.v_dim) * self.output(operand)[0], None
            case _ as never:
                assert_never(never)

    def _over(self, e: Scalar, channels: int) -> Tensor:
        """A scalar of rows, and of so many channels: float64 [B, Hq, rows, channels]."""
        where = torch.ones((*self.q.shape[:3], channels), dtype=torch.bool, device=self.q.device)
        variables = {**self.evaluator.variables, "d": np.arange(channels)}
        evaluator = replace(self.evaluator, variables=variables, memo={})
        return _Pairs(evaluator, self.floats, where, self.q.dtype).scalar(e).to(self.q.dtype).reshape(where.shape)


def _below(lse: Tensor) -> Tensor:
    """An lse, finite where a row is empty: its share is 0 all the same, and no gradient is NaN."""
    return torch.where(lse == -torch.inf, -1e30, lse)


def _softmax(
    logits: Tensor, present: Tensor, values: Tensor, sink: Tensor | None, left: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and lse; `logits` float64 [pairs] lists the entries of `present` bool [B, Hq, rows, Nk] in order.

    left: what dropout multiplies the weights by.
    """
    with torch.no_grad():
        dense = torch.full(present.shape, -torch.inf, dtype=logits.dtype, device=present.device)
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

    `dtype` is that of floats, `s` the scaled dot product of each. Values are kept per node, by identity.
    """

    evaluator: oracle.Evaluator
    floats: Mapping[str, Tensor]
    where: Tensor
    dtype: torch.dtype
    s: Tensor | None = None
    memo: dict[int, Tensor] = field(default_factory=dict)

    def scalar(self, e: Scalar) -> Tensor:
        """Value of a scalar on each pair: of `dtype`, int64 or bool [pairs]."""
        if id(e) not in self.memo:
            self.memo[id(e)] = self._scalar(e)
        return self.memo[id(e)]

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
            place.append((self.scalar(e) - origin).clamp(0, size - 1))
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
            exact = oracle.apply(e, [x.cpu().numpy() for x in operands])
            return torch.from_numpy(np.asarray(exact)).to(self.where.device)
        operands = [x.to(self.dtype) for x in operands]
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
