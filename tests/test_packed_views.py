"""Views of packed calls: entries begin anew with each document, and what they are of, data tells."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.branches import Pool, PoolFunction, Queries
from attndsl.diagnostics import PatternError
from attndsl.piece_plans import forward_plans
from attndsl.runtime.pick import summed
from attndsl.runtime.row_classes import queries_of_documents
from attndsl.runtime.runs import document_entries, entries_of_heads, pooled_runs
from attndsl.targets import make_spec
from tests.gpu import interprets
from tests.gradients import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

# Equal ids apart are different documents; one entry of the batch is one document.
DOC = torch.tensor([[4] * 20 + [1] * 3 + [4] * 9 + [7, 8] + [0] * 14, [5] * 48])
DECLARED = {
    "doc": "int[b, k]", "n": "int[b]", "role": "int[b, q]", "sinks": "float[h] learnable", "part": "int[b, g, k]",
    "word": "int[k]", "mark": "bool[b, k]", "of_rows": "bool[b, q/4]", "some": "int[b, g, 9]", "few": "int[5]",
    "weighs": "float[g, 5]", "each": "int[g, k/3]", "heavy": "float[b, g, k/3]",
}  # fmt: skip
BODIES = [
    "attend causal over pool(mean, 8) { softmax with sink sinks[h] }",
    "attend causal over pool(max, 8, 4)",
    "attend causal over pool(sum, 3, 5)",
    "attend causal & window(9), causal - window(9) over pool(mean, 5, counted)",
    "attend { k > q - 20 } over pool(mean, 5, counted) { score softcap(s, 2.0) }",
    "lengths n attend causal & window(9), causal over pool(min, 8, 2, visible = any)",
    "attend { q // 4 - k // 4 > 1 and k < Nk - 3 } over pool(mean, 4) { weights sigmoid(s) }",
    "lengths n attend { k // 4 * 4 == Nk // 8 * 4 or role[q] == 1 and k // 8 < 2 } over pool(mean, 4, counted)",
    "attend (causal on blocks(4)) over pool(mean, 2), causal & { role[q] != 2 } over pool(max, 7)",
    "far = attend causal over pool(mean, 4) near = attend causal & window(4) output merge(far, near)",
    # Segments end with their document, wherever equal ids go on.
    "attend causal & window(9), causal - window(9) over pool(mean, segments(part), counted)",
    "lengths n attend ~(window(5) | sink(3)) & { Nk - k > 2 } over pool(max, segments(word), counted)",
    "attend ~({ q < 2 } on segment(part)) & { mark[k] } over pool(min, segments(part)) { weights sigmoid(s) }",
    "attend coarsen(window(6), 4, any) over pool(sum, segments(word)), causal over pool(mean, 4)",
    # Classes of queries begin with their document too.
    "lengths n attend causal & window(9) from pool(max, 4) { softmax with sink sinks[h] }",
    "attend { of_rows[q // 4] and k // 4 < q // 4 } over pool(mean, 2, counted) from pool(min, 2)",
    "attend { mark[k] } & causal over pool(mean, segments(word)) from pool(sum, 5)",
    "c = attend causal over pool(mean, 4) from pool(mean, 8) f = attend causal within blocks(4) with probs(c) output f",
    # Listed tokens count from the document's first; one that it lacks is skipped, and one listed twice counts twice.
    "lengths n attend causal & window(5), causal - window(5) over pick(some, weight = Nk / 4)",
    "attend { mark[k] or k == q } over pick(few, weight = weighs), ~causal over pick(few) { score softcap(s, 2.0) }",
    "lengths n attend causal over pick(each, weight = heavy)",
    "attend causal over pick(some) from pool(mean, 4) { weights sigmoid(s) }",
]
# heads, key heads, rows, keys, D, Dv
SHAPES = [(4, 2, 48, 48, 16, 16), (1, 1, 31, 48, 80, 24), (2, 2, 1, 1, 16, 16), (2, 1, 1, 33, 16, 16)]


def compiled(body: str) -> attndsl.Attention:
    written = "".join(f"input {name} : {kind}\n" for name, kind in DECLARED.items() if name in f"{body} doc")
    return attndsl.compile(f"attention a {{\n{written} packed doc\n{body}\n}}")


def judge(body: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str, dropout: float = 0.0) -> None:
    """Output, lse and gradients are the oracle's, which asks of each document alone."""
    heads, kv_heads, rows, tokens, dim, v_dim = shape
    attn = compiled(body)
    generator = torch.Generator().manual_seed(3)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    leaves = [drawn(2, heads, rows, dim), drawn(2, kv_heads, tokens, dim), drawn(2, kv_heads, tokens, v_dim)]
    role = torch.arange(2 * rows).view(2, -1) % 3
    made = {"doc": DOC[:, :tokens], "n": torch.tensor([min(tokens, 41), 40]), "role": role}
    of_heads = torch.rand(2, kv_heads, tokens, generator=torch.Generator().manual_seed(4))
    made |= {"part": (of_heads < 0.2).cumsum(-1) % 3, "word": torch.arange(tokens) // 7, "mark": of_heads[:, 0] < 0.8}
    made["of_rows"] = of_heads[:, -1] < 0.6  # Of each document's own blocks.
    if "sinks" in body:
        leaves.append(drawn(heads))
    listing = torch.Generator().manual_seed(6)
    made |= {"some": torch.randint(-1, 12, (2, kv_heads, 9), generator=listing), "few": torch.tensor([0, 3, 3, 0, 3])}
    made |= {"weighs": torch.randn(kv_heads, 5, generator=listing), "each": torch.arange(kv_heads * tokens) % 5 - 1}
    made |= {"heavy": torch.rand(2, kv_heads, tokens, generator=listing), "each": made["each"].view(kv_heads, tokens)}
    lse = "weights" not in body
    more: dict[str, Any] = {"dropout": dropout, "seed": 3} if dropout else {}

    def run(leaves: list[Tensor], oracle: bool) -> tuple[list[Tensor], list[Tensor]]:
        q, k, v = leaves[:3]
        given: dict[str, Any] = {decl.name: made[decl.name] for decl in attn.program.inputs if decl.name in made}
        real = leaves[0].dtype
        given = {name: x.to(real) if x.is_floating_point() else x for name, x in given.items()}
        given |= {**more, **({"sinks": leaves[3]} if len(leaves) > 3 else {})}
        if oracle:
            found = attn.reference(q, k, v, return_lse=lse, **given)
        else:
            found = attn(q, k, v, return_lse=lse, backend=backend, **given)
        outs, loss = list(found) if lse else [found], torch.zeros((), dtype=torch.float64)
        for x in outs:
            weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
            loss = loss + torch.where(x == -torch.inf, 0.0, x.double() * weight).sum()
        return outs, list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    ours, given = run(leaves, False)
    right, wanted = run([x.detach().double().requires_grad_() for x in leaves], True)
    for x, y in zip(ours, right, strict=True):
        torch.testing.assert_close(x.double(), y, atol=10 * TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])
    for x, y in zip(given, wanted, strict=True):
        largest = max(float(y.abs().max()), 1.0)
        assert float((x.double() - y).abs().max()) <= 5 * TOLERANCE[dtype] * largest


