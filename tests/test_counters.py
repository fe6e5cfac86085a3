"""Which counter a launch gets, without a GPU: streams and captures are told, and allocations are on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attndsl.runtime import counters, lasting

DEVICE = torch.device("cuda", 0)


@dataclass
class Streams:
    """What stands in the place of the driver. `made`: the thread and the stream on which each counter was made."""

    current: int = 0
    capturing: bool = False
    device: int = 0
    made: list[tuple[int, int | None]] = field(default_factory=list)
    of_thread: threading.local = field(default_factory=threading.local)

    def zero(self, device: torch.device) -> Tensor:
        assert device == DEVICE
        self.made.append((threading.get_ident(), getattr(self.of_thread, "stream", None)))
        return torch.zeros(1, dtype=torch.int32)

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        self.of_thread.stream = stream
        yield


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    found = Streams()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: found.current, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing and found.device == 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: found.device, raising=False)
    monkeypatch.setattr(torch.cuda, "device", found.on_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found.current)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(lasting, "unrestricted", nullcontext)
    monkeypatch.setattr(counters, "_zero", found.zero)
    counters._of_stream.cache_clear()
    yield found
    counters._of_stream.cache_clear()


def test_launches_of_a_stream_share_a_counter(streams: Streams) -> None:
    first = counters.counter(DEVICE)
    assert counters.counter(DEVICE) is first
    streams.current = 7
    second = counters.counter(DEVICE)
    assert second is not first
    assert counters.counter(DEVICE) is second
    assert [stream for _, stream in streams.made] == [0, 7]


def test_what_stays_is_made_in_a_thread_of_its_own(streams: Streams) -> None:
    """The pool and the modes of the calling thread have no part in it."""
    with FakeTensorMode():
        made = counters.counter(DEVICE)
    assert not isinstance(made, FakeTensor)
    assert [thread == threading.get_ident() for thread, _ in streams.made] == [False]


def test_each_launch_of_a_graph_has_its_own(streams: Streams) -> None:
    """In the graph's own pool: in the thread that captures. So has one on the stream that threads have of their own."""
    streams.current = 7
    outside = counters.counter(DEVICE)
    for streams.capturing, streams.current in ((True, 7), (False, 2)):
        first, second = counters.counter(DEVICE), counters.counter(DEVICE)
        assert len({id(x) for x in (outside, first, second)}) == 3
    assert [thread == threading.get_ident() for thread, _ in streams.made] == [False, True, True, True, True]


def test_captures_are_those_of_the_device(streams: Streams) -> None:
    """On which another one may be the current one."""
    outside = counters.counter(DEVICE)
    streams.device = 1
    assert counters.counter(DEVICE) is outside
    streams.capturing = True
    assert counters.counter(DEVICE) is not outside
    assert streams.device == 1
