"""The oracle, its torch half: the output of a program, dense, in float64, differentiable.

It evaluates scores on allowed pairs only: every float scalar is a vector over the pairs where a mask
is true, and each side of an `if` only on the pairs that take it. So nothing is computed, and no
gradient flows, where the language says that nothing is read: a logarithm of a negative number above
the diagonal of a causal program does no harm. Scalars without floats come from `attndsl.oracle`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, assert_never, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl import oracle
from attndsl.alone import Alone, separate, sequences, together
from attndsl.branches import (
    Attended,
    Branch,
    Factor,
    Given,
    Handed,
    Merged,
    Output,
    Part,
    Pick,
    Pool,
    PoolFunction,
    Product,
    Queries,
    Sum,
    View,
    Within,
)
from attndsl.dropout import kept
from attndsl.members import Runs
from attndsl.oracle_entries import tokens_of
from attndsl.oracle_views import shares_of
from attndsl.program import Axis, CallShape, Program, Scalar
from attndsl.runtime.reference_scalars import Pairs
from attndsl.runtime.reference_skip import left_by_skipping


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
    left: tuple[Tensor, Tensor] | None = None
    if dropout is not None:
        rate, seed = dropout
        views = [part.view for branch in program.branches for part in branch.parts]
        entries = max(oracle.entries(view, shape.k_len) for view in views)
        found = (torch.from_numpy(kept(program, shape, rate, seed, n)) for n in (None, max(entries, shape.k_len)))
        tokens, others = (x.to(q.device, dtype) / (1.0 - rate) for x in found)
        left = tokens, others
    q, k, v = (x.to(dtype) for x in (q, k, v))
    whole = _Call(program, shape, q, k, v, oracle.Evaluator.of_call(program, shape, exact, args), floats, scale, left)
    out, lse = _apart(whole) if separate(program) else whole.result()
    if not return_lse:
        return out
    if lse is None:
        raise ValueError("lse is undefined under `weights` and of what is not one softmax")
    return out, lse


def _apart(call: _Call) -> tuple[Tensor, Tensor | None]:
    """Output and lse of a call whose sequences stand alone; rows of no sequence have no output."""
    program, shape, evaluator = call.program, call.shape, call.evaluator
    out = call.q.new_zeros(*call.q.shape[:3], shape.v_dim)
    lse: Tensor | None = call.q.new_full(call.q.shape[:3], -torch.inf)
    for x in sequences(program, shape, evaluator.inputs):
        found, own_lse = call.alone(x).result()
        place = torch.zeros(out.shape[:3], dtype=torch.bool, device=out.device)
        place[x.entry, :, x.rows] = True
        out = out.masked_scatter(place[..., None], found)
        lse = None if lse is None or own_lse is None else lse.masked_scatter(place, own_lse)
    return out, lse


def probabilities(
    program: Program, branch: Branch, q: Tensor, k: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None = None, v_dim: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """exp(logit - lse) of each part of a branch, as `probs` reads them: float64 [B, Hq, rows, keys], of a program whose
    calls are one sequence each.

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
    left: tuple[Tensor, Tensor] | None  # what dropout multiplies weights by: of tokens, and of entries
    before: tuple[oracle.Evaluator, ...] = ()  # of the sequences whose entries are drawn first
    packed: bool = False  # whether it is a document of a call

    def alone(self, x: Alone) -> _Call:
        """The call of a sequence that stands alone in this one."""
        at, own, shape, left = slice(x.entry, x.entry + 1), together(self.program), x.shape(self.shape), self.left
        return _Call(
            own, shape, self.q[at, :, x.rows], self.k[at, :, x.keys], self.v[at, :, x.keys], self._evaluator(x),
            x.inputs(self.program, self.floats), self.scale,
            None if left is None else (left[0][at, :, x.rows, x.keys], left[1][at, :, x.rows]),
            () if left is None else tuple(map(self._evaluator, x.earlier)), self.program.packed is not None,
        )  # fmt: skip

    def _evaluator(self, x: Alone) -> oracle.Evaluator:
        """That of a sequence that stands alone in this call."""
        inputs = x.inputs(self.program, self.evaluator.inputs)
        shape, args = x.shape(self.shape), self.evaluator.args
        return oracle.Evaluator.of_call(together(self.program), shape, inputs, args, x.entry)

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Output and lse of the program; where there are no tokens there is no output, whatever it makes of that."""
        output = self.program.output
        if output is None:
            return self.branch(self.program.branches[0])
        out, lse = self.output(output)
        if self.shape.k_len:
            return out, lse
        nowhere = torch.zeros((), dtype=torch.bool, device=out.device)
        if isinstance(output, Merged) and lse is not None:
            lse = torch.where(nowhere, lse, -torch.inf)
        return torch.where(nowhere, out, 0.0), lse

    def branch(self, branch: Branch) -> tuple[Tensor, Tensor | None]:
        """Output and lse of a branch, whose parts share one softmax."""
        if branch.weights is not None and (branch.score is not None or branch.sink is not None):
            raise ValueError("`weights` stands in place of `score` and `softmax`")
        if branch.within is not None:
            return self._two_levels(branch, branch.within)
        parts = [self._scores(branch, part) for part in branch.parts]
        if branch.skip is not None:
            # Each part by what its own tiles have shown.
            parts = [(seen & left_by_skipping(s, seen, branch.skip), s, v) for seen, s, v in parts]
        present, dense, values = (
            torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), (-1, -1, -2), strict=True)
        )
        left = self._left(branch.parts)
        if branch.weights is not None:
            return (dense if left is None else dense * left) @ values, None
        sink: Tensor | None = None
        if branch.sink is not None:
            sink = self._over(branch.sink, 1)[..., 0]
        return _softmax(dense[present], present, values, sink, left)

    def _left(self, parts: tuple[Part, ...]) -> Tensor | None:
        """What dropout multiplies the weights of the parts' keys by: [B, Hq, rows, keys]."""
        if self.left is None:
            return None
        found = []
        for view in (part.view for part in parts):
            if view is not None and view.runs is not None:
                found.append(self._left_of_runs(view.runs, self.left[1]))
                continue
            if self.packed and isinstance(view, Pick) and view.room.axis is Axis.CONST:
                found.append(self._left_of_listed(view, self.left[1]))
                continue
            first = 0 if view is None else sum(oracle.entries(view, e.shape.k_len) for e in self.before)
            found.append(self.left[view is not None][..., first : first + oracle.entries(view, self.shape.k_len)])
        return torch.cat(found, -1)

    def _left_of_runs(self, runs: Runs, left: Tensor) -> Tensor:
        """The same of the runs of an input, of which each head has its own."""
        found = []
        for h in range(self.shape.heads):
            first = sum(len(e.extents(runs, 0, h)) for e in self.before)
            found.append(pad(left[:, h, :, first:], (0, first))[..., : self.shape.k_len])
        return torch.stack(found, 1)

    def _left_of_listed(self, view: Pick, left: Tensor) -> Tensor:
        """The same of tokens that every document lists: a token draws once, by its number among those listed so far."""
        found = []
        for h in range(self.shape.heads):
            first = sum(len(_listed_tokens(e, view, h)) for e in self.before)
            own = {token: first + i for i, token in enumerate(_listed_tokens(self.evaluator, view, h))}
            place = [own.get(token, 0) for token in self.evaluator.listed(view, 0, h)]
            found.append(left[:, h][..., place])
        return torch.stack(found, 1)

    def _two_levels(self, branch: Branch, within: Within) -> tuple[Tensor, Tensor | None]:
        """Output of a softmax inside each member, its share the probability that another branch gives it; the lse is
        that branch's."""
        by = self.program.named(within.branch)
        given = [
            (p, part.view, tokens_of(self.evaluator, part.view, p.shape[3]))
            for part, p in zip(by.parts, self.probabilities(by), strict=True)
        ]
        present, logits, values = self._scores(branch, branch.parts[0])
        out, left = self.q.new_zeros(*self.q.shape[:3], self.shape.v_dim), self._left(branch.parts)
        for low in range(0, self.shape.k_len, within.keys):
            own = slice(low, low + within.keys)
            share = self.q.new_zeros(self.q.shape[:3])
            for masses, view, tokens in given:
                if tokens is None:
                    size, stride = (1, 1) if view is None else (view.size, view.stride)
                    part_of = shares_of(low, within.keys, size, stride, self.shape.k_len)
                else:
                    part_of = (tokens[..., own].sum(-1) / tokens.sum(-1).clip(min=1))[..., None]
                share = share + (masses @ torch.from_numpy(part_of).to(masses)).view(share.shape)
            drops = None if left is None else left[..., own]
            inside = _softmax(logits[..., own][present[..., own]], present[..., own], values[:, :, own], None, drops)
            out = out + share[..., None] * inside[0]
        return out, self.branch(by)[1]

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
        queries = self.q if branch.queries is None else self._pooled_queries(branch.queries)
        dots = queries @ keys.transpose(-1, -2)
        allowed = torch.from_numpy(self.evaluator.seen(part, branch.queries)).to(self.q.device)
        more: Tensor | None = None
        if part.view is not None and part.view.counted and part.view.runs is not None:
            more = dots.new_zeros(*dots.shape[:2], 1, dots.shape[3])
            for b, h in np.ndindex(*dots.shape[:2]):
                for j, (begin, end) in enumerate(self.evaluator.extents(part.view.runs, b, h)):
                    more[b, h, 0, j] = math.log(end - begin)
            more = more.expand_as(dots)
        elif isinstance(part.view, Pick) and part.view.weight is not None:
            own = {**self.evaluator.variables, "k": np.arange(dots.shape[-1])}
            everywhere = torch.ones(dots.shape, dtype=torch.bool, device=dots.device)
            weights = Pairs(replace(self.evaluator, variables=own, memo={}), self.floats, everywhere, dots.dtype)
            more = weights.scalar(part.view.weight).to(dots.dtype).reshape(dots.shape).clamp(min=0).log()
        elif part.view is not None and part.view.counted:
            first = torch.arange(keys.shape[-2], device=self.q.device) * part.view.stride
            more = (self.shape.k_len - first).clamp(max=part.view.size).to(dots.dtype).log().expand_as(dots)

        def scored(where: Tensor, e: Scalar | None) -> Tensor:
            """The scalar on these pairs, given s; s itself without one."""
            pairs = Pairs(self.evaluator, self.floats, where, dots.dtype)
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
            case Pick():
                return self._picked(self.k, view), self._picked(self.v, view)
            case Given(keys=keys, values=values):
                lead = (self.shape.batch, self.shape.kv_heads, oracle.entries(view, self.shape.k_len), -1)
                return self.floats[keys].expand(lead), self.floats[values].expand(lead)
            case _ as never:
                assert_never(never)

    def _pooled(self, x: Tensor, view: Pool) -> Tensor:
        """Each entry's function of the tokens of its extent that are present."""
        if view.runs is not None:
            return self._pooled_runs(x, view.function, view.runs)
        starts = range(0, oracle.entries(view, self.shape.k_len) * view.stride, view.stride)
        found = [_of_tokens(view.function, x[:, :, first : first + view.size]) for first in starts]
        return torch.stack(found, 2) if found else x[:, :, :0]

    def _picked(self, x: Tensor, view: Pick) -> Tensor:
        """The listed tokens of a batch entry and a key head; zeros where none is."""
        share, count = self.shape.heads // self.shape.kv_heads, oracle.entries(view, self.shape.k_len)
        found = []
        for b, g in np.ndindex(*x.shape[:2]):
            listed = self.evaluator.listed(view, b, g * share)
            rows = [x[b, g, t] if 0 <= t < self.shape.k_len else x.new_zeros(x.shape[3]) for t in listed]
            found.append(torch.stack(rows) if rows else x.new_zeros(0, x.shape[3]))
        return torch.stack(found).reshape(*x.shape[:2], count, x.shape[3])

    def _pooled_runs(self, x: Tensor, function: PoolFunction, runs: Runs) -> Tensor:
        """Each run's function of its tokens, those of a batch entry and a key head in order, and zeros after them."""
        share, found = self.shape.heads // self.shape.kv_heads, []
        for b, g in np.ndindex(*x.shape[:2]):
            of_head = x[b : b + 1, g : g + 1]
            extents = self.evaluator.extents(runs, b, g * share)
            each = [_of_tokens(function, of_head[:, :, first:end]) for first, end in extents]
            each += [x.new_zeros(1, 1, x.shape[3])] * (x.shape[2] - len(each))
            found.append(torch.stack(each, 2) if each else of_head)
        return torch.cat(found).reshape(x.shape) if found else x

    def _pooled_queries(self, queries: Queries) -> Tensor:
        """In the place of each row the function of all of the call's rows of its class: float64 [B, Hq, rows, D]."""
        classes = self.evaluator.variables["q"].flatten() // queries.size
        rows = [torch.from_numpy(np.flatnonzero(classes == own)) for own in classes]
        found = [_of_tokens(queries.function, self.q[:, :, of_class.to(self.q.device)]) for of_class in rows]
        return torch.stack(found, 2) if found else self.q

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
        return Pairs(evaluator, self.floats, where, self.q.dtype).scalar(e).to(self.q.dtype).reshape(where.shape)


def _of_tokens(function: PoolFunction, tokens: Tensor) -> Tensor:
    """One vector of several: [B, H, tokens, D] as [B, H, D]."""
    match function:
        case PoolFunction.MEAN:
            return tokens.mean(2)
        case PoolFunction.SUM:
            return tokens.sum(2)
        case PoolFunction.MAX:
            # The first of the largest, to which alone the gradient flows.
            return tokens.gather(2, tokens.argmax(2, keepdim=True))[:, :, 0]
        case PoolFunction.MIN:
            return tokens.gather(2, tokens.argmin(2, keepdim=True))[:, :, 0]
        case _ as never:
            assert_never(never)


def _listed_tokens(evaluator: oracle.Evaluator, view: Pick, h: int) -> list[int]:
    """The tokens that a document has of those that a head lists, in order."""
    return sorted({token for token in evaluator.listed(view, 0, h) if 0 <= token < evaluator.shape.k_len})


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
