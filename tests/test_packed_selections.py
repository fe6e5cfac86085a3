"""Selections of packed calls: each document's rows choose among its own members, against the oracle, which asks of each
document alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
from attndsl.chosen_entries import of_entries, ranked
from attndsl.codegen.triton_select import select_source
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.plans import of_selection
from attndsl.program import CallShape
from attndsl.runtime.select_entries import EntrySelector
from attndsl.select_plan import why_not_fused
from tests.accuracy import examples
from tests.gpu import interprets
from tests.test_routed import FUSED, PATTERNS, check, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
]
DOC = torch.tensor([[4] * 20 + [1] * 3 + [4] * 9 + [7, 8] + [0] * 14, [5] * 48])
HEAD = "input doc : int[b, k] input n : int[b] packed doc lengths n"


@st.composite
def selections(draw: st.DrawFn) -> str:
    size = draw(st.integers(2, 9))
    pool = draw(st.sampled_from(("mean", "max", "min", "sum", "first", "last")))
    by = draw(st.sampled_from((f"dot(Q, {pool}(K))", "bound(Q, min(K), max(K))")))
    always = draw(st.sampled_from(("", f"same_block({size})", "{ k >= Nk - 3 }", "sink(2)")))
    forced = draw(st.sampled_from(("counted", "extra", "overlay")))
    share = draw(st.sampled_from(("none", "group", "heads")))
    among = draw(st.sampled_from(("causal", "all", "causal - window(4)", "{ (q + k) % 3 != 1 }")))
    rule = draw(st.sampled_from(("top(1", "top(3", "cover(0.6", "above(0.2")))
    more = "" if rule.startswith("top") else ", at_most = 3"
    more += f", always = {always}, forced = {forced}" if always else ""
    if rule.startswith("top") and draw(st.integers(0, 3)) == 0:
        return f"{rule}, tokens, by = dot(Q, K), share = group, among = {among})"
    return f"{rule}, blocks({size}), by = {by}, share = {share}, among = {among}{more})"


@examples(25)
@given(selections(), st.sampled_from(PATTERNS), st.integers(1, 26), st.integers(0, 99))
def test_what_is_chosen_in_documents(selection: str, pattern: str, k_len: int, seed: int) -> None:
    text = f"attention a {{ {HEAD} attend {pattern.format(selection)} }}"
    rows = k_len if seed % 2 else seed % k_len + 1
    begins = torch.rand(2, k_len, generator=torch.Generator().manual_seed(seed)) < 0.15
    n = torch.tensor([max(0, k_len - seed % 7), (seed * 5) % (k_len + 2)])
    check(text, *tensors(rows, k_len, seed=seed), doc=begins.cumsum(1) % 3, n=n)


@pytest.mark.parametrize(("rows", "k_len"), [(0, 5), (1, 1)])
def test_calls_of_few_rows(rows: int, k_len: int) -> None:
    text = f"attention a {{ {HEAD} attend causal & top(2, blocks(4), by = dot(Q, mean(K))) }}"
    check(text, *tensors(rows, k_len), doc=torch.zeros(2, k_len, dtype=torch.int32), n=torch.tensor([k_len, 0]))


TEXTS = {
    "moba": "attend causal & top(2, blocks(8), by = dot(Q, mean(K)), always = same_block(8))",
    "nsa": """summary = attend causal over pool(mean, 4)
        picked = attend causal & top(2, blocks(4), by = probs(summary), share = group, always = same_block(4))
        near = attend causal & window(5)
        output summary + picked + near""",
    "rest": """plan sel = top(1, blocks(4), among = causal, by = dot(Q, mean(K)))
        attend causal & sel, causal - sel over pool(mean, 4, counted)""",
    "indexer": "attend causal & top(5, tokens, share = heads, by = dot(Q, K))",
    "distance": "attend causal & top(1, blocks(8), by = (q - k) * Nk)",
    "twice": """plan wide = top(3, blocks(4), among = causal, by = dot(Q, mean(K)))
        attend causal & top(1, blocks(4), among = causal & wide, by = dot(Q, max(K)))""",
}


def compiled(name: str) -> attndsl.Attention:
    return attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc {TEXTS[name]} }}")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", TEXTS)
def test_plans_count_in_their_document(name: str, backend: str) -> None:
    """What a call chooses is what it is handed, in it and for the oracle; gradients are the oracle's."""
    attn, dtype = compiled(name), torch.float64 if backend == "cpu" else torch.float32
    leaves = [x.to(dtype).requires_grad_() for x in tensors(48, 48, seed=3)]
    plans = attn.plan(*leaves[:2], doc=DOC)
    out = attn(*leaves, doc=DOC, backend=backend)
    torch.testing.assert_close(attn(*leaves, doc=DOC, backend=backend, plans=plans), out)
    right = [x.detach().double().requires_grad_() for x in leaves]
    wanted = attn.reference(*right, doc=DOC, plans=plans)
    bound = 1e-9 if backend == "cpu" else 2e-4
    torch.testing.assert_close(out.double(), wanted, atol=bound, rtol=bound)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    for x, y in zip(
        torch.autograd.grad((out * weight).sum(), leaves), torch.autograd.grad((wanted * weight).sum(), right),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(x.double(), y, atol=10 * bound, rtol=bound)
    # A document alone chooses the same.
    alone, at = attndsl.compile(f"attention a {{ {TEXTS[name]} }}"), slice(23, 32)
    own = alone.plan(*(x[:1, :, at] for x in leaves[:2]))
    for key, plan in own.items():
        found = plans[key][:1, :, at]
        torch.testing.assert_close(found[..., : plan.shape[3]], plan)
        assert (found[..., plan.shape[3] :] == -1).all()


@interprets
@pytest.mark.parametrize("text", FUSED)
def test_the_fused_kernel_chooses_as_strips_do(text: str) -> None:
    """It goes over the entries of its rows' documents alone."""
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc attend {text} }}")
    (selection,) = attn.program.selections
    program, shape = of_selection(attn.program, selection), CallShape(2, 4, 2, 29, 48, 16, 16)
    entries = of_entries(program, selection, (4, 2))
    assert not why_not_fused(entries.program, entries.selection, (4, 2))
    assert ranked(attn.program, selection, (4, 2)) == (entries.program, entries.selection)
    q, k, _ = (x.float() for x in tensors(29, 48, seed=1))
    found = [
        EntrySelector(attn._key, program, selection, shape, q.device, [DOC], printer, q.dtype)(q, k, [DOC], [])
        for printer in (select_source, None)
    ]
    torch.testing.assert_close(*found)


