"""Kernels of the runtime's own, as functions of their tensors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attndsl.runtime.build import KernelSource, compile_kernel, parameters
from attndsl.runtime.call import device_target
from attndsl.runtime.launcher import Slot, launcher
from attndsl.runtime.load import load_source


def device_kernel(
    text: str, function: str, grid: int, device: torch.device, given: dict[str, Any], warps: int = 4
) -> Callable[..., None]:
    """A kernel of a text, compiled for the device, or interpreted where that is none.

    given: what each parameter is given, a number, or of a tensor (`x_ptr`) the dtype.
    """
    names = parameters(text, function)
    if grid == 0:
        return lambda **tensors: None
    if device.type != "cuda":
        kernel = getattr(load_source(text, function), function)[(grid,)]
        return lambda **tensors: kernel(*((given | tensors)[name] for name in names))
    from attndsl.runtime.triton_launch import POINTER, shared_cache

    types = tuple((name, POINTER[given[name]] if name.endswith("_ptr") else _integer(name)) for name in names)
    source = KernelSource(text, function, types, (), warps=warps, stages=1)
    compiled = compile_kernel(source, device_target(device), shared_cache(), whole=False)
    tensors = [name for name in names if name.endswith("_ptr")]
    template = [Slot(tensors.index(name), type) if name in tensors else given[name] for name, type in types]
    launch = launcher(compiled, grid, device.index, template)
    return lambda **found: launch([found[name] for name in tensors])


def _integer(name: str) -> str:
    return "i64" if name.startswith("stride_") or name.endswith(("_head", "_batch")) else "i32"
