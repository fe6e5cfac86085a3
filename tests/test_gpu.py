"""What only a GPU shows: streams, compiled callers, tensors past 2**31 elements. Skipped without one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

import attndsl
import attndsl.serving
from attndsl.runtime.cuda import driver
from benchmarks import memory
from benchmarks.routed import blocks_rule, random_blocks
from tests.gpu import PATTERN, close, for_hopper, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_tiles_are_skipped() -> None:
    """Where the last keys score far below the first ones, their tiles are dropped, as the oracle drops them."""
    attn = attndsl.compile(f"attention a {{ attend {PATTERN} skip below 0.01 }}")
    q, k, v = tensors(2, 4, 333, 64)
    q[..., 0], k[..., 0], k[:, :, :4, 0] = 16, 0, 8
    out, lse = attn(q, k, v, return_lse=True)
    wanted, wanted_lse = attn.reference(q, k, v, return_lse=True)
    torch.testing.assert_close(out.double(), wanted, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=2e-2, rtol=2e-2)
    assert close(attn, out, q, k, v)


def test_launches_on_the_current_stream() -> None:
    attn = attndsl.compile(PATTERN)
    q, k, v = tensors(1, 2, 4096, 64)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
        late = v * 2
        out = attn(q, k, late)
    stream.synchronize()
    assert close(attn, out, q, k, v * 2)


def test_compiled_caller_takes_new_lengths_without_recompiling() -> None:
    attn = attndsl.compile(PATTERN)
    compiled = torch.compile(lambda q, k, v: attn(q, k, v) * 2, fullgraph=True, dynamic=True)
    compiled(*tensors(2, 4, 200, 64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (77, 333, 1000):
            qkv = tensors(2, 4, n, 64)
            assert close(attn, compiled(*qkv) / 2, *qkv)


def test_tensors_past_two_to_the_31_elements() -> None:
    # 2.2e9 elements; only the last head's rows are compared.
    attn = attndsl.compile("causal & window(256)")
    q = torch.randn(1, 34, 512 * 1024, 128, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    out = attn(q, q, q)
    rows = slice(512 * 1024 - 64, None)
    keys = slice(512 * 1024 - 512, None)
    expected = attn.reference(q[:, -1:, rows], q[:, -1:, keys], q[:, -1:, keys])
    assert (out[:, -1:, rows].double() - expected).abs().max().item() < 2e-2


def test_heads_inside_tokens_keep_their_order_in_memory() -> None:
    attn = attndsl.compile(PATTERN)
    q, k, v = (x.transpose(1, 2) for x in tensors(2, 300, 4, 64))
    out = attn(q, k, v)
    assert out.stride() == q.stride()
    assert close(attn, out, q, k, v)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_attention_on_two_devices() -> None:
    """A compiled kernel holds one device's handle: the second device must not be given the first one's."""
    attn = attndsl.compile(PATTERN)
    for index in (0, 1, 0):
        q, k, v = (x.to(f"cuda:{index}") for x in tensors(1, 2, 200, 64))
        assert close(attn, attn(q, k, v), q, k, v)


@pytest.mark.parametrize("inside", [False, True], ids=["heads outside tokens", "heads inside tokens"])
@pytest.mark.parametrize("backend", ["auto", "triton", pytest.param("gluon", marks=for_hopper)])
def test_memory_of_forward_and_backward(backend: str, inside: bool) -> None:
    """From the first call on, and wherever the gradient of the output lies: no copies, and nothing as large beside."""
    attn = attndsl.compile("causal & (sink(64) | window(1024))")
    q = torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 2, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dout = torch.randn(1, 4096, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    if inside:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for x in (q, k, v):
        x.requires_grad_()
    for order in (dout, dout.contiguous()):
        peak = memory.peak_bytes(lambda: attn(q, k, v, backend=backend), q, k, v, order)
        # One pass on Hopper sums dq in float32.
        sums = 0 if backend == "triton" else 4 * q.numel()
        assert peak <= memory.BAR * memory.least_bytes(q, k, v) + sums


def test_repeated_launches_agree() -> None:
    """What threads hand each other through shared memory is there when it is read: each launch gives the same bits."""
    attn = attndsl.compile(PATTERN)
    q, k, v = tensors(2, 8, 3000, 128)
    first = attn(q, k, v)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (attn(q, k, v) != first).sum()
    assert int(different) == 0


def test_a_thread_without_a_context_describes_and_launches() -> None:
    """A thread that autograd made has no context of the device until something of PyTorch's opens it."""
    attn = attndsl.compile(PATTERN)
    q, k, v = tensors(1, 2, 300, 128)
    # At other addresses than those that a first call described.
    copies = [x.clone() for x in (q, k, v)]
    expected, found = attn(q, k, v), torch.empty(0)

    def call() -> None:
        nonlocal found
        driver().cuCtxSetCurrent(None)
        found = attn(*copies)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@for_hopper
