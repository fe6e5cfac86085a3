"""`packed` and `lengths`: a call means what its documents, and its sequences without padding, mean alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from attndsl.grammar import load
from attndsl.oracle import mask
from attndsl.plan import Tiling, backward_plan
from attndsl.program import CallShape
from attndsl.targets import make_spec
from tests.accuracy import check
from tests.cases import case, floats, ints
from tests.gradients import judge
from tests.strategies import Case
from tests.test_backward_cpu import runner as cpu
from tests.test_backward_triton import runner as triton

DOC = np.repeat(ints(0, 3, 2, 14), 5, axis=1)  # not sorted: equal ids apart are different documents

CASES: dict[str, Case] = {
    "causal": case("attention a { input doc : int[b, k]  packed doc  attend causal }", inputs={"doc": DOC}),
    "window_and_sink": case(
        "attention a { input doc : int[b, k]  packed doc  attend causal & (window(4) | sink(2)) }",
        rows=33, heads=(4, 2), inputs={"doc": DOC},
    ),
    "blocks": case(
        "attention a { input doc : int[k]  packed doc  attend causal on blocks(3) | same_block(4, 1) }",
        inputs={"doc": DOC[0]},
    ),
    "lengths_of_documents": case(
        """attention a { input doc : int[b, k]  packed doc
        attend { k <= q and (Nk - q) % 3 != 1 or k == Nk // 2 } }""",
        inputs={"doc": DOC},
    ),
    "entries": case(
        """attention a { input doc : int[b, k]  input flag : bool[b, k]  input lift : float[b, h, q]
        input slope : float[h] learnable
        packed doc
        score s - slope[h] * (q - k) + lift[q] * (k + 1)
        softmax with sink lift[q] + q
        attend causal & ({ flag[k] or flag[q - 1] } | window(3)) }""",
        heads=(2, 2), rows=50,
        inputs={"doc": DOC, "flag": np.random.default_rng(3).random((2, 70)) < 0.4, "lift": floats(2, 2, 50),
                "slope": floats(2)},
    ),
    "lengths": case(
        "attention a { input n : int[b]  lengths n  attend causal & window(30) }", inputs={"n": np.array([70, 41])},
    ),
    "lengths_in_the_pattern": case(
        """attention a { input n : int[b]  lengths n
        score s * 0.5 + k / Nk
        attend { abs(q - k) < 20 or k >= Nk - 3 } }""",
        inputs={"n": np.array([57, 0])},
    ),
    "lengths_of_entries": case(
        """attention a { input n : int[b]  input flag : bool[b, k]  lengths n
        score s * (if flag[q + 1] then 2.0 else 0.5)
        attend causal & { flag[q + 2] or flag[k + 3] } }""",
        inputs={"n": np.array([63, 41]), "flag": np.random.default_rng(5).random((2, 70)) < 0.4},
    ),
    "lengths_past_the_end": case(
        "attention a { input n : int  lengths n  attend all & { q + Nk > 3 } }", rows=20, inputs={"n": np.array(99)},
    ),
    "lengths_of_keys": case(
        "attention a { align start  input n : int[b]  lengths n  attend { k < Nk - q // 9 } }",
        rows=90, inputs={"n": np.array([70, 13])},
    ),
    "both": case(
        "attention a { input doc : int[b, k]  input n : int[b]  packed doc  lengths n  attend causal & sink(3) | "
        "{ q == k and Nk > 3 } }",
        inputs={"doc": DOC, "n": np.array([33, 68])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_on_the_cpu(name: str) -> None:
    judge(cpu(), CASES[name], torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_triton(name: str) -> None:
    judge(triton(), CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["window_and_sink", "both", "lengths"])
@pytest.mark.parametrize(("rows", "k_len"), [(1, 1), (1, 50), (29, 29)])
def test_other_sizes(name: str, rows: int, k_len: int) -> None:
    chosen = CASES[name]
    inputs = {key: x[:, :k_len] if key == "doc" else np.minimum(x, k_len - 1) for key, x in chosen.inputs.items()}
    shape = replace(chosen.shape, rows=rows, k_len=k_len)
    judge(cpu(), replace(chosen, inputs=inputs, shape=shape), torch.float64)


# ---------------------------------------------------------------------------------------- meaning


def test_documents_stand_alone() -> None:
    """Against the pattern written out by hand, token by token."""
    program = load("attention a { input doc : int[b, k]  packed doc  attend causal & (window(3) | sink(1)) }").program
    doc = np.array([[5, 5, 5, 5, 5, 1, 1, 5, 5, 5, 5, 5]])
    expected = np.zeros((12, 12), bool)
    for low, end in ((0, 5), (5, 7), (7, 12)):
        for q in range(low, end):
            for k in range(low, q + 1):
                expected[q, k] = q - k < 3 or k == low
    shape = CallShape(1, 1, 1, 12, 12, 8, 8)
    np.testing.assert_array_equal(mask(program, shape, {"doc": doc})[0, 0], expected)
    np.testing.assert_array_equal(mask(program, replace(shape, rows=4), {"doc": doc})[0, 0], expected[8:])


def test_a_packed_call_is_its_documents() -> None:
    attn = attndsl.compile("attention a { input doc : int[b, k]  packed doc  attend causal & window(9) }")
    alone = attndsl.compile("causal & window(9)")
    doc = torch.tensor([0] * 20 + [1] * 3 + [0] * 40)[None]
    q, k, v = (torch.randn(1, 2, 63, 16) for _ in range(3))
    out = attn(q, k, v, doc=doc)
    for low, end in ((0, 20), (20, 23), (23, 63)):
        own = alone(q[:, :, low:end], k[:, :, low:end], v[:, :, low:end])
        torch.testing.assert_close(out[:, :, low:end], own)


def test_padding_is_not_there() -> None:
    attn = attndsl.compile("attention a { input n : int[b]  lengths n  attend { k >= q - 5 } }")
    alone = attndsl.compile("{ k >= q - 5 }")
    lengths = torch.tensor([40, 17], dtype=torch.int32)
    q, k, v = (torch.randn(2, 2, 40, 16) for _ in range(3))
    out, lse = attn(q, k, v, n=lengths, return_lse=True)
    own = alone(q[1:, :, :17], k[1:, :, :17], v[1:, :, :17])
    torch.testing.assert_close(out[1:, :, :17], own)
    assert not out[1, :, 17:].any()
    assert torch.isneginf(lse[1, :, 17:]).all()


def test_documents_are_skipped() -> None:
    """The tiles of a packed window are those of the window, cut at documents: one partial run more."""
    program = load("attention a { input doc : int[b, k]  packed doc  attend causal & window(256) }").program
    plan = backward_plan(program, make_spec("sm_90", "triton", 4, 4, 64), Tiling(64, 64))
    names = [decl.name for decl in plan.program.inputs if decl.derivation]
    assert names == ["first_doc", "first_doc_k_first", "first_doc_q_end"]
    assert len(plan.runs.full) == len(plan.key_runs.full) == 1


def test_a_decode_stays_in_its_document() -> None:
    attn = attndsl.compile("attention a { input doc : int[b, k]  packed doc  attend causal & (window(4) | sink(2)) }")
    doc = torch.tensor([0] * 20 + [1] * 30 + [0] * 14)[None]
    q, k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    found = attn.decode(q, k, v, torch.tensor([45], dtype=torch.int32), doc=doc)
    expected = attn.reference(q, k[:, :, :45], v[:, :, :45], doc=doc[:, :45])
    torch.testing.assert_close(found, expected.float())


def test_outputs_are_as_accurate_as_any() -> None:
    chosen = CASES["entries"]
    attn = attndsl.compile(chosen.text)
    generator = torch.Generator().manual_seed(0)
    shape = chosen.shape
    q = torch.randn(shape.batch, shape.heads, shape.rows, 16, generator=generator)
    k, v = (torch.randn(shape.batch, shape.kv_heads, shape.k_len, 16, generator=generator) for _ in range(2))
    inputs: dict[str, Any] = {name: torch.from_numpy(x) for name, x in chosen.inputs.items()}
    out, lse = attn(q, k, v, return_lse=True, **inputs)
    check(attn.program, q, k, v, inputs, {}, out, lse)
