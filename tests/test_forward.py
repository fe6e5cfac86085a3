"""Triton's forward kernels against the oracle: interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import attndsl
from attndsl.codegen.triton_forward import forward_source
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.plan import Loads, Printed, Spec, Tiling, forward_plan
from attndsl.program import CallShape, Program
from attndsl.runtime.call import call_shape, device_target, dtype_of
from attndsl.runtime.derive import Deriver
from attndsl.runtime.reference import reference
from attndsl.runtime.triton_launch import TritonForward
from attndsl.tile_sizes import default_tiling
from attndsl.wiring import engine as _engine
from tests.accuracy import check, examples
from tests.cases import CASES
from tests.strategies import Case, composed_programs, tensors

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tiling(16, 32)
# The interpreter multiplies the bits of bfloat16 as integers.
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")]
HALVES = [pytest.param(torch.bfloat16, marks=NEEDS_GPU), torch.float16]
BOTH = pytest.mark.parametrize("loads", Loads, ids=lambda loads: loads.value)


def run(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    args: Mapping[str, int] | None = None,
    *,
    loads: Loads = Loads.POINTER,
    tiling: Tiling | None = SMALL,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse of the program's Triton kernel, with tiles and loads of our choice."""
    shape = call_shape(q, k, v)
    spec = Spec(
        shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype_of(q), device_target(DEVICE), loads,
        scale_sign=1 if scale is None or scale > 0 else -1,
    )  # fmt: skip
    plan = forward_plan(program, spec, tiling or default_tiling(spec))
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    given = [inputs[decl.name].to(DEVICE) for decl in program.inputs]
    numbers = [(args or {})[name] for name in program.args]
    given += Deriver(plan.program, shape, DEVICE, given=given)(given, numbers)
    printed = Printed(plan.program, spec, plan.tiling, forward_source(plan))
    kernel = TritonForward(printed, q, k, v, given, aligned=loads is Loads.DESCRIPTOR)
    out, lse = kernel(q, k, v, given, numbers, scale, None)
    return out.cpu(), lse.cpu()


def judge(case: Case, loads: Loads, dtype: torch.dtype = torch.float32, tiling: Tiling | None = SMALL) -> None:
    program = case.load()
    q, k, v, inputs = tensors(case, dtype=dtype)
    out, lse = run(program, q, k, v, inputs, case.args, loads=loads, tiling=tiling)
    check(program, q, k, v, inputs, case.args, out, lse)


@pytest.mark.triton_newest
@pytest.mark.parametrize("name", CASES)
def test_program(name: str) -> None:
    judge(CASES[name], Loads.POINTER)


@pytest.mark.triton_newest
@pytest.mark.parametrize(
    "name", ["one_token", "chunk", "last_row", "dilated", "blocks", "shifted_blocks", "small", "align_start"]
)
def test_descriptors(name: str) -> None:
    """Every way in which a tile can reach past the keys or past the head dimension."""
    judge(CASES[name], Loads.DESCRIPTOR)


@BOTH
@pytest.mark.parametrize("name", ["streaming", "wide", "sink", "softcap"])
@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_dtype(name: str, dtype: torch.dtype, loads: Loads) -> None:
    judge(CASES[name], loads, dtype)


@pytest.mark.parametrize("tiling", [Tiling(32, 16), Tiling(16, 64), Tiling(64, 16), None], ids=str)
def test_tiling(tiling: Tiling | None) -> None:
    judge(replace(CASES["streaming"], shape=CallShape(1, 2, 1, 150, 150, 16, 16)), Loads.POINTER, tiling=tiling)


@given(case=composed_programs(lengths=(1, 7, 33, 64, 100)))
@examples(40)
def test_random(case: Case) -> None:
    judge(case, Loads.POINTER, tiling=Tiling(32, 32))


# ---------------------------------------------------------------------------------------- calls


def random_qkv(*sizes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*size, generator=generator) for size in sizes]


@BOTH
def test_strided_tensors(loads: Loads) -> None:
    """Heads inside tokens, a slice of a longer cache, and q, k, v cut out of one projection."""
    program = CASES["streaming"].load()
    (q,) = random_qkv((2, 50, 4, 16))
    (cache,) = random_qkv((2, 80, 2, 3, 16))
    k, v = (cache[:, 10:60, :, i].transpose(1, 2) for i in (0, 2))
    q = q.transpose(1, 2)
    out, lse = run(program, q, k, v, {}, loads=loads)
    assert out.stride() == q.stride(), "the output lies in memory as q does"
    check(program, q, k, v, {}, {}, out, lse)


