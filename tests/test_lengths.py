"""`lengths` and `packed` around views, branches, grids and selections: each sequence means what it means alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
from attndsl.codegen.triton_select import select_source
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.program import CallShape
from attndsl.runtime.select import Selector
from attndsl.select_plan import why_not_fused
from tests.accuracy import examples
from tests.cases import case, floats, ints
from tests.gpu import interprets
from tests.gradients import judge
from tests.strategies import Case
from tests.test_backward_cpu import runner as cpu
from tests.test_backward_triton import runner as triton
from tests.test_routed import FUSED, PATTERN_SELECTIONS, check
from tests.test_routed import tensors as doubles
from tests.test_select import CPU, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
]
DOC = np.repeat(ints(0, 2, 2, 15), 5, axis=1)  # not sorted: equal ids apart are different documents
N = np.array([75, 41], np.int32)


def padded(clauses: str, rows: int = 75, n: Any = N, **more: Any) -> Case:
    declared = " ".join(f"input {name} : {kind}" for name, (kind, _) in more.items())
    text = f"attention a {{ input n : int[b] {declared} lengths n {clauses} }}"
    return case(text, rows, 75, inputs={"n": n} | {name: x for name, (_, x) in more.items()})


def packed(clauses: str, rows: int = 50, **more: Any) -> Case:
    declared = " ".join(f"input {name} : {kind}" for name, (kind, _) in more.items())
    text = f"attention a {{ input doc : int[b, k] {declared} packed doc {clauses} }}"
    return case(text, rows, 75, inputs={"doc": DOC} | {name: x for name, (_, x) in more.items()})


CASES: dict[str, Case] = {
    "grid": padded("axes y, x[8] attend neighborhood(5) on (y, x)"),
    "grid_of_tiles": padded(
        "axes t, y[4], x[4] from 5 in tiles(1, 2, 2) attend causal & neighborhood(3) on (t, y, x) | off_grid",
        50, np.array([75, 33]),
    ),
    "grid_of_known_size": padded("axes y[8], x[8] from 5 attend neighborhood(5) on (y, x) | off_grid"),
    "coarsened": padded("attend causal & coarsen({ abs(Nk - 5 - k - q) < 6 }, (5, 7), any)", 50),
    "grid_of_blocks": padded(
        "axes t, y[4], x[3] attend neighborhood(3) on blocks(2) on x & causal | neighborhood(3) on blocks(2) on t"
    ),
    "coarsened_all": padded("attend coarsen({ k <= q + 9 }, (5, 7), all)", 50),
    "coarsened_blocks": padded("attend coarsen({ k <= q + 2 }, (2, 3), all) on blocks(4)", 50, np.array([74, -1])),
    # Most values of `order` lie past the second sequence's last token.
    "coarsened_on": padded(
        "attend coarsen(same_block(3), 8, fraction(0.3)) on order", n=np.array([75, 3], np.int32),
        order=("int[k]", (np.arange(75, dtype=np.int32) * 32 + 40) % 75),
    ),
    "coarsened_from_its_start": padded("align start attend coarsen({ k <= q + 2 }, (7, 5), fraction(0.4))", 50),
    "random": padded(
        "attend random(2, blocks(8), rows(6), 3, among = all) | window(3) | random(1, tokens, query, h, among = causal)"
    ),
    "random_keys": padded("attend causal & random(7, tokens, head, 3)", 50, np.array([99, 1])),
    "packed_grid": packed("axes y, x[3] attend neighborhood(3) on (y, x)"),
    "packed_pictures": packed("axes y[3], x[3] from 1 attend neighborhood(3) on (y, x) | off_grid & causal", 75),
    "packed_bias": packed(
        "axes y, x[3] score s + w[h, clamp(q.y - k.y, -4, 4) + 4] attend { q.x <= k.x } & causal",
        w=("float[h, 9] learnable", floats(2, 9)),
    ),
    "both": packed(
        "lengths n axes y, x[2] attend causal on y & all on x | { k == Nk - 1 } on y", n=("int[b]", np.array([33, 68]))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_on_the_cpu(name: str) -> None:
    judge(cpu(), CASES[name], torch.float64)


@pytest.mark.parametrize(
    "name", ["grid", "grid_of_tiles", "coarsened_all", "coarsened_blocks", "random", "packed_grid", "both"]
)
def test_gradients_in_triton(name: str) -> None:
    judge(triton(), CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["grid", "coarsened_all", "packed_grid", "random"])
@pytest.mark.parametrize(("rows", "k_len"), [(1, 1), (1, 50), (29, 29)])
def test_other_sizes(name: str, rows: int, k_len: int) -> None:
    chosen = CASES[name]
    inputs = {key: x[:, :k_len] if key == "doc" else np.minimum(x, k_len - 1) for key, x in chosen.inputs.items()}
    judge(cpu(), replace(chosen, inputs=inputs, shape=replace(chosen.shape, rows=rows, k_len=k_len)), torch.float64)


# ------------------------------------------------------------------------------- branches and views

SHARED = "input gate : float[b, h, q, 2]\n output gate[0] * near + sigmoid(gate[1]) * far"


def test_packed_branches_are_those_of_each_document() -> None:
    body = "near = attend causal & window(5)\n far = attend { k >= Nk - 9 and k <= q }"
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k]\n packed doc\n {body}\n {SHARED} }}")
    alone = attndsl.compile(f"attention a {{ {body}\n {SHARED} }}")
    doc = torch.tensor([0] * 20 + [1] * 3 + [0] * 40)[None]
    q, k, v = (torch.randn(1, 2, 63, 16) for _ in range(3))
    gate = torch.randn(1, 2, 63, 2)
    out = attn(q, k, v, doc=doc, gate=gate)
    torch.testing.assert_close(out.double(), attn.reference(q, k, v, doc=doc, gate=gate), atol=1e-5, rtol=1e-5)
    for low, end in ((0, 20), (20, 23), (23, 63)):
        at = slice(low, end)
        own = alone(q[:, :, at], k[:, :, at], v[:, :, at], gate=gate[:, :, at])
        torch.testing.assert_close(out[:, :, at], own)


VIEWS = (
    "attend causal over pool({f}, 8, 4)",
    "attend causal & window(9), causal over pool({f}, 8, visible = any)",
    "attend {{ k > q - 20 }} over pool({f}, 5{counted})",
    "x = attend causal over pool({f}, 4)\n y = attend causal & window(3)\n output merge(x, y)",
)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_lengths_past_32_bits(backend: str) -> None:
    attn = attndsl.compile(f"attention a {{ input n : int[b]\n lengths n\n {VIEWS[3].format(f='mean')} }}")
    q, k, v = (torch.randn(2, 2, 13, 8) for _ in range(3))
    n = torch.tensor([2**40, -(2**40)])
    found = attn(q, k, v, n=n, backend=backend)
    torch.testing.assert_close(found.double(), attn.reference(q, k, v, n=n), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("clauses", "f", "backend"), [
    *((clauses, f, "cpu") for clauses in VIEWS for f in ("mean", "max", "min", "sum")),
    (VIEWS[0], "max", "triton"), (VIEWS[1], "min", "triton"), (VIEWS[2], "mean", "triton"), (VIEWS[3], "sum", "triton"),
])  # fmt: skip
def test_views(clauses: str, f: str, backend: str) -> None:
    """Entries are of the tokens that are present alone, their gradients too, and what is not there reaches nothing."""
    text = clauses.format(f=f, counted=", counted")
    attn = attndsl.compile(f"attention a {{ input n : int[b]\n lengths n\n {text} }}")
    alone = attndsl.compile(f"attention a {{ {text} }}")
    n, dtype = [37, 22, 0], torch.float64 if backend == "cpu" else torch.float32
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(3, 2, 37, 16, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]
    weight = torch.randn(3, 2, 37, 16, generator=generator, dtype=dtype)
    out = attn(*leaves, n=torch.tensor(n), backend=backend)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    for b, length in enumerate(n):
        own = [x.detach()[b : b + 1, :, :length].requires_grad_() for x in leaves]
        expected = alone.reference(*own)
        gradients = torch.autograd.grad((expected * weight[b : b + 1, :, :length]).sum(), own)
        bound = 1e-9 if backend == "cpu" else 2e-4
        torch.testing.assert_close(out[b : b + 1, :, :length].double(), expected, atol=bound, rtol=bound)
        assert not out[b, :, length:].any()
        for x, y in zip(found, gradients, strict=True):
            torch.testing.assert_close(x[b : b + 1, :, :length].double(), y.double(), atol=bound, rtol=bound)
            assert not x[b, :, length:].any()


IDS = torch.tensor([[0] * 5 + [1] * 3 + [0] * 4 + [2] * 25, [3] * 21 + [1] * 16])
BESIDE = {
    "queries": "attend { k // 4 != q // 4 } over pool(max, 3) from pool(mean, 4)",
    "queries_of_tokens": "attend causal from pool(sum, 5)",
    "two_levels": "x = attend all over pool(mean, 24, 12)\n y = attend causal within blocks(16) with probs(x) output y",
    "segments": "input ids : int[b, k]\n attend causal & window(3), all over pool(max, segments(ids), counted)",
    "own_segment": "input ids : int[b, k]\n attend { ids[q] == ids[k] } over pool(mean, segments(ids))",
    "picked": "input picked : int[b, g, k/4]\n attend { k != q } over pick(picked, weight = Nk / 4)",
}


@pytest.mark.parametrize(("name", "backend"), [
    *((name, "cpu") for name in BESIDE), ("queries", "triton"), ("segments", "triton"), ("picked", "triton"),
])  # fmt: skip
def test_beside_what_looks_at_all_tokens(name: str, backend: str) -> None:
    """Classes of rows, members, segments and listed tokens are those of what is present."""
    attn = attndsl.compile(f"attention a {{ input n : int[b]\n lengths n\n {BESIDE[name]} }}")
    dtype = torch.float64 if backend == "cpu" else torch.float32
    generator = torch.Generator().manual_seed(3)
    picked = torch.randint(-1, 38, (2, 2, 10), generator=generator)
    given = {key: x for key, x in (("ids", IDS), ("picked", picked)) if key in BESIDE[name]}
    for rows in (37, 15) if backend == "cpu" else (29,):
        shapes = ((4, rows), (2, 37), (2, 37))
        leaves = [torch.randn(2, *size, 16, generator=generator, dtype=dtype).requires_grad_() for size in shapes]
        right = [x.detach().double().requires_grad_() for x in leaves]
        more: dict[str, Any] = {"n": torch.tensor([37, 26]), **given}
        found, wanted = attn(*leaves, backend=backend, **more), attn.reference(*right, **more)
        bound = 1e-9 if backend == "cpu" else 2e-4
        torch.testing.assert_close(found.double(), wanted, atol=bound, rtol=bound)
        weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
        gradients = (torch.autograd.grad((x * weight).sum(), y) for x, y in ((found, leaves), (wanted, right)))
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x.double(), y, atol=10 * bound * max(1.0, float(y.abs().max())), rtol=bound)


@pytest.mark.parametrize(
    "view", ["over pool(mean, 8)", "over pool(mean, 8, 4)", "& window(9), causal over pool(max, 5)"]
)
@pytest.mark.parametrize("wanted", ["sum, head, tokens", "max, rows(16), blocks(16)", "sum, query, blocks(32)"])
def test_what_is_observed_of_present_entries(view: str, wanted: str) -> None:
    text = f"x = attend causal {view}\n observe m = probs(x, {wanted})\n output x"
    attn = attndsl.compile(f"attention a {{ input n : int[b]\n lengths n\n {text} }}")
    for rows in (48, 31):
        q, k, v = doubles(rows, 48)
        (_, found), (_, right) = (
            f(q, k, v, n=torch.tensor([48, 29]), return_observed=True) for f in (attn, attn.reference)
        )
        torch.testing.assert_close(found["m"].double(), right["m"], atol=1e-9, rtol=1e-9)


def test_what_is_skipped_of_present_tokens() -> None:
    attn = attndsl.compile("attention a { input n : int[b]\n lengths n\n attend causal skip below 0.4 }")
    whole = attndsl.compile("attention a { input n : int[b]\n lengths n\n attend causal }")
    for rows in (200, 150):
        q, k, v = (2 * x for x in doubles(rows, 200))
        n = torch.tensor([200, 137])
        out = attn(q, k, v, n=n)
        torch.testing.assert_close(out, attn.reference(q, k, v, n=n), atol=1e-9, rtol=1e-9)
        assert not torch.allclose(out, whole(q, k, v, n=n))


# -------------------------------------------------------------------------------------- selections


@examples(25)
@given(PATTERN_SELECTIONS, st.integers(1, 26), st.integers(0, 99))
def test_what_is_chosen_of_present_tokens(selection: str, k_len: int, seed: int) -> None:
    """Against the oracle, which chooses in each sequence alone."""
    text = f"attention a {{ input n : int[b]\n lengths n\n attend causal & {selection} }}"
    rows = k_len if seed % 2 else seed % k_len + 1
    n = torch.tensor([max(0, k_len - seed % 7), (seed * 5) % (k_len + 2)])
    check(text, *doubles(rows, k_len, seed=seed), n=n)


@interprets
@pytest.mark.parametrize("text", FUSED)
def test_the_fused_kernel_chooses_as_strips_do(text: str) -> None:
    program = load(f"attention a {{ input n : int[b]\n lengths n\n attend {text} }}").program
    program = replace(program, inputs=tuple(decl for decl in program.inputs if decl.members is None))
    shape, (selection,) = CallShape(3, 4, 2, 29, 40, 16, 16), program.selections
    assert not why_not_fused(program, selection, (4, 2))
    q, k = tensors(shape, 1, torch.float32)
    values = [torch.tensor([40, 17, 0], dtype=torch.int32)]
    fused = Selector(program, selection, shape, CPU, values, select_source)(q, k, values, [])
    strips = Selector(program, selection, shape, CPU, values)(q, k, values, [])
    # Rows that are not present choose nothing that is attended to.
    torch.testing.assert_close(fused, strips)


def test_a_mass_is_that_of_present_tokens() -> None:
    text = """attention nsa { input n : int[b]
    lengths n
    summary = attend causal over pool(mean, 4)
    picked = attend causal & top(2, blocks(8), by = probs(summary), share = group, always = same_block(8))
    output summary + picked }"""
    check_output(text, 33, n=torch.tensor([33, 18]))


def check_output(text: str, n_tokens: int, **inputs: Any) -> None:
    attn = attndsl.compile(text)
    q, k, v = doubles(n_tokens, n_tokens)
    torch.testing.assert_close(attn(q, k, v, **inputs), attn.reference(q, k, v, **inputs), atol=1e-9, rtol=1e-9)


# ----------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("clauses", "code", "named"), [
    ("packed doc attend causal over pool(mean, segments(doc)) skip below 0.1", "A907", "`skip below` over such a view"),
])  # fmt: skip
def test_what_is_refused(clauses: str, code: str, named: str) -> None:
    """By its name, and with a reason."""
    with pytest.raises(PatternError) as caught:
        load(f"attention a {{ input n : int[b] input doc : int[b, k] {clauses} }}")
    (found,) = (d for d in caught.value.diagnostics if d.code.startswith("A9"))
    assert found.code == code
    assert f"around {named} is" in found.message
    assert found.label


def test_views_say_what_they_take() -> None:
    attn = attndsl.compile("attention a { input n : int[b]\n lengths n\n attend causal over pool(mean, 4) }")
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(PatternError, match="A565"):
        attn.views(x, x)
