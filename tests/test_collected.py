"""Tiles of keys that are made of several members, and tiles of queries that heads share, against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attndsl
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import DType, Loads, Spec
from attndsl.program import CallShape, Program
from attndsl.tiling import choose_tiling
from tests.gpu import interprets
from tests.test_plans import attend, random_plan, sizes

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")


def planned(keys: int, dims: str, clauses: str) -> str:
    members = "tokens" if keys == 1 else f"blocks({keys})"
    return f"attention planned {{ input p : {members}[{dims}]\n {clauses} }}"


def check(
    keys: int, dims: str, clauses: str, lengths: tuple[int, int], heads: tuple[int, int] = (4, 2), form: str = "sorted",
    dim: int = 16, seed: int = 5,
) -> None:  # fmt: skip
    """Output, lse and gradients by the interpreter, at the tilings that the model chooses."""
    shape = CallShape(1, *heads, *lengths, dim, 16)
    plan = random_plan(np.random.default_rng(seed), sizes(dims, shape), -(-shape.k_len // keys), form)
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed))
    given = {"sinks": sinks} if "sinks" in clauses else {}
    attend(planned(keys, dims, clauses), shape, plan, "triton", given, tiling=None)


SINKS = "input sinks : float[h]\n softmax with sink sinks[h]\n"
# Members' tokens, the plan's dimensions, clauses; rows and keys; heads.
CASES = {
    "group": (16, "b, g, q", "attend causal & p", (7, 40), (16, 1)),
    "padded": (24, "b, q", "attend causal & p - window(3)", (7, 40), (24, 2)),
    "sink_score": (16, "g, q", f"{SINKS} score s - 0.1 * h * (q - k)\n attend p", (7, 40), (8, 1)),
    "weights": (8, "b, g, q", "weights sigmoid(s - 1)\n attend causal & p", (7, 40), (8, 1)),
    "tokens": (1, "b, g, q", "attend causal & p", (20, 33), (4, 2)),
    "tokens_of_all_heads": (1, "b, q", "attend causal & p", (20, 33), (3, 3)),
    "tokens_of_one_head": (1, "b, h, q", "attend causal & p", (9, 20), (2, 2)),
    "odd_blocks": (3, "b, g, q", "attend causal & p", (20, 33), (4, 2)),
    "large_blocks": (48, "b, g, q", "attend causal & p", (20, 100), (8, 1)),
    "rows_tokens": (1, "b, g, q/16", "attend causal & p", (40, 40), (4, 2)),
    "rows_blocks": (16, "b, h, q/16", "attend causal & p - window(7)", (40, 168), (4, 2)),
    "few_rows": (8, "b, g, q/8", "attend causal & p", (40, 40), (6, 2)),
    "few_rows_large_blocks": (64, "b, g, q/8", "attend causal & p", (40, 168), (4, 2)),
    "many_rows": (48, "b, g, q/64", "attend causal & p", (130, 130), (3, 1)),
    "call": (4, "b, g", "attend causal & p", (40, 40), (4, 2)),
    "by_head": (1, "b, g, q/16", "attend p & { h == 0 or q - k < 9 }", (40, 40), (2, 1)),
    "one_row": (1, "b, g, q", "attend causal & p", (1, 70), (4, 1)),
    "one_key": (1, "b, g, q", "attend causal & p", (1, 1), (2, 1)),
    "far_chunk": (1, "b, g, q/16", "attend causal & p", (5, 40), (2, 1)),
}


@interprets
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str) -> None:
    check(*CASES[name])


@interprets
@pytest.mark.parametrize("form", ["list", "map"])
def test_plans_of_rows_that_nobody_checked(form: str) -> None:
    check(4, "b, g, q/16", "attend causal & p", (40, 40), form=form, dim=80)


@interprets
def test_learned_inputs() -> None:
    """Their sums are of one head, so tiles that heads share are for the forward kernel alone."""
    learned = "input sinks : float[h] learnable\n softmax with sink sinks[h]\n score s * sinks[h]\n"
    check(16, "b, g, q", f"{learned} attend causal & p", (7, 40), (8, 1))
    check(1, "b, h, q/16", f"{learned} attend causal & p", (40, 40), (2, 1))


@interprets
@settings(max_examples=6)
@given(
    st.sampled_from(("b, g, q", "b, q", "b, g, q/16", "b, h, q/32", "g, q/8", "b, g", "h")),
    st.sampled_from((1, 2, 12, 16)),
    st.sampled_from(("causal & p", "p", "causal & p - window(7)", "p & { q - k < 20 }")),
    st.sampled_from(((20, 20), (16, 40), (1, 17), (9, 30))), st.sampled_from(((2, 1), (8, 1), (2, 2))),
    st.sampled_from(("list", "sorted", "map")), st.integers(0, 9),
)  # fmt: skip
def test_random_plans(
    dims: str, keys: int, pattern: str, lengths: tuple[int, int], heads: tuple[int, int], form: str, seed: int
) -> None:
    check(keys, dims, f"attend {pattern}", lengths, heads, form, seed=seed)


def program_of(keys: int, dims: str, pattern: str = "causal & p") -> Program:
    return attndsl.compile(planned(keys, dims, f"attend {pattern}")).program


def test_which_tiles_are_collected() -> None:
    """Heads share tiles where they choose together; members fill tiles where they are smaller."""
    spec = Spec(64, 4, 128, 128, DType.BFLOAT16, "cuda:90", Loads.DESCRIPTOR, lists=True, even_start=True)

    def of(keys: int, dims: str, pattern: str = "causal & p", spec: Spec = spec) -> tuple[int, int, int]:
        tiling = choose_tiling(program_of(keys, dims, pattern), spec)
        return tiling.block_q, tiling.pack, tiling.unit_k

    assert of(64, "b, g, q") == (1, 16, 64)
    assert of(16, "b, g, q") == (1, 16, 16)
    assert of(1, "b, g, q") == of(1, "b, q") == (1, 16, 1)
    assert of(16, "b, g, q/16") == (4, 16, 16)
    assert of(16, "b, h, q/16") == (16, 1, 16)
    assert of(1, "b, g, q/64") == (64, 1, 1)
    # Rows that choose for themselves are gathered, and where members fill tiles these are listed.
    assert of(64, "b, h, q") == of(64, "b, g, q/64") == (64, 1, 0)
    # What differs from head to head, no heads share.
    assert of(64, "b, g, q", "causal & p & { h < 3 or q - k < 99 }") == (64, 1, 0)
    # Single keys of one head are too few rows, and chunks that begin anywhere have no row classes.
    assert of(1, "b, h, q")[2] == 0
    assert of(1, "b, g, q/64", spec=Spec(64, 4, 128, 128, DType.BFLOAT16, "cuda:90", lists=True))[2] == 0


def test_kernels_of_keys() -> None:
    """Members that fill a tile gather the rows that chose them; of smaller ones a list says which keys a row chose."""
    spec = Spec(64, 4, 128, 128, DType.BFLOAT16, "cuda:90", Loads.DESCRIPTOR, lists=True, even_start=True)
    (blocks,) = backward_plans(program_of(16, "b, g, q"), spec)
    assert blocks.gathered is not None and blocks.marked is None and blocks.key_tiling.pack == 1
    (tokens,) = backward_plans(program_of(1, "b, g, q"), spec)
    assert tokens.marked is not None and tokens.gathered is None
    assert (tokens.key_tiling.block_k, tokens.key_tiling.unit_k, tokens.key_tiling.unit_q) == (32, 1, 1)
    (rows,) = backward_plans(program_of(16, "b, g, q/64"), spec)
    assert rows.marked is None and all(run.list is not None for run in rows.key_runs.partial)


def test_collected_tiles_are_loaded_by_pointers() -> None:
    spec = Spec(64, 4, 128, 128, DType.BFLOAT16, "cuda:90", Loads.DESCRIPTOR, lists=True)
    (plan,) = forward_plans(program_of(64, "b, g, q"), spec)
    assert plan.spec.loads is Loads.POINTER
    assert plan.mask is not None
