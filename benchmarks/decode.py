"""Decode: one new token for each of B sequences, full and sparse, contiguous and paged, under a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.dense import attend, judge, worst
from benchmarks.failures import short_reason
from benchmarks.paged import PAGE, in_pages, with_flashinfer
from benchmarks.peers import CannotRun, prepare_dynamo
from benchmarks.rows import MaskRule
from benchmarks.timing import host_microseconds, milliseconds

# Calls in one graph: its launch is then small beside them.
CALLS = 16
# Caches that the calls take turns on, as layers do, of so many bytes together: past any L2.
CACHES_BYTES = 600e6
# What all of them may take at most; pages take a copy of one beside.
MOST_BYTES = 24e9


@dataclass(frozen=True, slots=True)
class DecodeSizes:
    """q [batch, heads, 1, dim]; caches [batch, kv_heads, n, dim], every sequence n tokens long."""

    batch: int
    heads: int
    kv_heads: int
    n: int
    dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A pattern, the same as a rule, and how many keys the last row sees."""

    name: str
    text: str
    rule: MaskRule
    keys: Callable[[int], int]


ROWS = (
    DecodeRow("full", "causal", lambda b, h, q, k: k <= q, lambda n: n),
    DecodeRow(
        "sink(64) | window(1024)",
        "causal & (sink(64) | window(1024))",
        lambda b, h, q, k: (k <= q) & ((k < 64) | (q - k < 1024)),
        lambda n: min(n, 64 + 1024),
    ),
    DecodeRow(
        "dilated(64)", "causal & dilated(64)", lambda b, h, q, k: (k <= q) & ((q - k) % 64 == 0), lambda n: -(-n // 64)
    ),
)

Step = Callable[[int], Tensor]


@dataclass(frozen=True, slots=True)
class Caches:
    """Several layers' queries, keys and values."""

    sizes: DecodeSizes
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    @property
    def lengths(self) -> Tensor:
        return torch.full((self.sizes.batch,), self.sizes.n, dtype=torch.int32, device=self.sizes.device)


def make_caches(sizes: DecodeSizes, visited: float) -> Caches:
    """As many layers as the bytes that a call visits ask for, 16 at most, and no more than there is room for."""
    layer = 2 * sizes.batch * sizes.kv_heads * sizes.n * sizes.dim * sizes.dtype.itemsize
    wanted = min(CALLS, -int(-CACHES_BYTES // visited), int(MOST_BYTES // layer))
    layers = max(1, wanted) if sizes.device.type == "cuda" else 1
    generator = torch.Generator(sizes.device).manual_seed(0)

    def random(heads: int, tokens: int) -> Tensor:
        size = (sizes.batch, heads, tokens, sizes.dim)
        return torch.randn(size, generator=generator, dtype=sizes.dtype, device=sizes.device)

    made = [[random(*size) for _ in range(layers)] for size in ((sizes.heads, 1), *((sizes.kv_heads, sizes.n),) * 2)]
    return Caches(sizes, *made)


# ------------------------------------------------------------------------------------ contenders


def ours(row: DecodeRow, caches: Caches) -> Step:
    import attndsl

    attn, lengths = attndsl.compile(row.text), caches.lengths
    return lambda i: attn.decode(caches.q[i], caches.k[i], caches.v[i], lengths)


def ours_paged(row: DecodeRow, caches: Caches, page: int = PAGE) -> Step:
    """Over pages in random order."""
    import attndsl

    attn, lengths, table = attndsl.compile(row.text), caches.lengths, in_pages(caches, page)
    return lambda i: attn.decode(caches.q[i], caches.k[i], caches.v[i], lengths, table)


def sdpa(row: DecodeRow, caches: Caches) -> Step:
    """SDPA with the heads of a key head as rows, and the pattern as a mask where it is not full."""
    sizes = caches.sizes
    group = sizes.heads // sizes.kv_heads
    mask = None if row.name == "full" else mask_of(row, sizes)

    def step(i: int) -> Tensor:
        q = caches.q[i].view(sizes.batch, sizes.kv_heads, group, sizes.dim)
        return scaled_dot_product_attention(q, caches.k[i], caches.v[i], attn_mask=mask).view(caches.q[i].shape)

    return step


def flex(row: DecodeRow, caches: Caches) -> Step:
    """FlexAttention's decoding kernel, its block mask made outside the timing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    prepare_dynamo()
    n = caches.sizes.n
    block_mask = None
    if row.name != "full":
        block_mask = create_block_mask(
            lambda b, h, q, k: row.rule(b, h, q + n - 1, k), None, None, 1, n, device=str(caches.sizes.device)
        )
    fn: Any = torch.compile(flex_attention, dynamic=False)
    return lambda i: fn(caches.q[i], caches.k[i], caches.v[i], block_mask=block_mask, enable_gqa=True)


def flashinfer(row: DecodeRow, caches: Caches, tensor_cores: bool = False) -> Step:
    return with_flashinfer(row, caches, mask_of(row, caches.sizes)[0], tensor_cores)


CONTENDERS: dict[str, Callable[[DecodeRow, Caches], Step]] = {
    "attndsl": ours, f"attndsl, pages of {PAGE}": ours_paged, "SDPA": sdpa, "Flex": flex, "FlashInfer": flashinfer,
    "FlashInfer tensor cores": partial(flashinfer, tensor_cores=True),
}  # fmt: skip


# ------------------------------------------------------------------------------------- measuring


def run_decode(sizes: DecodeSizes, contenders: list[str] | None = None) -> Iterator[list[str]]:
    """The table's header and rows: µs a call, GB/s over the bytes that the pattern visits, host µs without a graph."""
    names = [name for name in CONTENDERS if contenders is None or name in contenders]
    yield ["pattern", "tokens", "floor MB", *names]
    for row in ROWS:
        visited = 2 * sizes.batch * sizes.kv_heads * row.keys(sizes.n) * sizes.dim * sizes.dtype.itemsize
        cells = []
        for name in names:
            try:
                cells.append(measure(row, CONTENDERS[name], make_caches(sizes, visited), visited))
            except CannotRun as reason:
                cells.append(str(reason))
            except Exception as error:  # noqa: BLE001 - a peer that breaks costs its cell and not the run
                cells.append(short_reason(error))
            if sizes.device.type == "cuda":
                torch.cuda.empty_cache()
        yield [row.name, str(sizes.n), f"{visited / 1e6:.1f}", *cells]


def measure(row: DecodeRow, build: Callable[[DecodeRow, Caches], Step], caches: Caches, visited: float) -> str:
    """Checked, then timed."""
    found, device = timed(row, build, caches), caches.sizes.device
    if isinstance(found, str):
        return found
    us, step = found
    host = f", host {host_microseconds(lambda: step(0), device):.0f} us" if device.type == "cuda" else ""
    return f"{us:.1f} us ({visited / us / 1e3:.0f} GB/s{host})"


def timed(row: DecodeRow, build: Callable[[DecodeRow, Caches], Step], caches: Caches) -> tuple[float, Step] | str:
    """µs of a call, under a CUDA graph on a GPU, and the call; or how wrong it is."""
    # Keys and values of the first layer, before they may be put into pages.
    q, k, v = caches.q[0], caches.k[0], caches.v[0]
    step = build(row, caches)
    verdict = check(row, step(0), q, k, v, caches.sizes)
    if verdict:
        return verdict
    del k, v
    layers, device = len(caches.q), caches.sizes.device
    if device.type == "cuda":
        return 1e3 * milliseconds(recorded(step, layers).replay, device) / CALLS, step
    return 1e3 * milliseconds(lambda: step(0), device), step


def recorded(step: Callable[[int], object], layers: int, calls: int = CALLS) -> torch.cuda.CUDAGraph:
    """A graph of calls that take turns on the layers."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(layers):
            step(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            step(call % layers)
    return graph


def mask_of(row: DecodeRow, sizes: DecodeSizes) -> Tensor:
    """What the last row sees, bool [1, n]."""
    zero, k = torch.zeros((), dtype=torch.int64, device=sizes.device), torch.arange(sizes.n, device=sizes.device)
    return row.rule(zero, zero, zero + sizes.n - 1, k)[None]


def check(row: DecodeRow, out: Tensor, q: Tensor, k: Tensor, v: Tensor, sizes: DecodeSizes) -> str:
    """Empty where the first and last head of the first and last sequence are right, else how wrong they are."""
    allowed, group = mask_of(row, sizes), sizes.heads // sizes.kv_heads
    verdicts = []
    for b in {0, sizes.batch - 1}:
        for h in {0, sizes.heads - 1}:
            tensors = (q[b, h], k[b, h // group], v[b, h // group], allowed)
            exact, plain = attend(*tensors, torch.float64)[0], attend(*tensors, sizes.dtype)[0]
            verdicts.append(judge(out[b, h], exact, plain))
    found = worst(verdicts)
    return "" if found.passed else f"FAILED: error {found.error:.1e}, allowed {found.allowed:.1e}"
