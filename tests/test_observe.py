"""`observe`: sums and maxima of a branch's probabilities, against a rule in numpy and the oracle in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import attndsl
from attndsl.observation import Observation
from attndsl.program import Program
from attndsl.runtime import compose, ops
from attndsl.runtime.reference import reference
from attndsl.runtime.reference_observe import by_class
from tests.accuracy import examples
from tests.strategies import Case, composed_programs, tensors
from tests.test_view_calls import PARTS, SHAPES, leaves, text_of

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

PER = ("head", "query", "rows(16)", "rows(4)", "rows(48)")
OF = ("tokens", "blocks(16)", "blocks(4)", "blocks(48)")
REDUCTIONS = [(per, of) for per in PER for of in OF if (per, of) != ("query", "tokens")]
# All of them twice in one program.
ALL = "\n".join(
    f"observe {word}_{i} = probs(x, {word}, {per}, {of})"
    for i, (per, of) in enumerate(REDUCTIONS)
    for word in ("sum", "max")
)
SOME = "\n".join(
    f"observe {word}_{i} = probs(x, {word}, {per}, {of})"
    for i, (per, of) in enumerate([("head", "tokens"), ("rows(16)", "blocks(16)"), ("query", "blocks(48)")])
    for word in ("sum", "max")
)
STREAMING = "x = attend causal & (window(20) | sink(3))"


def judge(attn: attndsl.Attention, shape: tuple[int, ...], dtype: torch.dtype, backend: str, **call: Any) -> None:
    """Assert that what is observed is the oracle's, and that the output is not touched."""
    qkv, inputs = leaves(attn, shape, dtype)
    q, k, v = qkv
    out, observed = attn(q, k, v, backend=backend, return_observed=True, **inputs, **call)
    exact: dict[str, Any] = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact |= call
    expected, wanted = attn.reference(q.double(), k.double(), v.double(), return_observed=True, **exact)
    assert list(observed) == [each.name for each in attn.program.observations]
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    for name, found in observed.items():
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), wanted[name], atol=tolerance, rtol=tolerance, msg=name)


# -------------------------------------------------------------------------------------------- meaning


def test_a_rule() -> None:
    """Written out: H2O's mass of a key, and the block maxima that SeerAttention's gate learns."""
    attn = attndsl.compile(
        f"attention a {{ {STREAMING}\n observe mass = probs(x, sum, head, tokens)\n"
        "observe map = probs(x, max, rows(8), blocks(4)) }"
    )
    rows, k_len, start = 13, 21, 8
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, rows, 8), torch.randn(1, 1, k_len, 8), torch.randn(1, 1, k_len, 8)
    mass, blocks = np.zeros((2, k_len)), np.zeros((2, 3, 6))
    for h in range(2):
        for i in range(rows):
            at = start + i
            seen = [j for j in range(at + 1) if at - j < 20 or j < 3]
            weights = np.exp([float(q[0, h, i].double() @ k[0, 0, j].double()) / 8**0.5 for j in seen])
            for j, p in zip(seen, weights / weights.sum(), strict=True):
                mass[h, j] += p
                blocks[h, at // 8, j // 4] = max(blocks[h, at // 8, j // 4], p)
    for found in (attn(q, k, v, return_observed=True)[1], attn.reference(q, k, v, return_observed=True)[1]):
        np.testing.assert_allclose(found["mass"][0, :, 0], mass, atol=1e-6)
        np.testing.assert_allclose(found["map"][0], blocks, atol=1e-6)
        # Each row's probabilities are 1 together.
        np.testing.assert_allclose(found["mass"].sum(-1), rows, rtol=1e-6)


def test_entries_give_shares() -> None:
    """An entry of a view gives each block the share of its present tokens inside it."""
    text = "attention a { x = attend all over pool(mean, 6, 4)\n observe map = probs(x, sum, head, blocks(4)) }"
    attn = attndsl.compile(text)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 8, dtype=torch.float64) for n in (3, 11, 11))
    means = torch.stack([k[0, 0, j : j + 6].mean(0) for j in (0, 4, 8)])
    p = torch.softmax(q[0, 0] @ means.T / 8**0.5, -1).sum(0)
    wanted = [p[0] * 4 / 6, p[0] * 2 / 6 + p[1] * 4 / 6, p[1] * 2 / 6 + p[2]]
    for found in (attn(q, k, v, return_observed=True)[1], attn.reference(q, k, v, return_observed=True)[1]):
        torch.testing.assert_close(found["map"][0, 0, 0], torch.stack(wanted))


