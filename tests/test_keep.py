"""What is kept of a cache beside its tokens: entries made and updated in place, by a kernel and by torch, as a list of
tokens says; in a step that asks nothing of the device; in a `PagedCache`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attndsl
import attndsl.serving
from attndsl.api import load_attention
from attndsl.keeping import Kept
from attndsl.runtime.decode import DecodeTensors
from attndsl.runtime.keep import empty_entries, make_entries, update_entries
from attndsl.selection import Pool
from tests.decoding import paged

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
POOLED = load_attention("attention a { attend causal & window(5), causal over pool(mean, 4) }")
ROUTED = attndsl.compile("causal & top(2, blocks(4), by = dot(Q, mean(K)), share = group, always = same_block(4))")
CAPACITY = 40


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_hand(kept: Kept, x: Tensor, lengths: Tensor) -> Tensor:
    """Entries [B, H, entries, D] of tokens [B, H, M, D], zeros where there are none."""
    batch, heads, capacity, dim = x.shape
    found = torch.zeros(batch, heads, kept.entries(capacity), dim, dtype=torch.float64)
    functions: dict[Pool, Any] = {
        Pool.MEAN: lambda y: y.mean(1), Pool.SUM: lambda y: y.sum(1), Pool.MAX: lambda y: y.amax(1),
        Pool.MIN: lambda y: y.amin(1), Pool.FIRST: lambda y: y[:, 0], Pool.LAST: lambda y: y[:, -1],
    }  # fmt: skip
    for b, length in enumerate(lengths.tolist()):
        for j in range(-(-length // kept.stride)):
            tokens = x[b, :, j * kept.stride : min(j * kept.stride + kept.size, length)]
            found[b, :, j] = functions[kept.function](tokens.double())
    return found


def cache_of(k: Tensor, v: Tensor, lengths: Tensor, page: int | None) -> DecodeTensors:
    k, v, table = (k, v, None) if page is None else paged(k, v, page)
    return DecodeTensors(k, k, v, lengths, table, None, None)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("function", "size", "stride"),
    [(Pool.MEAN, 4, 4), (Pool.MEAN, 70, 70), (Pool.SUM, 3, 5), *((f, 7, 3) for f in Pool if f is not Pool.SUM)],
)
def test_entries(function: Pool, size: int, stride: int, backend: str) -> None:
    """Made of a cache, and then updated token by token: in pages of any size, with NaN where no token is."""
    kept = Kept("x", function, size, stride, True, exact=False)
    for page, dim in ((None, 24), (8, 16)):
        k, v = draw(3, 2, CAPACITY, dim), draw(3, 2, CAPACITY, 8, seed=1)
        lengths = ints(33, 0, 5)
        for x in (k, v):
            for b, length in enumerate(lengths.tolist()):
                x[b, :, length:] = torch.nan
        call = cache_of(k, v, lengths, page)
        made = make_entries(POOLED._key, [kept], call, backend)["x"]
        for x, entries in zip((k, v), made, strict=True):
            torch.testing.assert_close(entries.double(), by_hand(kept, x, lengths), rtol=1e-5, atol=1e-5)
        for new in (1, 3):
            lengths += new
            for x, pool in ((k, call.k), (v, call.v)):
                for b, length in enumerate(lengths.tolist()):
                    for token in range(length - new, length):
                        x[b, :, token] = draw(*x.shape[1::2], seed=token)
                        at = (b, token) if call.page_table is None else (call.page_table[b, token // 8], token % 8)
                        pool[at[0], :, at[1]] = x[b, :, token]
            update_entries(POOLED._key, [kept], {"x": made}, call, new, backend)
            for x, entries in zip((k, v), made, strict=True):
                torch.testing.assert_close(entries.double(), by_hand(kept, x, lengths), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_ranks_is_kept_in_float32(dtype: torch.dtype, backend: str) -> None:
    kept = Kept("x", Pool.MEAN, 4, 4, False, exact=True)
    k = draw(1, 1, 16, 16, dtype=dtype)
    call = cache_of(k, k, ints(15), None)
    (made,) = make_entries(POOLED._key, [kept], call, backend)["x"]
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), by_hand(kept, k, ints(15)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("function", [Pool.MEAN, Pool.MAX, Pool.LAST])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5), torch.tensor([0.5, -2.0])])
def test_entries_of_eight_bits(scale: Tensor | None, function: Pool, backend: str) -> None:
    """Those of what the numbers stand for, a negative scale among them, contiguous and in pages."""
    kept = Kept("x", function, 4, 4, False, exact=True)
    k, lengths = draw(2, 2, CAPACITY, 24).to(torch.float8_e4m3fn), ints(33, 5)
    exact = k.float() * (1 if scale is None else scale.view(-1, 1, 1))
    for page in (None, 8):
        call = cache_of(k.view(torch.uint8), k.view(torch.uint8), lengths, page)
        pool, q = call.k.view(k.dtype), torch.empty(0)
        call = DecodeTensors(q, pool, pool, lengths, call.page_table, scale, None)
        (made,) = make_entries(POOLED._key, [kept], call, backend)["x"]
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.double(), by_hand(kept, exact, lengths), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_hostile_lengths_and_tables(backend: str) -> None:
    """Lengths are clamped, pages that do not exist are tokens that are not there, and nothing else is written."""
    for function in (Pool.MEAN, Pool.MAX, Pool.LAST):
        kept = Kept("x", function, 4, 4, False, exact=False)
        k = draw(2, 1, 16, 16)
        call = cache_of(k, k, ints(2**31 - 1, -(2**31)), None)
        (made,) = make_entries(POOLED._key, [kept], call, backend)["x"]
        torch.testing.assert_close(made.double(), by_hand(kept, k, ints(16, 0)), rtol=1e-5, atol=1e-5)
        call = cache_of(k, k, ints(16, 16), 4)
        assert call.page_table is not None
        call.page_table[0] = ints(-1, 2**31 - 1, -(2**31), len(call.k))
        (made,) = make_entries(POOLED._key, [kept], call, backend)["x"]
        assert not made[0].any()
        torch.testing.assert_close(made[1:].double(), by_hand(kept, k[1:], ints(16)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_more_new_tokens_than_there_are(backend: str) -> None:
    kept, k = Kept("x", Pool.MEAN, 4, 4, False, exact=False), draw(2, 1, 16, 16)
    call = cache_of(k, k, ints(16, 3), None)
    entries = {"x": (torch.full((2, 1, 4, 16), 7.0),)}
    update_entries(POOLED._key, [kept], entries, call, 1 << 40, backend)
    torch.testing.assert_close(entries["x"][0][0].double(), by_hand(kept, k[:1], ints(16))[0], rtol=1e-5, atol=1e-5)
    assert (entries["x"][0][1, :, 1:] == 7).all()


def test_tokens_that_were_taken_back() -> None:
    k, lengths = draw(1, 1, CAPACITY, 16), ints(14)
    views = POOLED.views(k, k, lengths)
    lengths -= 4  # A draft of which one token was taken.
    k[:, :, 10:] = draw(1, 1, 30, 16, seed=7)
    lengths += 1
    attndsl.serving.update_views(POOLED, views, k, k, lengths)
    fresh = POOLED.views(k, k, lengths)
    for x, y in zip(views["pool(mean, 4)"], fresh["pool(mean, 4)"], strict=True):
        assert torch.equal(x[:, :, :3], y[:, :, :3])


# -------------------------------------------------------------------------------------- a step


class NoQuestions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what would wait for a device, or make tensors whose size depends on what they hold."""

    def __enter__(self) -> Any:
        # On the CPU no operator stands behind it.
        self.tolist = Tensor.tolist
        Tensor.tolist = self._refused  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        Tensor.tolist = self.tolist  # type: ignore[method-assign]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def _refused(self, *_: Any) -> Any:
        raise AssertionError("tolist")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2"), name
        assert not (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("page", [None, 8])
def test_a_step_asks_nothing_of_the_device(page: int | None) -> None:
    """Updating what is kept and choosing: what a CUDA graph of a step records. (On the CPU attending reads lengths.)"""
    nsa = attndsl.compile(
        "attention nsa { coarse = attend causal over pool(mean, 4) "
        "fine = attend causal & top(2, blocks(4), by = probs(coarse), share = group, always = same_block(4)) "
        "output merge(coarse, fine) }"
    )
    k, q, lengths = draw(2, 2, CAPACITY, 16), draw(2, 4, 3, 16), ints(30, 7)
    call = cache_of(k, k, lengths, page)
    cache = (call.k, call.v, call.seq_lens, call.page_table)
    for attn in (ROUTED, nsa):
        views = attn.views(*cache)
        mode: Any = NoQuestions
        with mode():
            attndsl.serving.update_views(attn, views, *cache, new=3)
        if attn is ROUTED:
            with mode():
                attndsl.serving.plan(attn, q, *cache, views=views)
        else:
            lse, planner = draw(2, 4, 3), torch.ops.attndsl.select_ragged
            entries = views["pool(mean, 4)"][0]
            with mode():
                planner(attn._key, "top", q, lengths, 2, CAPACITY, [], None, [], [], None, [entries], lse)


def test_torch_compile() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q: Tensor, *cache: Tensor) -> Tensor:
        out: Tensor = ROUTED.decode(q, *cache) * 2
        return out

    k = draw(2, 2, CAPACITY, 16)
    given = (draw(2, 4, 1, 16), k, k, ints(20, 9))
    torch.testing.assert_close(step(*given), ROUTED.decode(*given) * 2)


