"""Calls of `attn.decode`: caches of every kind, rows and heads of every number, untrusted tensors, torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.decode import Cache, column_count, decode_plan, split_count
from attndsl.plan import DType, Spec
from attndsl.runtime import derive_ragged
from attndsl.runtime.decode import reach
from attndsl.runtime.derive_ragged import RaggedDeriver
from attndsl.runtime.registry import decoder_of
from tests.covered import covers
from tests.decoding import check_decode, paged

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cpu"])
STREAMING = "causal & (window(20) | sink(3))"
FP8 = torch.float8_e4m3fn


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode(attn: attndsl.Attention, backend: str, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and lse, of tensors moved to where the backend runs."""
    device = DEVICE if backend == "triton" else torch.device("cpu")
    moved = [x if x is None else x.to(device) for x in tensors]
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    out, lse = attn.decode(*moved, return_lse=True, backend=backend, **options)  # type: ignore[arg-type]
    return out.cpu(), lse.cpu()


@BACKENDS
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("page", [None, 1, 6, 16, 64])
def test_cache(page: int | None, layout: str, backend: str) -> None:
    """Pages in any order, of any size, give what a contiguous cache does."""
    attn = attndsl.compile(STREAMING)
    q, k, v = random(3, 4, 2, 16), random(3, 2, 192, 16, seed=1), random(3, 2, 192, 24, seed=2)
    lengths = [192, 1, 101]
    keys, values, table = (k, v, None) if page is None else paged(k, v, page)
    if layout == "nhd":
        keys, values = (x.transpose(1, 2).contiguous() for x in (keys, values))
    out, lse = decode(attn, backend, q, keys, values, ints(*lengths), table, layout=layout)
    check_decode(attn.program, q, k, v, lengths, {}, {}, out, lse)


@BACKENDS
@pytest.mark.parametrize(
    ("heads", "rows", "dims"),
    [((1, 1), 1, (8, 8)), ((4, 4), 5, (16, 16)), ((3, 1), 17, (80, 40)), ((10, 2), 3, (16, 16)), ((70, 1), 2, (16, 8)),
     ((16, 1), 1, (16, 16)), ((4, 2), 33, (16, 16))],
)  # fmt: skip
def test_rows_and_heads(heads: tuple[int, int], rows: int, dims: tuple[int, int], backend: str) -> None:
    """Heads that fill a tile or not, or take several; rows from one to a chunk of a prompt."""
    attn = attndsl.compile("attention a { score s - (h + 1) / 8 * (q - k)  attend causal & (window(20) | sink(3)) }")
    q = random(2, heads[0], rows, dims[0])
    k, v = random(2, heads[1], 90, dims[0], seed=1), random(2, heads[1], 90, dims[1], seed=2)
    lengths = [90, 40]
    out, lse = decode(attn, backend, q, k, v, ints(*lengths))
    check_decode(attn.program, q, k, v, lengths, {}, {}, out, lse)


