"""Queries of documents, pooled by classes that begin anew with each: which rows a class has, and its entry for each.

The operators `attndsl::spread_runs` and its backward: in the place of each row its run's entry, whose gradient is the
sum of those of its rows. They are the two of `runs.py` in the other order, so sums have one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.branches import Pool, PoolFunction, Queries
from attndsl.runtime.runs import Runs, document_entries, pool_tokens, pooled_runs, runs_of, spread_entries
from attndsl.runtime.transforms import differentiable, mapped
from attndsl.runtime.triton_version import INTERPRETED

_LIBRARY = Library("attndsl", "FRAGMENT")
_RUNS = "bool kernel, Tensor number, Tensor first, Tensor end) -> Tensor"
_LIBRARY.define(f"spread_runs(str program, Tensor x, {_RUNS}")
_LIBRARY.define(f"spread_runs_backward(str program, Tensor gradient, {_RUNS}")
_SUM = PoolFunction.SUM.value


def queries_of_documents(
    program: str, q: Tensor, queries: Queries, first: int, documents: Tensor, backend: str = "auto",
    present: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [B, H, rows, D], the first at position `first`, with each row the function of those of the call that are of its
    class: of one document, at positions of it with the same quotient by the size.

    documents: ids [B or 1?, tokens]. present: int32 [B], how many tokens are, where not all are: rows after them get
    zeros. program, backend: as in `pool.pooled`.
    """
    runs = _classes(documents.expand(q.shape[0], -1).contiguous(), queries.size, first, q.shape[2], present)
    runs = Runs(*(x.unsqueeze(1).expand(-1, q.shape[1], -1).contiguous() for x in runs))
    pool = Pool(queries.function, queries.size, queries.size, packed=queries.packed)
    kernel = q.is_cuda or (backend == "triton" and INTERPRETED)
    return _called(program, pooled_runs(program, q, pool, runs, backend), kernel, *runs)


def _classes(ids: Tensor, size: int, first: int, rows: int, present: Tensor | None) -> Runs:
    """Those of the rows of a call, whose ids are [B, tokens]. Rows at negative positions are a class."""
    entries, _ = document_entries(ids, size, size)
    position = torch.arange(first, first + rows, device=ids.device)
    there = (position >= 0) & (position < ids.shape[-1])
    number = entries.number[:, position.clamp(0, max(0, ids.shape[-1] - 1))] if ids.shape[-1] else position
    runs = runs_of(torch.where(there, number, -1).expand(ids.shape[0], rows).contiguous())
    if present is None:
        return runs
    return runs._replace(end=torch.minimum(runs.end, (present.view(-1, 1) - first).clamp(min=0).to(torch.int32)))


def _spread(program: str, x: Tensor, kernel: bool, number: Tensor, first: Tensor, end: Tensor) -> Tensor:
    return spread_entries(program, x, x, _SUM, 1, kernel, number, first, end)


def _spread_backward(
    program: str, gradient: Tensor, kernel: bool, number: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    return pool_tokens(program, gradient, _SUM, 1, kernel, number, first, end)


def _fake(program: str, x: Tensor, kernel: bool, number: Tensor, first: Tensor, end: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.program, _, ctx.kernel, *runs = inputs
    ctx.save_for_backward(*runs)


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    found = torch.ops.attndsl.spread_runs_backward(ctx.program, gradient, ctx.kernel, *ctx.saved_tensors)
    return None, found, None, None, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("spread_runs", _spread, _device)
    _LIBRARY.impl("spread_runs_backward", _spread_backward, _device)
_LIBRARY.impl("spread_runs", _fake, "Meta")
_LIBRARY.impl("spread_runs_backward", _fake, "Meta")
mapped(_LIBRARY, "spread_runs", "spread_runs_backward")
_called = differentiable(_LIBRARY, "spread_runs", _setup, _differentiate)
