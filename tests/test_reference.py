"""The dense reference against plain numpy, and what it promises about empty rows, sinks and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

from attndsl import oracle
from attndsl.grammar import load
from attndsl.program import Axis, Const, Program, Type, Var, Where
from attndsl.runtime.reference import reference
from tests.rules import BATCH, HEADS, SCORES, Array, Pairs, ScoreRule, shape_of
from tests.strategies import Case, composed_programs, tensors

RANDOM = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def qkv(rows: int, k_len: int, seed: int = 0, heads: int = 2, kv_heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, heads, rows, 4), (2, kv_heads, k_len, 4), (2, kv_heads, k_len, 3))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in sizes)
    return q, k, v


def numpy_attention(logits: Array, allowed: Array, v: Array) -> tuple[Array, Array]:
    """Row by row, on the allowed keys only: out [B, H, rows, Dv] and lse [B, H, rows]."""
    out = np.zeros((*logits.shape[:3], v.shape[-1]))
    lse = np.full(logits.shape[:3], -np.inf)
    for b, h, row in np.ndindex(*logits.shape[:3]):
        keys = np.flatnonzero(allowed[b, h, row])
        if len(keys):
            mass = np.exp(logits[b, h, row, keys])
            lse[b, h, row] = np.log(mass.sum())
            out[b, h, row] = mass @ v[b, h // (logits.shape[1] // v.shape[1]), keys] / mass.sum()
    return out, lse


# ------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
@pytest.mark.parametrize(("n", "rows"), [(1, 1), (17, 17), (40, 13)])
def test_score_rule(score: ScoreRule, n: int, rows: int) -> None:
    shape = shape_of(n, rows)
    rng = np.random.default_rng(n)
    q = rng.standard_normal((BATCH, HEADS, rows, 8))
    k, v = (rng.standard_normal((BATCH, shape.kv_heads, n, 8)) for _ in "kv")
    data = score.data(rng, n)
    pairs = Pairs(shape, data)
    dots = np.einsum("bhqd,bhkd->bhqk", q, np.repeat(k, HEADS // shape.kv_heads, axis=1))
    logits = score.logits(pairs, dots * (8**-0.5 if score.scale is None else score.scale))
    allowed = np.broadcast_to(score.rule(pairs), logits.shape)

    program = load(score.text).program
    inputs = {name: torch.from_numpy(values) for name, values in data.items()}
    q_t, k_t, v_t = (torch.from_numpy(x) for x in (q, k, v))
    out, lse = reference(program, q_t, k_t, v_t, inputs, {}, return_lse=True)
    want_out, want_lse = numpy_attention(logits, allowed, v)
    np.testing.assert_allclose(out.numpy(), want_out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=1e-12, atol=1e-12)
    assert out.dtype == lse.dtype == torch.float64


def test_scale_of_the_call_overrides_that_of_the_program() -> None:
    q, k, v = qkv(5, 5)
    for text, scale, effective in (("causal", None, 0.5), ("causal", 0.3, 0.3)):
        out = reference(load(text).program, q, k, v, {}, {}, scale=scale)
        clause = load(f"attention a {{ scale {effective}\n attend causal }}").program
        torch.testing.assert_close(out, reference(clause, q, k, v, {}, {}))
        torch.testing.assert_close(out, reference(clause, q * effective, k, v, {}, {}, scale=1.0))


def test_weights_are_not_normalised() -> None:
    q, k, v = qkv(6, 6)
    program = load("attention a { weights sigmoid(s) + h\n attend causal }").program
    out = reference(program, q, k, v, {}, {})
    s = q @ k.transpose(-1, -2) / 2
    weight = (torch.sigmoid(s) + torch.arange(2).reshape(1, 2, 1, 1)).tril()
    torch.testing.assert_close(out, weight @ v)
    with pytest.raises(ValueError, match="lse is undefined under `weights`"):
        reference(program, q, k, v, {}, {}, return_lse=True)


def test_weights_beside_a_score_or_a_sink_are_refused() -> None:
    q, k, v = qkv(2, 2)
    every = Where(Const(True))
    for beside in ({"score": Var("s")}, {"sink": Const(0)}):
        program = Program.of("a", every).with_branch(weights=Const(1), **beside)
        with pytest.raises(ValueError, match="in place of"):
            reference(program, q, k, v, {}, {})


def test_sink_joins_the_denominator() -> None:
    """A sink is one more key whose value is zero."""
    q, k, v = qkv(6, 6)
    sinks = torch.tensor([0.7, -30.0], dtype=torch.float64)
    text = "attention a { input sinks : float[h] learnable\n softmax with sink sinks[h]\n attend causal & window(3) }"
    out, lse = reference(load(text).program, q, k, v, {"sinks": sinks}, {}, return_lse=True)
    s = (q @ k.transpose(-1, -2) / 2).masked_fill(~torch.ones(6, 6).tril().triu(-2).bool(), -torch.inf)
    s = torch.cat((s, sinks.reshape(1, 2, 1, 1).expand(2, 2, 6, 1)), dim=-1)
    values = torch.cat((v, torch.zeros_like(v[:, :, :1])), dim=2)
    torch.testing.assert_close(out, s.softmax(-1) @ values)
    torch.testing.assert_close(lse, s.logsumexp(-1))


def test_large_logits_do_not_overflow() -> None:
    q, k, v = qkv(4, 4)
    out, lse = reference(load("causal").program, q * 1e4, k * 1e4, v, {}, {}, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    sunk = load("attention a { softmax with sink 100000\n attend causal }").program
    out, lse = reference(sunk, q, k, v, {}, {}, return_lse=True)
    assert not out.any() and torch.equal(lse, torch.full_like(lse, 1e5))


def test_conditionals_on_s() -> None:
    q, k, v = qkv(5, 5)
    text = "attention a { score if s > 0 then s + (1 + (if s > 0.5 then 2 else 3)) // 2 else -s\n attend all }"
    out, lse = reference(load(text).program, q, k, v, {}, {}, return_lse=True)
    s = q @ k.transpose(-1, -2) / 2
    logits = torch.where(s > 0, s + torch.where(s > 0.5, 1, 2), -s)
    torch.testing.assert_close(out, logits.softmax(-1) @ v)
    torch.testing.assert_close(lse, logits.logsumexp(-1))


# -------------------------------------------------------------------------------- empty rows


def test_empty_rows() -> None:
    q, k, v = qkv(6, 6)
    pattern = "{ k < q - 2 }"
    out, lse = reference(load(pattern).program, q, k, v, {}, {}, return_lse=True)
    assert not out[:, :, :3].any() and (lse[:, :, :3] == -torch.inf).all() and lse[:, :, 3:].isfinite().all()
    sunk = load(f"attention a {{ softmax with sink 0.25 * (h + 1)\n attend {pattern} }}").program
    out, lse = reference(sunk, q, k, v, {}, {}, return_lse=True)
    assert not out[:, :, :3].any()
    torch.testing.assert_close(lse[0, :, :3], torch.tensor([[0.25], [0.5]], dtype=torch.float64).expand(2, 3))


def test_scores_of_minus_infinity_empty_a_row() -> None:
    q, k, v = qkv(4, 4)
    keep = torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    text = "attention a { input keep : float[k] learnable\n score s + log(keep[k])\n attend causal }"
    out, lse = reference(load(text).program, q, k, v, {"keep": keep}, {}, return_lse=True)
    assert not out[:, :, 0].any() and (lse[:, :, 0] == -torch.inf).all()
    torch.testing.assert_close(out[:, :, 1:3], v[:, :, 1:2].expand(2, 2, 2, 3))
    (out.sum() + lse[:, :, 1:].sum()).backward()  # type: ignore[no-untyped-call]
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v, keep))


@pytest.mark.parametrize(("rows", "k_len"), [(3, 0), (0, 3), (5, 2)])
def test_calls_with_few_pairs(rows: int, k_len: int) -> None:
    q, k, v = qkv(rows, k_len)
    ids = torch.zeros(2, k_len, dtype=torch.int32)
    text = """attention a { input ids : int[b, k]
    score s + ids[q] * ids[k]
    softmax with sink h
    attend causal & document(ids) }"""
    out, lse = reference(load(text).program, q, k, v, {"ids": ids}, {}, return_lse=True)
    assert out.shape == (2, 2, rows, 3) and lse.shape == (2, 2, rows)
    empty = max(rows - k_len, 0)
    assert not out[:, :, :empty].any()
    torch.testing.assert_close(lse[0, :, :empty], torch.arange(2.0).double()[:, None].expand(2, empty))


# ---------------------------------------------------------------------------------- gradients

DIFFERENTIABLE = {
    "empty rows": "attention a { attend { k < q - 2 } }",
    "sink": "attention a { input x : float[h] learnable\n softmax with sink x[h] * 2\n attend { k < q - 2 } }",
    "bias": "attention a { input x : float[h, 3] learnable\n score s + x[h, q - k]\n attend causal }",
    "slope": "attention a { input x : float[h] learnable\n score s - x[h] * (q - k)\n attend window(2) }",
    "softcap": "attention a { score softcap(s, 0.5) * 3\n attend causal }",
    "weights": "attention a { input x : float[b, q] learnable\n weights sigmoid(s + x)\n attend causal }",
    "scale": "attention a { input x : float[h] learnable\n score exp(x[h]) * s\n attend all }",
}


@pytest.mark.parametrize("text", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients(text: str) -> None:
    program = load(text).program
    q, k, v = qkv(5, 5)
    sizes = [[{Axis.B: 2, Axis.H: 2, Axis.Q: 5}.get(d.axis, d.size) for d in decl.dims] for decl in program.inputs]
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]

    def call(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> Any:
        inputs = {decl.name: value for decl, value in zip(program.inputs, values, strict=True)}
        if program.branch.weights is not None:
            return reference(program, q, k, v, inputs, {})
        out, lse = reference(program, q, k, v, inputs, {}, return_lse=True)
        return out, lse[lse != -torch.inf]

    assert torch.autograd.gradcheck(call, (q, k, v, *leaves))


@pytest.mark.parametrize(
    "score",
    [
        "s - log(q - k + 1)",  # negative above the diagonal, which causal leaves out
        "if q > k then s - log(q - k) else s",  # infinite on the diagonal, which the condition leaves out
        "if k < q and 1 / (q - k) < 0.5 then s / (q - k) else sqrt(abs(s))",
    ],
)
def test_what_is_not_evaluated_leaves_no_trace_in_gradients(score: str) -> None:
    q, k, v = qkv(6, 6)
    program = load(f"attention a {{ score {score}\n attend causal }}").program

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference(program, q, k, v, {}, {}, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_gradients_reach_narrow_tensors() -> None:
    q, k, v = (x.detach().to(torch.bfloat16).requires_grad_() for x in qkv(5, 5))
    reference(load("causal").program, q, k, v, {}, {}).sum().backward()  # type: ignore[no-untyped-call]
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in (q, k, v))


# ----------------------------------------------------------------------------------- programs


@RANDOM
@given(composed_programs(lengths=(1, 7, 16, 33), dims=(8, 16)))
def test_composed_programs(case: Case) -> None:
    """Never NaN, forward or backward; rows are convex combinations, less what the sink takes."""
    program = case.load()
    q, k, v, inputs = tensors(case, requires_grad=True)
    softmax = program.branch.weights is None
    allowed = oracle.mask(program, case.shape, case.inputs, case.args)
    if softmax:
        out, lse = reference(program, q, k, v, inputs, case.args, return_lse=True)
        ones = reference(program, q, k, torch.ones_like(v), inputs, case.args)
        seen = torch.from_numpy(allowed.any(-1))
        assert (ones[~seen] == 0).all() and not lse.isnan().any()
        if program.branch.sink is None:
            torch.testing.assert_close(ones[seen], torch.ones_like(ones[seen]))
            assert (lse[~seen] == -torch.inf).all()
        else:
            assert ((ones[seen] > 0) & (ones[seen] <= 1)).all() and lse.isfinite().all()
        loss = out.square().sum() + lse[lse.isfinite()].sum()
    else:
        out = reference(program, q, k, v, inputs, case.args)
        loss = out.square().sum()
    assert out.isfinite().all()
    loss.backward()  # type: ignore[no-untyped-call]
    for leaf in (q, k, v, *inputs.values()):
        assert leaf.grad is None or leaf.grad.isfinite().all()
    if q.grad is not None:  # `weights 1` does not read it
        assert not q.grad[~torch.from_numpy(allowed.any(-1))].any()


@RANDOM
@given(composed_programs(lengths=(7, 16, 33), dims=(8,)))
def test_a_chunk_means_what_the_same_rows_of_the_whole_mean(case: Case) -> None:
    program = case.load()
    assume(not program.align_start and case.shape.rows > 1)
    q, k, v, inputs = tensors(case)
    whole = reference(program, q, k, v, inputs, case.args)
    rows = case.shape.rows // 2
    per_row = {d.name for d in program.inputs if any(dim.axis is Axis.Q and dim.block == 1 for dim in d.dims)}
    assert all(program.input(name).dims[-1].axis is Axis.Q for name in per_row)
    last = {name: x[..., -rows:] if name in per_row else x for name, x in inputs.items()}
    chunk = reference(program, q[:, :, -rows:], k, v, last, case.args)
    torch.testing.assert_close(chunk, whole[:, :, -rows:])


def test_inputs_of_both_kinds_reach_the_program() -> None:
    q, k, v = qkv(3, 3)
    text = "attention a { input x : float[h] learnable\n score s + x[h] * (q - k)\n attend causal }"
    program = load(text).program
    assert program.input("x").type is Type.FLOAT
    with pytest.raises(ValueError, match="`x` is missing"):
        reference(program, q, k, v, {}, {})
    with pytest.raises(ValueError, match="`x` has shape"):
        reference(program, q, k, v, {"x": torch.zeros(3)}, {})
