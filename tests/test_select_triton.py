"""The fused kernel of a selection, interpreted, chooses what the strips choose; compiled offline, it spills nothing."""

from __future__ import annotations

import pytest
import torch

from attndsl.codegen.triton_select import select_source
from attndsl.grammar import load
from attndsl.plan import DType, Spec
from attndsl.plans import own_program
from attndsl.program import CallShape
from attndsl.runtime.select import Selector
from attndsl.runtime.triton_launch import INTERPRETED
from attndsl.select_plan import select_plan, why_not_fused
from tests.gpu import interprets
from tests.test_select import CPU, program_of, tensors

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
OWN = "by = dot(Q, mean(K)), always = same_block(8)"


def both(
    text: str, shape: CallShape, inputs: str = "", dtype: torch.dtype = torch.float32, **given: torch.Tensor
) -> None:
    """The plan of both ways, which differ at most in the order of sums: random scores are not that close."""
    program = program_of(text, inputs)
    selection = program.selections[0]
    assert not why_not_fused(program, selection, (shape.heads, shape.kv_heads))
    q, k = tensors(shape, 1, dtype)
    values = [given[decl.name] for decl in program.inputs]
    fused = Selector(program, selection, shape, CPU, values, select_source)(q, k, values, [])
    assert (fused == Selector(program, selection, shape, CPU, values)(q, k, values, [])).all()


@interprets
@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (f"top(3, blocks(8), among = causal, {OWN}, share = group)", (1, 4, 2, 40, 40, 32)),
        (f"top(3, blocks(8), among = causal, {OWN}, share = heads)", (1, 3, 1, 9, 37, 40)),
        (f"top(2, blocks(8), among = causal & window(30), {OWN}, forced = extra)", (2, 2, 1, 9, 39, 16)),
        ("top(min(3, h + 1), blocks(4), among = causal & { k % 3 > 0 }, by = dot(Q, max(K)))", (1, 3, 1, 21, 21, 16)),
        ("top(2, blocks(4), among = all, by = dot(Q, min(K)), normalise = softmax)", (1, 2, 2, 5, 11, 16)),
        ("top(6, tokens, share = group, among = causal, by = dot(Q, K), always = sink(9))", (1, 1, 1, 130, 130, 16)),
        ("top(2, blocks(8), among = causal, by = dot(Q, mean(K)))", (1, 2, 1, 1, 1, 16)),
        ("top(2, blocks(8), among = causal, by = dot(Q, mean(K)))", (1, 2, 1, 5, 0, 16)),
        ("top(5, blocks(2), among = causal, by = dot(Q, mean(K)), share = group)", (1, 8, 2, 40, 300, 16)),
        ("top(17, blocks(2), among = causal, by = dot(Q, mean(K)), always = sink(2))", (1, 1, 1, 3, 300, 16)),
        ("top(40, blocks(2), among = causal, by = dot(Q, mean(K)))", (1, 1, 1, 3, 260, 16)),
        ("top(0 * h, blocks(2), among = causal, by = dot(Q, mean(K)))", (1, 2, 1, 3, 10, 16)),
    ],
)
def test_chooses_what_the_strips_choose(text: str, shape: tuple[int, int, int, int, int, int]) -> None:
    batch, heads, kv_heads, rows, k_len, dim = shape
    both(text, CallShape(batch, heads, kv_heads, rows, k_len, dim, dim))


@interprets
def test_with_inputs() -> None:
    shape = CallShape(2, 4, 2, 20, 20, 16, 16)
    doc = torch.arange(20).expand(2, 20) // 7
    both(
        "top(2, blocks(4), among = causal & document(doc), by = dot(Q, mean(K)))",
        shape,
        "input doc : int[b, k]",
        doc=doc,
    )
    vectors = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(2))
    both("top(2, blocks(4), among = causal, by = dot(Q, ck))", shape, "input ck : float[b, g, k/4, D]", ck=vectors)
    of_heads = torch.randn(4, 20, 16, generator=torch.Generator().manual_seed(2))
    both("top(2, blocks(4), among = causal, by = dot(Q, mean(kh)))", shape, "input kh : float[h, k, D]", kh=of_heads)


