"""Two levels of packed calls: members count from the first token of each document, and tiles are members."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import Backend
from attndsl.targets import make_spec
from tests.gradients import TOLERANCE
from tests.test_decode_views import Sequences

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

# Equal ids apart are different documents; one entry of the batch is one document.
DOC = torch.tensor([[4] * 20 + [1] * 3 + [4] * 9 + [7, 8] + [0] * 14, [5] * 48])
N = torch.tensor([37, 40])
BODIES = {
    "all": "x = attend causal over pool(mean, 4)\n y = attend causal within blocks(8) with probs(x)",
    "shared extents": "x = attend causal over pool(mean, 5, 3)\n y = attend causal within blocks(7) with probs(x)",
    "raw votes": "x = attend causal & window(9) { scale 0.5 }\n"
    "y = attend band(20, 3) within blocks(16) with probs(x) { score softcap(s, 2.0) - sinks[h] * (q - k) }",
    "counted votes": "x = attend all over pool(max, 4, counted) { softmax with sink sinks[h] }\n"
    "y = attend { k < Nk - 2 } within blocks(4) with probs(x)",
    "several parts": "x = attend causal & window(5), causal - window(5) over pool(mean, 3, counted)\n"
    "y = attend causal within blocks(8) with probs(x)",
    "chosen by each": "x = attend causal over pool(mean, 8)\n y = attend causal & "
    "top(2, blocks(8), by = dot(Q, mean(K)), among = causal) within blocks(8) with probs(x)",
}  # fmt: skip
# heads, key heads, rows, D, Dv
SHAPES = [(4, 2, 48, 16, 16), (1, 1, 31, 80, 24), (2, 2, 1, 16, 16)]


def compiled(body: str, clause: str = "packed doc") -> attndsl.Attention:
    written = "input doc : int[b, k]\n" + "input n : int[b]\n" * clause.startswith("lengths")
    written += "input sinks : float[h] learnable\n" * ("sinks" in body)
    return attndsl.compile(f"attention a {{\n{written}{clause}\n{body}\noutput y\n}}")


def judge(
    attn: attndsl.Attention, shape: tuple[int, ...], dtype: torch.dtype, backend: str, doc: Any = DOC,
    drawn_by: int = 3, **more: Any,
) -> None:  # fmt: skip
    """Output, lse and gradients are the oracle's, which asks of each document alone."""
    (heads, kv_heads, rows, dim, v_dim), (batch, tokens) = shape, doc.shape
    generator = torch.Generator().manual_seed(drawn_by)
    sizes = [(batch, heads, rows, dim), (batch, kv_heads, tokens, dim), (batch, kv_heads, tokens, v_dim), (heads,)]
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    given: dict[str, Any] = {"doc": doc, "n": N[:batch].clamp(max=tokens)}
    names, found = [decl.name for decl in attn.program.inputs], list[Any]()
    for run, kind in ((attn, dtype), (attn.reference, torch.float64)):
        q, k, v, sinks = leaves = [x.to(kind).requires_grad_() for x in drawn]
        inputs = {name: x for name, x in {**given, "sinks": sinks}.items() if name in names}
        how = {**more, **({"backend": backend} if run is attn else {})}
        call: Any = run
        out, lse = call(q, k, v, return_lse=True, **inputs, **how)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        loss = (out * weight).sum() + torch.where(lse == -torch.inf, 0, lse).sum() / 7
        found.append([out, lse, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    for x, y in zip(*found, strict=True):
        bound = 10 * TOLERANCE[dtype] * max(1.0, float(y.detach().nan_to_num(neginf=0).abs().max()))
        torch.testing.assert_close(x.double(), y, atol=bound, rtol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("clause", ["packed doc", "lengths n packed doc"])
@pytest.mark.parametrize("name", BODIES)
def test_on_the_cpu(name: str, clause: str) -> None:
    for shape in SHAPES[1:] if clause == "packed doc" else SHAPES[:1]:
        judge(compiled(BODIES[name], clause), shape, torch.float64, "cpu")


@pytest.mark.parametrize(("name", "clause", "shape"), [
    ("shared extents", "packed doc", SHAPES[1]), ("raw votes", "packed doc", (2, 1, 40, 16, 16)),
    ("chosen by each", "lengths n packed doc", SHAPES[1]),
])  # fmt: skip
def test_in_triton(name: str, clause: str, shape: tuple[int, ...]) -> None:
    judge(compiled(BODIES[name], clause), shape, torch.float32, "triton", DOC[:1])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    "drawn", ["causal & random(3, tokens, rows(4), 1)", "coarsen({ (q - k) % 5 == 0 and b == 0 }, 3, fraction(0.3))"]
)
def test_beside_what_looks_at_all_pairs(drawn: str, backend: str) -> None:
    """Where documents lie is known before it is drawn in them."""
    body = f"x = attend causal over pool(mean, 8)\n y = attend {drawn} within blocks(4) with probs(x)"
    dtype = torch.float64 if backend == "cpu" else torch.float32
    judge(compiled(body), SHAPES[1], dtype, backend)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_dropout(backend: str) -> None:
    dtype = torch.float64 if backend == "cpu" else torch.float32
    judge(compiled(BODIES["shared extents"]), (2, 1, 22, 16, 16), dtype, backend, DOC[:1, :25], dropout=0.4, seed=5)


@pytest.mark.parametrize("n", range(12))
def test_any_documents_and_members(n: int) -> None:
    """Of sizes, strides, documents and patterns drawn at random."""
    rng = np.random.default_rng(n)
    tokens = int(rng.integers(1, 60))
    member, size, stride = (int(rng.integers(1, high)) for high in (20, 9, 9))
    pattern = ["causal", "band(9, 4)", "{ (q - k) % 3 != 1 and k <= q }", "causal - same_block(4)", "all"][n % 5]
    votes = f"causal over pool(mean, {size}, {stride})" if n % 3 else "causal & window(7)"
    body = f"x = attend {votes}\n y = attend {pattern} within blocks({member}) with probs(x)"
    begins = rng.random((2, tokens)) < (0.02, 0.2, 0.9)[n % 3]
    doc = torch.from_numpy(begins.cumsum(-1) % 3)
    judge(compiled(body), (2, 1, int(rng.integers(1, tokens + 1)), 16, 16), torch.float64, "cpu", doc, n)


def test_members_in_strips() -> None:
    """Of documents shorter than a member, and longer than one."""
    attn = compiled("x = attend causal over pool(mean, 16)\n y = attend causal within blocks(260) with probs(x)")
    judge(attn, (1, 1, 20, 16, 16), torch.float32, "triton", torch.tensor([[0] * 262 + [3] * 14]))


def test_documents_alone() -> None:
    """Each gives what it gives alone."""
    body = BODIES["all"]
    attn, alone = compiled(body), attndsl.compile(f"attention a {{\n{body}\noutput y\n}}")
    q, k, v = (torch.randn(1, 2, 48, 16) for _ in range(3))
    out = attn(q, k, v, doc=DOC[:1])
    for low, end in ((0, 20), (20, 23), (23, 32), (32, 33), (33, 34), (34, 48)):
        at = slice(low, end)
        torch.testing.assert_close(out[:, :, at], alone(q[:, :, at], k[:, :, at], v[:, :, at]))


def test_tiles_are_members() -> None:
    """Which begin where documents do, and of which a row visits those that it may see a token of."""
    from attndsl.compose import compose

    program = dict(compose(compiled(BODIES["all"]).program).branches)["y"]
    spec = make_spec("sm_90", "triton", 4, 2, 64)
    (forward,), (backward,) = forward_plans(program, spec), backward_plans(program, spec)
    for plan in (forward, backward):
        assert plan.tiles_of is not None and plan.tiling.block_k == 8 and not plan.runs.full and plan.runs.partial
    assert backward.key_runs.partial and not backward.key_runs.full
    (on_cpu,) = forward_plans(program, replace(make_spec("sm_90", "cpu", 4, 2, 64), backend=Backend.CPU))
    assert on_cpu.tiles_of is None and on_cpu.shares is not None and not on_cpu.shares.in_tiles(8)


def test_members_are_whole_in_the_portions_of_long_rows() -> None:
    attn = attndsl.compile(
        "attention a { x = attend causal over pool(mean, 10)\n y = attend causal within blocks(50) with probs(x)\n"
        "output y }"
    )
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, n, 8, generator=generator, dtype=torch.float64) for n in (1, 8400, 8400))
    torch.testing.assert_close(attn(q, k, v), attn.reference(q, k, v), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("clause", ["packed doc", "lengths n packed doc"])
@pytest.mark.parametrize("name", BODIES)
def test_in_a_decode(name: str, clause: str) -> None:
    """Each sequence's last rows are those of a call on it alone, over pages too, whatever lies past it."""
    attn = compiled(BODIES[name], clause)
    for rows, page in ((1, None), (9, 8)):
        of = Sequences(attn, [41, 48, 2, 0], rows, capacity=48)
        of.inputs |= {"doc": DOC[torch.arange(4) % 2]}
        of.inputs |= {"n": torch.tensor([48, 40, 48, 7])} if "lengths" in clause else {}
        found = of.attn.decode(of.q, *of.cache(page), return_lse=True, **of.inputs)
        of.check_both(found)


def test_there_is_no_kernel_of_a_decode() -> None:
    attn = compiled("x = attend causal & window(9)\n y = attend causal within blocks(8) with probs(x)")
    with pytest.raises(PatternError, match="A911"):
        attn.source("y.decode", heads=2)


def test_what_is_still_refused() -> None:
    with pytest.raises(PatternError, match="A904"):
        load("attention a { input doc : int[b, k]  packed doc\n x = attend causal\n"
             "y = attend causal within segments(doc) with probs(x)\n output y }")  # fmt: skip
