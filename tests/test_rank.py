"""The kernels that choose in a decode, interpreted, choose what the strips choose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.codegen.triton_rank import rank_source
from attndsl.keeping import KEYS, kept_by
from attndsl.plans import of_selection
from attndsl.program import CallShape
from attndsl.runtime.compose_decode import ComposedDecode
from attndsl.runtime.decode_op import in_order
from attndsl.runtime.select import Selector
from attndsl.runtime.strips import Ragged
from attndsl.selection import Probs
from tests.decoding import paged
from tests.gpu import interprets

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
    interprets,
]
CPU = torch.device("cpu")
OWN = "always = same_block(8)"
BLOCKS = "blocks(8), among = causal"


def both(
    text: str, heads: tuple[int, int], rows: int, lengths: list[int], capacity: int = 96, dim: int = 16, seed: int = 0,
    dtype: torch.dtype = torch.float32, page: int | None = None, **inputs: Tensor,
) -> Tensor:  # fmt: skip
    """The plan of both ways for a decode of the program's one selection."""
    attn, generator = attndsl.compile(text), torch.Generator().manual_seed(seed)
    sizes = [(heads[0], rows), (heads[1], capacity), (heads[1], capacity)]
    q, k, v = (torch.randn(len(lengths), *size, dim, generator=generator).to(dtype) for size in sizes)
    k, v, table = (k, v, None) if page is None else paged(k, v, page)
    call = in_order(q, k, v, torch.tensor(lengths, dtype=torch.int32), table, "hnd")
    capacity = call.capacity
    program, (selection,) = attn.program, attn.program.selections
    given = [inputs[name] for name in attn._inputs]
    composed = (program, attn._key, attn._composition, attn._parts)
    of = ComposedDecode(*composed, call, given, [], None, "cpu", {}, None)
    state = of.state(selection.score.branch) if isinstance(selection.score, Probs) else None
    names = [KEYS if each is None else each.name for each in kept_by(selection)]
    members = dict(zip(names, of.members(selection.name), strict=True))
    ragged = Ragged(call.seq_lens, capacity, members, table if KEYS in names else None)
    shape, found = CallShape(len(lengths), *heads, rows, capacity, dim, dim), []
    for printer in (rank_source, None):
        selector = Selector(
            of_selection(program, selection), selection, shape, CPU, given, printer, ragged=True, dtype=dtype,
            page=page if KEYS in names else None,
        )  # fmt: skip
        assert (selector.rank is None) == (printer is None)
        found.append(selector(q, q, given, [], None, state, ragged))
    assert torch.equal(*found)
    return found[0]


@pytest.mark.parametrize(
    ("choice", "heads", "rows", "dim"),
    [
        (f"top(3, {BLOCKS}, by = dot(Q, mean(K)), {OWN})", (4, 2), 1, 16),
        (f"top(3, {BLOCKS}, by = dot(Q, mean(K)), {OWN}, share = group)", (6, 2), 3, 40),
        (f"top(3, {BLOCKS}, by = dot(Q, max(K)), share = heads)", (3, 1), 2, 16),
        (f"top(2, {BLOCKS}, by = bound(Q, min(K), max(K)), share = group, {OWN})", (4, 2), 1, 24),
        (f"top(2, {BLOCKS}, by = dot(Q, mean(K)), always = sink(9) | same_block(8), forced = extra)", (2, 2), 1, 16),
        ("top(2, blocks(8), among = causal & window(30), by = dot(Q, mean(K)), normalise = softmax)", (2, 1), 2, 16),
        ("top(min(3, h + 1), blocks(4), among = causal & { k % 3 > 0 }, by = dot(Q, max(K)))", (3, 1), 1, 16),
        ("top(20, tokens, share = group, among = causal, by = dot(Q, K), always = sink(3))", (4, 2), 1, 16),
        ("top(30, blocks(2), among = all, by = dot(Q, mean(K)), share = group)", (2, 1), 1, 16),
    ],
)
def test_chooses_what_the_strips_choose(choice: str, heads: tuple[int, int], rows: int, dim: int) -> None:
    text = f"attention t {{ plan sel = {choice} attend causal & sel }}"
    both(text, heads, rows, [96, 61, 1, 0, 200, -7], dim=dim)


