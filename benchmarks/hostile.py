"""`python -m benchmarks.hostile [GROUP…]`: the kernels that read lengths, page tables or lists, on hostile ones.

To be run under `compute-sanitizer --tool memcheck` with `PYTORCH_NO_CUDA_MEMORY_CACHING=1`, so that a read past a
tensor is one past an allocation; a run without it before fills the cache of kernels. Nothing here says what outputs
should be but that they are numbers: tests do. Exit status 1 where one is not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attndsl
import attndsl.serving

PATTERNS = Path(__file__).parent.parent / "examples" / "patterns"
DEVICE = torch.device("cuda")
STREAMING = "causal & (sink(4) | window(100))"
DOCUMENTS = "attention d { input doc : int[b, k] sorted  attend causal & document(doc) }"
LISTED = "attention a { input listed : blocks(16)[b, g]  attend causal & listed }"
OF_ROWS = "attention a { input listed : blocks(64)[b, g, q]  attend causal & listed }"
QUEST = """attention quest {
    plan pages = top(3, blocks(16), by = bound(Q, min(K), max(K)), share = group, among = causal,
                     always = same_block(16))
    attend causal & pages
}"""
TOKENS = "causal & top(20, tokens, by = dot(Q, K), among = causal, share = {})"
EXTREMES = (2**31 - 1, -(2**31), -1, 1 << 20)


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=dtype)


def wild(*size: int, high: int) -> Tensor:
    """int32, of which half lie in [0, high), and the rest anywhere."""
    inside = torch.randint(0, max(high, 1), size, device=DEVICE)
    outside = torch.tensor(EXTREMES, device=DEVICE)[torch.randint(0, len(EXTREMES), size, device=DEVICE)]
    return torch.where(torch.rand(size, device=DEVICE) < 0.5, inside, outside).to(torch.int32)


def lengths(batch: int, capacity: int) -> Tensor:
    known = [capacity, 2**31 - 1, -5, 0, capacity + 1, -(2**31), 1, capacity - 1]
    return torch.tensor(known[:batch], dtype=torch.int32, device=DEVICE)


def small() -> Iterator[tuple[str, Tensor]]:
    yield from decodes(64, (4, 2), 4, 200, (1, 16, 24))


def odd() -> Iterator[tuple[str, Tensor]]:
    yield from decodes(80, (2, 2), 4, 200, (16, 64))


def large() -> Iterator[tuple[str, Tensor]]:
    """Short patterns by columns of the values: tiles of many pages, and pages of many tiles."""
    yield from decodes(128, (32, 8), 8, 2048, (1, 16, 64, 256))
    q, (k, v), table = random(8, 32, 1, 128), (random(17, 8, 16, 128) for _ in range(2)), wild(8, 64, high=17)
    out = attndsl.compile(LISTED).decode(q, k, v, lengths(8, 1024), table, listed=wild(8, 8, 40, high=64))
    yield "lists by columns, in pages", out


def scattered() -> Iterator[tuple[str, Tensor]]:
    """Loads of the keys alone that a row allows, and single keys that are ranked where they lie."""
    q, k, v = random(4, 4, 1, 64), random(4, 2, 200, 64), random(4, 2, 200, 64)
    for page in (None, 1, 16, 256):
        capacity = -(-200 // (page or 1)) * (page or 1)
        cache: tuple[Tensor, Tensor, Tensor, Tensor | None] = (k, v, lengths(4, 200), None)
        if page is not None:
            pools = [random(9, 2, page, 64) for _ in range(2)]
            cache = (pools[0], pools[1], lengths(4, capacity), wild(4, capacity // page, high=9))
        where = "contiguous" if page is None else f"in pages of {page}"
        yield f"dilated, {where}", attndsl.compile("causal & dilated(16)").decode(q, *cache)
        doc = wild(4, capacity, high=9)
        yield f"unsorted, {where}", attndsl.compile(DOCUMENTS.replace(" sorted", "")).decode(q, *cache, doc=doc)
        for share in ("group", "none"):
            attn = attndsl.compile(TOKENS.format(share))
            yield f"single keys, {share}, {where}", attn.decode(q, *cache)


def decodes(
    dim: int, heads: tuple[int, int], batch: int, tokens: int, pages: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Contiguous and paged caches."""
    for text, rows in ((STREAMING, 1), ("causal", 5), (STREAMING, 3)):
        attn, q = attndsl.compile(text), random(batch, heads[0], rows, dim)
        k, v = (random(batch, heads[1], tokens, dim) for _ in range(2))
        yield f"decode {dim}, {text}, {rows} rows", attn.decode(q, k, v, lengths(batch, tokens))
        for page in pages:
            slots, each = 2 * batch + 1, -(-tokens // page)
            k, v = (random(slots, heads[1], page, dim) for _ in range(2))
            table = wild(batch, each, high=slots)
            yield f"... in pages of {page}", attn.decode(q, k, v, lengths(batch, each * page), table)


def eight_bits() -> Iterator[tuple[str, Tensor]]:
    q, k = random(4, 4, 1, 64), random(9, 2, 16, 64).to(torch.float8_e4m3fn)
    yield "decode", attndsl.compile(STREAMING).decode(q, k, k, lengths(4, 160), wild(4, 10, high=9))
    for name in ("moba", "nsa"):
        attn = attndsl.compile(PATTERNS / f"{name}.attn", block=16)
        inputs: dict[str, Any] = {"gate": random(4, 4, 1, 3)} if name == "nsa" else {}
        cache, scale = (k, k, lengths(4, 160), wild(4, 10, high=9)), torch.rand(2, device=DEVICE)
        views = attn.views(*cache, k_scale=scale, v_scale=scale)
        attndsl.serving.update_views(attn, views, *cache, new=3, k_scale=scale, v_scale=scale)
        yield f"decode of {name}", attn.decode(q, *cache, views=views, k_scale=scale, v_scale=scale, **inputs)


def by_data() -> Iterator[tuple[str, Tensor]]:
    """Tiles skipped by inputs, lists that are given, and what is chosen."""
    q, k, v = random(4, 4, 2, 64), random(4, 2, 200, 64), random(4, 2, 200, 64)
    doc = wild(4, 200, high=9)
    yield "decode of documents", attndsl.compile(DOCUMENTS).decode(q, k, v, lengths(4, 200), doc=doc)
    pools, table = (random(9, 2, 16, 64), random(9, 2, 16, 64)), wild(4, 13, high=9)
    for text, dtype in ((LISTED, torch.int32), (LISTED, torch.int64), (OF_ROWS, torch.int32)):
        attn = attndsl.compile(text)
        listed = wild(4, 2, *((2,) if text is OF_ROWS else ()), 7, high=13).to(dtype)
        yield f"decode of lists, {text}", attn.decode(q, k, v, lengths(4, 200), listed=listed)
        yield "... in pages", attn.decode(q, *pools, lengths(4, 208), table, listed=listed)
    for name in ("nsa", "moba", "pyramid"):
        params: dict[str, Any] = {} if name == "pyramid" else {"block": 16}
        attn = attndsl.compile(PATTERNS / f"{name}.attn", **params)
        inputs: dict[str, Any] = {"gate": random(4, 4, 2, 3)} if name == "nsa" else {}
        for cache in ((k, v, lengths(4, 200)), (*pools, lengths(4, 208), table)):
            views = attn.views(*cache)
            attndsl.serving.update_views(attn, views, *cache, new=3)
            yield f"decode of {name}", attn.decode(q, *cache, views=views, **inputs)


def caches() -> Iterator[tuple[str, Tensor]]:
    """Bounds of pages, the best by them, and a pool whose books the device keeps."""
    k, table = random(9, 2, 16, 64), wild(4, 13, high=9)
    low, high = (torch.zeros(9, 2, 64, device=DEVICE, dtype=k.dtype) for _ in range(2))
    attndsl.serving.update_bounds(k, low, high, lengths(4, 208), table, new=40)
    yield "bounds of pages", torch.cat((low, high))
    attn = attndsl.compile(QUEST)
    cache = attndsl.serving.PagedCache(
        attn, 4, 2, 64, pages=13, max_len=208, dtype=torch.bfloat16, device=DEVICE, bounds=True, on_device=True
    )
    for _ in range(3):
        cache.append(random(4, 2, 20, 64), random(4, 2, 20, 64))
        yield "a pool that is full", cache.decode(random(4, 4, 1, 64))
    cache.seq_lens.copy_(lengths(4, 208))
    cache.page_table.copy_(table)
    yield "a pool with wild books", cache.decode(random(4, 4, 1, 64))


def forwards() -> Iterator[tuple[str, Tensor]]:
    """Lists of the forward and backward pass: of tiles, and of tokens that are gathered."""
    for text, entries in (
        ("attention a { input p : blocks(64)[b, g, q]  attend causal & p }", 5),
        ("attention a { input p : blocks(64)[b, g, q/64]  attend causal & p }", 5),
        ("attention a { input p : tokens[b, g, q]  attend causal & p }", 40),
    ):
        attn = attndsl.compile(text)
        q, k, v = (random(2, heads, 300, 64).requires_grad_() for heads in (4, 2, 2))
        classes = 5 if "q/64" in text else 300
        plan = wild(2, 2, classes, entries, high=300 if "tokens" in text else 5)
        out = attn(q, k, v, p=plan)
        yield f"forward, {text}", out
        for name, x in zip("qkv", torch.autograd.grad(out.float().sum(), (q, k, v)), strict=True):
            yield f"... gradient of {name}", x


def hopper() -> Iterator[tuple[str, Tensor]]:
    """The lowering for Hopper, whose tiles the copy engine bounds: ragged lengths, heads of several parts."""
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for text, rows, keys, dim, v_dim in (
        ("causal", 1, 1, 128, 128),
        (STREAMING, 333, 777, 96, 40),
        ("attention a { weights max(s, 0.0)  attend window(50) }", 200, 300, 192, 64),
        ("attention a { score softcap(s, 20.0)  attend causal }", 129, 257, 256, 256),
    ):
        attn, k, v = attndsl.compile(text), random(2, 2, keys, dim), random(2, 2, keys, v_dim)
        yield f"forward, {text}", attn(random(2, 4, rows, dim), k, v, backend="gluon")
    attn, doc = attndsl.compile(DOCUMENTS), wild(2, 300, high=9).sort().values
    q, k, v = random(2, 4, 300, 128), random(2, 2, 300, 128), random(2, 2, 300, 128)
    yield "documents of wild ids", attn(q, k, v, backend="gluon", doc=doc)
    attn = attndsl.compile("attention a { input p : blocks(64)[b, g, q/128]  attend causal & p }")
    for plan in (wild(2, 2, 3, 4, high=5), torch.full((2, 2, 3, 4), -1, device="cuda")):
        yield "lists of wild blocks", attn(q, k, v, backend="gluon", p=plan.int())
    attn = attndsl.compile("attention a { input until : int[b, k]  attend causal & { q <= until[k] } }")
    for until in (wild(2, 300, high=300), torch.full((2, 300), -1, device="cuda")):
        yield "maps of wild ends", attn(q, k, v, backend="gluon", until=until)
    many = random(2, 80, 200, 128)
    yield "more query tiles than programs", attndsl.compile("causal")(many, many, many, backend="gluon")


def hopper_views() -> Iterator[tuple[str, Tensor]]:
    """Entries in the place of keys: as many as a ragged length has, told by data, and what lists leave out."""
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for rows, tokens, dim in ((1, 1, 128), (333, 777, 96), (300, 300, 128)):
        attn = attndsl.compile(PATTERNS / "pyramid.attn", near=2, middle=4)
        k, v = random(2, 2, tokens, dim), random(2, 2, tokens, dim)
        yield f"pyramid of {tokens}", attn(random(2, 4, rows, dim), k, v, backend="gluon")
    q, k, v = random(2, 4, 300, 128), random(2, 2, 300, 128), random(2, 2, 300, 128)
    picked = "attention a { input at : int[b, g, 40]  attend causal over pick(at, weight = Nk / 40) }"
    yield "tokens picked anywhere", attndsl.compile(picked)(q, k, v, backend="gluon", at=wild(2, 2, 40, high=300))
    runs = "attention a { input c : int[b, k]  attend causal & window(50), all over pool(mean, segments(c)) }"
    yield "segments of wild ids", attndsl.compile(runs)(q, k, v, backend="gluon", c=wild(2, 300, high=9))
    left = "attention a { input p : blocks(64)[b, h, q/64]  attend p, all - p over pool(mean, 64, counted) }"
    for plan in (wild(2, 4, 5, 4, high=5), torch.full((2, 4, 5, 4), -1, device="cuda")):
        yield "what wild lists leave out", attndsl.compile(left)(q, k, v, backend="gluon", p=plan.int())


def hopper_gradients() -> Iterator[tuple[str, Tensor]]:
    """The one kernel of all gradients, and what goes before and after it."""
    if torch.cuda.get_device_capability() != (9, 0):
        return
    ends = "attention a { input until : int[b, k]  attend causal & { q <= until[k] } }"
    lists = "attention a { input p : blocks(128)[b, g, q/128]  attend causal & p }"
    for text, rows, keys, dim in (
        ("causal", 1, 1, 128),
        ("causal", 129, 257, 64),
        (STREAMING, 333, 777, 128),
        ("causal & {k > q}", 300, 300, 128),
        (DOCUMENTS, 300, 300, 64),
        (ends, 300, 300, 128),
        (lists, 300, 300, 128),
    ):
        attn = attndsl.compile(text)
        q, k, v = (random(2, heads, n, dim).requires_grad_() for heads, n in ((4, rows), (2, keys), (2, keys)))
        given: dict[str, Any] = {"doc": wild(2, keys, high=9).sort().values, "until": wild(2, keys, high=keys)}
        given["p"] = wild(2, 2, 3, 4, high=5)
        out = attn(q, k, v, backend="gluon", **{decl.name: given[decl.name] for decl in attn.program.inputs})
        for name, x in zip("qkv", torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
            yield f"{text}, gradient of {name}", x


_ALL = (small, odd, large, scattered, eight_bits, by_data, caches, forwards, hopper, hopper_views, hopper_gradients)
GROUPS = {group.__name__: group for group in _ALL}


def main(asked: Sequence[str]) -> int:
    """asked: names of groups (none: all)."""
    torch.manual_seed(0)
    wrong = 0
    for name in asked or GROUPS:
        began, calls = time.perf_counter(), 0
        for call, out in GROUPS[name]():
            calls += 1
            if not bool(out.isfinite().all()):
                wrong += 1
                print(f"{name}, not finite: {call}", flush=True)
        print(f"{name}: {calls} outputs, {time.perf_counter() - began:.1f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