def test_chunks_add_up() -> None:
    """What chunks of a prompt observe is that of the whole: rows count from position 0, wherever a chunk begins."""
    attn = attndsl.compile(
        f"attention a {{ {STREAMING}\n observe mass = probs(x, sum, head, tokens)\n"
        "observe map = probs(x, max, rows(16), blocks(16)) }"
    )
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 75, 16, dtype=torch.float64) for _ in range(3))
    whole = attn(q, k, v, return_observed=True)[1]
    mass, blocks = torch.zeros_like(whole["mass"]), torch.zeros_like(whole["map"])
    for low, high in ((0, 5), (5, 37), (37, 38), (38, 75)):
        found = attn(q[:, :, low:high], k[:, :, :high], v[:, :, :high], return_observed=True)[1]
        mass[..., :high] += found["mass"]
        places = blocks[:, :, : -(-high // 16), : -(-high // 16)]
        places.copy_(torch.maximum(places, found["map"]))
    torch.testing.assert_close(mass, whole["mass"])
    torch.testing.assert_close(blocks, whole["map"])


# ------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 70, 16, 24), (1, 2, 2, 33, 101, 80, 16), (1, 1, 1, 1, 1, 8, 8)])
def test_every_reduction(shape: tuple[int, ...]) -> None:
    judge(attndsl.compile(f"attention a {{ {STREAMING}\n{ALL} }}"), shape, torch.float64, "cpu")


@pytest.mark.parametrize("body", [part for part in PARTS if "weights" not in part])
def test_every_part(body: str) -> None:
    attn = attndsl.compile(text_of(f"x = attend {body}\n{SOME}"))
    for shape in SHAPES:
        judge(attn, shape, torch.float64, "cpu")


def test_triton() -> None:
    judge(attndsl.compile(f"attention a {{ {STREAMING}\n{ALL} }}"), (1, 2, 1, 37, 37, 16, 24), torch.float32, "triton")
    for shape in ((1, 1, 1, 5, 70, 80, 16), (1, 1, 1, 1, 1, 8, 8)):
        judge(attndsl.compile(f"attention a {{ {STREAMING}\n{SOME} }}"), shape, torch.float32, "triton")


@pytest.mark.parametrize("body", [PARTS[i] for i in (3, 5, 7, 12)])
def test_triton_parts(body: str) -> None:
    attn = attndsl.compile(text_of(f"x = attend {body}\n{SOME}"))
    judge(attn, (2, 2, 1, 21, 37, 16, 16), torch.float32, "triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_other_programs(backend: str) -> None:
    """An observed branch that the output does not read, queries from the start, scattered tokens, a scale of heads."""
    for body in (
        f"{STREAMING}\n y = attend causal & window(5)\n{SOME}\noutput y",
        f"align start\n x = attend band(3, 30)\n{SOME}",
        f"x = attend causal & dilated(4)\n{SOME}",
        f"scale 0.1 * (1 + h)\n x = attend causal & window(9) {{ score s * s  softmax with sink 0.5 }}\n{SOME}",
    ):
        attn = attndsl.compile(text_of(body))
        dtype = torch.float64 if backend == "cpu" else torch.float32
        judge(attn, (1, 2, 1, 37, 37, 16, 16), dtype, backend)
    judge(attn, (1, 2, 1, 37, 37, 16, 16), torch.float32, backend, scale=-0.3)


# ------------------------------------------------------------------------------------------------ torch


def test_what_is_observed_is_attended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, made = attndsl.compile("attention a { x = attend causal\n observe mass = probs(x, sum, head, tokens) }"), []

    def attend(*call: Any) -> Any:
        made.append(call[0])
        return own(*call)

    own = ops.attend
    monkeypatch.setattr(compose, "attend", attend)
    attn(*torch.randn(3, 1, 1, 9, 8), return_observed=True)
    assert len(made) == 1


def test_it_has_no_gradient() -> None:
    """What is observed is a target: the loss reaches the gate that learns it, and the output's own gradients stay."""
    attn = attndsl.compile("attention a { x = attend causal\n observe map = probs(x, max, rows(16), blocks(16)) }")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 48, 16, requires_grad=True) for _ in range(3))
    gate = torch.zeros(1, 2, 3, 3, requires_grad=True)
    out, observed = attn(q, k, v, return_observed=True)
    assert observed["map"].grad_fn is None
    ((gate - observed["map"]) ** 2).sum().backward()
    assert q.grad is None and gate.grad is not None
    torch.testing.assert_close(gate.grad, -2 * observed["map"])
    out.sum().backward()
    plain = attndsl.compile("causal")
    expected = torch.autograd.grad(plain(q, k, v).sum(), (q, k, v))
    torch.testing.assert_close((q.grad, k.grad, v.grad), expected)
    with torch.no_grad():
        torch.testing.assert_close(attn(q, k, v, return_observed=True)[1], observed)


def test_a_gate_learns_the_map() -> None:
    """SeerAttention's: pooled queries and keys, projected, learn which blocks hold a probability that counts."""
    torch.manual_seed(0)
    attn = attndsl.compile("attention a { x = attend causal\n observe map = probs(x, max, rows(8), blocks(8)) }")
    to_q, to_k = (torch.nn.Linear(16, 16, bias=False) for _ in range(2))
    optimiser = torch.optim.Adam([*to_q.parameters(), *to_k.parameters()], lr=0.02)
    direction, losses = torch.randn(16), []
    blocks = torch.arange(4)
    seen = blocks[:, None] >= blocks
    for _ in range(60):
        q, k = torch.randn(4, 1, 32, 16), torch.randn(4, 1, 32, 16)
        # Some blocks hold what all queries look for.
        planted = torch.randint(4, (4, 1, 1, 1)) == blocks.view(1, 1, 4, 1)
        k = k + 3 * (planted.repeat_interleave(8, 2) * direction)
        q = q + 3 * direction
        target = attn(q, k, k, return_observed=True)[1]["map"]
        pooled_q, pooled_k = (x.view(4, 1, 4, 8, 16).mean(3) for x in (q, k))
        logits = (to_q(pooled_q) @ to_k(pooled_k).mT / 4).masked_fill(~seen, -torch.inf)
        goal = target / target.sum(-1, keepdim=True)
        loss = -(goal * logits.log_softmax(-1).masked_fill(~seen, 0)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_torch_compile() -> None:
    attn = attndsl.compile(
        "attention a { x = attend causal & window(9)\n far = attend causal over pool(mean, 4)\n"
        "observe mass = probs(x, sum, head, tokens)\n observe map = probs(far, max, rows(16), blocks(8))\n"
        "output x + far }"
    )

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, observed = attn(q, k, v, return_observed=True)
        return out, observed["mass"].sum(-1), observed["map"] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
        found, expected = compiled(q, k, v), step(q, k, v)
        torch.testing.assert_close(found, expected)
        found[0].sum().backward()  # type: ignore[no-untyped-call]
    batched = torch.func.vmap(lambda q: attn(q, q, q, return_observed=True)[1]["mass"])(torch.randn(3, 1, 2, 9, 8))
    assert batched.shape == (3, 1, 2, 1, 9)


def test_autocast_and_strides() -> None:
    attn = attndsl.compile("attention a { x = attend causal\n observe mass = probs(x, sum, head, tokens) }")
    x = torch.randn(2, 40, 2, 16).transpose(1, 2)
    q, k, v = x, x.flip(-1).mT.contiguous().mT, x
    _, wanted = attn.reference(q, k, v, return_observed=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = attn(q, k, v, return_observed=True)[1]["mass"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted["mass"], atol=0.1, rtol=0.05)
    torch.testing.assert_close(
        attn(q, k, v, return_observed=True)[1]["mass"].double(), wanted["mass"], atol=1e-4, rtol=1e-4
    )


def test_what_is_asked() -> None:
    attn = attndsl.compile("attention a { x = attend causal\n observe mass = probs(x, sum, head, tokens) }")
    q = torch.randn(1, 1, 4, 8)
    assert attn(q, q, q, dropout=0.5).shape == q.shape
    assert attndsl.compile("causal")(q, q, q, return_observed=True)[1] == {}
    assert "mass: the sum of the probabilities of x, for all rows and a token at a time" in str(attn.explain(64))


# ----------------------------------------------------------------------------------------- random programs


def observing(case: Case, largest: bool) -> Program | None:
    """A random program that observes its branch, unless that has no probabilities or stands alone by documents."""
    program = case.load()
    if program.branch.weights is not None or program.packed or program.lengths:
        return None
    found = [(None, 1), (16, 16), (1, 4)]
    observed = tuple(Observation(f"o{i}", "x", largest, rows, keys) for i, (rows, keys) in enumerate(found))
    return replace(program.with_branch(name="x"), observations=observed)


def judge_random(case: Case, largest: bool, dtype: torch.dtype, backend: str) -> None:
    """As `tests.accuracy` judges outputs: at most twice the error of a plain implementation in float32."""
    program = observing(case, largest)
    if program is None:
        return
    q, k, v, inputs = tensors(case, dtype=dtype)
    given: dict[str, Any] = {**inputs, **case.args}
    attn = attndsl.Attention(program)
    out, lse, observed = attn(q, k, v, return_lse=True, return_observed=True, backend=backend, **given)
    _, wanted_lse, wanted = attn.reference(q, k, v, return_lse=True, return_observed=True, **given)
    share = q.shape[1] // k.shape[1]
    dots = q.to(dtype) @ k.repeat_interleave(share, 1).mT
    one_hot = torch.eye(k.shape[2], dtype=dtype).expand(*k.shape[:2], -1, -1)
    # Sizes of the call that scores read are those of q and k.
    plain = reference_of(program, q, v).with_branch(name="x")
    scale = None if program.branch.scale is not None else q.shape[3] ** -0.5
    weights = reference(plain, dots, one_hot, one_hot, inputs, case.args, scale, dtype=dtype)
    reached = wanted_lse[wanted_lse != -torch.inf].abs()
    score = max(1.0, float(reached.amax()) if reached.numel() else 0.0)
    assert out.shape[2] == q.shape[2] and lse.shape == out.shape[:3]
    for each in program.observations:
        simple = by_class([weights], [None], each, program, k.shape[2])
        found, expected = observed[each.name], wanted[each.name]
        assert found.shape == expected.shape
        if not found.numel():
            continue
        allowed = 2 * float((simple.double() - expected).abs().amax())
        allowed += 16 * torch.finfo(dtype).eps * score * max(1.0, float(expected.amax()))
        error = float((found.double() - expected).abs().amax())
        assert error <= allowed, f"{each}: error {error:.3g}, allowed {allowed:.3g}"


def reference_of(program: Program, q: Tensor, v: Tensor) -> Program:
    """The program with the sizes of a call's heads put in."""
    from attndsl.simplify import specialise

    sizes = {"D": q.shape[3], "Dv": v.shape[3]}
    branch = program.branch
    said = {"scale": branch.scale, "score": branch.score, "sink": branch.sink}
    return program.with_branch(**{name: None if e is None else specialise(e, sizes) for name, e in said.items()})


@given(case=composed_programs())
@examples(20)
def test_random(case: Case) -> None:
    judge_random(case, False, torch.float64, "cpu")
    judge_random(case, True, torch.float32, "cpu")


@given(case=composed_programs(lengths=(1, 7, 33, 65)))
@examples(6)
def test_random_triton(case: Case) -> None:
    judge_random(case, False, torch.float32, "triton")
    judge_random(case, True, torch.float32, "triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_padding_is_not_observed(backend: str) -> None:
    """Each sequence observes what it observes alone: members past its end get nothing, and its rows give it."""
    body = f"x = attend causal & (window(9) | sink(2))\n{SOME}"
    attn, alone = (
        attndsl.compile(f"attention a {{ {clause} {body} }}") for clause in ("input n : int[b] lengths n", "")
    )
    dtype, n = (torch.float64 if backend == "cpu" else torch.float32), torch.tensor([40, 31, 0])
    for rows in (40, 13):
        judge(attn, (3, 4, 2, rows, 40, 16, 16), dtype, backend, n=n)
    (q, k, v), _ = leaves(attn, (3, 4, 2, 40, 40, 16, 16), dtype)
    found = attn(q, k, v, n=n, backend=backend, return_observed=True)[1]
    wanted = alone(q[1:2, :, :31], k[1:2, :, :31], v[1:2, :, :31], return_observed=True)[1]
    for name, x in found.items():
        assert not x[2].any()
        torch.testing.assert_close(x[1:2, :, : wanted[name].shape[2], : wanted[name].shape[3]], wanted[name])


def test_dropout_does_not_touch_what_is_observed() -> None:
    attn = attndsl.compile(text_of(f"x = attend {PARTS[7]}\n{SOME}"))
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    plain = attn(q, k, v, return_observed=True)
    dropped = attn(q, k, v, return_observed=True, dropout=0.5, seed=1)
    assert not torch.allclose(plain[0], dropped[0])
    for name, x in plain[1].items():
        assert torch.equal(x, dropped[1][name])
