"""Published systems for images and videos as independent numpy rules, each beside its example file.

A rule is written from the paper or the reference code, never from the program: coordinates by counting cells, windows
by the rule that NATTEN documents. Sizes are scaled down; lengths leave the last row of a grid unfinished.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.rules import HEADS, Array, Pairs, System

EXAMPLES = Path(__file__).parent.parent / "examples" / "patterns"


def cells(n: int, sizes: tuple[int, ...], first: int = 0, tiles: tuple[int, ...] | None = None) -> Array:
    """int [n, axes]: the coordinates of each token of a grid whose first axis is open; -1 before its first token."""
    found = np.full((n, 1 + len(sizes)), -1)
    tile = (1,) * (1 + len(sizes)) if tiles is None else tiles
    counts = (n, *(size // t for size, t in zip(sizes, tile[1:], strict=True)))
    token = first
    for corner in np.ndindex(*counts):
        for inside in np.ndindex(*tile):
            if token >= n:
                return found
            found[token] = np.asarray(corner) * tile + np.asarray(inside)
            token += 1
    return found


def _along(n: int, p: Pairs, sizes: tuple[int, ...], first: int = 0) -> list[tuple[Array, Array]]:
    """The coordinates of queries and of keys, for each axis."""
    place = cells(n, sizes, first)
    queries = p.q[0, 0, :, 0]
    return [(place[queries, a][:, None], place[:, a][None, :]) for a in range(place.shape[1])]


def natten(q: Array, k: Array, length: int, window: int, dilation: int = 1, stride: int = 1) -> Array:
    """One axis of neighbourhood attention, key by key (NATTEN's documentation of GNA)."""
    allowed = np.zeros(np.broadcast_shapes(q.shape, k.shape), bool)
    for i, j in np.ndindex(*allowed.shape):
        x, y = int(q[i, 0]), int(k[0, j])
        if x < 0 or y < 0 or x % dilation != y % dilation:
            continue
        own, of = x // dilation, len(range(x % dilation, length, dilation))
        leader = min(own // stride * stride + stride // 2, of - 1)
        begin = min(max(leader - window // 2, 0), max(of - window, 0))
        allowed[i, j] = begin <= y // dilation < begin + window
    return allowed


def causal_natten(q: Array, k: Array, length: int, window: int, dilation: int = 1, stride: int = 1) -> Array:
    allowed = np.zeros(np.broadcast_shapes(q.shape, k.shape), bool)
    for i, j in np.ndindex(*allowed.shape):
        x, y = int(q[i, 0]), int(k[0, j])
        if x < 0 or y < 0 or x % dilation != y % dilation:
            continue
        own, of = x // dilation, len(range(x % dilation, length, dilation))
        leader = min(own // stride * stride + stride - 1, of - 1)
        allowed[i, j] = max(leader - window + 1, 0) <= y // dilation <= own
    return allowed


def _neighborhood(p: Pairs, window: int, dilation: int, stride: int, height: int, width: int) -> Array:
    (qy, ky), (qx, kx) = _along(p.n, p, (width,))
    rule = partial(natten, window=window, dilation=dilation, stride=stride)
    # Tokens past the image's last row are no part of it.
    return np.asarray((qy < height) & (ky < height) & rule(qy, ky, height) & rule(qx, kx, width))


def _video(p: Pairs, frames: int, window: int, stride: int, height: int, width: int, text: int) -> Array:
    (qt, kt), (qy, ky), (qx, kx) = _along(p.n, p, (height, width), text)
    found = causal_natten(qt, kt, -(-max(p.n - text, 0) // (height * width)), frames)
    found = found & natten(qy, ky, height, window, stride=stride) & natten(qx, kx, width, window, stride=stride)
    return found | (qt < 0) | (kt < 0)


def _tiles(p: Pairs, tile_t: int, tile: int, near: int, frames: int, height: int, width: int) -> Array:
    """Windows of whole tiles, each centred on the query's own where that is possible."""
    found = np.ones((1, 1), bool)
    sizes = (frames, height, width)
    for (q, k), size, of in zip(_along(p.n, p, (height, width)), sizes, (tile_t, tile, tile), strict=True):
        found = found & (q < size) & (k < size)
        last = -(-size // of) - near
        begin = np.clip(q // of - near // 2, 0, max(last, 0))
        found = found & (k // of >= begin) & (k // of < begin + near)
    return found


def _windows(p: Pairs, w: int, width: int, shift: int = 0) -> Array:
    """Shifted windows: cut the image at shift, shift + w, …"""
    found = np.ones((1, 1), bool)
    for q, k in _along(p.n, p, (width,)):
        cuts = np.arange(shift % w, 1000, w)
        found = found & (np.searchsorted(cuts, q, "right") == np.searchsorted(cuts, k, "right"))
    return found


def _radial(p: Pairs, tokens: int, block: int, width: list[int], every: list[int]) -> Array:
    n = p.n
    frame, place = np.arange(n) // tokens, np.arange(n) % tokens
    blocks = -(-n // block)
    kept = np.zeros((blocks, blocks), bool)
    for q in range(n):
        for k in range(n):
            d = abs(int(frame[q] - frame[k]))
            if frame[k] == 0 or (abs(int(place[q] - place[k])) <= width[d] and d % every[d] == 0):
                kept[q // block, k // block] = True
    return np.asarray(kept[p.q // block, p.k // block])


def rettention(p: Pairs, w: int, text: int, tokens: int) -> Array:
    (qf, kf), (qu, ku) = _along(p.n, p, (tokens,), text)
    return np.asarray((qf < 0) | (kf < 0) | (np.abs(qu - ku) <= w // 2))


def _axial(p: Pairs, width: int) -> Array:
    (qy, ky), (qx, kx) = _along(p.n, p, (width,))
    return np.asarray(np.where(p.h < HEADS // 2, qy == ky, qx == kx))


def example(
    file: str,
    rule: Callable[..., Array],
    lengths: tuple[int, ...],
    *,
    name: str = "",
    same: dict[str, Any],
    **more: Any,
) -> System:
    """A system whose program is an example file; `same`: parameters that the rule takes too, `more`: inputs."""
    text = (EXAMPLES / f"{file}.attn").read_text("utf-8")
    return System(name or file, text, lambda p: rule(p, **same), same | more.pop("only", {}), lengths=lengths, **more)


def _bias(rng: np.random.Generator, n: int) -> dict[str, Array]:
    return {"bias": rng.standard_normal((HEADS, 5, 5)).astype(np.float32)}


def _decay(rng: np.random.Generator, n: int) -> dict[str, Array]:
    return {"decay": rng.uniform(0.5, 0.99, HEADS).astype(np.float32)}


GRIDS: tuple[System, ...] = (
    example(
        "neighborhood", _neighborhood, (25, 57),
        same={"window": 4, "dilation": 1, "stride": 1, "height": 8, "width": 7},
    ),
    example(
        "neighborhood", _neighborhood, (72, 88), name="dilated_neighborhood",
        same={"window": 3, "dilation": 2, "stride": 2, "height": 9, "width": 8},
    ),
    example(
        "neighborhood", _neighborhood, (54, 76), name="strided_neighborhood",
        same={"window": 5, "dilation": 1, "stride": 3, "height": 8, "width": 9},
    ),
    example(
        "video", _video, (40, 71),
        same={"frames": 2, "window": 3, "stride": 2, "height": 4, "width": 5, "text": 0},
    ),
    example(
        "video", _video, (2, 66), name="video_and_text",
        same={"frames": 2, "window": 3, "stride": 1, "height": 4, "width": 5, "text": 6},
    ),
    example(
        "sliding_tile", _tiles, (72, 131),
        same={"tile_t": 1, "tile": 2, "near": 3, "frames": 3, "height": 6, "width": 8},
    ),
    example("swin", _windows, (36, 50), same={"w": 3, "shift": 0, "width": 6}, data=_bias),
    example("swin", _windows, (36, 50), name="swin_shifted", same={"w": 3, "shift": 1, "width": 7}, data=_bias),
    example("rmt", _windows, (36, 40), same={"w": 3, "shift": 1, "width": 6}, data=_decay),
    example("rmt_sigmoid", _windows, (36, 40), same={"w": 3, "shift": 1, "width": 6}, data=_decay),
    example("davit", _windows, (49, 60), same={"w": 4, "width": 8}),
    example(
        "radial", _radial, (30, 46),
        same={"tokens": 8, "block": 4, "width": [8, 8, 2, 1, 1, 1], "every": [1, 1, 1, 2, 2, 4]}, only={"frames": 6},
    ),
    System(
        "rettention",
        # Without the factor that the example gives each row.
        """attention rettention(w = 256, text = 226, tokens = 1350) {
            axes f, u[tokens] from text
            attend band(w // 2, w // 2) on u | off_grid }""",
        partial(rettention, w=4, text=5, tokens=9), params={"w": 4, "text": 5, "tokens": 9}, lengths=(4, 61),
    ),
    example("axial", _axial, (30, 44), same={"width": 8}),
)  # fmt: skip
