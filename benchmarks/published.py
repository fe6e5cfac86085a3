"""The published systems of `examples/patterns` as calls: heads, sizes and inputs with which each is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Plans = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Draw:
    """Random tensors for a call of n tokens, the same ones each time.

    n, heads, kv_heads, dim: of the call. dtype, device: of its tensors.
    """

    n: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator, device=self.device)

    def entries(self, size: int, *columns: int) -> Tensor:
        """One for each `size` tokens of each key head."""
        return self.normal(1, self.kv_heads, -(-self.n // size), *(columns or (self.dim,)))

    def chosen(self, lists: int, rows: int, members: int, count: int) -> Tensor:
        """int32 [1, lists, n / rows, count]: distinct members of the first `members`, ascending, up to a row's own."""
        classes = -(-self.n // rows)
        last = (torch.arange(1, classes + 1, device=self.device) * members - 1) // classes
        scores = self.uniform(lists, classes, members)
        scores.masked_fill_(torch.arange(members, device=self.device) > last[:, None], -1.0)
        best = scores.topk(min(count, members), -1)
        found = torch.where(best.values < 0, members, best.indices).sort(-1).values
        return torch.where(found < members, found, -1).to(torch.int32)[None]

    def kept(self, count: int) -> Tensor:
        """int32 [1, heads, count]: distinct tokens, ascending, as a head keeps them."""
        scores = self.uniform(self.heads, self.n)
        return scores.topk(min(count, self.n), -1).indices.sort(-1).values.to(torch.int32)[None]

    def orders(self, lists: int, segment: int) -> Tensor:
        """int32 [1, lists, n]: each token's place in another order of its segment."""
        keys = self.uniform(lists, self.n) + torch.arange(self.n, device=self.device) // segment
        return keys.argsort(-1).argsort(-1).to(torch.int32)[None]

    def vectors(self, heads: int) -> Tensor:
        """[1, heads, n, dim]: noise about the topic of each 128 tokens, of which there are 32, since a cover of a row
        whose keys are all alike takes nearly all of them."""
        topics = torch.randn(32, self.dim, generator=torch.Generator(self.device).manual_seed(7), device=self.device)
        of = torch.randint(32, (-(-self.n // 128),), generator=torch.Generator("cpu").manual_seed(8)).to(self.device)
        about = topics[of.repeat_interleave(128)[: self.n]].to(self.dtype)
        return self.normal(1, heads, self.n, self.dim) + 0.7 * about


def none(_: Draw) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True)
class Published:
    """An example, and how it is called.

    seen: keys (and entries) that a row attends to on average, of the number of tokens and the call's plans.
    sizes: parameters for a number of tokens. backward: whether it has gradients. causal: what dense attention it
    stands beside. chooses: the plan is made for other layers, so the call does not make it.
    """

    name: str
    seen: Callable[[int, Plans], float]
    inputs: Callable[[Draw], dict[str, Tensor]] = none
    heads: int = 16
    kv_heads: int = 16
    sizes: Callable[[int], dict[str, Any]] = field(default=lambda _: {})
    backward: bool = True
    causal: bool = True
    observes: bool = False
    chooses: bool = False


def up_to(count: float) -> Callable[[int, Plans], float]:
    """Causal rows that see so many keys, the early ones all of theirs."""

    def seen(n: int, _: Plans) -> float:
        few = min(count, n)
        return few - few * (few - 1) / (2 * n)

    return seen


def mapped(name: str, part: float = 0.5) -> Callable[[int, Plans], float]:
    """Blocks of which a map names so many, and of which a row sees all but the half of its own."""

    def seen(n: int, plans: Plans) -> float:
        chosen = plans[name] != 0
        return float(chosen.sum(-1, dtype=torch.float32).mean()) * n / chosen.shape[-1] - part * n / chosen.shape[-1]

    return seen


def half(n: int, _: Plans) -> float:
    return (n + 1) / 2


def entries(size: int, kept: Callable[[int, Plans], float]) -> Callable[[int, Plans], float]:
    """So many keys, and causal entries of `size` tokens."""
    return lambda n, plans: kept(n, plans) + n / (2 * size)


def remembered(recent: int) -> Callable[[int, Plans], float]:
    """The recent tokens, and of 1024 that are kept those that are past."""
    return lambda n, plans: up_to(recent)(n, plans) + min(1024, n) / 2 * (1 - min(recent, n) / n)


def levels(n: int, plans: Plans) -> float:
    """A block of factor f is attended as its size over f."""
    factors = plans["level"].float()
    size = n / factors.shape[-1]
    return float((factors.clamp(min=1).reciprocal() * (factors > 0)).sum(-1).mean()) * size - size / 2


def _clusters(draw: Draw) -> Tensor:
    """Sorted cluster ids, of 64 tokens on average."""
    return (draw.uniform(1, draw.kv_heads, draw.n) < 1 / 64).cumsum(-1).int()


def _whole_grid(n: int) -> dict[str, int]:
    """A grid that n tokens fill, in tiles of 4 x 4 x 4, and how many of these a tile takes."""
    wide = 32 if n >= 4096 else 8
    return {"T": max(4, n // (wide * wide)), "Y": wide, "X": wide, "n": 32 if n >= 4096 else 4}


def _learned(draw: Draw, name: str, *shape: int) -> dict[str, Tensor]:
    return {name: draw.normal(1, draw.heads, draw.n, *shape).sigmoid()}


def _parts(draw: Draw) -> Tensor:
    """Of a prompt the first and the last tokens stay, what lies between is dropped."""
    at = torch.arange(draw.n, device=draw.device)
    return torch.where(at < 16, 0, torch.where(at < draw.n - draw.n // 4, 1, 2)).int()


SYSTEMS = (
    # Routing that trains.
    Published("moba", up_to(2.5 * 512)),
    Published("flash_moba", up_to(7.5 * 128), lambda d: {"kr": d.entries(1)}),
    Published("vmoba", lambda n, p: float((p["cover"] >= 0).sum(-1, dtype=torch.float32).mean()) * 64, causal=False),
    Published(
        "vmoba_video",
        lambda n, p: float((p["cover"] >= 0).sum(-1, dtype=torch.float32).mean()) * 32,
        causal=False,
        sizes=lambda n: {"height": 32, "width": 32},
    ),
    Published(
        "vmoba_global", lambda n, p: float((p["cover"] >= 0).sum(-1, dtype=torch.float32).mean()) * 64, causal=False
    ),
    Published(
        "nsa",
        entries(64, lambda n, p: up_to(15.5 * 64)(n, p) + up_to(512)(n, p)),
        lambda d: _learned(d, "gate", 3),
        64,
        4,
    ),
    Published("coarse_and_near", entries(64, up_to(512)), lambda d: _learned(d, "gate", 2)),
    Published("dsa", up_to(2048), lambda d: {"index": d.normal(1, d.n, d.n, dtype=torch.float32)}, 64, 1),
    Published(
        "seer",
        mapped("above"),
        lambda d: {"gate": 4 * d.normal(1, d.heads, -(-d.n // 64), -(-d.n // 64), dtype=torch.float32)},
    ),
    Published("seer_target", half, observes=True),
    Published(
        "vsa",
        lambda n, _: 64 * _whole_grid(n)["n"] + n / 64,
        lambda d: _learned(d, "gate", d.dim),
        sizes=_whole_grid,
        causal=False,
    ),
    Published("dma", up_to(2048), lambda d: {"bias": d.normal(1, d.kv_heads, d.n)}),
    Published("biformer", lambda n, _: min(4 * 64, n), sizes=lambda n: {"width": 128}, causal=False),
    Published("regions", lambda n, _: min(4 * 64, n), sizes=lambda n: {"region": 64}, causal=False),
    Published("routing_transformer", lambda *_: 128.5),
    Published("hsa", entries(64, up_to(8.5 * 64)), lambda d: {"summary": d.entries(64)}, 16, 4),
    Published("landmark", entries(64, up_to(4.5 * 64)), lambda d: {"marks": d.entries(64)}, 16, 4),
    Published("cca", entries(16, up_to(1016)), lambda d: {"kc": d.entries(16), "vc": d.entries(16)}),
    # Prefill and diffusion without training.
    Published("minference_a_shape", up_to(4096 + 128)),
    Published("minference_blocks", up_to(99.5 * 64)),
    Published("vertical_slash", half),
    Published("flex_prefill", half, lambda d: {"aware": torch.arange(d.heads, device=d.device)[None] % 2 == 0}),
    Published("xattention", mapped("cover")),
    Published(
        "sparge",
        mapped("cover"),
        lambda d: {
            "fixed_q": d.uniform(1, d.heads, -(-d.n // 128)) < 0.05,
            "fixed_k": d.uniform(1, d.kv_heads, -(-d.n // 64)) < 0.05,
        },
    ),
    Published("pbs", lambda n, p: 128.5 + mapped("cover", 0)(n, p), lambda d: {"pi": d.orders(d.heads, 256)}),
    Published(
        "sale", mapped("above"), lambda d: {"estimate": 0.005 * d.uniform(1, d.heads, -(-d.n // 64), -(-d.n // 32))}
    ),
    Published("blasst", half, backward=False),
    Published("hip", up_to(256 + 1024 + 512), lambda d: {"keep": d.chosen(d.heads, 64, -(-d.n // 64), 8)}),
    Published("psa", levels),
    Published("pisa", lambda n, _: 0.15 * n + 0.85 * n / 64, causal=False),
    Published(
        "svg_ear",
        lambda n, _: min(64 * 64, n) + n / 64,
        lambda d: {"c": _clusters(d), "gain": d.uniform(1, d.heads, -(-d.n // 128), d.n)},
        causal=False,
    ),
    Published(
        "hyper",
        lambda n, _: min(512, n),
        lambda d: {
            "rq": d.orders(d.heads, d.n),
            "rk": d.orders(d.heads, d.n),
            "drawn": (d.uniform(1, d.kv_heads, 256) * d.n).int(),
        },
        causal=False,
    ),
    Published("long_heads", up_to(15.5 * 256), lambda d: {"ck": d.entries(256)}),
    Published("proxy", up_to(19.5 * 128), heads=16, kv_heads=4, sizes=lambda _: {"n": (8, 16, 24, 32) * 4}),
    Published(
        "dhsa",
        up_to(1024),
        lambda d: {
            "chunk": (torch.arange(d.n, device=d.device) * 64 // d.n)[None].int(),
            "similar": d.normal(1, d.heads, d.n, 64, dtype=torch.float32),
        },
    ),
    Published(
        "star", lambda n, p: min(n, 6144), lambda d: {"context": torch.tensor([d.n - d.n // 32], device=d.device).int()}
    ),
    Published(
        "star_merge",
        lambda n, _: n,
        lambda d: {"others": d.normal(1, d.heads, d.n, d.dim), "others_lse": d.normal(1, d.heads, d.n).float()},
        causal=False,
    ),
    # Choosing while decoding, here of all rows of a prompt.
    Published("quest", up_to(64 * 16)),
    Published("tidal_select", half, heads=16, kv_heads=4, chooses=True),
    Published("tidal_reuse", up_to(256 + 64), lambda d: {"keep": d.chosen(d.kv_heads, 1, d.n, 256)}, 16, 4),
    Published(
        "lychee",
        lambda n, p: (n / 2 + 7 * 129) / 8,
        lambda d: {"retrieves": torch.arange(d.heads, device=d.device) % 8 == 0, "taken": d.kept(256)},
        chooses=True,
    ),
    Published("token_select", up_to(2048 + 128 + 512)),
    Published("snapkv", remembered(32), lambda d: {"kept": d.kept(1024)}, observes=True),
    Published("h2o", remembered(512), lambda d: {"kept": d.kept(1024)}, observes=True),
    Published("scissorhands", remembered(256), lambda d: {"kept": d.kept(1024)}, observes=True),
    Published("a2sf", remembered(512), lambda d: {"kept": d.kept(1024)}, observes=True),
    Published("lazy_eviction", remembered(64), lambda d: {"kept": d.kept(1024)}, observes=True),
    Published(
        "nats",
        up_to(1024),
        lambda d: {"until": (torch.arange(d.n, device=d.device) + 2048 * d.uniform(1, d.heads, d.n)).int()},
    ),
    Published(
        "razor",
        lambda n, p: n / 2,
        lambda d: {"retrieves": torch.arange(d.heads, device=d.device) % 4 == 0, "part": _parts(d)},
    ),
    Published("pyramid", entries(16, up_to(64 + 48))),
    Published("combiner", entries(64, up_to(32))),
)
