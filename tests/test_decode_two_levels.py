"""Decode of two levels: each sequence's rows are those of the program on it alone, by the oracle, over contiguous and
paged caches whose other tokens are NaN or hold anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
import attndsl.serving
from attndsl.compose import compose
from attndsl.decode import Cache, decode_plan
from attndsl.plan import DType, Spec
from tests.accuracy import examples
from tests.decoding import paged
from tests.test_decode_views import CAPACITY, Sequences
from tests.test_two_levels import BODIES, ENTRIES, LARGE, program

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
# Members that a listed block holds two of, and such as hold several of what is listed: then no list is read.
LISTED = "plan sel = top(2, blocks({}), among = causal, by = dot(Q, mean(K)), always = same_block({}))\n"
FURTHER = {
    "two of a block": f"{LISTED.format(32, 32)} votes = attend sel over pool(mean, 16)\n"
    "output attend sel within blocks(16) with probs(votes)",
    "several blocks": f"{LISTED.format(8, 8)} votes = attend sel over pool(mean, 8)\n"
    "output attend sel within blocks(16) with probs(votes)",
    "what is left out": f"{LISTED.format(16, 16)} votes = attend causal - sel over pool(mean, 16)\n"
    "output attend causal - sel within blocks(16) with probs(votes)",
    "apart": f"{ENTRIES} output attend causal & dilated(5) within blocks(16) with probs(votes)",
    "heads": f"{ENTRIES} output attend {{ k <= q - 6 * h }} within blocks(16) with probs(votes)",
    "later tokens": "votes = attend band(9, 30)\noutput attend band(9, 30) within blocks(16) with probs(votes)",
}
ALL = {**BODIES, **FURTHER}


def sequences(body: str, lengths: list[int], rows: int, *more: Any, **options: Any) -> Sequences:
    of = Sequences(program(body), lengths, rows, *more, **options)
    if "sinks" in body:
        of.inputs["sinks"] = torch.linspace(-1, 1, of.q.shape[1], dtype=of.q.dtype)
    lead, generator = of.k.shape[:2], torch.Generator().manual_seed(rows)
    if "(runs)" in body:
        of.inputs["runs"] = (torch.rand(*lead, of.capacity, generator=generator) < 0.2).cumsum(2).to(torch.int32)
    if "(picked" in body:
        # Some are no tokens, and some come twice.
        of.inputs["picked"] = torch.randint(-1, of.capacity + 1, (*lead, 9), generator=generator).to(torch.int32)
    return of


def decoded(of: Sequences, page: int | None, **options: Any) -> Any:
    asked: Any = {"return_lse": True, **options, **of.inputs}
    return of.attn.decode(of.q, *of.cache(page), **asked)


@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("name", ALL)
def test_cpu(name: str, page: int | None) -> None:
    """Where views are kept, and where they are made of all tokens."""
    of = sequences(ALL[name], [41, 2, 0, 48], 1 if page else 5)
    of.check_both(decoded(of, page, views=of.attn.views(*of.cache(page)) if page else None))


@pytest.mark.parametrize("name", ALL)
def test_triton(name: str) -> None:
    number = [*ALL].index(name)
    page, heads = (None, 8, 64)[number % 3], ((4, 2), (2, 2))[number % 2]
    if "(runs)" in ALL[name]:
        page = 8  # an input of tokens has as many as the pages
    of = sequences(ALL[name], [41, 2, 48], 1 + number % 3, torch.float32, heads, (16, 24))
    of.check_both(decoded(of, page, backend="triton"), 2e-5)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", ["score", "chosen by each"])
def test_members_in_strips(name: str, page: int | None) -> None:
    of = sequences(LARGE[name], [341, 7], 2, torch.float32, (2, 1), (16, 24), capacity=352)
    of.check_both(decoded(of, page, backend="triton"), 2e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("body", ["all", "score"])
def test_many_rows(body: str, backend: str) -> None:
    """64 rows, more than some sequences have tokens; one head, a head dimension that is no power of two."""
    dtype = torch.float64 if backend == "cpu" else torch.float32
    of = sequences(ALL[body], [200, 7, 0], 64, dtype, (1, 1), (80, 16), capacity=208)
    of.check_both(decoded(of, 16, backend=backend), 1e-11 if backend == "cpu" else 2e-5)


def test_the_last_rows_of_a_prefill() -> None:
    """A row is what it was in a call on the whole sequence, by the oracle, in whatever chunks it is decoded."""
    for name in ("all", "score", "raw votes", "chosen by a group", "chosen, merged"):
        of = sequences(ALL[name], [41, CAPACITY], 7)
        found = decoded(of, 4)
        for b, length in enumerate(of.lengths):
            q = torch.randn(1, 4, length, 16, dtype=torch.float64)
            q[:, :, -7:] = of.q[b]
            k, v = (x[b : b + 1, :, :length] for x in (of.k, of.v))
            whole = of.attn.reference(q, k, v, return_lse=True, **of.inputs)
            for x, y in zip(found, whole, strict=True):
                torch.testing.assert_close(x[b], y[0, :, -7:], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", ["all", "chosen by a group", "later tokens"])
def test_hostile_caches(name: str, backend: str) -> None:
    """Lengths are clamped, what lies past them is no matter, and pages that do not exist are not read."""
    of = sequences(ALL[name], [41, 3, CAPACITY], 2, torch.float32)
    expected = decoded(of, None, backend=backend)
    k, v = of.k.nan_to_num(9.0), of.v.nan_to_num(9.0)
    asked: Any = {"return_lse": True, "backend": backend}
    for found, right in zip(of.attn.decode(of.q, k, v, of.seq_lens, **asked), expected, strict=True):
        assert torch.equal(found, right)
    wild, tame = (torch.tensor(x, dtype=torch.int32) for x in ([2**31 - 1, -5, -(2**31)], [CAPACITY, 0, 0]))
    outs = [of.attn.decode(of.q, k, v, lengths, backend=backend) for lengths in (wild, tame)]
    assert torch.equal(*outs) and not outs[0][1:].any()
    keys, values, table = paged(k, v, 4)
    table[0, ::2], table[1], table[2, 1] = -1, 2**31 - 1, -(2**31)
    out = of.attn.decode(of.q, keys.nan_to_num(), values.nan_to_num(), of.seq_lens, table, backend=backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_eight_bits(backend: str) -> None:
    """Over an 8-bit cache with scales, what members weigh is of the numbers that it stands for."""
    of = sequences(ALL["all"], [41, 3, CAPACITY], 2, torch.float32)
    stands_for, cache, scales = of.of_eight_bits(4)
    wanted = of.attn.decode(of.q, *stands_for, of.seq_lens)
    out = of.attn.decode(of.q, *cache, backend=backend, **scales)
    torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)


def test_what_reads_a_list() -> None:
    """A tile of keys is a member; what is listed is visited alone where it holds whole members."""
    for name, listed in (("chosen by each", 16), ("two of a block", 32), ("several blocks", 0), ("all", 0)):
        branch = dict(compose(program(ALL[name]).program).branches)["far"]
        plan = decode_plan(branch, Spec(4, 2, 64, 64, DType.BFLOAT16, "cuda:90"), 1, Cache())
        assert plan.tiling.block_k == 16
        assert (0 if plan.listing is None else plan.listing.keys) == listed


def test_a_plan_that_is_handed_in() -> None:
    of = sequences(ALL["chosen by a group"], [41, 3, CAPACITY], 2)
    plans = attndsl.serving.plan(of.attn, of.q, *of.cache(None))
    out, lse = decoded(of, None, plans=plans)
    of.check(out, lse, plans)


@pytest.mark.parametrize("name", ["all", "chosen, merged"])
def test_step_by_step(name: str) -> None:
    """In a pool of pages that keeps the entries by which members are weighed."""
    attn, generator = program(ALL[name]), torch.Generator().manual_seed(0)
    cache = attndsl.serving.PagedCache(attn, 1, 2, 16, pages=4, max_len=64, page=16, dtype=torch.float64)
    k, v, q = (torch.randn(1, heads, 36, 16, generator=generator, dtype=torch.float64) for heads in (2, 2, 4))
    for t in range(36):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        right = attn.reference(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        torch.testing.assert_close(cache.decode(q[:, :, t : t + 1]), right, rtol=1e-11, atol=1e-11)


def test_in_a_compiled_graph() -> None:
    of = sequences(ALL["chosen by each"], [41, 3], 2)
    cache = of.cache(8)
    views = of.attn.views(*cache)
    runs = [
        of.attn.decode(of.q, *cache, views=views),
        torch.compile(lambda: of.attn.decode(of.q, *cache, views=views), backend="aot_eager", fullgraph=True)(),
    ]
    torch.testing.assert_close(*runs)


def test_gradients_are_refused() -> None:
    of = sequences(ALL["all"], [41], 1)
    with pytest.raises(attndsl.PatternError, match="A555"):
        of.attn.decode(of.q.requires_grad_(), *of.cache(None))


# ------------------------------------------------------------------------------- random programs

VOTES = (
    "causal over pool({}, 16)", "causal over pool({}, 4, counted)", "causal over pool({}, 12, 5)", "causal",
    "causal & window(20)", "causal over pool({}, 16, visible = any)",
)  # fmt: skip
INSIDE = (
    "causal", "causal & window(21)", "causal & dilated(3)", "causal - same_block(16)", "band(9, 5)",
    "{ k <= q - 3 * h }", "causal & { k % 16 < 5 }",
)  # fmt: skip
CHOSEN = "top(2, blocks(16), among = causal, by = dot(Q, {}(K)), share = {})"


@st.composite
def bodies(draw: st.DrawFn) -> str:
    pool, choice = draw(st.sampled_from(("mean", "max"))), ""
    votes, inside = draw(st.sampled_from(VOTES)).format(pool), draw(st.sampled_from(INSIDE))
    if draw(st.booleans()):
        choice = f"plan sel = {CHOSEN.format(pool, draw(st.sampled_from(('none', 'group', 'heads'))))}\n"
        inside = draw(st.sampled_from((f"sel & {inside}", f"({inside}) - sel")))
    score = draw(st.sampled_from(("", " { score softcap(s, 2.0) - 0.1 * (q - k) }", " { scale 0.7 }")))
    far = f"far = attend {inside} within blocks({draw(st.sampled_from((16, 32, 64)))}) with probs(votes){score}\n"
    output = draw(st.sampled_from(("far", "far + 0.5 * near", "merge(far, near)", "votes - far")))
    near = "near = attend causal & window(7)\n" if "near" in output else ""
    return f"attention a {{\n{choice}votes = attend {votes}\n{far}{near}output {output}\n}}"


@given(
    bodies(), st.lists(st.integers(0, CAPACITY), min_size=1, max_size=2), st.integers(1, 4),
    st.sampled_from([None, 8, 16]), st.sampled_from([(4, 2), (2, 2), (3, 1)]), st.integers(0, 99),
)  # fmt: skip
@examples(25)
def test_random_programs(
    text: str, lengths: list[int], rows: int, page: int | None, heads: tuple[int, int], seed: int
) -> None:
    """In float64, of the plan that was chosen."""
    attn = attndsl.compile(text)
    of = Sequences(attn, lengths, rows, heads=heads, dims=(8, 16), seed=seed)
    cache = of.cache(page)
    plans = attndsl.serving.plan(attn, of.q, *cache) if attn.program.selections else None
    lse = not any(op in text.partition("output ")[2] for op in "+-")
    found = attn.decode(of.q, *cache, return_lse=lse, plans=plans)
    out, sums = found if lse else (found, None)
    of.check(out, sums, plans)
