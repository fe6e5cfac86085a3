"""Selections of packed calls over members that are no blocks in a row, and for tiles of rows: a document's own, against
the oracle, which asks of each document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attndsl
from attndsl.program import CallShape
from attndsl.runtime import select_op
from attndsl.runtime.document_select import DocumentSelector
from attndsl.runtime.ranking import Ranking
from attndsl.selection import Selection
from tests import test_members
from tests.accuracy import examples
from tests.test_routed import PATTERNS, check, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
]
DOC = torch.tensor([[4] * 20 + [1] * 3 + [4] * 9 + [7, 8] + [0] * 14, [5] * 48])
PACKED = "input doc : int[b, k] packed doc"


def given_of(clauses: str, doc: Tensor, seed: int, wild: bool = False) -> dict[str, Any]:
    """The inputs that clauses declare, permutations being those of each document (or anything)."""
    batch, tokens = doc.shape
    found = test_members.data(clauses, CallShape(batch, 4, 2, tokens, tokens, 16, 16), seed, wild)
    generator = torch.Generator().manual_seed(seed)
    for name in ("pi", "po"):
        if name in found and not wild:
            # One for all sequences is that of the first one's documents.
            begins = torch.cat((torch.ones(batch, 1, dtype=torch.bool), doc[:, 1:] != doc[:, :-1]), 1)
            of = begins.cumsum(1)
            of = of[0] if name == "po" else of[:, None].expand(found[name].shape)
            order = (of + torch.rand(of.shape, generator=generator)).argsort(-1)
            first = torch.searchsorted(of.contiguous(), of.contiguous())
            found[name] = order - first
    return found


@examples(15)
@given(
    test_members.selections(), st.sampled_from(PATTERNS), st.integers(1, 40), st.integers(0, 99), st.booleans(),
    st.sampled_from((0.05, 0.2, 0.6)),
)  # fmt: skip
def test_what_is_chosen_in_documents(
    made: tuple[str, str], pattern: str, k_len: int, seed: int, wild: bool, often: float
) -> None:
    (text, clauses), rows = made, k_len if seed % 2 else seed % k_len + 1
    begins = torch.rand(2, k_len, generator=torch.Generator().manual_seed(seed)) < often
    doc = begins.cumsum(1) % 3
    inputs, more = given_of(clauses, doc, seed, wild), ""
    if seed % 3 == 0:
        more = "input n : int[b] lengths n"
        inputs["n"] = torch.tensor([max(0, k_len - seed % 7), (seed * 5) % (k_len + 2)])
    q, k, v = tensors(rows, k_len, seed=seed)
    program = f"attention a {{ {PACKED} {more} {clauses} attend {pattern.format(text)} }}"
    check(program, q, k, v, doc=doc, **inputs)


SLASH = """x = attend causal & {{ q >= Nk - 8 }}
y = attend causal & (top(3, tokens, per = head, among = causal, by = probs(x), always = sink(2))
                   | top(4, diagonals({}), per = {}, among = causal, by = probs(x{}), always = window(2)))
