"""Counters from which the programs of a kernel take numbers: zero before a launch, and left so by the kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attndsl.runtime.lasting import lasting

# The stream that is another one in each thread.
_PER_THREAD = 2


def counter(device: torch.device) -> Tensor:
    """An int32 [1] for the kernel that is launched next on a device's current stream.

    The kernels of a stream run one after another, so they share one. What a graph captures may run beside others when
    it is replayed: there each has its own, which the graph sets to zero.
    """
    if torch._C._cuda_getDevice() != device.index:
        # Whether a stream is captured is asked of that of the current device.
        with torch.cuda.device(device):
            return counter(device)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if stream == _PER_THREAD or torch.cuda.is_current_stream_capturing():
        return _zero(device)
    return _of_stream(device, stream)


@functools.cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    """Zeroed on that stream, which is the current one."""
    return lasting(device, lambda: _zero(device))


def _zero(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
