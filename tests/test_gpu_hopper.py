"""What only a Hopper GPU shows: the kernels for it beside the definition, and that they have no races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.plan import Tiling
from attndsl.wiring import engine
from tests.gpu import PATTERN, close, for_hopper, recorded
from tests.hopper_views import VIEWS, of_views

pytestmark = [pytest.mark.gpu, for_hopper]
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "attention a { weights max(s, 0.0)  attend causal & window(300) }"
SOFTCAP = "attention a { score softcap(s, 20.0)  attend window(150) }"
# Programs of one query tile, and of several, whichever is the default.
ONE, SEVERAL = Tiling(128, 128, 4, 2), Tiling(128, 128, 4, 2, several=True)


def random(heads: int, tokens: int, dim: int, dtype: torch.dtype = torch.bfloat16, batch: int = 2) -> Tensor:
    return torch.randn(batch, heads, tokens, dim, device="cuda", dtype=dtype)


@pytest.mark.parametrize(
    ("dim", "v_dim"), [(64, 64), (8, 8), (40, 72), (80, 80), (96, 96), (64, 128), (192, 128), (256, 64), (256, 256)]
)
@pytest.mark.parametrize("text", [PATTERN, WEIGHTS], ids=["softmax", "weights"])
def test_head_dimensions(text: str, dim: int, v_dim: int) -> None:
    attn = attndsl.compile(text)
    q, k, v = (
        random(4, 333, dim, torch.float16),
        random(2, 777, dim, torch.float16),
        random(2, 777, v_dim, torch.float16),
    )
    assert close(attn, attn(q, k, v, backend="gluon"), q, k, v)


@pytest.mark.parametrize("dim", [128, 96])
@pytest.mark.parametrize("text", [PATTERN, "causal", SOFTCAP])
def test_programs_of_several_query_tiles(text: str, dim: int) -> None:
    """More tiles than programs, so that their memory is used again; and fewer."""
    attn = attndsl.compile(text)
    one, several = engine(attn.program), engine(attn.program)
    one.tiling, several.tiling = ONE, SEVERAL
    for heads, tokens in ((40, 900), (1, 200), (2, 1)):
        q, k, v = (random(heads, tokens, dim) for _ in range(3))
        found, expected = (e.forward(q, k, v, [], [], None, "gluon") for e in (several, one))
        # A row's sums are the same whoever owns it.
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert close(attn, found[0], q, k, v)


def test_query_tiles_are_handed_out_anew_at_every_launch() -> None:
    """On two streams at once, in a graph beside a stream, and after each: what programs count by is at zero."""
    attn = attndsl.compile("causal & window(300)")
    calls = [[random(16, 3000, 128) for _ in range(3)] for _ in range(3)]
    expected = [attn(*x, backend="gluon") for x in calls]
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attn(*calls[2], backend="gluon")
    for _ in range(20):
        captured.zero_()
        graph.replay()
        found = []
        for stream, x in zip(streams, calls, strict=False):
            with torch.cuda.stream(stream):
                found.append([attn(*x, backend="gluon") for _ in range(3)])
        torch.cuda.synchronize()
        assert torch.equal(captured, expected[2])
        assert all(torch.equal(y, e) for of, e in zip(found, expected, strict=False) for y in of)


# How many pieces each has.
APART = {
    "causal & window(600) & dilated(16)": 1,
    "causal & (window(128) | dilated(128))": 2,
    "causal & (window(64) | strided(8))": 2,
    "dilated(4)": 1,
    "attention a { score s - 0.01 * (q - k)  attend causal & dilated(2) }": 1,
    "attention a { weights max(s, 0.0)  attend causal & (window(128) | dilated(64)) }": 2,
}


@pytest.mark.parametrize("dim", [128, 96, 72])
@pytest.mark.parametrize("text", APART)
def test_every_so_many_th_token(text: str, dim: int) -> None:
    """Where a call has as many tokens of each remainder, hardware copies them as they lie; elsewhere nothing does."""
    attn = attndsl.compile(text)
    assert sum(kernel.startswith("forward") for kernel in attn.kernels(4, 2)) == APART[text]
    for tokens in (1024, 1152, 128):
        q, k, v = random(4, tokens, dim), random(2, tokens, dim), random(2, tokens, dim)
        assert close(attn, attn(q, k, v, backend="gluon"), q, k, v)
    q, k, v = random(4, 1000, dim), random(2, 1000, dim), random(2, 1000, dim)
    assert close(attn, attn(q, k, v), q, k, v)


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (128, 64), (64, 128), (256, 256)])
@pytest.mark.parametrize("text", [PATTERN, SOFTCAP, "all"])
def test_float8(text: str, dim: int, v_dim: int) -> None:
    """Weights are rounded to three bits: 2^-4 each, of which a row adds up many."""
    attn = attndsl.compile(text)
    sizes = ((4, 333, dim), (2, 777, dim), (2, 777, v_dim))
    q, k, v = (random(*size).to(torch.float8_e4m3fn) for size in sizes)
    scales = torch.rand(4, device="cuda") + 0.5, torch.tensor(0.8, device="cuda"), torch.rand(2, device="cuda") * 2
    out, lse = attn(q, k, v, scales=scales, return_lse=True, backend="gluon")
    exact, exact_lse = attn.reference(q, k, v, scales=scales, return_lse=True)
    assert (out.double() - exact).norm() <= 4e-2 * exact.norm()
    torch.testing.assert_close(lse.double(), exact_lse, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize(("text", "dim"), [(PATTERN, 128), ("causal", 96), (SOFTCAP, 128)])
def test_a_thousand_launches_on_fresh_inputs_agree(text: str, dim: int, several: bool) -> None:
    """Twice on the same inputs to the bit, and with the portable kernel, while another stream disturbs the clocks of
    memory: what warps hand each other through shared memory is there when it is read."""
    program = attndsl.compile(text).program
    hopper, portable = engine(program), engine(program)
    hopper.tiling = SEVERAL if several else ONE
    q, k, v = random(16, 1100, dim), random(4, 1500, dim), random(4, 1500, dim)
    wrong, apart = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(2))
    other, noise = torch.cuda.Stream(), torch.empty(1 << 24, device="cuda")  # type: ignore[no-untyped-call]
    for n in range(1000):
        for x in (q, k, v):
            x.normal_()
        with torch.cuda.stream(other):
            noise[: 1 << (14 + n % 11)].add_(1.0)
        first, second = (hopper.forward(q, k, v, [], [], None, "gluon")[0] for _ in range(2))
        wrong += (first != second).sum()
        expected = portable.forward(q, k, v, [], [], None, "triton")[0].float()
        apart += ((first - expected).norm() > 1e-2 * expected.norm()).long()
    assert int(wrong) == int(apart) == 0


LISTED = "attention a {{ input p : blocks({})[b, g, q/128]  attend {} & p }}"
WEIGHED = "attention a { input p : blocks(128)[b, g, q/128]  weights max(s, 0.0)  attend causal & p }"
LISTS = [LISTED.format(128, "causal"), LISTED.format(64, "causal"), LISTED.format(128, "all"), WEIGHED]


@pytest.mark.parametrize("dim", [128, 80])
@pytest.mark.parametrize("text", LISTS, ids=["blocks", "of 64", "all", "weights"])
def test_lists_of_tiles(text: str, dim: int) -> None:
    """Of any order and with members that are none, which are skipped; some rows have no others."""
    attn = attndsl.compile(text)
    for tokens in (1100, 128, 1):
        q, k, v = random(4, tokens, dim), random(2, tokens, dim), random(2, tokens, dim)
        rows, members = -(-tokens // 128), -(-tokens // (64 if "(64)" in text else 128))
        plan = torch.randint(-1, members, (2, 2, rows, 4), device="cuda", dtype=torch.int32).sort(-1).values
        plan[:, 0, ::3] = -1
        assert close(attn, attn(q, k, v, backend="gluon", p=plan), q, k, v, p=plan)


@pytest.mark.parametrize("tokens", [1100, 4096])
def test_tiles_by_maps_of_data(tokens: int) -> None:
    attn = attndsl.compile("attention a { input until : int[b, k]  attend causal & { q <= until[k] } }")
    q, k, v = random(4, tokens, 128), random(2, tokens, 128), random(2, tokens, 128)
    until = torch.arange(tokens, device="cuda") + torch.randint(0, 200, (2, tokens), device="cuda")
    assert close(attn, attn(q, k, v, backend="gluon", until=until), q, k, v, until=until)
    until.fill_(-1)
    assert not attn(q, k, v, backend="gluon", until=until).any()


BEGUN = {
    "causal": ("causal & document(doc)", "doc : int[b, k] sorted"),
    "both ways": ("document(doc)", "doc : int[b, k] sorted"),
    "sink": ("causal & (document(doc) | sink(4))", "doc : int[b, k] sorted"),
    "window": ("causal & window(300) & document(doc)", "doc : int[b, k] sorted"),
    "one for all": ("causal & document(doc)", "doc : int[k] sorted"),
}


def document_ids(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(x)), torch.tensor(x)) for x in lengths]).cuda()


@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (64, 64), (96, 96), (128, 192), (40, 72)])
@pytest.mark.parametrize("name", BEGUN)
def test_query_tiles_begin_where_documents_do(name: str, dim: int, v_dim: int) -> None:
    """Documents of every size, of which two batch entries have others; a call of the last rows alone; ids in any order
    read nothing that is not there, and a captured graph takes those of its replay."""
    pattern, declared = BEGUN[name]
    attn = attndsl.compile(f"attention a {{ input {declared}  attend {pattern} }}")
    program = engine(attn.program)
    program.tiling = Tiling(128, 128 if v_dim == 128 else 64, 4, 2, several=True)
    ids = document_ids([[1, 300, 129, 255, 17, 640, 700, 5], [700, 1, 1, 260, 3, 512, 511, 59]])
    ids = ids if "[b" in declared else ids[0]
    for rows, heads, kv_heads in ((2047, 4, 2), (1000, 10, 10), (1, 2, 1)):
        q, k, v = random(heads, rows, dim), random(kv_heads, 2047, dim), random(kv_heads, 2047, v_dim)
        out, lse = program.forward(q, k, v, [ids], [], None, "gluon")
        again = program.forward(q, k, v, [ids], [], None, "gluon")
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
        assert close(attn, out, q, k, v, doc=ids)
        exact = attn.reference(q, k, v, return_lse=True, doc=ids)[1]
        torch.testing.assert_close(lse.double(), exact, atol=1e-3, rtol=1e-3)
    q, k, v = random(4, 2047, dim), random(2, 2047, dim), random(2, 2047, v_dim)
    given = ids.clone()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        program.forward(q, k, v, [given], [], None, "gluon")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = program.forward(q, k, v, [given], [], None, "gluon")[0]
    for others in (torch.zeros_like(ids), ids.flip(-1).neg(), ids):
        given.copy_(others)
        graph.replay()
        assert close(attn, captured, q, k, v, doc=others)
    given.copy_(torch.randint_like(ids, 9))
    graph.replay()
    torch.cuda.synchronize()


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.hostile"]
    groups = ["hopper", "hopper_views", "hopper_gradients"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*command, *groups], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (64, 64), (96, 80), (256, 256)])
@pytest.mark.parametrize("body", VIEWS)
def test_views(body: str, dim: int, v_dim: int) -> None:
    """Entries are tensors of their own, which hardware copies; another part of the softmax may have another kernel."""
    attn = attndsl.compile(of_views(body))
    for rows, tokens in ((1100, 1100), (130, 1500), (1, 700), (5, 5)):
        if "from pool" in body and rows < 1100:
            continue  # Rows of one pooled query have a stride of 0.
        q, k, v = random(4, rows, dim), random(2, tokens, dim), random(2, tokens, v_dim)
        inputs = view_inputs(attn, k, v)
        plans = attn.plan(q, k) if attn.program.selections else None
        out = attn(q, k, v, backend="gluon", plans=plans, **inputs)
        assert close(attn, out, q, k, v, plans=plans, **inputs)


def view_inputs(attn: attndsl.Attention, k: Tensor, v: Tensor) -> dict[str, Any]:
    tokens = k.shape[2]
    inputs = {
        "sinks": torch.randn(4, device="cuda"), "doc": torch.arange(tokens, device="cuda").repeat(2, 1) // 300,
        "kc": random(2, -(-tokens // 4), k.shape[3]), "vc": random(2, -(-tokens // 4), v.shape[3]),
    }  # fmt: skip
    return {decl.name: inputs[decl.name] for decl in attn.program.inputs if decl.name in inputs}


def test_entries_that_sequences_share() -> None:
    """They are read with a stride of 0, which hardware copies do not."""
    attn = attndsl.compile(of_views("attend all over given(kc, vc, 4)"))
    q, k, v = random(4, 300, 128), random(2, 300, 128), random(2, 300, 128)
    inputs = view_inputs(attn, k, v)
    inputs["vc"] = inputs["vc"][:1]
    assert close(attn, attn(q, k, v, **inputs), q, k, v, **inputs)
    with pytest.raises(attndsl.PatternError, match="A510"):
        attn(q, k, v, backend="gluon", **inputs)


@pytest.mark.parametrize(("heads", "dims"), [((4, 2), "b, k"), ((2, 2), "b, g, k")])
def test_mixed_documents_are_copied_into_their_order(heads: tuple[int, int], dims: str) -> None:
    """Beside the kernels that load rows from where they lie, which short documents keep; again by a graph on the ids of
    others, of whatever lengths."""
    at = "g, " if "g" in dims else ""
    attn = attndsl.compile(
        f"attention a {{ input doc : int[{dims}]\n attend causal & {{ doc[{at}q] == doc[{at}k] }} & window(3000) }}"
    )
    tokens = 4096
    q, k, v, d = (random(h, tokens, 128, batch=1) for h in (heads[0], heads[1], heads[1], heads[0]))
    size = (1, heads[1], tokens) if at else (1, tokens)
    ids = [torch.randint(0, most, size, device="cuda", dtype=torch.int32) for most in (2, 90, 3)]
    doc = ids[0].clone()

    def step(backend: str = "gluon") -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attn(*leaves, doc=doc, backend=backend)
        return out, *torch.autograd.grad(out, leaves, d)

    graph, replayed = recorded(step)
    for x in ids:
        doc.copy_(x)
        wanted, found = step("triton"), step()
        graph.replay()
        for a, b, c in zip(found, wanted, replayed, strict=True):
            assert (a.float() - b.float()).norm() < 1e-2 * b.float().norm()
            assert (c.float() - b.float()).norm() < 1e-2 * b.float().norm()
