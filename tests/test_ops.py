"""Attention inside torch: operator checks, torch.compile, torch.export, threads, copies, fake tensors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import attndsl
import attndsl.runtime.ops  # defines the operators

WINDOW = attndsl.compile("causal & (sink(4) | window(20))")
DOCUMENTS = attndsl.compile("attention documents { input doc : int[b, k] sorted\n attend causal & document(doc) }")
LOCAL = attndsl.compile("attention local(span : runtime int) { attend causal & window(span) }")


def qkv(rows: int = 40, k_len: int = 40, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    sizes = ((batch, 4, rows, 16), (batch, 2, k_len, 16), (batch, 2, k_len, 24))
    q, k, v = (torch.randn(size, generator=generator) for size in sizes)
    return q, k, v


def documents(batch: int, k_len: int) -> Tensor:
    return (torch.arange(k_len, dtype=torch.int32) // 9).expand(batch, -1).contiguous()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("transposed", [False, True])
def test_operator_check(transposed: bool) -> None:
    q, k, v = qkv()
    if transposed:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    arguments: tuple[Any, ...] = (DOCUMENTS._key, q, k, v, [documents(2, 40)], [], None, "cpu")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.attndsl.forward.default, arguments, test_utils=tests)


def test_fake_tensors() -> None:
    """Sizes, dtypes and strides are known without running anything."""
    q, k, v = qkv()
    for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q.bfloat16(), q.double()):
        tensors = (x, k.to(x.dtype), v.to(x.dtype))
        real, real_lse = WINDOW(*tensors, return_lse=True)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(y) for y in tensors]
            fake, fake_lse = WINDOW(*fakes, return_lse=True)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert (fake_lse.shape, fake_lse.dtype, fake_lse.stride()) == (
            real_lse.shape,
            real_lse.dtype,
            real_lse.stride(),
        )


def test_meta_tensors() -> None:
    out, lse = WINDOW(*(x.to("meta") for x in qkv(rows=7)), return_lse=True)
    assert out.device.type == lse.device.type == "meta"
    assert (out.shape, lse.shape) == ((2, 4, 7, 24), (2, 4, 7))


# ----------------------------------------------------------------------------- compile and export


class Block(nn.Module):
    """An attention between projections, with an input and a view of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(32, 32 * 3), nn.Linear(32, 32)

    def forward(self, x: Tensor, doc: Tensor) -> Tensor:
        q, k, v = self.inward(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        out: Tensor = DOCUMENTS(q, k, v, doc=doc)
        return torch.relu(self.outward(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str) -> None:
    """One graph, compiled once for all lengths."""
    counter = CompileCounterWithBackend(backend)
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, n in ((2, 40), (2, 41), (3, 133), (2, 7)):
            x, doc = torch.randn(batch, n, 32), documents(batch, n)
            torch.testing.assert_close(compiled(x, doc), block(x, doc))
    assert counter.frame_count == 1


def test_compile_default_dynamism() -> None:
    """Without `dynamic=True`: static for the first length, dynamic from the second on."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: WINDOW(q, k, v) * 2, fullgraph=True, backend=counter)
    with torch.no_grad():
        for n in (40, 41, 42, 99):
            q, k, v = qkv(n, n)
            torch.testing.assert_close(compiled(q, k, v), WINDOW(q, k, v) * 2)
    assert counter.frame_count == 2


def test_compile_runtime_argument() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, span: LOCAL(q, k, v, span=span), fullgraph=True, dynamic=True, backend=counter
    )
    with torch.no_grad():
        for n, span in ((40, 5), (40, 9), (50, 30)):
            q, k, v = qkv(n, n)
            torch.testing.assert_close(compiled(q, k, v, span), LOCAL(q, k, v, span=span))
    assert counter.frame_count == 1


def test_compile_inductor() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda q, k, v: WINDOW(q * 2, k, v).relu(), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for n in (40, 57):
            q, k, v = qkv(n, n)
            torch.testing.assert_close(compiled(q, k, v), WINDOW(q * 2, k, v).relu())
    assert counter.frame_count == 1


def test_export() -> None:
    """An exported program runs at other lengths and batch sizes, in another state of the session too."""
    block = Block().eval()
    batch, n = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("n", min=2, max=100_000)
    exported = torch.export.export(
        block, (torch.randn(2, 40, 32), documents(2, 40)), dynamic_shapes=({0: batch, 1: n}, {0: batch, 1: n})
    )
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert torch.ops.attndsl.forward.default in called
    module = exported.module()
    for size in ((2, 40), (3, 77), (2, 130)):
        x, doc = torch.randn(*size, 32), documents(*size)
        with torch.no_grad():
            torch.testing.assert_close(module(x, doc), block(x, doc))


def test_exported_program_of_another_process() -> None:
    """A graph whose attention this process has not compiled says so."""
    q, k, v = qkv()
    with pytest.raises(attndsl.PatternError, match="A520") as caught:
        torch.ops.attndsl.forward("unknown", q, k, v, [], [], None, "auto")
    assert "attndsl.compile" in caught.value.diagnostics[0].help


# ------------------------------------------------------------------------- threads, copies, modes


def test_threads() -> None:
    """Two threads call one fresh attention at once."""
    attn = attndsl.compile("causal & window(11)")
    tensors = [qkv(n, n) for n in (30, 31, 64, 90)]
    expected = [attn.reference(*x) for x in tensors]
    barrier = Barrier(2)

    def work(_: int) -> list[Tensor]:
        barrier.wait()
        return [attn(*x) for x in tensors]

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, range(2)):
            for out, right in zip(found, expected, strict=True):
                torch.testing.assert_close(out, right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_copies(used: bool) -> None:
    """An attention can be pickled and copied (it lies in models), before and after its first call."""
    attn: Any = attndsl.compile("causal & (window(9) | sink(2))")
    x = qkv()
    if used:
        attn(*x)
    for twin in (pickle.loads(pickle.dumps(attn)), copy.deepcopy(attn), copy.copy(attn)):
        assert twin.program == attn.program
        torch.testing.assert_close(twin(*x), attn(*x), rtol=0, atol=0)


def test_pickle_in_another_process(tmp_path: Path) -> None:
    """What is unpickled there is known to the operators there."""
    x = qkv()
    torch.save((*x, WINDOW(*x)), tmp_path / "call.pt")
    (tmp_path / "attention.pickle").write_bytes(pickle.dumps(WINDOW))
    code = (
        "import pickle, sys, torch; attn = pickle.load(open(sys.argv[1] + '/attention.pickle', 'rb')); "
        "q, k, v, out = torch.load(sys.argv[1] + '/call.pt'); assert torch.equal(attn(q, k, v), out)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parent.parent)


def test_same_output_on_every_route() -> None:
    """Called directly, through the dispatcher, and where gradients are recorded."""
    q, k, v = qkv()
    direct = WINDOW(q, k, v)
    dispatched, _ = torch.ops.attndsl.forward(WINDOW._key, q, k, v, [], [], None, "auto")
    recorded = WINDOW(q.clone().requires_grad_(), k, v)
    assert recorded.requires_grad
    assert torch.equal(direct, dispatched)
    assert torch.equal(direct, recorded)


def test_empty_calls() -> None:
    """No rows, no batch entries, no keys."""
    q, k, v = qkv()
    assert WINDOW(q[:, :, :0], k, v).shape == (2, 4, 0, 24)
    assert WINDOW(q[:0], k[:0], v[:0]).shape == (0, 4, 40, 24)
    out, lse = attndsl.compile("all")(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