@interprets
def test_float16_vectors_in_two_parts_are_those_of_float32() -> None:
    both(f"top(2, blocks(8), among = causal, {OWN})", CallShape(1, 2, 1, 40, 40, 32, 32), dtype=torch.float16)


def test_ties_and_wild_scores() -> None:
    """Equal scores go to the lower member, +-0 are equal, infinities and NaN withdraw or rank as in the strips."""
    program = program_of("top(3, blocks(2), among = all, by = dot(Q, first(K)))")
    q = torch.zeros(1, 1, 2, 16)
    q[..., 0] = 1.0
    q[0, 0, 1, 0] = -0.0
    k = torch.zeros(1, 1, 12, 16)
    k[0, 0, ::2, 0] = torch.tensor([1.0, float("nan"), 2.0, float("-inf"), 2.0, float("inf")])
    shape, selection = CallShape(1, 1, 1, 2, 12, 16, 16), program.selections[0]
    wanted = Selector(program, selection, shape, CPU)(q, k, [], [])
    assert wanted[0, 0, 0].tolist() == [2, 4, 5]
    if INTERPRETED:
        found = Selector(program, selection, shape, CPU, (), select_source)(q, k, [], [])
        assert (found[0, 0, 0] == wanted[0, 0, 0]).all()


def test_the_kernel_reads_as_written() -> None:
    program = program_of(f"top(3, blocks(64), among = causal, {OWN}, share = group)")
    plan = select_plan(program, program.selections[0], Spec(16, 4, 128, 128, DType.BFLOAT16, "cuda:90"))
    text = select_source(plan)
    assert plan.tiling.block_q * 4 == 128 and plan.members == 64 and plan.width == 4
    assert "tl.dot(low, tl.trans(q), scores)" in text and "LISTED: tl.constexpr = 3" in text and "take_up" in text
    compile(text, "select", "exec")


NSA = """
attention nsa(block = 8, n = 3) {
    coarse = attend causal over pool(mean, block)
    routed = attend causal & top(n, blocks(block), by = probs(coarse), share = group, always = same_block(block))
    output coarse + routed
}
"""


@interprets
@pytest.mark.parametrize("shape", [(1, 4, 2, 40, 40), (2, 3, 1, 9, 37)])
def test_ranks_by_the_probabilities_of_a_branch(shape: tuple[int, int, int, int, int]) -> None:
    batch, heads, kv_heads, rows, k_len = shape
    sizes = CallShape(batch, heads, kv_heads, rows, k_len, 16, 16)
    program = own_program(load(NSA).program)
    q, k = tensors(sizes, 4, torch.float32)
    keys = torch.stack([k[:, :, j : j + 8].mean(2) for j in range(0, k_len, 8)], 2)
    logits = q @ keys.repeat_interleave(heads // kv_heads, 1).transpose(-1, -2) / 4
    finished = (torch.arange(keys.shape[2]) + 1) * 8 <= torch.arange(k_len - rows, k_len)[:, None] + 1
    state = [keys], torch.where(finished, logits, -torch.inf).logsumexp(-1)
    fused = Selector(program, program.selections[0], sizes, CPU, (), select_source)
    strips = Selector(program, program.selections[0], sizes, CPU)
    assert (fused(q, k, [], [], None, state) == strips(q, k, [], [], None, state)).all()
    assert fused.fused is not None and strips.fused is None


def test_heads_that_share_see_the_same_entries() -> None:
    """A kernel asks once for all heads which entries the branch saw: where heads differ, strips choose."""
    text = NSA.replace("causal over", "(if h % 2 == 0 then causal else causal & { k < 16 }) over")
    program = own_program(load(text).program)
    assert "different entries" in why_not_fused(program, program.selections[0], (4, 2))
    assert not why_not_fused(program, program.selections[0], (2, 2))
