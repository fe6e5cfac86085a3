"""Decode within the members that a plan lists: against dense attention under the same mask, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.plan import Tiling
from attndsl.runtime.decode import Decoder
from tests.decoding import check_decode, decoder, tensors_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
CUDA = torch.cuda.is_available()
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cpu"])
HEADS, KV_HEADS, BATCH, DIM, CAPACITY = 4, 2, 3, 16, 96


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make_plan(heads: int, rows: int, members: int, entries: int, seed: int = 3) -> Tensor:
    """int32 [BATCH, heads, rows, entries], some of them short."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, heads, rows)
    chosen = torch.rand(*shape, members, generator=generator).argsort(-1)[..., :entries]
    keep = torch.randint(entries + 1, (*shape, 1), generator=generator)
    kept = torch.where(torch.arange(chosen.shape[-1]) < keep, chosen, members).sort(-1).values
    return torch.where(kept < members, kept, -1).to(torch.int32)


def expected(
    pattern: str, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], plan: Tensor, keys: int
) -> tuple[Tensor, Tensor]:
    """Dense float64 attention; a row's keys are those of the pattern that lie in its members, each counted once."""
    attn, (batch, heads, rows, _) = attndsl.compile(pattern), q.shape
    out, lse = torch.zeros(batch, heads, rows, v.shape[-1], dtype=torch.float64), torch.empty(batch, heads, rows)
    for b, length in enumerate(lengths):
        masks = torch.from_numpy(attn.mask(length, length, heads, k.shape[1]))
        for h in range(heads):
            g = h // (heads // k.shape[1])
            at = {1: 0, k.shape[1]: g, heads: h}[plan.shape[1]]
            for r in range(rows):
                members = set(plan[b, at, min(r, plan.shape[2] - 1)].tolist())
                row = length - rows + r
                allowed = torch.zeros(length, dtype=torch.bool)
                if row >= 0:
                    allowed = masks[h, row] & torch.tensor(
                        [j // keys in members for j in range(length)], dtype=torch.bool
                    )
                scores = (k[b, g, :length].double() @ q[b, h, r].double()) * DIM**-0.5
                scores[~allowed] = -torch.inf
                lse[b, h, r] = scores.logsumexp(0)
                if allowed.any():
                    out[b, h, r] = scores.softmax(0) @ v[b, g, :length].double()
    return out, lse


def decode(
    pattern: str, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], plan: Tensor, keys: int, backend: str,
    page: int | None = None, splits: int = 3, columns: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    device = torch.device("cuda" if CUDA and backend == "triton" else "cpu")
    call = tensors_of(q, k, v, lengths, page, device)
    head = "g" if plan.shape[1] == k.shape[1] else "h"
    # A dimension that a plan does not have is left out, and one of several rows is one of queries.
    dims, given = ["b", head, "q"], plan
    if plan.shape[2] == 1:
        dims, given = dims[:2], plan[:, :, 0]
    text = f"attention a {{ input listed : blocks({keys})[{', '.join(dims)}]  attend {pattern} & listed }}"
    program = attndsl.compile(text).program
    tiling = Tiling(16, 32) if backend == "triton" else None
    made: Decoder = decoder(program, tiling=tiling, splits=splits, columns=columns)
    out, lse = made.decode(call, [given.to(device)], [], None, backend)
    return out.cpu(), lse.cpu()


@BACKENDS
@pytest.mark.parametrize(
    ("heads", "rows", "page"), [(1, 1, 1), (2, 1, 16), (2, 1, None), (4, 1, 64), (2, 3, 12), (4, 3, 16), (1, 5, 16)]
)
def test_lists(heads: int, rows: int, page: int | None, backend: str) -> None:
    """Lists shared by all heads, by those of a key head or by none, and by the rows of a call or not."""
    lengths = [90, 1, 50]
    capacity = CAPACITY if page != 64 else 128
    q = random(BATCH, HEADS, max(rows, 2), DIM)[:, :, :rows] if rows != 5 else random(BATCH, HEADS, 5, DIM)
    k, v = random(BATCH, KV_HEADS, capacity, DIM, seed=1), random(BATCH, KV_HEADS, capacity, DIM, seed=2)
    plan = make_plan(heads, rows if rows == 3 else 1, members=-(-90 // 16), entries=3)
    exact = expected("causal & (window(70) | sink(3))", q, k, v, lengths, plan, 16)
    found = decode("causal & (window(70) | sink(3))", q, k, v, lengths, plan, 16, backend, page)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", [16, None])
def test_lists_by_columns(page: int | None) -> None:
    q, lengths, plan = random(BATCH, HEADS, 1, DIM), [90, 1, 50], make_plan(2, 1, members=6, entries=3)
    k, v = random(BATCH, KV_HEADS, CAPACITY, DIM, seed=1), random(BATCH, KV_HEADS, CAPACITY, 32, seed=2)
    exact = expected("causal", q, k, v, lengths, plan, 16)
    found = decode("causal", q, k, v, lengths, plan, 16, "triton", page, splits=1, columns=2)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("keys", [1, 5, 32, 64])
def test_members_of_any_size(keys: int, backend: str) -> None:
    q, k, v = (
        random(BATCH, HEADS, 1, DIM),
        random(BATCH, KV_HEADS, 96, DIM, seed=1),
        random(BATCH, KV_HEADS, 96, DIM, seed=2),
    )
    plan = make_plan(2, 1, members=-(-96 // keys), entries=min(7, -(-96 // keys)))
    exact = expected("causal", q, k, v, [96, 40, 0], plan, keys)
    found = decode("causal", q, k, v, [96, 40, 0], plan, keys, backend, page=8)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_plans_of_any_form(dtype: torch.dtype, backend: str) -> None:
    """Lists of 32 and 64 bits, that lie anyhow, and an entry for every member."""
    q, k, v = random(BATCH, HEADS, 1, DIM), random(BATCH, KV_HEADS, 96, DIM, seed=1), random(BATCH, KV_HEADS, 96, DIM)
    plan, lengths = make_plan(2, 1, members=6, entries=4), [96, 50, 7]
    given = plan.to(dtype)
    if dtype == torch.uint8:
        given = (plan[..., None] == torch.arange(6)).any(-2).to(torch.uint8)
    given = given[:, :, 0].mT.contiguous().mT if dtype == torch.int64 else given[:, :, 0]
    attn = attndsl.compile("attention a { input listed : blocks(16)[b, g]  attend causal & listed }")
    device = torch.device("cuda" if CUDA and backend == "triton" else "cpu")
    tensors = [x.to(device) for x in (q, k, v, torch.tensor(lengths, dtype=torch.int32), given)]
    out, lse = attn.decode(*tensors[:4], listed=tensors[4], return_lse=True, backend=backend)
    for a, b in zip((out, lse), expected("causal", q, k, v, lengths, plan, 16), strict=True):
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=1e-5, atol=1e-5)


@BACKENDS
def test_what_does_not_increase_or_exist_is_skipped(backend: str) -> None:
    q, k, v = (
        random(BATCH, HEADS, 1, DIM),
        random(BATCH, KV_HEADS, 96, DIM, seed=1),
        random(BATCH, KV_HEADS, 96, DIM, seed=2),
    )
    entries = [4, 4, 1, 4, 5, 2**31 - 1, -(2**31), 99, *[-1] * 300, 5, 4]
    wild = torch.tensor(entries, dtype=torch.int32).expand(BATCH, 1, 1, len(entries))
    tame = torch.tensor([4, 5], dtype=torch.int32).expand(BATCH, 1, 1, 2)
    lengths = [90, 1, 80]
    found = decode("causal", q, k, v, lengths, wild, 16, backend, page=16)
    exact = expected("causal", q, k, v, lengths, tame, 16)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
    assert not found[0][1].any() and (found[1][1] == -torch.inf).all(), "the only key lies in no member"


@BACKENDS
@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("input listed : blocks(16)[b, g]  attend causal & (listed | window(5))", (BATCH, KV_HEADS, 3)),
        ("input listed : blocks(16)[b, q/32]  attend causal & listed", (BATCH, 3, 3)),
        (
            "input listed : blocks(16)[h]  attend (causal & listed) - random(2, tokens, query, 0, among = causal)",
            (HEADS, 3),
        ),
    ],
)
def test_other_uses_of_a_plan(text: str, shape: tuple[int, ...], backend: str) -> None:
    """Where a pattern does not lie in a plan, or rows share lists by blocks, every tile is masked."""
    attn = attndsl.compile(f"attention a {{ {text} }}")
    q, k, v = (
        random(BATCH, HEADS, 2, DIM),
        random(BATCH, KV_HEADS, CAPACITY, DIM, seed=1),
        random(BATCH, KV_HEADS, CAPACITY, DIM),
    )
    lengths = [90, 2, 40]
    generator = torch.Generator().manual_seed(7)
    plan = torch.randint(6, shape, generator=generator).sort(-1).values.to(torch.int32)
    device = torch.device("cuda" if CUDA and backend == "triton" else "cpu")
    given = [x.to(device) for x in (q, k, v, torch.tensor(lengths, dtype=torch.int32), plan)]
    out, lse = attn.decode(*given[:4], listed=given[4], return_lse=True, backend=backend)
    check_decode(attn.program, q, k, v, lengths, {"listed": plan}, {}, out.cpu(), lse.cpu())
