"""`attn.decode` against the oracle on each sequence alone: interpreted where there is no GPU, and on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from attndsl.decode import Cache, decode_plan
from attndsl.oracle import mask
from attndsl.plan import DType, Spec, Tiling
from attndsl.program import Axis, CallShape, Dim
from tests.accuracy import examples
from tests.cases import CASES, case
from tests.decoding import check_decode, decoder, of_length, tensors_of
from tests.strategies import Case, composed_programs, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tiling(16, 32)
SPEC = Spec(2, 1, 16, 16, DType.FLOAT32, "cpu")
BACKENDS = ("triton", "cpu")
COLUMNS = {
    "softmax_sink": case(
        "attention s { input sink : float[h]  attend causal & window(50) softmax with sink sink[h] }", heads=(6, 2),
        inputs={"sink": np.linspace(-1, 2, 6).astype(np.float32)},
    ),
    "weights": case("attention w { attend causal & window(50) weights max(s, 0) }", heads=(4, 2)),
}  # fmt: skip
UNSORTED = case(
    "attention d { input doc : int[b, k]  attend causal & document(doc) }",
    inputs={"doc": np.random.default_rng(1).integers(0, 4, (2, 70)).astype(np.int32)},
)
DECODED = [name for name, case in CASES.items() if "align start" not in case.text]


def judge(
    case: Case, lengths: Sequence[int], backend: str, page: int | None = None, splits: int | None = 3,
    tiling: Tiling | None = SMALL, dtype: torch.dtype = torch.float32, columns: int = 1,
) -> None:  # fmt: skip
    """The case's call as a decode, its keys the capacity of the cache."""
    program = case.load()
    q, k, v, inputs = tensors(case, dtype=dtype)
    # Sizes of a batch of one hold for more; sequences differ.
    device = DEVICE if backend == "triton" else torch.device("cpu")
    call = tensors_of(q, k, v, lengths, page, device)
    given = [inputs[decl.name].to(device) for decl in program.inputs]
    numbers = [case.args[name] for name in program.args]
    tiling = tiling if backend == "triton" else Tiling(64, 32)
    made = decoder(program, tiling=tiling, splits=splits, columns=columns)
    out, lse = made.decode(call, given, numbers, None, backend)
    check_decode(program, q, k, v, lengths, inputs, case.args, out.cpu(), lse.cpu())


def some_lengths(case: Case, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    rows, capacity = case.shape.rows, case.shape.k_len
    known = [0, 1, min(rows, capacity), capacity, max(capacity - 1, 0), int(rng.integers(0, capacity + 1))]
    return [known[rng.integers(len(known))] for _ in range(case.shape.batch)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODED)
def test_program(name: str, backend: str) -> None:
    case = CASES[name]
    shape, number = case.shape, DECODED.index(name)
    if not any(decl.dims and Dim(Axis.Q) in decl.dims for decl in case.load().inputs):
        case = replace(case, shape=replace(shape, rows=min(shape.rows, 5)))
    judge(case, some_lengths(case, number), backend, page=page_of(shape.k_len) if number % 2 else None)


def page_of(capacity: int) -> int:
    """A page size that divides the capacity, which inputs over k have."""
    return next(size for size in (16, 10, 8, 7, 1) if capacity % size == 0)


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")]


@pytest.mark.parametrize(("rows", "dim", "page"), [(1, 128, 16), (20, 64, 64), (3, 80, None)])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)], ids=str)
def test_dtype(dtype: torch.dtype, rows: int, dim: int, page: int | None) -> None:
    """Tiles and slices as they are chosen for a device."""
    shape = CallShape(2, 8, 2, rows, 192, dim, dim)
    case = replace(CASES["streaming"], text="causal & (sink(4) | window(100))", shape=shape)
    judge(case, [192, 115], "triton", page, splits=None, tiling=None, dtype=dtype)


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("name", ["streaming", "last_row", "prefix", "softmax_sink", "weights", "tree"])
def test_columns(name: str, columns: int) -> None:
    """Programs that share rows by the columns of the values: no slices, and lse is written once."""
    case = COLUMNS.get(name) or CASES[name]
    case = replace(case, shape=replace(case.shape, dim=32, v_dim=64, rows=min(case.shape.rows, 8)))
    judge(case, some_lengths(case, columns), "triton", page_of(70) if columns == 4 else None, 1, columns=columns)


