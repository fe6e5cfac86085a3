"""Patterns that lie in part in the order of unsorted data: how they are divided, and what the pieces compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
from attndsl.derive import derive
from attndsl.grammar import load
from attndsl.layout import PLAIN, Permutation
from attndsl.mixing import mixes, mixture
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import Backend
from attndsl.runtime.cache import KernelCache
from attndsl.runtime.printing import printed_backward, printed_forward
from attndsl.targets import layout_refusal, make_spec
from attndsl.wiring import engine
from tests.accuracy import check, examples
from tests.cases import case
from tests.gradients import judge
from tests.permuted import ids, order, permuted_programs
from tests.strategies import Case, tensors
from tests.test_backward_cpu import runner as cpu
from tests.test_backward_triton import runner as triton
from tests.test_forward import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
RNG = np.random.default_rng(5)

MIXED: dict[str, Case] = {
    "window_in_two_orders": case(
        "attention a { input pi : int[k] attend causal & (window(10) on permuted(pi) | window(5)) }",
        75, 75, (4, 2), inputs={"pi": order(75)},
    ),
    "both_ways": case(
        "attention a { input pi : int[b, k] attend band(4, 4) on permuted(pi) | band(3, 2) }",
        61, 61, (4, 2), (80, 16), inputs={"pi": order(2, 61)},
    ),
    "buckets": case(
        "attention a { input x : int[b, g, k] attend causal & ({ x[q] == x[k] } | window(8) | sink(2)) }",
        75, 75, (2, 2), inputs={"x": ids(2, 2, 75)},
    ),
    "scores": case(
        """attention a { input doc : int[b, k] input lift : float[b, h, q] input slope : float[h] learnable
        softmax with sink 0.5
        score s * 0.5 - slope[h] * (q - k) + lift[q]
        attend document(doc) & causal | { k < 3 } }""",
        75, 75, inputs={"doc": ids(2, 75), "lift": RNG.standard_normal((2, 2, 75)).astype(np.float32),
                        "slope": np.array([0.1, -0.05], np.float32)},
    ),
    "two_orders": case(
        """attention a { input pi : int[k] input po : int[k]
        attend causal & (window(10) on permuted(pi) | window(5) on permuted(po)) }""",
        75, 75, (4, 2), inputs={"pi": order(75), "po": order(75)},
    ),
    "same_data_twice": case(
        """attention a { input doc : int[b, k]
        attend window(3) & causal | document(doc) & { q - k > 9 } | { doc[q] == doc[k] + 1 } & causal }""",
        75, 75, inputs={"doc": ids(2, 75)},
    ),
    "padded": case(
        """attention a { input n : int[b] input pi : int[k] lengths n
        attend (causal_neighborhood(1) | window(5 * (h + 1))) on permuted(pi) }""",
        50, 50, (2, 1), inputs={"n": np.array([31, 50]), "pi": order(50)},
    ),
    "weights": case(
        "attention a { input doc : int[b, k] weights sigmoid(s - 1) attend causal & (window(4) | document(doc)) }",
        50, 50, inputs={"doc": ids(2, 50)},
    ),
    "one_token": case(
        "attention a { input doc : int[b, k] attend causal & (window(4) | document(doc)) }",
        1, 1, inputs={"doc": ids(2, 1)},
    ),
}  # fmt: skip


def plans_of(chosen: Case, all_rows: bool = True) -> list[Any]:
    program, shape = chosen.load(), chosen.shape
    assert mixes(program)
    spec = make_spec("sm_90", "triton", shape.heads, shape.kv_heads, 64)
    return [plan.layout for plan in forward_plans(program, replace(spec, all_rows=all_rows))]


# ------------------------------------------------------------------------------------------- what


@pytest.mark.parametrize("name", MIXED)
def test_alternatives_have_orders_of_their_own(name: str) -> None:
    layouts = plans_of(MIXED[name])
    in_order = [layout for layout in layouts if layout == PLAIN]
    assert len(layouts) - len(in_order) == (2 if name in ("two_orders", "same_data_twice", "padded") else 1)
    assert len(in_order) == (0 if name in ("two_orders", "padded") else 1)
    assert layouts[: len(in_order)] == in_order


def test_chunks_and_parts_stay_in_order() -> None:
    assert plans_of(MIXED["buckets"], all_rows=False) == [PLAIN]
    program = MIXED["buckets"].load()
    spec = replace(make_spec("sm_90", "triton", 2, 2, 64), all_rows=True)
    assert [x.layout for x in forward_plans(program, spec, alone=False)] == [PLAIN]
    assert layout_refusal(program, spec)
    assert not layout_refusal(program, replace(spec, all_rows=False))


@pytest.mark.parametrize("pattern", [
    "causal & document(doc)",  # all of it in one order
    "causal & (window(5) | sink(3))",
    "causal & (document(doc) | { k % 2 == 0 })",  # what is left touches every tile
    "causal & { doc[q] <= doc[k] or k < 4 }",
])  # fmt: skip
def test_what_is_not_divided(pattern: str) -> None:
    program = load(f"attention a {{ input doc : int[b, k]\n attend {pattern} }}").program
    spec = replace(make_spec("sm_90", "triton", 2, 1, 64), all_rows=True)
    assert len(forward_plans(program, spec)) == 1


def test_pieces_are_disjoint_and_keep_full_tiles() -> None:
    """The permuted piece is masked only where it has to be: what the others hold is an interval of its places."""
    chosen = MIXED["buckets"]
    pieces = mixture(derive(chosen.load()), (2, 2))
    assert [piece.further for piece in pieces] == [False, True]
    spec = replace(make_spec("sm_90", "triton", 2, 2, 64), all_rows=True)
    first, second = forward_plans(chosen.load(), spec)
    assert first.runs.full or first.runs.partial
    assert second.runs.partial


# ------------------------------------------------------------------------------------- results


def forward(chosen: Case, backend: str, dtype: torch.dtype) -> None:
    program = chosen.load()
    q, k, v, inputs = tensors(chosen, dtype=dtype)
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    listed, numbers = [inputs[x.name] for x in program.inputs], [chosen.args[name] for name in program.args]
    out, lse = engine(program).forward(q, k, v, listed, numbers, None, backend)
    if program.branch.weights is None:
        check(program, q, k, v, inputs, chosen.args, out, lse)


@pytest.mark.parametrize("name", MIXED)
def test_forward(name: str) -> None:
    forward(MIXED[name], "cpu" if DEVICE.type == "cpu" else "triton", torch.float32)


@pytest.mark.parametrize("name", ["window_in_two_orders", "scores", "same_data_twice", "one_token"])
def test_forward_in_triton(name: str) -> None:
    forward(MIXED[name], "triton", torch.float32)


@pytest.mark.parametrize("name", MIXED)
def test_gradients_on_the_cpu(name: str) -> None:
    judge(cpu(), MIXED[name], torch.float64)


@pytest.mark.parametrize("name", ["window_in_two_orders", "scores", "two_orders"])
def test_gradients_in_triton(name: str) -> None:
    judge(triton(), MIXED[name], torch.float32)


@st.composite
def mixed_programs(draw: st.DrawFn) -> Case:
    """A relation of unsorted data, and other sets beside it."""
    chosen = draw(permuted_programs(lengths=((40, 40), (17, 17), (1, 1), (23, 40))))
    before, pattern = chosen.text.rsplit("attend ", 1)
    pattern = pattern.removesuffix("\n}")
    beside = st.sampled_from((
        "window(5)", "sink(3)", "same_block(8)", "{ k < reach[b] }", "{ q - k == 4 }", "dilated(5) & window(9)", "none",
        "{ k - q == 2 or k == 7 }",
    ))  # fmt: skip
    parts = [f"({pattern})", *draw(st.lists(beside, min_size=1, max_size=2))]
    both = " | ".join(parts)
    around = draw(st.sampled_from(("{}", "causal & ({})", "causal & ({}) & {{ k > 0 }}", "~same_block(3) & ({})")))
    return replace(chosen, text=f"{before}attend {around.format(both)}\n}}")


@given(case=mixed_programs())
@examples(25)
def test_random_programs(case: Case) -> None:
    judge(cpu(), case, torch.float64)


@given(case=mixed_programs())
@examples(2)
def test_random_programs_in_triton(case: Case) -> None:
    judge(triton(), case, torch.float32)


# ----------------------------------------------------------------------------------- looking inside


def test_kernels_are_kept(tmp_path: Path) -> None:
    program = MIXED["two_orders"].load()
    spec = replace(make_spec("sm_90", "triton", 4, 2, 64), all_rows=True)
    generators = engine(program).generators
    printers = {Backend.TRITON: generators.triton_forward}
    cache = KernelCache(tmp_path)
    once, again = (printed_forward(program, spec, (Backend.TRITON,), None, printers, cache) for _ in range(2))
    assert once == again
    assert [isinstance(x.layout, Permutation) for x in again] == [True, True]
    first, second = (printed_backward(program, spec, True, None, generators, cache) for _ in range(2))
    assert first == second
    assert [plan for plan, _, _ in second.pieces] == list(backward_plans(program, spec))


def test_explain_counts_the_pieces() -> None:
    attn = attndsl.compile("attention a { input doc : int[b, k]\n attend causal & (window(64) | document(doc)) }")
    doc = torch.from_numpy(RNG.permuted(np.arange(2048) // 256)).to(torch.int32)[None]
    text = str(attn.explain(2048, 2048, doc=doc))
    assert "alternatives in the orders of their data, each a piece beside the rest" in text
    assert "visited in 2 pieces" in text
    pieces = attn.pieces(2048, 2048, block_q=64, block_k=64, doc=doc.numpy())
    # A window of 64 is two tiles a row, and 8 documents of 256 tokens are 10 causal tiles each.
    assert sum(piece.tiles for piece in pieces) <= 8 * (63 + 8 * 10)
    assert len(attn.pieces(2000, 2048, block_q=64, block_k=64, doc=doc.numpy())) == 1
    assert attn.kernels()[:2] == ("forward", "forward_2")
    assert "rows_by_doc_ptr" in attn.source("forward_2")
