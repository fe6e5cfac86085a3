"""Compile what a table runs in processes side by side, into the caches on disk, for the table's own process to time.

A machine with a GPU has many cores, and a compiler uses one. What is compiled so is read back, by attndsl and by
FlexAttention alike, when the table comes to it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.failures import short_reason
from benchmarks.peers import CPU_FLEX, CPU_PEERS, GPU_PEERS, OURS, CannotRun, Peer, add_site
from benchmarks.rows import Row, Sizes, select
from benchmarks.tables import make_job


def warm(
    rows: Sequence[Row], peers: Sequence[Peer], sizes: Sizes, backward: bool, workers: int, site: Path | None = None
) -> list[str]:
    """Make one call of every row and peer, in `workers` processes; what failed there, in a line each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        calls = {
            pool.submit(first_call, row.name, peer.name, sizes, backward, site): f"{row.name}: {peer.name}"
            for peer in (OURS, *peers)
            for row in rows
            if not row.refuses(sizes)
        }
        return [f"{calls[call]}: {call.result()}" for call in as_completed(calls) if call.result()]


def first_call(row: str, peer: str, sizes: Sizes, backward: bool, site: Path | None) -> str:
    """Compile and run a row by a peer, once; why it failed, or nothing."""
    if site is not None:
        add_site(site)
    known = {one.name: one for one in (OURS, *GPU_PEERS, *CPU_PEERS, CPU_FLEX)}
    job = make_job(select(row, ())[0], sizes)
    try:
        call = known[peer].build(job)
        if not backward:
            with torch.no_grad():
                call()
            return ""
        leaves = [x.requires_grad_() for x in (job.q, job.k, job.v)]
        torch.autograd.grad(call().sum(), leaves)
    except CannotRun:
        return ""  # the table says so
    except Exception as error:  # noqa: BLE001 - the table meets it again, and shows it in its cell
        return short_reason(error)
    return ""
