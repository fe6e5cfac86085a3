"""The examples whose tiles data decides, each against a rule written independently of the language in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import attndsl
from tests import rules
from tests.covered import covers
from tests.rules import BATCH, HEADS, KV_HEADS, Pairs, shape_of

Array = NDArray[Any]
EXAMPLES = Path(__file__).parent.parent / "examples" / "patterns"


def packed(p: Pairs) -> Array:
    """Window of 4 and a sink of 2, counted inside runs of equal ids."""
    seen = np.zeros((BATCH, 1, p.shape.rows, p.n), bool)
    for b, ids in enumerate(p.data["doc"]):
        for row, q in enumerate(p.q.ravel()):
            start = q
            while start > 0 and ids[start - 1] == ids[q]:
                start -= 1
            for k in range(start, q + 1):
                seen[b, 0, row, k] = q - k < 4 or k - start < 2
    return seen


def padded(p: Pairs) -> Array:
    return np.asarray((p.q < p.of_batch("n")) & (p.k < p.of_batch("n")))


def block_sinks(p: Pairs) -> Array:
    """Block-Attention, and the first two tokens of every segment for all rows after them."""
    first = np.zeros((BATCH, 1, 1, p.n), bool)
    for b, ids in enumerate(p.data["seg"]):
        for segment in set(ids.tolist()):
            first[b, 0, 0, np.flatnonzero(ids == segment)[:2]] = True
    return np.asarray(rules.block_attention(p) | p.causally(first))


def segments(rng: np.random.Generator, n: int) -> dict[str, Array]:
    ids = np.sort(rng.integers(0, 4, (BATCH, n)), axis=1).astype(np.int32)
    return {"seg": ids, "final": ids[:, -1].astype(np.int32)}


def runs_of_ids(rng: np.random.Generator, n: int) -> dict[str, Array]:
    return {"doc": np.repeat(rng.integers(0, 3, (BATCH, n)), 7, axis=1)[:, :n].astype(np.int32)}


@dataclass(frozen=True)
class Example:
    rule: Callable[[Pairs], Array]
    data: Callable[[np.random.Generator, int], dict[str, Array]] = lambda rng, n: {}
    params: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 17, 61, 130)
    file: str = ""


KNOWN: dict[str, Example] = {
    "documents": Example(rules.documents, lambda rng, n: {"doc": segments(rng, n)["seg"]}),
    "packed": Example(packed, runs_of_ids, {"span": 4, "sinks": 2}),
    "padded": Example(padded, lambda rng, n: {"n": np.array([n, n // 2], np.int32)}),
    "block_attention": Example(rules.block_attention, segments),
    "block_attention_sinks": Example(block_sinks, segments, {"sinks": 2}, file="block_attention"),
    "blockrank": Example(rules.blockrank, segments),
    "star": Example(rules.star, lambda rng, n: {"context": np.array([n // 2, n], np.int32)}, {"size": 7}),
    "block_diffusion": Example(rules.block_diffusion, params={"size": 3}, lengths=(2, 16, 62, 130)),
    "nats": Example(rules.nats, rules._nats, lengths=(1, 17, 45)),
    "flashmask": Example(rules.flashmask, rules._flashmask, lengths=(1, 17, 45)),
}


def tensors(name: str, n: int, rows: int) -> tuple[attndsl.Attention, list[Tensor], dict[str, Any], Tensor]:
    """The compiled example, float64 q, k, v, its inputs, and the rule's mask."""
    example, rng = KNOWN[name], np.random.default_rng(n)
    data = example.data(rng, n)
    attn = attndsl.compile(EXAMPLES / f"{example.file or name}.attn", **example.params)
    shape = shape_of(n, rows, 16)
    seen = np.broadcast_to(example.rule(Pairs(shape, data)), (BATCH, HEADS, rows, n)).copy()
    sizes = ((HEADS, rows), (KV_HEADS, n), (KV_HEADS, n))
    qkv = [torch.from_numpy(rng.standard_normal((BATCH, heads, size, 16))) for heads, size in sizes]
    declared = {decl.name for decl in attn.program.inputs}
    return attn, qkv, {k: torch.from_numpy(x) for k, x in data.items() if k in declared}, torch.from_numpy(seen)


def dense(qkv: list[Tensor], seen: Tensor) -> Tensor:
    """Softmax attention over the pairs of a mask, by torch's own operations."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    weights = (q @ k.mT / 4.0).masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.masked_fill(~seen, 0.0) @ v


@covers(*(example.file or name for name, example in KNOWN.items()))
@pytest.mark.parametrize("name", KNOWN)
def test_forward_and_backward(name: str) -> None:
    for n in KNOWN[name].lengths:
        for rows in sorted({n, max(1, n // 3)}):
            attn, qkv, inputs, seen = tensors(name, n, rows)
            ours = [x.clone().requires_grad_() for x in qkv]
            theirs = [x.clone().requires_grad_() for x in qkv]
            out, expected = attn(*ours, **inputs), dense(theirs, seen)
            torch.testing.assert_close(out, expected, msg=f"{name} of {rows} x {n}")
            passed = torch.from_numpy(np.random.default_rng(1).standard_normal(out.shape))
            found = torch.autograd.grad(out, ours, passed)
            wanted = torch.autograd.grad(expected, theirs, passed)
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x, torch.nan_to_num(y))


@pytest.mark.parametrize("name", KNOWN)
def test_the_mask_is_the_rule(name: str) -> None:
    for n in KNOWN[name].lengths:
        attn, _, inputs, seen = tensors(name, n, n)
        given = {key: x.numpy() for key, x in inputs.items()}
        # The batch entries one by one: `mask` is of one.
        for b in range(BATCH):
            of_one: dict[str, Any] = {key: x[b : b + 1] if x.shape[0] == BATCH else x for key, x in given.items()}
            found = attn.mask(n, n, heads=HEADS, kv_heads=KV_HEADS, **of_one)
            np.testing.assert_array_equal(np.broadcast_to(found, seen.shape[1:]), seen[b].numpy())


def test_documents_from_offsets() -> None:
    offsets = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    ids = attndsl.document_ids(offsets, 12)
    assert ids.dtype == torch.int32
    # An empty document has no token; what follows the last offset is a document of its own.
    assert ids.tolist() == [[0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 3, 3]]
    both = attndsl.document_ids(torch.stack([offsets, torch.tensor([0, 1, 2, 12], dtype=torch.int32)]), 12)
    assert both[1].tolist() == [0, 1, *[2] * 10]