output y"""
# What ranks members by the probabilities of a branch, and classes that are tiles by what stands at their first tokens.
TEXTS = {
    "slash": SLASH.format(1, "head", ""),
    "diagonals of rows": SLASH.format(3, "rows(8)", ", max"),
    "diagonals of entries": "x = attend causal over pool(mean, 4, 2) "
    "y = attend causal & top(3, diagonals(4), share = group, by = probs(x)) output y",
    "largest diagonals": "x = attend causal over pool(mean, 4, 2) "
    "y = attend causal & top(3, diagonals(3), per = rows(4), by = probs(x, max)) output y",
    "tiles": "axes t, x[6] p = attend causal & window(20) "
    "y = attend causal & top(2, tiles(2, 3), per = tiles(2, 2), by = probs(p)) output y",
    "tiles of entries": "axes t, x[6] p = attend causal over pool(mean, 5) "
    "y = attend causal & cover(0.61, tiles(2, 3), per = tiles(2, 2), by = probs(p, max)) output y",
    "blocks for tiles": "axes t, x[5] from 2 attend top(2, blocks(4), per = tiles(2, 2), by = dot(mean(Q), max(K)))",
    "segments of entries": "input c : int[b, k] x = attend causal over pool(mean, 4, 2) "
    "y = attend causal & top(2, segments(c), per = rows(4), by = probs(x, max)) output y",
    "segments of all rows": "input cg : int[b, g, k] sorted x = attend causal over pool(mean, 3, counted) "
    "y = attend causal & cover(0.71, segments(cg), per = head, by = probs(x)) output y",
    "places": "input pi : int[b, h, k] x = attend causal over pool(mean, 8, counted) "
    "y = attend causal & top(2, blocks(4) on permuted(pi), per = rows(4), by = probs(x)) output y",
    "segments of each head": "input cg : int[b, g, k] sorted "
    "attend causal & top(2, segments(cg), share = heads, by = dot(Q, mean(K)), always = sink(1))",
    "places that compete": "input po : int[k] attend causal & cover(0.3719, blocks(4) on permuted(po), per = rows(8), "
    "compete = head, by = dot(mean(Q), mean(K)), always = sink(1), forced = extra)",
    "tiles that compete": "axes t, x[6] attend cover(0.3719, tiles(2, 3), per = tiles(1, 3), compete = all, "
    "share = group, normalise = minmax, among = all, by = bound(mean(Q), min(K), max(K)))",
    "read at tokens": "axes t, x[6] attend top(2, tiles(2, 3), per = tiles(2, 2), among = all, by = 0.1 * q - k % 7)",
    "twice": "input c : int[b, k] "
    "plan wide = top(3, segments(c), per = rows(4), among = causal, by = dot(mean(Q), mean(K))) "
    "attend causal & top(1, blocks(4), per = rows(4), among = causal & wide, by = dot(mean(Q), max(K)))",
    "left out": "axes t, x[6] plan far = above(0.2137, tiles(1, 3), per = rows(4), among = causal, "
    "by = dot(mean(Q), mean(K))) attend causal - far",
}


def compiled(text: str, more: str = "") -> attndsl.Attention:
    return attndsl.compile(f"attention a {{ {PACKED} {more} {text} }}")


@pytest.mark.parametrize("name", TEXTS)
def test_it_is_the_oracles(name: str) -> None:
    for rows, k_len in ((48, 48), (29, 48), (1, 1)):
        doc = DOC[:, :k_len]
        q, k, v = tensors(rows, k_len, seed=5)
        check(f"attention a {{ {PACKED} {TEXTS[name]} }}", q, k, v, doc=doc, **given_of(TEXTS[name], doc, 5))


@pytest.mark.parametrize("name", ["slash", "tiles that compete", "places", "twice"])
def test_in_triton(name: str) -> None:
    """Kernels for GPUs, interpreted: outputs and gradients."""
    attn, doc = compiled(TEXTS[name].replace("share = group, normalise", "normalise")), DOC[:1, :38]
    inputs = given_of(TEXTS[name], doc, 5)
    here = [x[:1].float().requires_grad_() for x in tensors(30, 38, seed=5)]
    right = [x.detach().double().requires_grad_() for x in here]
    plans = attn.plan(*here[:2], doc=doc, **inputs)
    found = attn(*here, doc=doc, backend="triton", plans=plans, **inputs)
    wanted = attn.reference(*right, doc=doc, plans=plans, **inputs)
    torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=2e-4)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    made, sure = (torch.autograd.grad((x * weight).sum(), y) for x, y in ((found, here), (wanted, right)))
    for x, y in zip(made, sure, strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-3, rtol=2e-4)


def test_calls_of_no_rows() -> None:
    for name in ("tiles", "segments of entries", "diagonals of rows"):
        attn, (q, k, v) = compiled(TEXTS[name]), tensors(0, 5)
        inputs = given_of(TEXTS[name], DOC[:, :5], 1)
        assert attn(q, k, v, doc=DOC[:, :5], **inputs).shape == q.shape


@pytest.mark.parametrize("name", TEXTS)
def test_plans_are_those_of_documents(name: str) -> None:
    """What a call chooses is what it is handed, in it and for the oracle; and what a document chooses alone."""
    attn, inputs = compiled(TEXTS[name]), given_of(TEXTS[name], DOC, 3)
    q, k, v = tensors(48, 48, seed=3)
    plans = attn.plan(q, k, doc=DOC, **inputs)
    out = attn(q, k, v, doc=DOC, **inputs)
    torch.testing.assert_close(attn(q, k, v, doc=DOC, plans=plans, **inputs), out)
    wanted = attn.reference(q, k, v, doc=DOC, plans=plans, **inputs)
    torch.testing.assert_close(out, wanted, atol=1e-9, rtol=1e-9)
    alone = attndsl.compile(f"attention a {{ {TEXTS[name]} }}")
    for low, end in ((0, 20), (20, 23), (23, 32), (34, 48)):
        at = slice(low, end)
        cut = {key: x[..., at] if x.dim() == 1 else x[:1, ..., at] for key, x in inputs.items()}
        own = alone.plan(*(x[:1, :, at] for x in (q, k)), **cut)
        for key, plan in own.items():
            classes = classes_of(alone.program.selection(key), low, end)
            plan, found = plan[:, :, list(classes)], plans[key][:1, :, list(classes.values())]
            width = min(plan.shape[3], found.shape[3])
            torch.testing.assert_close(found[..., :width], plan[..., :width])
            assert (found[..., width:] == (0 if plan.dtype == torch.uint8 else -1)).all()
            assert (plan[..., width:] == -1).all()


def classes_of(selection: Selection, low: int, end: int) -> dict[int, int]:
    """The row classes of a document of these tokens, and where each stands in a plan of `DOC`'s first sequence."""
    before = {0: [], 20: [20], 23: [20, 3], 34: [20, 3, 9, 1, 1]}[low]
    if selection.row_tiles is not None:
        # Of a grid of rows: each tile at its first token.
        grid, (tall, wide), found = selection.row_tiles.grid, selection.row_tiles.sizes, dict[int, int]()
        (width,) = [size for size in grid.sizes if size is not None]
        for token in range(grid.first, end - low):
            t, x = divmod(token - grid.first, width)
            found.setdefault(t // tall * -(-width // wide) + x // wide, low + token)
        return found
    if selection.rows is None:
        return {0: len(before)}
    begin = low if selection.rows == 1 else sum(-(-n // selection.rows) for n in before)
    return {i: begin + i for i in range(-(-(end - low) // selection.rows))}


@pytest.mark.parametrize("name", ["segments of each head", "blocks for tiles", "twice", "places"])
def test_shorter_ways_choose_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best found without ranking the rest, and candidates of classes that a call holds all rows of."""
    q, k, _ = (x.float() for x in tensors(48, 48, seed=5))
    inputs, found = given_of(TEXTS[name], DOC, 5), []
    for _ in range(2):
        found.append(compiled(TEXTS[name]).plan(q, k, doc=DOC, **inputs))
        monkeypatch.setattr(Ranking, "finds_best", lambda *_: False)
        monkeypatch.setattr(DocumentSelector, "_of_classes", lambda *_: None)
        select_op._KEPT.clear()
    select_op._KEPT.clear()
    torch.testing.assert_close(*found)


def test_it_is_chosen_in_a_decode() -> None:
    lengths = torch.tensor([48, 40], dtype=torch.int32)
    for name in ("slash", "tiles", "segments of each head", "places"):
        attn, inputs = compiled(TEXTS[name]), given_of(TEXTS[name], DOC, 3)
        q, k, v = tensors(3, 48, seed=3)
        out = attn.decode(q, k, v, lengths, doc=DOC, **inputs)
        for b, n in enumerate(lengths.tolist()):
            own = slice(b, b + 1)
            cut = {key: x[..., :n] if x.dim() == 1 else x[own, ..., :n] for key, x in inputs.items()}
            wanted = attn.reference(q[own], k[own, :, :n], v[own, :, :n], doc=DOC[own, :n], **cut)
            torch.testing.assert_close(out[own], wanted, atol=1e-10, rtol=1e-10)


def test_numbers_beyond_tokens() -> None:
    """Where tokens run tile by tile, a short document's members have numbers that it has no tokens for."""
    clauses = "axes y, x[8] from 0 in tiles(2, 2) input pi : int[b, h, k]\n"
    chosen = "top(1, tiles(1, 2) on permuted(pi), by = dot(Q, mean(K)), share = heads, among = causal)"
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k]\n packed doc\n {clauses} attend causal & {chosen} }}")
    for tokens in (3, 4, 7):
        generator = torch.Generator().manual_seed(tokens)
        q, k, v = (torch.randn(1, 2, tokens, 8, dtype=torch.float64, generator=generator) for _ in range(3))
        pi = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)])[None]
        values: dict[str, Any] = {"doc": torch.zeros(1, tokens, dtype=torch.int64), "pi": pi}
        assert torch.allclose(attn(q, k, v, **values), attn.reference(q, k, v, **values), atol=1e-12)
