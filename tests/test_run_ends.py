"""Runs of equal ids by the kernels, as torch finds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attndsl.runtime.cuts import document_ends
from attndsl.runtime.run_ends import ends_by_kernel, entries_by_kernel
from attndsl.runtime.runs import document_entries, runs_of
from tests.accuracy import examples
from tests.gpu import interprets

pytestmark = [interprets, pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")]
# Shorter and longer than a program's chunk, and than what it looks back at at once.
LENGTHS = (1, 7, 1023, 1024, 1025, 5200)


def drawn(lead: tuple[int, ...], tokens: int, share: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Ids of runs in no order, which begin at this share of tokens."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(*lead, tokens, generator=generator) < share
    return (begins.cumsum(-1) * 37 % 11).to(dtype)


lengths = st.sampled_from(LENGTHS)
leads = st.sampled_from([(), (1,), (2,), (2, 3)])
shares = st.sampled_from([0.0, 0.0005, 0.01, 0.5, 1.0])
dtypes = st.sampled_from([torch.int32, torch.int64, torch.int8])


@examples(10)
@given(leads, lengths, shares, dtypes, st.integers(0, 99))
def test_ends(lead: tuple[int, ...], tokens: int, share: float, dtype: torch.dtype, seed: int) -> None:
    ids = drawn(lead, tokens, share, dtype, seed)
    for found, ends in zip(ends_by_kernel(ids), (False, True), strict=True):
        assert torch.equal(found, document_ends(ids, ends))


@examples(10)
@given(leads, lengths, shares, st.sampled_from([1, 2, 64, 5000]), st.sampled_from([1, 3, 64, 5000]), st.booleans(),
       st.integers(0, 99))  # fmt: skip
def test_entries(
    lead: tuple[int, ...], tokens: int, share: float, size: int, stride: int, bounded: bool, seed: int
) -> None:
    ids = drawn(lead, tokens, share, torch.int32, seed)
    present = torch.randint(0, tokens + 1, lead, generator=torch.Generator().manual_seed(seed)) if bounded else None
    runs, document = document_entries(ids, size, stride, present)
    for found, wanted in zip(entries_by_kernel(ids, size, stride, present), (*runs, document), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_runs_are_entries_that_are_long_enough(share: float) -> None:
    ids = drawn((2,), 1500, share, torch.int32, 1)
    for found, wanted in zip(entries_by_kernel(ids, 1500, 1500)[:3], runs_of(ids), strict=True):
        assert torch.equal(found, wanted)
