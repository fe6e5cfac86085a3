"""Where published routing systems differ in a word: each example takes the side that its source takes.

Every test has the published rule, shows that the example chooses by it, and that the program with the word changed does
not, on the same tensors: so an option read the other way, in the file or by the compiler, cannot pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.codegen.triton_select import select_source
from attndsl.program import CallShape
from attndsl.runtime.select import Selector
from tests import routing_rules as rules
from tests.gpu import interprets
from tests.routing_rules import DIM, EXAMPLES, HEADS, KV_HEADS, SHARE, Chosen, call, noise
from tests.test_select import program_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
]
TOKENS, SHARP = 45, 80


def chosen(name: str, q: Tensor, k: Tensor, change: tuple[str, str] = ("", ""), **more: Any) -> Chosen:
    """What an example chooses; `change` replaces words of its text, which has them. `more`: parameters and inputs."""
    text = (EXAMPLES / f"{name}.attn").read_text("utf-8")
    old, new = change
    assert old in text
    inputs: dict[str, Any] = {key: x for key, x in more.items() if isinstance(x, Tensor)}
    params = {key: x for key, x in more.items() if key not in inputs}
    attn = attndsl.compile(text.replace(old, new) if old else text, **params)
    ((plan),) = attn.plan(q, k, **inputs).values()
    found = (
        plan[0].expand(HEADS, -1, -1) if plan.shape[1] == 1 else plan[0].repeat_interleave(HEADS // plan.shape[1], 0)
    )
    if plan.dtype == torch.uint8:
        return [[set(row.nonzero().flatten().tolist()) for row in head] for head in found]
    return [[set(row[row >= 0].tolist()) for row in head] for head in found]


def sharp() -> tuple[Tensor, Tensor]:
    """Queries long enough that sums along antidiagonals differ."""
    q, k, _ = call(SHARP)
    return 8 * q, k


def one_way(name: str, q: Tensor, k: Tensor, rule: Chosen, *changes: tuple[str, str], **more: Any) -> None:
    """The example chooses by the rule, and no longer once a word is changed."""
    assert chosen(name, q, k, **more) == rule
    for change in changes:
        assert chosen(name, q, k, change, **more) != rule, change


# ------------------------------------------------------------------------------- what is forced


def test_moba_counts_the_own_block_inside_k() -> None:
    q, k, _ = call(TOKENS)
    own = "always = same_block(block)"
    changes = (own, own + ", forced = extra"), (own, own + ", forced = overlay")
    one_way("moba", q, k, rules.moba(q, k, 8, 3), *changes, block=8, n=3)


def test_moba_forces_it() -> None:
    q, k, _ = call(TOKENS)
    one_way("moba", q, k, rules.moba(q, k, 8, 3), (", always = same_block(block)", ""), block=8, n=3)


def test_xattention_credits_the_first_block_and_the_diagonal() -> None:
    q, k = sharp()
    forced = "always = sink(1) | same_block(block)"
    changes = (forced, forced + ", forced = extra"), (forced, forced + ", forced = overlay")
    one_way("xattention", q, k, rules.xattention(q, k, 8, 4, 0.9), *changes, block=8, stride=4)


def test_xattention_forces_both() -> None:
    q, k = sharp()
    rule = rules.xattention(q, k, 8, 4, 0.9)
    forced = "always = sink(1) | same_block(block)"
    changes = (forced, "always = sink(1)"), (forced, "always = same_block(block)")
    one_way("xattention", q, k, rule, *changes, block=8, stride=4)


def test_vmoba_credits_the_own_block() -> None:
    q, k, _ = call(TOKENS)
    own = "always = same_block(block)"
    changes = (own, own + ", forced = extra"), (own, own + ", forced = overlay")
    one_way("vmoba", q, k, rules.vmoba(q, k, 8, 0.6), *changes, block=8, share=0.6)


def test_vmoba_takes_one_more_than_its_own() -> None:
    q, k, _ = call(TOKENS)
    one_way("vmoba", q, k, rules.vmoba(q, k, 8, 0.25), ("at_least = 2", "at_least = 1"), block=8)


def test_sparge_leaves_what_is_forced_out_of_the_softmax() -> None:
    q, k, _ = call(512)
    fixed_q = torch.zeros(1, HEADS, 4, dtype=torch.bool)
    fixed_k = torch.rand(1, KV_HEADS, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    # Longer means, so that shares differ.
    q = 100 * q
    rule = rules.sparge(q, k, fixed_q[0].numpy(), fixed_k[0].numpy())
    changes = ("forced = extra", "forced = counted"), ("forced = extra", "forced = overlay")
    one_way("sparge", q, k, rule, *changes, fixed_q=fixed_q, fixed_k=fixed_k)


# -------------------------------------------------------------------------- what crosses the line


def test_xattention_takes_the_block_that_crosses() -> None:
    q, k = sharp()
    change = "antidiagonal(Q, K, stride),", "antidiagonal(Q, K, stride), exclusive,"
    one_way("xattention", q, k, rules.xattention(q, k, 8, 4, 0.9), change, block=8, stride=4)


def test_vmoba_takes_the_block_that_crosses() -> None:
    q, k, _ = call(TOKENS)
    change = "normalise = minmax,", "normalise = minmax, exclusive,"
    one_way("vmoba", q, k, rules.vmoba(q, k, 8, 0.6), change, block=8, share=0.6)


def test_pbs_takes_the_block_that_crosses() -> None:
    """Blocks of keys in another order inside segments of 16; what a row of blocks sees of earlier segments competes."""
    tokens, segment, block, share = 80, 16, 8, 0.6
    q, k, _ = call(tokens)
    q = 4 * q
    draw = np.random.default_rng(0)
    pi = np.stack([[s + draw.permutation(segment) for s in range(0, tokens, segment)] for _ in range(HEADS)])
    pi = pi.reshape(HEADS, tokens)
    queries, keys = rules.numbers(q, k)

    def choose(h: int, g: int) -> list[set[int]]:
        rows, moved = [], keys[g][np.argsort(pi[h])]
        x, y = rules.means(queries[h], block), rules.means(moved, block)
        for r in range(tokens // block):
            earlier = r * block // segment * segment // block
            mass = rules.softmax(np.array([x[r] @ y[m] / DIM**0.5 for m in range(earlier)])) if earlier else np.zeros(0)
            kept, sofar = set[int](), 0.0
            for m in rules.best({m: float(mass[m]) for m in range(earlier)}, earlier):
                if sofar >= share:
                    break
                kept.add(m)
                sofar += float(mass[m])
            # The block that holds the first token stays, whatever it weighs.
            rows.append(kept | ({int(pi[h, 0]) // block} if earlier else set()))
        return rows

    change = "by = dot(mean(Q), mean(K)),", "exclusive, by = dot(mean(Q), mean(K)),"
    more = {"segment": segment, "block": block, "share": share, "pi": torch.from_numpy(pi)[None].int()}
    one_way("pbs", q, k, rules.for_heads(choose), change, **more)


def test_sparge_leaves_out_the_block_that_crosses() -> None:
    q, k, _ = call(512)
    q = 12 * q
    fixed_q, fixed_k = torch.zeros(1, HEADS, 4, dtype=torch.bool), torch.zeros(1, KV_HEADS, 8, dtype=torch.bool)
    rule = rules.sparge(q, k, fixed_q[0].numpy(), fixed_k[0].numpy())
    one_way("sparge", q, k, rule, ("exclusive,", ""), fixed_q=fixed_q, fixed_k=fixed_k)


# --------------------------------------------------------------------- softmax and pools, and sums


def test_xattention_pools_after_the_softmax() -> None:
    """The other order, logits added up over blocks and then a softmax, chooses otherwise on these tensors."""
    size, stride = 8, 4
    q, k = sharp()
    rule = rules.xattention(q, k, size, stride, 0.9)
    assert chosen("xattention", q, k, block=size, stride=stride) == rule
    queries, keys = rules.numbers(q, k)

    def pooled_first(h: int, g: int) -> list[set[int]]:
        rows = []
        for r in range(SHARP // size):
            logits = np.zeros(r + 1)
            for i, j in np.ndindex(SHARP // stride, SHARP // stride):
                x, y = queries[h][i * stride : (i + 1) * stride], keys[g][j * stride : (j + 1) * stride]
                if i * stride // size == r and j <= i:
                    logits[j * stride // size] += float((x * y[::-1]).sum()) / stride / DIM**0.5
            share, kept = rules.softmax(logits), {0, r}
            for m in rules.best({m: float(share[m]) for m in range(r + 1) if m not in kept}, r):
                if sum(share[x] for x in kept) < 0.9:
                    kept.add(m)
            rows.append(kept)
        return rows

    assert rules.for_heads(pooled_first) != rule


def test_sparge_pools_before_the_softmax() -> None:
    """Means of queries and keys, one product: not the sum of what a softmax over tokens gives to a block."""
    q, k, _ = call(512)
    q = 12 * q
    fixed_q, fixed_k = torch.zeros(1, HEADS, 4, dtype=torch.bool), torch.zeros(1, KV_HEADS, 8, dtype=torch.bool)
    rule = rules.sparge(q, k, fixed_q[0].numpy(), fixed_k[0].numpy())
    assert chosen("sparge", q, k, fixed_q=fixed_q, fixed_k=fixed_k) == rule
    queries, keys = rules.numbers(q, k)

    def softmax_first(h: int, g: int) -> list[set[int]]:
        rows, mass = [], np.tril(np.exp(queries[h] @ keys[g].T / DIM**0.5))
        mass /= mass.sum(1, keepdims=True)
        for r in range(4):
            share = mass[r * 128 : (r + 1) * 128].sum(0).reshape(8, 64).sum(1) / 128
            kept, ahead = set[int](), 0.0
            for m in rules.best({m: float(share[m]) for m in range(2 * r + 2)}, 8):
                ahead += float(share[m])
                if ahead <= 0.98:
                    kept.add(m)
            rows.append(kept)
        return rows

    assert rules.for_heads(softmax_first) != rule


def test_token_select_adds_up_softmaxes() -> None:
    """A vote is a share of one: added up as they are, the loudest head would decide."""
    first, near, n = 2, 4, 3
    q, k, _ = call(TOKENS)
    q = q * torch.tensor([0.2, 1.0, 4.0, 9.0], dtype=q.dtype).view(1, HEADS, 1, 1)
    queries, keys = rules.numbers(q, k)
    rows = list[set[int]]()
    for t in range(TOKENS):
        free = list(range(first, t - near + 1))
        votes = np.zeros(len(free))
        for h in range(HEADS if free else 0):
            votes += rules.softmax(keys[h // SHARE][free] @ queries[h, t] / DIM**0.5)
        rows.append(set(rules.best(dict(zip(free, votes.tolist(), strict=True)), n)))
    changes = ("normalise = softmax", "normalise = none"), ("share = heads", "share = group")
    one_way("token_select", q, k, [rows] * HEADS, *changes, first=first, near=near, n=n)


# -------------------------------------------------------------------------- heads that share keys


def test_moba_chooses_for_each_head() -> None:
    q, k, _ = call(TOKENS)
    own = "always = same_block(block)"
    changes = (own, own + ", share = group"), (own, own + ", share = heads")
    one_way("moba", q, k, rules.moba(q, k, 8, 3), *changes, block=8, n=3)


def test_nsa_chooses_for_the_heads_of_a_group() -> None:
    """By their probabilities added up; each head by itself, or by products that are added up, is otherwise."""
    block, n = 8, 2
    q, k, _ = call(TOKENS)
    changes = (
        ("share = group", "share = none"), ("share = group", "share = heads"),
        ("by = probs(summary)", "by = dot(Q, mean(K))"),
    )  # fmt: skip
    gate = noise(1, HEADS, TOKENS, 3)
    one_way("nsa", q, k, rules.nsa(q, k, block, n), *changes, block=block, n=n, span=6, gate=gate)


def test_deepseek_has_one_list_for_all_heads() -> None:
    index = noise(1, 20, 20)
    attn = attndsl.compile(EXAMPLES / "dsa.attn", n=5)
    (plan,) = attn.plan(*call(20)[:2], index=index).values()
    assert plan.shape == (1, 1, 20, 5)
    assert [set(row[row >= 0].tolist()) for row in plan[0, 0]] == rules.by_score(index[0].numpy(), 5)


# ------------------------------------------------------------------------- the last, ragged block


def means_by_size(x: np.ndarray[Any, Any], size: int) -> list[np.ndarray[Any, Any]]:
    return [x[i : i + size].sum(0) / size for i in range(0, len(x), size)]


@pytest.mark.parametrize("name", ["regions", "vmoba"])
def test_a_block_that_ends_early_is_the_mean_of_what_it_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided by the whole size its mean would be small, and chosen less."""
    tokens, block = 43, 8
    q, k, _ = call(tokens)
    k[:, :, 40:] *= 3

    def rule() -> Chosen:
        if name == "vmoba":
            return rules.vmoba(q, k, block, 0.6)
        return rules.block_means(q, k, block, 2, causal=False)

    params = {"block": block, "share": 0.6} if name == "vmoba" else {"region": block, "n": 2}
    right = rule()
    assert chosen(name, q, k, **params) == right
    monkeypatch.setattr(rules, "means", means_by_size)
    assert rule() != right


