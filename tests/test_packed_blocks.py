"""`packed` and `lengths` around sets that look at all pairs of a sequence, and around data-dependent places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.plan import Tiling, backward_plan
from attndsl.targets import make_spec
from tests.accuracy import examples
from tests.cases import ints
from tests.gradients import judge
from tests.strategies import Case
from tests.test_backward_cpu import runner as cpu
from tests.test_backward_triton import runner as triton
from tests.test_lengths import packed, padded

pytestmark = [
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
]
FLAG = np.random.default_rng(3).random((2, 75)) < 0.7
IDS = np.repeat(ints(0, 3, 2, 25), 3, axis=1)
PI = np.random.default_rng(0).permutation(75) % 12

CASES: dict[str, Case] = {
    "any": packed("attend causal & coarsen(causal & window(3), 4, any)"),
    "all": packed("attend coarsen({ k <= q + 9 and k > Nk - q - 20 }, (3, 2), all)"),
    "of_data": packed(
        "attend causal & coarsen({ flag[k] and q - k < 9 }, (5, 3), all) | { q == k }", flag=("bool[b, k]", FLAG)
    ),
    "of_blocks": packed("attend coarsen({ k <= q + 2 and q - k < 3 }, (2, 3), any) on blocks(4)"),
    "fraction": packed("attend coarsen({ (q + k) % 3 == 1 or q >= k + 3 }, (2, 3), fraction(0.6))"),
    "fraction_of_blocks": packed("attend coarsen({ (q + k) % 3 == 1 }, (2, 3), fraction(0.5)) on blocks(2)"),
    "nested": packed("attend coarsen(coarsen({ q == k + 5 }, 3, any) - window(2), (4, 2), any) | { q == k }"),
    "random": packed("attend causal & random(2, blocks(4), query, 3) | window(2)"),
    "random_rows": packed("attend random(1, blocks(4), rows(5), h + 7, among = all) | { q == k }"),
    "random_head": packed("attend random(2, tokens, head, 3, among = { k % 2 == 1 }) | { q == k }"),
    "random_blocks": packed("attend random(2, tokens, rows(2), 3, among = all) on blocks(3) | { q == k }"),
    "segment": packed("attend causal & window(3) on segment(ids) | { k == 0 }", ids=("int[b, k]", IDS)),
    "permuted": packed("attend causal & window(5) on permuted(pi) | { k == q }", pi=("int[k]", PI)),
    "places_of_blocks": packed(
        "attend window(2) on blocks(2) on permuted(pi) | window(2) on blocks(2) on segment(pi) | { k == q }",
        pi=("int[k]", PI),
    ),
    "placed_any": packed("attend causal & coarsen(causal & window(5), 3, any) on segment(ids)", ids=("int[b, k]", IDS)),
    "placed_all": packed(
        "attend ~(coarsen({ k < q - 2 }, (2, 5), all) on blocks(2) on permuted(pi))", pi=("int[k]", PI)
    ),
    "placed_fraction": packed(
        "attend coarsen({ (q + k) % 3 == 1 }, (2, 3), fraction(0.4)) on permuted(pi) | { k == q }",
        pi=("int[k]", 3 * PI - 5),  # Some are no coordinates.
    ),
    "placed_random": packed(
        "attend causal & random(2, blocks(2), rows(3), 3, among = all) on permuted(pi) | { k == q }", pi=("int[k]", PI)
    ),
    "placed_random_rows": packed(
        "attend random(3, tokens, query, 3, among = { k <= q }) on segment(ids)", ids=("int[b, k]", IDS)
    ),
    "random_in_blocks": packed("attend coarsen(random(2, tokens, query, 9, among = causal), 2, any)"),
    "lengths_fraction": padded("attend coarsen({ (q + k) % 3 == 1 or q >= k + 3 }, (5, 7), fraction(0.6))", 50),
    "lengths_fraction_of_blocks": padded(
        "attend coarsen({ (q + k) % 3 == 1 or q >= k + 3 }, (2, 3), fraction(0.6)) on blocks(3)", 50,
        np.array([74, -1]),
    ),
    "both": packed(
        "lengths n attend causal & random(2, tokens, rows(4), 3) & coarsen({ q - k < 5 }, 2, all) | { q == k }",
        n=("int[b]", np.array([33, 68])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_on_the_cpu(name: str) -> None:
    judge(cpu(), CASES[name], torch.float64)


@pytest.mark.parametrize("name", ["all", "fraction_of_blocks", "random", "placed_all", "placed_random"])
def test_gradients_in_triton(name: str) -> None:
    judge(triton(), CASES[name], torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "all",
        "of_data",
        "fraction_of_blocks",
        "random",
        "random_blocks",
        "segment",
        "placed_fraction",
        "placed_random_rows",
        "random_in_blocks",
    ],
)
@pytest.mark.parametrize(("rows", "k_len"), [(1, 1), (1, 50), (29, 29), (0, 5)])
def test_other_sizes(name: str, rows: int, k_len: int) -> None:
    chosen = CASES[name]
    inputs = {key: np.minimum(x, k_len - 1) if key == "n" else x[..., :k_len] for key, x in chosen.inputs.items()}
    judge(cpu(), replace(chosen, inputs=inputs, shape=replace(chosen.shape, rows=rows, k_len=k_len)), torch.float64)


@pytest.mark.parametrize("pattern", ["random(2, blocks(4), rows(4), 3)", "coarsen({ doc[k] == 1 }, 4, any)"])
def test_calls_without_tokens(pattern: str) -> None:
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc attend causal & {pattern} }}")
    q, k, v = (torch.empty(2, heads, 0, 8).requires_grad_() for heads in (4, 2, 2))
    out = attn(q, k, v, doc=torch.empty(2, 0, dtype=torch.int32))
    out.sum().backward()
    assert out.shape == q.shape and all(x.grad is not None for x in (q, k, v))


# ------------------------------------------------------------------------------- random programs

ATOMS = st.sampled_from(
    ["causal", "window(3)", "all", "{ q == k }", "{ k % 3 == 1 }", "{ flag[k] }", "{ k >= Nk - 4 }", "band(2, 2)"]
)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    size = st.integers(1, 5)
    mode = st.sampled_from(["any", "all", "fraction(0.5)"])
    per = st.sampled_from(["query", "rows(3)", "head"])
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("&|-"), inner),
        st.builds("~{}".format, inner.filter(lambda x: x[0] == "(")),
        st.builds("coarsen({}, ({}, {}), {})".format, inner, size, size, mode),
        st.builds("random({}, blocks({}), {}, {}, among = {})".format, size, size, per, size, inner),
        st.builds("({}) on blocks({})".format, inner.filter(lambda x: "flag" not in x), size),
        st.builds("({}) on segment(ids)".format, inner.filter(
            lambda x: not any(word in x for word in ("flag", "segment"))
        )),
    )  # fmt: skip


@examples(12)
@given(
    st.recursive(ATOMS, _larger, max_leaves=3),
    st.sampled_from(["packed doc", "packed doc lengths n", "lengths n"]),
    st.integers(1, 24),
    st.integers(0, 99),
)
def test_random_programs(pattern: str, clauses: str, k_len: int, seed: int) -> None:
    """Against the oracle, which asks each sequence alone."""
    draw = np.random.default_rng(seed)
    text = (
        "attention a { input doc : int[b, k] input n : int[b] input flag : bool[b, k] input ids : int[b, k] "
        f"{clauses} attend {pattern} }}"
    )
    rows = k_len if seed % 2 else seed % k_len + 1
    inputs: dict[str, Any] = {
        "doc": np.repeat(draw.integers(0, 2, (2, 24)), 3, axis=1)[:, :k_len], "n": draw.integers(-1, k_len + 2, 2),
        "flag": draw.random((2, k_len)) < 0.6, "ids": draw.integers(0, 2, (2, k_len)),
    }  # fmt: skip
    try:
        program = load(text).program
    except PatternError as refused:  # A pattern that is empty, or more than the front end takes.
        assert all(d.code.startswith("A0") for d in refused.diagnostics), refused
        return
    attn = attndsl.compile(text)
    given: dict[str, Any] = {x.name: torch.from_numpy(inputs[x.name]) for x in program.inputs}
    q = torch.randn(2, 2, rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    k, v = (torch.randn(2, 1, k_len, 8, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(attn(q, k, v, **given), attn.reference(q, k, v, **given), atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------------------------- tiles, decode


def test_a_closed_form_needs_no_map() -> None:
    """Blocks of a band within documents visit the tiles of the band, and nothing is counted at run time."""
    text = "attention a { input doc : int[b, k]  packed doc  attend causal & coarsen(window(200), 16, any) }"
    plan = backward_plan(load(text).program, make_spec("sm_90", "triton", 4, 4, 64), Tiling(64, 64))
    assert "blocks" not in {x.name for x in plan.program.inputs}
    graph = attndsl.compile(text).blocks(4096, 4096, block_q=64, block_k=64, doc=torch.zeros(1, 4096).int())
    # Of a row the block of 16 that its window begins in: five tiles at most.
    assert len(graph.graph.edges) <= 64 * 5


@pytest.mark.parametrize("name", [name for name, x in CASES.items() if "packed" in x.text and "lengths" not in x.text])
def test_a_decode_stays_in_its_document(name: str) -> None:
    chosen = CASES[name]
    attn = attndsl.compile(chosen.text)
    inputs: dict[str, Any] = {key: torch.from_numpy(x) for key, x in chosen.inputs.items()}
    q, k, v = torch.randn(2, 2, 7, 16), torch.randn(2, 2, 75, 16), torch.randn(2, 2, 75, 16)
    found = attn.decode(q, k, v, torch.tensor([61, 75], dtype=torch.int32), **inputs)
    for b, length in enumerate((61, 75)):
        own = {key: (x if x.dim() == 1 else x[b : b + 1])[..., :length] for key, x in inputs.items()}
        at = slice(b, b + 1)
        expected = attn.reference(q[at], k[at, :, :length], v[at, :, :length], **own)
        torch.testing.assert_close(found[at].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["ids", "segment(ids)"])
@pytest.mark.parametrize("inner", ["coarsen(power_of_two, 6, any)", "random(2, blocks(4), head, 1, among = all)"])
def test_what_looks_at_all_pairs_where_data_places_tokens(inner: str, place: str) -> None:
    """Blocks and classes are those of a document's own places, and the last one stands for places that it lacks."""
    declared = "input doc : int[b, k]  input ids : int[b, k]  packed doc"
    attn = attndsl.compile(f"attention a {{ {declared}  attend causal & ({inner} on blocks(2) on {place}) }}")
    q, k, v = torch.randn(3, 2, 2, 75, 16, dtype=torch.float64)
    given: dict[str, Any] = {"doc": torch.arange(75)[None] // 31, "ids": torch.from_numpy(IDS)}
    given["doc"] = given["doc"].repeat(2, 1)
    torch.testing.assert_close(attn(q, k, v, **given), attn.reference(q, k, v, **given), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "pattern", ["random(1, blocks(2), rows(3), 3, among = band(2, 2))", "coarsen(band(1, 2), 3, fraction(0.4))"]
)
def test_nothing_of_documents_is_kept(pattern: str) -> None:
    """What follows from lengths alone is kept for the next call; where documents begin is not."""
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k]  packed doc  attend {pattern} | {{ q == k }} }}")
    q, k, v = torch.randn(3, 1, 2, 30, 16, dtype=torch.float64)
    for size in (7, 11):
        doc = torch.arange(30)[None] // size
        torch.testing.assert_close(attn(q, k, v, doc=doc), attn.reference(q, k, v, doc=doc), atol=1e-9, rtol=1e-9)


def test_a_draw_of_many_members_is_bounded() -> None:
    """What is held for each position and member is counted before it is made."""
    attn = attndsl.compile(
        "attention a { input doc : int[b, k]  packed doc  attend random(2, tokens, head, 3, among = all) }"
    )
    x = torch.zeros(1, 1, 40000, 16)
    with pytest.raises(PatternError, match="A519"):
        attn(x, x, x, doc=torch.zeros(1, 40000, dtype=torch.int32))
