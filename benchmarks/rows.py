"""The benchmarked patterns: each in the language, and again as an independent rule on (b, h, q, k).

The rule is what FlexAttention gets as its `mask_mod`, what the area is counted from, and what the
correctness check of every row uses; nothing of it comes from attndsl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# (b, h, q, k) -> bool, int tensors that broadcast together
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Inputs = Mapping[str, Tensor]

# Token counts of the documents at N = 16384, from short to long and back; they sum to 16384.
DOCUMENTS = (401, 1103, 97, 607, 3001, 149, 7411, 811, 307, 1777, 211, 509)
GRID_WIDTH = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shape of a benchmark call: q, k, v [batch, heads, n, dim]."""

    batch: int
    heads: int
    n: int
    dim: int
    dtype: torch.dtype
    device: torch.device


def no_inputs(_sizes: Sizes) -> Inputs:
    return {}


def any_size(_sizes: Sizes) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Row:
    """One benchmarked pattern.

    `text` is the program, `rule` makes the mask rule from the inputs. `causal` and `window` are the
    arguments with which flash-attn-4 (and SDPA, without a window) express the same pattern; with both unset
    they cannot. `per_head` says that the rule reads h. `refuses` gives the reason why a size does not fit.
    """

    name: str
    title: str
    text: Callable[[Sizes], str]
    rule: Callable[[Sizes, Inputs], MaskRule]
    inputs: Callable[[Sizes], Inputs] = no_inputs
    causal: bool = False
    window: int | None = None
    per_head: bool = False
    refuses: Callable[[Sizes], str] = any_size


def static(name: str, text: str, rule: MaskRule, *, causal: bool = False, window: int | None = None) -> Row:
    """A row whose rule reads positions only."""
    return Row(name, text, lambda _: text, lambda _s, _i: rule, causal=causal, window=window)


def causal_window(span: int) -> Row:
    return static(
        f"window{span}",
        f"causal & window({span})",
        lambda b, h, q, k: (k <= q) & (q - k < span),
        causal=True,
        window=span,
    )


def document_ids(sizes: Sizes) -> Inputs:
    """doc: int32 [batch, n], non-decreasing; the lengths of `DOCUMENTS` scaled to n."""
    ends = torch.tensor(DOCUMENTS).cumsum(0) * sizes.n // sum(DOCUMENTS)
    ids = torch.searchsorted(ends, torch.arange(sizes.n), right=True).to(torch.int32)
    return {"doc": ids.expand(sizes.batch, -1).contiguous().to(sizes.device)}


def shuffled_ids(sizes: Sizes) -> Inputs:
    """The same ids, the tokens of all documents mixed: doc: int32 [batch, n]."""
    order = torch.randperm(sizes.n, generator=torch.Generator().manual_seed(0)).to(sizes.device)
    return {"doc": document_ids(sizes)["doc"][:, order].contiguous()}


def document_rule(_sizes: Sizes, inputs: Inputs) -> MaskRule:
    doc = inputs["doc"]
    return lambda b, h, q, k: (k <= q) & (doc[b, q] == doc[b, k])


def block_diffusion_rule(sizes: Sizes, _inputs: Inputs) -> MaskRule:
    """Noised tokens in the first half, clean ones in the second (block diffusion, arXiv 2503.09573)."""
    half = sizes.n // 2

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_clean, k_clean = q >= half, k >= half
        q_block = torch.where(q_clean, q - half, q) // 32
        k_block = torch.where(k_clean, k - half, k) // 32
        own = (q_block == k_block) & (q_clean == k_clean)
        before = (q_block > k_block) & ~q_clean & k_clean
        clean = (q_block >= k_block) & q_clean & k_clean
        return own | before | clean

    return rule


BLOCK_DIFFUSION = """\
pattern block_diffusion(size = 32) = {
    bq == bk and zq == zk or bq > bk and not zq and zk or bq >= bk and zq and zk
    where n = Nk // 2, zq = q >= n, zk = k >= n,
          bq = (if zq then q - n else q) // size, bk = (if zk then k - n else k) // size
}
"""


