"""The torch operators: how a compiled attention takes part in autograd, torch.compile, export and CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn import Parameter

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


def attend(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], args: list[int], scale: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and lse. Where nothing watches the call (no tracing, no gradients, plain tensors) it skips the dispatcher,
    which costs several times a launch."""
    if torch.compiler.is_compiling() or _watched((q, k, v, *inputs)):
        out: tuple[Tensor, Tensor] = torch.ops.attndsl.forward(key, q, k, v, inputs, args, scale, backend)
        return out
    return _forward(key, q, k, v, inputs, args, scale, backend)


def _watched(tensors: tuple[Tensor, ...]) -> bool:
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    grad = torch.is_grad_enabled()
    for x in tensors:
        if (grad and x.requires_grad) or (type(x) is not Tensor and type(x) is not Parameter):
            return True
    return False


def _forward(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    # The kernels want the last dimension dense; other strides are theirs to handle.
    if q.dim() and k.dim() and v.dim() and not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return engine_of(key).forward(q, k, v, inputs, args, scale, backend)


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
