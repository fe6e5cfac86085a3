"""Lists of tiles: the kernels that make them against torch, on plans that nobody checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attndsl.derivation import Gathering, TileList
from attndsl.diagnostics import PatternError
from attndsl.program import Axis, CallShape, Dim, InputDecl, Type
from attndsl.runs import LIST_HEAD, TileRuns
from attndsl.runtime import lists
from attndsl.runtime.plans import Listing, gathered_tiles, list_size, listed
from tests.gpu import interprets

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    interprets,
]
DECL = InputDecl("x", Type.INT, (Dim(Axis.B), Dim(Axis.H), Dim(Axis.LIST)))
NONE = TileRuns((), ())
KINDS: dict[str, tuple[TileList | Gathering, CallShape, int]] = {
    "queries": (TileList("p", 16, 16, 16, 16, False, NONE), CallShape(2, 2, 2, 40, 40, 8, 8), 3),
    "several_tiles": (TileList("p", 32, 32, 16, 8, False, NONE), CallShape(2, 2, 2, 75, 75, 8, 8), 3),
    "keys": (TileList("p", 32, 32, 16, 8, True, NONE), CallShape(2, 2, 2, 75, 75, 8, 8), 3),
    "one_class": (TileList("p", None, 32, 16, 16, True, NONE), CallShape(2, 2, 2, 40, 175, 8, 8), 1),
    "long_members": (TileList("p", 16, 1 << 30, 16, 8, True, NONE), CallShape(2, 2, 2, 40, 44, 8, 8), 3),
    "rows": (Gathering("p", 16, 4, NONE), CallShape(2, 2, 2, 75, 90, 8, 8), 75),
}


Kinds = dict[str, tuple[TileList | Gathering, CallShape, int]]


def random_listing(name: str, slots: int, apart: int, seed: int, kinds: Kinds = KINDS) -> Listing:
    d, shape, classes = kinds[name]
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    plan = integers(-2, -(-shape.k_len // d.keys) + 3, 2, 2, classes, slots)
    plan = plan.sort(-1).values if seed % 3 else plan
    block_q, block_k = (1, d.keys) if isinstance(d, Gathering) else (d.block_q, d.block_k)
    stride = 1 if isinstance(d, Gathering) else d.stride
    q_tiles, k_tiles = -(-shape.rows // block_q), -(-shape.k_len // (block_k * stride))
    # Whole up to some tile, and some of every first or second after it in part.
    whole = integers(0, k_tiles, apart, q_tiles)
    ends = torch.ones(1, apart, q_tiles, 2, 4, dtype=torch.int32)
    ends[0, ..., 0, 0], ends[0, ..., 0, 1], ends[..., 0, 3] = 0, whole, 0
    ends[0, ..., 1, 0], ends[0, ..., 1, 1] = whole, whole + integers(0, k_tiles + 1, apart, q_tiles)
    ends[0, ..., 1, 2] = integers(1, 3, apart, q_tiles)
    return Listing(d, shape, plan.to(torch.int32 if seed % 2 else torch.int64), ends, shape.k_len - shape.rows)


def said(found: Listing, made: Tensor) -> list[list[int]]:
    """What a list says of each batch entry, head and own tile: the entries of each kind, and of a gathered tile what it
    is of."""
    q_tiles = found.ends.shape[2]
    rows = found.k_tiles if isinstance(found.d, Gathering) or found.d.of_keys else q_tiles
    gathered = gathered_tiles(found.d, found.shape, found.slots) if isinstance(found.d, Gathering) else 0
    result = []
    for row in made.flatten(0, 1).tolist():
        for t in range(rows):
            begin, middle, end = row[LIST_HEAD * t : LIST_HEAD * t + 3]
            result.append([*row[begin:middle], -1, *row[middle:end]])
        for t in range(rows, rows + gathered):
            group, begin, end = row[LIST_HEAD * t : LIST_HEAD * t + 3]
            result.append([group, *row[begin:end]] if begin < end else [])
    return result


@settings(max_examples=12)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 6), st.integers(1, 2), st.integers(0, 99))
def test_kernels_make_what_torch_makes(name: str, slots: int, apart: int, seed: int) -> None:
    found = random_listing(name, slots, apart, seed)
    expected = listed(found, DECL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Listing, "by_kernels", True)
        # Sums of long rows are made group by group, and few chunks go over their query tiles in several steps.
        patch.setattr(lists, "LONG", seed % 2 << 15)
        patch.setattr(lists, "MAX_CHUNKS", 1 + seed // 2 % 3)
        made = listed(found, DECL)
    assert made.shape == expected.shape
    assert said(found, made) == said(found, expected)


MAPS: Kinds = {
    "queries": (TileList("p", 16, 16, 16, 16, False, NONE), CallShape(2, 2, 2, 40, 40, 8, 8), 3),
    "a_map_of_tiles": (TileList("p", 16, 8, 16, 8, True, NONE, mapped=True), CallShape(2, 2, 2, 75, 90, 8, 8), 5),
    "its_queries": (TileList("p", 16, 8, 16, 8, False, NONE, mapped=True), CallShape(2, 2, 2, 75, 2100, 8, 8), 5),
    "a_level": (TileList("p", 32, 32, 16, 8, True, NONE, level=2, stride=2), CallShape(2, 2, 2, 75, 150, 8, 8), 5),
    "left_out": (TileList("p", None, 32, 16, 16, True, NONE, complement=True), CallShape(2, 2, 2, 40, 175, 8, 8), 1),
    "many_rows": (TileList("p", 4, 8, 4, 8, True, NONE), CallShape(1, 2, 2, 600, 150, 8, 8), 150),
    "before_the_first": (TileList("p", 64, 64, 64, 64, False, NONE), CallShape(2, 2, 2, 320, 64, 8, 8), 5),
    "rows": (Gathering("p", 16, 4, NONE), CallShape(2, 2, 2, 75, 90, 8, 8), 75),
}


@settings(max_examples=12)
@given(st.sampled_from(sorted(MAPS)), st.integers(1, 2), st.integers(1, 2), st.integers(0, 99))
def test_kernels_list_maps_as_torch_does(name: str, batches: int, apart: int, seed: int) -> None:
    found = random_map(name, batches, apart, seed)
    expected = listed(found, DECL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Listing, "by_map_kernels", True)
        made = listed(found, DECL)
    assert made.shape == expected.shape
    assert said(found, made) == said(found, expected)


def random_map(name: str, batches: int, apart: int, seed: int) -> Listing:
    """A map with bytes of its own, or of a complement sometimes a plan that lists what is left out."""
    d, _, classes = MAPS[name]
    generator = torch.Generator().manual_seed(seed)
    found = random_listing(name, 3, apart, seed, MAPS)
    ends = found.ends
    if batches == 2:
        ends = torch.cat((ends, random_listing(name, 3, apart, seed + 100, MAPS).ends))
    if isinstance(d, TileList) and d.complement and seed % 2:
        return replace(found, ends=ends)
    bytes_of = torch.randint(0, 3, (2, 2, classes, found.members), generator=generator).to(torch.uint8)
    return replace(found, plan=bytes_of, ends=ends)


@pytest.mark.parametrize("of_keys", [False, True])
def test_members_longer_than_a_call_list_its_tiles(of_keys: bool) -> None:
    """Of 2^30 keys a list had room for 2^26 tiles of 16, and took gigabytes."""
    shape, dims = CallShape(2, 2, 2, 40, 40, 8, 8), (Dim(Axis.B), Dim(Axis.H), Dim(Axis.Q), Dim(Axis.LIST))
    made = []
    for keys in (1 << 30, 48):
        d = TileList("p", 16, keys, 16, 16, of_keys, NONE)
        found = random_listing("long", 2, 1, 5, {"long": (d, shape, 3)})
        made.append(listed(found, DECL))
        assert list(made[-1].shape) == list_size(d, DECL, found.plan, dims, shape)
    assert torch.equal(*made) and made[0].numel() < 200


def test_widths() -> None:
    assert [lists.width_of(n) for n in (1, 2, 3, 9, 128)] == [2, 2, 4, 16, 128]
    assert lists.chunks_of(100, 9) == (13, 1)
    # Four times the query tiles, as many chunks: counts grow with key tiles alone.
    assert [lists.chunks_of(n << 10, 16) for n in (4, 16, 64, 256)] == [(512, 1), (512, 4), (512, 16), (512, 64)]


WIDE: dict[str, tuple[TileList | Gathering, int, int]] = {
    "entries": (Gathering("p", 16, 64, NONE), (1 << 16) + 1, 1 << 14),
    "places of rows": (Gathering("p", 16, 4, NONE), 1 << 16, 18_000),
    "places of tiles": (TileList("p", 16, 16, 16, 16, False, NONE), 1 << 20, (1 << 15) - 4),
}


@pytest.mark.parametrize("name", WIDE)
def test_lists_past_32_bits_are_refused(name: str) -> None:
    """What stands in a list, or where, of plans that are as wide as they like."""
    d, rows, slots = WIDE[name]
    dims = (Dim(Axis.B), Dim(Axis.H), Dim(Axis.Q), Dim(Axis.LIST))

    def size(slots: int) -> list[int]:
        plan = torch.empty(1, 1, rows, slots, dtype=torch.int32, device="meta")
        return list_size(d, DECL, plan, dims, CallShape(1, 1, 1, rows, rows, 8, 8))

    assert size(slots)[-1] < 1 << 31
    with pytest.raises(PatternError, match="A515"):
        size(slots + (1 if name == "entries" else 1000))