@BACKENDS
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("page", [None, 8])
def test_fp8(page: int | None, per_head: bool, backend: str) -> None:
    """An 8-bit cache is its numbers times its scales."""
    attn = attndsl.compile("attention a { score softcap(s, 5.0)  attend causal & (window(20) | sink(3)) }")
    dtype = torch.float16
    q = random(2, 4, 3, 16, dtype=dtype)
    k, v = random(2, 2, 48, 16, seed=1).to(FP8), random(2, 2, 48, 16, seed=2).to(FP8)
    # Every finite number, the smallest ones too.
    k[0, 0].view(torch.uint8).view(-1)[:254] = torch.tensor(
        [x for x in range(256) if x & 127 != 127], dtype=torch.uint8
    )
    scales = torch.tensor([0.5, 0.01]) if per_head else torch.tensor(0.25)
    keys, values, table = (k, v, None) if page is None else paged(k.view(torch.uint8), v.view(torch.uint8), page)
    given = (q, keys.view(FP8), values.view(FP8), ints(48, 30), table)
    out, lse = decode(attn, backend, *given, k_scale=scales, v_scale=scales * 2)
    by_head = scales.view(-1, 1, 1)
    exact_k, exact_v = k.float() * by_head, v.float() * by_head * 2
    for b, length in enumerate((48, 30)):
        wanted, wanted_lse = attn.reference(
            q[b : b + 1].float(), exact_k[b : b + 1, :, :length], exact_v[b : b + 1, :, :length], return_lse=True
        )
        torch.testing.assert_close(out[b].double(), wanted[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse[b].double(), wanted_lse[0], rtol=2e-3, atol=2e-3)


@BACKENDS
def test_negative_k_scale(backend: str) -> None:
    attn = attndsl.compile("causal")
    q, k, v = random(1, 1, 1, 16), random(1, 1, 40, 16, seed=1).to(FP8), random(1, 1, 40, 16, seed=2).to(FP8)
    out, _ = decode(attn, backend, q, k, v, ints(40), k_scale=torch.tensor([-3.0]))
    torch.testing.assert_close(out.double(), attn.reference(q, -3.0 * k.float(), v.float()), rtol=1e-5, atol=1e-5)


@BACKENDS
def test_a_row_of_the_whole(backend: str) -> None:
    """The last rows of every sequence are those of the whole pattern, rows that decode never saw included."""
    attn = attndsl.compile(STREAMING)
    q, k, v = random(2, 2, 64, 16), random(2, 1, 64, 16, seed=1), random(2, 1, 64, 16, seed=2)
    lengths, n = [64, 37], 4
    last = torch.stack([q[b, :, length - n : length] for b, length in enumerate(lengths)])
    out, lse = decode(attn, backend, last, k, v, ints(*lengths))
    for b, length in enumerate(lengths):
        whole = (x[b : b + 1, :, :length] for x in (q, k, v))
        wanted, wanted_lse = attn.reference(*whole, return_lse=True)
        torch.testing.assert_close(out[b].double(), wanted[0, :, -n:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b].double(), wanted_lse[0, :, -n:], rtol=1e-5, atol=1e-5)


@covers("tree")
@BACKENDS
def test_tree(backend: str) -> None:
    """A tree of drafts: each sees the tokens before the tree, its ancestors and itself."""
    attn = attndsl.compile(ROOT / "examples" / "patterns" / "tree.attn", n=4)
    assert not attn.warnings, "a row means the same whatever follows"
    # Drafts 1 and 2 follow 0; 3 follows 1.
    under = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)[None]
    q, k, v = random(2, 4, 4, 16), random(2, 2, 50, 16, seed=1), random(2, 2, 50, 16, seed=2)
    lengths = [50, 21]
    inputs = {"first": ints(*lengths) - 4, "under": under}
    out, lse = decode(attn, backend, q, k, v, ints(*lengths), **inputs)
    check_decode(attn.program, q, k, v, lengths, inputs, {}, out, lse)
    # Draft 3 gives what the path 0, 1, 3 alone would.
    path = [*range(17), 17, 18, 20]
    alone = attndsl.compile("causal").reference(q[1:, :, [3]], k[1:, :, path], v[1:, :, path])
    torch.testing.assert_close(out[1:, :, 3:].double(), alone, rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("page", [1, 16, 256])
def test_a_tree_of_64_drafts(page: int, backend: str) -> None:
    """Any tree, over pages of any size, one sequence hardly longer than its drafts."""
    n, lengths, generator = 64, [300, 65], torch.Generator().manual_seed(0)
    under = torch.eye(n, dtype=torch.bool).repeat(2, 1, 1)
    for b in range(2):
        for i in range(1, n):
            under[b, i] |= under[b, int(torch.randint(i, (), generator=generator))]
    q, k, v = random(2, 4, n, 16), random(2, 2, 300, 16, seed=1), random(2, 2, 300, 16, seed=2)
    inputs = {"first": ints(*lengths) - n, "under": under}
    attn = attndsl.compile(ROOT / "examples" / "patterns" / "tree.attn", n=n)
    keys, values, table = paged(k, v, page)
    out, lse = decode(attn, backend, q, keys, values, ints(*lengths), table, **inputs)
    check_decode(attn.program, q, k, v, lengths, inputs, {}, out, lse)


@pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
@pytest.mark.parametrize(
    "text",
    [
        "causal & (window(3) | random(2, of = blocks(8), per = rows(6), seed = h % 2))",
        "causal & random(2, of = blocks(4), per = rows(8), among = causal - window(20), seed = h)",
        "causal & random(2, of = blocks(7), per = query, among = dilated(3), seed = 1)",
        "causal & random(3, of = tokens, per = query, among = causal & window(20), seed = h)",
    ],
)
def test_what_may_be_drawn_has_a_closed_form(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn among has no pair looked at, and the same is drawn as where all are counted."""
    q, k, v = random(3, 4, 5, 16), random(3, 2, 100, 16, seed=1), random(3, 2, 100, 16, seed=2)
    found = [decode(attndsl.compile(text), "cpu", q, k, v, ints(100, 3, 57))[0]]
    counted = RaggedDeriver._ragged_counts
    with monkeypatch.context() as patched:
        patched.setattr(RaggedDeriver, "_ragged_counts", None)
        found.append(decode(attndsl.compile(text), "cpu", q, k, v, ints(100, 3, 57))[0])
    asked = list[str]()

    def counts(self: RaggedDeriver, *given: Any) -> Any:
        asked.append(text)
        return counted(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(derive_ragged, "_touching", lambda *_: None)
        patched.setattr(RaggedDeriver, "_ragged_counts", counts)
        found.append(decode(attndsl.compile(text), "cpu", q, k, v, ints(100, 3, 57))[0])
    assert asked and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ------------------------------------------------------------------------------- untrusted tensors


@BACKENDS
def test_lengths_are_clamped(backend: str) -> None:
    attn = attndsl.compile(STREAMING)
    q, k, v = random(3, 2, 2, 16), random(3, 1, 40, 16, seed=1), random(3, 1, 40, 16, seed=2)
    wild = decode(attn, backend, q, k, v, ints(2**31 - 1, -5, -(2**31)))
    tame = decode(attn, backend, q, k, v, ints(40, 0, 0))
    for found, wanted in zip(wild, tame, strict=True):
        assert torch.equal(found, wanted)
    assert not wild[0][1:].any() and (wild[1][1:] == -torch.inf).all()


def test_what_a_sequence_may_have_leaves_room_in_32_bits() -> None:
    """The end of the last tile, and sums of two lengths, are no negative numbers."""
    tables = [torch.empty(1, n, dtype=torch.int32, device="meta") for n in (3, 1 << 28)]
    assert [reach(16, table) for table in tables] == [48, 1 << 30] and reach(1 << 31, None) == 1 << 30


@BACKENDS
@pytest.mark.parametrize("page", [4, 64])
def test_pages_that_do_not_exist_are_not_read(page: int, backend: str) -> None:
    """They count as zeros where a pair is masked, so what was given back can be marked so."""
    attn = attndsl.compile("causal & (window(10) | sink(4))")
    q, k, v = random(1, 2, 1, 16), random(1, 1, 128, 16, seed=1), random(1, 1, 128, 16, seed=2)
    keys, values, table = paged(k, v, page)
    out, lse = decode(attn, backend, q, keys, values, ints(128), table)
    free = attn.evictable(127, page)
    marked = table.clone()
    marked[0, free] = ints(*([-1, 2**31 - 1, -(2**31)] * 20)[: len(free)])
    assert len(free) == (28 if page == 4 else 0)
    found = decode(attn, backend, q, keys, values, ints(128), marked)
    assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    wild = torch.full_like(table, 2**30)
    assert not decode(attn, backend, q, keys.nan_to_num(), values.nan_to_num(), ints(128), wild)[0].isnan().any()


def test_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNDSL_DEBUG", "1")
    attn = attndsl.compile("causal")
    q, k, v = random(1, 1, 1, 16), random(1, 1, 32, 16), random(1, 1, 32, 16)
    keys, values, table = paged(k, v, 8)
    attn.decode(q, keys, values, ints(9), table)
    with pytest.raises(attndsl.PatternError, match="sequence 0 has length 33"):
        attn.decode(q, keys, values, ints(33), table)
    table[0, 1] = 99
    attn.decode(q, keys, values, ints(8), table)
    with pytest.raises(attndsl.PatternError, match="page 1 of sequence 0 is 99"):
        attn.decode(q, keys, values, ints(9), table)


def wrong(**changed: Any) -> dict[str, Any]:
    """A call over pages that is right, but for what is changed."""
    right = {
        "q": random(2, 4, 1, 16), "k": random(6, 2, 8, 16), "v": random(6, 2, 8, 24), "seq_lens": ints(9, 20),
        "page_table": torch.arange(6, dtype=torch.int32).view(2, 3),
    }  # fmt: skip
    return right | changed


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("A501", wrong(k=random(6, 2, 8)), "k_cache must have 4 dimensions"),
    ("A502", wrong(k=random(6, 2, 8, 16).half()), "q is float32, k_cache float16 and v_cache float32"),
    ("A502", wrong(v=random(6, 2, 8, 24).to(FP8)), "q is float32, k_cache float32 and v_cache float8_e4m3fn"),
    ("A502", wrong(q=random(2, 4, 1, 16).long()), "q is int64"),
    ("A502", wrong(q=random(2, 4, 1, 16).to(FP8)), "q is float8_e4m3fn"),
    ("A503", wrong(seq_lens=torch.zeros(2, dtype=torch.int32, device="meta")), "seq_lens on meta"),
    ("A504", wrong(k=random(6, 2, 8, 8)), "do not go together"),
    ("A504", wrong(v=random(6, 2, 9, 24)), "do not go together"),
    ("A504", wrong(page_table=None), "do not go together"),
    ("A504", wrong(k=random(0, 2, 8, 16), v=random(0, 2, 8, 24)), "do not go together"),
    ("A505", wrong(q=random(2, 3, 1, 16)), "3 query heads are not a multiple of 2"),
    ("A506", wrong(v=random(6, 2, 8, 20)), "Dv = 20"),
    ("A550", wrong(seq_lens=ints(9, 20).long()), "seq_lens is int64"),
    ("A550", wrong(seq_lens=ints(9)), r"seq_lens is int32 \[1\]; this call needs int32 \[2\]"),
    ("A551", wrong(page_table=torch.zeros(2, 3)), "page_table is float32"),
    ("A551", wrong(page_table=ints(0, 1)), r"page_table is int32 \[2\]"),
    ("A551", wrong(page_table=torch.zeros(1, 3, dtype=torch.int32)), r"page_table is int32 \[1, 3\]"),
    ("A551", wrong(page_table=torch.zeros(2, 0, dtype=torch.int32)), r"page_table is int32 \[2, 0\]"),
    ("A552", wrong(k=random(6, 2, 16, 8).mT), "last dimension of k_cache has stride 8"),
    ("A552", wrong(layout="hdn"), "no layout 'hdn'"),
    ("A553", wrong(k_scale=torch.ones(2)), "k_scale is float32"),
]


@pytest.mark.parametrize(("code", "call", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_tensors(code: str, call: dict[str, Any], message: str) -> None:
    """Each is named, on the host, with nothing read from the device."""
    attn, given = attndsl.compile("causal"), dict(call)
    tensors = [given.pop(name) for name in ("q", "k", "v", "seq_lens", "page_table")]
    with pytest.raises(attndsl.PatternError, match=message) as caught:
        attn.decode(*tensors, **given)
    assert caught.value.diagnostics[0].code == code


# ------------------------------------------------------------------------------------- the operator


def test_one_launch_serves_all_lengths() -> None:
    attn = attndsl.compile("causal & window(7)")
    q, k, v = random(2, 1, 1, 16), random(2, 1, 64, 16), random(2, 1, 64, 16)
    for length in (0, 1, 63, 64):
        attn.decode(q, k, v, ints(length, 64 - length))
    assert len(decoder_of(attn._key)._prepared) == 1


def test_slices_come_from_the_capacity() -> None:
    """Slices of a full cache are many and long; a window has as many as it has tiles, whatever the capacity."""
    spec = Spec(32, 8, 128, 128, DType.BFLOAT16, "cuda:90")

    def count(text: str, capacity: int, batch: int = 8) -> int:
        plan = decode_plan(attndsl.compile(text).program, spec, 1, Cache())
        return split_count(plan, batch, 1, capacity, 132)

    assert count("causal", 131072) == 33
    assert count("causal & window(1024)", 131072) == count("causal & window(1024)", 32768) == 6
    assert count("causal & window(128)", 131072) == 3
    assert count("causal", 131072, batch=256) == 1
    assert count("causal", 1) == 1


def test_columns_in_place_of_few_slices() -> None:
    """Where heads and sequences nearly fill a device, few tiles are not dealt out and merged."""

    def columns(text: str, batch: int, v_dim: int = 128, rows: int = 1) -> int:
        spec = Spec(32, 8, 128, v_dim, DType.BFLOAT16, "cuda:90")
        plan = decode_plan(attndsl.compile(text).program, spec, rows, Cache(page=16))
        return column_count(plan, batch, rows, 131072, 132)

    assert columns("causal & (sink(64) | window(1024))", 8) == 2
    assert columns("causal & window(1024)", 8, rows=4) == 2
    assert columns("causal & window(1024)", 8, rows=5) == 1, "a tile of many rows is not shared"
    assert columns("causal & window(1024)", 8, v_dim=64) == 1
    assert columns("causal & window(1024)", 4) == 1, "128 programs are not to be had from 32 heads' columns of 64"
    assert columns("causal & window(4096)", 8) == columns("causal", 8) == 1
    assert columns("causal & window(1024)", 12) == 1, "they would not run at once"


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_torch_compile(layout: str) -> None:
    attn = attndsl.compile(STREAMING)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*tensors: Tensor) -> Tensor:
        out: Tensor = attn.decode(*tensors, layout=layout) * 2
        return out

    q, k, v = random(2, 4, 1, 16), random(6, 2, 8, 16, seed=1), random(6, 2, 8, 16, seed=2)
    if layout == "nhd":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    call = (q, k, v, ints(20, 9), torch.randperm(6, dtype=torch.int32).view(2, 3))
    torch.testing.assert_close(step(*call), attn.decode(*call, layout=layout) * 2)
    numbers: list[object] = [None, None, [], [], None, layout, "auto"]
    torch.library.opcheck(torch.ops.attndsl.decode.default, (attn._key, *call, *numbers))


def test_empty_calls() -> None:
    attn = attndsl.compile("causal")
    for backend, device in (("cpu", "cpu"), ("triton", DEVICE)):
        none, one, k = (random(*size, 16).to(device) for size in ((2, 1, 0), (0, 1, 1), (2, 1, 8)))
        assert attn.decode(none, k, k, ints(8, 8).to(device), backend=backend).shape == (2, 1, 0, 16)
        assert attn.decode(one, k[:0], k[:0], ints().to(device), backend=backend).shape == (0, 1, 1, 16)


def test_heads_that_see_different_keys_have_programs_of_their_own() -> None:
    spec = Spec(8, 2, 16, 16, DType.FLOAT16, "cuda:90")

    def pack(text: str, **params: Any) -> int:
        return decode_plan(attndsl.compile(text, **params).program, spec, 1, Cache()).pack

    assert pack("causal") == 16
    assert pack("causal & (if g == 0 then all else window(9))") == 16
    assert pack("causal & window(9 * h + 1)") == 1
    assert pack("attention a(span : int[h]) { attend causal & window(span[h]) }", span=list(range(1, 9))) == 1


def test_source_and_assembly_show_decode() -> None:
    attn = attndsl.compile(STREAMING)
    text = attn.source("decode", page=16, kv_heads=2)
    assert "def attention_decode(" in text and "def merge_slices(" in text and "PAGE: tl.constexpr = 16" in text
    assert "page_table" not in attn.source("decode")
    assert "def attention_decode(" in attn.source("decode", backend="cpu")
