"""The one kernel of all gradients on Hopper beside the definition, in every kind of call that it serves.

Its dk and dv repeat to the bit. Its dq is added up in no fixed order, so it repeats to the rounding of its sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.runtime.gluon_backward import GluonBackward
from attndsl.wiring import engine
from tests.gpu import for_hopper

pytestmark = [pytest.mark.gpu, for_hopper]


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attention(body: str) -> str:
    return f"attention a {{\n{body}\n}}"


DOCUMENTS = attention("input doc : int[b, k] sorted\n attend causal & document(doc)")
SINKS = attention("input t : float[h]\n softmax with sink t[h]\n attend causal & window(200)")
PER_HEAD = "causal & (if h % 2 == 0 then window(33) else sink(200))"
SOFTCAP = attention("score softcap(s, 20.0)\n attend window(150)")
ALIBI = attention("score s - exp2(-8 * (h + 1) / H) * (q - k)\n attend causal")
SCALED = attention("input t : float[b, h]\n scale t[h]\n attend causal & window(300)")
LISTED = attention("input p : blocks(128)[b, g, q/128]\n attend causal & p")
DIFFUSION = Path(__file__).parent.parent / "examples" / "patterns" / "block_diffusion.attn"


def documents(batch: int, tokens: int) -> dict[str, Tensor]:
    ends = torch.rand(batch, tokens, device="cuda") < 0.01
    return {"doc": ends.cumsum(1).to(torch.int32)}


@dataclass(frozen=True)
class Kind:
    """A kind of call. `lie`: how q, k, v and the output's gradient lie in memory."""

    text: str | Path
    heads: tuple[int, int] = (4, 2)
    rows: int = 700
    keys: int = 700
    batch: int = 2
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    lie: str = "dense"
    uses_lse: bool = False
    scale: float | None = None
    inputs: Callable[[Kind], dict[str, Tensor]] = field(default=lambda kind: {})


KINDS = {
    "causal": Kind("causal"),
    "one head": Kind("causal", heads=(1, 1), batch=1),
    "many heads of one key head": Kind("causal & window(300)", heads=(8, 1)),
    "as many key heads, float16": Kind("causal", heads=(3, 3), dtype=torch.float16),
    "one token": Kind("causal", rows=1, keys=1),
    "one row of many keys": Kind("causal", rows=1, keys=1000),
    "fewer rows than keys": Kind("causal & window(150)", rows=130, keys=1500),
    "two sided, ragged": Kind("window(64)", rows=333, keys=1501),
    "whole tiles": Kind("causal", rows=512, keys=512),
    "empty rows": Kind("causal - window(256)", rows=600, keys=600),
    "no row sees a key": Kind("causal & {k > q}", rows=300, keys=300),
    "prefix": Kind("causal | prefix(77)", rows=1000, keys=1000),
    "sink and window": Kind("causal & (sink(5) | window(300))", heads=(4, 1), rows=1500, keys=1500),
    "block diffusion": Kind(DIFFUSION, rows=1000, keys=1000),
    "by heads": Kind(PER_HEAD, heads=(6, 2), rows=500, keys=500),
    "softcap": Kind(SOFTCAP, rows=777, keys=1500),
    "distances": Kind(ALIBI, heads=(8, 2), dtype=torch.float16),
    "sinks of the softmax": Kind(SINKS, inputs=lambda kind: {"t": torch.randn(kind.heads[0], device="cuda")}),
    "scales of heads": Kind(
        SCALED, inputs=lambda kind: {"t": torch.rand(kind.batch, kind.heads[0], device="cuda") * 0.2}
    ),
    "documents": Kind(
        DOCUMENTS, rows=1400, keys=1400, inputs=lambda kind: documents(kind.batch, kind.keys)
    ),
    "lists of tiles": Kind(LISTED, rows=1100, keys=1100, inputs=lambda kind: lists(kind)),
    "small heads of lists of tiles": Kind(LISTED, dim=64, rows=1100, keys=1100, inputs=lambda kind: lists(kind)),
    "a gradient of lse": Kind("causal", uses_lse=True, rows=300, keys=450),
    "a negative scale": Kind("causal", scale=-0.1),
    "heads inside tokens": Kind("causal & window(200)", lie="inside"),
    "parts of larger tensors": Kind("causal & window(200)", lie="part", heads=(4, 4)),
    "a gradient of one number": Kind("causal", lie="expanded"),
    "small heads": Kind("causal & window(300)", dim=64, rows=700, keys=900),
    "small heads of softcap": Kind(SOFTCAP, dim=64, rows=333, keys=777),
    "small heads of documents": Kind(
        DOCUMENTS, dim=64, heads=(8, 2), rows=1400, keys=1400, inputs=lambda kind: documents(kind.batch, kind.keys)
    ),
    "small heads of one token": Kind("causal", dim=64, rows=1, keys=1),
    "small heads inside tokens": Kind("causal | prefix(77)", dim=64, heads=(4, 4), lie="inside", dtype=torch.float16),
}  # fmt: skip


