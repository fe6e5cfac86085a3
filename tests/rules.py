"""Published systems as independent numpy rules, each beside its program in the language.

A rule is written from the paper or the reference code, never from the program, in the terms the
source uses. `SYSTEMS` are patterns, `SCORES` are score clauses; sizes are scaled down so that small
sequences reach every case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from attndsl.program import CallShape

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Data = Mapping[str, Array]

BATCH, HEADS, KV_HEADS = 2, 4, 2


@dataclass(frozen=True)
class Pairs:
    """Positions of a call, to be broadcast, and what the call was given."""

    shape: CallShape
    data: Data

    @property
    def n(self) -> int:
        return self.shape.k_len

    @property
    def b(self) -> Ints:
        return np.arange(self.shape.batch).reshape(-1, 1, 1, 1)

    @property
    def h(self) -> Ints:
        return np.arange(self.shape.heads).reshape(1, -1, 1, 1)

    @property
    def g(self) -> Ints:
        return np.repeat(np.arange(self.shape.kv_heads), self.shape.heads // self.shape.kv_heads).reshape(1, -1, 1, 1)

    @property
    def q(self) -> Ints:
        return np.arange(self.n - self.shape.rows, self.n).reshape(1, 1, -1, 1)

    @property
    def k(self) -> Ints:
        return np.arange(self.n).reshape(1, 1, 1, -1)

    @property
    def causal(self) -> Array:
        return self.k <= self.q

    def causally(self, pattern: Array) -> Array:
        """The pairs of a pattern whose key is not after the query."""
        return np.asarray(self.causal & pattern)

    def of_token(self, name: str) -> tuple[Array, Array]:
        """A [b, k] input at the query's and at the key's position."""
        values = self.data[name]
        return values[:, None, self.q[0, 0, :, 0], None], values[:, None, None, :]

    def of_batch(self, name: str) -> Array:
        return self.data[name].reshape(-1, 1, 1, 1)


def _no_data(rng: np.random.Generator, n: int) -> dict[str, Array]:
    return {}


@dataclass(frozen=True)
class System:
    """`data(rng, n)` makes the inputs (and what only the rule needs); lengths the rule is meant for."""

    name: str
    text: str
    rule: Callable[[Pairs], Array]
    params: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[np.random.Generator, int], dict[str, Array]] = _no_data
    lengths: tuple[int, ...] = (1, 17, 40)


def shape_of(n: int, rows: int, dim: int = 8) -> CallShape:
    return CallShape(BATCH, HEADS, KV_HEADS, rows, n, dim, dim)


# ------------------------------------------------------------------------------------- inputs


def _documents(rng: np.random.Generator, n: int) -> Array:
    """Segment ids [BATCH, n]: 0, 1, … in order, of random lengths."""
    return np.sort(rng.integers(0, 4, (BATCH, n)), axis=1).astype(np.int32)


def _last_document(ids: Array) -> Array:
    return ids[:, -1].astype(np.int32)


def _segments(rng: np.random.Generator, n: int) -> dict[str, Array]:
    ids = _documents(rng, n)
    return {"seg": ids, "final": _last_document(ids)}


def _nats(rng: np.random.Generator, n: int) -> dict[str, Array]:
    """Every key is global, local (seen up to the next global key) or sliding (seen by 4 rows)."""
    kind = rng.integers(0, 3, (BATCH, HEADS, n))
    until = np.empty(kind.shape, np.int64)
    for place in np.ndindex(*kind.shape):
        *head, k = place
        later = [j for j in range(k + 1, n) if kind[(*head, j)] == 0]
        until[place] = (n - 1, later[0] if later else n - 1, k + 3)[kind[place]]
    return {"kind": kind, "until": until.astype(np.int32)}


def _flashmask(rng: np.random.Generator, n: int) -> dict[str, Array]:
    ends = np.sort(rng.integers(0, n + 1, (BATCH, HEADS, n, 2, 2)), axis=-1).astype(np.int32)
    return {"lo": ends[..., 0], "hi": ends[..., 1]}


# -------------------------------------------------------------------------------------- rules


def streaming(p: Pairs) -> Array:
    return p.causally((p.k < 2) | (p.q - p.k < 6))


def duo(p: Pairs) -> Array:
    full = p.data["full"][p.g]
    return p.causally(full | (p.k < 3) | (p.q - p.k < 5))


def moa(p: Pairs) -> Array:
    span = p.data["C"][p.h]
    head = np.minimum(span, 4)
    return p.causally((p.k < head) | (p.q - p.k < span - head))


def moa_formula(p: Pairs) -> Array:
    alpha, beta = np.array([-3, 4, 9, 0]), np.array([1, 0, 2, 5])
    span = np.floor(alpha + beta * p.n / 8)
    rounded = (4 * np.ceil(np.maximum(8, np.minimum(span, p.n)) / 4))[p.h]
    head = np.minimum(rounded, 4)
    return p.causally((p.k < head) | (p.q - p.k < rounded - head))


def power_attention(p: Pairs) -> Array:
    distance = p.q // 2 - p.k // 2
    power = np.isin(distance, [2**i for i in range(20)])
    return p.causally((distance < 3) | (p.k // 2 < 1) | power)


def s2(p: Pairs) -> Array:
    q_block, k_block, v = p.q // 3, p.k // 3, 4
    step = max(1, v // HEADS)
    sparse = (q_block - k_block < 2) | ((k_block + p.g * step + 1) % v == 0)
    return p.causally((p.h == HEADS - 1) | ((k_block <= q_block) & sparse))


def longlora(p: Pairs) -> Array:
    plain = p.q // 6 == p.k // 6
    shifted = (p.q + 3) // 6 == (p.k + 3) // 6
    return p.causally(np.where(p.h < HEADS // 2, plain, shifted))


def longlora_n(p: Pairs) -> Array:
    group = p.n // 4
    plain = p.q // group == p.k // group
    shifted = (p.q + p.n // 8) // group == (p.k + p.n // 8) // group
    return p.causally(np.where(p.h < HEADS // 2, plain, shifted))


def strided_transformer(p: Pairs) -> Array:
    return p.causally((p.q - p.k < 3) | ((p.q - p.k) % 5 == 0))


def fixed_transformer(p: Pairs) -> Array:
    inside = np.arange(p.n) % 6
    summary = np.flatnonzero(inside >= 4)
    return p.causally((p.q // 6 == p.k // 6) | np.isin(p.k, summary))


def longformer(p: Pairs) -> Array:
    width, dilation = np.array([1, 2, 3, 4]), np.array([1, 2, 1, 3])
    seen = np.zeros((1, HEADS, p.shape.rows, p.n), bool)
    for h in range(HEADS):
        for row, q in enumerate(p.q.ravel()):
            for j in range(-width[h], width[h] + 1):
                if 0 <= q + j * dilation[h] < p.n:
                    seen[0, h, row, q + j * dilation[h]] = True
    at_q, at_k = p.of_token("flag")
    return seen | at_q | at_k


def prefix_lm(p: Pairs) -> Array:
    return p.causal | (p.k < p.of_batch("P"))


def documents(p: Pairs) -> Array:
    seen = np.zeros((BATCH, 1, p.shape.rows, p.n), bool)
    for b, ids in enumerate(p.data["doc"]):
        for row, q in enumerate(p.q.ravel()):
            start = int(np.flatnonzero(ids == ids[q])[0])
            seen[b, 0, row, start : q + 1] = True
    return seen


def block_attention(p: Pairs) -> Array:
    at_q, at_k = p.of_token("seg")
    return p.causally((at_q == at_k) | (at_q == p.of_batch("final")))


def blockrank(p: Pairs) -> Array:
    at_q, at_k = p.of_token("seg")
    first = (at_q == 0) & (at_k == 0)
    middle = (at_q > 0) & ((at_k == 0) | (at_k == at_q))
    return p.causally(first | middle | (at_q == p.of_batch("final")))


def star(p: Pairs) -> Array:
    context = (p.q // 7 == p.k // 7) | (p.k < 7)
    return p.causally(context | (p.q >= p.of_batch("context")))


def block_diffusion(p: Pairs) -> Array:
    half, size = p.n // 2, 3
    z_q, z_k = p.q >= half, p.k >= half
    b_q, b_k = (p.q % half) // size, (p.k % half) // size
    return np.asarray(((b_q == b_k) & (z_q == z_k)) | ((b_q > b_k) & ~z_q & z_k) | ((b_q >= b_k) & z_q & z_k))


def block_diffusion_inference(p: Pairs) -> Array:
    return p.q // 5 >= p.k // 5


def nats(p: Pairs) -> Array:
    kind = p.data["kind"]
    seen = np.zeros((BATCH, HEADS, p.shape.rows, p.n), bool)
    for b, h, row, k in np.ndindex(*seen.shape):
        q = int(p.q.ravel()[row])
        between = kind[b, h, k + 1 : q]
        visible = (True, not (between == 0).any(), q < k + 4)[kind[b, h, k]]
        seen[b, h, row, k] = k <= q and visible
    return seen


def flashmask(p: Pairs) -> Array:
    seen = np.ones((BATCH, HEADS, p.n, p.n), bool)
    for b, h, k, i in np.ndindex(*p.data["lo"].shape):
        seen[b, h, p.data["lo"][b, h, k, i] : p.data["hi"][b, h, k, i], k] = False
    return seen[:, :, p.n - p.shape.rows :]


def _neighborhood(p: Pairs, size: int, dilation: int, stride: int, causal: bool) -> Array:
    """NATTEN, one axis: the window of a query, among the positions of its residue class, shifts at the border."""
    seen = np.zeros((1, 1, p.shape.rows, p.n), bool)
    for row, q in enumerate(p.q.ravel().tolist()):
        line = list(range(q % dilation, p.n, dilation))
        x = line.index(q)
        if causal:
            leader = min(stride * (x // stride) + stride - 1, len(line) - 1)
            keys = line[max(leader - size + 1, 0) : x + 1]
        else:
            leader = min(stride * (x // stride) + stride // 2, len(line) - 1)
            start = max(0, min(leader - size // 2, len(line) - size))
            keys = line[start : start + size]
        seen[0, 0, row, keys] = True
    return seen


# ------------------------------------------------------------------------------------ systems

SYSTEMS: tuple[System, ...] = (
    System("streaming", "causal & (sink(2) | window(6))", streaming),
    System(
        "duo",
        "attention duo { input full : bool[g]\n attend causal & (if full[g] then all else sink(3) | window(5)) }",
        duo,
        data=lambda rng, n: {"full": np.array([True, False])},
    ),
    System(
        "moa",
        """attention moa { input C : int[h]
        attend causal & (sink(min(C[h], 4)) | window(C[h] - min(C[h], 4))) }""",
        moa,
        data=lambda rng, n: {"C": np.array([2, 4, 9, 30], np.int32)},
    ),
    System(
        "moa_formula",
        """attention moa_formula(alpha : int[h], beta : int[h]) {
        attend { k <= q and (k < head or q - k < span - head)
                 where span = 4 * ((max(8, min(alpha[h] + beta[h] * Nk // 8, Nk)) + 3) // 4),
                       head = min(span, 4) } }""",
        moa_formula,
        params={"alpha": [-3, 4, 9, 0], "beta": [1, 0, 2, 5]},
    ),
    System("power_attention", "causal & (window(3) | sink(1) | power_of_two) on blocks(2)", power_attention),
    System(
        "s2",
        """pattern s2(block = 64, near = 4, v = 4, off = 0, dense = 0) = causal &
        (if h >= H - dense then all
         else (window(near) | { (k + g * max(1, v // H) + off) % v == 0 }) on blocks(block))""",
        s2,
        params={"block": 3, "near": 2, "v": 4, "off": 1, "dense": 1},
    ),
    System(
        "longlora",
        """pattern longlora(group = 2048) = causal &
        (if h < H // 2 then same_block(group) else same_block(group, group // 2))""",
        longlora,
        params={"group": 6},
    ),
    System(
        "longlora_n",
        "causal & (if h < H // 2 then same_block(Nk // 4) else same_block(Nk // 4, Nk // 8))",
        longlora_n,
        lengths=(8, 17, 40),
    ),
    System(
        "strided_transformer",
        "pattern strided_transformer(span = 128, step = 128) = causal & (window(span) | dilated(step))",
        strided_transformer,
        params={"span": 3, "step": 5},
    ),
    System(
        "fixed_transformer",
        "pattern fixed_transformer(l = 128, c = 8) = causal & (same_block(l) | { k % l >= l - c })",
        fixed_transformer,
        params={"l": 6, "c": 2},
    ),
    System(
        "longformer",
        """attention longformer(w : int[h], d : int[h]) { input flag : bool[b, k]
        attend band(w[h] * d[h], w[h] * d[h]) & dilated(d[h]) | global_tokens(flag) }""",
        longformer,
        params={"w": [1, 2, 3, 4], "d": [1, 2, 1, 3]},
        data=lambda rng, n: {"flag": rng.random((BATCH, n)) < 0.15},
    ),
    System(
        "prefix_lm",
        "attention prefix_lm { input P : int[b]\n attend causal | prefix(P[b]) }",
        prefix_lm,
        data=lambda rng, n: {"P": np.array([0, n // 2], np.int32)},
    ),
    System(
        "documents",
        "attention documents { input doc : int[b, k] sorted\n attend causal & document(doc) }",
        documents,
        data=lambda rng, n: {"doc": _documents(rng, n)},
    ),
    System(
        "block_attention",
        """attention block_attention { input seg : int[b, k] sorted
        input final : int[b]
        attend causal & (document(seg) | { seg[q] == final[b] }) }""",
        block_attention,
        data=_segments,
    ),
    System(
        "blockrank",
        """attention blockrank { input seg : int[b, k] sorted
        input final : int[b]
        attend causal & (document(seg) | { seg[k] == 0 or seg[q] == final[b] }) }""",
        blockrank,
        data=_segments,
    ),
    System(
        "star",
        """attention star(a = 4096) { input context : int[b]
        attend causal & (same_block(a) | sink(a) | { q >= context[b] }) }""",
        star,
        params={"a": 7},
        data=lambda rng, n: {"context": np.array([n // 2, n], np.int32)},
    ),
    System(
        "block_diffusion",
        """pattern block_diffusion(size = 32) = {
            bq == bk and zq == zk or bq > bk and not zq and zk or bq >= bk and zq and zk
            where n = Nk // 2, zq = q >= n, zk = k >= n,
                  bq = (if zq then q - n else q) // size, bk = (if zk then k - n else k) // size }""",
        block_diffusion,
        params={"size": 3},
        lengths=(2, 16, 40),
    ),
    System("block_diffusion_inference", "causal on blocks(5)", block_diffusion_inference),
    System(
        "nats", "attention nats { input until : int[b, h, k]\n attend causal & { q <= until[k] } }", nats, data=_nats
    ),
    System(
        "flashmask",
        """attention flashmask { input lo : int[b, h, k, 2]
        input hi : int[b, h, k, 2]
        attend { not (lo[k, 0] <= q < hi[k, 0]) and not (lo[k, 1] <= q < hi[k, 1]) } }""",
        flashmask,
        data=_flashmask,
    ),
    *(
        System(
            f"neighborhood_{size}_{dilation}_{stride}",
            f"neighborhood({size}, dilation = {dilation}, stride = {stride})",
            partial(_neighborhood, size=size, dilation=dilation, stride=stride, causal=False),
            lengths=(size * dilation, 17, 40),
        )
        for size, dilation, stride in ((5, 1, 1), (4, 1, 1), (3, 2, 1), (5, 1, 3), (4, 2, 2), (5, 3, 5))
    ),
    *(
        System(
            f"causal_neighborhood_{size}_{dilation}_{stride}",
            f"causal_neighborhood({size}, dilation = {dilation}, stride = {stride})",
            partial(_neighborhood, size=size, dilation=dilation, stride=stride, causal=True),
        )
        for size, dilation, stride in ((5, 1, 1), (3, 2, 1), (5, 1, 3), (4, 3, 2))
    ),
)


# ------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class ScoreRule:
    """`logits(p, s)` from the scaled dot products s [B, H, rows, Nk]; `mask` as in `System`."""

    name: str
    text: str
    logits: Callable[[Pairs, Array], Array]
    rule: Callable[[Pairs], Array]
    scale: float | None = None
    data: Callable[[np.random.Generator, int], dict[str, Array]] = _no_data


def t5_bucket(relative: int, buckets: int = 32, furthest: int = 128) -> int:
    """Bidirectional bucket of key position less query position (T5, `_relative_position_bucket`)."""
    side = buckets // 2
    base = side if relative > 0 else 0
    distance = abs(relative)
    exact = side // 2
    if distance < exact:
        return base + distance
    far = exact + int(np.log(distance / exact) / np.log(furthest / exact) * (side - exact))
    return base + min(far, side - 1)


def _t5_data(rng: np.random.Generator, n: int) -> dict[str, Array]:
    table = np.array([t5_bucket(offset) for offset in range(-128, 129)], np.int32)
    return {"bucket": table, "bias": rng.standard_normal((HEADS, 32)).astype(np.float32)}


def _t5_logits(p: Pairs, s: Array) -> Array:
    bias = np.empty((1, HEADS, p.shape.rows, p.n))
    for row, q in enumerate(p.q.ravel()):
        for k in range(p.n):
            bias[0, :, row, k] = p.data["bias"][:, t5_bucket(k - int(q))]
    return s + bias


SCORES: tuple[ScoreRule, ...] = (
    ScoreRule(
        "alibi",
        "attention alibi { score s - exp2(-8 * (h + 1) / H) * (q - k)\n attend causal }",
        lambda p, s: s - 2.0 ** (-8 * (p.h + 1) / HEADS) * (p.q - p.k),
        lambda p: p.causal,
    ),
    ScoreRule(
        "softcap",
        "attention gemma2 { score softcap(s, 2.0)\n attend causal & window(9) }",
        lambda p, s: 2.0 * np.tanh(s / 2.0),
        lambda p: p.causal & (p.q - p.k < 9),
    ),
    ScoreRule(
        "t5",
        """attention t5 { input bucket : int[257]
        input bias : float[h, 32] learnable
        scale 1
        score s + bias[h, bucket[clamp(k - q, -128, 128) + 128]]
        attend all }""",
        _t5_logits,
        lambda p: np.ones((1, 1, 1, 1), bool),
        scale=1.0,
        data=_t5_data,
    ),
)
