"""Attention of float8 tensors, beside the oracle's of what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.codegen.triton_values import values_source
from attndsl.runtime.launcher import Slot
from attndsl.runtime.quantized import _BLOCK, FP8, VALUES, shape_in_order
from attndsl.runtime.triton_launch import prepare_small
from attndsl.targets import hopper_refusal, make_spec
from tests.gpu import interprets
from tests.offline import Job, compile_all
from tests.test_hopper import good, offline

SINK = "attention a { input sinks : float[h]\n softmax with sink sinks[h]\n attend causal & window(20) }"
DOCUMENTS = "attention a { input doc : int[b, k] sorted\n attend causal & document(doc) }"
WEIGHTS = "attention a { weights max(s, 0.0)\n attend causal }"
Tensors = tuple[Tensor, Tensor, Tensor]
Scales = tuple[Tensor | None, Tensor | None, Tensor | None]


def tensors(heads: int = 4, kv_heads: int = 2, rows: int = 50, keys: int = 70, dim: int = 32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, dim, generator=generator).to(FP8)
        for h, n in ((heads, rows), (kv_heads, keys), (kv_heads, keys))
    )
    return q, k, v


def scales(heads: int = 4, kv_heads: int = 2) -> Scales:
    return torch.linspace(0.25, 2.0, heads), torch.tensor(0.7), torch.linspace(3.0, 0.1, kv_heads).half()


@pytest.mark.parametrize("text", ["causal & window(20)", "all", SINK, DOCUMENTS, WEIGHTS])
@pytest.mark.parametrize("given", [None, (None, torch.tensor([0.5]), None), scales()], ids=["none", "one", "heads"])
def test_what_they_stand_for(text: str, given: Scales | None) -> None:
    attn, (q, k, v) = attndsl.compile(text), tensors()
    inputs: dict[str, Any] = {}
    if text == SINK:
        inputs["sinks"] = torch.tensor([0.0, 1.0, -1.0, 3.0])
    if text == DOCUMENTS:
        inputs["doc"] = (torch.arange(70) // 25).expand(2, -1)
    out = attn(q, k, v, scales=given, **inputs)
    wide = [x.double() if s is None else x.double() * s.double().view(-1, 1, 1)
            for x, s in zip((q, k, v), given or (None,) * 3, strict=True)]  # fmt: skip
    exact = attn.reference(*wide, **inputs)
    assert torch.equal(attn.reference(q, k, v, scales=given or (None,) * 3, **inputs), exact)
    assert out.dtype is torch.bfloat16
    # Only the output is rounded, once: the CPU computes in float32.
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


def test_lse_and_ragged_calls() -> None:
    attn = attndsl.compile("causal & window(20)")
    for rows, keys in ((1, 1), (1, 70), (0, 5)):
        q, k, v = tensors(rows=rows, keys=keys)
        out, lse = attn(q, k, v, scales=scales(), return_lse=True)
        exact, exact_lse = attn.reference(q, k, v, scales=scales(), return_lse=True)
        assert out.shape == exact.shape and lse.dtype is torch.float32
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-4)


def test_under_compile_and_export() -> None:
    attn, (q, k, v) = attndsl.compile("causal & window(20)"), tensors()
    given = scales()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attn(q, k, v, scales=given)
        return out * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), call(q, k, v))


def test_plain_tensors_take_no_scales() -> None:
    attn: Any = attndsl.compile("causal")
    q, k, v = tensors()
    wrong: dict[str, Callable[[], object]] = {
        "A580.*q is bfloat16": lambda: attn(q.bfloat16(), k.bfloat16(), v.bfloat16(), scales=scales()),
        "A580.*k is float16": lambda: attn(q, k.half(), v),
        "A580.*k_scale is float32 .3. on cpu": lambda: attn(q, k, v, scales=(None, torch.ones(3), None)),
        "A580.*q_scale is int64": lambda: attn(q, k, v, scales=(torch.tensor(2), None, None)),
        "A580.*not .q_scale": lambda: attn(q, k, v, scales=(None, None)),
        "A580.*not .q_scale, k": lambda: attn(q, k, v, scales=2.0),
        "A581.*dropout": lambda: attn(q, k, v, dropout=0.5),
        "A581.*gradients": lambda: attn(q, k, v, scales=(None, torch.ones(2, requires_grad=True), None)),
        "A580.*q is int8": lambda: attn(q.view(torch.int8), k.view(torch.int8), v.view(torch.int8)),
    }
    for pattern, make in wrong.items():
        with pytest.raises(attndsl.PatternError, match=pattern):
            make()


def test_what_is_multiplied_as_float8() -> None:
    spec = make_spec("sm_90", "gluon", 8, 8, 128, dtype="float8_e4m3fn")
    assert not hopper_refusal(attndsl.compile("causal").program, spec)
    assert "weights" in hopper_refusal(attndsl.compile(WEIGHTS).program, spec)
    for dim in (16, 96):
        other = make_spec("sm_90", "gluon", 8, 8, dim, dtype="float8_e4m3fn")
        assert "32 numbers" in hopper_refusal(attndsl.compile("causal").program, other)
    with pytest.raises(attndsl.PatternError, match="Hopper alone"):
        attndsl.compile("causal").source(dtype="float8_e4m3fn")
    with pytest.raises(attndsl.PatternError, match="no gradients"):
        attndsl.compile("causal").source("gradients", backend="gluon", dtype="float8_e4m3fn")


@interprets
@pytest.mark.parametrize(("keys", "dim"), [(77, 40), (128, 64), (1, 8), (300, 96)])
def test_values_stand_in_the_order_of_weights(keys: int, dim: int) -> None:
    """Of 16 weights in a row, thread c of four is left with 2c, 2c + 1, 8 + 2c and 8 + 2c + 1 by a product, and gives
    them to the next one as four neighbours."""
    v = torch.randint(0, 256, (2, keys, 3, dim), dtype=torch.uint8).transpose(1, 2)
    shape = shape_in_order(v)
    strides = {f"stride_v{axis}": v.stride(n) for n, axis in enumerate("bhn")}
    sources = {"v_ptr": Slot(0, "*u8"), "ordered_ptr": Slot(1, "*u8"), "heads": 3, "k_len": keys, "places": shape[3]}
    programs = 6 * math.ceil(shape[3] / _BLOCK)
    run = prepare_small(values_source(dim, _BLOCK), VALUES, "cuda:90", 4, programs, sources | strides, v.device)
    found, expected = torch.full(shape, 7, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)
    run((v, found))
    for place in range(shape[3]):
        thread, nth = place % 16 // 4, place % 4
        key = place // 16 * 16 + 2 * thread + (nth if nth < 2 else 8 + nth - 2)
        if key < keys:
            expected[..., place] = v[:, :, key]
    assert torch.equal(found, expected)


@offline
def test_products_of_float8_compile() -> None:
    """Weights go from one product to the next without passing through shared memory."""
    texts = ["causal & window(1024)", "attention s { score softcap(s, 20.0)\n attend causal }"]
    jobs = [Job(x, "cuda:90", 128, "pointer", dtype="float8_e4m3fn", hopper="forward") for x in texts]
    for found in compile_all(jobs):
        assert good(found) and found.spills <= 64, found
