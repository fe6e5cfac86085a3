"""Quest: a selection by bounds of pages, from its program to a decode over a paged cache, and its plan used again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl
import attndsl.serving
from attndsl.paging import PageChoice, page_choices

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
BY = "by = bound(Q, min(K), max(K))"


def program(options: str, count: int = 3, page: int = 4) -> str:
    return f"attention quest {{ plan sel = top({count}, blocks({page}), {BY}, {options})  attend causal & sel }}"


def draw(*size: int) -> Tensor:
    return torch.randn(size)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    "options", ["among = causal", "among = causal, share = group", "among = causal, always = same_block(4)"]
)
def test_the_program_over_a_cache(options: str, backend: str) -> None:
    """Each sequence's rows are those of the whole program on it alone, by the oracle, selection included."""
    if torch.cuda.is_available():
        pytest.skip("the cache here is on the CPU")
    torch.manual_seed(0)
    attn = attndsl.compile(program(options))
    cache = attndsl.serving.PagedCache(attn, batch=2, kv_heads=2, head_dim=8, pages=40, page=4, max_len=80, bounds=True)
    k, v, lengths = draw(2, 2, 61, 8), draw(2, 2, 61, 8), (61, 30)
    for b, length in enumerate(lengths):
        cache.append(k[b : b + 1, :, :length], v[b : b + 1, :, :length], sequences=[b])
    q = draw(2, 4, 1, 8)
    out = cache.decode(q, backend=backend)
    for b, length in enumerate(lengths):
        exact = attn.reference(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        torch.testing.assert_close(out[b : b + 1].double(), exact, rtol=1e-5, atol=1e-5)


def test_a_plan_of_one_layer_in_another() -> None:
    """As TidalDecode and LessIsMore do: the layers after one attend to what that chose, and so may later steps."""
    torch.manual_seed(0)
    attn = attndsl.compile(program("among = causal, share = group, always = same_block(4)"))
    first, second = (
        attndsl.serving.PagedCache(attn, batch=1, kv_heads=1, head_dim=8, pages=12, page=4, max_len=48, bounds=True)
        for _ in range(2)
    )
    for cache in (first, second):
        cache.append(draw(1, 1, 40, 8), draw(1, 1, 40, 8))
    q = draw(1, 2, 1, 8)
    plans = first.plan(q)
    assert plans["sel"].shape == (1, 1, 1, 3) and not torch.equal(plans["sel"], second.plan(q)["sel"])
    out = second.decode(q, plans=plans)
    k, v = (x[second.page_table[0, :10].long()].transpose(0, 1).reshape(1, 1, 40, 8) for x in (second.k, second.v))
    exact = attn.reference(q, k, v, plans=plans)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.equal(out, second.decode(q))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (program("among = causal"), PageChoice("sel", 3, 0, False)),
        (program("among = causal & { k < Nk }, share = group"), PageChoice("sel", 3, 0, True)),
        (program("among = causal, always = same_block(4)"), PageChoice("sel", 3, 1, False)),
        (program("among = causal, always = { q // 4 == k // 4 and k <= q }"), PageChoice("sel", 3, 1, False)),
        (program("among = causal, always = window(9)"), None),
        (program("among = causal & window(40)"), None),
        (program("among = causal, share = heads"), None),
        (program("among = causal, normalise = softmax"), None),
        (program("among = causal", page=8), None),
        (program("among = causal").replace("min(K)", "mean(K)"), None),
        ("causal", None),
    ],
)
def test_which_selections_go_by_bounds(text: str, found: PageChoice | None) -> None:
    assert page_choices(attndsl.compile(text).program, page=4) == (() if found is None else (found,))


def test_other_selections_are_made_of_what_the_cache_keeps() -> None:
    """Of all that a row may choose among, as any other selection, and as the oracle does."""
    attn = attndsl.compile(program("among = causal, always = window(9)"))
    cache = attndsl.serving.PagedCache(attn, batch=1, kv_heads=1, head_dim=8, pages=4, page=4, max_len=16, bounds=True)
    cache.append(draw(1, 1, 9, 8), draw(1, 1, 9, 8))
    q = draw(1, 1, 1, 8)
    k, v = (
        x[cache.page_table[0, :3].long()].transpose(0, 1).reshape(1, 1, 12, 8)[:, :, :9] for x in (cache.k, cache.v)
    )
    torch.testing.assert_close(cache.decode(q).double(), attn.reference(q, k, v), rtol=1e-5, atol=1e-5)
    with pytest.raises(attndsl.PatternError, match="`other` is not a selection"):
        cache.decode(q, plans={"other": torch.zeros(1, 1, 1, 3, dtype=torch.int32)})
    with pytest.raises(attndsl.PatternError, match="`sel` is no plan of this call"):
        cache.decode(q, plans={"sel": torch.zeros(1, 1, 1, 3)})
