"""What goes before and after Hopper's one kernel of gradients, interpreted: that kernel has no interpreter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import attndsl
from attndsl.codegen.triton_rows import rows_source
from attndsl.piece_plans import backward_plans
from attndsl.plan import Backend
from attndsl.runtime.gluon_backward import ROUND, ROWS, rows_parameters
from attndsl.runtime.triton_backward import row_stride
from attndsl.runtime.triton_launch import prepare
from attndsl.targets import make_spec
from tests.gpu import interprets

BATCH, HEADS, KV_HEADS = 2, 3, 1


@interprets
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("rows", [1, 65, 130])
@pytest.mark.parametrize("inside", [False, True], ids=["heads outside tokens", "heads inside tokens"])
def test_rows_and_rounding(rows: int, dim: int, inside: bool) -> None:
    """delta and lse as they are defined, zeros in the sums; and these, in the order in which they leave, as dq."""
    program = attndsl.compile("causal").program
    spec = make_spec("sm_90", "triton", HEADS, KV_HEADS, dim, dtype="float16")
    plan = backward_plans(program, replace(spec, backend=Backend.GLUON), uses_lse=True)[0]
    portable = replace(plan, spec=spec)
    size, keys = (BATCH, HEADS, rows, dim), torch.zeros(BATCH, KV_HEADS, 140, dim, dtype=torch.float16)

    def tensor() -> torch.Tensor:
        x = torch.randn(BATCH, rows, HEADS, dim) if inside else torch.randn(size)
        return (x.transpose(1, 2) if inside else x).to(torch.float16)

    q, out, dout, dq = (tensor() for _ in range(4))
    lse, d_lse = torch.randn(BATCH, HEADS, rows), torch.randn(BATCH, HEADS, rows)
    lse[0, 1, 0] = -math.inf
    delta, row_lse = torch.full((2, BATCH * HEADS, row_stride(rows)), math.nan)
    sums = torch.full(size, math.nan)
    call = (q, keys, keys, out, lse, 1.0, dout, d_lse, dq, keys, keys, delta, row_lse, sums)
    text, given = rows_source(portable), rows_parameters(portable, q, keys, keys, (), dout)
    grid = -(-rows // plan.tiling.block_q) * BATCH * HEADS
    before, after = (prepare(portable, text, x, grid, given, aligned=True, device=q.device) for x in (ROWS, ROUND))
    before(call)
    assert not sums.any()
    products = out.double() * dout.double()
    exact = products.sum(-1) - d_lse.double()
    # However the sums are made.
    rounding = torch.finfo(torch.float32).eps * (dim + 1) * (products.abs().sum(-1) + d_lse.abs())
    assert bool(((delta[:, :rows].view_as(lse) - exact).abs() <= rounding).all())
    wanted = torch.where(lse == -math.inf, math.inf, lse * math.log2(math.e))
    torch.testing.assert_close(row_lse[:, :rows].view_as(lse), wanted)
    # A thread has, of each 32 columns, two in a row of each 8.
    right = torch.randn(size)
    left = right.reshape(*size[:3], dim // 32, 4, 4, 2).transpose(4, 5)
    sums.copy_(left.reshape(size))
    after(call)
    assert torch.equal(dq, right.to(torch.float16))
