"""Calls that do not fit: each is refused with a diagnostic that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
import attndsl.serving
from attndsl.api import load_attention
from attndsl.diagnostics import PatternError
from tests.gpu import interprets


def qkv(
    heads: int = 4,
    kv_heads: int = 2,
    rows: int = 20,
    k_len: int = 20,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((2, heads, rows, dim), (2, kv_heads, k_len, dim), (2, kv_heads, k_len, v_dim))
    q, k, v = (torch.zeros(size, dtype=dtype, device=device) for size in sizes)
    return q, k, v


def refused(code: str, message: str, call: Callable[[], Any]) -> PatternError:
    """Asserts that a call gives exactly one diagnostic, of this code, whose message holds this text."""
    with pytest.raises(PatternError) as caught:
        call()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert message in diagnostic.message
    return caught.value


CAUSAL = attndsl.compile("causal")
DOCUMENTS = attndsl.compile("attention documents { input doc : int[b, k] sorted\n attend causal & document(doc) }")
LOCAL = attndsl.compile("attention local(span : runtime int) { attend causal & window(span) }")
SPANS = attndsl.compile("attention spans(span : int[h]) { attend causal & window(span[h]) }", span=[1, 2, 3, 4])
BIASED = attndsl.compile("attention biased { input bias : float[h]\n score s + bias[h]\n attend causal }")
SIGMOID = attndsl.compile("attention sigmoids { weights sigmoid(s)\n attend causal }")


# ---------------------------------------------------------------------------------- q, k and v


@pytest.mark.parametrize("position", range(3))
def test_dimensions(position: int) -> None:
    tensors = list(qkv())
    tensors[position] = tensors[position][0]
    name = "qkv"[position]
    refused("A501", f"{name} must have 4 dimensions [batch, heads, tokens, dim]", lambda: CAUSAL(*tensors))


def test_dtype() -> None:
    q, k, v = qkv(dtype=torch.int32)
    refused("A502", "q is int32", lambda: CAUSAL(q, k, v))
    q, k, v = qkv()
    refused("A502", "q is float32 and v is float16", lambda: CAUSAL(q, k, v.half()))
    # … also after a good call of the same shapes, whose kernel is ready.
    CAUSAL(q, k, v)
    refused("A502", "q is float32 and k is float16", lambda: CAUSAL(q, k.half(), v))


def test_device() -> None:
    q, k, v = qkv()
    CAUSAL(q, k, v)
    refused("A503", "q is on cpu and k on meta", lambda: CAUSAL(q, k.to("meta"), v))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q, k[..., :8], v),
        lambda q, k, v: (q, k, v[:, :, 1:]),
        lambda q, k, v: (q, k, v[:, :1]),
    ],
    ids=["batch", "dim", "length", "heads"],
)
def test_shapes(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    error = refused("A504", "do not go together", lambda: CAUSAL(*change(*qkv())))
    assert "k [B, Hkv, Nk, D]" in error.diagnostics[0].help


def test_heads() -> None:
    refused("A505", "4 query heads are not a multiple of 3 key heads", lambda: CAUSAL(*qkv(4, 3)))
    refused("A505", "2 query heads are not a multiple of 4 key heads", lambda: CAUSAL(*qkv(2, 4)))
    refused("A505", "4 query heads are not a multiple of 0 key heads", lambda: CAUSAL(*qkv(4, 0)))


@pytest.mark.parametrize("dim", [12, 264, 0, 4])
def test_head_dimension(dim: int) -> None:
    refused("A506", f"D = {dim}: head dimensions are multiples of 8 up to 256", lambda: CAUSAL(*qkv(dim=dim)))
    refused("A506", f"Dv = {dim}: head dimensions are multiples of 8 up to 256", lambda: CAUSAL(*qkv(v_dim=dim)))


def test_more_rows_than_keys() -> None:
    window = attndsl.compile("band(3, 3)")
    error = refused("A507", "9 query rows for 5 keys", lambda: window(*qkv(rows=9, k_len=5)))
    assert error.diagnostics[0].span is not None
    assert "align start" in error.diagnostics[0].help


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("text", [
    # Rows before the first token see nothing under `causal`; the others do not ask where a row stands.
    "causal", "all", "attention a { x = attend all over pool(mean, 2)\n y = attend causal\n output x - y }",
    "attention a { input near : blocks(2)[b, h]\n softmax with sink 1\n attend near }",
    "attention a { attend causal & top(1, blocks(2), per = rows(2), by = dot(mean(Q), mean(K))) }",
])  # fmt: skip
def test_what_takes_more_rows_than_keys(text: str, backend: str) -> None:
    attn, (q, k, v) = load_attention(text), (torch.randn_like(x) for x in qkv(rows=9, k_len=5))
    inputs: dict[str, Any] = {"near": torch.randint(0, 3, (2, 4, 1))} if "near" in text else {}
    found = attn(q, k, v, backend=backend, **inputs)
    torch.testing.assert_close(found.double(), attn.reference(q, k, v, **inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clauses", [
    "attend all from pool(max, 3)", "attend all & top(1, blocks(2), per = head, by = dot(mean(Q), mean(K)))",
    "x = attend all\n y = attend causal\n output y\n observe n = probs(x, sum, head, tokens)",
    "x = attend all\n y = attend all within blocks(2) with probs(x)\n output y",
])  # fmt: skip
def test_classes_of_rows_before_the_first_token(clauses: str) -> None:
    """What is chosen, pooled or observed for classes of rows is so by their positions."""
    attn = load_attention(f"attention a {{ {clauses} }}")
    observed = "observe" in clauses
    refused("A507", "9 query rows for 5 keys", lambda: attn(*qkv(rows=9, k_len=5), return_observed=observed))


# ------------------------------------------------------------------------------------- backends


def test_backend() -> None:
    refused("A509", "there is no backend 'cuda'", lambda: CAUSAL(*qkv(), backend="cuda"))


@interprets
def test_triton_dtypes() -> None:
    refused("A508", "float64 runs on the CPU backend only", lambda: CAUSAL(*qkv(dtype=torch.float64), backend="triton"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_interpreted_bfloat16() -> None:
    refused(
        "A508", "Triton's interpreter does not multiply bfloat16",
        lambda: CAUSAL(*qkv(dtype=torch.bfloat16), backend="triton"),
    )  # fmt: skip


# ------------------------------------------------------------------------- inputs and arguments


def test_missing_and_unknown_names() -> None:
    q, k, v = qkv()
    refused("A522", "`doc` is missing: this attention takes doc", lambda: DOCUMENTS(q, k, v))
    refused("A522", "`span` is missing: this attention takes span", lambda: LOCAL(q, k, v))
    refused("A522", "`doc` is missing", lambda: DOCUMENTS(q, k, v, docs=torch.zeros(2, 20, dtype=torch.int32)))
    refused("A522", "`doc` is not an input of this attention: it takes no inputs", lambda: CAUSAL(q, k, v, doc=1))
    refused("A522", "`sink` is not an input of this attention: it takes span", lambda: LOCAL(q, k, v, span=1, sink=2))


def test_input_type() -> None:
    q, k, v = qkv()
    error = refused(
        "A511",
        "input `doc` is declared int and the tensor is float32",
        lambda: DOCUMENTS(q, k, v, doc=torch.zeros(2, 20)),
    )
    assert "documents" in str(error), "the declaration is shown"
    bias = torch.zeros(4, dtype=torch.int32)
    refused("A511", "input `bias` is declared float and the tensor is int32", lambda: BIASED(q, k, v, bias=bias))


def test_input_device() -> None:
    doc = torch.zeros(2, 20, dtype=torch.int32, device="meta")
    refused("A512", "input `doc` is on meta and q on cpu", lambda: DOCUMENTS(*qkv(), doc=doc))


@pytest.mark.parametrize("size", [(20,), (2, 19), (3, 20), (2, 20, 1)])
def test_input_shape(size: tuple[int, ...]) -> None:
    doc = torch.zeros(size, dtype=torch.int32)
    message = f"input `doc` has shape {list(size)}; this call needs [2, 20]"
    refused("A513", message, lambda: DOCUMENTS(*qkv(), doc=doc))


def test_table() -> None:
    refused("A514", "table `span` has 4 entries for h; this call has 6", lambda: SPANS(*qkv(6, 2)))


def test_lse_of_weights() -> None:
    refused("A521", "there is no lse", lambda: SIGMOID(*qkv(), return_lse=True))


def test_argument_type() -> None:
    for span in (2.5, True):
        refused("A516", f"`span` is a runtime int, not {span}", partial(LOCAL, *qkv(), span=span))
        refused("A516", f"`span` is a runtime int, not {span}", partial(LOCAL.mask, 4, 4, span=span))
    refused("A517", "input `doc` is a tensor, not [[0, 0", lambda: DOCUMENTS(*qkv(), doc=[[0] * 20] * 2))


@pytest.mark.parametrize("scale", ["x", torch.tensor(0.5, requires_grad=True), [1.0]], ids=["text", "tensor", "list"])
def test_scale(scale: Any) -> None:
    q, k, v = qkv()
    lengths = torch.tensor([20, 20], dtype=torch.int32)
    branches = attndsl.compile("attention a { x = attend causal\n y = attend all\n output x + y }")
    decode: Any = CAUSAL.decode
    for run in (CAUSAL, branches, lambda *given, scale: decode(*given, lengths, scale=scale)):
        refused("A518", "`scale` is a number", partial(run, q, k, v, scale=scale))
    numbers: list[Any] = [1, 1.0, np.float32(1), True]
    same = [CAUSAL(q, k, v, scale=x) for x in numbers]
    assert all(torch.equal(same[0], x) for x in same)


def test_what_is_no_dense_tensor() -> None:
    q, k, v = qkv()
    nested = torch.nested.nested_tensor([x[0] for x in q])
    for _ in range(3):  # as the last call was, and not
        CAUSAL(q, k, v)
        refused("A501", "q is a tensor, not None", lambda: CAUSAL(None, k, v))  # type: ignore[arg-type]
        refused("A501", "v is a tensor, not array", lambda: CAUSAL(q, k, v.numpy()))  # type: ignore[arg-type]
        refused("A501", "k is a dense tensor, not one of torch.sparse_coo", lambda: CAUSAL(q, k.to_sparse(), v))
        refused("A501", "q is a dense tensor, not one that is nested", lambda: CAUSAL(nested, k, v))
        refused("A517", "one that is nested", lambda: DOCUMENTS(q, k, v, doc=nested))
    doc = torch.zeros(2, 20, dtype=torch.int32).to_sparse()
    refused("A517", "input `doc` is a dense tensor", lambda: DOCUMENTS(q, k, v, doc=doc))
    refused("A501", "seq_lens is a tensor, not [20, 20]", lambda: CAUSAL.decode(q, k, v, [20, 20]))  # type: ignore[arg-type]
    number: Any = 7
    refused("A501", "page_table is a tensor, not 7", lambda: CAUSAL.decode(q, k, v, doc.to_dense()[0], number))


def test_what_programs_of_several_steps_are_handed() -> None:
    """Calls that make entries and choices first ask the same of what they are given."""
    text = (
        "attention a { x = attend causal over pool(mean, 4)\n plan p = top(1, blocks(4), among = causal, by = probs(x))"
    )
    attn: Any = load_attention(text + "\n y = attend causal & p\n output x + y }")
    q, k, v = qkv()
    lengths = torch.tensor([20, 9], dtype=torch.int32)
    views, served = attn.views(k, v, lengths), attndsl.serving.plan
    runs: list[Callable[..., Any]] = [
        lambda q, **options: attn(q, k, v, **options),
        lambda q, **options: attn.plan(q, k, **options),
        lambda q, **options: attn.decode(q, k, v, lengths, **options),
        lambda q, **options: served(attn, q, k, v, lengths, **options),
    ]
    for run in runs:
        refused("A501", "q is a tensor, not 'x'", partial(run, "x"))
        refused("A518", "`scale` is a number of 64 bits", partial(run, q, scale=1 << 64))
        refused("A572", "plans are given by name, not 3", partial(run, q, plans=3))
    for run in (runs[0], runs[2]):
        refused("A565", "the views of this attention", partial(run, q, views=7))
        refused("A509", "there is no backend ['cpu']", partial(run, q, backend=["cpu"]))
    refused("A567", "no tuple of tensors", partial(attn.decode, q, k, v, lengths, views=dict.fromkeys(views, 3)))
    refused("A501", "k is a tensor, not 3", partial(attn.views, 3, v))
    refused("A501", "k_cache is a tensor, not 3", partial(attn.views, 3, v, lengths))
    update = partial(attndsl.serving.update_views, attn, views, k, v, lengths)
    refused("A524", "`new` is a number of tokens, not None", partial(update, new=None))
    refused("A503", "q is on meta and k on cpu", partial(attn, q.to("meta"), k, v))


def test_questions_of_calls_that_are_none() -> None:
    for sizes in ((4.5, 4), (1 << 40, 4), (4, 1 << 31)):
        refused("A524", "there is no call with", partial(CAUSAL.mask, *sizes))
        refused("A524", "there is no call with", partial(CAUSAL.blocks, *sizes))
    refused("A558", "pages of 0 tokens", lambda: CAUSAL.evictable(5, page=0))
    lengths: list[Any] = [-1, True, "x", 2.0, 1 << 31]
    for length in lengths:
        refused("A524", "there is no sequence of", partial(CAUSAL.evictable, length))
    refused("A524", "there is no call with True rows", partial(CAUSAL.explain, True))
    wide = load_attention("attention a { axes y, x[2000000000]\n attend neighborhood(3) on (y, x) }")
    assert "boxes of the grid are not counted one by one here" in str(wide.explain(5))
    layer = attndsl.nn.Attention("causal", 16, 2)
    refused("A501", "x must have 3 dimensions", partial(layer, torch.ones(4, 16)))
    refused("A501", "context must have 3 dimensions", partial(layer, torch.ones(1, 4, 16), torch.ones(4, 16)))
    refused("A527", "0 heads are no multiple", lambda: attndsl.nn.Attention("causal", 16, 0))
    refused("A527", "2 heads are no multiple of 3 key heads", lambda: attndsl.nn.Attention("causal", 16, 2, 3))