# --------------------------------------------------------------------------------- rows of nothing


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_row_that_sees_nothing_is_0_and_its_lse_is_minus_infinity(backend: str) -> None:
    """Earlier blocks only: the first block's rows have none, and neither has a row of no candidates a choice."""
    attn = attndsl.compile("(causal - same_block(8)) & top(2, blocks(8), by = dot(Q, mean(K)))")
    qkv = [x.float() for x in call(TOKENS)]
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = attn(*leaves, return_lse=True, backend=backend)
    assert (out[:, :, :8] == 0).all() and (lse[:, :, :8] == -torch.inf).all()
    assert (out[:, :, 8:] != 0).all() and lse[:, :, 8:].isfinite().all()
    (out.square().sum() + lse[:, :, 8:].sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    assert leaves[0].grad is not None and (leaves[0].grad[:, :, :8] == 0).all()
    (plan,) = attn.plan(*qkv[:2]).values()
    assert (plan[:, :, :8] == -1).all()


# ------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("kernel", [None, pytest.param(select_source, marks=interprets)], ids=["strips", "kernel"])
def test_equals_go_to_the_lower_index(kernel: Any) -> None:
    """All scores equal, and scores in pairs of equals: as the oracle has it, in strips and by the fused kernel."""
    attn = attndsl.compile(EXAMPLES / "moba.attn", block=4, n=3)
    # Whole numbers, whose products and means are exact in any order.
    q, k, v = ((2 * x).round().float() for x in call(24))
    program = program_of("top(3, blocks(4), among = causal, by = dot(Q, mean(K)), always = same_block(4))")
    shape = CallShape(1, HEADS, KV_HEADS, 24, 24, DIM, DIM)
    choose = Selector(program, program.selections[0], shape, torch.device("cpu"), (), kernel)

    def plan(q: Tensor) -> list[list[set[int]]]:
        return [[set(row[row >= 0].tolist()) for row in head] for head in choose(q, k, [], [])[0]]

    flat = [{0, 1, t // 4} if t >= 8 else {0, t // 4} for t in range(24)]
    assert plan(torch.zeros_like(q)) == [flat] * HEADS
    # Blocks 0 and 3, 1 and 4 are alike.
    k[:, :, 12:20] = k[:, :, :8]
    alike = plan(q)
    assert alike == rules.moba(q, k, 4, 3)
    later = [row - {t // 4} for head in alike for t, row in enumerate(head) if t >= 20]
    assert all((3 in row) <= (0 in row) and (4 in row) <= (1 in row) for row in later)
    assert any(3 in row or 4 in row for row in later)
    for x in (torch.zeros_like(q), q):
        torch.testing.assert_close(attn(x, k, v).double(), attn.reference(x, k, v), atol=1e-5, rtol=1e-5)
