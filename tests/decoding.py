"""Calls of `attn.decode` made of test cases, and what they should give: each sequence alone, by the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import attndsl
from attndsl.program import Axis, Program
from attndsl.runtime.decode import Decoder, DecodeTensors
from attndsl.runtime.reference import reference
from attndsl.runtime.registry import decoder_of
from tests.accuracy import plain

SPARE_PAGES = 3


def decoder(program: Program, **options: Any) -> Decoder:
    """The decode kernels of a program, with tiles and slices of our choice."""
    known = decoder_of(attndsl.Attention(program)._key)
    return Decoder(known.engine, known.generators, **options)


def paged(k: Tensor, v: Tensor, page: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Caches [B, Hkv, M, D] in pages, in any order, among others that hold nothing but NaN; and their table."""
    batch, heads, tokens, _ = k.shape
    each = -(-tokens // page)
    order = torch.randperm(batch * each + SPARE_PAGES, generator=torch.Generator().manual_seed(seed))
    table = order[: batch * each].view(batch, each).to(torch.int32)
    pools = []
    for x in (k, v):
        nothing = float("nan") if x.is_floating_point() else 127
        pool = torch.full((len(order), heads, page, x.shape[3]), nothing, dtype=x.dtype)
        for b in range(batch):
            for i in range(each):
                part = x[b, :, i * page : (i + 1) * page]
                pool[table[b, i], :, : part.shape[1]] = part
        pools.append(pool)
    return pools[0], pools[1], table


def of_length(program: Program, inputs: Mapping[str, Tensor], length: int, rows: int) -> dict[str, Tensor]:
    """The inputs of a call on a sequence alone: its tokens, and its last rows."""
    found = {}
    for decl in program.inputs:
        x = inputs[decl.name]
        for axis, dim in enumerate(decl.dims):
            if x.shape[axis] == 1:
                continue
            if dim.axis is Axis.Q and dim.block == 1:
                x = x.narrow(axis, x.shape[axis] - rows, rows)
            elif dim.axis in (Axis.Q, Axis.K):
                x = x.narrow(axis, 0, length if dim.apart else -(-length // dim.block))
        found[decl.name] = x
    return found


def check_decode(
    program: Program, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], inputs: Mapping[str, Tensor],
    args: Mapping[str, int], out: Tensor, lse: Tensor, scale: float | None = None,
) -> None:  # fmt: skip
    """Assert that every sequence's rows are those of a call on it alone (k, v contiguous, heads before tokens)."""
    assert out.dtype == q.dtype and out.shape == (*q.shape[:3], v.shape[3])
    assert not out.isnan().any()
    softmax = program.branch.weights is None
    for b, length in enumerate(lengths):
        rows = min(q.shape[2], length)
        before = q.shape[2] - rows
        assert not out[b, :, :before].any(), "rows before the first token give 0"
        if softmax and program.branch.sink is None:
            assert (lse[b, :, :before] == -torch.inf).all()
        if rows == 0:
            continue
        # As entry b of a batch, which the pattern may read.
        alone, *caches = (
            x[b : b + 1].expand(len(lengths), -1, -1, -1)
            for x in (q[:, :, before:], k[:, :, :length], v[:, :, :length])
        )
        asked: Any = (program, alone, *caches, of_length(program, inputs, length, rows), args, scale)
        simple, simple_lse = plain(*asked)
        expected = reference(*asked, return_lse=True) if softmax else (reference(*asked), None)
        if expected[1] is None:
            close(out[b, :, before:], expected[0][b], simple[b])
            continue
        assert simple_lse is not None
        found, exact = lse[b, :, before:], expected[1][b]
        empty = exact == -torch.inf
        close(out[b, :, before:], expected[0][b], simple[b], exact[~empty])
        assert torch.equal(found == -torch.inf, empty)
        assert not out[b, :, before:][empty].any()
        close(found[~empty], exact[~empty], simple_lse[b][~empty])


def close(found: Tensor, expected: Tensor, simple: Tensor, lse: Tensor | None = None) -> None:
    """At most twice the error of a simple implementation, and a slack, with the scores' rounding as in `check`."""
    if not expected.numel():
        return
    size = max(1.0, float(expected.abs().amax()))
    score = 1.0 if lse is None or not lse.numel() else max(1.0, float(lse.abs().amax()))
    slack = 4 * torch.finfo(found.dtype).eps * size + 16 * torch.finfo(torch.float32).eps * size * score
    bound = 2 * float((simple.double() - expected).abs().amax()) + slack
    error = float((found.double() - expected).abs().amax())
    assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


def tensors_of(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], page: int | None, device: torch.device
) -> DecodeTensors:
    """A call over a contiguous or a paged cache, on a device."""
    k, v, table = (k, v, None) if page is None else paged(k, v, page)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    table = None if table is None else table.to(device)
    return DecodeTensors(q.to(device), k.to(device), v.to(device), seq_lens, table, None, None)
