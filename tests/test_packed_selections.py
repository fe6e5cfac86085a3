"""Selections of packed calls: each document's rows choose among its own members, against the oracle, which asks of each
document alone."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import attndsl
from attndsl.chosen_entries import of_entries, ranked
from attndsl.codegen.triton_select import select_source
from attndsl.derivation import CallMembers
from attndsl.diagnostics import PatternError
from attndsl.piece_plans import forward_plans
from attndsl.plans import of_selection
from attndsl.program import CallShape
from attndsl.runtime.document_members import to_members
from attndsl.runtime.document_select import DocumentSelector
from attndsl.runtime.plans import call_members
from attndsl.runtime.select_entries import EntrySelector
from attndsl.runtime.strips import STRIP
from attndsl.select_plan import why_not_fused
from attndsl.targets import make_spec
from tests.accuracy import examples
from tests.gpu import interprets
from tests.test_routed import FUSED, PATTERN_SELECTIONS, PATTERNS, check, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
]
DOC = torch.tensor([[4] * 20 + [1] * 3 + [4] * 9 + [7, 8] + [0] * 14, [5] * 48])
HEAD = "input doc : int[b, k] input n : int[b] packed doc lengths n"


PROBES = (
    "attend causal over pool(mean, 4)",
    "attend { q // 4 >= k // 4 and k < Nk - 1 } over pool(max, 2, visible = any) { softmax with sink 0.5 }",
    "attend causal",
)


@st.composite
def branches(draw: st.DrawFn) -> tuple[str, str]:
    """A branch to probe, or nothing, and a selection. Entries lie in members: those that shared one would tie, and
    which of them is above a threshold would be left to rounding."""
    selection, score = draw(PATTERN_SELECTIONS), re.compile(r"by = (dot|bound)\((\w+(\(\w+\))?(, )?)+\)")
    if selection.startswith("cover") and (word := draw(st.sampled_from(("row", "head", "all")))) != "row":
        # A share that no sum of equal masses meets. Rows that see one member give it all of theirs: as sums of
        # probabilities these would tie but for rounding.
        return "", re.sub(r"cover\(0\.\d", f"cover(0.3719, compete = {word}", selection)
    if not score.search(selection) or draw(st.booleans()):
        return "", selection
    by = draw(st.sampled_from(("by = probs(x)", "by = probs(x, max)")))
    of_entries = re.search(r"blocks\((4|8)\), per", selection)
    return f"x = {draw(st.sampled_from(PROBES if of_entries else PROBES[2:]))}", score.sub(by, selection)


@examples(25)
@given(branches(), st.sampled_from(PATTERNS), st.integers(1, 26), st.integers(0, 99))
def test_what_is_chosen_in_documents(branch: tuple[str, str], pattern: str, k_len: int, seed: int) -> None:
    probe, selection = branch
    text = f"attention a {{ {HEAD} {probe} y = attend {pattern.format(selection)} output y }}"
    rows = k_len if seed % 2 else seed % k_len + 1
    begins = torch.rand(2, k_len, generator=torch.Generator().manual_seed(seed)) < 0.15
    n = torch.tensor([max(0, k_len - seed % 7), (seed * 5) % (k_len + 2)])
    check(text, *tensors(rows, k_len, seed=seed), doc=begins.cumsum(1) % 3, n=n)


@pytest.mark.parametrize(("rows", "k_len"), [(0, 5), (1, 1)])
def test_calls_of_few_rows(rows: int, k_len: int) -> None:
    for choice in ("by = dot(Q, mean(K))", "per = rows(4), by = dot(mean(Q), mean(K))", "per = head, by = q - k"):
        text = f"attention a {{ {HEAD} attend causal & top(2, blocks(4), {choice}) }}"
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
    "rows": "attend causal & top(2, blocks(4), per = rows(8), by = dot(mean(Q), mean(K)), always = same_block(4))",
    "shared": """summary = attend causal over pool(mean, 4)
        picked = attend causal & top(2, blocks(4), per = rows(4), by = probs(summary), share = group)
        output summary + picked""",
    "head": "attend causal & top(2, blocks(4), per = head, by = dot(mean(Q), mean(K)), share = heads)",
    "xattention": """attend causal & cover(0.7, blocks(8), per = rows(8), by = antidiagonal(Q, K, 4),
        always = sink(1) | same_block(8))""",
    "fraction": "attend causal & top(fraction(0.4), blocks(4), by = dot(Q, mean(K)))",
    "levels": """attend causal over levels((1, 2, 4), blocks(4), per = rows(4), among = causal,
        quantiles = (0.3, 0.6, 1.0), by = dot(mean(Q), mean(K)))""",
    "together": """attend causal & cover(0.37, blocks(4), per = rows(8), compete = head,
        by = dot(mean(Q), mean(K)), always = same_block(4), forced = extra)""",
    "all heads": """attend causal & cover(0.37, blocks(4), compete = all, share = group, normalise = minmax,
        by = dot(Q, mean(K)), always = same_block(4), at_least = 1, at_most = 3)""",
    "twice": """plan wide = top(3, blocks(4), among = causal, by = dot(Q, mean(K)))
        attend causal & top(1, blocks(4), among = causal & wide, by = dot(Q, max(K)))""",
}


def compiled(name: str) -> attndsl.Attention:
    return attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc {TEXTS[name]} }}")


IN_KERNELS = ("moba", "rest", "rows")


@pytest.mark.parametrize(("name", "backend"), [
    *((name, "cpu") for name in TEXTS), *((name, "triton") for name in IN_KERNELS),
])  # fmt: skip
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
        rows = attn.program.selection(key).rows
        assert rows is not None
        # 20 and 3 tokens lie before it.
        before = 23 if rows == 1 else -(-20 // rows) + -(-3 // rows)
        found = plans[key][:1, :, before : before + plan.shape[2]]
        torch.testing.assert_close(found[..., : plan.shape[3]], plan)
        assert (found[..., plan.shape[3] :] == (0 if plan.dtype == torch.uint8 else -1)).all()


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(("entry", "keys"), [((3, 2), 4), ((2, 3), 4), ((8, 8), 3), ((4, 4), 8), ((5, 5), 1)])
def test_entries_give_members_their_shares(entry: tuple[int, int], keys: int, largest: bool) -> None:
    (size, stride), length = entry, torch.tensor([11, 3, 1, 0])
    count, entries = -(-11 // keys), -(-11 // stride)
    masses = torch.rand(1, 2, 4, entries, dtype=torch.float64)
    wanted = masses.new_zeros(1, 2, 4, count)
    for r, m, j in itertools.product(range(4), range(count), range(entries)):
        tokens = range(j * stride, min(j * stride + size, int(length[r])))
        inside = sum(t // keys == m for t in tokens)
        if inside:
            share = masses[:, :, r, j] * inside / len(tokens)
            so_far = wanted[:, :, r, m]
            wanted[:, :, r, m] = torch.maximum(so_far, share) if largest else so_far + share
        if not tokens:
            masses[:, :, r, j] = 0
    found = to_members(masses, entry, (keys, count), length.view(1, 1, 4, 1), largest)
    torch.testing.assert_close(found, wanted)


# Inputs over blocks hold those of each document, one document after the other.
OF_BLOCKS = {
    "x : float[b, h, q/4, k/8] learnable": "attend causal { score s + x[q // 4, k // 8] }",
    "x : float[b, k/8] learnable": "attend { k // 8 < q // 8 or k == q } { score s + x[q // 8 - 1] }",
    "x : bool[b, q/8, k/4]": "attend causal & { x[q // 8, k // 4] or q == k }",
    "x : float[b, h, q/8, k/4]": "attend causal & top(2, blocks(4), per = rows(8), by = x)",
    "x : float[b, g, k/4, D]": "attend causal & top(2, blocks(4), share = group, by = dot(Q, x))",
    "x : float[b, h, q/8, D]": "attend causal & top(2, blocks(4), per = rows(8), by = dot(x, mean(K)))",
    "x : blocks(4)[b, h, q/8]": "attend causal & x",
    "x : float[b, g, k/4, D] learnable": "attend causal & window(3), causal - window(3) over given(x, x, 4, 4)",
    "x : float[b, q/4] learnable": "far = attend causal near = attend causal & window(3) output x[q // 4] * far + near",
}


@pytest.mark.parametrize("declared", OF_BLOCKS)
def test_inputs_over_blocks(declared: str) -> None:
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k] input {declared} packed doc {OF_BLOCKS[declared]} }}")
    decl, sizes = attn.program.input("x"), {"b": 2, "h": 4, "g": 2, "q": 48, "k": 48, "D": 16, "const": 3}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn([sizes.get(dim.axis.value, 3) for dim in decl.dims], generator=generator, dtype=torch.float64)
    if decl.members:
        x = torch.arange(3).expand(x.shape)
    x = x > 0 if decl.type.value == "bool" else x.requires_grad_(decl.learnable)
    for rows in (48, 29):
        leaves = [y.requires_grad_() for y in tensors(rows, 48, seed=3)] + ([x] if decl.learnable else [])
        out, wanted = attn(*leaves[:3], doc=DOC, x=x), attn.reference(*leaves[:3], doc=DOC, x=x)
        torch.testing.assert_close(out, wanted, atol=1e-10, rtol=1e-10)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        found, right = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, wanted))
        torch.testing.assert_close(found, right, atol=1e-9, rtol=1e-9)


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
        EntrySelector(attn._key, program, selection, shape, q.device, [DOC], select_source, q.dtype)(q, k, [DOC], []),
        DocumentSelector(attn._key, program, selection, shape, q.device, [DOC])(q, k, [DOC], []),
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
        made(q, k, [DOC], [], None, ([keys], lse))
        for made in (
            EntrySelector(attn._key, program, selection, shape, q.device, [DOC], select_source, q.dtype),
            DocumentSelector(attn._key, program, selection, shape, q.device, [DOC]),
        )
    ]
    torch.testing.assert_close(*found)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many numbers the largest tensor has that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.most = max(self.most, found.numel())
        return found


@pytest.mark.parametrize("view", ["", "over pool(mean, 4)"])
def test_memory_of_masses_is_that_of_strips(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a short document is given the vectors of all its document's tokens: so many rows at once."""
    monkeypatch.setitem(STRIP, "cpu", 1 << 14)
    text = f"x = attend causal {view} y = attend causal & top(2, blocks(32), by = probs(x)) output x + y"
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc {text} }}")
    (selection,) = attn.program.selections
    program, shape = of_selection(attn.program, selection), CallShape(2, 4, 2, 128, 128, 16, 16)
    q, k, _ = tensors(128, 128)
    doc, state = torch.arange(128).expand(2, -1) // 40, ([k], torch.ones(2, 4, 128, dtype=torch.float64))
    selector = DocumentSelector(attn._key, program, selection, shape, q.device, [doc])
    with Largest() as made:  # type: ignore[no-untyped-call]
        selector(q, k, [doc], [], None, state)
    assert made.most <= max(1 << 14, q.numel())


