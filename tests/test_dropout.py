"""Dropout: the generator, what is kept, both passes against the oracle with the same mask, and inside torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attndsl
import attndsl.nn
from attndsl.dropout import kept, philox, threshold
from attndsl.plan import Loads, Tiling
from attndsl.program import CallShape
from attndsl.runtime.dropout import Dropout
from attndsl.runtime.reference import reference
from attndsl.targets import hopper_refusal, make_spec
from attndsl.wiring import engine as _engine
from tests.accuracy import examples
from tests.cases import CASES, case, floats
from tests.gradients import upstream
from tests.gridded import GRIDDED
from tests.permuted import PERMUTED
from tests.scattered import SCATTERED
from tests.strategies import Case, composed_programs, tensors

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOW = attndsl.compile("causal & (sink(4) | window(20))")
SEED = -0x123456789ABCDEF
LEARNED = case(
    """attention learned { input near : float[h, 9] learnable
    input sinks : float[h] learnable
    input whole : float[q, k] learnable
    input rowwise : float[h, q] learnable
    input keywise : float[h, k] learnable
    score softcap(s + near[h, clamp(q - k, -4, 4) + 4] + whole[q, k] + rowwise[q] + keywise[h, k], 5.0)
    softmax with sink sinks[h]
    attend causal & window(20) }""",
    20, 38, (2, 1), batch=1,
    inputs={"near": floats(2, 9), "sinks": floats(2), "whole": floats(20, 38), "rowwise": floats(2, 20),
            "keywise": floats(2, 38)},
)  # fmt: skip
WEIGHTS = case("attention w { weights sigmoid(s)\n attend causal }", 35, 35, (2, 2), batch=1)
ODD = case("causal & (window(17) | sink(3))", 21, 39, (4, 2), (40, 24), batch=2)


def qkv(n: int = 40, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    sizes = ((2, 4, n, 16), (2, 2, n, 16), (2, 2, n, 24))
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


# -------------------------------------------------------------------------------- the generator


def test_known_answers() -> None:
    """Those that come with the generator's published implementation (Random123)."""

    def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
        return [int(x) for x in philox(tuple(np.asarray(x) for x in counter), key)]

    ones = 0xFFFFFFFF
    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1
    ]  # fmt: skip


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_statistics(rate: float) -> None:
    """The share that is kept, in every row and column; and no two batch entries, heads, rows or seeds go together."""
    program = attndsl.compile("all").program
    shape = CallShape(2, 3, 1, 128, 256, 16, 16)
    first, second = (kept(program, shape, rate, seed).astype(float) for seed in (1, 2))
    deviation = np.sqrt(rate * (1 - rate))
    count = first.size
    assert abs(first.mean() - (1 - rate)) < 5 * deviation / np.sqrt(count)
    for axis in (2, 3):
        means = first.mean(axis)
        assert np.abs(means - (1 - rate)).max() < 5.5 * deviation / np.sqrt(first.shape[axis])
    standard = (first - (1 - rate)) / deviation
    other = (second - (1 - rate)) / deviation

    def independent(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(abs((a * b).mean()) < 5 / np.sqrt(a.size))

    assert independent(standard, other)
    assert independent(standard[0], standard[1])
    assert independent(standard[:, 0], standard[:, 1])
    assert independent(standard[:, :, 1:], standard[:, :, :-1])
    for distance in range(1, 5):
        assert independent(standard[..., distance:], standard[..., :-distance])


def test_threshold() -> None:
    assert threshold(0.5) == 1 << 31
    assert threshold(1e-12) == 1
    assert threshold(1 - 2.0**-40) == (1 << 32) - 1


# ------------------------------------------------------------------------ against the oracle


def compare(chosen: Case, backend: str, rate: float = 0.4, tiling: Tiling | None = None) -> None:
    """Output, lse and all gradients of a case are the oracle's."""
    program = chosen.load()
    engine = _engine(program)
    engine.tiling = tiling
    dtype, tolerance = (torch.float64, 1e-10) if backend == "cpu" else (torch.float32, 3e-5)
    q, k, v, inputs = tensors(chosen, dtype=dtype)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    dout, dlse = upstream(q, v)
    softmax = program.branch.weights is None

    wide = wide_q, wide_k, wide_v = [x.double().clone().requires_grad_() for x in (q, k, v)]
    given = {name: x.double().clone() if x.is_floating_point() else x for name, x in inputs.items()}
    learned = [given[decl.name].requires_grad_() for decl in program.inputs if decl.learnable]
    lse = torch.zeros(())
    if softmax:
        out, lse = reference(program, wide_q, wide_k, wide_v, given, chosen.args, return_lse=True, dropout=(rate, SEED))
    else:
        out = reference(program, wide_q, wide_k, wide_v, given, chosen.args, dropout=(rate, SEED))
    loss = (out * dout).sum() + (torch.where(lse == -torch.inf, 0.0, lse * dlse).sum() if softmax else 0.0)
    expected = torch.autograd.grad(loss, (*wide, *learned), allow_unused=True, materialize_grads=True)

    device = torch.device("cpu") if backend == "cpu" else DEVICE
    drop = Dropout(rate, torch.tensor(SEED, device=device))
    listed = [inputs[decl.name].to(device) for decl in program.inputs]
    numbers = [chosen.args[name] for name in program.args]
    q, k, v, dout, dlse = (x.to(device) for x in (q, k, v, dout, dlse))
    found, found_lse = engine.forward(q, k, v, listed, numbers, None, backend, drop)
    close(found, out, tolerance)
    if softmax:
        close(found_lse.exp(), lse.exp(), tolerance)
    *gradients, of_inputs = engine.backward(
        dout, dlse if softmax else None, q, k, v, found, found_lse, listed, numbers, None, backend, drop
    )
    by_input = [x for decl, x in zip(program.inputs, of_inputs, strict=True) if decl.learnable]
    for gradient, right in zip((*gradients, *by_input), expected, strict=True):
        close(torch.zeros_like(right) if gradient is None else gradient, right, tolerance)


def close(found: Tensor, right: Tensor, tolerance: float) -> None:
    assert found.shape == right.shape
    if right.numel():
        size = max(1.0, float(right.detach().abs().amax()))
        assert float((found.cpu().double() - right.detach()).abs().amax()) <= tolerance * size


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    "chosen", [LEARNED, WEIGHTS, ODD, SCATTERED["strided"]], ids=["learned", "weights", "odd", "scattered"]
)
def test_program(chosen: Case, backend: str) -> None:
    compare(chosen, backend, tiling=Tiling(32, 16) if backend == "triton" else Tiling(8, 12))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", ["more_rows", "align_start"])
