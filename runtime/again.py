"""The last kind of call of a program, recognised in one step.

Most calls are like the one before them. Torch has a check of just that, which torch.compile makes before it runs a
graph: of types, dtypes, devices, sizes, strides, of who requires a gradient, and of the dispatcher's keys, in which
autocast, inference mode, torch.func and modes of Python show. It takes a quarter of the time of what it stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The check is not public: it is made with versions of torch that it was tested on. With others no call is recognised.
GUARD_VERSIONS = ("2.11.", "2.13.")
_UNALIGNED = 15


@functools.cache
def _guards() -> Any:
    """The class of torch's checks, None where it is not known."""
    if not torch.__version__.startswith(GUARD_VERSIONS):
        return None
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards


def _nested(x: object) -> bool:
    return getattr(x, "is_nested", False)


@dataclass(frozen=True, slots=True)
class Again:
    """A kind of call without dropout, and its launch.

    `wants_gradients`: whether a tensor requires a gradient, so that autograd records the call where it is at work.
    `output`: the launch of calls that ask for no lse, where there is one.
    """

    check: Callable[..., bool]
    backend: str
    sign: bool | None
    wants_gradients: bool
    launch: Callable[..., Any]
    output: Callable[..., Any] | None

    def fits(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None, backend: str
    ) -> bool:
        """Whether a call that torch.compile does not trace is of this kind. inputs: as many as the program has."""
        return (
            # Torch's check ends the process at nested tensors.
            not (_nested(q) or _nested(k) or _nested(v))
            and self.check(q, k, v, *inputs)
            and self.backend == backend
            and self.sign is (scale if scale is None else scale > 0)
            and not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & _UNALIGNED
            # Not among the keys: the compiler's own modes, and forward-mode gradients.
            and not torch._C._len_torch_dispatch_stack()
            and forward_ad._current_level < 0
        )


@dataclass(frozen=True, slots=True)
class AgainBackward:
    """A kind of backward pass, of calls without dropout whose lse has no gradient. `call`: the check of all that it
    reads, and its launch."""

    call: Again
    deterministic: bool

    def fits(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, inputs: Sequence[Tensor],
        scale: float | None, backend: str,
    ) -> bool:  # fmt: skip
        """Whether a backward pass, which nothing traces and nobody differentiates, is of this kind."""
        return (
            self.call.fits(q, k, v, (dout, out, lse, *inputs), scale, backend)
            and not (dout.data_ptr() | out.data_ptr()) & _UNALIGNED
            and self.deterministic is torch.are_deterministic_algorithms_enabled()
        )


def again_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, inputs: Sequence[Tensor],
    scale: float | None, backend: str, launch: Callable[..., Any],
) -> AgainBackward | None:  # fmt: skip
    """What recognises backward passes like this one, where calls are recognised."""
    if (dout.data_ptr() | out.data_ptr()) & _UNALIGNED:
        return None
    call = again(q, k, v, (dout, out, lse, *inputs), scale, backend, launch)
    return None if call is None else AgainBackward(call, torch.are_deterministic_algorithms_enabled())


def again(
    q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None, backend: str,
    launch: Callable[..., Any],
) -> Again | None:  # fmt: skip
    """What recognises calls like this one. None where torch's check is not known, or pointers are not aligned."""
    guards, tensors = _guards(), (q, k, v, *inputs)
    if guards is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) & _UNALIGNED:
        return None
    guard = guards(
        *tensors,
        dynamic_dims_sizes=[list(x.shape) for x in tensors],
        dynamic_dims_strides=[list(x.stride()) for x in tensors],
    )
    sign, wants = scale if scale is None else scale > 0, any(x.requires_grad for x in tensors)
    return Again(guard.check, backend, sign, wants, launch, getattr(launch, "output", None))
