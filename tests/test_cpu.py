"""The CPU lowering against the oracle, on the fixed programs and on many random ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from attndsl.plan import Tiling
from attndsl.program import CallShape, Program
from attndsl.wiring import engine as _engine
from tests.accuracy import check, examples
from tests.cases import CASES
from tests.strategies import Case, composed_programs, tensors


def run(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    args: Mapping[str, int],
    tiling: Tiling | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    engine = _engine(program)
    engine.tiling = tiling
    given_inputs = [inputs[decl.name] for decl in program.inputs]
    return engine.forward(q, k, v, given_inputs, [args[name] for name in program.args], scale, "cpu")


def judge(case: Case, dtype: torch.dtype = torch.float32, tiling: Tiling | None = None) -> None:
    program = case.load()
    q, k, v, inputs = tensors(case, dtype=dtype)
    out, lse = run(program, q, k, v, inputs, case.args, tiling)
    check(program, q, k, v, inputs, case.args, out, lse)


@pytest.mark.parametrize("name", CASES)
def test_program(name: str) -> None:
    judge(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    """Nothing on the way is rounded to float32."""
    judge(CASES[name], torch.float64, Tiling(16, 32))


@pytest.mark.parametrize("name", ["streaming", "wide", "sink", "softcap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_dtype(name: str, dtype: torch.dtype) -> None:
    judge(CASES[name], dtype)


@given(case=composed_programs())
@examples(200)
def test_random(case: Case) -> None:
    judge(case, tiling=Tiling(32, 16))


@given(case=composed_programs(lengths=(33, 130)))
@examples(30)
def test_random_default_tiles(case: Case) -> None:
    judge(case, torch.float64)


def test_large_scores() -> None:
    """Scores of some hundreds, whose rounding in float32 moves weights by as much as it moves any implementation's."""
    slopes = np.array([0.34558418, 10, -10, -1.3031572], np.float32)
    text = "attention steep { input slope : float[h] learnable  score s - slope[h] * (q - k)  attend causal }"
    judge(Case(text, {}, {"slope": slopes}, {}, CallShape(1, 4, 2, 130, 130, 8, 8)), tiling=Tiling(32, 16))


def test_pieces_past_the_effort_bound() -> None:
    """Where pieces of tiles were too hard, all tiles are visited, whatever was hard before."""
    for n in (1, 130):
        text = "((dilated(17)) on blocks(3)) & causal"
        judge(Case(text, {}, {}, {}, CallShape(1, 1, 1, n, n, 8, 8)), tiling=Tiling(32, 16))


def test_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that see more keys than go into one product."""
    monkeypatch.setattr("attndsl.codegen.cpu.CHUNK", 24)
    for name in ("streaming", "sink", "weights", "documents"):
        judge(CASES[name], tiling=Tiling(16, 16))


@pytest.mark.parametrize("scale", [0.3, -0.7, 0.0])
@pytest.mark.parametrize("name", ["empty_rows", "sink", "weights", "softcap"])
def test_scale_of_a_call(name: str, scale: float) -> None:
    case = CASES[name]
    program = case.load()
    q, k, v, inputs = tensors(case)
    out, lse = run(program, q, k, v, inputs, {}, scale=scale)
    check(program, q, k, v, inputs, {}, out, lse, scale)


def test_strided_tensors() -> None:
    program = CASES["streaming"].load()
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 50, 4, 16, generator=generator).transpose(1, 2)
    cache = torch.randn(2, 80, 2, 3, 16, generator=generator)
    k, v = (cache[:, 10:60, :, i].transpose(1, 2) for i in (0, 2))
    out, lse = run(program, q, k, v, {}, {})
    assert out.stride() == q.stride(), "the output lies in memory as q does"
    check(program, q, k, v, {}, {}, out, lse)


def test_broadcast_inputs() -> None:
    """A dimension of size 1 stands for any size."""
    case = CASES["rows_and_keys"]
    program = case.load()
    q, k, v, inputs = tensors(case)
    narrow = {"lift": inputs["lift"][:1, :, :1], "prior": inputs["prior"][:1]}
    wide = {"lift": narrow["lift"].expand(2, 2, 20), "prior": narrow["prior"].expand(2, 70)}
    out, lse = run(program, q, k, v, narrow, {})
    check(program, q, k, v, wide, {}, out, lse)