def test_positions(name: str, backend: str) -> None:
    compare(CASES[name], backend, rate=0.1, tiling=Tiling(32, 32))


@given(case=composed_programs(max_depth=2, lengths=(1, 16, 33), dims=(8,)), rate=st.sampled_from((0.1, 0.5, 0.9)))
@examples(10)
def test_random(case: Case, rate: float) -> None:
    compare(case, "cpu", rate)


def test_tiles_do_not_matter() -> None:
    q, k, v = (x.detach() for x in qkv(50))
    found = []
    for backend, tiling in (("cpu", Tiling(16, 64)), ("cpu", Tiling(64, 20)), ("triton", Tiling(32, 16))):
        engine = _engine(WINDOW.program)
        engine.tiling = tiling
        device = DEVICE if backend == "triton" else torch.device("cpu")
        drop = Dropout(0.5, torch.tensor(5, device=device))
        there = engine.forward(q.to(device), k.to(device), v.to(device), [], [], None, backend, drop)
        found.append(there[0].cpu())
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)


def test_a_chunk_keeps_what_the_whole_keeps() -> None:
    q, k, v = qkv()
    whole = WINDOW(q, k, v, dropout=0.3, seed=4)
    torch.testing.assert_close(WINDOW(q[:, :, -7:], k, v, dropout=0.3, seed=4), whole[:, :, -7:])
    torch.testing.assert_close(whole, WINDOW.reference(q, k, v, dropout=0.3, seed=4).float())


def test_lse_is_that_without_dropout() -> None:
    q, k, v = qkv()
    plain = WINDOW(q, k, v, return_lse=True)
    dropped = WINDOW(q, k, v, return_lse=True, dropout=0.5, seed=1)
    assert torch.equal(plain[1], dropped[1])
    assert not torch.allclose(plain[0], dropped[0])


