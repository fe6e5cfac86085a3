"""Gradients of the Triton kernels against the oracle's: interpreted where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attndsl.codegen.triton_backward import backward_sources
from attndsl.plan import DType, Loads, Spec, Tiling, backward_plan
from attndsl.program import CallShape, Program
from attndsl.runtime.call import call_shape, device_target, dtype_of
from attndsl.runtime.derive import Deriver
from attndsl.runtime.engine import Gradients
from attndsl.runtime.triton_backward import TritonBackward, backward_parameters
from attndsl.tiling import heavy_tiles
from attndsl.wiring import engine as _engine
from tests.accuracy import examples
from tests.cases import CASES, case, floats, ints
from tests.gradients import Run, expected_gradients, judge, upstream
from tests.strategies import Case, composed_programs, tensors

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tiling(32, 32)
# The interpreter multiplies the bits of bfloat16 as integers.
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]


def runner(tiling: Tiling | None = SMALL, loads: Loads | None = None) -> Run:
    """Gradients by the kernels; `loads` other than those that the device gets."""

    def run(
        program: Program, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        inputs: Mapping[str, Tensor], args: Mapping[str, int], scale: float | None,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:  # fmt: skip
        engine = _engine(program)
        engine.tiling = tiling
        listed, numbers = [inputs[decl.name] for decl in program.inputs], [args[name] for name in program.args]
        # The CPU's forward pass: what is tested here is the backward.
        out, lse = engine.forward(q, k, v, listed, numbers, scale, "cpu")
        dout, q, k, v, out, lse, *listed = (x.to(DEVICE) for x in (dout, q, k, v, out, lse, *listed))
        dlse = None if dlse is None else dlse.to(DEVICE)
        if loads is not None:
            *found, learned = directly(
                program, tiling or SMALL, loads, dout, dlse, q, k, v, out, lse, listed, numbers, scale, None
            )
        else:
            *found, learned = engine.backward(dout, dlse, q, k, v, out, lse, listed, numbers, scale, "triton")
        return [x.cpu() for x in found], [None if x is None else x.cpu() for x in learned]

    return run


def directly(
    program: Program, tiling: Tiling, loads: Loads, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, inputs: list[Tensor], args: list[int], *rest: Any,
) -> Gradients:  # fmt: skip
    shape = call_shape(q, k, v)
    spec = Spec(shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype_of(q), device_target(DEVICE), loads)
    plan = backward_plan(program, spec, tiling, uses_lse=dlse is not None)
    inputs = [*inputs, *Deriver(plan.program, shape, DEVICE)(inputs, args)]
    kernels = TritonBackward(plan, *backward_sources(plan), dout.contiguous(), q, k, v, inputs, aligned=True)
    dq, dk, dv, learned = kernels(dout.contiguous(), dlse, q, k, v, out, lse, inputs, args, *rest)
    return dq, dk, dv, learned[: len(program.inputs)]


LEARNED: dict[str, Case] = {
    "slope": case(
        """attention sloped { input slope : float[h] learnable
        score s - slope[h] * (q - k)
        attend causal & window(33) }""",
        heads=(4, 2), inputs={"slope": floats(4)},
    ),
    "gate": case(
        """attention gated { input gate : float[b, h, q] learnable
        input shift : float[b, k] learnable
        score softcap(s * sigmoid(gate[q]) + shift[k], 3.0)
        attend causal }""",
        heads=(4, 2), rows=20, inputs={"gate": floats(2, 4, 20), "shift": floats(2, 70)},
    ),
    "through_inputs": case(
        """attention grouped { input kind : int[b, k]
        input level : float[h, 5] learnable
        input part : float[5] learnable
        score s * part[kind[q]] + level[h, kind[k]]
        attend causal }""",
        heads=(4, 2), rows=33, inputs={"kind": ints(-1, 7, 2, 70), "level": floats(4, 5), "part": floats(5)},
    ),
    "sink_and_score": case(
        """attention both { input lift : float[b, h, q] learnable
        input base : float learnable
        score s + lift[q] * base
        softmax with sink lift[q] * 0.5 - base * base
        attend causal - window(20) }""",
        heads=(2, 2), inputs={"lift": floats(2, 2, 70), "base": np.float32(0.7)},
    ),
    "sigmoid": case(
        """attention sigmoids { input bias : float[h] learnable
        weights sigmoid(s + bias[h])
        attend causal & window(33) }""",
        inputs={"bias": floats(2)},
    ),
    "constant": case(
        """attention constants { input level : float[g, k] learnable
        weights exp(level[g, k])
        attend causal }""",
        heads=(4, 2), inputs={"level": floats(2, 70)},
    ),
    "keyless": case(
        "attention flat { input a : float[h, q] learnable\n score a[h, q]\n attend causal & window(40) }",
        rows=30, inputs={"a": floats(2, 30)},
    ),
    "infinite_past_the_end": case("attention ends { score s + log(Nk - q) * (k + 1)\n attend causal }"),
    "log_of_zero": case("attention logs { score s + log(q - k)\n attend causal }"),
    "scale_of_head": case("attention scaled { scale 1 / (D + h)\n attend causal & window(33) }", heads=(4, 2)),
    "unread": case(
        "attention idle { input a : float[h] learnable\n score if s > a[h] then s else 2 * s\n attend causal }",
        inputs={"a": floats(2)},
    ),
}  # fmt: skip
FIXED = (
    "streaming", "chunk", "more_rows", "none", "empty_rows", "dilated", "blocks", "documents", "duo", "until",
    "documents_both_ways", "cross_documents",
    "align_start", "guarded", "sink", "weights", "counted", "coarsen_share", "coarsen_data", "random", "segment",
)  # fmt: skip


@pytest.mark.parametrize("name", [*FIXED, *LEARNED])
def test_program(name: str) -> None:
    judge(runner(), (CASES | LEARNED)[name], torch.float32)


@pytest.mark.parametrize("name", ["streaming", "chunk", "more_rows", "empty_rows", "documents", "align_start", "sink"])
def test_descriptor_loads(name: str) -> None:
    judge(runner(loads=Loads.DESCRIPTOR), CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["chunk", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_tiles(name: str, dtype: torch.dtype) -> None:
    judge(runner(None), CASES[name], dtype)


@pytest.mark.parametrize("name", ["empty_rows", "sink"])
def test_without_lse(name: str) -> None:
    judge(runner(), CASES[name], torch.float32, uses_lse=False)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("name", ["chunk", "scale"])
def test_scale_of_a_call(name: str, scale: float) -> None:
    judge(runner(), CASES[name], torch.float32, scale=scale)


@given(case=composed_programs(max_depth=2, lengths=(1, 16, 33, 40), dims=(8, 16)))
@examples(20)
def test_random(case: Case) -> None:
    judge(runner(Tiling(32, 16)), case, torch.float32)


def test_no_rows_and_no_keys() -> None:
    judge(runner(), replace(CASES["softcap"], shape=CallShape(2, 2, 1, 0, 9, 16, 8)), torch.float32)
    judge(runner(), Case("all", {}, {}, {}, CallShape(2, 2, 1, 5, 0, 16, 8)), torch.float32)
    biased = """attention a { input x : float[h, k] learnable
        input y : float[h] learnable
        score s + x[h, k]
        softmax with sink y[h]
        attend causal }"""
    for rows, k_len in ((0, 9), (5, 0)):
        inputs = {"x": floats(2, k_len), "y": floats(2)}
        judge(runner(), case(biased, rows, k_len, inputs=inputs), torch.float32)


def test_broadcast_inputs() -> None:
    """The gradient of a dimension of size 1 is the sum over what it stands for."""
    gated = LEARNED["gate"]
    program = gated.load()
    q, k, v, inputs = tensors(gated)
    inputs = {"gate": inputs["gate"][:1, :, :1], "shift": inputs["shift"][:, :1]}
    dout, dlse = upstream(q, v)
    wide = {"gate": inputs["gate"].expand(2, 4, 20), "shift": inputs["shift"].expand(2, 70)}
    _, (gate, shift) = runner()(program, dout, dlse, q, k, v, inputs, {}, None)
    _, (wide_gate, wide_shift) = expected_gradients(program, q, k, v, wide, {}, dout, dlse)
    assert gate is not None and shift is not None and wide_gate is not None and wide_shift is not None
    torch.testing.assert_close(gate.double(), wide_gate.sum((0, 2), keepdim=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift.double(), wide_shift.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gate", "slope", "sink_and_score", "duo"])
def test_two_runs_agree_to_the_bit(name: str) -> None:
    chosen = (CASES | LEARNED)[name]
    program = chosen.load()
    q, k, v, inputs = tensors(chosen)
    dout, dlse = upstream(q, v)
    first, again = (runner(None)(program, dout, dlse, q, k, v, inputs, {}, None) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_strided_tensors() -> None:
    """Gradients lie in memory as the tensors do, heads inside tokens; dout may lie in any way."""
    program = CASES["streaming"].load()
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 50, 4, 16, generator=generator).transpose(1, 2)
    cache = torch.randn(2, 80, 2, 3, 16, generator=generator)
    k, v = (cache[:, 10:60, :, i].transpose(1, 2) for i in (0, 2))
    dout = torch.randn(2, 4, 16, 50, generator=generator).mT
    found, _ = runner()(program, dout, None, q, k, v, {}, {}, None)
    expected, _ = expected_gradients(program, q, k, v, {}, {}, dout, None)
    for gradient, right in zip(found, expected, strict=True):
        assert gradient.stride(1) < gradient.stride(2)
        torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-5)


def test_default_tilings_do_not_spill() -> None:
    """Compiled in a process of its own: here Triton interprets."""
    root = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), str(root)])
    command = [sys.executable, "-m", "tests.test_backward_triton"]
    done = subprocess.run(command, text=True, capture_output=True, cwd=root, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    stacks = json.loads(done.stdout)
    assert len(stacks) == 12
    # In its masked loop this one keeps some scalars in local memory; without, at eight warps, it takes twice as long.
    assert stacks.pop("attention_dkdv cuda:90 descriptor 128") <= 64
    assert not any(stacks.values()), stacks


def compiled_stacks() -> dict[str, int]:
    """Bytes of stack, which is what spills take, of the kernels at default tilings."""
    from attndsl.codegen.triton_backward import DKDV, DQ
    from attndsl.plan import forward_plan
    from attndsl.runtime.assembly import meta_tensors
    from attndsl.runtime.build import compile_kernel, parameters
    from attndsl.runtime.triton_launch import kernel_source
    from attndsl.tile_sizes import backward_tilings, default_tiling
    from tests.offline import _resources

    found = {}
    program = Case("causal & (window(512) | sink(4))", {}, {}, {}, CallShape(1, 8, 8, 1, 1, 64, 64)).load()
    kinds = (("cuda:80", Loads.POINTER), ("cuda:90", Loads.POINTER), ("cuda:90", Loads.DESCRIPTOR))
    for target, loads in kinds:
        for dim in (64, 128):
            spec = Spec(8, 8, dim, dim, DType.BFLOAT16, target, loads)
            plan = backward_plan(program, spec, *backward_tilings(spec))
            given = backward_parameters(plan, *meta_tensors(forward_plan(program, spec, default_tiling(spec))))
            for name, side, text in zip((DQ, DKDV), (plan, plan.of_keys()), backward_sources(plan), strict=True):
                source = kernel_source(side, text, parameters(text, name), given, aligned=True, function=name)
                used = _resources(compile_kernel(source, target).binary)
                found[f"{name} {target} {loads.value} {dim}"] = int(used["STACK"]) + int(used["LOCAL"])
    return found


def test_heavy_key_tiles_come_first() -> None:
    """Sinks: far more rows see the first tile than the others, and a program per head starts with it."""
    chosen = case("causal & (sink(3) | window(40))", 700, 700, (4, 2), batch=1)
    program = chosen.load()
    spec = Spec(4, 2, 16, 16, DType.FLOAT32, device_target(DEVICE))
    plan = backward_plan(program, spec, SMALL)
    shape = CallShape(1, 4, 2, 700, 700, 16, 16)
    assert heavy_tiles(plan, shape) == 1
    assert heavy_tiles(plan, replace(shape, rows=60, k_len=60)) == 0
    assert heavy_tiles(backward_plan(CASES["chunk"].load(), spec, SMALL), shape) == 0
    judge(runner(), chosen, torch.float32)


def test_through_autograd() -> None:
    """The whole way: an attention's own gradient, on this backend."""
    import attndsl

    attention: Any = attndsl.compile("causal & window(20)")
    q, k, v = (torch.randn(1, 2, 40, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    right = torch.autograd.grad(attention.reference(q, k, v).sum(), (q, k, v))
    found = torch.autograd.grad(attention(q, k, v, backend="triton").sum(), (q, k, v))
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-4, atol=1e-5)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the memory that is taken while it is on, and keeps it, so that no two pieces are one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        fresh = [x for x in tree_leaves(out) if isinstance(x, Tensor) and not x.is_meta]
        # The interpreter wraps each pointer that it is given in a tensor of its own (`set_`).
        if func is not torch.ops.aten.set_.source_Storage:
            self.made += [x.untyped_storage() for x in fresh if x.untyped_storage().data_ptr() not in known]
        return out


@pytest.mark.parametrize("order", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
def test_memory(order: tuple[int, int]) -> None:
    """The backward pass makes the gradients and two numbers a row, and nothing else, from the first call on: whether
    heads lie outside tokens (1) or inside (2) in q, k, v, and in the gradient of the output."""
    import attndsl
    from attndsl.runtime import ops

    def dense(heads: int, tokens_at: int) -> Tensor:
        outer = (heads, 40) if tokens_at == 1 else (40, heads)
        x = torch.randn(2, *outer, 16, device=DEVICE)
        return x if tokens_at == 1 else x.transpose(1, 2)

    attn: Any = attndsl.compile("causal & window(20)")
    q, k, v, dout = dense(4, order[0]), dense(2, order[0]), dense(2, order[0]), dense(4, order[1])
    for _ in range(2):
        out, lse = attn(q, k, v, backend="triton", return_lse=True)
        with Allocations() as seen:
            ops._backward(attn._key, dout, None, q, k, v, out, lse, [], [], None, "triton")
        sizes = [memory.nbytes() for memory in seen.made]
        rows = lse.untyped_storage().nbytes()
        assert sorted(x for x in sizes if x) == sorted([rows, rows, *(x.untyped_storage().nbytes() for x in (q, k, v))])


if __name__ == "__main__":
    json.dump(compiled_stacks(), sys.stdout)
