"""The tables `forward`, `backward` and `cpu`: every row, ours and every peer, checked and timed."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.dense import check_backward, check_forward
from benchmarks.failures import short_reason
from benchmarks.peers import OURS, Attention, CannotRun, Job, Peer
from benchmarks.report import Cell, Report, RowResult
from benchmarks.rows import Row, Sizes, count_pairs
from benchmarks.timing import Call, milliseconds

# What a large matrix product and a copy reach on an H100; the floor of a row is the larger of the two times.
MATMUL_FLOPS = 800e12
MEMORY_BYTES = 3.0e12
# Matrix products of a backward pass beside those of a forward: 5 to 2.
BACKWARD_FACTOR = 2.5


def make_job(row: Row, sizes: Sizes, seed: int = 0) -> Job:
    generator = torch.Generator(device=sizes.device).manual_seed(seed)
    shape = (sizes.batch, sizes.heads, sizes.n, sizes.dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=sizes.device, dtype=torch.float32).to(sizes.dtype)
        for _ in range(3)
    )
    return Job(row, sizes, row.inputs(sizes), q, k, v)


def floor_ms(flop: float, sizes: Sizes, backward: bool) -> float:
    """The least time for the arithmetic, and for moving q, k, v, o (backward: and their gradients) once."""
    tensors = 8 if backward else 4
    moved = tensors * sizes.batch * sizes.heads * sizes.n * sizes.dim * sizes.dtype.itemsize
    return 1e3 * max(flop / MATMUL_FLOPS, moved / MEMORY_BYTES)


def measure(peer: Peer, job: Job, backward: bool, time_call: Callable[[Call], float]) -> Cell:
    """Build, check (ours only) and time one peer; any failure becomes the cell's note."""
    try:
        start = time.perf_counter()
        call = peer.build(job)
        if backward:
            return measure_backward(peer, job, call, start, time_call)
        with torch.no_grad():
            out = call()
            first_s = finished(out, start)
            rule = job.row.rule(job.sizes, job.inputs)
            if peer is OURS and not (verdict := check_forward(out, job.q, job.k, job.v, rule)).passed:
                return Cell(None, first_s, f"FAILED: error {verdict.error:.1e}, allowed {verdict.allowed:.1e}")
            del out
            return Cell(time_call(call), first_s)
    except CannotRun as reason:
        return Cell(note=str(reason))
    except Exception as error:  # noqa: BLE001 - a peer that breaks, in whatever way, costs its cell and not the run
        return Cell(note=short_reason(error))


def measure_backward(peer: Peer, job: Job, call: Attention, start: float, time_call: Callable[[Call], float]) -> Cell:
    leaves = (job.q, job.k, job.v)
    for leaf in leaves:
        leaf.requires_grad_()
    out = call()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    grads = backward()
    first_s = finished(grads[0], start)
    rule = job.row.rule(job.sizes, job.inputs)
    if peer is OURS:
        q, k, v = (leaf.detach() for leaf in leaves)
        verdict = check_backward(grads, q, k, v, dout, rule)
        if not verdict.passed:
            return Cell(None, first_s, f"FAILED: error {verdict.error:.1e}, allowed {verdict.allowed:.1e}")
    del grads
    return Cell(time_call(backward), first_s)


def finished(result: Tensor, start: float) -> float:
    """Seconds since `start` once the result is there."""
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - start


def run_table(
    rows: Sequence[Row],
    peers: Sequence[Peer],
    sizes: Sizes,
    *,
    backward: bool = False,
    command: str = "",
    out: Path | None = None,
    budget_s: float = float("inf"),
) -> Report:
    """Measure every row with ours and each peer on the same inputs.

    Progress goes to stderr; `out` is rewritten after each row, so that an interrupted run keeps what it has.
    No row is started once `budget_s` seconds have passed.
    """
    dtype = str(sizes.dtype).removeprefix("torch.")
    setting = (
        f"B={sizes.batch} H={sizes.heads} N={sizes.n} D={sizes.dim} {dtype}, {'backward' if backward else 'forward'}; "
        "ms (effective TFLOP/s), then the time relative to attndsl's"
    )
    report = Report(command, setting)
    started = time.perf_counter()
    for row in rows:
        if refusal := row.refuses(sizes):
            print(f"{row.name}: left out, {refusal}", file=sys.stderr)
            continue
        if time.perf_counter() - started > budget_s:
            print(f"{row.name}: left out, the time budget of {budget_s:g} s is used up", file=sys.stderr)
            continue
        report.rows.append(run_row(row, peers, sizes, backward))
        if out is not None:
            report.save(out)
    return report


def run_row(row: Row, peers: Sequence[Peer], sizes: Sizes, backward: bool) -> RowResult:
    pairs = count_pairs(row, sizes, row.inputs(sizes))
    flop = 4.0 * sizes.dim * pairs * (BACKWARD_FACTOR if backward else 1)
    cells = {}
    for peer in (OURS, *peers):
        cells[peer.name] = measure(peer, make_job(row, sizes), backward, lambda call: milliseconds(call, sizes.device))
        cell = cells[peer.name]
        shown = cell.note if cell.ms is None else f"{cell.ms:.4g} ms, first result after {cell.first_s:.1f} s"
        print(f"{row.name}: {peer.name}: {shown}", file=sys.stderr, flush=True)
        gc.collect()
        if sizes.device.type == "cuda":
            torch.cuda.empty_cache()
    area = pairs / (sizes.batch * sizes.heads * sizes.n**2)
    floor = floor_ms(flop, sizes, backward) if sizes.device.type == "cuda" else None
    return RowResult(row.name, row.title, area, flop, floor, cells)
