"""Bounds of pages and the pages chosen by them: against loops over tokens, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.codegen.triton_pages import pages_source
from attndsl.runtime.page_choice import PageKernels

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
CUDA = torch.cuda.is_available()
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cpu"])
FP8 = torch.float8_e4m3fn
KERNELS = PageKernels(pages_source)


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if CUDA and backend == "triton" else "cpu")


def table_of(batch: int, places: int, spare: int = 2) -> Tensor:
    order = torch.randperm(batch * places + spare, generator=torch.Generator().manual_seed(5))
    return order[: batch * places].view(batch, places).to(torch.int32)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, FP8])
@pytest.mark.parametrize(("page", "dim"), [(4, 16), (16, 24), (100, 8)])
def test_bounds(page: int, dim: int, dtype: torch.dtype, backend: str) -> None:
    """Those of the touched pages are of all their tokens; others stay, and what lies behind a length counts nowhere."""
    device, places = device_of(backend), 4
    table = table_of(3, places)
    k = random(14, 2, page, dim).to(dtype)
    bound = torch.float32 if dtype == FP8 else dtype
    lengths = ints(3 * page + 1, 0, page)
    table[2, 0] = 99
    k_min, k_max = (torch.full((14, 2, dim), 7.0, dtype=bound, device=device) for _ in range(2))
    given = (k.to(device), k_min, k_max, lengths.to(device), table.to(device))
    KERNELS.update(*given, new=page + 2, backend=backend)
    touched = {int(table[0, i]): min(page, 3 * page + 1 - i * page) for i in (1, 2, 3)}
    for at in range(14):
        if at in touched:
            keys = k[at, :, : touched[at]].to(bound)
            assert torch.equal(k_min[at].cpu(), keys.amin(1)) and torch.equal(k_max[at].cpu(), keys.amax(1))
        else:
            assert (k_min[at] == 7).all() and (k_max[at] == 7).all()


def best(
    q: Tensor, bounds: tuple[Tensor, Tensor], length: int, row: int, table: Tensor, page: int, recent: int
) -> list[int]:
    """All candidates of a row for heads q [group, D], the best one first."""
    least, largest = (x.double() for x in bounds)
    ranked = []
    for place in range(len(table)):
        at = int(table[place])
        if place * page > row or not 0 <= at < len(least):
            continue
        score = float(torch.maximum(q.double() * least[at], q.double() * largest[at]).sum())
        ranked.append((-float("inf") if place > row // page - recent else -score, place))
    return [place for _, place in sorted(ranked)]


@BACKENDS
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("heads", "rows", "count", "recent"), [(4, 1, 3, 0), (4, 2, 5, 2), (2, 1, 40, 1)])
def test_top(heads: int, rows: int, count: int, recent: int, shared: bool, backend: str) -> None:
    device, page, places, kv_heads, dim = device_of(backend), 4, 30, 2, 24
    table, lengths = table_of(3, places), [117, 2, 60]
    table[0, 3] = -1
    q = random(3, heads, rows, dim)
    k_min = random(92, kv_heads, dim, seed=1)
    k_max = k_min + random(92, kv_heads, dim, seed=2).abs()
    found = KERNELS.top(
        q.to(device), k_min.to(device), k_max.to(device), ints(*lengths).to(device), table.to(device), page, count,
        recent, shared, backend,
    ).cpu()  # fmt: skip
    lists, group = (kv_heads if shared else heads), heads // kv_heads
    assert found.shape == (3, lists, rows, count) and found.dtype == torch.int32
    for b, length in enumerate(lengths):
        for at in range(lists):
            g = at if shared else at // group
            of = slice(g * group, (g + 1) * group) if shared else slice(at, at + 1)
            for r in range(rows):
                bounds = (k_min[:, g], k_max[:, g])
                ranked = best(q[b, of, r], bounds, length, length - rows + r, table[b], page, recent)
                expected = sorted(ranked[:count])
                assert found[b, at, r].tolist() == expected + [-1] * (count - len(expected))


@BACKENDS
def test_equal_bounds_go_to_the_earlier_page(backend: str) -> None:
    device = device_of(backend)
    same = torch.zeros(20, 1, 8, device=device)
    same[7] = torch.nan
    table = torch.arange(20, dtype=torch.int32, device=device)[None]
    q = random(1, 1, 1, 8).to(device)
    found = KERNELS.top(q, same, same, ints(80).to(device), table, 4, 9, recent=1, backend=backend)
    assert found.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 19], "what is no number is left out"


@BACKENDS
def test_wild_lengths_and_tables(backend: str) -> None:
    """Nothing outside the pool is read or written, and lengths end at the table."""
    device = device_of(backend)
    k, low, high = random(3, 1, 4, 8).to(device), *(torch.zeros(3, 1, 8, device=device) for _ in range(2))
    table = torch.tensor([[1, 2**31 - 1], [-(2**31), 3], [0, 2]], dtype=torch.int32, device=device)
    lengths = ints(2**31 - 1, 2**31 - 1, -(2**31)).to(device)
    KERNELS.update(k, low, high, lengths, table, new=1 << 40, backend=backend)
    assert torch.equal(low[1], k[1].amin(1)) and torch.equal(high[1], k[1].amax(1))
    assert not low[[0, 2]].any() and not high[[0, 2]].any()
    found = KERNELS.top(random(3, 1, 1, 8).to(device), low, high, lengths, table, 4, 2, backend=backend)
    assert found[:, 0, 0].tolist() == [[0, -1], [-1, -1], [-1, -1]]


def test_bad_bounds() -> None:
    k, bound = random(4, 1, 4, 8), random(4, 1, 8)
    table, lengths = ints(0, 1)[None], ints(3)
    for given, code in (
        ((k, bound[:3], bound, lengths, table), "A560"),
        ((k, bound, bound.half(), lengths, table), "A560"),
        ((k, bound, bound, lengths.long(), table), "A550"),
        ((k, bound, bound, lengths, table.long()), "A551"),
    ):
        with pytest.raises(attndsl.PatternError) as caught:
            KERNELS.update(*given, new=1)
        assert caught.value.diagnostics[0].code == code