@pytest.mark.parametrize("text", [PATTERN, "causal", "attention a { score softcap(s, 20.0)  attend window(150) }"])
def test_gradients_added_up_by_copies(text: str) -> None:
    """The Hopper kernel's gradients, in whichever order its programs add to dq, beside the deterministic ones."""
    attn = attndsl.compile(text)
    q, _, _ = tensors(2, 8, 700, 128)
    _, k, v = tensors(2, 2, 900, 128)
    given = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    exact = [x.detach().double().requires_grad_() for x in given]
    right = torch.autograd.grad(attn.reference(*exact), exact, dout.double())

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attn(*given, backend="gluon"), given, dout)

    found = [gradients() for _ in range(20)]
    torch.use_deterministic_algorithms(True)
    try:
        repeated = [gradients() for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for several in (found, repeated):
        for each in several:
            for x, y in zip(each, right, strict=True):
                assert (x.double() - y).norm() <= 8e-3 * y.norm()
    for each in repeated[1:]:
        assert all(torch.equal(x, y) for x, y in zip(each, repeated[0], strict=True))
    # The sums of a program's own keys have one order.
    for each in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(each[1:], found[0][1:], strict=True))


SCRIPT = """
import sys, time, torch, attndsl
import triton
q = torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
start = time.perf_counter()
attndsl.compile(sys.argv[1])(q, q, q)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def test_cold_and_warm_first_results(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process finds the first one's kernel (how long each takes is benchmarks' to measure)."""
    monkeypatch.setenv("ATTNDSL_CACHE_DIR", str(tmp_path))
    seconds = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SCRIPT, PATTERN], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout))
    assert seconds[1] < seconds[0]


def test_sixteen_processes_compile_one_pattern_at_once(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNDSL_CACHE_DIR", str(tmp_path))
    start = time.perf_counter()
    running = [subprocess.Popen([sys.executable, "-c", SCRIPT, PATTERN], stdout=subprocess.PIPE) for _ in range(16)]
    assert all(process.wait() == 0 for process in running)
    assert time.perf_counter() - start < 120


def test_a_kernel_combines_gated_branches() -> None:
    """Forward and backward, as the oracle has them to within the rounding of bfloat16; twice the same to the bit."""
    attn = attndsl.compile("""attention gated {
        input gate : float[b, h, q, 3] learnable
        far = attend causal over pool(mean, 64)
        near = attend causal & window(200)
        output gate[0] * merge(far, near) + gate[1] * far + sigmoid(gate[2]) * near
    }""")
    q, k, v = tensors(2, 4, 1000, 80)
    gate = torch.randn(2, 4, 1000, 3, device="cuda")
    leaves = [x.detach().requires_grad_() for x in (q, k, v, gate)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, gate)]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attn(*leaves[:3], gate=leaves[3]).double().square().sum(), leaves)

    right = torch.autograd.grad(attn.reference(*exact[:3], gate=exact[3]).square().sum(), exact)
    found, again = gradients(), gradients()
    for x, y, z in zip(found, again, right, strict=True):
        assert torch.equal(x, y)
        assert float((x.double() - z).abs().max()) <= 4e-2 * max(1.0, float(z.abs().max()))


