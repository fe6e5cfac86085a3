"""The torch operator of float8 tensors: how they take part in torch.compile, export and CUDA graphs. No gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.diagnostics import error
from attndsl.program import CallShape
from attndsl.runtime.call import check_call
from attndsl.runtime.ops import checked_values, traced
from attndsl.runtime.outputs import Outputs
from attndsl.runtime.quantized import Scales
from attndsl.runtime.registry import engine_of

_LIBRARY = Library("attndsl", "FRAGMENT")
_LIBRARY.define(
    "quantized(str program, Tensor q, Tensor k, Tensor v, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, "
    "Tensor[] inputs, SymInt[] args, float? scale, str backend) -> (Tensor, Tensor)"
)


def attend_quantized(
    key: str, plain: bool, q: Tensor, k: Tensor, v: Tensor, scales: object,
    inputs: list[Tensor], args: list[int], scale: float | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse. plain: the call asks for nothing but an attention of its tensors."""
    if not plain:
        raise error(
            "A581", "float8 tensors are attended without dropout, selections, views and observations",
            help="convert q, k and v to bfloat16",
        )  # fmt: skip
    found = (None, None, None) if scales is None else tuple(scales) if isinstance(scales, Sequence) else ()
    if len(found) != 3 or not all(x is None or isinstance(x, Tensor) for x in found):
        raise error(
            "A580", "`scales` is not (q_scale, k_scale, v_scale)", help="each is a float tensor, or None where it is 1"
        )
    checked_values(key, inputs, args)
    check_call(scale, q=q, k=k, v=v)
    given = [x for x in found if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *given, *inputs)):
        raise error(
            "A581", "float8 tensors have no gradients, and neither have their scales",
            help="call it under torch.no_grad(), or convert q, k and v to bfloat16",
        )  # fmt: skip
    if traced((q, k, v, *given, *inputs)):
        out: tuple[Tensor, Tensor] = torch.ops.attndsl.quantized(key, q, k, v, *found, inputs, args, scale, backend)
        return out
    return engine_of(key).quantized(q, k, v, Scales(*found), inputs, args, scale, backend)


def _quantized(
    key: str, q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return engine_of(key).quantized(q, k, v, Scales(q_scale, k_scale, v_scale), inputs, args, scale, backend)


def _quantized_fake(key: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    made = Outputs.of(q, CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]))
    return q.new_empty_strided(made.sizes, made.strides, dtype=torch.bfloat16), made.lse(q)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("quantized", _quantized, _device)
_LIBRARY.impl("quantized", _quantized_fake, "Meta")
