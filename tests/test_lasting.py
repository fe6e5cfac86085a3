"""What outlives a call: where and on which stream it is made, without a GPU, and what graphs need of it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import attndsl
from attndsl.program import TableDecl, Type
from attndsl.runtime import derive, lasting

DEVICE = torch.device("cuda", 0)


@dataclass
class Streams:
    """What stands in the place of the driver: stream 7 is current and may be captured, others are handed out."""

    capturing: bool = False
    handed_out: list[int] = field(default_factory=lambda: [7, 8])
    waited_for: list[int] = field(default_factory=list)
    of_thread: threading.local = field(default_factory=threading.local)
    # Threads in which all is allowed.
    free: set[int] = field(default_factory=set)

    @property
    def current(self) -> int:
        return int(getattr(self.of_thread, "stream", 7))

    def stream(self, device: torch.device) -> Any:
        number = self.handed_out.pop(0)
        return SimpleNamespace(number=number, synchronize=lambda: self.waited_for.append(number))

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.of_thread.stream = self.current, stream.number
        yield
        self.of_thread.stream = before

    @contextmanager
    def unrestricted(self) -> Iterator[None]:
        self.free.add(threading.get_ident())
        yield


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing and found.current == 7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(number=found.current))
    monkeypatch.setattr(torch.cuda, "Stream", found.stream)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(lasting, "unrestricted", found.unrestricted)
    return found


@pytest.mark.parametrize("capturing", [False, True])
def test_where_it_is_made(streams: Streams, capturing: bool) -> None:
    """In a thread that may take memory meanwhile; on the current stream, or while that is captured on another."""
    streams.capturing = capturing
    thread, stream = lasting.lasting(DEVICE, lambda: (threading.get_ident(), streams.current))
    assert thread != threading.get_ident() and streams.free == {thread}
    assert (stream, streams.waited_for) == ((8, [8]) if capturing else (7, []))


def test_no_mode_sees_it() -> None:
    decl = TableDecl("t", Type.INT, (), (2, 2), (5, 6, 7, 1 << 40))
    with FakeTensorMode(), torch.inference_mode():
        table = lasting.table_tensor(decl, torch.device("cpu"))
    assert not isinstance(table, FakeTensor) and not table.is_inference()
    assert table.tolist() == [[5, 6], [7, 1 << 40]] and table.dtype == torch.int64


def test_what_fails_is_raised() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        lasting.lasting(torch.device("cpu"), fail)


DRAWN = "causal & (same_block(16) | random(2, of = blocks(16), per = rows(16), seed = h))"


def qkv(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(3)]


def drawn_of(attn: attndsl.Attention) -> list[Tensor]:
    from attndsl.runtime.registry import engine_of

    return [x for kept in engine_of(attn._key)._kept.values() for x in kept.values()]


def test_a_first_call_for_inference_leaves_the_next_one_to_train() -> None:
    attn = attndsl.compile(DRAWN.replace("16", "24"))
    given = qkv(100)
    with torch.inference_mode():
        first = attn(*given)
    assert drawn_of(attn) and not any(x.is_inference() for x in drawn_of(attn))
    leaves = [x.requires_grad_() for x in given]
    out = attn(*leaves)
    assert torch.equal(out, first)
    out.sum().backward()
    assert all(x.grad is not None and bool(x.grad.any()) for x in leaves)


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_graph_reads_is_not_freed(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    """Calls of many lengths make an engine forget what it kept of the first: a graph of that call still reads it."""
    attn = attndsl.compile(DRAWN.replace("16", "40" if captured else "48"))
    with monkeypatch.context() as patch:
        patch.setattr(derive, "capturing", lambda device: captured)
        patch.setattr(derive, "MAX_KEPT", 2)
        attn(*qkv(90))
        (drawn,) = map(weakref.ref, drawn_of(attn))
        patch.setattr(derive, "capturing", lambda device: False)
        for tokens in (91, 92, 93):
            attn(*qkv(tokens))
    gc.collect()
    assert (drawn() is not None) is captured


def test_lists_do_not_keep_the_plan_that_they_were_first_made_of() -> None:
    attn = attndsl.compile("attention a { input p : blocks(16)[b, g, q]  attend causal & p }")
    q, k, v = qkv(64)
    plan = torch.tensor([[[[0, 1]] * 64] * 2], dtype=torch.int32)
    gone = weakref.ref(plan)
    for x in (q, k, v):
        x.requires_grad_()
    attn(q, k, v, p=plan).sum().backward()
    q.grad = k.grad = v.grad = None
    del plan
    gc.collect()
    assert gone() is None
