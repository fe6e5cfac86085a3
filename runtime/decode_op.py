"""The torch operator of decode: how it takes part in torch.compile, export and CUDA graphs. It has no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.diagnostics import error
from attndsl.program import CallShape
from attndsl.runtime.call import check_backend, check_call
from attndsl.runtime.decode import DecodeTensors
from attndsl.runtime.ops import checked_values, traced, wants_gradients
from attndsl.runtime.outputs import empty_output
from attndsl.runtime.registry import decoder_of

LAYOUTS = ("hnd", "nhd")
_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "decode(str program, Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor? page_table, "
    "Tensor? k_scale, Tensor? v_scale, Tensor[] inputs, SymInt[] args, float? scale, str layout, str backend) "
    "-> (Tensor, Tensor)"
)


def decode(
    key: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    inputs: list[Tensor],
    args: list[int],
    scale: float | None,
    layout: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and lse; past the dispatcher where nothing traces the call or asks for gradients."""
    checked_values(key, inputs, args)
    _check(scale, q, k_cache, v_cache, seq_lens, page_table, k_scale, v_scale)
    check_backend(backend)
    call = (
        key, q, k_cache, v_cache, seq_lens, page_table, k_scale, v_scale, inputs, args, scale, layout, backend
    )  # fmt: skip
    tensors = (q, k_cache, v_cache, *inputs)
    if traced(tensors) or wants_gradients(tensors):
        found: tuple[Tensor, Tensor] = torch.ops.attndsl.decode(*call)
        return found
    return _decode(*call)


def in_order(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, page_table: Tensor | None, layout: str,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, scale: float | None = None,
) -> DecodeTensors:  # fmt: skip
    """A call's tensors, heads before tokens. Raises `PatternError` for what is no dense tensor, a scale that is no
    number, and where tensors do not lie as kernels need."""
    _check(scale, q, k_cache, v_cache, seq_lens, page_table, k_scale, v_scale)
    return _in_order(q, k_cache, v_cache, seq_lens, page_table, layout, k_scale, v_scale)


def _check(
    scale: object, q: object, k_cache: object, v_cache: object, seq_lens: object, page_table: object, k_scale: object,
    v_scale: object,
) -> None:  # fmt: skip
    check_call(scale, q=q, k_cache=k_cache, v_cache=v_cache, seq_lens=seq_lens)
    # Asked one by one: most calls have none of them, and a step counts in microseconds.
    if page_table is not None:
        check_call(None, page_table=page_table)
    if k_scale is not None:
        check_call(None, k_scale=k_scale)
    if v_scale is not None:
        check_call(None, v_scale=v_scale)


def _in_order(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, page_table: Tensor | None, layout: str,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> DecodeTensors:  # fmt: skip
    if layout not in LAYOUTS:
        raise error("A552", f"there is no layout {layout!r}", help=f"one of {', '.join(LAYOUTS)}")
    # Caches are large: one whose elements are not dense is refused, and not copied at every step.
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() == 4 and x.shape[3] > 1 and x.stride(3) != 1:
            raise error("A552", f"the last dimension of {name} has stride {x.stride(3)}", help="keep heads dense")
    if layout == "nhd" and k_cache.dim() == v_cache.dim() == 4:
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if q.dim() and q.stride(-1) != 1:
        q = q.contiguous()
    if page_table is not None and page_table.dim() and page_table.stride(-1) != 1:
        page_table = page_table.contiguous()
    return DecodeTensors(q, k_cache, v_cache, seq_lens, page_table, k_scale, v_scale)


def _decode(
    key: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    inputs: Sequence[Tensor],
    args: Sequence[int],
    scale: float | None,
    layout: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = _in_order(q, k_cache, v_cache, seq_lens, page_table, layout, k_scale, v_scale)
    return decoder_of(key).decode(call, inputs, args, scale, backend)


def _decode_fake(
    key: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    # The cache's heads and tokens do not show in the output.
    shape = CallShape(q.shape[0], q.shape[1], q.shape[1], q.shape[2], 0, q.shape[3], v_cache.shape[3])
    return empty_output(q, shape)


def _decode_autograd(key: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Any:
    inputs = rest[4]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache, *inputs)):
        raise error(
            "A555", "decode has no gradient", help="call it under torch.no_grad(), or train with the attention itself"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attndsl.decode(key, q, k_cache, v_cache, *rest)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("decode", _decode, _device)
_LIBRARY.impl("decode", _decode_autograd, "Autograd")
torch.library.register_fake("attndsl::decode", _decode_fake, lib=_LIBRARY)