@pytest.mark.parametrize("page", [1, 5, 16, 256])
@pytest.mark.parametrize(
    "choice",
    [
        "top(20, tokens, share = group, among = causal, by = dot(Q, K), always = sink(3))",
        "top(9, tokens, among = causal, by = bound(Q, min(K), max(K)))",
        "top(3, blocks(8), among = causal, by = dot(Q, max(K)), share = group)",
    ],
)
def test_over_pages(choice: str, page: int) -> None:
    """Single keys are ranked where they lie."""
    text = f"attention t {{ plan sel = {choice} attend causal & sel }}"
    both(text, (4, 2), 2, [96, 61, 1, 0, 200], page=page)


@pytest.mark.parametrize("rows", [1, 3])
def test_by_the_probabilities_of_a_branch(rows: int) -> None:
    """Summed over the heads of a group; rows that see no entry have none."""
    both(
        """attention t {
        summary = attend { 8 * k + 7 < q } over pool(mean, 8)
        plan sel = top(3, blocks(8), by = probs(summary), share = group, among = causal, always = same_block(8))
        routed = attend causal & sel
        output summary + routed
        }""",
        (4, 2), rows, [96, 61, 1, 0],
    )  # fmt: skip


def test_with_inputs() -> None:
    doc = torch.arange(96).expand(2, 96) // 20
    both(
        "attention t { input doc : int[b, k]  plan sel = top(2, blocks(1), by = dot(Q, K), share = group, "
        "among = causal & document(doc)) attend causal & sel }",
        (2, 1), 1, [96, 50], doc=doc,
    )  # fmt: skip
    vectors = torch.randn(2, 2, 12, 16, generator=torch.Generator().manual_seed(2))
    both(
        "attention t { input ck : float[b, g, k/8, D]  plan sel = top(2, blocks(8), by = dot(Q, ck), among = causal) "
        "attend causal & sel }",
        (4, 2), 1, [96, 50], ck=vectors,
    )  # fmt: skip


def test_ties_and_wild_scores() -> None:
    """Of equal scores the lower member is taken; -inf and NaN withdraw, infinity ranks as the largest number."""
    attn = attndsl.compile(
        "attention t { input ck : float[k/8, D]  plan sel = top(4, blocks(8), by = dot(Q, ck), among = causal) "
        "attend sel }"
    )
    ck = torch.zeros(12, 16)
    ck[[2, 5, 7, 9, 10], 0] = torch.tensor([float("nan"), float("inf"), 3.1e38, 1.0, 1.0])
    q = torch.zeros(1, 1, 1, 16)
    q[..., 0] = 1
    program, (selection,) = attn.program, attn.program.selections
    shape = CallShape(1, 1, 1, 1, 96, 16, 16)
    plans = []
    for printer in (rank_source, None):
        of = Selector(
            of_selection(program, selection), selection, shape, CPU, [ck], printer, ragged=True, dtype=q.dtype
        )
        ragged = Ragged(torch.tensor([96], dtype=torch.int32), 96, {})
        plans.append(of(q, q, [ck], [], 1.0, None, ragged).flatten().tolist())
    assert plans == [[5, 7, 9, 10]] * 2


def test_many_members_in_one_list() -> None:
    """More than are compared at once."""
    plan = both(
        "attention t { plan sel = top(70, blocks(2), by = dot(Q, mean(K)), among = causal) attend causal & sel }",
        (1, 1), 1, [4500], capacity=5000,
    )  # fmt: skip
    assert plan.shape[-1] == 70 and (plan >= 0).all()


def test_what_kernels_do_not_choose() -> None:
    """Many rows, and what depends on data through blocks, are left to torch."""
    attn = attndsl.compile("causal & top(3, blocks(8), by = dot(Q, mean(K)))")
    (selection,), own = attn.program.selections, attn.program
    for rows, ranked in ((16, True), (17, False)):
        shape = CallShape(1, 2, 1, rows, 96, 16, 16)
        of = Selector(
            of_selection(own, selection), selection, shape, CPU, [], rank_source, ragged=True, dtype=torch.float32
        )
        assert (of.rank is not None) == ranked
    attn = attndsl.compile(
        "attention a { input doc : int[b, k] attend causal & top(3, blocks(8), by = dot(Q, mean(K)), "
        "among = causal & document(doc)) }"
    )
    (selection,), shape = attn.program.selections, CallShape(1, 2, 1, 1, 96, 16, 16)
    doc = torch.zeros(1, 96, dtype=torch.int32)
    seen = of_selection(attn.program, selection)
    of = Selector(seen, selection, shape, CPU, [doc], rank_source, ragged=True, dtype=torch.float32)
    assert of.rank is None and of.among is not None