def test_without_dropout_no_code() -> None:
    q, k, v = qkv()
    assert torch.equal(WINDOW(q, k, v), WINDOW(q, k, v, dropout=0.0, seed=3))
    assert "kept" not in WINDOW.source() and "seed" not in WINDOW.source()


def test_hopper_has_none() -> None:
    spec = replace(make_spec("sm_90", "triton", 8, 8, 128), loads=Loads.DESCRIPTOR)
    assert not hopper_refusal(WINDOW.program, spec)
    assert "dropout" in hopper_refusal(WINDOW.program, replace(spec, dropout=True))
    assert "with dropout, portable Triton" in str(WINDOW.explain(4096))


# ---------------------------------------------------------------------------------- inside torch


def gradients(call: Any, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(call(*leaves).square().sum(), leaves))


def test_seeds() -> None:
    """One seed, however given, is one mask; without one torch's generator says."""
    tensors = qkv()
    by_int = WINDOW(*tensors, dropout=0.4, seed=7)
    for seed in (torch.tensor(7), torch.tensor([7])):
        assert torch.equal(by_int, WINDOW(*tensors, dropout=0.4, seed=seed))
    assert not torch.equal(by_int, WINDOW(*tensors, dropout=0.4, seed=7 + (1 << 32)))
    torch.manual_seed(0)
    first, second = (WINDOW(*tensors, dropout=0.4) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, WINDOW(*tensors, dropout=0.4))
    assert not torch.equal(first, second)


def test_gradients_through_autograd() -> None:
    tensors = qkv()
    found = gradients(lambda *x: WINDOW(*x, dropout=0.4, seed=9), tensors)
    expected = gradients(lambda *x: WINDOW.reference(*x, dropout=0.4, seed=9), tensors)
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


def test_gradcheck() -> None:
    leaves = qkv(7, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: WINDOW(*x, dropout=0.4, seed=9), leaves, fast_mode=True)


@pytest.mark.parametrize("seeded", [False, True])
def test_checkpoint(seeded: bool) -> None:
    """The recomputed pass drops what the first one dropped."""
    tensors, seed = qkv(), 3 if seeded else None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = WINDOW(q, k, v, dropout=0.4, seed=seed).square()
        return out

    torch.manual_seed(1)
    expected = gradients(call, tensors)
    torch.manual_seed(1)
    found = gradients(lambda *x: checkpoint(call, *x, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compile() -> None:
    (q, k, v), seed = qkv(), torch.tensor(11)
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None) -> Tensor:
        out: Tensor = WINDOW(q * 2, k, v, dropout=0.4, seed=seed)
        return out

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = gradients(lambda q, k, v: compiled(q, k, v, seed), [q, k, v])
    expected = gradients(lambda q, k, v: call(q, k, v, seed), [q, k, v])
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right)
    assert not torch.equal(compiled(q, k, v, None), compiled(q, k, v, None))


def test_functional_gradient() -> None:
    q, k, v = (x.detach() for x in qkv())
    found = torch.func.grad(lambda x: WINDOW(x, k, v, dropout=0.4, seed=2).square().sum())(q)
    (expected,) = gradients(lambda x: WINDOW(x, k, v, dropout=0.4, seed=2), [q.clone().requires_grad_()])
    torch.testing.assert_close(found, expected)
    with pytest.raises(attndsl.PatternError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: WINDOW(y, k, v, dropout=0.4, seed=2).sum())(x).sum())(q)


def test_operator_check() -> None:
    arguments: Any = (WINDOW._key, *qkv(), [], [], None, "cpu", 0.4, torch.tensor(3))
    torch.library.opcheck(torch.ops.attndsl.forward.default, arguments)


def test_autocast() -> None:
    tensors = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = WINDOW(*tensors, dropout=0.4, seed=2)
    assert torch.equal(out, WINDOW(*(x.bfloat16() for x in tensors), dropout=0.4, seed=2))


def test_layer() -> None:
    """In training only."""
    layer = attndsl.nn.Attention("causal", 32, 4, dropout=0.5)
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x, seed=3), layer(x, seed=3))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "seed", [1.5, "a", True, 1 << 63, torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(1, device="meta")]
)
def test_wrong_seed(seed: Any) -> None:
    with pytest.raises(attndsl.PatternError) as caught:
        WINDOW(*qkv(), dropout=0.5, seed=seed)
    assert caught.value.diagnostics[0].code == "A529"


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), "half", None])
def test_wrong_rate(rate: Any) -> None:
    with pytest.raises(attndsl.PatternError) as caught:
        WINDOW(*qkv(), dropout=rate, seed=1)
    assert caught.value.diagnostics[0].code == "A528"