def lists(kind: Kind) -> dict[str, Tensor]:
    """Of blocks, some members none, and of some rows all."""
    tiles = -(-kind.keys // 128)
    size = (kind.batch, kind.heads[1], tiles, 4)
    chosen = torch.randint(-1, tiles, size, device="cuda", dtype=torch.int32).sort(-1).values
    chosen[:, 0, ::3] = -1
    return {"p": chosen}


def tensors(kind: Kind) -> tuple[list[Tensor], Tensor]:
    """q, k and v, which want gradients, and the gradient of the output."""

    def one(heads: int, tokens: int) -> Tensor:
        size = (kind.batch, heads, tokens, kind.dim)
        if kind.lie == "inside":
            return torch.randn(size[0], tokens, heads, kind.dim, device="cuda").to(kind.dtype).transpose(1, 2)
        if kind.lie == "part":
            return torch.randn(size[0], heads, tokens + 3, 2 * kind.dim, device="cuda").to(kind.dtype)[
                :, :, 2:-1, : kind.dim
            ]
        return torch.randn(size, device="cuda").to(kind.dtype)

    of_q, of_keys = kind.heads
    given = [one(of_q, kind.rows), one(of_keys, kind.keys), one(of_keys, kind.keys)]
    dout = one(of_q, kind.rows)
    if kind.lie == "expanded":
        dout = torch.ones((), device="cuda", dtype=kind.dtype).expand(kind.batch, of_q, kind.rows, kind.dim)
    return [x.detach().requires_grad_() for x in given], dout


def allowed(right: Tensor, portable: Tensor) -> float:
    """How far a gradient may be from the exact one: twice as far as that of the portable kernels, which round at the
    same places, where these are not far; and what sums in float32 lose where the gradient is 0."""
    apart = float((portable.double() - right).norm())
    return min(2 * apart, 1e-2 * float(right.norm())) + 1e-5 * math.sqrt(right.numel())


@pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
@pytest.mark.parametrize("name", KINDS)
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, runs, launch = KINDS[name], [0], GluonBackward.__call__
    torch.manual_seed(len(name))
    attn: Any = attndsl.compile(kind.text)
    given, dout = tensors(kind)
    inputs = kind.inputs(kind)
    d_lse = torch.randn(kind.batch, kind.heads[0], kind.rows, device="cuda") if kind.uses_lse else None
    scale = {} if kind.scale is None else {"scale": kind.scale}

    def counted(*call: Any) -> Any:
        runs[0] += 1
        return launch(*call)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        out, lse = attn(*given, return_lse=True, backend=backend, **inputs, **scale)
        if d_lse is None:
            return torch.autograd.grad(out, given, dout)
        return torch.autograd.grad((out, lse), given, (dout, d_lse))

    monkeypatch.setattr(GluonBackward, "__call__", counted)
    exact = [x.detach().double().requires_grad_() for x in given]
    out, lse = attn.reference(*exact, return_lse=True, **inputs, **scale)
    if d_lse is None:
        right = torch.autograd.grad(out, exact, dout.double())
    else:
        right = torch.autograd.grad((out, lse), exact, (dout.double(), d_lse.double()))
    portable = gradients("triton")
    assert runs == [0]
    several = [gradients("gluon") for _ in range(5)]
    assert runs == [5], "otherwise the portable kernels are compared with themselves"
    for found in several:
        assert all(torch.equal(x, y) for x, y in zip(found[1:], several[0][1:], strict=True)), "dk and dv repeat"
        for what, x, y, p in zip("qkv", found, right, portable, strict=True):
            apart = float((x.double() - y).norm())
            assert apart <= allowed(y, p), (name, what, apart, allowed(y, p))
    with deterministic():
        first, again = (gradients("gluon") for _ in range(2))
    assert runs == [5]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize(("text", "dim"), [("causal", 128), ("causal & (sink(4) | window(200))", 128), ("causal", 64)])
def test_a_thousand_launches_on_fresh_inputs_agree(text: str, dim: int) -> None:
    """Twice on the same inputs: dk and dv to the bit, dq to the rounding of its sums. All beside the portable kernels,
    while another stream disturbs the clocks of memory."""
    made, q_size, k_size = engine(attndsl.compile(text).program), (1, 8, 700, dim), (1, 4, 900, dim)
    q, dout = (torch.empty(q_size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.empty(k_size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    other, noise = torch.cuda.Stream(), torch.empty(1 << 24, device="cuda")  # type: ignore[no-untyped-call]
    for n in range(1000):
        for x in (q, k, v, dout):
            x.normal_()
        out, lse = made.forward(q, k, v, [], [], None, "gluon")
        with torch.cuda.stream(other):
            noise[: 1 << (14 + n % 11)].add_(1.0)
        first, second, expected = (
            made.backward(dout, None, q, k, v, out, lse, [], [], None, backend)[:3]
            for backend in ("gluon", "gluon", "triton")
        )
        wrong += sum((x != y).sum() for x, y in zip(first[1:], second[1:], strict=True))
        # A sum that lies between two numbers of bfloat16 may round to either.
        wrong += ((first[0].float() - second[0].float()).norm() > 1e-4 * first[0].float().norm()).long()
        for x, y in zip(first, expected, strict=True):
            wrong += ((x.float() - y.float()).norm() > 5e-3 * y.float().norm()).long()
    assert int(wrong) == 0


def test_the_default_is_the_one_pass_that_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, in a compiled step and in a recorded graph; and not where torch is asked for deterministic algorithms."""
    attn, runs, launch = attndsl.compile("causal"), [0], GluonBackward.__call__
    q, k, v, dout = (torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    given = [x.requires_grad_() for x in (q, k, v)]

    def counted(*call: Any) -> Any:
        runs[0] += 1
        return launch(*call)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attn(q, k, v)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), dout)

    def alike(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
        dq = float((found[0].float() - wanted[0].float()).norm()) <= 1e-4 * float(wanted[0].float().norm())
        return dq and all(torch.equal(x, y) for x, y in zip(found[1:], wanted[1:], strict=True))

    monkeypatch.setattr(GluonBackward, "__call__", counted)
    eager = step(*given)
    assert runs == [1]
    compiled: Any = torch.compile(attend, fullgraph=True)
    assert alike(torch.autograd.grad(compiled(*given), given, dout), eager)
    assert runs == [2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(*given)
    with torch.no_grad():
        for x in given:
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert runs == [3] and alike(recorded, step(*given)) and runs == [4]
    with deterministic():
        first, again = step(*given), torch.autograd.grad(compiled(*given), given, dout)
    assert runs == [4] and all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