def test_a_plan_that_is_handed_in() -> None:
    """`input p : blocks(4)[b, q]` counts blocks of each row's document."""
    attn = attndsl.compile(
        "attention a { input doc : int[b, k] input p : blocks(4)[b, q] packed doc attend causal & p }"
    )
    q, k, v = tensors(48, 48)
    p = torch.tensor([0, 2, -1]).expand(2, 48, 3)
    out = attn(q, k, v, doc=DOC, p=p)
    torch.testing.assert_close(out, attn.reference(q, k, v, doc=DOC, p=p), atol=1e-10, rtol=1e-10)


# Rows that are gathered by what they chose, and the heads of a group over one list.
LISTED = {
    "gathered": ("attend causal & top(2, blocks(16), by = dot(Q, mean(K)), always = same_block(16))", 4, 2),
    "of a group": ("attend causal & top(1, blocks(16), share = group, by = dot(Q, mean(K)))", 8, 1),
    "handed in": ("input p : blocks(16)[b, h, q] attend causal & p", 2, 2),
}


@interprets
@pytest.mark.parametrize("name", LISTED)
def test_blocks_that_are_chosen_are_listed(name: str) -> None:
    """As the blocks of the call that hold a part of them, wherever documents begin; wild entries are skipped."""
    text, heads, kv_heads = LISTED[name]
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc {text} }}")
    spec = replace(make_spec("sm_90", "triton", heads, kv_heads, 16), lists=True)
    (plan,) = forward_plans(attn.program, spec)
    assert any(isinstance(d.derivation, CallMembers) for d in plan.program.inputs)
    leaves = [x.float().requires_grad_() for x in tensors(29, 48, heads, kv_heads, seed=3)]
    given: dict[str, Any] = {}
    if name != "handed in":
        given = {"plans": attn.plan(*leaves[:2], doc=DOC)}
    else:
        made = torch.randint(-2, 5, (2, 2, 29, 4), generator=torch.Generator().manual_seed(2)).sort(-1).values
        given = {"p": made.index_fill(3, torch.tensor([1]), 1 << 29)}
    right = [x.detach().double().requires_grad_() for x in leaves]
    out, wanted = attn(*leaves, doc=DOC, backend="triton", **given), attn.reference(*right, doc=DOC, **given)
    torch.testing.assert_close(out.double(), wanted, atol=2e-4, rtol=2e-4)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    found, sure = (torch.autograd.grad((x * weight).sum(), y) for x, y in ((out, leaves), (wanted, right)))
    for x, y in zip(found, sure, strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-3, rtol=2e-4)