@pytest.mark.parametrize("n", [1000, 16384])
def test_the_blocks_that_a_group_chose(n: int) -> None:
    """NSA's second branch, 16 blocks of 64 for 16 heads: what was wrong on an H100 before its queries were mended.

    If this fails, `collected_tiling` in `attndsl/tiling.py` returning None gathers such rows again.
    """
    attn = attndsl.compile("attention chosen { input p : blocks(64)[b, g, q]\n attend causal & p }")
    (q, _, dout), (_, k, v) = tensors(1, 64, n, 128), tensors(1, 4, n, 128)
    plan = random_blocks(4, n, 64, 16, q.device)
    given = [x.requires_grad_() for x in (q, k, v)]
    out = attn(*given, p=plan)
    found = (out, *torch.autograd.grad(out, given, dout))
    for x, y in zip(found, blocks_rule(q, k, v, plan, 64, dout), strict=True):
        assert (x.float() - y).norm() <= 1e-2 * y.norm()
        assert (x.float() - y).abs().max() <= 2e-2 * y.abs().max()


LISTED = {
    "tokens of a group": ("tokens", "b, g, q", (8, 2), 40),
    "tokens of all heads": ("tokens", "b, q", (4, 4), 40),
    "tokens of rows": ("tokens", "b, g, q/16", (4, 2), 100),
    "small blocks of a group": ("blocks(16)", "b, g, q", (16, 1), 9),
    "small blocks of rows": ("blocks(16)", "b, h, q/64", (4, 4), 9),
    "small blocks of few rows": ("blocks(32)", "b, g, q/8", (8, 2), 7),
    "blocks of single heads": ("blocks(64)", "b, h, q", (4, 2), 3),
}


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("dim", [64, 128, 80])
def test_what_lists_choose(name: str, dim: int) -> None:
    """Members that share tiles, and rows that are gathered, with lists of any order: beside the oracle."""
    members, dims, (heads, kv_heads), count = LISTED[name]
    attn = attndsl.compile(f"attention listed {{ input p : {members}[{dims}]\n attend causal & p }}")
    (q, _, dout), (_, k, v) = tensors(1, heads, 500, dim), tensors(1, kv_heads, 500, dim)
    size = {"tokens": 1, "blocks(16)": 16, "blocks(32)": 32, "blocks(64)": 64}[members]
    lead = [{"b": 1, "g": kv_heads, "h": heads, "q": 500}[d] if d in "bghq" else -(-500 // int(d[2:]))
            for d in dims.split(", ")]  # fmt: skip
    plan = torch.randint(-1, -(-500 // size) + 1, (*lead, count), device="cuda", dtype=torch.int32).sort(-1).values
    given = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in given]
    out, right = attn(*given, p=plan), attn.reference(*exact, p=plan)
    found = (out, *torch.autograd.grad(out, given, dout))
    for x, y in zip(found, (right, *torch.autograd.grad(right, exact, dout.double())), strict=True):
        assert (x.double() - y).norm() <= 1e-2 * y.norm()


@pytest.mark.parametrize("backend", ["triton", pytest.param("gluon", marks=for_hopper)])
def test_a_call_that_asks_for_no_lse_writes_none(backend: str) -> None:
    """From the third call on nothing is allocated for it. Rows end inside a tile, and graphs replay such calls."""
    attn = attndsl.compile(PATTERN)
    q, k, v = tensors(1, 2, 300, 64)
    first, lse = attn(q, k, v, backend=backend, return_lse=True)
    for _ in range(3):
        assert torch.equal(attn(q, k, v, backend=backend), first)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    out = attn(q, k, v, backend=backend)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1
    assert torch.equal(out, first)
    again, lse_again = attn(q, k, v, backend=backend, return_lse=True)
    assert torch.equal(again, first)
    assert torch.equal(lse_again, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v, backend=backend)
    q.copy_(q.flip(2))
    graph.replay()
    assert close(attn, out, q, k, v)
    with torch.autocast("cuda", torch.float16):
        assert attn(q.float(), k.float(), v.float(), backend=backend).dtype == torch.float16
        assert attn(q, k, v, backend=backend).dtype == torch.float16
