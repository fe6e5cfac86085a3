"""Gradients of the CPU lowering against the oracle's, on the fixed programs and on many random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from attndsl.plan import Tiling
from attndsl.program import CallShape, Program
from attndsl.wiring import engine as _engine
from tests.accuracy import examples
from tests.cases import CASES, case, floats
from tests.gradients import Run, expected_gradients, judge, upstream
from tests.strategies import Case, composed_programs, tensors

SMALL = Tiling(16, 32)


def runner(tiling: Tiling | None = SMALL) -> Run:
    def run(
        program: Program, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        inputs: Mapping[str, Tensor], args: Mapping[str, int], scale: float | None,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:  # fmt: skip
        engine = _engine(program)
        engine.tiling = tiling
        listed, numbers = [inputs[decl.name] for decl in program.inputs], [args[name] for name in program.args]
        out, lse = engine.forward(q, k, v, listed, numbers, scale, "cpu")
        *found, learned = engine.backward(dout, dlse, q, k, v, out, lse, listed, numbers, scale, "cpu")
        return found, learned

    return run


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
        heads=(2, 2), rows=20, inputs={"gate": floats(2, 2, 20), "shift": floats(2, 70)},
    ),
    "choices": case(
        """attention chosen { input a : float[h] learnable
        input c : float learnable
        score if s > a[h] then max(s, c) * a[h] else clamp(s, -c * c, c * c) + abs(a[h] - s)
        attend causal & window(40) }""",
        inputs={"a": floats(2), "c": np.float32(1.3)},
    ),
    "twice": case(
        """attention doubled { input a : float[9] learnable
        score s + a[clamp(q - k, 0, 8)] * a[k % 9]
        softmax with sink a[0] * a[1 + h]
        attend causal - window(3) }""",
        inputs={"a": floats(9)},
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
    "steps": case(
        """attention steps { input level : float[h] learnable
        weights (if q - k < 9 then 1.0 else 0.5) * (if s > 0 then s else level[h])
        attend causal }""",
        inputs={"level": floats(2)},
    ),
    "literals": case("attention literals { weights if q - k < 9 then 1.0 else 0.5\n attend causal }"),
    "log_of_zero": case("attention logs { score s + log(q - k)\n attend causal }"),
    "unread": case(
        "attention idle { input a : float[h] learnable\n score if s > a[h] then s else 2 * s\n attend causal }",
        inputs={"a": floats(2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *LEARNED])
def test_program(name: str) -> None:
    """In float64, where every program's gradients agree to the last digits."""
    judge(runner(), (CASES | LEARNED)[name], torch.float64)


@pytest.mark.parametrize("name", ["streaming", "duo", "until", "bias", "sink", "wide", "choices", "steps", "literals"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(name: str, dtype: torch.dtype) -> None:
    judge(runner(None), (CASES | LEARNED)[name], dtype)


@pytest.mark.parametrize("name", ["empty_rows", "sink", "softcap"])
def test_without_lse(name: str) -> None:
    judge(runner(), CASES[name], torch.float64, uses_lse=False)


@given(case=composed_programs())
@examples(100)
def test_random(case: Case) -> None:
    judge(runner(Tiling(32, 16)), case, torch.float64)


@given(case=composed_programs(lengths=(33, 130)))
@examples(20)
def test_random_default_tiles(case: Case) -> None:
    judge(runner(None), case, torch.float32)


def test_many_chunks() -> None:
    """Rows that see more keys than go into one product."""
    shape = CallShape(1, 1, 1, 3, 20000, 8, 8)
    judge(runner(Tiling(16, 64)), Case("causal & (window(9500) | sink(9000))", {}, {}, {}, shape), torch.float64)


@pytest.mark.parametrize("scale", [0.3, -0.7, 0.0])
@pytest.mark.parametrize("name", ["empty_rows", "sink", "weights", "softcap", "scale"])
def test_scale_of_a_call(name: str, scale: float) -> None:
    judge(runner(), CASES[name], torch.float64, scale=scale)


def test_no_rows_and_no_keys() -> None:
    judge(runner(), replace(CASES["softcap"], shape=CallShape(2, 2, 1, 0, 9, 16, 8)), torch.float64)
    judge(runner(), Case("all", {}, {}, {}, CallShape(2, 2, 1, 5, 0, 16, 8)), torch.float64)


def test_broadcast_inputs() -> None:
    """The gradient of a dimension of size 1 is the sum over what it stands for."""
    gated = LEARNED["gate"]
    program = gated.load()
    q, k, v, inputs = tensors(gated, dtype=torch.float64)
    inputs = {"gate": inputs["gate"].double()[:1, :, :1], "shift": inputs["shift"].double()[:, :1]}
    dout, dlse = upstream(q, v)
    wide = {"gate": inputs["gate"].expand(2, 2, 20), "shift": inputs["shift"].expand(2, 70)}
    _, (gate, shift) = runner()(program, dout, dlse, q, k, v, inputs, {}, None)
    _, (wide_gate, wide_shift) = expected_gradients(program, q, k, v, wide, {}, dout, dlse)
    assert gate is not None and shift is not None and wide_gate is not None and wide_shift is not None
    torch.testing.assert_close(gate, wide_gate.sum((0, 2), keepdim=True))
    torch.testing.assert_close(shift, wide_shift.sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["bias", "twice", "sink", "duo"])
def test_two_runs_agree_to_the_bit(name: str) -> None:
    chosen = (CASES | LEARNED)[name]
    program = chosen.load()
    q, k, v, inputs = tensors(chosen)
    dout, dlse = upstream(q, v)
    first, again = (runner(None)(program, dout, dlse, q, k, v, inputs, {}, None) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_strided_tensors() -> None:
    """Gradients lie in memory as the tensors do, heads inside tokens."""
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