def neighborhood_text(sizes: Sizes) -> str:
    height = sizes.n // GRID_WIDTH
    return f"attention grid {{\n    axes y[{height}], x[{GRID_WIDTH}]\n    attend neighborhood(13) on (y, x)\n}}\n"


def neighborhood_rule(sizes: Sizes, _inputs: Inputs) -> MaskRule:
    """A 13 x 13 window that moves inwards at the edges, so that every row sees 169 keys."""
    height = sizes.n // GRID_WIDTH

    def axis(x: Tensor, y: Tensor, length: int) -> Tensor:
        first = torch.clamp(x - 6, 0, length - 13)
        return (first <= y) & (y < first + 13)

    return lambda b, h, q, k: (
        axis(q // GRID_WIDTH, k // GRID_WIDTH, height) & axis(q % GRID_WIDTH, k % GRID_WIDTH, GRID_WIDTH)
    )


def neighborhood_refuses(sizes: Sizes) -> str:
    fits = sizes.n % GRID_WIDTH == 0 and sizes.n // GRID_WIDTH >= 13
    return "" if fits else f"the grid needs a multiple of {GRID_WIDTH} tokens, at least {13 * GRID_WIDTH}"


VIDEO = (30, 48, 80)
VIDEO_TEXT = """\
attention video {
    axes t[30], y[48], x[80]
    attend neighborhood(7) on t & neighborhood(13) on (y, x)
}
"""


def video_rule(_sizes: Sizes, _inputs: Inputs) -> MaskRule:
    """A window of 7 frames, 13 rows and 13 columns that moves inwards at the borders."""
    _, height, width = VIDEO

    def axis(x: Tensor, y: Tensor, length: int, window: int) -> Tensor:
        first = torch.clamp(x - window // 2, 0, length - window)
        return (first <= y) & (y < first + window)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        frames = axis(q // (height * width), k // (height * width), VIDEO[0], 7)
        rows = axis(q // width % height, k // width % height, height, 13)
        return frames & rows & axis(q % width, k % width, width, 13)

    return rule


def video_refuses(sizes: Sizes) -> str:
    tokens = VIDEO[0] * VIDEO[1] * VIDEO[2]
    return "" if sizes.n == tokens else f"a video of 30 x 48 x 80 has {tokens} tokens"


def routed_blocks(sizes: Sizes) -> Inputs:
    """keep: int32 [heads, n/64, 9], a plan: for each row of blocks its own and 8 earlier ones, drawn at random."""
    blocks = -(-sizes.n // 64)
    generator = torch.Generator().manual_seed(7)
    order = torch.rand(sizes.heads, blocks, blocks, generator=generator)
    earlier = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    rank = order.masked_fill(~earlier, -1.0).argsort(-1, descending=True).argsort(-1)
    chosen = (rank < 8) & earlier | torch.eye(blocks, dtype=torch.bool)
    listed = torch.where(chosen, torch.arange(blocks), blocks).sort(-1).values[..., :9]
    return {"keep": torch.where(listed < blocks, listed, -1).to(torch.int32).to(sizes.device)}


def routed_rule(sizes: Sizes, inputs: Inputs) -> MaskRule:
    keep, blocks = inputs["keep"].long(), -(-sizes.n // 64)
    listed = torch.where(keep < 0, blocks, keep)
    sel = torch.zeros(*keep.shape[:2], blocks + 1, dtype=torch.bool, device=keep.device).scatter_(-1, listed, True)
    return lambda b, h, q, k: (k <= q) & sel[h, q // 64, k // 64]


DOCUMENT_TEXT = "attention documents {\n    input doc : int[b, k] sorted\n    attend causal & document(doc)\n}\n"
UNSORTED_TEXT = DOCUMENT_TEXT.replace(" sorted", "")
ROUTED_TEXT = """\
attention routed {
    input keep : blocks(64)[h, q/64]
    attend causal & keep
}
"""

HEADS_TEXT = """\
attention heads {
    attend causal & (if h % 4 == 3 then all else sink(64) | window(1024))
}
"""


def heads_rule(_sizes: Sizes, _inputs: Inputs) -> MaskRule:
    """Heads that retrieve and heads that stream (DuoAttention, arXiv 2410.10819), the long ones last of each four."""
    return lambda b, h, q, k: (k <= q) & ((h % 4 == 3) | (q - k < 1024) | (k < 64))


ALL_ROWS: tuple[Row, ...] = (
    static("causal", "causal", lambda b, h, q, k: k <= q, causal=True),
    causal_window(1024),
    causal_window(4096),
    static(
        "sink_window",
        "causal & (sink(64) | window(1024))",
        lambda b, h, q, k: (k <= q) & ((q - k < 1024) | (k < 64)),
    ),
    Row(
        "heads",
        "every 4th head causal, the others sink(64) | window(1024)",
        lambda _: HEADS_TEXT,
        heads_rule,
        per_head=True,
    ),
    static("prefix", "causal | prefix(4096)", lambda b, h, q, k: (k <= q) | (k < 4096)),
    Row("documents", "12 documents, causal", lambda _: DOCUMENT_TEXT, document_rule, document_ids),
    Row("shuffled", "the same documents, tokens mixed", lambda _: UNSORTED_TEXT, document_rule, shuffled_ids),
    Row("block_diffusion", "block diffusion 32", lambda _: BLOCK_DIFFUSION, block_diffusion_rule),
    static(
        "dilated",
        "causal & window(4096) & dilated(16)",
        lambda b, h, q, k: (k <= q) & (q - k < 4096) & ((q - k) % 16 == 0),
    ),
    static(
        "strided",
        "causal & (window(128) | dilated(128))",
        lambda b, h, q, k: (k <= q) & ((q - k < 128) | ((q - k) % 128 == 0)),
    ),
    static(
        "fixed",
        "causal & (same_block(128) | { k % 128 >= 120 })",
        lambda b, h, q, k: (k <= q) & ((q // 128 == k // 128) | (k % 128 >= 120)),
    ),
    Row(
        "neighborhood",
        "neighborhood 13x13, width 128",
        neighborhood_text,
        neighborhood_rule,
        refuses=neighborhood_refuses,
    ),
    Row(
        "video",
        "neighborhood 7x13x13, 30x48x80",
        lambda _: VIDEO_TEXT,
        video_rule,
        refuses=video_refuses,
    ),
    Row(
        "routed",
        "8 random 64-blocks and its own, causal",
        lambda _: ROUTED_TEXT,
        routed_rule,
        routed_blocks,
        per_head=True,
    ),
    causal_window(512),
    static(
        "sink_window512",
        "causal & (sink(64) | window(512))",
        lambda b, h, q, k: (k <= q) & ((q - k < 512) | (k < 64)),
    ),
)
ROWS: dict[str, Row] = {row.name: row for row in ALL_ROWS}
GPU_ROWS: tuple[str, ...] = tuple(name for name in ROWS if not name.endswith("512"))
CPU_ROWS: tuple[str, ...] = (
    "window512",
    "sink_window512",
    "documents",
    "dilated",
    "strided",
    "fixed",
    "neighborhood",
    "causal",
)


def select(names: str | None, default: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows of a comma-separated list of names.

    Raises KeyError, naming the rows there are, for one that does not exist.
    """
    chosen = names.split(",") if names else list(default)
    missing = [name for name in chosen if name not in ROWS]
    if missing:
        raise KeyError(f"no row called {', '.join(missing)}; there are {', '.join(ROWS)}")
    return tuple(ROWS[name] for name in chosen)


def count_pairs(row: Row, sizes: Sizes, inputs: Inputs) -> int:
    """Allowed pairs of a call over all batch entries and heads, counted exactly in chunks of rows."""
    rule = row.rule(sizes, inputs)
    k = torch.arange(sizes.n, device=sizes.device)
    zero = torch.zeros((), dtype=torch.long, device=sizes.device)
    total = torch.zeros((), dtype=torch.long, device=sizes.device)
    for head in range(sizes.heads if row.per_head else 1):
        for start in range(0, sizes.n, 1024):
            q = torch.arange(start, min(start + 1024, sizes.n), device=sizes.device)[:, None]
            total += rule(zero, zero + head, q, k).sum()
    repeats = sizes.batch if row.per_head else sizes.batch * sizes.heads
    return int(total) * repeats
