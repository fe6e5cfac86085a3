"""Patterns for `gpu_check`, each with an independent rule in PyTorch, and the shapes they are run at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rows import MaskRule

# (s, h, q, k) -> logit, on tensors that broadcast together
ScoreRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One call: q [batch, heads, rows, dim], k [batch, kv_heads, k_len, dim], v [batch, kv_heads, k_len, v_dim]."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    k_len: int
    dim: int
    v_dim: int
    dtype: torch.dtype
    strided: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = " strided" if self.strided else ""
        heads, sizes = f"H={self.heads}/{self.kv_heads}", f"N={self.rows}x{self.k_len} D={self.dim}/{self.v_dim}"
        return f"{dtype} B={self.batch} {heads} {sizes}{layout}"


def no_inputs(_shape: Shape, _generator: torch.Generator) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True)
class Case:
    """A program and what it means: `rule(inputs)` for the pairs, `score(inputs)` for the logits, an input `sinks`
    of shape [heads] for a sink. `any_rows` says that a call may have more rows than keys."""

    name: str
    text: str
    rule: Callable[[Mapping[str, Tensor]], MaskRule]
    inputs: Callable[[Shape, torch.Generator], dict[str, Tensor]] = no_inputs
    score: Callable[[Mapping[str, Tensor]], ScoreRule] | None = None
    any_rows: bool = False


def static(text: str, rule: MaskRule, any_rows: bool = False) -> Case:
    return Case(text, text, lambda _: rule, any_rows=any_rows)


def attention(name: str, body: str) -> str:
    return f"attention {name} {{\n{body}}}\n"


def documents(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """doc: int32 [batch, k_len], sorted, about five documents."""
    ids = torch.randint(0, 5, (shape.batch, shape.k_len), generator=generator)
    return {"doc": ids.sort(-1).values.to(torch.int32)}


def lengths(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """len: int32 [batch], from 0 (every row empty) to k_len."""
    return {"len": torch.randint(0, shape.k_len + 1, (shape.batch,), generator=generator).to(torch.int32)}


def slopes(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """slope: float32 [heads]."""
    return {"slope": torch.rand(shape.heads, generator=generator)}


def sinks(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """sinks: float32 [heads]."""
    return {"sinks": torch.randn(shape.heads, generator=generator)}


CASES: tuple[Case, ...] = (
    static("all", lambda b, h, q, k: (k == k) & (q == q)),
    static("causal", lambda b, h, q, k: k <= q, any_rows=True),
    static("causal & window(100)", lambda b, h, q, k: (k <= q) & (q - k < 100), any_rows=True),
    static("causal & (sink(4) | window(64))", lambda b, h, q, k: (k <= q) & ((k < 4) | (q - k < 64)), any_rows=True),
    static("band(10, 37)", lambda b, h, q, k: (q - k >= -37) & (q - k <= 10)),
    static("causal | prefix(300)", lambda b, h, q, k: (k <= q) | (k < 300)),
    static("same_block(48)", lambda b, h, q, k: q // 48 == k // 48),
    static("causal & window(512) & dilated(8)", lambda b, h, q, k: (k <= q) & (q - k < 512) & ((q - k) % 8 == 0)),
    static("causal & (window(32) | dilated(64))", lambda b, h, q, k: (k <= q) & ((q - k < 32) | ((q - k) % 64 == 0))),
    static("causal & strided(7, 3)", lambda b, h, q, k: (k <= q) & (k % 7 == 3)),
    static("causal & power_of_two", lambda b, h, q, k: (q > k) & (((q - k) & (q - k - 1)) == 0)),
    # the first 512 rows see nothing
    static("{ q // 128 - k // 128 >= 4 }", lambda b, h, q, k: q // 128 - k // 128 >= 4),
    static("causal & ~window(700)", lambda b, h, q, k: q - k >= 700, any_rows=True),
    static("causal on blocks(32) - sink(5)", lambda b, h, q, k: (k // 32 <= q // 32) & (k >= 5)),
    static(
        "causal & (if h % 2 == 0 then window(33) else sink(200))",
        lambda b, h, q, k: (k <= q) & torch.where(h % 2 == 0, q - k < 33, k < 200),
    ),
    Case(
        "documents",
        attention("documents", "    input doc : int[b, k] sorted\n    attend causal & document(doc)\n"),
        lambda x: lambda b, h, q, k: (k <= q) & (x["doc"][b, q] == x["doc"][b, k]),
        documents,
    ),
    Case(
        "padded",
        attention("padded", "    input len : int[b]\n    attend { k < len[b] }\n"),
        lambda x: lambda b, h, q, k: (k < x["len"][b]) & (q == q),
        lengths,
    ),
    Case(
        "softcap",
        attention("softcapped", "    score softcap(s, 20.0)\n    attend causal & window(400)\n"),
        lambda _: lambda b, h, q, k: (k <= q) & (q - k < 400),
        score=lambda _: lambda s, h, q, k: 20.0 * torch.tanh(s / 20.0),
    ),
    Case(
        "slopes",
        attention("slopes", "    input slope : float[h]\n    score s - slope[h] * (q - k)\n    attend causal\n"),
        lambda _: lambda b, h, q, k: k <= q,
        slopes,
        score=lambda x: lambda s, h, q, k: s - x["slope"][h].to(s.dtype) * (q - k),
    ),
    Case(
        "softmax sink",
        attention(
            "sunk", "    input sinks : float[h]\n    softmax with sink sinks[h]\n    attend causal & window(128)\n"
        ),
        lambda _: lambda b, h, q, k: (k <= q) & (q - k < 128),
        sinks,
        any_rows=True,
    ),
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (64, 80, 96, 128, 192, 256)
LENGTHS = (1, 17, 127, 1000, 2049)
HEADS = ((4, 4), (8, 2), (6, 1))


def random_shape(case: Case, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Shape:
    """A shape of the given head dimension: lengths, groups, batch, layout and Nq drawn at random."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    heads, kv_heads = HEADS[pick(len(HEADS))]
    k_len = LENGTHS[pick(len(LENGTHS))]
    rows = k_len if pick(2) else LENGTHS[pick(len(LENGTHS))]
    if not case.any_rows:
        rows = min(rows, k_len)
    v_dim = dim if pick(4) else 64
    return Shape(1 + pick(2), heads, kv_heads, rows, k_len, dim, v_dim, dtype, strided=pick(3) == 0)
