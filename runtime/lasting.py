"""Tensors that outlive the call that first needs them: tables, and what follows from lengths alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from attndsl.program import TableDecl, Type
from attndsl.runtime.cuda import unrestricted
from attndsl.widths import LARGEST

_Made = TypeVar("_Made")
# What captured graphs read. Nothing tells when a graph is gone.
_IN_GRAPHS: list[object] = []


def lasting(device: torch.device, make: Callable[[], _Made]) -> _Made:
    """What `make` returns, on the device's current stream.

    Made in a thread of its own. Before it captures a graph, torch.compile runs it with all that its thread allocates
    in the graph's pool, where nothing may stay but outputs; and no mode of this thread is to see what stays.

    While the current stream is captured, nothing that is started there happens before the graph is replayed. Then
    `make` runs on another stream, and is waited for.
    """
    run = make
    if device.type == "cuda":
        own = None if capturing(device) else torch.cuda.current_stream(device)

        def run() -> _Made:
            with unrestricted() if torch.version.hip is None else nullcontext():
                stream = _uncaptured(device) if own is None else own
                with torch.cuda.stream(stream):
                    found = make()
                if own is None:
                    stream.synchronize()
                return found

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def hold(found: object) -> None:
    """Keep what a graph reads that is being captured: the caller may forget it, and the graph is replayed."""
    _IN_GRAPHS.append(found)


def stream_of(device: torch.device) -> int:
    """Which stream of the device is current, by a number."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether a graph of the device's current stream is being captured."""
    if device.type != "cuda":
        return False
    if torch._C._cuda_getDevice() == device.index:
        return torch.cuda.is_current_stream_capturing()
    # It is asked of the stream of the current device.
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def table_tensor(table: TableDecl, device: torch.device) -> Tensor:
    """A compile-time table as a tensor of its declared shape, of integers that no kernel for GPUs reads in 64 bits."""
    dtype = {Type.INT: torch.int32, Type.FLOAT: torch.float32, Type.BOOL: torch.bool}[table.type]
    if table.type is Type.INT and any(not -LARGEST <= x <= LARGEST for x in table.values):
        dtype = torch.int64
    return number_tensor(table.values, table.shape, dtype, device)


@functools.cache
def number_tensor(
    values: tuple[int | float | bool, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """These numbers, one tensor for the whole process: launches are forgotten one day, and graphs still read what they
    were given."""
    return lasting(device, lambda: torch.tensor(values, dtype=dtype, device=device).reshape(shape))


def _uncaptured(device: torch.device) -> torch.cuda.Stream:
    """A stream that no graph is captured from. They are handed out in turn, so the next may be one that is."""
    while True:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            if not torch.cuda.is_current_stream_capturing():
                return stream
