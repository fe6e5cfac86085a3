"""Decode skips tiles by sorted data: exact over ragged lengths, whatever lies past a sequence's last token, and nothing
of what it skips is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.derivation import Cut
from attndsl.plan import Tiling
from attndsl.runtime.decode import Decoder
from attndsl.runtime.derive_ragged import ragged_deriver
from tests.decoding import check_decode, decoder, tensors_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
CAPACITY, BATCH = 96, 4
TEXTS = {
    "documents": "input ids : int[b, k] sorted  attend causal & document(ids)",
    "shared": "input ids : int[k] sorted  attend causal & document(ids)",
    "near documents": "input ids : int[b, k] sorted  attend causal & { ids[k] >= ids[q] - 1 }",
    "other documents": "input ids : int[b, k] sorted  attend causal - document(ids)",
    "first": "input ids : int[b, k] sorted  attend causal & ({ ids[k] == 0 } | window(9))",
    "limits": "input limit : int[b, q] sorted  attend causal & { k < limit[q] }",
    "from": "input limit : int[b, k] sorted  attend causal & { k >= limit[q] or k < 3 }",
    "heads": "input per : int[b, h, k] sorted  attend causal & { per[h, k] == per[h, q] }",
    "of a batch": "input ids : int[b, k] sorted  attend causal & { ids[k] + b >= ids[q] }",
    "blocks": "input block : int[b, k/8] sorted  attend causal & { block[k // 8] == block[q // 8] }",
    "sink": "input ids : int[b, k] sorted  softmax with sink 0  attend causal & document(ids) & window(30)",
}


def inputs_of(attn: attndsl.Attention, lengths: list[int], rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Sorted as far as a sequence goes, and anything after."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*size: int) -> Tensor:
        return (torch.rand(size, generator=generator) < 0.15).cumsum(-1)

    sizes: dict[str, tuple[int, ...]] = {
        "ids": (BATCH, CAPACITY), "per": (BATCH, 4, CAPACITY), "block": (BATCH, CAPACITY // 8), "limit": (BATCH, rows),
    }  # fmt: skip
    found = {}
    for decl in attn.program.inputs:
        if decl.name == "ids" and len(decl.dims) == 1:
            found["ids"] = ids(CAPACITY)
            continue
        x = ids(*sizes[decl.name])
        if decl.name == "limit":
            every = torch.rand(BATCH, CAPACITY, generator=generator).mul(CAPACITY).long().sort(-1).values
            last = [slice(max(n - rows, 0), max(n - rows, 0) + rows) for n in lengths]
            x = every if decl.dims[-1].axis.value == "k" else torch.stack([every[b, at] for b, at in enumerate(last)])
        elif decl.name != "block":
            for b, length in enumerate(lengths):
                wild = torch.randint(-(2**31), 2**31 - 1, x[b, ..., length:].shape, generator=generator)
                x[b, ..., length:] = wild
        found[decl.name] = x.to(torch.int32)
    return found


def made(attn: attndsl.Attention, backend: str) -> Decoder:
    return decoder(attn.program, tiling=Tiling(16, 16) if backend == "triton" else Tiling(64, 16), splits=2)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", TEXTS)
def test_sorted_data(name: str, backend: str) -> None:
    attn = attndsl.compile(f"attention a {{ {TEXTS[name]} }}")
    number = list(TEXTS).index(name)
    for rows, page in ((1, None), (1 + number % 4, 8)):
        lengths = [CAPACITY, 37, 2, 0]
        generator = torch.Generator().manual_seed(number)
        sizes = ((4, rows), (2, CAPACITY), (2, CAPACITY))
        q, k, v = (torch.randn(BATCH, *size, 16, generator=generator) for size in sizes)
        inputs = inputs_of(attn, lengths, rows, number)
        call = tensors_of(q, k, v, lengths, page, torch.device("cpu"))
        given = [inputs[decl.name] for decl in attn.program.inputs]
        out, lse = made(attn, backend).decode(call, given, [], None, backend)
        check_decode(attn.program, q, k, v, lengths, inputs, {}, out, lse)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("name", ["documents", "near documents", "other documents", "from"])
def test_the_largest_value_of_a_dtype(name: str, dtype: torch.dtype, backend: str) -> None:
    """What lies past a sequence counts as the largest: tokens that hold it themselves are told from it by place."""
    attn, lengths = attndsl.compile(f"attention a {{ {TEXTS[name]} }}"), [CAPACITY, 37, 2, 0]
    for rows in (1, 3):
        generator = torch.Generator().manual_seed(rows)
        q, k, v = (torch.randn(BATCH, *size, 16, generator=generator) for size in ((4, rows), *[(2, CAPACITY)] * 2))
        ids = torch.zeros(BATCH, CAPACITY, dtype=dtype)
        for b, length in enumerate(lengths):
            # After a sequence the least, or the largest too.
            ids[b, length // 3 : length // 2] = torch.iinfo(dtype).max - 1
            ids[b, length // 2 : length] = torch.iinfo(dtype).max
            ids[b, length:] = torch.iinfo(dtype).max if b % 2 else torch.iinfo(dtype).min
        given = {decl.name: ids for decl in attn.program.inputs}
        call = tensors_of(q, k, v, lengths, None, torch.device("cpu"))
        out, lse = made(attn, backend).decode(call, [*given.values()], [], None, backend)
        check_decode(attn.program, q, k, v, lengths, given, {}, out, lse)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_other_documents_are_not_read(backend: str) -> None:
    """Their values are NaN, which a masked tile would spread."""
    attn = attndsl.compile(f"attention a {{ {TEXTS['documents']} }}")
    q, k, v = (torch.randn(1, heads, tokens, 16) for heads, tokens in ((4, 1), (2, CAPACITY), (2, CAPACITY)))
    ids = (torch.arange(CAPACITY) // 40)[None].to(torch.int32)
    v[:, :, :64] = torch.nan
    call = tensors_of(q, k, v, [CAPACITY], None, torch.device("cpu"))
    out, _ = made(attn, backend).decode(call, [ids], [], None, backend)
    assert not out.isnan().any()


@pytest.mark.parametrize("name", TEXTS)
def test_entries_of_hostile_data_lie_inside_a_sequence(name: str) -> None:
    """Data in no order, and of any size: no key before the first or past the last is named."""
    attn = attndsl.compile(f"attention a {{ {TEXTS[name]} }}")
    lengths, rows = [CAPACITY, 37, 2, 0], 3
    q, k = torch.zeros(BATCH, 4, rows, 16), torch.zeros(BATCH, 2, CAPACITY, 16)
    call = tensors_of(q, k, k, lengths, None, torch.device("cpu"))
    given = [torch.randint_like(x, -(2**31), 2**31 - 1) for x in inputs_of(attn, lengths, rows).values()]
    from attndsl.decode import Cache, decode_plan
    from attndsl.plan import DType, Spec

    plan = decode_plan(attn.program, Spec(4, 2, 16, 16, DType.FLOAT32, "cpu"), rows, Cache(), split=False)
    maker = ragged_deriver(plan.program, call.shape, q.device, given)
    assert (maker is None) == (name == "heads")
    if maker is None:
        return
    found = maker.of(given, [], call.seq_lens)
    names = [decl.name for decl in plan.program.inputs if isinstance(decl.derivation, Cut)]
    for entries in found[len(found) - len(names) :]:
        limits = call.seq_lens.view(-1, *[1] * (entries.dim() - 1))
        assert ((entries >= 0) & (entries <= limits.clamp(min=1))).all()