def test_operators() -> None:
    k, lengths = draw(2, 2, CAPACITY, 16), ints(30, 7)
    entries = empty_entries([Kept("x", Pool.MEAN, 4, 4, False, exact=True)], cache_of(k, k, lengths, None))["x"][0]
    check: Any = torch.library.opcheck
    given = (POOLED._key, k, None, entries, lengths, None, "mean", 4, 4, 3, False)
    check(torch.ops.attndsl.update_entries.default, given)
    members = [ROUTED.views(k, k, lengths)["mean(K) over blocks(4)"][0]]
    call: Any = (ROUTED._key, "top", draw(2, 4, 3, 16), lengths, 2, CAPACITY, members, None, [], [], None)
    # Heads and capacities decide how long a plan is: they are numbers.
    check(torch.ops.attndsl.select_ragged.default, call, test_utils=("test_schema", "test_faketensor"))


# ---------------------------------------------------------------------------------------- a cache


@pytest.mark.parametrize("attn", [POOLED, ROUTED], ids=["pooled", "routed"])
def test_a_paged_cache_keeps_them(attn: attndsl.Attention) -> None:
    """Sequences that come and go, some tokens at a time: each step is that of its tokens alone."""
    pages = 12 if attn is POOLED else 24
    cache = attndsl.serving.PagedCache(attn, 2, 2, 16, pages=pages, page=4, max_len=CAPACITY, dtype=torch.float64)
    held: list[tuple[Tensor, Tensor]] = [(torch.zeros(2, 0, 16), torch.zeros(2, 0, 16)) for _ in range(2)]

    def append(new: int, sequences: list[int] | None, seed: int) -> None:
        chosen = [0, 1] if sequences is None else sequences
        k, v = (draw(len(chosen), 2, new, 16, seed=seed + i, dtype=torch.float64) for i in range(2))
        cache.append(k, v, sequences)
        for i, b in enumerate(chosen):
            held[b] = (torch.cat((held[b][0].double(), k[i]), 1), torch.cat((held[b][1].double(), v[i]), 1))

    append(9, [0], 0)
    append(2, [1], 2)
    for step in range(12):
        append(1 + step % 3, None, 10 + 2 * step)
        if step == 6:
            cache.release(1)
            held[1] = (held[1][0][:, :0], held[1][1][:, :0])
            append(5, [1], 100)
        q = draw(2, 4, 1, 16, seed=50 + step, dtype=torch.float64)
        out = cache.decode(q)
        plans = cache.plan(q)
        assert set(plans) == ({"top"} if attn is ROUTED else set())
        assert torch.equal(cache.decode(q, plans=plans), out)
        for b, (k, v) in enumerate(held):
            torch.testing.assert_close(out[b : b + 1], attn.reference(q[b : b + 1], k[None], v[None]))
    # Windows and what is pooled leave columns for good.
    assert cache.pages_held <= (8 if attn is POOLED else 24)


def test_what_may_be_forgotten() -> None:
    """Tokens of entries that are complete, once no row can see them."""
    far = attndsl.compile("attention a { attend causal & window(8), causal over pool(mean, 16) }")
    assert far.evictable(64, page=4) == list(range(12))
    assert far.evictable(60, page=4) == list(range(11))
    whole = attndsl.compile("attention a { near = attend causal & window(8)  all = attend causal  output near + all }")
    assert whole.evictable(64, page=4) == []
    # What chooses single keys must have them all.
    near = "causal & window(4) & top(2, tokens, among = causal & window(12), by = dot(Q, K), share = heads)"
    assert attndsl.compile(near).evictable(64, page=4) == list(range(13))