@pytest.mark.parametrize("body", BODIES)
def test_cpu(body: str) -> None:
    for shape in SHAPES:
        judge(body, shape, torch.float64, "cpu")


def test_what_sees_an_entry_is_written_in_32_bits() -> None:
    """Of blocks of positions, differences that no two positions have are left out."""
    for shape in SHAPES[::3]:
        judge("attend { is_power_of_two(q // 8 - k // 8) } over pool(mean, 4)", shape, torch.float64, "cpu")


@pytest.mark.parametrize("body", BODIES)
def test_triton(body: str) -> None:
    judge(body, SHAPES[len(body) % 2], torch.float32, "triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_dropout(backend: str) -> None:
    """Entries draw by their number among those of the batch entry."""
    dtype = torch.float64 if backend == "cpu" else torch.float32
    for at in (1, 3, 10, 19, 20) if backend == "cpu" else (3, 20):
        judge(BODIES[at], SHAPES[0], dtype, backend, dropout=0.4)


# ------------------------------------------------------------------------------------------ entries


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (4, 4), (5, 2), (2, 5), (64, 64)])
def test_entries_lie_one_document_after_the_other(size: int, stride: int) -> None:
    """Against a loop over documents and their entries."""
    present = torch.tensor([30, 48])
    runs, document = document_entries(DOC.to(torch.int32), size, stride, present)
    for b in range(2):
        ids, found = DOC[b].numpy(), []
        begins = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), 48]
        for low, high in pairwise(begins):
            found += [(x, min(x + size, high, int(present[b])), low) for x in range(low, high, stride)]
        rows = list(zip(runs.first[b].tolist(), runs.end[b].tolist(), document[b].tolist(), strict=True))
        assert rows[: len(found)] == found
        assert set(rows[len(found) :]) <= {(48, 48, 48)}
        last = [max(i for i, (first, _, _) in enumerate(found) if first <= token) for token in range(48)]
        assert runs.number[b].tolist() == last


