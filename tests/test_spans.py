"""Choices of segments are attended in tiles of their tokens: outputs, gradients and lists against the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import attndsl
from attndsl.compose import compose
from attndsl.derivation import Listed
from attndsl.grammar import load
from attndsl.plan import Backend
from attndsl.program import CallShape
from attndsl.runtime.cache import KernelCache
from attndsl.runtime.call import dim_size
from attndsl.runtime.printing import printed_backward, printed_forward
from attndsl.runtime.ranking import Ranking
from attndsl.targets import make_spec
from attndsl.wiring import engine
from tests.accuracy import examples
from tests.gpu import interprets
from tests.gradients import TOLERANCE
from tests.test_plans import random_plan
from tests.test_select import levels_of

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")


def choosing(
    pattern: str, per: str = "rows(16)", dims: str = "b, k", share: str = "none", clauses: str = "", count: int = 3
) -> str:
    """A program whose plan `p` chooses segments, by what nobody asks: plans are handed in."""
    return (
        f"attention a {{ input c : int[{dims}]\n {clauses}\n plan p = top({count}, segments(c), per = {per}, "
        f"share = {share}, among = all, by = 0.1 * (k % 7))\n attend {pattern} }}"
    )


def ids(draw: np.random.Generator, size: list[int], mean: int) -> torch.Tensor:
    """Ids in runs of so many tokens on average, which come again."""
    return torch.from_numpy(np.cumsum(draw.random(size) < 1 / mean, -1) % 3)


def check(
    text: str, lengths: tuple[int, int], heads: tuple[int, int] = (4, 2), form: str = "list", dim: int = 16,
    mean: int = 5, seed: int = 0, backend: str = "triton", batch: int = 2, **more: Any,
) -> None:  # fmt: skip
    """Output, lse and gradients of a call with a plan. form: as `random_plan` has it, or "made" by the call itself."""
    attn, shape = attndsl.compile(text), CallShape(batch, *heads, *lengths, dim, dim + 8)
    draw, (own,) = np.random.default_rng(seed), (d for d in attn.program.inputs if d.name == "c")
    given: dict[str, Any] = {"c": ids(draw, [dim_size(d, attn.program, shape) for d in own.dims], mean), **more}
    dtype = torch.float64 if backend == "cpu" else torch.float32
    sizes = ((heads[0], lengths[0], dim), (heads[1], lengths[1], dim), (heads[1], lengths[1], dim + 8))
    q, k, v = (torch.from_numpy(draw.standard_normal((batch, *size))).to(dtype) for size in sizes)
    plan = attn.plan(q, k, **given)["p"]
    if form != "made":
        plan = random_plan(draw, tuple(plan.shape[:-1]), shape.k_len, form)
    here, there = ([x.detach().clone().to(t).requires_grad_() for x in (q, k, v)] for t in (dtype, torch.float64))
    found = attn(*here, plans={"p": plan}, backend=backend, return_lse=True, **given)
    wanted = attn.reference(*there, plans={"p": plan}, return_lse=True, **given)
    close = 1e-10 if backend == "cpu" else 10 * TOLERANCE[dtype]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=close, rtol=close)
    for out, lse in (found, wanted):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        ((out * weight).sum() + lse.clamp(min=-10).sum().to(out.dtype)).backward()
    for x, y in zip(here, there, strict=True):
        assert x.grad is not None and y.grad is not None
        assert float((x.grad.double() - y.grad).abs().max()) <= close * max(1.0, float(y.grad.abs().max()))


# Pattern and what the plan is for; rows and keys; heads; form of the plan; head dimension; tokens of a segment.
CASES: dict[str, tuple[str, tuple[int, int], tuple[int, int], str, int, int]] = {
    "rows": (choosing("p"), (40, 40), (2, 2), "sorted", 16, 9),
    "causal": (choosing("causal & p - window(5)", dims="b, g, k"), (40, 40), (4, 2), "made", 80, 9),
    "group": (choosing("causal & p", share="group"), (40, 40), (4, 2), "list", 16, 4),
    "single_tokens": (choosing("causal & p", "rows(64)"), (70, 70), (2, 1), "sorted", 16, 1),
    "long": (choosing("p", "rows(64)"), (70, 70), (2, 1), "sorted", 16, 60),
    "head": (choosing("causal & p", "head"), (33, 70), (2, 1), "sorted", 16, 7),
    "queries": (choosing("causal & p", "query"), (9, 33), (2, 1), "sorted", 16, 4),
    "queries_of_a_group": (choosing("causal & p", "query", share="group"), (9, 33), (8, 1), "sorted", 16, 4),
    "chunk": (choosing("causal & p"), (5, 40), (2, 1), "sorted", 16, 4),
    "union": (choosing("causal & (p | window(7))"), (40, 40), (2, 1), "sorted", 16, 4),
    "left_out": (choosing("causal - p"), (40, 40), (2, 1), "sorted", 16, 4),
    "map": (choosing("causal & p"), (40, 40), (2, 1), "map", 16, 4),
    "one": (choosing("causal & p"), (1, 1), (2, 1), "list", 16, 4),
    "odd_rows": (choosing("causal & p", "rows(24)"), (50, 50), (2, 1), "sorted", 16, 4),
}  # fmt: skip
VIEWS = {
    "left_out_approximated": choosing("p, all - p over pool(mean, segments(c), counted)"),
    "among_entries": choosing("causal & p over pool(mean, segments(c)), causal & window(4)", dims="b, g, k"),
}


@interprets
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str) -> None:
    text, lengths, heads, form, dim, mean = CASES[name]
    check(text, lengths, heads, form, dim, mean, batch=1)


@interprets
@pytest.mark.parametrize("name", VIEWS)
def test_views_interpreted(name: str) -> None:
    check(VIEWS[name], (50, 50), (4, 2), "sorted", mean=4, batch=1)


# Plans of no entries, of one for all heads and rows, wider than the call has tokens, and of what begins no segment.
PLANS: dict[str, Callable[[], torch.Tensor]] = {
    "empty": lambda: torch.zeros(1, 2, 2, 0, dtype=torch.int32),
    "alike": lambda: torch.tensor([0, 4, 8, 16]).view(1, 1, 1, 4),
    "wide": lambda: torch.full((1, 2, 2, 40), -1),
    "hostile": lambda: torch.tensor([4, 0, 8, 9, 99, 1 << 30, -7, 16]).view(1, 1, 1, 8).int(),
}


@interprets
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", PLANS)
def test_odd_plans(name: str, backend: str) -> None:
    attn, dtype = attndsl.compile(choosing("causal & p")), torch.float64 if backend == "cpu" else torch.float32
    generator, c = torch.Generator().manual_seed(0), torch.arange(20)[None] // 4
    q, k, v = (torch.randn(1, 2, 20, 16, generator=generator, dtype=dtype).requires_grad_() for _ in range(3))
    plans = {"p": PLANS[name]()}
    found, wanted = attn(q, k, v, c=c, plans=plans, backend=backend), attn.reference(q, k, v, c=c, plans=plans)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(x.double().square().sum(), (q, k, v)) for x in (found, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@interprets
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("rows", "tokens", "chosen"), [(20, 45, [0]), (20, 45, []), (70, 100, [99])])
def test_maps_of_data_say_nothing_of_lists(rows: int, tokens: int, chosen: list[int], backend: str) -> None:
    """Where tiles hold rows of several classes nothing is listed for them, and the data beside a plan has maps."""
    attn = attndsl.compile(choosing("p & { c[k] >= 0 }", "rows(64)"))
    dtype = torch.float64 if backend == "cpu" else torch.float32
    generator, c = torch.Generator().manual_seed(0), torch.zeros(1, tokens, dtype=torch.int32)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator, dtype=dtype) for n in (rows, tokens, tokens))
    plan = torch.tensor(chosen, dtype=torch.int32).expand(1, 2, -(-tokens // 64), len(chosen))
    found = attn(q, k, v, c=c, plans={"p": plan}, backend=backend)
    wanted = attn.reference(q, k, v, c=c, plans={"p": plan})
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


PATTERNS = (
    "p", "causal & p", "causal & (p | sink(2))", "causal - p", "causal & p & window(20)", "p & { h == 0 or q - k < 9 }",
    "if h == 0 then causal & p else window(9)", "causal & p, causal - p over pool(mean, segments(c))",
    "causal & p over pool(mean, 4)", "causal & p, causal - p over pool(mean, 2, visible = any)",
)  # fmt: skip


@examples(30)
@given(
    st.sampled_from(PATTERNS), st.sampled_from(("rows(16)", "rows(8)", "rows(24)", "head", "query")),
    st.sampled_from(("b, k", "b, g, k", "b, h, k", "k")), st.sampled_from(("none", "group", "heads")),
    st.sampled_from(("list", "sorted", "map", "made")), st.integers(1, 150), st.integers(0, 99),
)  # fmt: skip
def test_random_plans(pattern: str, per: str, dims: str, share: str, form: str, tokens: int, seed: int) -> None:
    if "pool" in pattern and "h" in dims:
        dims = "b, g, k"  # Entries are those of key heads.
    rows = tokens if seed % 3 else seed % tokens + 1
    check(choosing(pattern, per, dims, share), (rows, tokens), form=form, mean=1 + seed % 12, seed=seed, backend="cpu")


@pytest.mark.parametrize("options", ["", ", always = sink(2)", ", share = group", ", share = heads"])
def test_the_best_are_found_without_ranking_the_others(options: str) -> None:
    """Ties go to the lower member, what is forced comes first, and what has no score is left out."""
    text = f"top(3, segments(c), per = rows(4), among = all, by = dot(mean(Q), mean(K)){options})"
    (selection,) = load(f"attention a {{ input c : int[b, k] plan p = {text} attend all }}").program.selections
    ranking = Ranking(selection, (4, 2), torch.tensor([3] * 4 if "share" in options else [2, 3, 1, 0]).view(1, 4, 1, 1))
    assert ranking.finds_best(torch.float32) and not ranking.finds_best(torch.float64)
    generator = torch.Generator().manual_seed(0)
    for members in (1, 2, 7, 40, 41):
        size = (2, 4, 30, members)
        chance = torch.rand(3, *size, generator=generator)
        candidates = chance[0] < 0.7
        forced = candidates & (chance[1] < 0.2) if "always" in options else torch.zeros(size, dtype=torch.bool)
        raw = torch.randint(-3, 4, size, generator=generator) * torch.tensor(0.37)
        raw = torch.where(candidates & (chance[2] < 0.9), raw, -torch.inf)
        plan, wanted = ranking.best(raw, candidates, forced, 5 + members), ranking.decided(raw, candidates, forced)
        np.testing.assert_array_equal(levels_of(plan, members, 4), wanted)


@pytest.mark.parametrize("pattern", ["causal & p", "causal - p", "p, all - p over pool(mean, segments(c), counted)"])
def test_kernels_are_kept(pattern: str, tmp_path: Path) -> None:
    """What lists segments is declared again of a kernel that the cache held."""
    ((_, program),) = compose(load(choosing(pattern)).program).branches
    spec = replace(make_spec("sm_90", "triton", 4, 2, 64), even_start=True, lists=True)
    printers = engine(program).generators
    of_backend = {Backend.TRITON: printers.triton_forward}
    first, again = (
        printed_forward(program, spec, (Backend.TRITON,), None, of_backend, KernelCache(tmp_path / "kernels"))
        for _ in range(2)
    )
    assert first == again and any(isinstance(d.derivation, Listed) for d in again[0].program.inputs)
    back, kept = (
        printed_backward(program, spec, False, None, printers, KernelCache(tmp_path / "kernels")) for _ in range(2)
    )
    assert back == kept


class Largest(TorchFunctionMode):
    """The most bytes of a tensor that some call of torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, list | tuple) else [found]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


LARGE = {
    "rows": (choosing("causal & p", "rows(8)"), 8),
    "queries": (choosing("causal - p", "query"), 1),
    "view": (choosing("p, all - p over pool(mean, segments(c), counted)", "rows(8)"), 8),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_array_has_row_classes_and_tokens(name: str) -> None:
    """Forward and backward, of a plan of segments: the largest would not hold a byte for each."""
    (text, rows), n = LARGE[name], 2048
    attn, draw, c = attndsl.compile(text), np.random.default_rng(0), torch.from_numpy(np.arange(n) // 8)[None]
    q, k, v = (torch.from_numpy(draw.standard_normal((1, 1, n, 8))).requires_grad_() for _ in range(3))
    plan = torch.from_numpy(np.sort(draw.choice(n // 8, (1, 1, n // rows, 3)) * 8, -1)).int()
    with Largest() as seen:
        attn(q, k, v, plans={"p": plan}, c=c).sum().backward()
    assert seen.bytes < n * (n // rows)