# ------------------------------------------------------------------------------------ compiled


def test_default_tilings_do_not_spill() -> None:
    """Compiled in a process of its own: here Triton interprets."""
    root = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), str(root)])
    command = [sys.executable, "-m", "tests.test_dropout"]
    done = subprocess.run(command, text=True, capture_output=True, cwd=root, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    stacks = json.loads(done.stdout)
    assert len(stacks) == 3
    assert not any(stacks.values()), stacks


def compiled_stacks() -> dict[str, int]:
    """Bytes of stack, which is what spills take, of the kernels at default tilings."""
    from attndsl.codegen.triton_backward import DKDV, DQ, backward_sources
    from attndsl.codegen.triton_forward import KERNEL, forward_source
    from attndsl.plan import DType, Plan, Spec, backward_plan, forward_plan
    from attndsl.runtime.assembly import meta_tensors
    from attndsl.runtime.build import compile_kernel, parameters
    from attndsl.runtime.triton_backward import backward_parameters
    from attndsl.runtime.triton_launch import kernel_source
    from attndsl.tile_sizes import backward_tilings, default_tiling
    from tests.offline import _resources

    found = {}
    # The device with the fewest registers to spare.
    spec = Spec(8, 8, 64, 64, DType.BFLOAT16, "cuda:80", dropout=True)
    forward = forward_plan(WINDOW.program, spec, default_tiling(spec))
    backward = backward_plan(WINDOW.program, spec, *backward_tilings(spec))
    given = backward_parameters(backward, *meta_tensors(forward))
    of_q, of_keys = backward_sources(backward)
    kernels: tuple[tuple[str, Plan, str], ...] = (
        (KERNEL, forward, forward_source(forward)), (DQ, backward, of_q), (DKDV, backward.of_keys(), of_keys)
    )  # fmt: skip
    for name, plan, text in kernels:
        source = kernel_source(plan, text, parameters(text, name), given, aligned=True, function=name)
        used = _resources(compile_kernel(source, spec.target).binary)
        found[name] = int(used["STACK"]) + int(used["LOCAL"])
    return found


if __name__ == "__main__":
    json.dump(compiled_stacks(), sys.stdout)


# --------------------------------------------------------------------------- tokens out of order

ORDER = np.random.default_rng(4).permutation(24).astype(np.int32)
OUT_OF_ORDER: dict[str, Case] = {
    "dilated": case("causal & window(20) & dilated(3)", 24, 24, (1, 1), batch=1),
    "columns": case("causal & (same_block(8) | { k % 8 >= 6 })", 19, 24, (1, 1), batch=1),
    "grid": case(
        "attention a { axes y, x[4] from 2 attend neighborhood(3) on (y, x) | off_grid }", 24, 24, (2, 1), batch=1
    ),
    "documents": case(
        "attention a { input doc : int[b, k] attend causal & document(doc) }", 20, 24, (1, 1), batch=2,
        inputs={"doc": np.random.default_rng(5).integers(0, 3, (2, 24)).astype(np.int32)},
    ),
    "mixed": case(
        "attention a { input pi : int[k] attend causal & (window(3) | window(6) on permuted(pi)) }", 24, 24, (2, 1),
        batch=1, inputs={"pi": ORDER},
    ),
    "weights": case("attention a { weights sigmoid(s) attend causal & (window(3) | dilated(4)) }", 24, 24, (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_ORDER)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_tokens_out_of_order(name: str, backend: str) -> None:
    """What is dropped is a function of the pair, wherever in a tile it lies, and of several pieces once."""
    compare(OUT_OF_ORDER[name], backend, tiling=Tiling(16, 16) if backend == "triton" else None)


@pytest.mark.parametrize("name", [*SCATTERED, *PERMUTED, *GRIDDED])
def test_every_layout_on_the_cpu(name: str) -> None:
    compare((SCATTERED | PERMUTED | GRIDDED)[name], "cpu")
