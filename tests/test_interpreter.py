"""The interpreter that the tests run kernels in computes what Triton's own does, to the bit."""

import io
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

import attndsl
from tests.interpreter import VERSION

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled"),
    pytest.mark.skipif(not triton.__version__.startswith(VERSION), reason="Triton's own is used"),
]

# Operations of each kind: masks of integers, a bias of floats, the hashes of dropout, the sort of a selection.
PROGRAM = """attention all_kinds {
input doc : int[b, k]
input slope : float[h]
score softcap(s, 20.0) - slope[h] * (q - k)
attend causal & document(doc) & top(2, blocks(16), by = dot(Q, mean(K)), always = same_block(16))
}"""


def results() -> list[Tensor]:
    """Outputs and gradients of kernels for some tensors that are always the same."""
    draw = torch.Generator().manual_seed(7)
    found = []
    for dtype in (torch.float32, torch.float16):
        q, k, v = (torch.randn(1, h, 77, 16, generator=draw).to(dtype).requires_grad_() for h in (2, 1, 1))
        inputs: dict[str, Any] = {"doc": torch.arange(77)[None] // 30, "slope": torch.tensor([0.5, 0.25])}
        out = attndsl.compile(PROGRAM)(q, k, v, backend="triton", dropout=0.25, seed=3, **inputs)
        found += [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
    return found


def test_it_computes_what_tritons_own_does() -> None:
    """In a process where nothing is replaced."""
    code = """
import sys, torch
from tests.test_interpreter import results
torch.save(results(), sys.stdout.buffer)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, check=True)
    expected = torch.load(io.BytesIO(run.stdout))
    assert len(expected) == 8 and all(x.isfinite().all() and x.any() for x in expected)
    for found, other in zip(results(), expected, strict=True):
        assert torch.equal(found, other)


def test_nothing_stays_wrapped() -> None:
    """What a launch wraps is as it was after it: kernels of the suite that are compiled see Triton itself."""
    from triton import language as tl

    before = [tl.load, tl.core.load, tl.tensor.__add__, tl.core.reduce]
    results()
    assert before == [tl.load, tl.core.load, tl.tensor.__add__, tl.core.reduce]
    assert not interpreter_builder.options.sanitize_overflow