def test_broadcast_keys() -> None:
    """Expanded tensors: a stride of 0."""
    program = CASES["streaming"].load()
    q, k, v = random_qkv((2, 4, 50, 16), (1, 1, 50, 16), (1, 1, 50, 16))
    k, v = (x.expand(2, 2, 50, 16) for x in (k, v))
    out, lse = run(program, q, k, v, {})
    check(program, q, k, v, {}, {}, out, lse)


@pytest.mark.parametrize("scale", [0.3, -0.7, 0.0])
@pytest.mark.parametrize("name", ["empty_rows", "sink", "weights", "softcap"])
def test_scale_of_a_call(name: str, scale: float) -> None:
    case = CASES[name]
    program = case.load()
    q, k, v, inputs = tensors(case)
    out, lse = run(program, q, k, v, inputs, scale=scale)
    check(program, q, k, v, inputs, {}, out, lse, scale)


def test_broadcast_inputs() -> None:
    """A dimension of size 1 stands for any size."""
    case = CASES["rows_and_keys"]
    program = case.load()
    q, k, v, inputs = tensors(case)
    narrow = {"lift": inputs["lift"][:1, :, :1], "prior": inputs["prior"][:1]}
    wide = {"lift": narrow["lift"].expand(2, 2, 20), "prior": narrow["prior"].expand(2, 70)}
    out, lse = run(program, q, k, v, narrow)
    check(program, q, k, v, wide, {}, out, lse)


def test_strided_and_wide_inputs() -> None:
    """An input's strides and integer type are the caller's."""
    case = CASES["until"]
    program = case.load()
    q, k, v, inputs = tensors(case)
    moved = inputs["until"].to(torch.int64).transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = run(program, q, k, v, {"until": moved})
    check(program, q, k, v, inputs, {}, out, lse)


def test_large_scores() -> None:
    """Scores far beyond what exp takes."""
    program = CASES["streaming"].load()
    q, k, v = random_qkv((1, 2, 40, 16), (1, 1, 40, 16), (1, 1, 40, 16))
    for factor in (1e3, -1e3):
        out, lse = run(program, q * factor, k, v, {})
        check(program, q * factor, k, v, {}, {}, out, lse)


def test_no_keys_and_inputs_over_them() -> None:
    """What follows the position of a row is read all the same, from tensors without entries."""
    program = load("attention a { input doc : int[b, k]\n input t : float[k]\n score s + t[k] + t[q]\n"
                   " softmax with sink 0.5\n attend causal & {doc[q] == doc[k]} }").program  # fmt: skip
    q, k = torch.randn(1, 2, 3, 16, device=DEVICE), torch.randn(1, 2, 0, 16, device=DEVICE)
    inputs = [torch.zeros(1, 0, dtype=torch.int32, device=DEVICE), torch.zeros(0, device=DEVICE)]
    engine = _engine(program)
    out, lse = engine.forward(q, k, k, inputs, [], None, "triton")
    expected, expected_lse = reference(program, q, k, k, dict(zip(("doc", "t"), inputs, strict=True)), {}, None, True)
    torch.testing.assert_close(out.double(), expected)
    torch.testing.assert_close(lse.double(), expected_lse)
    wrong = [inputs[0], torch.zeros(0, 3, device=DEVICE)]
    with pytest.raises(PatternError, match="A513"):
        engine.forward(q, k, k, wrong, [], None, "triton")


@pytest.mark.parametrize("name", ["out", "lse", "dout", "delta", "sum_0", "out_input"])
def test_inputs_named_like_tensors_of_the_kernels(name: str) -> None:
    """Forward and backward: what is written must not be what was given."""
    text = f"attention a {{ input {name} : float[h] learnable\n score s + {name}[h] * k\n attend causal }}"
    attn = attndsl.compile(text)
    q, k, v = (torch.randn(1, 2, 40, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    given: dict[str, Any] = {name: torch.randn(2, device=DEVICE, requires_grad=True)}
    leaves = (q, k, v, given[name])
    found = torch.autograd.grad(attn(q, k, v, backend="triton", **given).sum(), leaves)
    expected = torch.autograd.grad(attn.reference(q, k, v, **given).sum(), leaves)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_call_like_the_one_before() -> None:
    """It has no memory for the lse that nobody asks for."""
    attn = attndsl.compile("causal & window(9)")
    q, k, v = (torch.randn(1, 2, 20, 16, device=DEVICE) for _ in range(3))
    torch.testing.assert_close(attn(q, k, v, backend="triton"), attn(q, k, v, backend="triton"), atol=0, rtol=0)