SCATTERED = ["dilated", "power_of_two", "documents_unsorted", "segment", "permuted"]


@pytest.mark.parametrize(
    ("name", "page"),
    [*((name, page) for name in SCATTERED for page in (None, 7)), ("dilated", 32), ("power_of_two", 32)],
)
def test_only_allowed_keys_are_loaded(name: str, page: int | None) -> None:
    """A row alone loads of its tiles what it allows: what the rest hold may be no numbers."""
    case, tokens = UNSORTED if name == "documents_unsorted" else CASES[name], 96 if page == 32 else 70
    case = replace(case, shape=replace(case.shape, rows=1, k_len=tokens))
    (batch, heads, kv_heads, *_), program, lengths = astuple(case.shape), case.load(), [tokens, 31]
    q, k, v, inputs = tensors(case)
    spec = Spec(heads, kv_heads, case.shape.dim, case.shape.v_dim, DType.FLOAT32, "cpu")
    assert decode_plan(program, spec, 1, Cache(page), tiling=SMALL).scattered
    hidden = v.clone()
    for b, length in enumerate(lengths[:batch]):
        arrays = {x: y.numpy() for x, y in of_length(program, inputs, length, 1).items()}
        seen = mask(program, CallShape(batch, heads, kv_heads, 1, length, 8, 8), arrays, {})[b, :, 0]
        allowed = torch.from_numpy(seen.reshape(kv_heads, -1, length).any(1))
        hidden[b, :, :length][~allowed] = torch.nan
    given, made = [inputs[decl.name].to(DEVICE) for decl in program.inputs], decoder(program, tiling=SMALL, splits=2)
    calls = (tensors_of(q, k, values, lengths[:batch], page, DEVICE) for values in (v, hidden))
    first, second = (made.decode(call, given, [], None, "triton")[0] for call in calls)
    assert hidden.isnan().any() and torch.equal(first, second)


@st.composite
def decodes(draw: st.DrawFn) -> tuple[Case, list[int], int | None]:
    case = draw(composed_programs(lengths=(1, 7, 33, 64, 100)))
    if case.load().align_start:
        reject()
    capacity = case.shape.k_len
    known = st.sampled_from([0, 1, min(case.shape.rows, capacity), capacity])
    lengths = [draw(st.one_of(known, st.integers(0, capacity))) for _ in range(case.shape.batch)]
    if "order" in case.inputs:
        # A permutation of each sequence's tokens, and not of the cache's places alone.
        ends = sorted({0, *lengths, capacity})
        runs = [np.arange(low, high)[::-1] for low, high in pairwise(ends)]
        case = replace(case, inputs={**case.inputs, "order": np.concatenate([np.arange(0), *runs]).astype(np.int32)})
    return case, lengths, draw(st.sampled_from((None, None, 1, 16, 24)))


@given(drawn=decodes(), splits=st.sampled_from((1, 2, 5)))
@examples(15)
def test_random(drawn: tuple[Case, list[int], int | None], splits: int) -> None:
    case, lengths, page = drawn
    # A capacity of whole pages would ask for longer inputs.
    judge(case, lengths, "triton", page if page and case.shape.k_len % page == 0 else None, splits)


@given(drawn=decodes())
@examples(15)
def test_random_on_the_cpu(drawn: tuple[Case, list[int], int | None]) -> None:
    case, lengths, page = drawn
    judge(case, lengths, "cpu", page if page and case.shape.k_len % page == 0 else None)
