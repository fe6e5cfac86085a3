"""Quest (arXiv 2406.10774): one token for each of B sequences within the pages that may matter most, beside all pages.

Timed under a CUDA graph: the bounds of the page that the last token went into made anew, the choice of pages by them,
attention to these, and all three in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.decode import DecodeSizes, recorded
from benchmarks.dense import attend, judge, worst
from benchmarks.paged import PAGE
from benchmarks.timing import milliseconds

# Tokens that a row attends to.
BUDGET = 1024
TEXT = f"""attention quest {{
    plan pages = top({BUDGET // PAGE}, blocks({PAGE}), by = bound(Q, min(K), max(K)), share = group, among = causal,
                     always = same_block({PAGE}))
    attend causal & pages
}}"""
CALLS = 4


def run_quest(sizes: DecodeSizes) -> Iterator[list[str]]:
    """A header, and a row for each operation: its µs, and how many times faster than full decode it is."""
    import attndsl
    from attndsl.serving import PagedCache

    quest = attndsl.compile(TEXT)
    each = -(-sizes.n // PAGE)
    cache = PagedCache(
        quest, sizes.batch, sizes.kv_heads, sizes.dim, pages=sizes.batch * each, max_len=each * PAGE, page=PAGE,
        dtype=sizes.dtype, device=sizes.device, bounds=True,
    )  # fmt: skip
    generator = torch.Generator(sizes.device).manual_seed(0)

    def random(heads: int, tokens: int) -> Tensor:
        size = (sizes.batch, heads, tokens, sizes.dim)
        return torch.randn(size, generator=generator, dtype=sizes.dtype, device=sizes.device)

    for first in range(0, sizes.n, 4096):
        keys = random(sizes.kv_heads, min(4096, sizes.n - first))
        cache.append(keys, random(*keys.shape[1:3]))
    q, full = random(sizes.heads, 1), attndsl.compile("causal")
    chosen = cache.plan(q)
    bounds = (cache.k, cache.k_min, cache.k_max, cache.seq_lens, cache.page_table)

    def update() -> None:
        attndsl.serving.update_bounds(*bounds, new=1)

    def whole() -> Tensor:
        update()
        out: Tensor = cache.decode(q)
        return out

    operations: dict[str, Callable[[], object]] = {
        "all pages": lambda: full.decode(q, cache.k, cache.v, cache.seq_lens, cache.page_table),
        "update the bounds": update,
        f"choose {BUDGET // PAGE} pages of {PAGE}": lambda: cache.plan(q),
        "attend within them": lambda: cache.decode(q, plans=chosen),
        "the three": whole,
    }
    yield ["operation", "tokens", "time", "all pages / this"]
    verdict = check(whole(), q, cache, chosen["pages"])
    if verdict:
        yield ["the three", str(sizes.n), verdict, ""]
        return
    reference = 0.0
    for name, operation in operations.items():
        us = microseconds(operation, sizes.device)
        reference = reference or us
        yield [name, str(sizes.n), f"{us:.1f} us", f"{reference / us:.1f}x"]


def microseconds(operation: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return 1e3 * milliseconds(operation, device)
    graph = recorded(lambda _layer: operation(), 1, CALLS)
    return 1e3 * milliseconds(graph.replay, device) / CALLS


def check(out: Tensor, q: Tensor, cache: object, chosen: Tensor) -> str:
    """Empty where a few heads are right, given the pages that were chosen, and these are the best ones by the bound."""
    k, v, table = cache.k, cache.v, cache.page_table  # type: ignore[attr-defined]
    group, verdicts = q.shape[1] // k.shape[1], []
    for b in {0, len(q) - 1}:
        least, largest = (x[table[b].long()].double() for x in (cache.k_min, cache.k_max))  # type: ignore[attr-defined]
        for g in {0, k.shape[1] - 1}:
            heads = slice(g * group, (g + 1) * group)
            rows = q[b, heads, 0].double()[:, None]
            scores = torch.maximum(rows * least[:, g], rows * largest[:, g]).sum(-1).sum(0)
            # Without the last page, which comes first whatever its score.
            picked = chosen[b, g, 0, :-1].long()
            rejected = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
            rejected[chosen[b, g, 0].long()] = False
            if scores[picked].min() < scores[rejected].max() - 1e-4 * scores.abs().max():
                return "FAILED: a better page was left out"
            pages = table[b, chosen[b, g, 0].long()].long()
            keys, values = (x[pages, g].flatten(0, 1) for x in (k, v))
            allowed = torch.ones(1, len(keys), dtype=torch.bool, device=keys.device)
            for h in (heads.start, heads.stop - 1):
                tensors = (q[b, h], keys, values, allowed)
                verdicts.append(judge(out[b, h], attend(*tensors, torch.float64)[0], attend(*tensors, q.dtype)[0]))
    found = worst(verdicts)
    return "" if found.passed else f"FAILED: error {found.error:.1e}, allowed {found.allowed:.1e}"
