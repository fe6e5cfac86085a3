"""Decode of packed programs: the last rows of a sequence of documents see entries of theirs, and choose among members
of theirs, by the oracle, which asks of each document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
import attndsl.serving
from tests import test_packed_members, test_packed_selections, test_packed_views
from tests.accuracy import examples
from tests.test_decode_views import Sequences, with_lse
from tests.test_packed_selections import TEXTS, branches
from tests.test_routed import PATTERNS

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
CAPACITY = 48
LENGTHS = [41, 48, 24, 2, 0]
SOME = [41, 24, 2]
VIEWS = [
    *(body for body in test_packed_views.BODIES if "within" not in body),
    "far = attend causal over pool(mean, 4) near = attend causal & window(4) output far * q / (1 + Nk) + near",
]


def sequences(
    attn: attndsl.Attention, lengths: list[int], rows: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Sequences:
    of = Sequences(attn, lengths, rows, dtype, dims=(16, 24), seed=seed, capacity=CAPACITY)
    generator, batch = torch.Generator().manual_seed(seed), len(lengths)
    ids = (torch.rand(batch, CAPACITY, generator=generator) < 0.12).cumsum(1) % 3
    of_heads = torch.rand(batch, 2, CAPACITY, generator=generator)
    present = torch.tensor([n - 3 if i % 2 else CAPACITY for i, n in enumerate(lengths)])
    made = {
        "doc": test_packed_views.DOC[torch.arange(batch) % 2] if seed == 0 else ids,
        "role": torch.arange(batch * rows).view(batch, -1) % 3, "part": (of_heads < 0.2).cumsum(-1) % 3,
        "word": torch.arange(CAPACITY) // 7, "mark": of_heads[:, 0] < 0.8, "of_rows": of_heads[:, 1] < 0.7,
        "n": present, "sinks": torch.randn(4, generator=generator, dtype=dtype),
        "some": torch.randint(-1, 12, (batch, 2, 9), generator=generator), "few": torch.tensor([0, 3, 3, 0, 3]),
        "weighs": torch.rand(2, 5, generator=generator).to(dtype), "each": torch.arange(96).view(2, 48) % 5 - 1,
        "heavy": torch.rand(batch, 2, CAPACITY, generator=generator).to(dtype),
    }  # fmt: skip
    of.inputs |= {decl.name: made[decl.name] for decl in attn.program.inputs if decl.name in made}
    return of


@pytest.mark.parametrize("body", VIEWS)
def test_views(body: str) -> None:
    for rows, page in ((1, None), (7, 8)):
        of = sequences(test_packed_views.compiled(body), LENGTHS, rows)
        of.check_both(of.attn.decode(of.q, *of.cache(page), return_lse=with_lse(of.attn), **of.inputs))


@pytest.mark.parametrize("number", [1, 3, 8, 10])
def test_views_in_triton(number: int) -> None:
    of = sequences(test_packed_views.compiled(VIEWS[number]), [41, 24], 3, torch.float32)
    given: Any = {"return_lse": with_lse(of.attn), "backend": "triton", **of.inputs}
    of.check_both(of.attn.decode(of.q, *of.cache(8), **given), 2e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_choices(name: str) -> None:
    """What is chosen for it is what a decode is handed, in it and for the oracle."""
    rows, page = ((1, 8), (9, None))[len(name) % 2]
    of = sequences(test_packed_selections.compiled(name), SOME, rows, seed=rows)
    cache = of.cache(page)
    out = of.attn.decode(of.q, *cache, **of.inputs)
    of.check(out, None)
    plans = attndsl.serving.plan(of.attn, of.q, *cache, **of.inputs)
    assert torch.equal(out, of.attn.decode(of.q, *cache, plans=plans, **of.inputs))


@pytest.mark.parametrize("name", test_packed_members.TEXTS)
def test_members_that_are_no_blocks(name: str) -> None:
    text, rows = test_packed_members.TEXTS[name], (7, 1, 7)[len(name) % 3]
    of = sequences(test_packed_members.compiled(text), SOME, rows, seed=rows)
    of.inputs |= test_packed_members.given_of(text, of.inputs["doc"], 5)
    of.check(of.attn.decode(of.q, *of.cache((None, 8)[len(name) % 2]), **of.inputs), None)


@pytest.mark.parametrize("name", ["moba", "nsa", "rows"])
def test_choices_in_triton(name: str) -> None:
    of = sequences(test_packed_selections.compiled(name), [41, 24], 3, torch.float32)
    of.check(of.attn.decode(of.q, *of.cache(8), backend="triton", **of.inputs), None, tolerance=2e-5)


@given(
    branches(), st.sampled_from(PATTERNS), st.lists(st.integers(0, CAPACITY), min_size=1, max_size=2),
    st.integers(1, 9), st.integers(1, 999),
)  # fmt: skip
@examples(8)
def test_random_choices(branch: tuple[str, str], pattern: str, lengths: list[int], rows: int, seed: int) -> None:
    probe, selection = branch
    text = f"attention a {{ input doc : int[b, k] packed doc {probe} y = attend {pattern.format(selection)} output y }}"
    of = sequences(attndsl.compile(text), lengths, rows, seed=seed)
    of.check(of.attn.decode(of.q, *of.cache(8 if seed % 2 else None), **of.inputs), None)


@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_hostile_lengths_and_pages(name: str) -> None:
    of = sequences(test_packed_selections.compiled(name), [41, 48, 24], 3)
    of.check_wild()


def test_eight_bits_and_a_paged_cache() -> None:
    of = sequences(test_packed_selections.compiled("nsa"), [41, 24], 2, torch.float32)
    (k, v), pages, scales = of.of_eight_bits(8)
    wanted = of.attn.decode(of.q, k, v, of.seq_lens, **of.inputs)
    out = of.attn.decode(of.q, *pages, **(scales | of.inputs))
    torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)

    assert of.attn.evictable(40, 4) == []
    cache = attndsl.serving.PagedCache(of.attn, 2, 2, 16, v_dim=24, pages=12, max_len=CAPACITY, page=8)
    cache.append(k[:, :, :37], v[:, :, :37])
    assert cache.views is None, "nothing is kept of documents"
    alone = of.attn.decode(of.q, k, v, torch.full((2,), 37, dtype=torch.int32), **of.inputs)
    torch.testing.assert_close(cache.decode(of.q, **of.inputs), alone, rtol=2e-5, atol=2e-5)