@interprets
def test_the_fused_kernel_ranks_by_probabilities_of_entries() -> None:
    attn = compiled("nsa")
    (selection,) = attn.program.selections
    program, shape = of_selection(attn.program, selection), CallShape(2, 4, 2, 29, 48, 16, 16)
    entries = of_entries(program, selection, (4, 2))
    assert not why_not_fused(entries.program, entries.selection, (4, 2))
    q, k, v = (x.float() for x in tensors(29, 48, seed=1))
    summary = attndsl.compile("attention a { input doc : int[b, k] packed doc attend causal over pool(mean, 4) }")
    (keys, _), (_, lse) = summary.views(k, v, doc=DOC)["pool(mean, 4)"], summary(q, k, v, doc=DOC, return_lse=True)
    found = [
        EntrySelector(attn._key, program, selection, shape, q.device, [DOC], printer, q.dtype)(
            q, k, [DOC], [], None, (keys, lse)
        )
        for printer in (select_source, None)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("clauses", "named"), [
    ("attend causal & top(1, blocks(4), per = rows(8), by = dot(mean(Q), mean(K)))", "such a selection"),
    ("attend causal & top(fraction(0.5), blocks(4), by = dot(Q, mean(K)))", "such a selection"),
    ("x = attend causal y = attend causal & top(1, blocks(4), by = probs(x)) output y", "such a selection"),
    ("input p : blocks(4)[b, h, q/8] attend causal & p", "such a plan"),
])  # fmt: skip
def test_what_is_refused(clauses: str, named: str) -> None:
    with pytest.raises(PatternError) as caught:
        load(f"attention a {{ input doc : int[b, k] packed doc {clauses} }}")
    (found,) = (d for d in caught.value.diagnostics if d.code.startswith("A9"))
    assert found.code == "A907"
    assert f"around {named} is" in found.message


def test_a_plan_that_is_handed_in() -> None:
    """`input p : blocks(4)[b, q]` counts blocks of each row's document."""
    attn = attndsl.compile(
        "attention a { input doc : int[b, k] input p : blocks(4)[b, q] packed doc attend causal & p }"
    )
    q, k, v = tensors(48, 48)
    p = torch.tensor([0, 2, -1]).expand(2, 48, 3)
    out = attn(q, k, v, doc=DOC, p=p)
    torch.testing.assert_close(out, attn.reference(q, k, v, doc=DOC, p=p), atol=1e-10, rtol=1e-10)


def test_decode_says_what_it_has_not() -> None:
    x, n = torch.randn(2, 2, 48, 16), torch.tensor([48, 40], dtype=torch.int32)
    for text in ("attend causal over pool(mean, 4)", TEXTS["moba"], TEXTS["nsa"]):
        attn = attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc {text} }}")
        with pytest.raises(PatternError, match="A911"):
            attn.decode(x[:, :, :1], x, x, n, doc=DOC)
