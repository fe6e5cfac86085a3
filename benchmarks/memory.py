"""Peak memory on a GPU: of forward and backward beside the least that autograd could do with, and of routed programs as
their tokens grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attndsl
from benchmarks.failures import short_reason
from benchmarks.peers import OURS, CannotRun, Peer
from benchmarks.rows import Row, Sizes
from benchmarks.tables import make_job

# What the peak may be, as a multiple of `least_bytes`.
BAR = 1.01
EXAMPLES = Path(__file__).parent.parent / "examples" / "patterns"
# Routed examples, whose memory must be linear in their tokens: a list of blocks a row, of groups of heads, and a map.
ROUTED = ("moba", "nsa", "xattention")


def least_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Bytes of q, k, v, the output and the gradients of all four, and of lse and delta, one float32 a row each."""
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    out = rows * v.shape[3] * v.element_size()
    return 2 * (sum(x.numel() * x.element_size() for x in (q, k, v)) + out) + 2 * rows * torch.float32.itemsize


def peak_bytes(call: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> int:
    """Peak of one forward and one backward pass: what was allocated meanwhile, and q, k, v and dout themselves.

    call: attends from q to k and v, which require gradients. dout: the gradient of its output.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(call(), (q, k, v), dout)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del gradients
    return peak + sum(x.untyped_storage().nbytes() for x in (q, k, v, dout))


def run_memory(rows: Sequence[Row], peers: Sequence[Peer], sizes: Sizes) -> list[list[str]]:
    """A table of MiB, with the multiple of the least in brackets; rows that do not fit the sizes are left out."""
    table = [["pattern", "least MiB", *(peer.name for peer in (OURS, *peers))]]
    for row in rows:
        if not row.refuses(sizes):
            job = make_job(row, sizes)
            least = least_bytes(job.q, job.k, job.v)
            cells = [cell(peer, row, sizes, least) for peer in (OURS, *peers)]
            table.append([row.title, f"{least / 2**20:.1f}", *cells])
    return table


def cell(peer: Peer, row: Row, sizes: Sizes, least: int) -> str:
    """A peer's peak at its second call: the first one may compile and tune."""
    try:
        job = make_job(row, sizes)
        for x in (job.q, job.k, job.v):
            x.requires_grad_()
        call, dout = peer.build(job), torch.randn_like(job.q)
        _, peak = (peak_bytes(call, job.q, job.k, job.v, dout) for _ in range(2))
        return f"{peak / 2**20:.1f} ({peak / least:.3f})"
    except CannotRun as reason:
        return str(reason)
    except Exception as error:  # noqa: BLE001 - a peer that breaks costs its cell and not the run
        return short_reason(error)


def run_growth(lengths: Sequence[int], heads: int, dim: int, dtype: torch.dtype) -> Iterator[list[str]]:
    """Rows of a table: bytes a token that forward and backward hold beside q, k, v and dout, at each length."""
    yield ["example", *(f"{n // 1024}K" for n in lengths)]
    for name in ROUTED:
        yield [name, *(growth_cell(name, n, heads, dim, dtype) for n in lengths)]


def growth_cell(name: str, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> str:
    kv_heads = max(1, heads // 16) if name == "nsa" else heads
    try:
        attn = attndsl.compile(EXAMPLES / f"{name}.attn")
        q, k, v = (
            torch.randn(1, h, tokens, dim, device="cuda", dtype=dtype).requires_grad_()
            for h in (heads, kv_heads, kv_heads)
        )
        declared = {decl.name for decl in attn.program.inputs}
        given: dict[str, Any] = {}
        if "gate" in declared:
            given = {"gate": torch.rand(1, heads, tokens, 3, device="cuda", dtype=dtype)}
        dout = torch.randn_like(q)

        def call() -> Tensor:
            out: Tensor = attn(q, k, v, **given)
            return out

        _, peak = (peak_bytes(call, q, k, v, dout) for _ in range(2))
        held = sum(x.untyped_storage().nbytes() for x in (q, k, v, dout))
        return f"{(peak - held) / tokens:.0f}"
    except Exception as error:  # noqa: BLE001 - a length that does not fit costs its cell and not the run
        return short_reason(error)
