"""Every example in a decode: each sequence's last rows are those of a call on it alone, by the oracle."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.compose import has_lse
from attndsl.plans import own_program
from attndsl.program import Axis, InputDecl, Type
from tests.decoding import of_length, paged
from tests.test_hopper_examples import EXAMPLES, PARAMS

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
LENGTHS, CAPACITY, DIM = [150, 37, 3, 0], 160, 16
HEADS = {"moa": (8, 2)}
# Of those whose choices would take all of so few tokens.
SMALL: dict[str, dict[str, Any]] = {
    "nsa": {"block": 16, "n": 3, "span": 9}, "moba": {"block": 16, "n": 3}, "flash_moba": {"block": 16, "n": 3},
    "quest": {"page": 8, "budget": 32}, "dsa": {"n": 9}, "token_select": {"first": 2, "near": 5, "n": 7},
    "tidal_select": {"n": 9}, "regions": {"region": 9, "n": 3}, "biformer": {"n": 2, "region": 4, "width": 13},
    "pbs": {"segment": 32, "block": 16, "share": 0.5}, "svg_ear": {"block": 32, "n": 3},
    "flex_prefill": {"block": 16}, "vmoba_global": {"block": 16}, "vmoba": {"block": 16},
    "vertical_slash": {"columns": 9, "slashes": 20, "probe": 3, "sinks": 2, "near": 5},
    "vmoba_video": {"height": 6, "width": 7, "tile": 3}, "xattention": {"block": 16, "stride": 4},
    "psa": {"block": 16, "stride": 4}, "minference_blocks": {"n": 1},
}  # fmt: skip
REFUSED: dict[str, str] = {}
# One input holds keys and values.
ALIKE = ("hsa", "landmark")


def drawn(decl: InputDecl, sizes: dict[Axis, int], rows: int, generator: torch.Generator) -> Tensor:
    """What an input of an example may hold: ids that do not decrease, or a permutation, where it is of tokens."""
    shape = []
    for dim in decl.dims:
        tokens = {Axis.Q: rows if dim.block == 1 else CAPACITY, Axis.K: CAPACITY, Axis.LIST: 3}.get(dim.axis)
        shape.append(dim.size if dim.axis is Axis.CONST else sizes.get(dim.axis, -(-(tokens or 0) // dim.block)))
    if decl.type is Type.FLOAT:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    if decl.type is Type.BOOL:
        return torch.rand(shape, generator=generator) < 0.5
    if decl.members is not None:
        return torch.arange(3, dtype=torch.int32).expand(shape)
    if decl.name == "pi":
        # Of a part of each length: of a sequence alone too it says where every token lies.
        parts = (0, 3, 37, 150, CAPACITY)
        of_parts = (torch.randperm(b - a, generator=generator) + a for a, b in pairwise(parts))
        return torch.cat(list(of_parts)).expand(shape).to(torch.int32)
    found = torch.randint(0, 12, shape, generator=generator)
    return (found.sort(-1).values if decl.dims and decl.dims[-1].axis is Axis.K else found).to(torch.int32)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_decode(path: Path, page: int | None) -> None:
    name, rows, batch = path.stem, 1 if page is None else 5, len(LENGTHS)
    attn = attndsl.compile(path, **PARAMS.get(name, {}), **SMALL.get(name, {}))
    heads, kv_heads = HEADS.get(name, (4, 2))
    v_dim = DIM if name in ALIKE else 24
    generator = torch.Generator().manual_seed(0)
    sizes = {Axis.B: batch, Axis.H: heads, Axis.G: kv_heads, Axis.D: DIM, Axis.DV: v_dim}
    q, k, v = (
        torch.randn(batch, h, n, dim, generator=generator, dtype=torch.float64)
        for h, n, dim in ((heads, rows, DIM), (kv_heads, CAPACITY, DIM), (kv_heads, CAPACITY, v_dim))
    )
    for b, length in enumerate(LENGTHS):
        k[b, :, length:] = v[b, :, length:] = float("nan")
    inputs: dict[str, Any] = {
        decl.name: drawn(decl, sizes, rows, generator) for decl in own_program(attn.program).inputs
    }
    cache = (k, v, None) if page is None else paged(k, v, page)
    with_lse = has_lse(attn.program) and all(branch.weights is None for branch in attn.program.branches)
    call: Any = (q, *cache[:2], torch.tensor(LENGTHS, dtype=torch.int32), cache[2])
    if name in REFUSED:
        with pytest.raises(attndsl.PatternError, match=REFUSED[name]):
            attn.decode(*call, return_lse=with_lse, **inputs)
        return
    found = attn.decode(*call, return_lse=with_lse, **inputs)
    out, lse = found if with_lse else (found, None)
    others = {decl.name: torch.zeros([1] * len(decl.dims)) for decl in attn.program.inputs}
    for b, length in enumerate(LENGTHS):
        here = min(rows, length)
        before = rows - here
        assert not out[b, :, :before].any(), "rows before the first token give 0"
        if here == 0:
            continue
        # As entry b of a batch, which the pattern may read.
        alone: Any = [
            x[b : b + 1].expand(batch, -1, -1, -1) for x in (q[:, :, before:], k[:, :, :length], v[:, :, :length])
        ]
        cut = of_length(attn.program, others | inputs, length, here)
        given: Any = {key: x for key, x in cut.items() if key in inputs}
        exact = attn.reference(*alone, return_lse=with_lse, **given)
        wanted = exact if with_lse else (exact,)
        for x, right in zip((out, lse), wanted, strict=False):
            assert x is not None
            torch.testing.assert_close(x[b, :, before:], right[b], rtol=1e-9, atol=1e-9)