@pytest.mark.parametrize("function", PoolFunction)
@pytest.mark.parametrize(("size", "stride"), [(4, 4), (5, 2), (2, 5)])
def test_pooling_by_kernels(function: PoolFunction, size: int, stride: int) -> None:
    """Entries and gradients are those of torch, ties included."""
    attn = attndsl.compile("causal")
    pool = Pool(function, size, stride, packed="doc")
    x = torch.randint(-3, 4, (2, 2, 48, 16), generator=torch.Generator().manual_seed(1)).float()
    runs = entries_of_heads(DOC.to(torch.int32), pool, 2, 2, torch.tensor([30, 48]))
    passed, found = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), []
    for backend in ("cpu", "triton"):
        leaf = x.clone().requires_grad_()
        out = pooled_runs(attn._key, leaf, pool, runs, backend)
        found.append((out.detach(), *torch.autograd.grad((out * passed).sum(), leaf)))
    torch.testing.assert_close(*found)


def test_entries_of_other_documents_are_not_visited() -> None:
    """Tiles end where the documents of their rows do, and with the last entry that a row sees."""
    program = attndsl.compile("attention a { input doc : int[b, k] packed doc attend causal over pool(mean, 8) }")
    (own,) = program._composition.programs
    (plan,) = forward_plans(own, make_spec("sm_90", "triton", 2, 2, 64))
    names = [decl.name for decl in plan.program.inputs if decl.derivation]
    assert names == [
        "first_doc", "entry_first_doc", "entry_document_doc", "first_doc_k_first", "first_doc_k_end",
        "entry_first_doc_k_end",
    ]  # fmt: skip
    assert len(plan.runs.full) == 1


def test_views_are_made_of_documents() -> None:
    attn = attndsl.compile("attention a { input doc : int[b, k] packed doc attend causal over pool(mean, 8) }")
    q, k, v = (torch.randn(2, 2, 48, 16, dtype=torch.float64) for _ in range(3))
    views = attn.views(k, v, doc=DOC)
    (keys, _) = views["pool(mean, 8)"]
    torch.testing.assert_close(keys[0, :, :4], torch.stack([k[0, :, x].mean(1) for x in (
        slice(0, 8), slice(8, 16), slice(16, 20), slice(20, 23)
    )], 1))  # fmt: skip
    torch.testing.assert_close(attn(q, k, v, doc=DOC, views=views), attn.reference(q, k, v, doc=DOC))


