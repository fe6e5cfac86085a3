"""The torch operators: how a compiled attention takes part in autograd, torch.compile, export and CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attndsl.diagnostics import error
from attndsl.program import CallShape

from attndsl.runtime.engine import Engine, empty_output

_LIBRARY = Library("attndsl", "DEF")
_LIBRARY.define(
    "forward(str program, Tensor q, Tensor k, Tensor v, Tensor[] inputs, SymInt[] args, float? scale, str backend) "
    "-> (Tensor, Tensor)"
)

_ENGINES: dict[str, Engine] = {}
_REGISTERING = threading.Lock()


def register(key: str, engine: Engine) -> None:
    """Make a program known to the operators under its key; the first engine of a key stays."""
    with _REGISTERING:
        _ENGINES.setdefault(key, engine)


def engine_of(key: str) -> Engine:
    try:
        return _ENGINES[key]
    except KeyError:
        raise error(
            "A520", "this process has not compiled the attention that the graph calls",
            help="call attndsl.compile with the same program before running an exported graph",
        ) from None  # fmt: skip


def _forward(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    return engine_of(key).forward(*_dense(q, k, v), inputs, args, scale, backend)


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels want the last dimension dense; other strides are theirs to handle."""
    return tuple(x if x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors)


def _forward_fake(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return empty_output(q, shape)


class _Attend(torch.autograd.Function):
    """Forward, and a backward that says what is missing."""

    @staticmethod
    def forward(ctx: Any, key: str, scale: float | None, backend: str, args: Sequence[int], q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> Any:  # noqa: E501
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.attndsl.forward(key, q, k, v, list(inputs), args, scale, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise error("A920", "gradients are not yet supported")


def _forward_autograd(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _Attend.apply(key, scale, backend, args, q, k, v, *inputs)
    return out


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("forward", _forward, _device)
_LIBRARY.impl("forward", _forward_autograd, "Autograd")
torch.library.register_fake("attndsl::forward", _forward_fake, lib=_LIBRARY)