@interprets
@pytest.mark.parametrize("name", ["gathered", "of a group"])
def test_other_blocks_are_not_looked_at(name: str) -> None:
    """Values there may be anything: a tile that is masked would spread them."""
    text, heads, kv_heads = LISTED[name]
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc {text} }}")
    doc = (torch.arange(96) >= 48).to(torch.int32).expand(2, 96)
    q, k, v = (x.float() for x in tensors(96, 96, heads, kv_heads))
    v[:, :, 16:48] = v[:, :, 64:] = torch.nan
    shape = next(iter(attn.plan(q, k, doc=doc).values())).shape
    plan = torch.zeros(*shape[:3], 1, dtype=torch.int32)
    out = attn(q, k, v, doc=doc, backend="triton", plans={attn.program.selections[0].name: plan})
    assert out.isfinite().all()


def test_which_blocks_of_a_call_hold_what_is_chosen() -> None:
    ids, shape = torch.tensor([[0] * 5 + [1] * 11]), CallShape(1, 1, 1, 16, 16, 8, 8)
    plan = torch.tensor([0, 2, 2, 9, 1]).expand(1, 1, 16, 5)
    found = call_members(plan, ids, 4, shape, 0)
    # Of the first document, of 5 tokens, and of the second, whose blocks of 4 begin with tokens 5, 9 and 13.
    assert found[0, 0, 0].tolist() == [0, 0] + [-1] * 8
    assert found[0, 0, 15].tolist() == [1, 2, 3, 3] + [-1] * 6


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_decode_reads_blocks_of_documents(backend: str) -> None:
    """Of several short documents more blocks lie before a row than its position has."""
    attn = attndsl.compile("""attention a { input doc : int[b, k] input m : bool[b, q/4, k/8]
        packed doc attend causal & { m[q // 4, k // 8] or k == q } }""")
    doc = torch.tensor([[0] * 3 + [1] * 5 + [2] * 9 + [3] * 31, [2] * 10 + [3] * 3 + [4] * 35])
    q, k, v = (x.float() for x in tensors(1, 48))
    m = torch.rand(2, 48, 48, generator=torch.Generator().manual_seed(1)) < 0.5
    out = attn.decode(q, k, v, torch.tensor([48, 40], dtype=torch.int32), doc=doc, m=m, backend=backend)
    for b, n in enumerate((48, 40)):
        own = slice(b, b + 1)
        wanted = attn.reference(q[own], k[own, :, :n], v[own, :, :n], doc=doc[own, :n], m=m[own, :n, :n])
        torch.testing.assert_close(out[own].double(), wanted, atol=1e-5, rtol=1e-5)


def test_too_many_to_compete() -> None:
    text = "attend causal & cover(0.3, blocks(8), by = dot(Q, mean(K)), compete = head, at_most = 4)"
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k] packed doc {text} }}")
    (selection,) = attn.program.selections
    program, shape = of_selection(attn.program, selection), CallShape(1, 2, 2, 32768, 32768, 8, 8)
    with pytest.raises(PatternError, match="A577"):
        DocumentSelector(attn._key, program, selection, shape, torch.device("cpu"), [DOC])