def test_views_are_made_of_segments_of_documents() -> None:
    attn = attndsl.compile("""attention a { input doc : int[b, k] input word : int[k] packed doc
                           attend causal over pool(mean, segments(word)) }""")
    q, k, v = (torch.randn(2, 2, 48, 16, dtype=torch.float64) for _ in range(3))
    given: dict[str, Any] = {"doc": DOC, "word": torch.arange(48) // 7}
    views = attn.views(k, v, **given)
    (keys, _) = views["pool(mean, segments(word))"]
    torch.testing.assert_close(keys[0, :, :5], torch.stack([k[0, :, x].mean(1) for x in (
        slice(0, 7), slice(7, 14), slice(14, 20), slice(20, 21), slice(21, 23)
    )], 1))  # fmt: skip
    torch.testing.assert_close(attn(q, k, v, views=views, **given), attn.reference(q, k, v, **given))


def test_views_are_made_of_tokens_listed_in_documents() -> None:
    """Of each document those that it has, once, in order; a mask has them at their tokens."""
    attn = attndsl.compile(
        "attention a { input doc : int[b, k] input few : int[5] packed doc attend all over pick(few) }"
    )
    q, k, v = (torch.randn(1, 1, 9, 16, dtype=torch.float64) for _ in range(3))
    given: dict[str, Any] = {"doc": torch.tensor([[0] * 4 + [1] * 3 + [2] * 2]), "few": torch.tensor([3, 0, -1, 2, 0])}
    views = attn.views(k, v, **given)
    torch.testing.assert_close(views["pick(few)"][0][0, 0, :6], k[0, 0, [0, 2, 3, 4, 6, 7]])
    torch.testing.assert_close(attn(q, k, v, views=views, **given), attn.reference(q, k, v, **given))
    seen = attn.mask(9, 9, heads=1, kv_heads=1, **given)[0]
    assert [np.flatnonzero(row).tolist() for row in seen] == [[0, 2, 3]] * 4 + [[4, 6]] * 3 + [[7]] * 2


def test_calls_without_tokens() -> None:
    attn = compiled("attend causal over pick(few, weight = weighs), causal over pool(mean, segments(word))")
    q, k, v = (torch.zeros(2, 2, 0, 16, requires_grad=True) for _ in range(3))
    made: dict[str, Any] = {"doc": DOC[:, :0], "few": torch.zeros(5).long(), "weighs": torch.ones(2, 5)}
    made |= {"word": torch.zeros(0).long(), "n": torch.zeros(2).long()}
    out = attn(q, k, v, **{decl.name: made[decl.name] for decl in attn.program.inputs})
    out.sum().backward()
    assert out.shape == q.shape and all(x.grad is not None for x in (q, k, v))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("body", ["lengths n attend causal over pick(few, weight = weighs)",
                                  "attend causal & window(3), causal over pick(few)",
                                  "attend all over pick(few) { weights sigmoid(s) }"])  # fmt: skip
def test_a_decode_lists_tokens_of_its_document(body: str, backend: str) -> None:
    attn, dtype = compiled(body), torch.float64 if backend == "cpu" else torch.float32
    q, k, v = (torch.randn(2, 2, n, 16, dtype=dtype) for n in (3, 48, 48))
    made = {"doc": DOC, "few": torch.tensor([0, 3, 3, 0, 3]), "weighs": torch.randn(2, 5, dtype=dtype)}
    made["n"] = torch.tensor([48, 29])
    given: dict[str, Any] = {decl.name: made[decl.name] for decl in attn.program.inputs}
    lengths = torch.tensor([33, 40], dtype=torch.int32)
    found = attn.decode(q, k, v, lengths, backend=backend, **given)
    for b, n in enumerate(lengths.tolist()):
        own = given | {"doc": DOC[b : b + 1, :n]} | ({"n": given["n"][b : b + 1]} if "n" in given else {})
        expected = attn.reference(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], **own)
        tolerance = 10 * TOLERANCE[dtype]
        torch.testing.assert_close(found[b : b + 1].double(), expected, atol=tolerance, rtol=tolerance)


@interprets
def test_what_counts_for_a_token_is_summed_in_order() -> None:
    """By kernels as in torch, of as many dimensions as there are."""
    attn, generator = attndsl.compile("causal"), torch.Generator().manual_seed(1)
    listed, weights = (
        torch.randint(-1, 7, (2, 2, 40), generator=generator),
        torch.randn(2, 2, 40, 1, generator=generator),
    )
    ours, right = (summed(attn._key, weights, listed, 6, kernel) for kernel in (True, False))
    torch.testing.assert_close(ours, right)


def test_queries_of_documents() -> None:
    """Of each row the function of the call's rows of its class."""
    attn = attndsl.compile("attention a { input doc : int[b, k] packed doc attend all from pool(mean, 4) }")
    for first, present in ((0, None), (7, torch.tensor([30, 48])), (-2, torch.tensor([0, 5]))):
        q = torch.randn(2, 2, 48 - first, 16, dtype=torch.float64, requires_grad=True)
        queries, tokens = Queries(PoolFunction.MEAN, 4, packed="doc"), present.int() if present is not None else None
        found = queries_of_documents(attn._key, q, queries, first, DOC, present=tokens)
        mix = torch.zeros(2, 48 - first, 48 - first, dtype=torch.float64)
        for b in range(2):
            end = 48 if present is None else int(present[b])
            begins = [0, *(np.flatnonzero(np.diff(DOC[b])) + 1).tolist(), 48]
            for low, high in pairwise(begins):
                for x in range(low, high, 4):
                    own = [i - first for i in range(x, min(x + 4, high, end)) if i >= first]
                    mix[b, own, [[i] for i in own]] = 1 / max(1, len(own))
        there = torch.arange(first, 48) >= 0
        torch.testing.assert_close(found[:, :, there], (mix[:, None] @ q)[:, :, there])
        passed = torch.where(there[:, None], torch.randn_like(found), 0)
        (given,) = torch.autograd.grad(found, q, passed)
        torch.testing.assert_close(given, mix[:, None].transpose(-1, -2) @ passed)


def test_what_is_refused() -> None:
    attn = attndsl.compile("""attention a { input doc : int[b, k] input mark : bool[b, k] packed doc
                           attend causal & { mark[k] } over pool(mean, 4) }""")
    with pytest.raises(PatternError, match="A912"):
        attn(*(torch.randn(1, 1, 8, 8) for _ in range(3)), doc=torch.zeros(1, 8).long(), mark=torch.ones(1, 8).bool())
