"""Every bar of serving in one run: µs of a decode under a CUDA graph beside what it is to be at most.

Contiguous and paged, full and sink or window, Quest with its choice, and a step of NSA with what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decode import ROWS, DecodeRow, DecodeSizes, make_caches, ours, ours_paged, sdpa, timed
from benchmarks.dense import attend, judge, worst
from benchmarks.failures import short_reason
from benchmarks.quest import microseconds, run_quest

FULL, STREAMING, SCATTERED = ROWS
PAGES = (16, 64, 256)
NSA = Path(__file__).parent.parent / "examples" / "patterns" / "nsa.attn"


def run_serving(sizes: DecodeSizes, short: int) -> Iterator[list[str]]:
    """A header, and a row a bar. sizes: with the long length; short: the other one."""
    yield ["what", "tokens", "time", "bar", "met"]
    least = 2 * sizes.batch * sizes.kv_heads * sizes.n * sizes.dim * sizes.dtype.itemsize
    full, peer = (_time(FULL, sizes, build) for build in (ours, sdpa))
    yield ["SDPA, full", str(sizes.n), _said(peer), "", ""]
    bar = max(1.05 * peer if isinstance(peer, float) else 0.0, least / 2.9e6)
    yield _row("full", sizes.n, full, bar, f"{bar:.0f} us: SDPA + 5 %, or 2.9 TB/s")
    contiguous = {}
    for n in (short, sizes.n):
        contiguous[n] = _time(STREAMING, replace(sizes, n=n), ours)
        yield _row(STREAMING.name, n, contiguous[n], 20.0, "20 us")
    of_full = _time(FULL, replace(sizes, n=short), ours)
    for page in PAGES:
        for row, n, other in ((STREAMING, sizes.n, contiguous[sizes.n]), (FULL, short, of_full)):
            found = _time(row, replace(sizes, n=n), lambda row, caches, page=page: ours_paged(row, caches, page))
            bar = 1.1 * other if isinstance(other, float) else 0.0
            yield _row(f"{row.name}, pages of {page}", n, found, bar, f"{bar:.1f} us: contiguous + 10 %")
    scattered = _time(SCATTERED, sizes, ours)
    yield [SCATTERED.name, str(sizes.n), _said(scattered), "", ""]
    _, *quest = run_quest(sizes)
    for name, tokens, time, times in quest:
        asked = name == "the three"
        yield [f"Quest: {name}", tokens, time, "4.0x" * asked, _met(not times or float(times[:-1]) >= 4.0) * asked]
    try:
        yield from run_nsa(sizes)
    except Exception as error:  # noqa: BLE001 - what was measured before it is worth its table
        yield ["NSA, a whole step", str(sizes.n), short_reason(error), "", _met(False)]


def _time(row: DecodeRow, sizes: DecodeSizes, build: Callable[..., Callable[[int], Tensor]]) -> float | str:
    """µs, or why there are none."""
    visited = 2 * sizes.batch * sizes.kv_heads * row.keys(sizes.n) * sizes.dim * sizes.dtype.itemsize
    found = timed(row, build, make_caches(sizes, visited))
    if sizes.device.type == "cuda":
        torch.cuda.empty_cache()
    return found if isinstance(found, str) else found[0]


def _row(name: str, tokens: int, found: float | str, bar: float, said: str) -> list[str]:
    return [name, str(tokens), _said(found), said, _met(isinstance(found, float) and found <= bar)]


def _said(found: float | str) -> str:
    return f"{found:.1f} us" if isinstance(found, float) else found


def _met(yes: bool) -> str:
    return "yes" if yes else "NO"


def run_nsa(sizes: DecodeSizes) -> Iterator[list[str]]:
    """A step of NSA over a contiguous cache: what the new token changes of its entries, and the three branches, the
    choice by the first of them included. It has no bar of its own: beside full attention it is read as Quest is."""
    import attndsl
    from attndsl.serving import plan, update_views

    attn, caches = attndsl.compile(NSA), make_caches(sizes, float("inf"))
    q, k, v, lengths = caches.q[0], caches.k[0], caches.v[0], caches.lengths
    gate = torch.ones(sizes.batch, sizes.heads, 1, 3, dtype=sizes.dtype, device=sizes.device)
    views = attn.views(k, v, lengths)

    def step() -> Tensor:
        update_views(attn, views, k, v, lengths)
        out: Tensor = attn.decode(q, k, v, lengths, views=views, gate=gate)
        return out

    chosen = plan(attn, q, k, v, lengths, views=views, gate=gate)
    verdict = check_nsa(step(), q, k, v, chosen["top"])
    time = verdict or f"{microseconds(step, sizes.device):.1f} us"
    yield ["NSA, a whole step", str(sizes.n), time, "", ""]


def check_nsa(out: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> str:
    """Empty where the first and last head are right, given the blocks of 64 that were chosen, all gates one."""
    group, n, verdicts = q.shape[1] // k.shape[1], k.shape[2], []
    for b, h in {(0, 0), (len(q) - 1, q.shape[1] - 1)}:
        g = h // group
        near = torch.arange(n, device=k.device) >= n - 512
        block = torch.zeros(-(-n // 64), dtype=torch.bool, device=k.device)
        block[chosen[b, g, 0][chosen[b, g, 0] >= 0].long()] = True
        whole = n // 64
        means = [x[b, g, : whole * 64].float().view(whole, 64, -1).mean(1).to(x.dtype) for x in (k, v)]
        every = torch.ones(whole, dtype=torch.bool, device=k.device)
        sides = [(*means, every), *((k[b, g], v[b, g], seen) for seen in (block.repeat_interleave(64)[:n], near))]
        found = []
        for dtype in (torch.float64, q.dtype):
            parts = (attend(q[b, h], keys, values, seen[None], dtype)[0].double() for keys, values, seen in sides)
            found.append(torch.stack([*parts]).sum(0))
        verdicts.append(judge(out[b, h], found[0], found[1]))
    verdict = worst(verdicts)
    return "" if verdict.passed else f"FAILED: error {verdict.error:.1e}, allowed {verdict.allowed:.1e}"
